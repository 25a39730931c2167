"""What the cases of several sources are together: their names, annotated labels, channels, file type and reader."""

import os
from collections.abc import Collection, Sequence

from nnunet_diffusion.conversion.dataset import REORIENTING_READER, refuse
from nnunet_diffusion.conversion.label_mapping import IGNORE, LabelMapping, Target
from nnunet_diffusion.conversion.sources import Source
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.preprocessing.scan_checks import NIFTI_ENDINGS


class Joined:
    """The cases of all sources under their new names, and what each of them annotates."""

    def __init__(self, common: Sequence[str]) -> None:
        self.values = {name: value for value, name in enumerate(common, start=1)}
        self.labeled: dict[str, tuple[list[str], str]] = {}
        self.unlabeled: dict[str, list[str]] = {}
        self.relabeling: dict[str, dict[int, int]] = {}
        self.annotated: dict[str, list[str]] = {}
        self.unions: dict[str, list[list[str]]] = {}
        self.source_of: dict[str, str] = {}

    def add(self, source: Source, rule: LabelMapping) -> None:
        """Adds the cases of one source.

        Raises:
            UserError: If a case's name is taken, or a case annotates only a part of what becomes one label.
        """
        for case, (images, label) in source.labeled.items():
            annotated = source.annotated.get(case)
            try:
                targets = rule.annotated(annotated)
            except UserError as error:
                raise UserError(f"source {source.name!r}: case {case!r}: {error}") from error
            if not targets:
                self.unlabeled[self._named(source, case)] = images
                continue
            new = self._named(source, case)
            self.labeled[new] = (images, label)
            self.relabeling[new] = self._new_values(source, rule, annotated)
            self._describe(new, targets)
        for case, images in source.unlabeled.items():
            self.unlabeled[self._named(source, case)] = images

    def _named(self, source: Source, case: str) -> str:
        new = f"{source.name}_{case}"
        if new in self.source_of:
            raise UserError(
                f"sources {self.source_of[new]!r} and {source.name!r} both have a case {new!r}: rename a source"
            )
        self.source_of[new] = source.name
        return new

    def _new_values(self, source: Source, rule: LabelMapping, annotated: Collection[str] | None) -> dict[int, int]:
        """Maps values that may be in the label file to those in the joined data set."""
        labels = [name for name in source.labels if annotated is None or name in (*annotated, IGNORE)]
        new = {name: self.values[rule.targets[name][0]] if rule.targets[name] else 0 for name in labels}
        return {0: 0, **{source.labels[name]: value for name, value in new.items()}}

    def _describe(self, case: str, targets: list[Target]) -> None:
        exact = {target[0] for target in targets if len(target) == 1}
        if exact != self.values.keys() - {IGNORE}:
            self.annotated[case] = [name for name in self.values if name in exact]
        if unions := [list(target) for target in targets if len(target) > 1]:
            self.unions[case] = unions

    def refuse_shared_images(self) -> None:
        """Raises UserError if two cases are the same file: one would be validated on what the other trained."""
        seen: dict[str, str] = {}
        problems = []
        for case, images in {**{case: images for case, (images, _) in self.labeled.items()}, **self.unlabeled}.items():
            for path in map(os.path.realpath, images):
                if (earlier := seen.setdefault(path, case)) != case:
                    problems.append(f"{path}: is both {earlier} and {case}: leave it out of one source")
        refuse(problems)


def common_channels(sources: Sequence[Source]) -> list[str]:
    """Finds the channels' names that all sources share; nnU-Net does not tell capitals apart.

    Raises:
        UserError: If they differ in number or name.
    """
    if len({tuple(name.lower() for name in source.channels) for source in sources}) > 1:
        differing = ", ".join(f"{source.name} {source.channels}" for source in sources)
        raise UserError(
            f"the sources have different channels: {differing}: "
            "join only those that have the same, or correct 'channel_names'"
        )
    return sources[0].channels


def common_ending(sources: Sequence[Source]) -> str:
    """Chooses the file ending of the joined data set; .nii and .nii.gz go together, as .nii.gz.

    Raises:
        UserError: If the sources are of different types.
    """
    endings = {source.file_ending for source in sources}
    if len(endings) == 1:
        return endings.pop()
    if endings <= set(NIFTI_ENDINGS):
        return ".nii.gz"
    differing = ", ".join(f"{source.name} {source.file_ending}" for source in sources)
    raise UserError(
        f"the sources have different file types: {differing}: nnU-Net reads one type, convert the others to .nii.gz"
    )


def common_reader(sources: Sequence[Source], file_ending: str) -> str | None:
    """Chooses nnU-Net's reader for all scans, None for the one that suits their orientations.

    Raises:
        UserError: If the sources ask for different readers and none suits all.
    """
    readers = {source.reader for source in sources}
    if len(readers) == 1:
        return readers.pop()
    if file_ending in NIFTI_ENDINGS:
        return REORIENTING_READER
    asked = ", ".join(f"{source.name} {source.reader or 'the usual one'}" for source in sources)
    raise UserError(f"the sources ask for different readers of nnU-Net: {asked}: convert the others to .nii.gz")
