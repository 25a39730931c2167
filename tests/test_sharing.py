"""A denoiser's folder for others: what it holds, what is refused of one, and data sets that are planned like it."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import denoisers
import pytest
import tiny_dataset
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.cli import main
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.preprocessing.planning_like import FROM_A_DENOISER, name_like, plan_like
from nnunet_diffusion.pretraining.denoiser_file import load_denoiser, plan_identity
from nnunet_diffusion.pretraining.exported import export_denoiser, read_exported
from nnunet_diffusion.pretraining.start import DENOISER
from nnunet_diffusion.pretraining.transfer import plan_differences
from nnunet_diffusion.trainers import our_trainers

FINGERPRINT = {
    "spacings": [[4.0, 2.0, 3.0], [4.0, 2.0, 3.0]], "shapes_after_crop": [[8, 12, 16], [10, 12, 16]],
    "foreground_intensity_properties_per_channel": {"0": denoisers.CT}, "median_relative_size_after_cropping": 1.0,
}  # fmt: skip
EXPORT = ["export", "-d", "990", "-p", "nnUNetTinyPlans", "-c", "2d"]


def plans_of(identity: dict) -> dict:
    """The plans.json of a training that left a denoiser with this identity."""
    configuration = {
        "data_identifier": f"nnUNetTinyPlans_{identity['configuration']}", "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 4, "spacing": identity["spacing"], "patch_size": identity["patch_size"],
        "median_image_size_in_voxels": [12.0, 16.0], "batch_dice": True,
        "normalization_schemes": identity["normalization_schemes"],
        "use_mask_for_norm": [False] * len(identity["normalization_schemes"]),
        "architecture": {
            "network_class_name": identity["network_class"], "arch_kwargs": identity["network_kwargs"],
            "_kw_requires_import": identity["network_kwargs_requiring_import"],
        },
    }  # fmt: skip
    for what, order in (("data", 3), ("seg", 1), ("probabilities", 1)):
        configuration[f"resampling_fn_{what}"] = "resample_data_or_seg_to_shape"
        kwargs = {"is_seg": what == "seg", "order": order, "order_z": 0, "force_separate_z": None}
        configuration[f"resampling_fn_{what}_kwargs"] = kwargs
    return {
        "dataset_name": identity["dataset_name"], "plans_name": identity["plans_name"],
        "original_median_spacing_after_transp": [4.0, 2.0, 3.0], "original_median_shape_after_transp": [9, 12, 16],
        "image_reader_writer": "SimpleITKIO", "experiment_planner_used": "CompactPlanner",
        "label_manager": "LabelManager", "transpose_forward": identity["transpose_forward"],
        "transpose_backward": [identity["transpose_forward"].index(axis) for axis in range(3)],
        "foreground_intensity_properties_per_channel": identity["intensities"],
        "configurations": {
            identity["configuration"]: configuration,
            "secret": {**configuration, "data_identifier": "secret"},
        },
        "nnunet_diffusion": {
            "DenoisingDiffusionTrainer": {"num_epochs": 7},
            "PartialLabelTrainer": {"num_epochs": 3, "start": "/home/somebody/denoiser.pth"},
            "TheirOwnTrainer": {"path": "/home/somebody"},
        },
        "notes": "/home/somebody",
    }  # fmt: skip


def pretrained(nnunet_folders: Path, identity: dict | None = None, folds=("all",)) -> Path:
    """A model folder with a denoiser for each fold; returns it."""
    identity = identity or denoisers.plan()
    name = f"DenoisingDiffusionTrainer__{identity['plans_name']}__{identity['configuration']}"
    folder = nnunet_folders / "nnUNet_results" / identity["dataset_name"] / name
    for fold in folds:
        (folder / f"fold_{fold}").mkdir(parents=True)
        denoisers.write(folder / f"fold_{fold}" / "denoiser.pth", identity)
        (folder / f"fold_{fold}" / "progress.png").write_bytes(b"curves")
        (folder / f"fold_{fold}" / "samples.png").write_bytes(b"real scans")
    (folder / "plans.json").write_text(json.dumps(plans_of(identity)))
    (folder / "dataset.json").write_text(json.dumps({"dataset": {"patient_007": {}}}))
    (folder / "dataset_fingerprint.json").write_text(json.dumps(FINGERPRINT))
    return folder


@pytest.fixture
def exported(nnunet_folders, tmp_path) -> Path:
    """The folder of a denoiser."""
    export_denoiser(str(pretrained(nnunet_folders)), None, str(tmp_path / "given"))
    return tmp_path / "given"


# ---------------------------------------------------------------- what is written


def test_the_folder_holds_what_somebody_else_needs_and_no_patient(nnunet_folders, tmp_path, capsys):
    source = pretrained(nnunet_folders)
    folder = tmp_path / "given"
    assert main([*EXPORT, "--denoiser", str(folder)]) == 0
    assert "denoiser of fold all, plan, fingerprint and model card; state the license" in capsys.readouterr().out
    assert sorted(os.listdir(folder)) == [
        "README.md", "dataset_fingerprint.json", "denoiser.pth", "plans.json", "progress.png",
    ]  # fmt: skip
    assert (folder / "denoiser.pth").read_bytes() == (source / "fold_all" / "denoiser.pth").read_bytes()
    assert json.loads((folder / "dataset_fingerprint.json").read_text()) == FINGERPRINT
    plans = json.loads((folder / "plans.json").read_text())
    assert list(plans["configurations"]) == ["2d"]
    settings = {"DenoisingDiffusionTrainer": {"num_epochs": 7}, "PartialLabelTrainer": {"num_epochs": 3}}
    assert plans["nnunet_diffusion"] == settings
    text = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json"))
    assert not any(private in text for private in ("somebody", "patient_007", "secret", str(tmp_path)))


def test_the_card_says_what_it_was_trained_on(nnunet_folders, tmp_path):
    source = pretrained(nnunet_folders)
    path = source / "fold_all" / "denoiser.pth"
    content = torch.load(path, weights_only=True)
    content["training"] |= {"images": 213, "of_the_pool": 114, "held_out": 6, "epochs": 12, "iterations_per_epoch": 40}
    content["training"]["held_out_loss"] = [0.5, 0.25, 0.125]
    torch.save(content, path)
    export_denoiser(str(source), None, str(tmp_path / "given"))
    card = (tmp_path / "given" / "README.md").read_text()
    for said in (
        "| images | 213, of which 114 were never annotated; no label was used |",
        "| steps | 12 epochs of 40, batch 4 |", "first and last epoch | 0.5000, 0.1250 |",
        "| median spacing of the labeled scans | 4 x 2 x 3 mm |", "size of the labeled scans | 9 x 12 x 16 voxels |",
        "| spacing | 3 x 4 mm |", "| patch | 12 x 16 voxels |", "| normalization | CTNormalization |",
        "mean 40, std 200, percentile_00_5 -960, percentile_99_5 1040", "![Losses of the training](progress.png)",
        "## License\n\n**Not stated yet.**", "Isensee, F.", "--like THIS_FOLDER",
        hashlib.sha256(path.read_bytes()).hexdigest(),
    ):  # fmt: skip
        assert said in card, said
    weights = load_denoiser(str(path))["network_weights"]
    unique = {weight.data_ptr(): weight.numel() for weight in weights.values()}
    assert f"PlainConvUNet, {sum(unique.values()) / 1e6:.2f} million weights" in card


def test_fold_all_is_taken_unless_another_is_asked_for(nnunet_folders, tmp_path):
    source = str(pretrained(nnunet_folders, folds=("0", "3", "all")))
    assert export_denoiser(source, None, str(tmp_path / "a")) == "all"
    assert export_denoiser(source, "3", str(tmp_path / "b")) == "3"
    shutil.rmtree(Path(source) / "fold_all")
    assert export_denoiser(source, None, str(tmp_path / "c")) == "0"


def test_what_is_missing_or_there_already_is_named_and_nothing_written(nnunet_folders, tmp_path, capsys):
    folder = tmp_path / "given"
    source = pretrained(nnunet_folders)
    command = [*EXPORT, "--denoiser", str(folder)]
    for arguments, message in (
        (["-f", "4"], "fold_4/denoiser.pth: check -d, -p, -c and -f, or finish"),
        (["-f", "0", "1"], "of one fold: leave out -o and --member"),
        (["-o", "x"], "leave out -o and --member"),
        (["-c", "3d_fullres"], "__3d_fullres has no denoiser.pth of any fold: check -d, -p and -c"),
    ):
        assert main([*command, *arguments]) == 1
        assert message in capsys.readouterr().err
    for file in ("plans.json", "dataset_fingerprint.json"):
        kept = (source / file).read_bytes()
        (source / file).unlink()
        assert main(command) == 1 and f"there is no {source / file}" in capsys.readouterr().err
        (source / file).write_bytes(kept)
    assert not folder.exists()
    folder.mkdir()
    (folder / "mine").touch()
    assert main(command) == 1 and "exists already: remove it" in capsys.readouterr().err
    assert os.listdir(folder) == ["mine"] and sorted(os.listdir(tmp_path)) == ["given", "nnunet"]
    assert main([*EXPORT, "--stock"]) == 1 and "give the trainer of the model with -tr" in capsys.readouterr().err


def test_a_plan_that_was_changed_since_is_not_shared(nnunet_folders, tmp_path):
    source = pretrained(nnunet_folders)
    plans = json.loads((source / "plans.json").read_text())
    plans["configurations"]["2d"]["spacing"] = [1.0, 1.0]
    (source / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(UserError, match=r"same training: spacing is \[1.0, 1.0\] in the plan, \[3.0, 4.0\] in"):
        export_denoiser(str(source), None, str(tmp_path / "given"))
    assert not (tmp_path / "given").exists()


# ---------------------------------------------------------------- what others give


def test_what_is_exported_is_read(exported):
    found = read_exported(str(exported))
    assert found.denoiser == str(exported / "denoiser.pth") and found.configuration == "2d"
    assert found.channel_names == {"0": "CT"} and list(found.plans["configurations"]) == ["2d"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def first(plans: dict) -> dict:
    return plans["configurations"]["2d"]


HARMFUL = [
    *[(lambda folder, name=name: (folder / name).unlink(), f"given has no {name}: copy the folder again")
      for name in ("denoiser.pth", "plans.json", "dataset_fingerprint.json")],
    *[(lambda folder, name=name: (folder / name).write_bytes((folder / name).read_bytes()[:-9]), f"{name}: is no JSON")
      for name in ("plans.json", "dataset_fingerprint.json")],
    (lambda folder: (folder / "denoiser.pth").write_bytes((folder / "denoiser.pth").read_bytes()[:-500]),
     "denoiser.pth cannot be read, it is truncated"),
    (lambda folder: torch.save({"format": Bomb()}, folder / "denoiser.pth"), "asks for posix.mkdir, and could run any"),
    (lambda folder: (folder / "denoiser.pth").write_bytes(pickle.dumps(Bomb(), 2)), "asks for posix.mkdir"),
    (lambda folder: torch.save({"network_weights": {}}, folder / "denoiser.pth"), "is no denoiser of nnunet_diffusion"),
    (lambda folder: change(folder / "dataset_fingerprint.json", lambda f: f.update(spacings=5)), "spacings: Input"),
    (lambda folder: change(folder / "plans.json", lambda p: p.update(dataset_name="../x")), "name: '../x' cannot"),
    (lambda folder: change(folder / "plans.json", lambda p: p.update(plans_name="a/b")), "plans_name: 'a/b' cannot be"),
    (lambda folder: change(folder / "plans.json", lambda p: first(p).update(data_identifier="..")), "'..' cannot be"),
    (lambda folder: change(folder / "plans.json", lambda p: p.update(configurations={"x": first(p)})),
     "has no configuration '2d', which the denoiser is of"),
    (lambda folder: change(folder / "plans.json", lambda p: first(p).update(architecture={})), "describes no network"),
    (lambda folder: change(folder / "plans.json",
                           lambda p: first(p)["architecture"].update(network_class_name="os.system")),
     "not of the same training: network_class is 'os.system' in the plan"),
    (lambda folder: change(folder / "plans.json", lambda p: first(p).update(patch_size=[64, 64])),
     "not of the same training: patch_size"),
    (lambda folder: shutil.rmtree(folder), "given has no denoiser.pth, plans.json, dataset_fingerprint.json"),
]  # fmt: skip


@pytest.mark.parametrize(("harm", "message"), HARMFUL)
def test_what_cannot_be_trusted_is_refused_by_name(exported, tmp_path, monkeypatch, harm, message):
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    harm(exported)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read_exported(str(exported))
    assert not (tmp_path / "bomb").exists()


def test_a_network_that_is_no_unet_is_not_looked_up(exported):
    """Plan and denoiser agree, which a forger can see to."""
    content = torch.load(exported / "denoiser.pth", weights_only=True)
    content["plan"]["network_class"] = "os.system"
    torch.save(content, exported / "denoiser.pth")
    change(exported / "plans.json", lambda p: first(p)["architecture"].update(network_class_name="os.system"))
    with pytest.raises(UserError, match="denoiser.pth: the denoiser asks for os.system: only nnU-Net's U-Nets"):
        read_exported(str(exported))


# ---------------------------------------------------------------- planning like it


@pytest.fixture
def raw(nnunet_folders):
    """A data set of somebody else's, measured as far as a plan needs it."""
    folder = tiny_dataset.make(nnunet_folders / "nnUNet_raw", labeled=2, unlabeled=1)
    measured = nnunet_folders / "nnUNet_preprocessed" / tiny_dataset.NAME
    measured.mkdir()
    intensities = {str(i): {**denoisers.CT, "mean": float(i)} for i in range(3)}
    fingerprint = {**FINGERPRINT, "foreground_intensity_properties_per_channel": intensities}
    (measured / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
    return folder


def planned_like(exported: Path, replan: bool = False) -> dict:
    found = read_exported(str(exported))
    path = plan_like(tiny_dataset.NAME, found.plans, found.channel_names, found.denoiser, replan)
    return json.loads(Path(path).read_text())


def test_the_plan_is_theirs_in_all_that_a_denoiser_needs(exported, raw, nnunet_folders, capsys):
    made = planned_like(exported)
    assert "planned: " in capsys.readouterr().out
    assert made["dataset_name"] == tiny_dataset.NAME and made["plans_name"] == "nnUNetTinyPlansLikeTiny_2d"
    assert first(made)["data_identifier"] == "nnUNetTinyPlansLikeTiny_2d"
    by_default = {cls.__name__ for cls in our_trainers() if vars(cls).get("start") == DENOISER}
    assert by_default == set(FROM_A_DENOISER), "all that look for the data set's own denoiser unless told otherwise"
    for trainer in by_default:
        assert made["nnunet_diffusion"][trainer] == {"start": str(exported / "denoiser.pth")}
    assert made["nnunet_diffusion"]["PartialLabelTrainer"] == {"num_epochs": 3}
    trained = load_denoiser(str(exported / "denoiser.pth"))["plan"]
    now = plan_identity(PlansManager(made), "2d", json.loads((raw / "dataset.json").read_text()))
    assert plan_differences(trained, now) == []
    same = {key for key in now if now[key] == trained[key]}
    assert now.keys() - same == {"dataset_name", "plans_name"}
    folder = nnunet_folders / "nnUNet_preprocessed" / tiny_dataset.NAME
    assert (folder / "dataset.json").read_bytes() == (raw / "dataset.json").read_bytes()


def test_names_of_others_become_safe_ones(exported):
    plans = read_exported(str(exported)).plans
    plans |= {"plans_name": "a b;$(x)__", "dataset_name": "Dataset001_" + "ä x" * 90}
    assert name_like(plans) == "abxLike" + "x" * 60 + "_2d"


def test_such_a_plan_is_kept_with_what_may_be_edited(exported, raw, nnunet_folders, capsys):
    planned_like(exported)
    path = nnunet_folders / "nnUNet_preprocessed" / tiny_dataset.NAME / "nnUNetTinyPlansLikeTiny_2d.json"
    change(path, lambda p: first(p).update(batch_size=3))
    capsys.readouterr()
    assert first(planned_like(exported))["batch_size"] == 3 and "kept" in capsys.readouterr().out
    change(path, lambda p: first(p).update(spacing=[9.0, 9.0]))
    with pytest.raises(UserError, match="2d.spacing: not like the plan that --like gives: --replan replaces it"):
        planned_like(exported)
    assert first(planned_like(exported, replan=True))["spacing"] == [3.0, 4.0]


def with_channels(raw: Path, *names: str) -> None:
    change(raw / "dataset.json", lambda d: d.update(channel_names={str(i): name for i, name in enumerate(names)}))


@pytest.mark.parametrize("names", [("CT", "PET"), ("MR",), ("PET", "CT")])
def test_channels_that_ct_normalization_does_not_fit_are_refused(exported, raw, names):
    with_channels(raw, *names)
    with pytest.raises(UserError, match=r"channels \[.*\] of .* are not \['CT'\], .*: CTNormalization of it cannot be"):
        planned_like(exported)


def test_ct_in_other_letters_is_ct(exported, raw):
    with_channels(raw, "ct")
    assert first(planned_like(exported))["normalization_schemes"] == ["CTNormalization"]


def test_one_mr_channel_serves_three(nnunet_folders, tmp_path, raw, capsys):
    """Z-scores come from each scan, so the scheme fits every channel."""
    identity = {**denoisers.plan(scheme="ZScoreNormalization"), "channel_names": {"0": "T1"}}
    export_denoiser(str(pretrained(nnunet_folders, identity)), None, str(tmp_path / "given"))
    with_channels(raw, "T1", "T2", "FLAIR")
    made = planned_like(tmp_path / "given")
    assert "WARNING: channels ['T1', 'T2', 'FLAIR'] of" in capsys.readouterr().out
    assert first(made)["normalization_schemes"] == ["ZScoreNormalization"] * 3
    assert first(made)["use_mask_for_norm"] == [False] * 3
    assert made["foreground_intensity_properties_per_channel"]["2"]["mean"] == 2.0


def test_like_and_a_planner_contradict_each_other(exported, raw, capsys):
    assert main(["plan_and_preprocess", "-d", "9", "--like", str(exported), "-pl", "CompactPlanner"]) == 1
    assert "--like and -pl: give one of them" in capsys.readouterr().err


@pytest.mark.slow
def test_a_data_set_is_preprocessed_like_another_one(exported, raw, nnunet_folders, capsys):
    folder = nnunet_folders / "nnUNet_preprocessed" / tiny_dataset.NAME
    (folder / "dataset_fingerprint.json").unlink()
    command = ["plan_and_preprocess", "-d", "9", "--like", str(exported), "-np", "1"]
    for said in ("planned: ", ": kept"):
        assert main(command) == 0
        out = capsys.readouterr().out
        assert said in out and "FOLD -tr DiffusionPretrainedTrainer -p nnUNetTinyPlansLikeTiny_2d" in out
    data = folder / "nnUNetTinyPlansLikeTiny_2d"
    assert len(list(data.glob("*_seg.b2nd"))) == 2 and len(list(folder.glob(f"{data.name}_unlabeled/*.b2nd"))) == 1
    assert main([*command[:-2], "-np", "1", "--num_parts", "1", "--part_id", "0"]) == 0
    assert main([*command, "-c", "3d_fullres"]) == 1 and "the plan has 2d" in capsys.readouterr().err
