"""Mutual learning end to end in nnU-Net's own loop, on a tiny data set of which each case annotates some labels."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from running import killable, run_command

from nnunet_diffusion import installation, model_folder
from nnunet_diffusion.cli import main
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.mutual import stages as mutual
from nnunet_diffusion.mutual.completion import training_cases_of
from nnunet_diffusion.mutual.groups import KEY
from nnunet_diffusion.records import made_from
from nnunet_diffusion.rounds.pseudo_labels import open_pseudo_label
from nnunet_diffusion.rounds.state import load_state
from nnunet_diffusion.trainers.DenoisingDiffusionTrainer import DenoisingDiffusionTrainer
from nnunet_diffusion.trainers.MutualDifferenceTrainer import MutualDifferenceTrainer
from nnunet_diffusion.trainers.MutualSimilarityTrainer import MutualSimilarityTrainer

pytestmark = pytest.mark.slow

BALLS, BOX = ["left ball", "right ball"], ["box"]
ANNOTATED = {"tiny_000": BALLS, "tiny_001": BOX, "tiny_002": BALLS, "tiny_003": BALLS, "tiny_004": BOX}
SHORT = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 2, "seed": 0}
AT_ONCE = {**SHORT, "supervised_share": 0.0, "ramp_share": 0.0}
BLOCK = {"MutualDifferenceTrainer": AT_ONCE, "MutualSimilarityTrainer": {**AT_ONCE, "validate_members": False}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny data set; cases 0, 2 and 3 annotate the balls, 1 and 4 the box."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        folder = tiny.prepare()
        tiny.annotate(folder, ANNOTATED)
        tiny.write_plans(json.loads((folder / f"{tiny.PLANS}.json").read_text()), **BLOCK)
        yield folder


def build(world, cls, configuration="2d", plans="Mutual", resume=False, change=lambda plans: plans, **settings):
    content = change(json.loads((world / f"{tiny.PLANS}.json").read_text()))
    tiny.write_plans(content, plans, **{cls.__name__: {**AT_ONCE, **settings}})
    return tiny.trainer(cls, configuration, plans=plans, resume=resume)


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


# ---------------------------------------------------------------- stage 1


@pytest.mark.parametrize(
    ("configuration", "kind", "settings"),
    [("2d", "ResidualEncoderUNet", {"alternate": True}), ("3d_fullres", "PlainConvUNet", {"checkpointing": True})],
)
def test_stage_1_trains_and_validates(world, configuration, kind, settings):
    change = lambda plans: tiny.shrunk(plans, kind, "InstanceNorm")  # noqa: E731
    trainer = build(world, MutualDifferenceTrainer, configuration, change=change, **settings)
    trainer.run_training()
    trainer.perform_actual_validation()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    plans = json.loads(Path(trainer.output_folder).parent.joinpath("plans.json").read_text())
    assert plans[KEY] == [BALLS, BOX]
    summary = json.loads(Path(trainer.output_folder, "validation", "summary.json").read_text())
    assert {name: entry["annotated"] for name, entry in summary["counted_pairs"].items()} == {
        "left ball": 1, "right ball": 1, "box": 1,
    }  # fmt: skip


def test_organs_of_both_groups_are_learned(world):
    settings = {"optimizer_name": "AdamW", "initial_lr": 1e-2, "num_epochs": 8, "num_iterations_per_epoch": 30}
    trainer = build(world, MutualDifferenceTrainer, **settings, num_val_iterations_per_epoch=10)
    trainer.run_training()
    left, right, box = np.nanmax(trainer.logger.get_value("dice_per_class_or_region", step=None), 0)
    assert box > 0.6 and max(left, right) > 0.3, "which ball it is, a small patch hardly tells"


def test_a_member_learns_of_its_own_group_alone_without_mutual_terms(world):
    """The same weights as a member that sees the other group's cases, but learns nothing from them."""
    trainers = [build(world, MutualDifferenceTrainer, prediction_weight=0.0, feature_weight=0.0) for _ in range(2)]
    trainers[1].supervised_share = 1.0
    for trainer in trainers:
        trainer.num_epochs = 1
        trainer.run_training()
    assert trainers[0].strength == 1 and trainers[1].strength == 0
    weights = [trainer.network.state_dict() for trainer in trainers]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_resumed_training_is_the_uninterrupted_one(world):
    settings = {"num_epochs": 4, "save_every": 2, "alternate": True, "num_iterations_per_epoch": 3}
    whole = build(world, MutualDifferenceTrainer, plans="Resume", **settings)
    whole.run_training()
    weights = copied(whole.network.state_dict())

    class Interrupted(MutualDifferenceTrainer):
        def on_epoch_start(self):
            if self.current_epoch == 2:
                raise KeyboardInterrupt
            super().on_epoch_start()

    Interrupted.__name__ = "MutualDifferenceTrainer"
    with pytest.raises(KeyboardInterrupt):
        build(world, Interrupted, plans="Resume", **settings).run_training()
    second = build(world, MutualDifferenceTrainer, plans="Resume", resume=True, **settings)
    second.load_checkpoint(os.path.join(second.output_folder, "checkpoint_latest.pth"))
    second.run_training()
    assert all(torch.equal(weights[name], tensor) for name, tensor in second.network.state_dict().items())


@pytest.mark.parametrize("cls", [MutualDifferenceTrainer, MutualSimilarityTrainer])
def test_all_members_start_with_the_same_weights(world, cls):
    trainer = build(world, cls, plans="Alike", start="scratch")
    trainer.initialize()
    first, second = (member.state_dict() for member in trainer.network.members)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not {p.data_ptr() for p in trainer.network.members[0].parameters()} & {
        p.data_ptr() for p in trainer.network.members[1].parameters()
    }


def test_all_members_start_from_the_denoiser_with_new_heads(world):
    pretraining = tiny.trainer(DenoisingDiffusionTrainer, fold="all")
    pretraining.run_training()
    denoiser = Path(pretraining.output_folder, "denoiser.pth")
    settings = {"start": str(denoiser)}
    trainer = build(world, MutualDifferenceTrainer, plans="FromDenoiser", **settings)
    trainer.on_train_start()
    first, second = (member.state_dict() for member in trainer.network.members)
    assert all(torch.equal(first[key], second[key]) for key in first)
    heads = trainer.configure_optimizers()[0].param_groups[1]["params"]
    assert len(heads) == 8, "two members, two stages, weight and bias"


@contextmanager
def edited(path, change):
    """A JSON file with a change, for a while."""
    before = path.read_text()
    content = json.loads(before)
    change(content)
    try:
        path.write_text(json.dumps(content))
        yield
    finally:
        path.write_text(before)


TRAINERS = pytest.mark.parametrize("cls", [MutualDifferenceTrainer, MutualSimilarityTrainer])
UNFIT = pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(labels={"background": 0, "all": [1, 2], "one": 1}, regions_class_order=[1, 2]), "regions"),
        (lambda d: d.pop("annotated_labels"), "two groups or more"),
        (lambda d: d["annotated_labels"].update(tiny_002=[*BALLS, *BOX]), "groups overlap"),
        (
            lambda d: d["annotated_labels"].update(tiny_000=BALLS[:1], tiny_002=BALLS[:1]),
            "no group of training cases annotates ['right ball']",
        ),
    ],
)


def cascade(plans):
    plans["configurations"]["2d"]["previous_stage"] = "3d_fullres"
    return plans


@TRAINERS
@UNFIT
def test_trainers_refuse_unfit_data_sets_by_name(world, cls, change, message):
    with edited(world / "dataset.json", change):
        with pytest.raises((UserError, NotImplementedError), match=re.escape(message)) as refused:
            build(world, cls, plans="Unfit").initialize()
    assert refused.type is UserError or cls.__name__ in str(refused.value)


@UNFIT
def test_the_command_refuses_unfit_data_sets_by_name(world, capsys, change, message):
    with edited(world / "dataset.json", change):
        assert main(COMMAND) == 1
    printed = capsys.readouterr()
    assert message in printed.err and "[1/3]" not in printed.out, "before anything is trained"


@TRAINERS
def test_trainers_refuse_cascades_and_pretrained_weights_by_name(world, tmp_path, capsys, cls):
    with pytest.raises(UserError, match=f"{cls.__name__}: 2d is a cascade's second stage"):
        build(world, cls, plans="Cascade", change=cascade)
    torch.save({"network_weights": {}}, tmp_path / "x.pth")  # of one network, where these have several
    command = ["train", str(tiny.ID), "2d", "0", "-tr", cls.__name__, "-p", tiny.PLANS, "-device", "cpu"]
    assert main([*command, "-pretrained_weights", str(tmp_path / "x.pth")]) == 1
    assert "x.pth does not fit the network of this training: " in capsys.readouterr().err


def test_the_command_refuses_cascades_and_missing_cases_by_name(world, capsys):
    with edited(world / f"{tiny.PLANS}.json", cascade):
        assert main(COMMAND) == 1
    assert "-c 2d: a cascade's second stage has no mutual learning: take the first" in capsys.readouterr().err
    with edited(world / "splits_final.json", lambda splits: splits[0]["train"].append("tiny_009")):
        assert main(COMMAND) == 1
    assert "1 training case(s) of fold 0, such as tiny_009, are not there" in capsys.readouterr().err


@TRAINERS
def test_groups_too_small_for_a_batch_are_named_in_the_log(world, cls):
    """In training two cases annotate the balls, one the box."""

    def warnings(batch_size):
        def change(plans):
            plans["configurations"]["2d"]["batch_size"] = batch_size
            return plans

        trainer = build(world, cls, plans=f"Batch{batch_size}", change=change)
        trainer.initialize()
        return trainer.batch_size, re.findall(r"WARNING: .*\S", Path(trainer.log_file).read_text())

    assert warnings(2) == (2, [])
    size, (box,) = warnings(4)
    assert size == 4 and box == (
        "WARNING: group ['box'] has 1 training case(s) and gives up to 2 of the 4 patches of a batch, so batches hold "
        "the same case several times: add cases that annotate these labels, or give the plan a batch_size of 2 or less "
        "for each process"
    )
    _, (balls, box) = warnings(5)
    assert "['left ball', 'right ball'] has 2 training case(s) and gives up to 3 of the 5 patches" in balls
    assert "batch_size of 4 or less" in balls and "['box'] has 1" in box
    size, (raised,) = warnings(1)
    assert size == 2 and "a batch of 1 patches cannot hold 2 groups: it is raised to 2" in raised


# ---------------------------------------------------------------- what has changed


@pytest.fixture
def faked(world, tmp_path, monkeypatch):
    """The command on a copy of the data, with trainings and a completion that only leave files behind.

    Returns the commands that were run; the trainings start from the file denoiser.pth.
    """
    folder, commands = tmp_path / "preprocessed" / tiny.NAME, []
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("*_pseudo"))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (folder / "denoiser.pth").write_bytes(b"denoiser")
    block = {trainer: {"start": str(folder / "denoiser.pth")} for trainer in BLOCK}
    tiny.write_plans(json.loads((folder / f"{tiny.PLANS}.json").read_text()), **block)

    def execute(steps, step, command, log):
        commands.append(command)
        Path(step.output).parent.mkdir(parents=True, exist_ok=True)
        Path(step.output).write_bytes(b"weights")
        return 0, []

    def complete(model, setup, cases, to, gate, *workers):
        Path(to).mkdir(parents=True, exist_ok=True)
        for case in cases:
            Path(to, f"{case}_seg.b2nd").write_bytes(b"completed")
        origin = made_from({"teacher": model.identity, "gate": gate.as_dict()})
        Path(to, "completed.json").write_text(json.dumps({"made_from": origin, "cases": {}}))

    monkeypatch.setattr(mutual.Steps, "_execute", execute)
    monkeypatch.setattr(mutual, "describe_cases", lambda setup, names: names)
    monkeypatch.setattr(mutual, "complete_cases", complete)
    monkeypatch.setattr(mutual, "completion_table", lambda *_: "")
    return folder, commands


def test_a_finished_run_names_what_has_changed(faked, capsys, monkeypatch):
    folder, commands = faked
    assert main(COMMAND) == 0 and len(commands) == 2
    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", None, raising=False)  # no file is read a second time
        assert main(COMMAND) == 0 and len(commands) == 2
    plan, labeled = folder / f"{tiny.PLANS}.json", next(folder.glob("*_2d/tiny_000.b2nd")).parent
    for path, message in [
        (labeled / "tiny_000_seg.b2nd", r"remove the folder .*Difference.*\n  training cases: changed: tiny_000"),
        (labeled / "tiny_001.b2nd", "training cases: changed: tiny_001"),
        (labeled / "tiny_003_seg.b2nd", "validation cases: changed: tiny_003"),
        (folder / "denoiser.pth", r"\n  denoiser\..*denoiser.pth: was "),
        (next(folder.glob("*_pseudo/*/tiny_001_seg.b2nd")), r"Similarity.*\n  completed cases: changed: tiny_001"),
        (results("MutualDifferenceTrainer") / "fold_0" / "checkpoint_final.pth", r"Similarity.*\n  teacher: was"),
    ]:
        before, stat = path.read_bytes(), path.stat()
        path.write_bytes(before + b" ")
        assert main(COMMAND) == 1
        assert re.search(message, capsys.readouterr().err)
        path.write_bytes(before)
        assert main(COMMAND) == (path.suffix != ".pth"), "scans are compared by time, weights by content"
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert main(COMMAND) == 0
    for path, change, message in [
        (plan, lambda p: p["configurations"]["2d"].update(spacing=[9, 2]), r"\n  spacing: was \[2.*, now \[9, 2\]"),
        (plan, lambda p: p["configurations"]["2d"]["architecture"].update(arch_kwargs={}), r"\n  architecture.arch_kw"),
        (folder / "dataset.json", lambda d: d["annotated_labels"].update(tiny_003=BOX),
         r"\n  validation cases: changed: tiny_003"),
        (folder / "splits_final.json", lambda s: s[0]["train"].append("tiny_003"),
         r"\n  training cases: new: tiny_003"),
        (folder / "splits_final.json", lambda s: s[0]["train"].remove("tiny_000"),
         r"\n  training cases: missing: tiny_000"),
    ]:  # fmt: skip
        with edited(path, change):
            assert main(COMMAND) == 1
        assert re.search(message, capsys.readouterr().err)
    with edited(plan, lambda p: p["configurations"]["3d_fullres"].update(batch_size=7)):
        assert main(COMMAND) == 0, "another configuration"
    for ending in (".pkl", "_seg.b2nd", ".b2nd"):
        shutil.copy(labeled / f"tiny_000{ending}", labeled / f"tiny_009{ending}")
    assert main(COMMAND) == 0, "a case of no fold"
    monkeypatch.setattr(mutual, "version", lambda name: "9.9")
    assert main(COMMAND) == 1 and "nnunet_diffusion: was " in capsys.readouterr().err
    assert len(commands) == 2


def test_what_is_not_finished_is_made_anew_from_changed_labels(faked):
    folder, commands = faked
    assert main(COMMAND) == 0
    models = [results(trainer) / "fold_0" / "checkpoint_final.pth" for trainer in BLOCK]
    models[1].unlink()
    state = next(folder.parent.parent.glob("results/*/mutual__*/fold_0/state.json"))
    content = load_state(str(state))
    content.steps["train MutualSimilarityTrainer"]["seconds"] = None
    content.save(str(state))
    assert main(COMMAND) == 0 and commands[2][-1] == "--c", "it was stopped"
    models[1].unlink()
    completed = next(folder.glob("*_pseudo/*/tiny_000_seg.b2nd"))
    completed.write_bytes(b"corrected by hand")
    assert main(COMMAND) == 0 and commands[3][-1] != "--c"
    for model in models:
        model.unlink()
    label = next(folder.glob("*_2d/tiny_000_seg.b2nd"))
    label.write_bytes(label.read_bytes() + b" ")
    assert main(COMMAND) == 0 and [command[6] for command in commands[4:]] == list(BLOCK)
    assert all("--c" not in command for command in commands[4:])
    steps = load_state(str(state)).steps
    assert len(steps) == 3 and all({"nnunetv2", "torch"} <= set(step["versions"]) for step in steps.values())


# ---------------------------------------------------------------- both stages


@pytest.fixture(scope="module")
def learned(world):
    """Both stages by the command, killed in each training and continued; returns the folder of completed labels."""
    with pytest.raises(UserError, match="no completed labels of 3 training case.*nnunet_diffusion mutual"):
        tiny.trainer(MutualSimilarityTrainer).run_training()
    command = [*COMMAND, "--gate", "is_open=true"]
    for trainer in BLOCK:
        logs = results(trainer) / "fold_0"
        before = set(logs.glob("training_log*"))
        process = subprocess.Popen(killable(*command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while set(logs.glob("training_log*")) == before:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
        process.wait()
    assert main(command) == 0
    return next(world.glob("*_pseudo/mutual__*__fold_0"))


COMMAND = ["mutual", "-d", str(tiny.ID), "-c", "2d", "-f", "0", "-p", tiny.PLANS, "-device", "cpu"]


def results(trainer="MutualSimilarityTrainer"):
    return Path(os.environ["nnUNet_results"]) / tiny.NAME / f"{trainer}__{tiny.PLANS}__2d"


def test_true_labels_win_and_everything_is_known(world, learned):
    dataset = nnUNetDatasetBlosc2(str(learned.parent).removesuffix("_pseudo"), list(ANNOTATED))
    assert sorted(path.name[:8] for path in learned.glob("*_seg.b2nd")) == ["tiny_000", "tiny_001", "tiny_002"]
    for case in ("tiny_000", "tiny_001", "tiny_002"):
        true, label = dataset.load_case(case)[1][:], open_pseudo_label(str(learned), case)
        completed = label.segmentation[:]
        own = [tiny.LABELS[name] for name in ANNOTATED[case]]
        assert label.annotation.labels == set(tiny.LABELS)
        assert (np.isin(completed, own) == np.isin(true, own)).all() and (completed[true > 0] == true[true > 0]).all()
        assert not np.isin(completed[true == 0], own).any()
    report = json.loads((learned / "completed.json").read_text())
    assert report["cases"]["tiny_000"]["added"] == BOX and report["cases"]["tiny_001"]["added"] == BALLS


def test_validation_says_how_each_member_does(learned):
    trainer = tiny.trainer(MutualSimilarityTrainer)
    trainer.load_checkpoint(str(results() / "fold_0" / "checkpoint_final.pth"))
    trainer.validate_members = True
    trainer.perform_actual_validation()
    summary = json.loads((results() / "fold_0" / "validation" / "summary.json").read_text())
    assert [member["group"] for member in summary["members"]] == [BALLS, BOX]
    assert all(np.isfinite(member["foreground_mean"]["Dice"]) for member in summary["members"])
    log = Path(trainer.log_file).read_text()
    assert "Mean Validation Dice: member 0 0." in log and ", all together 0." in log


def test_the_same_command_does_nothing_twice(world, learned, capsys):
    files = [results(trainer) / "fold_0" / "checkpoint_final.pth" for trainer in BLOCK]
    before = [file.stat().st_mtime_ns for file in files]
    assert main([*COMMAND, "--gate", "is_open=true"]) == 0
    out = capsys.readouterr().out
    assert out.count("done before") == 3 and "[2/3] complete the training cases" in out
    assert [file.stat().st_mtime_ns for file in files] == before
    assert main([*COMMAND, "--gate", "voxel_confidence=0.9"]) == 1, "or a finished model would be lost"
    assert "gate.is_open: was True, now False" in capsys.readouterr().err
    change = lambda plans: plans["nnunet_diffusion"]["MutualDifferenceTrainer"].update(supervised_share=0.5)  # noqa: E731
    with edited(world / f"{tiny.PLANS}.json", change):
        assert main([*COMMAND, "--gate", "is_open=true"]) == 1
    error = capsys.readouterr().err
    assert f"remove the folder {files[0].parent} to make it anew" in error
    assert "settings.supervised_share: was " in error
    assert [file.stat().st_mtime_ns for file in files] == before


def test_wrong_arguments_and_missing_splits(world, learned, tmp_path, capsys):
    for arguments, message in [
        (["-f", "7"], "splits_final.json has folds 0 to 0: add it there, or take all"),
        (["-f", "x"], "-f x: give the number of a fold, or all"),
        (["-c", "3d_lowres"], f"{tiny.PLANS}.json has 2d"),
        (["-p", "NoPlans"], "-p NoPlans: there is no"),
        (["--gate", "voxels=1"], "--gate voxels=1: known are"),
        (["-p", "Late"], "nnunet_diffusion.MutualSimilarityTrainer.epochs is not a setting"),
        (["-p", "Other"], "setting groups is [['left ball'], ['box']] for MutualDifferenceTrainer and [['box']] for"),
    ]:
        plans = json.loads((world / f"{tiny.PLANS}.json").read_text())
        block = {"Late": {"MutualSimilarityTrainer": {"epochs": 3}},
                 "Other": {"MutualDifferenceTrainer": {"groups": [["left ball"], ["box"]]},
                           "MutualSimilarityTrainer": {"groups": [["box"]]}}}  # fmt: skip
        for name, settings in block.items():
            content = {**plans, "plans_name": name, "nnunet_diffusion": settings}
            (world / f"{name}.json").write_text(json.dumps(content))
        assert main([*COMMAND, *arguments]) == 1
        assert message in capsys.readouterr().err
    identifier = learned.parent.name.removesuffix("_pseudo")
    (tmp_path / identifier).symlink_to(world / identifier)
    cases = training_cases_of(str(tmp_path), identifier, "1")
    written = json.loads((tmp_path / "splits_final.json").read_text())
    assert len(written) == 5 and cases == written[1]["train"], "five folds, as nnU-Net makes them"
    assert training_cases_of(str(tmp_path), identifier, "all") == sorted(ANNOTATED)
    (tmp_path / "few" / identifier).mkdir(parents=True)
    for file in (world / identifier).glob(f"{cases[0]}*"):
        (tmp_path / "few" / identifier / file.name).symlink_to(file)
    with pytest.raises(UserError, match="nnU-Net splits 5 cases or more, not 1: write .*splits_final.json"):
        training_cases_of(str(tmp_path / "few"), identifier, "0")


def test_stock_predictor_takes_the_mean_and_an_export_one_member(learned, tmp_path, capsys):
    model = results()
    with model_folder.trainers_of(installation.with_our_trainers([])):
        ours = model_folder.load_predictor(str(model), ["0"], "checkpoint_final.pth")
    export = ["export", "--stock", "-d", str(tiny.ID), "-c", "2d", "-p", tiny.PLANS]
    chosen = ["-tr", "MutualSimilarityTrainer", "--member", "1", "-o", str(tmp_path / "one")]
    assert main([*export, *chosen]) == 0
    with model_folder.trainers_of(""):
        one = model_folder.load_predictor(str(tmp_path / "one"), ["0"], "checkpoint_final.pth")
    image = torch.randn(1, 2, 20, 24)
    together, alone = (p.predict_logits_from_preprocessed_data(image) for p in (ours, one))
    ours.network.only = 1
    assert torch.equal(ours.predict_logits_from_preprocessed_data(image), alone)
    ours.network.only = None
    x = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        mean = torch.stack([member(x).softmax(1) for member in ours.network.members]).mean(0)
        assert torch.equal(ours.network(x).argmax(1), mean.argmax(1))
    assert together.shape == (4, 2, 20, 24)
    for arguments, message in [
        (["-tr", "MutualSimilarityTrainer", "--member", "2"], "--member 2: the model .* has members 0 to 1"),
        (["-tr", "MutualDifferenceTrainer", "--member", "0"], "know a part of the labels each"),
        (["-tr", "MutualSimilarityTrainer"], "export one of its members with --member"),
    ]:
        capsys.readouterr()
        assert main([*export, *arguments, "-o", str(tmp_path / "no")]) == 1
        assert re.search(message, capsys.readouterr().err)


def test_batches_of_stage_2_hold_both_label_maps(learned):
    trainer = tiny.trainer(MutualSimilarityTrainer)
    trainer.initialize()
    loader, validation = trainer.get_dataloaders()
    batch = trainer.describe(next(loader))
    assert [target.shape[1] for target in batch.targets] == [2, 2] and next(validation)["target"][0].shape[1] == 1
    true, completed = batch.true[0], batch.completed[0]
    assert (completed[true > 0] == true[true > 0]).all()
    assert (batch.completed_annotation == torch.arange(4)).all() and sorted(batch.group.tolist()) == [0, 1]


@pytest.mark.parametrize("trainer", BLOCK)
def test_two_processes_train_and_validate(world, learned, trainer):
    """On CPUs, under torchrun; each process has cases of both groups in its batch."""
    shutil.rmtree(results(trainer))
    plans = world / f"{tiny.PLANS}.json"
    before = plans.read_text()
    plans.write_text(before.replace('"validate_members": false', '"validate_members": true'))
    program = results(trainer).with_suffix(".py")
    program.write_text(
        "from nnunet_diffusion.cli import main\nif __name__ == '__main__':\n    raise SystemExit(main())\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29547"]
    arguments = ["train", str(tiny.ID), "2d", "0", "-tr", trainer, "-p", tiny.PLANS, "-device", "cpu"]
    done = run_command([*launcher, str(program), *arguments])
    plans.write_text(before)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((results(trainer) / "fold_0" / "validation" / "summary.json").read_text())
    assert len(summary.get("members", [])) == (2 if trainer == "MutualSimilarityTrainer" else 0)


def test_ignored_voxels_stay_ignored_under_the_gate_as_it_comes(world, tmp_path, monkeypatch):
    """Both stages by the command, with an ignore label; after so short a training the gate believes next to nothing."""
    folder = tmp_path / "preprocessed" / tiny.NAME
    shutil.copytree(world, folder, ignore=shutil.ignore_patterns("*_pseudo"))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**content, "labels": {**tiny.LABELS, "ignore": 4}}))
    data = next(path.parent for path in folder.glob("*_2d/tiny_000_seg.b2nd"))
    dataset = nnUNetDatasetBlosc2(str(data), list(ANNOTATED))
    true = {}
    for case in ANNOTATED:
        _, seg, _, properties = dataset.load_case(case)
        true[case] = np.array(seg[:])
        true[case][:, :4] = 4
        # as nnU-Net's preprocessing leaves it: with an ignore label, patches are drawn around what is annotated
        properties["class_locations"][(-1, *range(4))] = np.argwhere(true[case] != 4)
        (data / f"{case}.pkl").write_bytes(pickle.dumps(properties))
        (data / f"{case}_seg.b2nd").unlink()
        chunks = (1, *true[case].shape[1:])
        nnUNetDatasetBlosc2.save_seg(true[case], str(data / f"{case}_seg"), chunks, chunks)
    assert main([*COMMAND, "-np", "2"]) == 0
    completed = next(folder.glob("*_pseudo/mutual__*__fold_0"))
    for case in ("tiny_000", "tiny_001", "tiny_002"):
        label = open_pseudo_label(str(completed), case)
        segmentation = label.segmentation[:]
        assert (segmentation[true[case] == 4] == 4).all()
        assert (segmentation[np.isin(true[case], [1, 2, 3])] == true[case][np.isin(true[case], [1, 2, 3])]).all()
        assert set(ANNOTATED[case]) <= label.annotation.labels
    losses = [
        torch.load(path, map_location="cpu", weights_only=False)["logging"]["train_losses"]
        for path in (tmp_path / "results").glob("*/*/fold_0/checkpoint_final.pth")
    ]
    assert len(losses) == 2 and np.isfinite(losses).all()
