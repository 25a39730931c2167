"""The scans of a run of rounds: what is trained on, what is validated on, what is to be predicted."""

import os

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
from nnunet_diffusion.preprocessing.preprocess import preprocessing_identity
from nnunet_diffusion.preprocessing.replacement import differing
from nnunet_diffusion.records import digest, size_and_time
from nnunet_diffusion.rounds.evidence import Evidence, OrganPrior, organ_priors
from nnunet_diffusion.rounds.prediction import Case, annotated_evidence, network_spacing
from nnunet_diffusion.schemas import Dataset
from nnunet_diffusion.workers import HERE, Workers, work_on

COPY = "run nnunet_diffusion plan_and_preprocess, which copies it from nnUNet_raw"


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
        self.dataset_json = read_json(os.path.join(base, "dataset.json"), Dataset, COPY)
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
        """Splits the annotated cases into those to train on, which no split may know, and those to validate on.

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

    def held_out(self) -> list[str]:
        """Lists the cases that this fold is validated on, sorted; none as long as there are no splits."""
        is_split = self.fold == "all" or os.path.isfile(os.path.join(self.base, "splits_final.json"))
        return sorted(self.split()[1]) if is_split else []

    def to_predict(self) -> dict[str, Annotation | None]:
        """Finds what is predicted: the pool, and the annotated training cases that lack labels, with their annotation.

        None of those validated on is among them.
        """
        cases: dict[str, Annotation | None] = dict.fromkeys(self.pool)
        if not self.label_manager.has_regions:
            train = self.split()[0]
            cases |= {case: self.annotations[case] for case in train if self.lacking(self.annotations[case])}
        return cases

    def case(self, name: str) -> Case:
        """Finds where a case lies, its spacing, and what was annotated."""
        annotation = self.annotations.get(name)
        folder = self.unlabeled if annotation is None else self.labeled
        spacing = network_spacing(os.path.join(folder, name + ".pkl"), self.plans, self.configuration)
        return Case(os.path.join(folder, name + ".b2nd"), spacing, annotation)

    def lacking(self, annotation: Annotation) -> list[str]:
        """Lists the labels or regions that a case was not annotated for."""
        return [name for name in self.channels if name not in annotation.labels and name != "background"]

    def evidence(self, name: str) -> dict[str, Evidence]:
        """Measures the organs that a case annotates."""
        return annotated_evidence(self.case(name), self.channels)

    def organ_priors(self, workers: Workers = HERE) -> dict[str, OrganPrior]:
        """Measures the organs of the annotated training cases; those validated on are not looked at."""
        names = self.split()[0]
        found = dict(work_on(self.evidence, {name: (name,) for name in names}, workers, "measuring annotated cases"))
        return organ_priors([found[name] for name in names])

    def recorded(self) -> dict[str, dict[str, str]]:
        """Records cases by the size and time of their files, annotated ones by what dataset.json says of them, too."""
        annotated = {
            case: f"{size_and_time(self.labeled, case, LABELED_FILES)} {digest(sorted(known.labels))} {known.unions}"
            for case, known in self.annotations.items()
        }
        return {
            "annotated": annotated,
            "pool": {case: size_and_time(self.unlabeled, case, UNLABELED_FILES) for case in self.pool},
        }
