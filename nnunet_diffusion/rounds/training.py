"""The trainings of a run: the first one, one a round, and a last fine-tuning."""

import math
import os
from typing import Any

from nnunet_diffusion.commands import Step
from nnunet_diffusion.files import read_json, write_json
from nnunet_diffusion.rounds.places import Places
from nnunet_diffusion.rounds.teacher import CHECKPOINT
from nnunet_diffusion.schemas import MeanSummary, TransferSource
from nnunet_diffusion.settings import BLOCK


def write_plans(places: Places, plans: dict, number: int | str, before: int) -> dict[str, Any]:
    """Writes the plan with the settings of a round's training.

    Args:
        places: Of the run.
        plans: The content of the run's plans file.
        number: Of the round, or "finetune".
        before: The round whose weights are taken, if any are.

    Returns:
        The settings.
    """
    request, block = places.request, dict(plans.get(BLOCK, {}))
    settings = dict(block.get(request.round_trainer, {}))
    settings["pseudo_labels"] = "" if number == "finetune" else places.pseudo_labels(number)
    if request.start == "previous" or number == "finetune":
        settings["start"] = os.path.join(places.model(before), "fold_{fold}", CHECKPOINT)
    elif request.start == "scratch":
        settings["start"] = "scratch"
    content = {**plans, "plans_name": places.plans(number), BLOCK: block | {request.round_trainer: settings}}
    write_json(os.path.join(places.base, places.plans(number) + ".json"), content)
    return request.settings_of(content, request.round_trainer)


def training(places: Places, number: int | str, title: str, settings: dict, depends_on: dict, **hooks) -> Step:
    """Describes the command that trains one model.

    Args:
        places: Of the run.
        number: Of the round, or "finetune"; 0 is the first training.
        title: Of the step.
        settings: Of the trainer.
        depends_on: What decides the result beside the command.
        **hooks: More of `Step`.
    """
    request = places.request
    trainer, plans = (request.round_trainer, places.plans(number)) if number else (request.trainer, request.plans)
    folder = os.path.join(places.model(number), f"fold_{request.fold}")
    command = ["nnunet_diffusion", "train", request.dataset, request.configuration, request.fold]
    return Step(
        title, [*command, "-tr", trainer, "-p", plans], os.path.join(folder, CHECKPOINT),
        counts=r": Epoch \d+\s*$", total=settings.get("num_epochs", 1000), depends_on=depends_on,
        resume_with=["--c"], replaces=folder,
        where=["-device", request.device, "-num_gpus", str(request.num_gpus)],
        environment={"nnUNet_n_proc_DA": "0"} if request.device == "cpu" else {},
        kind="train", **hooks,
    )  # fmt: skip


def validation_dice(model: str, fold: str) -> float | None:
    """Reads the mean validation Dice of a model; None where nothing is held out, or nothing was measured.

    Raises:
        UserError: If summary.json is damaged.
    """
    path = os.path.join(model, f"fold_{fold}", "validation", "summary.json")
    if fold == "all" or not os.path.isfile(path):
        return None
    remedy = "make it anew: nnUNetv2_train with the same arguments and --val"
    dice = read_json(path, MeanSummary, remedy)["foreground_mean"]["Dice"]
    return dice if dice is not None and math.isfinite(dice) else None


def denoiser_of(model: str, fold: str) -> str:
    """Finds the denoiser that a training started from, if it is still there; else nothing.

    Raises:
        UserError: If transfer_report.json is damaged.
    """
    report = os.path.join(model, f"fold_{fold}", "transfer_report.json")
    if not os.path.isfile(report):
        return ""
    source = read_json(report, TransferSource, "remove it: then the denoiser is not compared any more")["source"]
    return source if os.path.isfile(source) else ""
