"""One run of benchmarks/mutual.py: a stage of mutual learning; started with the path of a job description.

Stage 1 is scored by the Dice of the labels that it completes training cases with, against the labels that were erased
there; stage 2 by the test cases, with the mean of its members and with each of them alone.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from train_and_test import build_trainer, describe_machine, end_with_parent, prepare, test

from nnunet_diffusion.files import write_json
from nnunet_diffusion.model_folder import unwrap
from nnunet_diffusion.mutual.completion import Setup, complete_cases, describe_cases
from nnunet_diffusion.mutual.dataset import completed_folder
from nnunet_diffusion.partial.annotations import output_channels
from nnunet_diffusion.records import sha256
from nnunet_diffusion.rounds.gate import GateSettings
from nnunet_diffusion.rounds.prediction import load_prediction
from nnunet_diffusion.rounds.pseudo_labels import open_pseudo_label
from nnunet_diffusion.rounds.teacher import Model


def dice(predicted: np.ndarray, true: np.ndarray) -> float | None:
    """Computes Dice of two masks; None if both are empty."""
    total = int(predicted.sum()) + int(true.sum())
    return 2 * int((predicted & true).sum()) / total if total else None


def score_completion(job: dict, folder: str, channels: dict) -> dict[str, dict]:
    """Computes Dice of every label that a training case lacks, as predicted and as the gate lets it through.

    Returns:
        {"dice": case -> label -> Dice before the gate, "gated": the same over the voxels that are not ignored, of the
        labels that the gate believes, "claims": case -> how many of the voxels that are predicted to be a label that
        the case lacks are that label, another one, background}; None for a label that the case annotates or neither
        mask has.
    """
    source = Path(job["preprocessed"], Path(folder).parent.name.removesuffix("_pseudo"))
    dataset = nnUNetDatasetBlosc2(str(source), list(job["cases"]))
    scores: dict[str, dict] = {"dice": {}, "gated": {}, "claims": {}}
    for case in dataset.identifiers:
        true = dataset.load_case(case)[1][:][0]
        predicted = load_prediction(os.path.join(folder, "predicted"), case).labels
        label = open_pseudo_label(folder, case)
        completed = label.segmentation[:][0]
        is_known = completed <= max(next(iter(values)) for values in channels.values())
        for kind in scores:
            scores[kind][case] = {}
        lacking = [next(iter(values)) for name, values in channels.items() if name not in job["kept_labels"][case]]
        claimed = np.isin(predicted, [value for value in lacking if value])
        right, background = predicted == true, true == 0
        for truth, voxels in (("right", right), ("another", ~right & ~background), ("background", background)):
            scores["claims"][case][truth] = int((claimed & voxels).sum())
        for name, values in channels.items():
            value = next(iter(values))
            if value == 0:
                continue
            is_lacking = name not in job["kept_labels"][case]
            is_believed = is_lacking and name in label.annotation.labels
            scores["dice"][case][name] = dice(predicted == value, true == value) if is_lacking else None
            scores["gated"][case][name] = (
                dice((completed == value)[is_known], (true == value)[is_known]) if is_believed else None
            )
    return scores


def completed_at(job: dict, base: str, identifier: str) -> str:
    """Returns the folder of the completed labels below a preprocessed folder, or below where stage 1 leaves them."""
    return completed_folder(base, identifier, job["plans"], job["configuration"], 0)


def stage_1(job: dict, trainer) -> dict:
    """Completes the training cases with the trained networks, keeps them for stage 2, and scores them."""
    base = str(Path(os.environ["nnUNet_preprocessed"], Path(job["preprocessed"]).name))
    trainer.disable_checkpointing = False
    checkpoint = os.path.join(trainer.output_folder, "checkpoint_final.pth")
    trainer.save_checkpoint(checkpoint)
    model = Model(trainer.output_folder_base, ("0",), sha256(checkpoint), job["device"])
    setup = Setup(base, trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json)
    folder = completed_at(job, job["completed"], trainer.configuration_manager.data_identifier)
    cases = describe_cases(setup, sorted(job["cases"]))
    report = complete_cases(model, setup, cases, folder, GateSettings(**job["gate"]))
    ignored = sum(entry["ignored_voxels"] for entry in report["cases"].values())
    voxels = sum(entry["voxels"] for entry in report["cases"].values())
    return {**score_completion(job, folder, output_channels(trainer.label_manager)), "ignored": ignored / voxels}


def stage_2(job: dict, trainer) -> dict:
    """Tests the mean and each member."""
    network, members = unwrap(trainer.network), []
    scores = {"dice": test(trainer, job)}
    for member in range(len(network.members)):
        network.only = member
        members.append(test(trainer, job))
    return {**scores, "members": members}


def link_completed(job: dict) -> None:
    """Puts the completed labels of stage 1 where the trainer looks for them."""
    base = Path(os.environ["nnUNet_preprocessed"], Path(job["preprocessed"]).name)
    plans = PlansManager(str(base / f"{job['plans']}.json"))
    identifier = plans.get_configuration(job["configuration"]).data_identifier
    source, target = (Path(completed_at(job, str(folder), identifier)) for folder in (job["completed"], base))
    target.parent.mkdir(parents=True)
    target.symlink_to(source)


def run(job: dict) -> None:
    """Prepares, trains, scores, and writes the run's JSON."""
    times = [time.time()]
    prepare(job)
    if job["stage"] == 2:
        link_completed(job)
    times.append(time.time())
    trainer = build_trainer(job)
    trainer.run_training()
    times.append(time.time())
    scores = stage_1(job, trainer) if job["stage"] == 1 else stage_2(job, trainer)
    times.append(time.time())
    seconds = dict(zip(("prepare", "train", "test"), np.diff(times).round(1).tolist(), strict=True))
    write_json(
        job["result"],
        {
            **{key: job[key] for key in ("arm", "budget", "seed", "trainer", "protocol", "test_cases")},
            "training_cases": sorted(job["cases"]),
            **scores,
            "seconds": seconds,
            "machine": describe_machine(job["device"]),
        },
    )


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    run(json.loads(Path(sys.argv[1]).read_text()))
