"""`nnunet_diffusion convert partial`: several data sets become one; what contradicts itself is refused."""

import gzip
import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from raw_files import as_nnunet_reads, cut, label, refused, scan, write

from nnunet_diffusion import dataset_conversion
from nnunet_diffusion.cli import main
from nnunet_diffusion.conversion.dataset import label_values
from nnunet_diffusion.conversion.label_mapping import map_labels, refuse_hidden_parts
from nnunet_diffusion.conversion.partial import read_mapping
from nnunet_diffusion.conversion.relabeling import mapped
from nnunet_diffusion.errors import UserError

SIZE, SPACING = (8, 8, 8), (1.0, 1.0, 2.0)
COMMON = ["liver", "left kidney", "right kidney", "kidney tumor"]
KIDNEYS = ["left kidney", "right kidney"]


def noise(path: Path, seed: int) -> Path:
    return write(path, np.random.default_rng(seed).normal(0, 100, SIZE).astype(np.float32), SPACING)


def raw_set(folder: Path, labels: dict, cases=("a", "b"), seed=0, ending=".nii.gz", **more) -> Path:
    """A raw data set as nnU-Net has them; label files hold every value, 0 to the highest, in turn."""
    for number, case in enumerate(cases):
        noise(folder / "imagesTr" / f"{case}_0000{ending}", seed + number)
        label(folder / "labelsTr" / f"{case}{ending}", SIZE, SPACING, range(len(labels) + 1))
    values = {"background": 0, **{name: value for value, name in enumerate(labels, start=1)}}
    content = {"channel_names": {"0": "CT"}, "labels": values, "file_ending": ending, "numTraining": len(cases), **more}
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def sets(tmp_path):
    """FLARE: liver, kidneys by side. KiTS, in folders: kidneys of either side with tumors, an unlabeled scan."""
    folder = tmp_path / "sets"
    raw_set(folder / "FLARE", ["liver", "right kidney", "left kidney"])
    for case in ("a", "c"):  # an `a` is in both
        noise(folder / "kits" / "images" / f"{case}.nii.gz", ord(case))
        label(folder / "kits" / "labels" / f"{case}.nii.gz", SIZE, SPACING, (0, 1, 2))
    noise(folder / "kits" / "more" / "d.nii.gz", 100)
    return folder


def entries() -> dict[str, dict]:
    return {
        "FLARE": {"name": "FLARE", "dataset": "FLARE", "excludes": ["kidney tumor"]},
        "KiTS": {
            "name": "KiTS",
            "images": "kits/images",
            "labels": "kits/labels",
            "label_names": {"kidney": 1, "tumor": 2},
            "mapping": {"kidney": KIDNEYS, "tumor": "kidney tumor"},
            "inside": {"tumor": "kidney"},
            "unlabeled": "kits/more",
        },
    }


@pytest.fixture
def raw(nnunet_folders):
    return nnunet_folders / "nnUNet_raw"


def join(sets: Path, sources: list[dict], *options: str, labels=COMMON) -> int:
    (sets / "mapping.json").write_text(json.dumps({"labels": labels, "sources": sources}))
    return main(["convert", "partial", str(sets / "mapping.json"), "-d", "7", "-n", "Both", *options])


def contents(folder: Path) -> dict[Path, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("mapping.json", "lock"))
    return {path: path.read_bytes() for path in files}


def test_two_sets_become_one(sets, raw, capsys):
    before = contents(sets)
    assert join(sets, list(entries().values())) == 0
    out = capsys.readouterr()
    assert contents(sets) == before
    content, labeled, unlabeled = as_nnunet_reads(raw / "Dataset007_Both")
    assert content["labels"] == {"background": 0, **{name: value for value, name in enumerate(COMMON, start=1)}}
    assert list(labeled) == ["FLARE_a", "FLARE_b", "KiTS_a", "KiTS_c"] and list(unlabeled) == ["KiTS_d"]
    assert labeled["KiTS_a"]["images"] == [str(sets / "kits" / "images" / "a.nii.gz")]
    assert labeled["KiTS_a"]["label"] == str(raw / "Dataset007_Both" / "labelsTr" / "KiTS_a.nii.gz")
    assert content["annotated_labels"] == {
        "FLARE_a": COMMON[:3],
        "FLARE_b": COMMON[:3],
        "KiTS_a": ["kidney tumor"],
        "KiTS_c": ["kidney tumor"],
    }
    assert content["union_labels"] == {"KiTS_a": [KIDNEYS], "KiTS_c": [KIDNEYS]}
    assert content["channel_names"] == {"0": "CT"} and content["file_ending"] == ".nii.gz"
    assert {path.name for path in (raw / "Dataset007_Both").glob("[!.]*")} == {"dataset.json", "labelsTr"}
    assert "FLARE: 2 labeled, 0 unlabeled\n  annotated  liver, right kidney, left kidney" in out.out
    assert "union      left kidney or right kidney" in out.out
    assert "WARNING" not in out.err


def test_values_by_hand_and_geometry(sets, raw):
    assert join(sets, list(entries().values())) == 0
    for case, original, values in (
        ("FLARE_a", sets / "FLARE" / "labelsTr" / "a.nii.gz", [0, 1, 3, 2]),  # right kidney 2 -> 3, left kidney 3 -> 2
        ("KiTS_a", sets / "kits" / "labels" / "a.nii.gz", [0, 2, 4]),  # union: the value of its first; tumor 2 -> 4
    ):
        new = sitk.ReadImage(str(raw / "Dataset007_Both" / "labelsTr" / f"{case}.nii.gz"))
        old = sitk.ReadImage(str(original))
        expected = [values[value] for value in sitk.GetArrayViewFromImage(old).ravel()]
        assert sitk.GetArrayFromImage(new).ravel().tolist() == expected
        assert new.GetSpacing() == old.GetSpacing() and new.GetDirection() == old.GetDirection()
        assert new.GetPixelID() == sitk.sitkUInt8


def test_nnunet_verifies_the_result(sets, raw):
    from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    assert join(sets, list(entries().values())) == 0
    content, labeled, _ = as_nnunet_reads(raw / "Dataset007_Both")
    for entry in labeled.values():
        assert verify_labels(entry["label"], SimpleITKIO, sorted(label_values(content)))
        assert check_cases(entry["images"], entry["label"], 1, SimpleITKIO)


def test_copy_is_self_contained(sets, raw):
    assert join(sets, list(entries().values()), "--copy") == 0
    for path in contents(sets):
        path.unlink()
    _, labeled, unlabeled = as_nnunet_reads(raw / "Dataset007_Both")
    assert labeled["FLARE_a"]["images"] == [str(raw / "Dataset007_Both" / "imagesTr" / "FLARE_a_0000.nii.gz")]
    assert unlabeled == {"KiTS_d": [str(raw / "Dataset007_Both" / "imagesUn" / "KiTS_d_0000.nii.gz")]}


def test_again_changes_nothing_and_another_mapping_is_refused(sets, raw, capsys):
    sources = list(entries().values())
    assert join(sets, sources) == 0
    before = contents(raw)
    assert join(sets, sources) == 0
    assert contents(raw) == before
    capsys.readouterr()
    assert join(sets, sources, labels=COMMON[::-1]) == 1
    assert re.search(r"FLARE_a.nii.gz exists and is not what .*a.nii.gz becomes", capsys.readouterr().err)
    assert join(sets, sources[:1]) == 1
    assert "was converted from" in capsys.readouterr().err
    assert contents(raw) == before
    cut(raw / "Dataset007_Both" / "labelsTr" / "KiTS_a.nii.gz")
    assert join(sets, sources) == 1
    assert re.search(r"KiTS_a.nii.gz exists and is not what .*a.nii.gz becomes: remove", capsys.readouterr().err)


def test_interrupted_run_is_continued(sets, raw, monkeypatch, capsys):
    from nnunet_diffusion.conversion import relabeling

    def full_disk(voxels, image, path, write=relabeling._write):
        if path.endswith("KiTS_a.nii.gz"):
            raise OSError(28, "No space left on device", path)
        write(voxels, image, path)

    with monkeypatch.context() as patch:
        patch.setattr(relabeling, "_write", full_disk)
        assert join(sets, list(entries().values()), "-np", "1") == 1
    assert "No space left" in capsys.readouterr().err
    files = [path.name for path in (raw / "Dataset007_Both").rglob("*") if path.is_file()]
    assert "dataset.json" not in files and not any(name.startswith(".tmp") for name in files)
    assert join(sets, list(entries().values())) == 0
    as_nnunet_reads(raw / "Dataset007_Both")


def test_nii_and_nii_gz_go_together(sets, raw, capsys):
    raw_set(sets / "LiTS", ["liver", "tumor"], cases=("0",), seed=50, ending=".nii")
    lits = {"name": "LiTS", "dataset": "LiTS", "mapping": {"liver": "liver", "tumor": "liver"}}
    sources = [entries()["FLARE"], lits]
    sources[0].pop("excludes")  # names what this table has not
    assert join(sets, sources, "--copy", labels=COMMON[:3]) == 0
    content, labeled, _ = as_nnunet_reads(raw / "Dataset007_Both")
    assert content["file_ending"] == ".nii.gz"
    original = (sets / "LiTS" / "imagesTr" / "0_0000.nii").read_bytes()
    assert gzip.decompress(Path(labeled["LiTS_0"]["images"][0]).read_bytes()) == original
    assert np.unique(nibabel.load(labeled["LiTS_0"]["label"]).dataobj).tolist() == [0, 1]
    assert content["annotated_labels"] == {"LiTS_0": ["liver"]}  # FLARE's cases annotate all three
    assert content["sources"]["LiTS_0"] == "LiTS" and set(content["sources"]) >= set(labeled)
    assert join(sets, sources, "--copy", labels=COMMON[:3]) == 0  # compares, and copies nothing again
    cut(Path(labeled["LiTS_0"]["images"][0]))
    assert join(sets, sources, "--copy", labels=COMMON[:3]) == 1
    assert "LiTS_0_0000.nii.gz exists and is not a copy of" in capsys.readouterr().err


def test_orientations_are_turned_to_one(sets, raw, capsys):
    for path in (sets / "kits").rglob("*.nii.gz"):
        image = nibabel.load(path)
        turned = nibabel.Nifti1Image(np.asanyarray(image.dataobj), np.diag([1.0, -1.0, 2.0, 1.0]))
        nibabel.save(turned, path)
    assert join(sets, list(entries().values())) == 0
    assert "scans are stored as LPS, RPS: NibabelIOWithReorient turns all to RAS" in capsys.readouterr().out
    content, labeled, _ = as_nnunet_reads(raw / "Dataset007_Both")
    assert content["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    image, new = nibabel.load(labeled["KiTS_a"]["images"][0]), nibabel.load(labeled["KiTS_a"]["label"])
    assert np.array_equal(image.affine, new.affine)


def test_source_that_annotates_in_part(sets, raw):
    """B annotates the liver alone; c nothing of the common table: it joins the unlabeled."""
    labels = ["liver", "right kidney", "left kidney", "spine"]
    annotated = {"b": ["liver"], "c": ["spine"]}
    folder = raw_set(sets / "Part", labels, ("a", "b", "c"), annotated_labels=annotated)
    label(folder / "labelsTr" / "b.nii.gz", SIZE, SPACING, (0, 1))
    assert join(sets, [{"name": "Part", "dataset": "Part"}], labels=COMMON[:3]) == 0
    content, labeled, unlabeled = as_nnunet_reads(raw / "Dataset007_Both")
    assert content["annotated_labels"] == {"Part_b": ["liver"]}
    assert list(labeled) == ["Part_a", "Part_b"] and list(unlabeled) == ["Part_c"]


def test_only_some_sources(sets, raw, capsys):
    assert "--only ['Nobody']" in refused(capsys, raw, join(sets, list(entries().values()), "--only", "Nobody"))
    assert join(sets, list(entries().values()), "--only", "KiTS") == 0
    assert list(as_nnunet_reads(raw / "Dataset007_Both")[1]) == ["KiTS_a", "KiTS_c"]
    err = capsys.readouterr().err
    assert "WARNING: no source annotates 'liver'" in err
    assert "WARNING: 'left kidney' is annotated only in unions" in err and "'kidney tumor'" not in err


# Names only, by hand.


def test_many_to_one_and_what_is_left_out():
    rule = map_labels("S", ["liver", "tumor", "x"], ["liver"], {"liver": "liver", "tumor": "liver", "x": None})
    assert rule.targets == {"liver": ("liver",), "tumor": ("liver",), "x": ()}
    assert rule.annotated() == [("liver",)]
    assert rule.annotated(["x"]) == []
    with pytest.raises(UserError, match=r"\['liver', 'tumor'\], .* \['tumor'\] are not annotated"):
        rule.annotated(["liver"])


def test_a_part_that_is_left_out_becomes_what_it_lies_in():
    inside = {"tumor": "kidney", "core": "tumor"}
    rule = map_labels("S", ["kidney", "tumor", "core"], KIDNEYS, {"kidney": KIDNEYS}, inside)
    assert set(rule.targets.values()) == {tuple(KIDNEYS)}
    with pytest.raises(UserError, match="circle, tumor in core in tumor"):
        map_labels("S", ["k", "tumor", "core"], ["k"], None, {"tumor": "core", "core": "tumor"})


def test_unions_of_the_same_names_are_one():
    rule = map_labels("S", ["kidney", "tumor"], KIDNEYS, {"kidney": KIDNEYS, "tumor": KIDNEYS[::-1]})
    assert list(rule.groups()) == [tuple(KIDNEYS)]  # voxels of both have the value of the first one's first name


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"a": ["x", "y"], "b": "x"}, "'x' cannot be in both"),
        ({"a": ["x", "y"], "b": ["y", "z"]}, "'y' cannot be in both.*the same list"),
        ({"a": ["x"]}, "a union is of two different labels or more"),
        ({"a": ["x", "x"]}, "a union is of two different labels or more"),
        ({"a": []}, "a union is of two different labels or more"),
        ({"a": ["x", "ignore"]}, "a union is of two different labels or more"),
        ({"a": 1}, "'mapping' of 'a' is 1: give a common label"),
        ({"a": "w"}, r"'mapping' of 'a' names \['w'\], not among the common labels"),
        ({"c": "x"}, r"'mapping' names \['c'\], not among its labels"),
        ({"a": None}, r"none of its labels \['a', 'b'\] becomes one of"),
        (None, "none of its labels"),
    ],
)
def test_mappings_that_contradict_themselves(mapping, message):
    with pytest.raises(UserError, match=f"source 'S': .*{message}"):
        map_labels("S", ["a", "b"], ["x", "y", "z", "ignore"], mapping)


def test_an_organ_with_and_without_its_tumor():
    common = ["liver", "liver tumor"]
    apart, inside = {"liver": "liver", "tumor": "liver tumor"}, {"tumor": "liver"}
    split = map_labels("LiTS", ["liver", "tumor"], common, apart, inside)
    organ = map_labels("FLARE", ["liver"], common)
    with pytest.raises(UserError, match=r"'FLARE': may its \['liver'\] hold 'liver tumor'.*\['liver', 'liver tumor'\]"):
        refuse_hidden_parts([split, organ])
    refuse_hidden_parts([split, map_labels("FLARE", ["liver"], common, {"liver": common})])
    refuse_hidden_parts([split, map_labels("FLARE", ["liver"], common, excludes=["liver tumor"])])
    merged = map_labels("LiTS", ["liver", "tumor"], common, {"liver": "liver"}, inside)
    refuse_hidden_parts([merged, organ])  # nobody tells them apart


def test_ignored_voxels():
    common = ["liver", "ignore"]
    mapping = {"liver": "liver", "doubt": "ignore"}
    rule = map_labels("S", ["liver", "doubt", "ignore"], common, mapping, {"doubt": "liver"})
    assert rule.targets == {"liver": ("liver",), "doubt": ("ignore",), "ignore": ("ignore",)}
    assert rule.annotated() == [("liver",)] and rule.inside == {}
    with pytest.raises(UserError, match=r"'ignore' names \['ignore'\], not among the common labels"):
        map_labels("S", ["liver", "ignore"], ["liver"])


def test_mapped_by_hand():
    new = mapped(np.array([0, 3, 3, 1], np.int16), {0: 0, 1: 5, 3: 2})
    assert new.tolist() == [0, 2, 2, 5] and new.dtype == np.uint8
    assert mapped(np.array([0.0, 1.0]), {0: 0, 1: 300}).tolist() == [0, 300]


# Bad input.


def entry(**changes) -> dict:
    return {**entries()["KiTS"], **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "FLARE"}, r"two sources are called \['FLARE'\]"),
        ({"name": "a/b"}, r"sources\[1\].name: String should match pattern"),
        ({"maping": {}}, r"sources\[1\].maping: Extra inputs are not permitted"),
        ({"mapping": []}, r"sources\[1\].mapping: Input should be a valid dictionary"),
        ({"dataset": "FLARE"}, "give either 'dataset', or"),
        ({"label_names": {"kidney": 1, "tumor": 1}}, "'label_names' must be different whole numbers"),
        ({"label_names": {"kidney": [1, 2], "tumor": 2}}, r"has regions \['kidney'\]"),
        ({"label_names": {"kidney": 1, "tumor": 5}}, r"kits/labels/[ac].nii.gz: label values \[2\] are not among"),
        ({"mapping": {"kidney": "kidney"}}, r"'mapping' of 'kidney' names \['kidney'\]"),
        ({"mapping": {}, "inside": {}}, "none of its labels"),
        ({"channel_names": ["MR"]}, r"different channels: FLARE \['CT'\], KiTS \['MR'\]"),
        ({"channel_names": ["CT", "PET"]}, "must end with one of 2 channels"),
        ({"inside": {"tumor": ["kidney"]}}, r"sources\[1\].inside.tumor: Input should be a valid string"),
        ({"inside": {"tumor": "liver"}}, r"'inside' names \['liver'\], not among"),
        ({"unlabeled": 3}, r"sources\[1\].unlabeled: Input should be a valid list, not 3"),
        ({"channel_names": []}, r"sources\[1\].channel_names: List should have at least 1 item"),
        ({"images": "a\0b"}, r"sources\[1\].images: String should match pattern"),
        ({"images": "nowhere"}, "nowhere: cannot be listed"),
        ({"images": "FLARE/imagesTr", "labels": "FLARE/labelsTr"}, "is both FLARE_a and KiTS_a"),
        ({"unlabeled": ["kits/more", "other"]}, "source 'KiTS': d: is there twice, as .*more/d.nii.gz and .*other/d"),
    ],
)
def test_bad_source_is_refused(sets, raw, capsys, change, message):
    noise(sets / "other" / "d.nii.gz", 1)
    error = refused(capsys, raw, join(sets, [entries()["FLARE"], entry(**change)]))
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", r"mapping.json: the whole file: Input should be a valid dictionary, not \[\]"),
        ('{"labels": ["a"]}', "mapping.json: sources: Field required, not nothing: .* --help` shows how"),
        ('{"labels": ["a"], "sources": [3]}', r"mapping.json: sources\[0\]: Input should be a valid dictionary, not 3"),
        ('{"labels": ["a", "a"], "sources": [{"name": "S"}]}', "'labels' must be a list of different names"),
        ('{"labels": ["ignore", "a"], "sources": [{"name": "S"}]}', "'ignore' last"),
        ('{"labels": ["a"], "sources": []}', "sources: List should have at least 1 item"),
        ('{"labels": ["a"], "sources": [{"name": "S"}]}', "lacks .*'images'|give either"),
        ('{"labels": ["a"], "sources": [{"name": "S", "dataset": "Nothing"}]}', "there is no dataset.json in .*--only"),
    ],
)
def test_bad_mapping_file_is_refused(tmp_path, raw, capsys, content, message):
    (tmp_path / "mapping.json").write_text(content)
    code = main(["convert", "partial", str(tmp_path / "mapping.json"), "-d", "7", "-n", "Both"])
    error = refused(capsys, raw, code)
    assert re.search(message, error), error


def test_file_types_that_do_not_go_together(sets, raw, capsys):
    raw_set(sets / "Other", ["liver"], ("z",), seed=9, ending=".nrrd")
    error = refused(capsys, raw, join(sets, [entries()["FLARE"], {"name": "Other", "dataset": "Other"}]))
    assert "different file types: FLARE .nii.gz, Other .nrrd" in error and "convert the others to .nii.gz" in error


def test_nrrd_sets_join(sets, raw):
    raw_set(sets / "One", ["liver"], ("z",), seed=9, ending=".nrrd")
    raw_set(sets / "Two", ["x", "spleen"], ("z",), seed=19, ending=".nrrd")
    sources = [{"name": name, "dataset": name} for name in ("One", "Two")]
    assert join(sets, sources, labels=["liver", "spleen"]) == 0
    _, labeled, _ = as_nnunet_reads(raw / "Dataset007_Both")
    new = sitk.ReadImage(labeled["Two_z"]["label"])
    assert np.unique(sitk.GetArrayViewFromImage(new)).tolist() == [0, 2] and new.GetSpacing() == SPACING


FILES = {"images": ["imagesTr/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"union_labels": {"a": [["liver", "left kidney"]]}}, "has 'union_labels', it was joined already"),
        ({"annotated_labels": {"z": ["liver"]}}, "names case 'z', which is not there"),
        ({"annotated_labels": {"a": None}}, "annotated_labels.a: Input should be a valid list, not None"),
        ({"annotated_labels": {"a": [["x"]]}}, r"annotated_labels.a\[0\]: Input should be a valid string"),
        (
            {"dataset": []},
            r"dataset.json: dataset: Input should be a valid dictionary, not \[\]: convert that data set",
        ),
        ({"dataset": {"a": {"images": []}}}, "dataset.json: dataset.a.images: List should have at least 1 item"),
        ({"dataset": {"a": {"images": ["x", "y"], "label": "z"}}}, "dataset.a.images: must be 1 file"),
        ({"dataset": {"../../../evil": FILES}}, r"dataset.json: dataset: '../../../evil' cannot be the name of a file"),
        ({"dataset": {"a": {"images": ["a\0b"], "label": "z"}}}, r"dataset.a.images\[0\]: String should match"),
        ({"dataset": {"a": {"images": ["a\ud800"], "label": "z"}}}, r"dataset.a.images\[0\]: Input should be a valid"),
        ({"channel_names": {"x": "CT"}}, "channel_names.x"),
        ({"overwrite_image_reader_writer": {}}, "overwrite_image_reader_writer: Input should be a valid string"),
        ({"unlabeled": {"../evil": {"images": FILES["images"]}}}, "'../evil' cannot be "),
        ({"annotated_labels": {"a": ["x"]}}, r"of 'a' names \['x'\], not among"),
        ({"labels": {"background": 0, "all": [1, 2], "liver": 1}}, r"has regions \['all'\]"),
        ({"file_ending": ".png"}, ".png files cannot be joined"),
    ],
)
def test_raw_data_sets_that_cannot_be_joined(sets, raw, capsys, more, message):
    path = sets / "FLARE" / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))
    error = refused(capsys, raw, join(sets, list(entries().values())))
    assert re.search(message, error), error


@pytest.mark.parametrize("content", ["[]", '{"labels": ', "null"])
def test_source_of_another_shape(sets, raw, capsys, content):
    (sets / "FLARE" / "dataset.json").write_text(content)
    error = refused(capsys, raw, join(sets, list(entries().values()), "--copy"))
    assert re.search("FLARE/dataset.json: .*: convert that data set again", error)


def test_source_that_cannot_be_read_is_not_missing(sets, raw, capsys):
    path = sets / "FLARE" / "dataset.json"
    path.unlink()
    path.symlink_to(path)
    assert "Too many levels of symbolic links" in refused(capsys, raw, join(sets, list(entries().values())))


def test_sources_whose_cases_would_be_called_the_same(sets, raw, capsys):
    raw_set(sets / "One", ["liver"], ("B_c",), seed=30)
    raw_set(sets / "Two", ["liver"], ("c",), seed=31)
    sources = [{"name": "A", "dataset": "One"}, {"name": "A_B", "dataset": "Two"}]
    assert "both have a case 'A_B_c'" in refused(capsys, raw, join(sets, sources))


def test_all_bad_cases_are_listed(sets, raw, capsys):
    cut(sets / "FLARE" / "imagesTr" / "a_0000.nii.gz")
    scan(sets / "kits" / "images" / "c.nii.gz", fill=7)
    error = refused(capsys, raw, join(sets, list(entries().values())))
    assert "2 problem(s), so nothing was converted" in error and "a_0000.nii.gz" in error and "c.nii.gz" in error


def test_ready_mapping_of_the_abdomen():
    """Its names fit the scripts' labels; every organ is annotated; only KiTS has unions."""
    from nnunet_diffusion.dataset_conversion import (
        Dataset007_Pancreas,
        Dataset009_Spleen,
        Dataset017_BTCV,
        Dataset022_FLARE22,
        Dataset029_LiTS,
        Dataset040_KiTS,
        Dataset218_AMOS22,
    )

    content = read_mapping(str(Path(dataset_conversion.__file__).parent / "abdomen.json"))
    assert tuple(content["labels"]) == Dataset022_FLARE22.ORGANS
    labels = {
        "Dataset022_FLARE22": Dataset022_FLARE22.ORGANS,
        "Dataset218_AMOS22": Dataset218_AMOS22.AMOS22.labels,
        "Dataset017_BTCV": Dataset017_BTCV.BTCV.labels,
        "Dataset040_KiTS": Dataset040_KiTS.YEARS[23].labels,
        "Dataset029_LiTS": Dataset029_LiTS.LITS.labels,
        "Dataset007_Pancreas": Dataset007_Pancreas.PANCREAS.labels,
        "Dataset009_Spleen": Dataset009_Spleen.SPLEEN.labels,
    }
    rules = []
    for source in content["sources"]:
        own = labels[source["dataset"]]
        assert source["mapping"].keys() == set(own), source["name"]  # each label is mapped or left out by name
        rules.append(map_labels(source["name"], own, content["labels"], source["mapping"]))
    unions = {rule.source: [target for target in rule.groups() if len(target) > 1] for rule in rules}
    assert {source for source, targets in unions.items() if targets} == {"KiTS"}
    assert unions["KiTS"] == [("right kidney", "left kidney")]
    assert sorted(target[0] for target in rules[1].groups()) == sorted(content["labels"])  # AMOS22 has all 13
