"""Published sets by name, on folders laid out and named as they are published; then all joined."""

import importlib
import inspect
import runpy
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from raw_files import as_nnunet_reads

from nnunet_diffusion.cli import build_parser, main
from nnunet_diffusion.cli.convert import SCRIPTS
from nnunet_diffusion.dataset_conversion.Dataset007_Pancreas import convert_pancreas
from nnunet_diffusion.dataset_conversion.Dataset009_Spleen import convert_spleen
from nnunet_diffusion.dataset_conversion.Dataset017_BTCV import convert_btcv
from nnunet_diffusion.dataset_conversion.Dataset022_FLARE22 import convert_flare22
from nnunet_diffusion.dataset_conversion.Dataset029_LiTS import convert_lits
from nnunet_diffusion.dataset_conversion.Dataset040_KiTS import convert_kits
from nnunet_diffusion.dataset_conversion.Dataset218_AMOS22 import convert_amos22
from nnunet_diffusion.errors import UserError

SIZE = (8, 8, 8)
RAS, LAS = np.diag([1.0, 1.0, 2.0, 1.0]), np.diag([-1.0, 1.0, 2.0, 1.0])


def scan(path: Path, affine=RAS) -> None:
    seed = sum(map(ord, str(path)))
    nifti(path, np.random.default_rng(seed).normal(0, 100, SIZE).astype(np.float32), affine)


def label(path: Path, highest: int, affine=RAS) -> None:
    nifti(path, np.resize(np.arange(highest + 1, dtype=np.uint8), SIZE), affine)


def nifti(path: Path, array: np.ndarray, affine: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def junk(folder: Path, *names: str) -> None:
    """What archives made on a Mac hold beside each file."""
    for name in names:
        (folder / f"._{name}").write_bytes(b"macOS")


def decathlon(folder: Path, prefix: str, cases: tuple[str, ...], highest: int) -> Path:
    for case in cases:
        scan(folder / "imagesTr" / f"{prefix}_{case}.nii.gz")
        label(folder / "labelsTr" / f"{prefix}_{case}.nii.gz", highest)
    scan(folder / "imagesTs" / f"{prefix}_900.nii.gz")
    junk(folder / "imagesTr", f"{prefix}_{cases[0]}.nii.gz")
    junk(folder / "labelsTr", f"{prefix}_{cases[0]}.nii.gz")
    (folder / "dataset.json").write_text("{}")
    return folder


def lits(folder: Path) -> Path:
    for batch, case in (("Training Batch 1", 0), ("Training Batch 2", 130)):
        scan(folder / batch / f"volume-{case}.nii")
        label(folder / batch / f"segmentation-{case}.nii", 2, LAS)  # another header, the same voxels
    scan(folder / "LITS-Challenge-Test-Data" / "test-volume-0.nii")
    return folder


def kits(folder: Path, label_name: str, highest: int, cases=("case_00000", "case_00209")) -> Path:
    for case in cases:
        scan(folder / case / "imaging.nii.gz")
        label(folder / case / f"{label_name}.nii.gz", highest)
    (folder / "kits.json").write_text("[]")
    return folder


def btcv(folder: Path) -> Path:
    for case in ("0001", "0040"):
        scan(folder / "RawData" / "Training" / "img" / f"img{case}.nii.gz")
        label(folder / "RawData" / "Training" / "label" / f"label{case}.nii.gz", 13)
    scan(folder / "RawData" / "Testing" / "img" / "img0061.nii.gz")
    return folder


def amos22(folder: Path) -> Path:
    for part, case in (("Tr", "0001"), ("Va", "0008"), ("Tr", "0507"), ("Va", "0600")):  # CT, CT, MRI, MRI
        scan(folder / f"images{part}" / f"amos_{case}.nii.gz")
        label(folder / f"labels{part}" / f"amos_{case}.nii.gz", 15)
    scan(folder / "imagesTs" / "amos_0002.nii.gz")
    return folder


def flare22(folder: Path) -> Path:
    training = folder / "Training" / "FLARE22_LabeledCase50"
    scan(training / "images" / "FLARE22_Tr_0001_0000.nii.gz")
    label(training / "labels" / "FLARE22_Tr_0001.nii.gz", 13)
    scan(folder / "Training" / "FLARE22_UnlabeledCase1-1000" / "Case_00001_0000.nii.gz")
    return folder


@pytest.fixture
def raw(nnunet_folders):
    return nnunet_folders / "nnUNet_raw"


@pytest.mark.parametrize(
    ("make", "name", "folder", "cases", "labels", "ending", "left"),
    [
        (
            lambda f: decathlon(f / "Task03_Liver", "liver", ("0", "130"), 2),
            "liver",
            "Dataset003_Liver",
            ["liver_0", "liver_130"],
            {"liver": 1, "cancer": 2},
            ".nii.gz",
            1,
        ),
        (
            lambda f: decathlon(f / "Task07_Pancreas", "pancreas", ("001", "421"), 2),
            "pancreas",
            "Dataset007_Pancreas",
            ["pancreas_001", "pancreas_421"],
            {"pancreas": 1, "cancer": 2},
            ".nii.gz",
            1,
        ),
        (
            lambda f: decathlon(f / "Task09_Spleen", "spleen", ("2", "63"), 1),
            "spleen",
            "Dataset009_Spleen",
            ["spleen_2", "spleen_63"],
            {"spleen": 1},
            ".nii.gz",
            1,
        ),
        (lits, "lits", "Dataset029_LiTS", ["0", "130"], {"liver": 1, "tumor": 2}, ".nii", 1),
        (
            btcv,
            "btcv",
            "Dataset017_BTCV",
            ["0001", "0040"],
            {"aorta": 8, "left adrenal gland": 13},
            ".nii.gz",
            1,
        ),
        (
            amos22,
            "amos22",
            "Dataset218_AMOS22",
            ["amos_0001", "amos_0008"],
            {"spleen": 1, "prostate/uterus": 15},
            ".nii.gz",
            3,
        ),
    ],
    ids=["Liver", "Pancreas", "Spleen", "LiTS", "BTCV", "AMOS22"],
)
def test_published_layout(tmp_path, raw, capsys, make, name, folder, cases, labels, ending, left):
    source = make(tmp_path / "source")
    before = {path: path.read_bytes() for path in source.rglob("*.nii*")}
    assert main(["convert", name, str(source)]) == 0
    content, labeled, unlabeled = as_nnunet_reads(raw / folder)
    assert sorted(labeled) == cases and unlabeled == {}
    assert labels.items() <= content["labels"].items() and max(content["labels"].values()) == max(labels.values())
    assert content["file_ending"] == ending and content["channel_names"] == {"0": "CT"}
    assert capsys.readouterr().out.endswith(f"\nleft {left} scan(s) that are not for this training where they are\n")
    assert {path: path.read_bytes() for path in source.rglob("*.nii*")} == before


@pytest.mark.parametrize(
    ("year", "label_name", "highest"), [(19, "segmentation", 2), (21, "aggregated_MAJ_seg", 3), (23, "segmentation", 3)]
)
@pytest.mark.parametrize("is_whole", [True, False])
def test_kits_of_three_years(tmp_path, raw, capsys, year, label_name, highest, is_whole):
    """The files of a whole set tell its year."""
    cases = ["case_00000", "case_00209", *["case_00588"] * (is_whole and year == 23)]
    source = kits(tmp_path / "data", label_name, highest, cases)
    if is_whole and year == 19:
        scan(source / "case_00210" / "imaging.nii.gz")  # a test scan
    if not is_whole and year != 21:
        assert main(["convert", "kits", str(tmp_path), "-d", "41"]) == 1
        assert f"{tmp_path}: its files do not tell which KiTS they are of: give --year 19" in capsys.readouterr().err
    assert main(["convert", "kits", str(tmp_path), "-d", "41", *([] if is_whole else ["--year", str(year)])]) == 0
    content, labeled, _ = as_nnunet_reads(raw / "Dataset041_KiTS")
    assert list(labeled) == cases
    assert list(content["labels"]) == ["background", "kidney", "tumor", "cyst"][: highest + 1]
    assert ("left 1 scan(s)" in capsys.readouterr().out) == (is_whole and year == 19)


def test_lits_labels_get_their_volumes_headers(tmp_path, raw):
    source = lits(tmp_path)
    convert_lits(str(source))
    _, labeled, _ = as_nnunet_reads(raw / "Dataset029_LiTS")
    image, new = nibabel.load(labeled["0"]["images"][0]), nibabel.load(labeled["0"]["label"])
    old = nibabel.load(source / "Training Batch 1" / "segmentation-0.nii")
    assert np.array_equal(new.affine, image.affine) and not np.array_equal(old.affine, image.affine)
    assert np.array_equal(new.dataobj, old.dataobj)


def test_what_is_not_whole_is_refused(tmp_path, raw):
    source = btcv(tmp_path / "btcv")
    training = source / "RawData" / "Training"
    (training / "label" / "label0001.nii.gz").unlink()
    (training / "img" / "img0040.nii.gz").unlink()
    with pytest.raises(UserError, match="img0001.nii.gz has no label.*\n.*0040: .*label0040.nii.gz has no image"):
        convert_btcv(str(source))
    scan(source / "again" / "img0001.nii.gz")
    with pytest.raises(UserError, match="0001: is there twice, as .*img0001.nii.gz and .*img0001.nii.gz"):
        convert_btcv(str(source))
    with pytest.raises(UserError, match="has no case in or below it, an image such as imagesTr/CASE.nii.gz with"):
        convert_spleen(str(source))
    with pytest.raises(UserError, match="nowhere: cannot be listed"):
        convert_spleen(str(source / "nowhere"))
    with pytest.raises(UserError, match=r"year 20: KiTS was published in \[19, 21, 23\]"):
        convert_kits(str(source), 20)
    assert list(raw.iterdir()) == []


def test_wrong_year_or_values_are_refused(tmp_path, raw):
    source = kits(tmp_path, "segmentation", 3)
    with pytest.raises(UserError, match=r"label values \[3\] are not among the declared \[0, 1, 2\]"):
        convert_kits(str(source), 19)
    with pytest.raises(UserError, match="case_00000/imaging.nii.gz has no label"):
        convert_kits(str(source), 21)
    assert list(raw.iterdir()) == []


def run_script(monkeypatch, name: str, *arguments: str) -> int:
    """Runs it as `python -m nnunet_diffusion.dataset_conversion.NAME` does; returns the exit code."""
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    monkeypatch.delitem(sys.modules, f"nnunet_diffusion.dataset_conversion.{name}", raising=False)  # else it warns
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"nnunet_diffusion.dataset_conversion.{name}", run_name="__main__")
    return ended.value.code


def test_scripts_have_a_command_line(tmp_path, raw, monkeypatch, capsys):
    source = kits(tmp_path, "segmentation", 2)
    assert run_script(monkeypatch, "Dataset040_KiTS", str(source), "--year", "19", "-d", "64", "--copy") == 0
    assert "Dataset064_KiTS: 2 labeled" in capsys.readouterr().out
    assert (raw / "Dataset064_KiTS" / "imagesTr" / "case_00000_0000.nii.gz").is_file()
    assert run_script(monkeypatch, "Dataset017_BTCV", str(tmp_path / "nowhere")) == 1
    assert "error: " in (error := capsys.readouterr().err) and "nowhere: cannot be listed" in error


def test_scripts_and_names_have_the_same_defaults():
    assert len(SCRIPTS) == 8
    for name, path in SCRIPTS.items():
        script = importlib.import_module(f"nnunet_diffusion.dataset_conversion.{path.stem}")
        defaults = inspect.signature(getattr(script, f"convert_{name}")).parameters
        by_name = build_parser().parse_args(["convert", name, "folder"])
        assert by_name.dataset_id == defaults["dataset_id"].default
        assert by_name.name == defaults["name"].default
        assert f"Dataset{by_name.dataset_id:03d}_{by_name.name}" == path.stem


def test_help_lists_every_way_with_an_example(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "--help"])
    examples = capsys.readouterr().out.split("examples:")[1]
    assert all(f"nnunet_diffusion convert {way} " in examples for way in (*SCRIPTS, "folder", "partial"))


def test_abdomen_joins_them_all(tmp_path, raw, capsys):
    convert_flare22(str(flare22(tmp_path / "flare")))
    convert_amos22(str(amos22(tmp_path / "amos")))
    convert_btcv(str(btcv(tmp_path / "btcv")))
    convert_kits(str(kits(tmp_path / "kits", "segmentation", 3)), 23)
    convert_lits(str(lits(tmp_path / "lits")))
    convert_pancreas(str(decathlon(tmp_path / "pancreas", "pancreas", ("001",), 2)))
    assert main(["convert", "partial", "abdomen", "-d", "600", "-n", "Abdomen"]) == 1
    assert "'Dataset009_Spleen' is no nnU-Net data set" in capsys.readouterr().err
    convert_spleen(str(decathlon(tmp_path / "spleen", "spleen", ("2",), 1)))
    assert main(["convert", "partial", "abdomen", "-d", "600", "-n", "Abdomen"]) == 0
    content, labeled, unlabeled = as_nnunet_reads(raw / "Dataset600_Abdomen")
    assert len(labeled) == 11 and list(unlabeled) == ["FLARE22_Case_00001"]
    assert content["file_ending"] == ".nii.gz"  # LiTS is .nii
    assert content["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    assert content["annotated_labels"]["LiTS_130"] == ["liver"]
    assert content["annotated_labels"]["KiTS_case_00000"] == []
    assert "duodenum" not in content["annotated_labels"]["BTCV_0001"]
    assert not {"FLARE22_FLARE22_Tr_0001", "AMOS22_amos_0001"} & content["annotated_labels"].keys()
    assert content["union_labels"] == {f"KiTS_case_{n}": [["right kidney", "left kidney"]] for n in ("00000", "00209")}
    assert np.unique(nibabel.load(labeled["KiTS_case_00000"]["label"]).dataobj).tolist() == [0, 2]
    assert np.unique(nibabel.load(labeled["LiTS_0"]["label"]).dataobj).tolist() == [0, 1]
    assert "WARNING" not in capsys.readouterr().err
