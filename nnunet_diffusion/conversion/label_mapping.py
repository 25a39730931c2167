"""What the labels of a data set mean in a common table: names only, no file is looked at."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from nnunet_diffusion.errors import UserError

Target = tuple[
    str, ...
]  # () left out, (name,) that label, (name, name, ...) their union: one of them, nobody said which
IGNORE = "ignore"


@dataclass(frozen=True)
class LabelMapping:
    """How one source's labels become those of the common table; made by `map_labels`.

    Attributes:
        source: Its name.
        targets: Of each of the source's labels.
        inside: {common name: common names that it lies in}, as this source has it.
        excludes: Common names that no voxel of its labels is.
    """

    source: str
    targets: dict[str, Target]
    inside: dict[str, set[str]] = field(default_factory=dict)
    excludes: frozenset[str] = frozenset()

    def groups(self) -> dict[Target, list[str]]:
        """Groups the source's labels by what they become; nothing that is left out or ignored."""
        groups: dict[Target, list[str]] = {}
        for label, target in self.targets.items():
            if target and target != (IGNORE,):
                groups.setdefault(target, []).append(label)
        return groups

    def annotated(self, labels: Collection[str] | None = None) -> list[Target]:
        """Lists what is annotated in the common table where the source's `labels` are; None means all of them.

        Raises:
            UserError: If of several labels that become one only some are annotated: nobody knows where that one ends.
        """
        annotated = []
        for target, parts in self.groups().items():
            missing = [part for part in parts if labels is not None and part not in labels]
            if missing and len(missing) < len(parts):
                raise UserError(
                    f"of {parts}, which together become {' or '.join(target)!r}, {missing} are not annotated: "
                    "map them to different names, or leave the case out"
                )
            if not missing:
                annotated.append(target)
        return annotated


def map_labels(
    source: str,
    labels: Collection[str],
    common: Sequence[str],
    mapping: Mapping[str, str | list[str] | None] | None = None,
    inside: Mapping[str, str] | None = None,
    excludes: Collection[str] = (),
) -> LabelMapping:
    """Applies the rules of a mapping to one source's labels.

    - `"spleen": "spleen"`: that label. Several may become one: `"liver": "liver", "tumor": "liver"`.
    - `"kidney": ["left kidney", "right kidney"]`: a union, each of its voxels is one of them, nobody said which.
    - `"x": null`, or no mention: left out, it becomes background; or, if it lies `inside` another label, that one.
    - `inside = {"tumor": "liver"}`: the source's tumor is a hole in its liver. See `refuse_hidden_parts`.

    Args:
        source: Its name, for messages.
        labels: The names of its labels, without background.
        common: The names of the common table, without background.
        mapping: {label: name, list of names or None}; None maps labels to the common ones of the same name.
        inside: {label: label that it lies in}.
        excludes: Common names that no voxel of its labels is.

    Raises:
        UserError: If a name is not known, nothing is mapped, or unions contradict each other or a label.
    """
    if mapping is None:
        mapping = {label: label for label in labels if label in common}
    inside = inside or {}
    where = f"source {source!r}"
    _refuse_unknown(f"{where}: 'mapping' names", mapping, labels, "its labels")
    _refuse_unknown(f"{where}: 'inside' names", [*inside, *inside.values()], labels, "its labels")
    _refuse_unknown(f"{where}: 'excludes' names", excludes, common, "the common labels")
    ignored = {IGNORE: IGNORE} if IGNORE in labels else {}
    own = {label: _target(where, label, {**ignored, **mapping}.get(label), common) for label in labels}
    targets = _one_order({label: _with_surroundings(where, label, own, inside) for label in labels})
    holes: dict[str, set[str]] = {}
    for label, organ in inside.items():
        for name in set(targets[label]) - {*targets[organ], IGNORE}:
            holes.setdefault(name, set()).update(set(targets[organ]) - {*targets[label], IGNORE})
    result = LabelMapping(source, targets, holes, frozenset(excludes))
    if not result.groups():
        raise UserError(
            f"{where}: none of its labels {list(labels)} becomes one of {list(common)}: complete its 'mapping', "
            "or give its scans as unlabeled ones"
        )
    _refuse_contradictions(where, result.groups())
    return result


def refuse_hidden_parts(mappings: Sequence[LabelMapping]) -> None:
    """Refuses an organ that in one source is with, in another without a part that is a common label of its own.

    Where one source's tumor lies inside its liver (`inside`) and is the common label "liver tumor", another one's
    liver without tumors annotated would teach that tumors are liver, or background. So that source must say
    what it is: a union, `"liver": ["liver", "liver tumor"]`, or, where its liver has holes for tumors or its scans
    have none, `"excludes": ["liver tumor"]`.

    Raises:
        UserError: Listing every such organ and what to write.
    """
    inside: dict[str, dict[str, str]] = {}  # organ -> {part: source that says so}
    for mapping in mappings:
        for part, organs in mapping.inside.items():
            for organ in organs:
                inside.setdefault(organ, {}).setdefault(part, mapping.source)
    problems = []
    for mapping in mappings:
        groups = mapping.groups()
        known = {name for target in groups for name in target} | mapping.excludes
        for target, labels in groups.items():
            for part, other in {p: s for organ in target for p, s in inside.get(organ, {}).items()}.items():
                if part not in known:
                    problems.append(
                        f"source {mapping.source!r}: may its {labels} hold {part!r}, which source {other!r} has inside "
                        f"{' or '.join(target)!r}? If so, map it to {[*target, part]}; if not, add "
                        f'"excludes": ["{part}"]'
                    )
    if problems:
        raise UserError("\n  ".join(["an organ with and without what lies in it:", *problems]))


def _refuse_unknown(what: str, names: Collection[str], known: Collection[str], kind: str) -> None:
    known = list(known)  # a wrong name may be anything that JSON holds, lists too
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{what} {unknown}, not among {kind} {known}: correct the spelling, or remove them")


def _target(where: str, label: str, value: object, common: Sequence[str]) -> Target:
    key = f"{where}: 'mapping' of {label!r}"
    if value is None:
        return ()
    names = value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) for name in names):
        raise UserError(f"{key} is {value!r}: give a common label, a list of them (their union), or null")
    if isinstance(value, list) and (len(set(names)) < 2 or len(set(names)) < len(names) or IGNORE in names):
        raise UserError(f'{key} is {value!r}: a union is of two different labels or more; write one as "name"')
    _refuse_unknown(f"{key} names", names, common, "the common labels")
    return tuple(names)


def _with_surroundings(where: str, label: str, targets: Mapping[str, Target], inside: Mapping[str, str]) -> Target:
    """Finds the target of a label, or if it is left out that of the next label around it that is not."""
    path = [label]
    while not targets[path[-1]] and path[-1] in inside:
        path.append(inside[path[-1]])
        if path[-1] in path[:-1]:
            raise UserError(f"{where}: 'inside' goes in a circle, {' in '.join(path)}: correct it")
    return targets[path[-1]]


def _one_order(targets: dict[str, Target]) -> dict[str, Target]:
    """Puts unions of the same names in the same order, that of the first one: its first name is their value."""
    first: dict[frozenset[str], Target] = {}
    return {label: first.setdefault(frozenset(target), target) for label, target in targets.items()}


def _refuse_contradictions(where: str, groups: Mapping[Target, list[str]]) -> None:
    seen: dict[str, Target] = {}
    for target, labels in groups.items():
        for name in target:
            if name in seen:
                raise UserError(
                    f"{where}: {groups[seen[name]]} becomes {list(seen[name])} and {labels} becomes {list(target)}: "
                    f"{name!r} cannot be in both; a label is annotated or in one union: map both to the same list"
                )
            seen[name] = target
