"""`nnunet_diffusion plan_and_preprocess` from raw scans, end to end, and its refusals."""

import json
import os
import shutil
import sys
from multiprocessing.pool import ThreadPool

import blosc2
import numpy as np
import pytest
import tiny_dataset
from running import run_command

from nnunet_diffusion.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture
def raw(nnunet_folders):
    return tiny_dataset.make(nnunet_folders / "nnUNet_raw", labeled=3, unlabeled=2)


@pytest.fixture
def preprocessed(nnunet_folders):
    return nnunet_folders / "nnUNet_preprocessed" / tiny_dataset.NAME


def run(*arguments: str) -> int:
    return main(["plan_and_preprocess", "-d", "9", "-np", "1", *arguments])


def snapshot(folder) -> dict:
    """Every file below -> its modification time; dataset.json is copied anew, and the lock taken, each time."""
    found = (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    return {path: os.stat(path).st_mtime_ns for path in found if not path.endswith(("dataset.json", ".lock"))}


def test_partial_annotation_is_shown_and_checked(raw, preprocessed, capsys):
    path = raw / "dataset.json"
    content = json.loads(path.read_text())
    names = [name for name in content["labels"] if name != "background"]
    content["annotated_labels"] = {"l0": []}
    path.write_text(json.dumps(content))
    assert run("-c", "2d") == 1
    assert "l0" in capsys.readouterr().err and not (preprocessed / "nnUNetDiffusionPlans_2d").exists()
    content["annotated_labels"] = {"l0": names}
    path.write_text(json.dumps(content))
    assert run("-c", "2d") == 0
    assert "annotated in" in capsys.readouterr().out


def test_first_run_again_and_after_edits(raw, preprocessed, capsys):
    assert run("-c", "2d", "2d_256") == 0
    plans_file = preprocessed / "nnUNetDiffusionPlans.json"
    for configuration in ("2d", "2d_256"):
        data = preprocessed / f"nnUNetDiffusionPlans_{configuration}"
        assert sorted(p.name for p in data.glob("*_seg.b2nd")) == [f"l{i}_seg.b2nd" for i in range(3)]
        assert sorted(p.name for p in (preprocessed / f"{data.name}_unlabeled").glob("*.b2nd")) == [
            "u0.b2nd",
            "u1.b2nd",
        ]
        np.testing.assert_array_equal(
            blosc2.open(str(data / "l0.b2nd"))[:],
            blosc2.open(str(preprocessed / f"{data.name}_unlabeled" / "u0.b2nd"))[:],
        )
    assert blosc2.open(str(preprocessed / "nnUNetDiffusionPlans_2d_256" / "l0.b2nd")).shape == (1, 24, 256, 256)
    assert sorted(p.name for p in (preprocessed / "gt_segmentations").iterdir()) == [f"l{i}.nii.gz" for i in range(3)]

    before, plan = snapshot(preprocessed), plans_file.read_bytes()
    assert run("-c", "2d", "2d_256") == 0  # nothing to do
    assert snapshot(preprocessed) == before

    edited = json.loads(plan)
    edited["nnunet_diffusion"] = {"DenoisingDiffusionTrainer": {"num_epochs": 7}}
    plans_file.write_text(json.dumps(edited))
    capsys.readouterr()
    assert run("-c", "2d") == 0
    assert json.loads(plans_file.read_text()) == edited and "kept\n" in capsys.readouterr().out

    description = json.loads((raw / "dataset.json").read_text())
    image = tiny_dataset.write(raw / "scans" / "u2.nii.gz", tiny_dataset.scan(7)[0], (2.6, 1, 1))
    description["unlabeled"] |= {f"u{i}": {"images": [image]} for i in range(2, 8)}
    (raw / "dataset.json").write_text(json.dumps(description))
    assert run("-c", "2d") == 0
    assert "the data have changed since it was made: --replan" in capsys.readouterr().out
    assert json.loads(plans_file.read_text()) == edited
    assert len(list((preprocessed / "nnUNetDiffusionPlans_2d_unlabeled").glob("*.b2nd"))) == 8
    assert run("-c", "2d", "--replan") == 0
    replanned = json.loads(plans_file.read_text())
    assert replanned["configurations"]["2d"]["spacing"] == [1, 1]  # six of eleven scans
    assert "made with other spacing: done anew" in capsys.readouterr().out


def test_array_jobs_preprocess_the_pool_in_parts(raw, preprocessed):
    assert run("-c", "2d", "--no_pool") == 0
    pool = preprocessed / "nnUNetDiffusionPlans_2d_unlabeled"
    assert not list(pool.glob("*.b2nd"))
    for part, there in (("1", ["u1"]), ("0", ["u0", "u1"])):
        assert run("-c", "2d", "--num_parts", "2", "--part_id", part) == 0
        assert sorted(p.name.removesuffix(".b2nd") for p in pool.glob("*.b2nd")) == there


def test_two_commands_on_the_same_data_set_both_end_well(raw, preprocessed, tmp_path):
    """One is waited for, or named to the other."""
    command = ["nnunet_diffusion", "plan_and_preprocess", "-d", "9", "-np", "1", "-pl", "CompactPlanner", "-c", "2d"]
    command[0] = os.path.join(os.path.dirname(sys.executable), command[0])
    with ThreadPool(2) as both:
        results = list(both.imap(run_command, [command, command]))
    for result in results:
        assert result.returncode == 0 or f"another command works on the folder {preprocessed} (" in result.stderr
    assert 0 in [result.returncode for result in results]
    assert run("-pl", "CompactPlanner", "-c", "2d") == 0
    assert len(list((preprocessed / "nnUNetCompactPlans_2d").glob("*_seg.b2nd"))) == 3


def test_bad_scan_in_the_pool_costs_only_itself(raw, preprocessed, capsys):
    (raw / "scans" / "u1.nii.gz").write_bytes(b"")
    assert run("-c", "2d", "-pl", "CompactPlanner") == 1
    error = capsys.readouterr().err
    assert (
        "skipped u1: " in error and "u1.nii.gz: is an empty file" in error and "1 unlabeled scans were skipped" in error
    )
    assert [p.name for p in (preprocessed / "nnUNetCompactPlans_2d_unlabeled").glob("*.b2nd")] == ["u0.b2nd"]
    assert len(list((preprocessed / "nnUNetCompactPlans_2d").glob("*_seg.b2nd"))) == 3


def test_stock_planner_without_the_pool(preprocessed, raw):
    assert run("-c", "3d_fullres", "-pl", "ExperimentPlanner", "--no_pool") == 0
    assert (preprocessed / "nnUNetPlans.json").is_file()
    assert sorted(p.name for p in preprocessed.iterdir() if p.is_dir()) == [
        ".nnunet_diffusion",
        "gt_segmentations",
        "nnUNetPlans_3d_fullres",
    ]


def test_bad_labeled_cases_are_all_named_and_nothing_is_touched(raw, preprocessed, capsys):
    assert run("-c", "2d", "-pl", "CompactPlanner") == 0
    before = snapshot(preprocessed)
    image, label = tiny_dataset.scan(0)
    tiny_dataset.write(raw / "labels" / "l0.nii.gz", np.where(label, 9, 0).astype(np.uint8), (3, 2, 2))
    tiny_dataset.write(raw / "labels" / "l1.nii.gz", label[1:], (3, 2, 2))
    (raw / "scans" / "l2.nii.gz").unlink()
    capsys.readouterr()
    assert run("-c", "2d", "-pl", "CompactPlanner") == 1
    error = capsys.readouterr().err
    assert "3 of 3 labeled cases cannot be used" in error
    for found in (r"l0: ", "label values [9]", "l1: ", "does not lie on the voxels", "l2: ", "l2.nii.gz"):
        assert found in error
    assert snapshot(preprocessed) == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["-d", "77"], "-d 77: Could not find a dataset"),
        (["-d", "9", "-pl", "Nobody"], "-pl Nobody: no such planner"),
        (["-d", "9", "-pl", "CompactPlanner", "-c", "4d"], "-c 4d: the plan has 2d, 3d_fullres"),
    ],
)
def test_wrong_arguments(raw, capsys, arguments, message):
    assert main(["plan_and_preprocess", "-np", "1", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_unset_folders_and_broken_plans(raw, preprocessed, capsys, monkeypatch):
    assert run("-c", "2d", "-pl", "CompactPlanner") == 0
    (preprocessed / "nnUNetCompactPlans.json").write_text("{")
    assert run("-c", "2d", "-pl", "CompactPlanner") == 1
    assert "nnUNetCompactPlans.json: is no JSON" in capsys.readouterr().err
    assert run("-c", "2d", "-pl", "CompactPlanner", "--replan") == 0  # as that message says
    capsys.readouterr()
    monkeypatch.delenv("nnUNet_preprocessed")
    assert run() == 1
    assert "nnUNet_preprocessed" in capsys.readouterr().err


def test_label_without_image_in_nnunets_folders(nnunet_folders, raw, capsys):
    description = json.loads((raw / "dataset.json").read_text())
    for case, files in description.pop("dataset").items():
        for target, source in (
            (f"imagesTr/{case}_0000.nii.gz", files["images"][0]),
            (f"labelsTr/{case}.nii.gz", files["label"]),
        ):
            (raw / target).parent.mkdir(exist_ok=True)
            shutil.copy(source, raw / target)
    (raw / "imagesTr" / "l1_0000.nii.gz").unlink()
    (raw / "dataset.json").write_text(json.dumps(description))
    assert run() == 1
    assert "labelsTr: ['l1'] have no image in imagesTr" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["plan_and_preprocess", "--help"])
    assert "nnunet_diffusion plan_and_preprocess -d 22" in capsys.readouterr().out
