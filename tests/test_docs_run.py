"""The commands of the documentation run as they stand there, page after page, on small made-up scans.

What differs from a reader's machine: trainings are short (settings in the plan, as a user sets them), networks narrow,
gates open, as nothing is certain after so short a training, and nnU-Net's commands are told `-device cpu`.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from running import PYTHON, run_command
from skimage.io import imsave
from test_convert_public_sets import kits
from test_docs import ROOT, commands

from nnunet_diffusion.dataset_conversion.Dataset022_FLARE22 import ORGANS

pytestmark = pytest.mark.slow
NOT_HERE = {
    "make ": "sets up an environment of its own",
    "pip install": "the tests run in what it installs",
    "nnunet_diffusion demo": "test_demo.py",
    "torchrun --nnodes 2": "needs two machines; test_train.py has one",
    "nnunet_diffusion rounds ...": "test_rounds.py",
}
FEW = "--num_epochs 1 --num_iterations_per_epoch 1 --device cpu"
SMALLER = {
    "-n 5000": "-n 12",
    "-np 8": "-np 2",
    "--test_cases 20": "--test_cases 2",
    "--source ~/FLARE22 -d 23": f"--source ~/FLARE22 -d 23 -c 2d -pl CompactPlanner --arms full --budgets 4slices 10% "
    f"--seeds 0 --pretraining_epochs 1 --pretraining_iterations 1 {FEW} -o flare22",
    "--budgets 2 8 --seeds 0 1 2": f"--budgets 2 --seeds 0 {FEW}",
    "--budgets 4 8 --seeds 0 1 2": f"--budgets 2 --seeds 0 {FEW}",
}
PLANNED = "nnUNetDiffusionPlans"

NNUNET = '#!/bin/sh\nexec "$COMMANDS/{name}" "$@" -device cpu\n'
OURS = """#!/bin/sh
case "$1" in rounds|mutual) COMMANDS=$WARM; set -- "$@" -device cpu --gate is_open=true;; esac
"$COMMANDS/{name}" "$@" || exit
if [ "$1" = plan_and_preprocess ]; then exec "{python}" "{shorten}"; fi
"""
SHORTEN = """
import glob, json, os
settings = {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1}
for path in glob.glob(os.path.join(os.environ["nnUNet_preprocessed"], "*", "nnUNet*Plans.json")):
    with open(path) as stream:
        plans = json.load(stream)
    block = plans.setdefault("nnunet_diffusion", {})
    for trainer in TRAINERS:
        block[trainer] = {**block.get(trainer, {}), **settings}
    for configuration in plans["configurations"].values():
        if "architecture" in configuration:
            kwargs = configuration["architecture"]["arch_kwargs"]
            kwargs["features_per_stage"] = [4] * len(kwargs["features_per_stage"])
    with open(path, "w") as stream:
        json.dump(plans, stream)
"""


def write_scans(images: Path, prefix: str, numbers, organs: int, labels: Path | None = None) -> None:
    """Noisy scans of 24 x 32 x 32 voxels of 3 mm, with a box for each organ."""
    for number in numbers:
        rng = np.random.default_rng(number)
        seg = np.zeros((24, 32, 32), np.uint8)
        for organ in range(organs):
            z, y, x = 8 + rng.integers(-1, 2), 1 + 8 * (organ // 4), 1 + 8 * (organ % 4)
            seg[z : z + 7, y : y + 6, x : x + 6] = organ + 1
        image = rng.normal(0, 20, seg.shape) + 20 * seg
        save(image.astype(np.int16), images / f"{prefix}_{number:04d}_0000.nii.gz")
        if labels:
            save(seg, labels / f"{prefix}_{number:04d}.nii.gz")


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((3.0, 3.0, 3.0))
    sitk.WriteImage(image, str(path))


@pytest.fixture(scope="module")
def flare22(tmp_path_factory):
    """The home folder of the pages on FLARE22."""
    return make_home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def openkbp(tmp_path_factory):
    """The home folder of the other pages; with two of them, two processes have something to do."""
    return make_home(tmp_path_factory.mktemp("home"))


def make_home(root: Path) -> Path:
    """Gives a home folder FLARE22, and commands that are short and stay on the CPU; returns it."""
    training = root / "FLARE22" / "Training"
    labeled = training / "FLARE22_LabeledCase50"
    write_scans(labeled / "images", "FLARE22_Tr", range(1, 7), 13, labeled / "labels")
    write_scans(training / "FLARE22_UnlabeledCase1-1000", "Case", range(1, 4), 13)
    bin_folder, shorten = root / "bin", root / "shorten.py"
    bin_folder.mkdir()
    trainers = [p.stem for p in (ROOT / "trainers").glob("*Trainer.py")]
    shorten.write_text(f"TRAINERS = {trainers}\n{SHORTEN}")
    for name in ("nnUNetv2_train", "nnUNetv2_predict", "nnunet_diffusion"):
        text = OURS if name == "nnunet_diffusion" else NNUNET
        script = bin_folder / name
        script.write_text(text.format(name=name, python=PYTHON, shorten=shorten))
        script.chmod(0o755)
    return root


def run(home: Path, folder: Path, lines: list[str], python: str = "") -> None:
    """Runs lines in one shell, by default warm; the test fails with the line that failed and what it said."""
    place = Path(python or sys.executable).parent
    environment = {key: value for key, value in os.environ.items() if not key.startswith("nnUNet_") or "_n_" in key}
    environment |= {"HOME": str(home), "PATH": f"{home / 'bin'}:{place}:{Path(PYTHON).parent}:{os.environ['PATH']}"}
    environment |= {"COMMANDS": str(place), "WARM": str(Path(sys.executable).parent), "nnUNet_compile": "f"}
    script = ["set -euxo pipefail", 'eval "$(nnunet_diffusion env --root ~/nnunet)"', *lines]
    result = run_command(["bash", "-c", "\n".join(script)], cwd=folder, env=environment)
    assert result.returncode == 0, f"{result.stdout[-3000:]}\n{result.stderr[-4000:]}"


def run_page(home: Path, name: str, python: str = "") -> Path:
    """Runs the page's commands in a folder of its own, which may have been prepared; returns the folder."""
    folder = home / Path(name).stem
    folder.mkdir(exist_ok=True)
    page = ROOT / name
    lines = [line for line in commands(page) if not line.startswith(tuple(NOT_HERE))]
    assert lines
    for large, small in SMALLER.items():
        lines = [line.replace(large, small) for line in lines]
    run(home, folder, lines, python)
    return folder


def model(home: Path, trainer: str, plans: str = PLANNED, configuration: str = "3d_fullres", data: str = "") -> Path:
    return home / "nnunet" / "nnUNet_results" / (data or "Dataset022_FLARE22") / f"{trainer}__{plans}__{configuration}"


@pytest.mark.xdist_group("flare22")
def test_tutorial(flare22):
    folder = flare22 / "tutorial"
    write_scans(folder / "scans", "FLARE22_Ts", range(1, 3), 13, folder / "labelsTs")
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    run_page(flare22, "docs/tutorial.md")
    comparison = (folder / "flare22" / "flare22.md").read_text()
    assert "| ours, full |" in comparison and "0.518" in comparison and "is not FLARE22" not in comparison
    assert "Pre-training: 1 steps of " in comparison
    assert {p.name for p in (folder / "masks").glob("*.nii.gz")} == {"FLARE22_Ts_0001.nii.gz", "FLARE22_Ts_0002.nii.gz"}
    table = json.loads((folder / "masks" / "evaluation_flare22.json").read_text())
    assert set(ORGANS) <= set(table["organs"])
    assert (flare22 / "nnunet/nnUNet_results/Dataset022_FLARE22/report.html").exists()


@pytest.mark.xdist_group("flare22")
def test_sharing(flare22):
    folder = flare22 / "sharing"
    write_scans(folder / "kbp" / "imagesTr", "kbp", range(1, 4), 2, folder / "kbp" / "labelsTr")
    write_scans(folder / "flare_example" / "imagesTs", "FLARE22_Ts", range(1, 4), 13, folder / "flare_example/labelsTs")
    train = "nnUNetv2_train 501 2d all -tr DenoisingDiffusionTrainer -p nnUNetCompactPlans"
    run(flare22, folder, ["nnunet_diffusion convert folder kbp/imagesTr kbp/labelsTr -d 501 -n OpenKBP --labels a b",
                          "nnunet_diffusion plan_and_preprocess -d 501 -pl CompactPlanner -c 2d", train])  # fmt: skip
    run_page(flare22, "docs/sharing.md")
    trained = model(
        flare22, "DiffusionPretrainedTrainer", "nnUNetCompactPlansLikeOpenKBP_2d", "2d", "Dataset502_FlareExample"
    )
    report = json.loads((trained / "fold_all" / "transfer_report.json").read_text())
    assert report["source"] == str(folder / "openkbp_denoiser" / "denoiser.pth")
    assert report["matched"] and not report["adapted"] and not report["warnings"]
    assert len(list((folder / "masks").glob("*.nii.gz"))) == 3 and (flare22 / "model.zip").exists()


@pytest.mark.xdist_group("flare22")
def test_evaluation(flare22):
    folder = flare22 / "evaluation"
    folder.mkdir()
    for source, target in (("masks", "segmentations"), ("labelsTs", "labelsTs")):
        shutil.copytree(flare22 / "tutorial" / source, folder / target)
    shutil.copy(flare22 / "nnunet/nnUNet_raw/Dataset022_FLARE22/dataset.json", folder)
    run_page(flare22, "docs/evaluation.md")
    assert (folder / "segmentations" / "evaluation_flare22.csv").exists()


@pytest.mark.xdist_group("flare22")
def test_report(flare22):
    run_page(flare22, "docs/report.md")


@pytest.mark.xdist_group("flare22")
def test_samples(flare22):
    folder = flare22 / "samples"
    folder.mkdir()
    run(flare22, folder, ["nnunet_diffusion plan_and_preprocess -d 22 -c 2d",
                       f"nnUNetv2_train 22 2d all -tr DenoisingDiffusionTrainer -p {PLANNED}"])  # fmt: skip
    shutil.copy(model(flare22, "DenoisingDiffusionTrainer", configuration="2d") / "fold_all" / "denoiser.pth", folder)
    run_page(flare22, "docs/samples.md")
    assert (folder / "samples" / "quality_encoder.json").exists()


@pytest.mark.xdist_group("flare22")
def test_rounds(flare22):
    folder = flare22 / "rounds"
    write_scans(folder / "new_scans", "FLARE22_Ts", range(1, 3), 13)
    run_page(flare22, "docs/rounds.md")
    assert len(list((folder / "masks").glob("*.nii.gz"))) == 2


@pytest.mark.xdist_group("openkbp")
def test_readme(openkbp):
    folder = openkbp / "README"
    write_scans(folder / "imagesTr", "kbp", range(1, 7), 5, folder / "labelsTr")
    write_scans(folder / "imagesUn", "kbp", range(7, 10), 5)
    write_scans(folder / "new_scans", "kbp", range(10, 12), 5, folder / "labelsTs")
    write_scans(folder / "flare22" / "images", "FLARE22_Tr", range(1, 3), 13, folder / "flare22" / "labels")
    (folder / "kits23").mkdir()
    kits(folder / "kits23" / "dataset", "segmentation", 3)
    run_page(openkbp, "README.md")
    assert (folder / "masks" / "evaluation_nnunet.csv").exists()
    exported = model(openkbp, "nnUNetTrainer", "nnUNetCompactPlans", "2d", "Dataset501_OpenKBP")
    assert (exported / "fold_0" / "checkpoint_final.pth").exists()


@pytest.mark.xdist_group("openkbp")
def test_label_efficiency(openkbp):
    folder = openkbp / "label_efficiency"
    folder.mkdir()
    # The page begins before any training on another split.
    (openkbp / "nnunet/nnUNet_preprocessed/Dataset501_OpenKBP/splits_final.json").unlink(missing_ok=True)
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    run_page(openkbp, "docs/label_efficiency.md")
    few = next(openkbp.glob("nnunet/nnUNet_results/Dataset501_OpenKBP/*/label_efficiency.json"))
    assert {group["arm"] for group in json.loads(few.read_text())["summary"]} > {"stock", "scratch", "full", "linear"}


@pytest.mark.xdist_group("flare22")
def test_extending(flare22):
    folder = flare22 / "extending"
    write_scans(folder / "scans", "FLARE22_Ts", range(1, 2), 13)
    for number in range(1, 8):
        is_test = number == 7
        case = folder / "pelvis_download" / ("test" if is_test else "scans") / f"{number:03d}"
        write_scans(case, "ct", [number], 3, None if is_test else case)
        (case / f"ct_{number:04d}_0000.nii.gz").rename(case / "ct.nii.gz")
        if not is_test:
            (case / f"ct_{number:04d}.nii.gz").rename(case / "organs.nii.gz")
    named = r"This\s+is\s+`([\w/]+\.py)`(?:(?!```).)*```python\n(.*?)^```$"
    files = dict(re.findall(named, (ROOT / "docs/extending.md").read_text(), re.M | re.S))
    assert set(files) == {"my_trainers/FocalTrainer.py", "test_focal.py", "Dataset301_Pelvis.py"}
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    path = flare22 / "nnunet/nnUNet_preprocessed/Dataset022_FLARE22" / f"{PLANNED}.json"
    before = path.read_text()
    plans = json.loads(before)
    plans["nnunet_diffusion"]["FocalTrainer"] = {**plans["nnunet_diffusion"]["PartialLabelTrainer"], "focal_gamma": 1.0}
    path.write_text(json.dumps(plans))
    run_page(flare22, "docs/extending.md")
    path.write_text(before)  # other pages' shells do not know that trainer
    assert (folder / "masks" / "FLARE22_Ts_0001.nii.gz").exists()
    saved = json.loads((model(flare22, "FocalTrainer") / "plans.json").read_text())
    assert saved["nnunet_diffusion"]["FocalTrainer"]["focal_gamma"] == 1.0


@pytest.mark.xdist_group("openkbp")
def test_partial_labels(openkbp):
    folder = openkbp / "partial_labels"
    write_scans(folder / "images", "kbp", range(1, 7), 7, folder / "labelsAll7")
    organs = "Brainstem SpinalCord RightParotid LeftParotid Mandible Larynx Esophagus".split()
    erase(folder / "labelsAll7" / "kbp_0001.nii.gz", [1, 2])
    (folder / "contoured.json").write_text(json.dumps({"kbp_0001": organs[:2]}))
    run_page(openkbp, "docs/partial_labels.md")
    trained = model(openkbp, "PartialLabelTrainer", "nnUNetCompactPlans", "2d", "Dataset507_OpenKBP7")
    assert (trained / "fold_0").is_dir()


@pytest.mark.xdist_group("openkbp")
def test_mean_teacher(openkbp):
    write_scans(openkbp / "mean_teacher" / "scans", "kbp", range(10, 12), 5)
    folder = run_page(openkbp, "docs/mean_teacher.md", PYTHON)  # processes of their own, as a user's
    assert len(list((folder / "masks").glob("*.nii.gz"))) == 2


def erase(path: Path, kept: list[int]) -> None:
    """Leaves only some labels in a label map."""
    seg = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    save(np.where(np.isin(seg, kept), seg, 0).astype(np.uint8), path)


@pytest.mark.xdist_group("openkbp")
def test_co_training(openkbp):
    folder = openkbp / "co_training"
    write_scans(folder / "scans", "kbp", range(10, 12), 5)
    for name, cases in (("images", range(4)), ("labels", range(4)), ("more", range(4, 6))):
        (folder / name).mkdir()
        for case in cases:
            picture = np.random.default_rng(case).integers(0, 255, (32, 32, 3), np.uint8)
            if name == "labels":
                picture = (picture[..., 0] > 200).astype(np.uint8)
            imsave(folder / name / f"{case}.png", picture, check_contrast=False)
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    run_page(openkbp, "docs/co_training.md")  # on the split of label_efficiency.md
    assert len(list((folder / "masks").glob("*.nii.gz"))) == 2


@pytest.mark.xdist_group("openkbp")
def test_mutual_learning(openkbp):
    folder = openkbp / "mutual_learning"
    write_scans(folder / "images", "kbp", range(1, 9), 4, folder / "labels")
    groups = [["a", "b"], ["c", "d"]]
    annotated = {f"kbp_{case:04d}": groups[case % 2] for case in range(1, 9)}
    for case, names in annotated.items():
        erase(folder / "labels" / f"{case}.nii.gz", ["abcd".index(name) + 1 for name in names])
    (folder / "groups.json").write_text(json.dumps(annotated))
    convert = "nnunet_diffusion convert folder images labels -d 601 -n Groups --labels a b c d --annotated groups.json"
    run(openkbp, folder, [convert, "nnunet_diffusion plan_and_preprocess -d 601 -c 3d_fullres"])
    run_page(openkbp, "docs/mutual_learning.md")
