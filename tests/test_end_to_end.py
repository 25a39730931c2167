"""The commands, from raw scans to masks, as a user runs them."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tiny
from running import run_command

pytestmark = pytest.mark.slow
TRAINERS = Path(__file__).parent.parent / "trainers"


def run(*command, code=0, **environment):
    """Runs a command of this installation; an entry None of the environment is unset."""
    env = {**os.environ, "nnUNet_extTrainer": str(TRAINERS), **environment}
    env = {key: value for key, value in env.items() if value is not None}
    arguments = [str(Path(sys.executable).with_name(command[0])), *map(str, command[1:])]
    result = run_command(arguments, env=env)
    assert result.returncode == code, f"{' '.join(arguments)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
    return result


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """nnU-Net's folders, with the tiny data set in them, and three new scans."""
    root = tmp_path_factory.mktemp("end_to_end")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (root / name).mkdir()
            patch.setenv(name, str(root / name))
        tiny.write_scans(root / "labeled", 5, labels=root / "labels")
        tiny.write_scans(root / "pool", 3, first=100)
        tiny.write_scans(root / "new_scans", 2, first=200)
        yield root


def masks(folder):
    return {p.name: sitk.GetArrayFromImage(sitk.ReadImage(str(p))) for p in sorted(folder.glob("*.nii.gz"))}


def test_from_scans_to_masks_that_plain_nnunet_repeats(folders):
    labels = ["left ball", "right ball", "box"]
    run(
        "nnunet_diffusion", "convert", "folder", folders / "labeled", folders / "labels", "--unlabeled",
        folders / "pool", "-d", tiny.ID, "-n", "Tiny", "--labels", *labels,
    )  # fmt: skip
    assert not (folders / "nnUNet_raw" / tiny.NAME / "imagesTr").exists(), "scans are referenced, not copied"
    run("nnunet_diffusion", "plan_and_preprocess", "-d", tiny.ID, "-pl", "CompactPlanner", "-c", "2d", "-np", "2")
    plans = json.loads((folders / "nnUNet_preprocessed" / tiny.NAME / "nnUNetCompactPlans.json").read_text())
    tiny.write_plans(tiny.shrunk(plans, "ResidualEncoderUNet", "InstanceNorm"))

    common = ("-p", tiny.PLANS, "-device", "cpu")
    run("nnUNetv2_train", tiny.ID, "2d", "all", "-tr", "DenoisingDiffusionTrainer", *common)
    results = folders / "nnUNet_results" / tiny.NAME
    denoiser = results / f"DenoisingDiffusionTrainer__{tiny.PLANS}__2d" / "fold_all" / "denoiser.pth"
    for part in ("", "Decoder", "Linear"):
        run("nnUNetv2_train", tiny.ID, "2d", "all", "-tr", f"DiffusionPretrained{part}Trainer", *common)
    # stock nnU-Net's own trainer starts from the same file
    given = ("-pretrained_weights", denoiser)
    run("nnUNetv2_train", tiny.ID, "2d", "0", "-tr", "nnUNetTrainer_1epoch", *common, *given, code=0)
    denoiser.unlink()

    scans, predict = folders / "new_scans", ("-d", tiny.ID, "-c", "2d", "-f", "all", "-p", tiny.PLANS, "-device", "cpu")
    for part in ("", "Decoder", "Linear"):
        trainer = f"DiffusionPretrained{part}Trainer"
        ours, plain = folders / f"masks_{trainer}", folders / f"plain_{trainer}"
        run("nnUNetv2_predict", "-i", scans, "-o", ours, "-tr", trainer, *predict)
        assert set(masks(ours)) == {"tiny_200.nii.gz", "tiny_201.nii.gz"}
        where = ("-d", tiny.ID, "-c", "2d", "-p", tiny.PLANS)
        if part == "Linear":
            refused = run("nnunet_diffusion", "export", "--stock", *where, "-tr", trainer, "-f", "all", code=1)
            assert trainer in refused.stderr
            continue
        run("nnunet_diffusion", "export", "--stock", *where, "-tr", trainer, "-f", "all")
        run("nnUNetv2_predict", "-i", scans, "-o", plain, "-tr", "nnUNetTrainer", *predict, nnUNet_extTrainer=None)
        for name, mask in masks(ours).items():
            np.testing.assert_array_equal(masks(plain)[name], mask)
        shutil.rmtree(results / f"nnUNetTrainer__{tiny.PLANS}__2d")


def test_a_bad_scan_in_the_pool_is_named_and_the_rest_goes_on(folders):
    bad = folders / "pool2"
    tiny.write_scans(bad, 2, first=300)
    whole = (bad / "tiny_300_0000.nii.gz").read_bytes()
    (bad / "tiny_300_0000.nii.gz").write_bytes(whole[: len(whole) // 2])
    arguments = ("folder", folders / "labeled", folders / "labels", "-d", 991, "-n", "Bad", "--labels", "a", "b", "c")
    run("nnunet_diffusion", "convert", *arguments, "--unlabeled", bad)
    result = run("nnunet_diffusion", "plan_and_preprocess", "-d", 991, "-pl", "CompactPlanner", "-c", "2d", code=1)
    assert "tiny_300" in result.stderr + result.stdout
    pool = folders / "nnUNet_preprocessed" / "Dataset991_Bad" / "nnUNetCompactPlans_2d_unlabeled"
    assert sorted(p.name for p in pool.glob("*.b2nd")) == ["tiny_301.b2nd"]


def test_unset_folders_are_named(folders):
    for variable in ("nnUNet_raw", "nnUNet_preprocessed"):
        result = run("nnunet_diffusion", "plan_and_preprocess", "-d", tiny.ID, code=1, **{variable: None})
        assert variable in result.stderr and "Traceback" not in result.stderr
