"""The scans of a run of rounds: what is trained on, what is validated on, what is to be predicted."""

import os
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json
from nnunet_diffusion.partial.annotations import Annotation, output_channels, read_annotations
from nnunet_diffusion.preprocessing.cases import (
    LABELED_FILES,
    UNLABELED_FILES,
    complete_cases,
    fold_of,
    pool_folder,
    read_splits,
)
from nnunet_diffusion.preprocessing.preprocess import differing, preprocessing_identity
from nnunet_diffusion.rounds.evidence import Anatomy, anatomy, measure
from nnunet_diffusion.rounds.prediction import Case, network_spacing, read_preprocessed
from nnunet_diffusion.rounds.state import Record, digest, record


class Cases:
    """The preprocessed scans of one configuration and fold, as they are now."""

    def __init__(self, base: str, plans: dict, configuration: str, fold: str):
        """Reads what is there.

        Args:
            base: nnUNet_preprocessed/DatasetXXX_Name.
            plans: The content of the plans file.
            configuration: One of its configurations.
            fold: A number, or "all".

        Raises:
            UserError: If nothing is preprocessed, the pool is empty or belongs to another plan.
        """
        self.base, self.fold, self.plans = base, fold, PlansManager(plans)
        self.configuration = self.plans.get_configuration(configuration)
        if self.configuration.previous_stage_name is not None:
            raise UserError(f"-c {configuration}: a cascade's second stage has no rounds: take the first")
        self.dataset_json = read_json(os.path.join(base, "dataset.json"))
        self.label_manager = self.plans.get_label_manager(self.dataset_json)
        self.channels = output_channels(self.label_manager)
        self.labeled = os.path.join(base, self.configuration.data_identifier)
        self.unlabeled = pool_folder(base, self.configuration.data_identifier)
        annotated = complete_cases(self.labeled, LABELED_FILES)
        if not annotated:
            raise UserError(f"{self.labeled}: no preprocessed cases: run nnunet_diffusion plan_and_preprocess first")
        self.annotations = read_annotations(self.dataset_json, annotated, self.channels)
        self.pool = [case for case in complete_cases(self.unlabeled, UNLABELED_FILES) if case not in self.annotations]
        self.refuse_unusable_pool()

    def refuse_unusable_pool(self) -> None:
        """Raises UserError if there is no pool, or its scans were preprocessed for another plan."""
        if not self.pool:
            raise UserError(
                f"{self.unlabeled}: the pool is empty: list scans under 'unlabeled' in dataset.json (nnunet_diffusion "
                "convert) and run nnunet_diffusion plan_and_preprocess"
            )
        if others := differing(self.unlabeled, preprocessing_identity(self.plans, self.configuration)):
            raise UserError(
                f"{self.unlabeled}: the pool was preprocessed with other {', '.join(others)} than the plan has: run "
                "nnunet_diffusion plan_and_preprocess again"
            )

    def split(self) -> tuple[list[str], list[str]]:
        """The annotated cases to train on, those that no split knows included, and those to validate on.

        Raises:
            UserError: If the data set is not split, or has no such fold.
        """
        if self.fold == "all":
            return list(self.annotations), []
        file = os.path.join(self.base, "splits_final.json")
        if not os.path.isfile(file):
            raise UserError(f"{file}: no splits: train fold {self.fold} once, or write them")
        train, validation = fold_of(file, self.fold)
        known = {case for split in read_splits(file) for part in ("train", "val") for case in split[part]}
        train = [*train, *sorted(set(self.annotations) - known)]
        return [case for case in train if case in self.annotations], validation

    def to_predict(self) -> dict[str, Case]:
        """The pool, and the annotated training cases of which labels are missing; none of those validated on."""
        cases = {case: Case(self._image(self.unlabeled, case), self._spacing(self.unlabeled, case), None)
                 for case in self.pool}  # fmt: skip
        if not self.label_manager.has_regions:
            for case in self.split()[0]:
                if self.lacking(self.annotations[case]):
                    spacing = self._spacing(self.labeled, case)
                    cases[case] = Case(self._image(self.labeled, case), spacing, self.annotations[case])
        return cases

    def lacking(self, annotation: Annotation) -> list[str]:
        """The labels or regions that a case was not annotated for."""
        return [name for name in self.channels if name not in annotation.labels and name != "background"]

    def anatomy(self) -> dict[str, Anatomy]:
        """How the organs look in the annotated training cases; those validated on are not looked at."""
        shown = []
        for case in self.split()[0]:
            labels = read_preprocessed(self._image(self.labeled, case).removesuffix(".b2nd") + "_seg.b2nd")[0]
            evidence = measure(labels, self.channels, self._spacing(self.labeled, case))
            shown.append({name: e for name, e in evidence.items() if name in self.annotations[case].labels})
        return anatomy(shown)

    def records(self, known: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, Record]]]:
        """All files of all cases, and what dataset.json says of them: {"annotated", "pool": {case: {what: record}}}."""
        kinds = {
            "annotated": (self.labeled, list(self.annotations), LABELED_FILES),
            "pool": (self.unlabeled, self.pool, UNLABELED_FILES),
        }
        records = {
            kind: {
                case: {
                    end: record(os.path.join(folder, case + end), known.get(kind, {}).get(case, {}).get(end))
                    for end in endings
                }
                for case in cases
            }
            for kind, (folder, cases, endings) in kinds.items()
        }
        for case, annotation in self.annotations.items():
            says = [sorted(annotation.labels), annotation.unions]
            records["annotated"][case]["dataset.json"] = {"sha256": digest(says)}
        return records

    def _image(self, folder: str, case: str) -> str:
        return os.path.join(folder, case + ".b2nd")

    def _spacing(self, folder: str, case: str) -> tuple[float, ...]:
        return network_spacing(os.path.join(folder, case + ".pkl"), self.plans, self.configuration)
