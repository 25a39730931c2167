"""Plans, made from fingerprints that are written down here."""

import json
from pathlib import Path

import pytest
import tiny_dataset
from nnunetv2.experiment_planning.experiment_planners import default_experiment_planner
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncL,
    nnUNetPlannerResEncM,
    nnUNetPlannerResEncXL,
)
from nnunetv2.experiment_planning.plan_and_preprocess_api import plan_experiment_dataset

from nnunet_diffusion import trainers
from nnunet_diffusion.cli.plan_and_preprocess import find_planner
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import NotWritten
from nnunet_diffusion.planners.CompactPlanner import CompactPlanner
from nnunet_diffusion.planners.DiffusionPlanner import DiffusionPlanner
from nnunet_diffusion.planners.DiffusionPlannerL import DiffusionPlannerL
from nnunet_diffusion.planners.DiffusionPlannerXL import DiffusionPlannerXL
from nnunet_diffusion.preprocessing import planning
from nnunet_diffusion.preprocessing.planning import default_plans_name
from nnunet_diffusion.settings import effective

INTENSITIES = {
    "0": {
        "mean": 60.0, "median": 50.0, "std": 40.0, "min": -100.0, "max": 300.0,
        "percentile_99_5": 200.0, "percentile_00_5": -50.0,
    }
}  # fmt: skip


@pytest.fixture
def dataset(nnunet_folders, monkeypatch):
    """Returns a function that writes labeled (spacing, shape) pairs, and unlabeled ones or problems."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planning takes 0 for torch's thread count
    raw = tiny_dataset.make(nnunet_folders / "nnUNet_raw", labeled=1, unlabeled=0)
    preprocessed = nnunet_folders / "nnUNet_preprocessed" / tiny_dataset.NAME
    preprocessed.mkdir()

    def write(labeled, unlabeled=()):
        fingerprint = {
            "spacings": [spacing for spacing, _ in labeled],
            "shapes_after_crop": [shape for _, shape in labeled],
            "foreground_intensity_properties_per_channel": INTENSITIES,
            "median_relative_size_after_cropping": 1.0,
        }
        (preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        description = json.loads((raw / "dataset.json").read_text())
        description["numTraining"] = len(labeled)
        description["unlabeled"] = {f"u{i}": {"images": [f"u{i}.nii.gz"]} for i in range(len(unlabeled))}
        (raw / "dataset.json").write_text(json.dumps(description))
        measures = {
            f"u{i}": {"problem": entry}
            if isinstance(entry, str)
            else {"spacing": entry[0], "shape_after_crop": entry[1]}
            for i, entry in enumerate(unlabeled)
        }
        (preprocessed / "unlabeled_fingerprint.json").write_text(json.dumps(measures))
        return preprocessed

    return write


def plan(planner):
    """Plans as nnU-Net's own command does; returns what stands in the file."""
    _, name = plan_experiment_dataset(9, planner)
    from nnunetv2.paths import nnUNet_preprocessed

    with open(f"{nnUNet_preprocessed}/{tiny_dataset.NAME}/{name}.json") as f:
        return json.load(f)


CT = ([3.0, 0.8, 0.8], [48, 200, 150])


def test_compact_is_nnunet_with_caps(dataset):
    dataset([CT] * 20)
    compact, stock = plan(CompactPlanner), plan(ExperimentPlanner)
    assert compact["plans_name"] == "nnUNetCompactPlans"
    for key in ("transpose_forward", "foreground_intensity_properties_per_channel", "image_reader_writer"):
        assert compact[key] == stock[key]
    assert set(compact["configurations"]) == {"2d", "3d_fullres"}
    for name, patch, batch in (("2d", [96, 96], 8), ("3d_fullres", [48, 64, 64], 2)):
        ours, theirs = compact["configurations"][name], stock["configurations"][name]
        assert ours["patch_size"] == patch and ours["batch_size"] == batch
        for key in ("spacing", "median_image_size_in_voxels", "normalization_schemes", "resampling_fn_data_kwargs"):
            assert ours[key] == theirs[key]
        network = ours["architecture"]["arch_kwargs"]
        assert network["features_per_stage"] == [16, 32, 64, 128, 128][: network["n_stages"]]
        assert set(network["n_conv_per_stage"]) == {1} == set(network["n_conv_per_stage_decoder"])


def test_compact_patch_never_exceeds_small_images(dataset):
    dataset([([3.0, 2.0, 2.0], [24, 32, 32])] * 3)
    configurations = plan(CompactPlanner)["configurations"]
    assert configurations["2d"]["patch_size"] == [32, 32] and configurations["2d"]["batch_size"] == 8
    assert configurations["3d_fullres"]["patch_size"] == [24, 32, 32]


@pytest.mark.parametrize("planner", [CompactPlanner, DiffusionPlanner])
def test_plans_carry_settings_of_every_trainer(dataset, planner):
    """A class's for all that derive from it."""
    dataset([([3.0, 2.0, 2.0], [24, 32, 32])] * 3)
    plans, is_compact = plan(planner), planner is CompactPlanner
    for cls in trainers.our_trainers():
        settings = effective(plans, cls)
        assert settings["num_epochs"] == (60 if is_compact else 1000)
        assert settings["num_val_iterations_per_epoch"] == 8 or not is_compact
        if "optimizer_name" in settings:
            assert settings["optimizer_name"] == ("AdamW" if is_compact else "SGD")
    if is_compact:
        rates = {cls.__name__: effective(plans, cls)["initial_lr"] for cls in trainers.our_trainers()}
        assert rates.pop("ConfiguredTrainer") == 1e-2 and rates.pop("DiffusionTeacherTrainer") == 1e-3
        assert set(rates.values()) == {3e-3}


@pytest.mark.parametrize(
    "ours, theirs, name",
    [
        (DiffusionPlanner, nnUNetPlannerResEncM, "nnUNetDiffusionPlans"),
        pytest.param(DiffusionPlannerL, nnUNetPlannerResEncL, "nnUNetDiffusionLPlans", marks=pytest.mark.slow),
        pytest.param(DiffusionPlannerXL, nnUNetPlannerResEncXL, "nnUNetDiffusionXLPlans", marks=pytest.mark.slow),
    ],
)
def test_without_unlabeled_scans_the_plan_is_nnunets_preset(dataset, ours, theirs, name):
    dataset([([3.0, 1.0, 1.0], [16, 64, 60])] * 20)
    plans, reference = plan(ours), plan(theirs)
    assert plans["plans_name"] == name
    for configuration, expected in reference["configurations"].items():
        found = dict(plans["configurations"][configuration])
        identifier = found.pop("data_identifier", None)
        assert found == {key: value for key, value in expected.items() if key != "data_identifier"}
        if configuration in ("2d", "3d_fullres"):
            assert identifier == f"nnUNetDiffusionPlans_{configuration}"


def test_geometry_follows_all_scans_and_intensities_the_labeled_ones(dataset):
    labeled = [([3.0, 1.0, 1.0], [8, 32, 32])] * 2
    dataset(labeled, [([2.0, 0.5, 0.5], [12, 64, 64])] * 3 + ["u3.nii.gz: truncated"])
    plans = plan(DiffusionPlanner)
    # medians of {3, 3, 2, 2, 2}, {1, 1, 0.5, 0.5, 0.5} and {8, 8, 12, 12, 12}; the broken scan does not count
    assert plans["configurations"]["3d_fullres"]["spacing"] == [2.0, 0.5, 0.5]
    assert plans["original_median_shape_after_transp"] == [12, 64, 64]
    assert plans["foreground_intensity_properties_per_channel"] == INTENSITIES
    assert plan(CompactPlanner)["configurations"]["3d_fullres"]["spacing"] == [3.0, 1.0, 1.0]


def test_2d_256_fits_the_median_slice(dataset):
    dataset([([800.0, 0.8, 0.8], [1, 400, 300])] * 3)  # single slices: quick, no 3-D configuration
    configuration = plan(DiffusionPlanner)["configurations"]["2d_256"]
    assert configuration["patch_size"] == [256, 256]
    assert configuration["spacing"] == pytest.approx([1.25, 1.25])  # 0.8 mm * 400 / 256
    assert configuration["median_image_size_in_voxels"] == [256, 192]
    assert configuration["data_identifier"] == "nnUNetDiffusionPlans_2d_256"
    strides = configuration["architecture"]["arch_kwargs"]["strides"]
    assert len(strides) == 7  # 256 halves six times until 4
    assert configuration["batch_dice"] is True


def test_unmeasured_scans_are_an_error(dataset):
    preprocessed = dataset([CT], [CT])
    (preprocessed / "unlabeled_fingerprint.json").unlink()
    with pytest.raises(UserError, match="1 unlabeled scans .* were not measured .u0.*plan_and_preprocess"):
        DiffusionPlanner(9)


def test_an_earlier_plan_stays_until_the_new_one_is_whole(dataset, monkeypatch):
    preprocessed = dataset([CT])

    def make(replan=True):
        return Path(planning.plan(tiny_dataset.NAME, CompactPlanner, replan))

    def full_disk(content, file, **_):
        Path(file).write_text(json.dumps(content)[:50])
        raise OSError(28, "No space left on device")

    file = make()
    assert file == preprocessed / "nnUNetCompactPlans.json"
    edited = json.loads(file.read_text())
    edited["configurations"] |= {"mine": {"inherits_from": "2d", "batch_size": 3}}
    file.write_text(json.dumps(edited))
    there = sorted(preprocessed.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(default_experiment_planner, "save_json", full_disk)
        with pytest.raises(NotWritten, match=f"{file.name} was not written to {preprocessed}, .* No space.*; make"):
            make()
    assert json.loads(file.read_text()) == edited and sorted(preprocessed.iterdir()) == there
    assert json.loads(make().read_text()) == edited  # nnU-Net keeps a user's configurations
    for left in ("", json.dumps(edited)[:50], "{}"):
        file.write_text(left)
        if left != "{}":
            with pytest.raises(UserError, match=f"{file.name}: is no JSON .*--replan"):
                make(replan=False)
        assert set(json.loads(make().read_text())["configurations"]) == {"2d", "3d_fullres"}
    assert sorted(preprocessed.iterdir()) == there


@pytest.mark.parametrize(
    ("planner", "plans"),
    [("DiffusionPlanner", "nnUNetDiffusionPlans"), ("DiffusionPlannerL", "nnUNetDiffusionLPlans"),
     ("DiffusionPlannerXL", "nnUNetDiffusionXLPlans"), ("CompactPlanner", "nnUNetCompactPlans"),
     ("nnUNetPlannerResEncM", "nnUNetResEncUNetMPlans"), ("ExperimentPlanner", "nnUNetPlans")],
)  # fmt: skip
def test_the_name_of_the_plans_is_known_before_planning(planner, plans):
    assert default_plans_name(find_planner(planner)) == plans


def test_planners_are_found_by_name():
    assert find_planner("CompactPlanner") is CompactPlanner
    assert find_planner("nnUNetPlannerResEncL") is nnUNetPlannerResEncL
    with pytest.raises(UserError, match="-pl Nobody: .*CompactPlanner, DiffusionPlanner"):
        find_planner("Nobody")
