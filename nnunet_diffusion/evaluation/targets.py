"""What is compared in which case: the organs that are annotated there, and unions that were drawn as one."""

from collections.abc import Mapping

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.evaluation.rules import (
    FLARE22,
    FLARE22_CUT,
    FLARE22_TOLERANCES_MM,
    NNUNET_TOLERANCE_MM,
    Rules,
    Target,
    flare22_organs,
)
from nnunet_diffusion.partial.annotations import Annotation, Channels, is_annotated

Targets = dict[str, Target]


def organ_labels(dataset_json: Mapping) -> dict[str, tuple[int, ...]]:
    """Maps names to the values of each label or region of a dataset.json, without background and ignore label."""
    return {
        name: tuple(value) if isinstance(value, (list, tuple)) else (value,)
        for name, value in dataset_json["labels"].items()
        if name not in ("background", "ignore")
    }


def organ_targets(dataset_json: Mapping, rules: Rules, tolerance_mm: float | None = None) -> Targets:
    """Returns the targets of a fully annotated case.

    Args:
        dataset_json: nnU-Net's description of the data set.
        rules: FLARE22 or NNUNET.
        tolerance_mm: For NSD; with FLARE22's rules only of labels that are none of its 13 organs.

    Raises:
        UserError: If FLARE22 has no tolerance for a label and none is given.
    """
    organs = organ_labels(dataset_json)
    if rules is not FLARE22:
        tolerance_mm = NNUNET_TOLERANCE_MM if tolerance_mm is None else tolerance_mm
        return {name: Target(name, labels, tolerance_mm) for name, labels in organs.items()}
    known = flare22_organs(organs)
    if tolerance_mm is None and (others := [name for name in organs if known[name] is None]):
        raise UserError(
            f"FLARE22's rules have no tolerance for {', '.join(others)}: give theirs with --tolerance MM, or take "
            "--rules nnunet"
        )
    return {
        name: Target(name, labels, FLARE22_TOLERANCES_MM.get(known[name], tolerance_mm), known[name] in FLARE22_CUT)
        for name, labels in organs.items()
    }


def case_targets(annotation: Annotation, channels: Channels, organs: Targets) -> Targets:
    """Returns the targets of one case: what it annotates, and each union as one target, with the smallest tolerance.

    Args:
        annotation: From `read_annotations`.
        channels: The `output_channels`.
        organs: The targets of a fully annotated case.
    """
    targets = {name: target for name, target in organs.items() if is_annotated(name, annotation, channels)}
    unions = [_union([organs[name] for name in organs if name in group]) for group in annotation.unions]
    return targets | {union.name: union for union in unions}


def _union(members: list[Target]) -> Target:
    return Target(
        " + ".join(member.name for member in members),
        tuple(sorted({label for member in members for label in member.labels})),
        min(member.tolerance_mm for member in members),
        all(member.is_cut for member in members),
    )
