"""A tiny data set on which every trainer trains, with all that one of them needs, and the steps of a training."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import blosc2
import denoisers
import numpy as np
import tiny
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.installation import trainer_names
from nnunet_diffusion.mutual.dataset import completed_folder
from nnunet_diffusion.partial.annotations import Annotation, output_channels, read_annotations
from nnunet_diffusion.pretraining.denoiser_file import plan_identity
from nnunet_diffusion.rounds.pseudo_labels import ignoring, pseudo_folder, save_pseudo_label
from nnunet_diffusion.trainers import our_trainer

BALLS, BOX = ["left ball", "right ball"], ["box"]
ANNOTATED = {"tiny_000": BALLS, "tiny_001": BOX, "tiny_002": BALLS, "tiny_003": BALLS, "tiny_004": BOX}
ALL = Annotation(frozenset(tiny.LABELS))
CONFIGURATIONS = ("2d", "3d_fullres")
AT_ONCE = {"supervised_share": 0.0, "ramp_share": 0.0, "start": "denoiser"}
SETTINGS = {
    "ConfiguredTrainer": {"seed": 0},
    "PseudoLabelTrainer": {"pseudo_labels": "given/round_1"},
    "PseudoLabelMeanTeacherTrainer": {"pseudo_labels": "given/round_1"},
    "MeanTeacherTrainer": {"supervised_share": 0.0, "least_dice": 0.0},  # the teacher speaks from the first step on
    "MutualDifferenceTrainer": AT_ONCE,
    "MutualSimilarityTrainer": AT_ONCE,
    "DiffusionCoTrainingTrainer": {"ramp": 0.0},
}
VARIANTS = [
    ("MutualDifferenceTrainer", {"alternate": True}),
    ("MutualDifferenceTrainer", {"checkpointing": True}),
    ("MutualSimilarityTrainer", {"alternate": True}),
    ("DiffusionCoTrainingTrainer", {"method": "cross_pseudo"}),
]
TRAINERS = [(name, {}) for name in trainer_names()]


def name_of(case) -> str:
    """Names a trainer and its settings, for pytest."""
    return case if isinstance(case, str) else "-".join(f"{key}={value}" for key, value in case.items())


def prepare() -> Path:
    """Makes the data set, with denoisers, pseudo labels and completed labels for both configurations."""
    folder = tiny.prepare()
    tiny.annotate(folder, ANNOTATED)
    plans = PlansManager(str(folder / f"{tiny.PLANS}.json"))
    dataset_json = json.loads((folder / "dataset.json").read_text())
    manager = ignoring(plans.get_label_manager(dataset_json))
    annotations = read_annotations(dataset_json, list(ANNOTATED), output_channels(manager))
    for configuration in CONFIGURATIONS:
        identifier = plans.get_configuration(configuration).data_identifier
        pseudo = pseudo_folder(str(folder), identifier, "given", "round_1")
        completed = completed_folder(str(folder), identifier, tiny.PLANS, configuration, 0)
        write_labels(pseudo, folder / f"{identifier}_unlabeled", dict.fromkeys(["tiny_100", "tiny_101"]), manager)
        write_labels(completed, folder / identifier, annotations, manager)
        path = Path(
            os.environ["nnUNet_results"], tiny.NAME, f"DenoisingDiffusionTrainer__{tiny.PLANS}__{configuration}"
        )
        (path / "fold_0").mkdir(parents=True)
        denoisers.write(path / "fold_0" / "denoiser.pth", plan_identity(plans, configuration, dataset_json), 60)
    return folder


def write_labels(target: str, images: Path, cases: Mapping[str, Annotation | None], manager) -> None:
    """Writes random labels of preprocessed images, which complete the annotations if there are any."""
    rng = np.random.default_rng(0)
    for case, annotation in cases.items():
        shape = blosc2.open(str(images / f"{case}.b2nd")).shape[1:]
        save_pseudo_label(target, case, rng.integers(0, 4, shape), ALL, manager, (16, 16), annotation)


def build(name: str, configuration="2d", settings: Mapping = {}, resume=False, device="cpu", **base):  # noqa: B006
    """Builds a trainer with settings of its own, and others for all trainers."""
    folder = Path(os.environ["nnUNet_preprocessed"], tiny.NAME)
    content = json.loads((folder / f"{tiny.PLANS}.json").read_text())
    block = {trainer: dict(given) for trainer, given in SETTINGS.items()}
    block["ConfiguredTrainer"] |= base
    block[name] = block.get(name, {}) | dict(settings)
    tiny.write_plans(content, tiny.PLANS, **block)
    return tiny.trainer(our_trainer(name), configuration, resume=resume, device=device)


def train(trainer, steps: int = 2) -> list[dict]:
    """Takes steps of a started trainer's current epoch; returns what they report."""
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(steps)]


@torch.no_grad()
def validate(trainer, steps: int = 1) -> list[dict]:
    """Takes validation steps; returns what they report."""
    trainer.on_validation_epoch_start()
    return [trainer.validation_step(next(trainer.dataloader_val)) for _ in range(steps)]
