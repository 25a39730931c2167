"""A small world in which every command has done its work once, to be spoiled one file at a time.

Nothing in it was trained: checkpoints are those of untrained networks, and commands that a command starts are played.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import BytesIO, TextIOWrapper
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import denoisers
import numpy as np
import pytest
import SimpleITK as sitk
import tiny
from fuzz_commands import COMMANDS, DENOISER, MODEL, STAGES

from nnunet_diffusion import checkup, commands, installation, workers
from nnunet_diffusion.cli import main

BALLS, BOX = ["left ball", "right ball"], ["box"]
ANNOTATED = {f"tiny_{i:03d}": BOX if i in (1, 4) else BALLS for i in range(5)}
SHORT = {"num_epochs": 1, "num_iterations_per_epoch": 1, "num_val_iterations_per_epoch": 1}


class World:
    """Folders below `box`, deep enough that a path with `..` in it ends in `box` and is seen.

    Attributes:
        box: Nothing is written outside; the current folder is `box/here`.
        root: nnU-Net's three folders.
        given: What a user brings: scans, mappings, label tables.
        made: Where commands put what is to lie elsewhere than in nnU-Net's folders.
    """

    def __init__(self, box: Path):
        self.box, self.root, self.given = box, box / "a" / "b" / "nnunet", box / "a" / "b" / "given"
        self.made, self.here = box / "a" / "b" / "made", box / "here"
        self.raw, self.preprocessed, self.results = (
            self.root / f"nnUNet_{kind}" / tiny.NAME for kind in ("raw", "preprocessed", "results")
        )
        self.evil = box / "evil"  # what a pickle with code would make

    def model(self, trainer: str) -> Path:
        """The model folder of a trainer."""
        return self.results / f"{trainer}__{tiny.PLANS}__2d"


class EpochBegins(SystemExit):
    """A training would start here: all that a command refuses before was passed."""

    def __init__(self):
        super().__init__(0)


@contextmanager
def played(world: World) -> Iterator[None]:
    """Ends trainings where their first epoch would begin, and plays the commands that a command would start."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    def epoch_begins(trainer):
        raise EpochBegins

    def play(steps, step, command, log):
        folder = Path(step.output).parent
        if command[:2] == ["nnunet_diffusion", "plan_and_preprocess"]:
            return main([*command[1:], "-np", "1"]), []
        if command[:2] == ["nnunet_diffusion", "report"]:
            return main(command[1:]), []
        if not os.path.exists(step.output) and command[0] != "nnunet_diffusion" or command[1] == "train":
            if "predict" in command[0]:
                shutil.copytree(world.raw / "labelsTr", folder, dirs_exist_ok=True)
            else:
                shutil.copytree(world.model(MODEL) / "fold_0", folder, dirs_exist_ok=True)
                for name in ("plans.json", "dataset.json"):
                    shutil.copyfile(world.model(MODEL) / name, folder.parent / name)
                shutil.copyfile(world.given / "denoiser.pth", folder / "denoiser.pth")
        return 0, []

    get_context = multiprocessing.get_context

    def with_threads(method: str | None = None):
        """Processes of nnU-Net's take seconds to import torch."""
        return SimpleNamespace(Pool=ThreadPool) if method == "spawn" else get_context(method)

    def one_by_one(work, tasks, _):
        """So do ours."""
        return ((case, work(*arguments)) for case, arguments in tasks.items())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", with_threads)
        patch.setattr(workers, "_here", one_by_one)
        for name in ("on_epoch_start", "on_train_end"):  # of settings by which there are no epochs
            patch.setattr(nnUNetTrainer, name, epoch_begins)
        patch.setattr(commands.Steps, "_execute", play)
        patch.setattr(checkup, "probe", lambda: {"errors": {}, "cuda": "", "trainers": {}})
        for name in installation.FOLDERS:
            patch.setenv(name, str(world.root / name))
        patch.setenv(installation.EXT_TRAINER, installation.trainers_folder())
        patch.chdir(world.here)
        yield


def run(argv: list[str]) -> tuple[int | str | None, str]:
    """The exit code of a command in this process, and all that it printed, on streams as Python's own."""
    out = TextIOWrapper(BytesIO(), "utf-8", write_through=True)
    err = TextIOWrapper(BytesIO(), "utf-8", "backslashreplace", write_through=True)
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as ending:
            code = ending.code or 0
    return code, (out.buffer.getvalue() + err.buffer.getvalue()).decode()


def build(box: Path) -> World:
    """Makes everything that the commands need, then lets each do its work."""
    world = World(box)
    for folder in (world.here, world.given, world.made, *(world.root / name for name in installation.FOLDERS)):
        folder.mkdir(parents=True)
    with played(world):
        write_given(world.given)
        write_data_set(world)
        must(["plan_and_preprocess", "-d", "990", "-c", "2d", "-pl", "CompactPlanner", "-np", "1"])
        plans = tiny.shrunk(json.loads((world.preprocessed / "nnUNetCompactPlans.json").read_text()), "PlainConvUNet",
                            "InstanceNorm")  # fmt: skip
        block = {name: {**SHORT, "start": "scratch"} for name in (MODEL, "PseudoLabelTrainer")}
        block |= {name: SHORT for name in STAGES}
        tiny.write_plans(plans, **block)
        own = {MODEL: {**SHORT, "start": str(world.given / "denoiser.pth"), "timestep": 5}}
        tiny.write_plans(plans, "FromDenoiser", **own)
        split = {"train": sorted(ANNOTATED)[:4], "val": sorted(ANNOTATED)[4:]}
        (world.preprocessed / "splits_final.json").write_text(json.dumps([split] * 5))
        write_denoisers(world)
        write_models(world)
        for command in COMMANDS.values():
            must(command.arguments(str(box)))
        for name in ("exported", "shared"):
            shutil.rmtree(world.made / name)  # it is refused where there is such a folder
    return world


def must(argv: list[str]) -> None:
    """Runs a command that must succeed."""
    code, printed = run(argv)
    assert code == 0, f"{argv}: {code}\n{printed}"


def write_given(folder: Path) -> None:
    """What a user brings."""
    for name, first, labels in (("ct", 0, "labels"), ("more", 10, None)):
        tiny.write_scans(folder / name, 2, labels=folder / labels if labels else None, first=first)
    tables = {
        "labels.json": {name: value for name, value in tiny.LABELS.items() if value},
        "annotated.json": {"tiny_000": [*BALLS, *BOX], "tiny_001": [*BALLS, *BOX]},
        "mapping.json": {
            "labels": [*BALLS, *BOX],
            "sources": [
                {"name": "Tiny", "dataset": tiny.NAME, "about": "a raw data set"},
                {
                    "name": "Other", "images": "ct", "labels": "labels", "channel_names": ["CT"], "unlabeled": ["more"],
                    "label_names": {"ball": 1, "cube": 3, "second": 2},
                    "mapping": {"ball": BALLS, "cube": "box", "second": None},
                    "inside": {"second": "ball"}, "excludes": [],
                },
            ],
        },
    }  # fmt: skip
    for name, content in tables.items():
        (folder / name).write_text(json.dumps(content))
    for kind, names in (("ct", ("FLARE22_Tr_0001_0000", "Case_00001_0000")), ("labels", ("FLARE22_Tr_0001",))):
        for name in names:
            source = folder / kind / ("tiny_000_0000.nii.gz" if kind == "ct" else "tiny_000.nii.gz")
            (folder / "flare22").mkdir(exist_ok=True)
            shutil.copyfile(source, folder / "flare22" / f"{name}.nii.gz")
    scores = {"tiny_000": {"box": {"dsc": 0.5, "nsd": None, "hd95": None}}}
    evaluation = {"rules": {"name": "nnunet", "description": "by hand"}, "cases": scores}
    (folder / "evaluation_nnunet.json").write_text(json.dumps(evaluation))


def write_data_set(world: World) -> None:
    """The tiny data set, in which each case annotates some labels; the other voxels are not labeled."""
    raw = tiny.write_raw(unlabeled=2)
    for case, names in ANNOTATED.items():
        path = raw / "labelsTr" / f"{case}.nii.gz"
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        tiny.save(np.where(np.isin(label, [tiny.LABELS[name] for name in names]), label, 0).astype(np.uint8), path)
    path = raw / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "annotated_labels": ANNOTATED}))
    shutil.copytree(raw / "labelsTr", world.given / "references")


def write_denoisers(world: World) -> None:
    """A denoiser where a user keeps it, and one where a pre-training leaves it."""
    plans = json.loads((world.preprocessed / f"{tiny.PLANS}.json").read_text())
    configuration = plans["configurations"]["2d"]
    identity = denoisers.plan()
    identity.update(
        spacing=configuration["spacing"], patch_size=configuration["patch_size"],
        transpose_forward=plans["transpose_forward"], network_kwargs=configuration["architecture"]["arch_kwargs"],
        network_kwargs_requiring_import=configuration["architecture"]["_kw_requires_import"],
        normalization_schemes=configuration["normalization_schemes"],
        intensities=plans["foreground_intensity_properties_per_channel"],
    )  # fmt: skip
    fold = world.model(DENOISER) / "fold_0"
    fold.mkdir(parents=True)
    for path in (world.given / "denoiser.pth", fold / "denoiser.pth"):
        denoisers.write(path, identity)
    shutil.copyfile(world.preprocessed / f"{tiny.PLANS}.json", fold.parent / "plans.json")
    shutil.copyfile(world.preprocessed / "dataset_fingerprint.json", fold.parent / "dataset_fingerprint.json")
    must(["export", "--denoiser", str(world.given / "shared"), *f"-d 990 -p {tiny.PLANS} -c 2d -f 0".split()])


def write_models(world: World) -> None:
    """Model folders of untrained networks, with what a training leaves beside its checkpoints."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    for name in (MODEL, STAGES[0]):
        trainer = tiny.trainer(recursive_find_trainer_class_by_name(name))
        trainer.initialize()
        fold = Path(trainer.output_folder)
        (fold / "validation").mkdir(parents=True)
        for checkpoint in ("checkpoint_final.pth", "checkpoint_latest.pth"):
            trainer.save_checkpoint(str(fold / checkpoint))
        (fold.parent / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
        for file in ("dataset.json", "dataset_fingerprint.json"):
            shutil.copyfile(world.preprocessed / file, fold.parent / file)
        (fold / "training_log_2026_1_1_00_00_00.txt").write_text("x: Epoch 0 \nx: train_loss 0.5 \n")
        reports = {key: [] for key in ("matched", "adapted", "missing", "unexpected", "warnings")}
        source = {"source": str(world.given / "denoiser.pth"), "timestep": 10}
        (fold / "transfer_report.json").write_text(json.dumps({**reports, **source}))
        for case in sorted(ANNOTATED)[4:]:
            shutil.copyfile(world.raw / "labelsTr" / f"{case}.nii.gz", fold / "validation" / f"{case}.nii.gz")
        dice = [{"prediction_file": f"/x/{sorted(ANNOTATED)[4]}.nii.gz", "reference_file": "/x",
                 "metrics": {"3": {"Dice": 0.5}}}]  # fmt: skip
        summary = {"foreground_mean": {"Dice": 0.5}, "mean": {"3": {"Dice": 0.5}}, "metric_per_case": dice}
        (fold / "validation" / "summary.json").write_text(json.dumps(summary))
