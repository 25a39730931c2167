"""`nnunet_diffusion convert`: nnU-Net reads what comes out; bad input is refused before anything is written."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from raw_files import as_nnunet_reads, cut, label, refused, scan

from nnunet_diffusion.cli import main
from nnunet_diffusion.conversion.dataset import label_values
from nnunet_diffusion.dataset_conversion.Dataset022_FLARE22 import convert_flare22
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.locks import locked

FLARE22_TRAINING = "Training/FLARE22_LabeledCase50"


@pytest.fixture
def source(tmp_path):
    """Two labeled scans and one unlabeled one, in three folders."""
    folder = tmp_path / "source"
    for case in ("a", "b"):
        scan(folder / "images" / f"{case}_0000.nii.gz")
        label(folder / "labels" / f"{case}.nii.gz")
    scan(folder / "pool" / "c_0000.nii.gz")
    return folder


@pytest.fixture
def raw(nnunet_folders):
    return nnunet_folders / "nnUNet_raw"


def convert(source: Path, *options: str, labels=("one", "two"), pools=("pool",)) -> int:
    unlabeled = ["--unlabeled", *(str(source / pool) for pool in pools)] if pools else []
    folders = [str(source / "images"), str(source / "labels")]
    return main(["convert", "folder", *folders, *unlabeled, "-d", "5", "-n", "Tiny", "--labels", *labels, *options])


def test_folder_refers_to_the_files_where_they_are(source, raw, capsys):
    assert convert(source) == 0
    assert "2 labeled and 1 unlabeled" in capsys.readouterr().out
    content, labeled, unlabeled = as_nnunet_reads(raw / "Dataset005_Tiny")
    assert sorted(os.listdir(raw / "Dataset005_Tiny")) == [".nnunet_diffusion", "dataset.json"]
    assert content["labels"] == {"background": 0, "one": 1, "two": 2}
    assert content["channel_names"] == {"0": "CT"}
    assert (content["numTraining"], content["file_ending"]) == (2, ".nii.gz")
    assert labeled == {
        case: {
            "images": [str(source / "images" / f"{case}_0000.nii.gz")],
            "label": str(source / "labels" / f"{case}.nii.gz"),
        }
        for case in ("a", "b")
    }
    assert unlabeled == {"c": [str(source / "pool" / "c_0000.nii.gz")]}


def test_one_of_several_file_endings(source, raw, capsys):
    scan(source / "images" / "other_0000.nrrd")
    assert convert(source) == 1
    assert convert(source, "--file_ending", "nii.gz") == 1
    assert "--file_ending nii.gz: take one of .nii.gz, " in capsys.readouterr().err and not list(raw.iterdir())
    assert convert(source, "--file_ending", ".nii.gz") == 0
    content, labeled, _ = as_nnunet_reads(raw / "Dataset005_Tiny")
    assert content["file_ending"] == ".nii.gz" and list(labeled) == ["a", "b"]


def test_nnunet_verifies_the_result(source, raw):
    from nnunetv2.experiment_planning.verify_dataset_integrity import check_cases, verify_labels
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    assert convert(source) == 0
    _, labeled, _ = as_nnunet_reads(raw / "Dataset005_Tiny")
    for entry in labeled.values():
        assert verify_labels(entry["label"], SimpleITKIO, [0, 1, 2])
        assert check_cases(entry["images"], entry["label"], 1, SimpleITKIO)


def test_copy_is_self_contained_and_moves(source, raw):
    assert convert(source, "--copy") == 0
    moved = raw / "Dataset006_Moved"
    (raw / "Dataset005_Tiny").rename(moved)
    original = (source / "labels" / "a.nii.gz").read_bytes()
    for path in source.rglob("*.nii.gz"):
        path.unlink()
    _, labeled, unlabeled = as_nnunet_reads(moved)
    assert labeled["a"]["images"] == [str(moved / "imagesTr" / "a_0000.nii.gz")]
    assert unlabeled == {"c": [str(moved / "imagesUn" / "c_0000.nii.gz")]}
    assert Path(labeled["a"]["label"]).read_bytes() == original


def test_interrupted_copy_is_continued(source, raw, monkeypatch, capsys):
    copied = []

    def copy_two(original, target):
        if len(copied) == 2:
            raise OSError(28, "No space left on device", target)
        copied.append(original)
        return copy(original, target)

    copy = shutil.copy2
    monkeypatch.setattr(shutil, "copy2", copy_two)
    assert convert(source, "--copy") == 1
    folder = raw / "Dataset005_Tiny"
    message = rf"b_0000.nii.gz was not written to {folder / 'imagesTr'}, where .*: No space left on device; make room"
    assert re.search(message, capsys.readouterr().err)
    files = sorted(path.name for path in folder.glob("*Tr/*"))
    assert files == ["a.nii.gz", "a_0000.nii.gz"]  # whole, no temporary file, no dataset.json
    monkeypatch.setattr(shutil, "copy2", lambda *args: copied.append(args[0]) or copy(*args))
    assert convert(source, "--copy") == 0
    assert len(copied) == 5 == len(set(copied))  # nothing twice
    as_nnunet_reads(folder)


def test_copy_does_not_replace_a_foreign_file(source, raw, capsys):
    other = scan(raw / "Dataset005_Tiny" / "imagesTr" / "b_0000.nii.gz", size=(4, 4, 4))
    before = other.read_bytes()
    assert convert(source, "--copy") == 1
    assert "b_0000.nii.gz exists and is not a copy of" in capsys.readouterr().err
    assert other.read_bytes() == before


def test_several_channels_other_format_and_symlinks(tmp_path, raw):
    source = tmp_path / "mr"
    for case in ("a", "b"):
        for channel in range(2):
            scan(source / "images" / f"{case}_000{channel}.nrrd")
        label(source / "elsewhere" / f"{case}.nrrd")
    (source / "labels").symlink_to(source / "elsewhere")
    assert convert(source, "--channel_names", "T1", "T2", pools=()) == 0
    content, labeled, unlabeled = as_nnunet_reads(raw / "Dataset005_Tiny")
    assert content["channel_names"] == {"0": "T1", "1": "T2"} and content["file_ending"] == ".nrrd"
    assert [Path(path).name for path in labeled["b"]["images"]] == ["b_0000.nrrd", "b_0001.nrrd"]
    assert unlabeled == {}


def test_names_without_channel_and_hidden_files(source, raw):
    (source / "images" / "a_0000.nii.gz").rename(source / "images" / "a.nii.gz")
    (source / "images" / "._a.nii.gz").write_bytes(b"macOS")
    (source / "images" / "notes.txt").write_text("not an image")
    assert convert(source) == 0
    assert as_nnunet_reads(raw / "Dataset005_Tiny")[1]["a"]["images"] == [str(source / "images" / "a.nii.gz")]


def test_what_was_annotated(source, raw, tmp_path, capsys):
    path = tmp_path / "annotated.json"
    label(source / "labels" / "a.nii.gz", values=(0, 1))
    path.write_text(json.dumps({"a": ["one"]}))
    assert convert(source, "--annotated", str(path)) == 0
    folder = raw / "Dataset005_Tiny"
    assert json.loads((folder / "dataset.json").read_text())["annotated_labels"] == {"a": ["one"]}
    before = (folder / "dataset.json").read_bytes()
    for content, message in (
        ({"z": ["one"]}, "'z'"),  # no such case
        ({"a": ["three"]}, "three"),  # no such label
        ({"b": ["one"]}, "b.nii.gz: label values [2]"),  # b's label file holds 2 as well
        (["a"], "annotated.json: the whole file: Input should be a valid dictionary, not ['a']"),
        ({"a": "one"}, "annotated.json: a: Input should be a valid list, not 'one'"),
        ({"a": [["one"]]}, "annotated.json: a[0]: Input should be a valid string"),
    ):
        path.write_text(json.dumps(content))
        assert convert(source, "--annotated", str(path)) == 1
        assert message in capsys.readouterr().err
    assert (folder / "dataset.json").read_bytes() == before


def test_labels_from_json(source, raw, tmp_path):
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"liver": 1, "spleen": 2}))
    assert convert(source, labels=[str(path)]) == 0
    assert as_nnunet_reads(raw / "Dataset005_Tiny")[0]["labels"] == {"background": 0, "liver": 1, "spleen": 2}
    path.write_text(json.dumps({"labels": {"both": [1, 2], "second": 2}, "regions_class_order": [1, 2]}))
    assert convert(source, labels=[str(path)]) == 0
    content = as_nnunet_reads(raw / "Dataset005_Tiny")[0]
    assert content["labels"] == {"background": 0, "both": [1, 2], "second": 2}
    assert content["regions_class_order"] == [1, 2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 0}, "0 for 'background', then 1, 2"),
        ({"background": 0, "one": 1, "three": 3}, "without a gap"),
        ({"background": 1, "one": 0}, "0 for 'background'"),
        ({"one": 1}, "0 for 'background'"),
        ({"background": 0, "one": "1"}, "whole numbers"),
        ({"background": 0, "one": 1, "same": 1}, "same value"),
        ({"background": 0, "ignore": 1, "two": 2}, "'ignore' must have the highest value, 2"),
        ({"background": 0, "both": [1, 2], "two": 2}, r"'regions_class_order', 2 values of \[1, 2\], .* not None"),
    ],
)
def test_labels_that_nnunet_could_not_train_with(labels, message):
    with pytest.raises(UserError, match=message):
        label_values({"labels": labels})


@pytest.mark.parametrize("order", [3, ["a", "b"], [1], [1, 5], [0, 1], [[1], 2]])
def test_order_of_regions_that_makes_no_sense(order):
    labels = {"background": 0, "both": [1, 2], "two": 2}
    with pytest.raises(UserError, match=r"'regions_class_order', 2 values of \[1, 2\]"):
        label_values({"labels": labels, "regions_class_order": order})


def test_label_values_by_hand():
    assert label_values({"labels": {"background": 0, "a": 1, "ignore": 2}}) == {0, 1, 2}
    regions = {"labels": {"background": 0, "all": [1, 2, 3], "core": [2, 3], "x": 3}, "regions_class_order": [1, 2, 3]}
    assert label_values(regions) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: cut(s / "images" / "a_0000.nii.gz"), "a_0000.nii.gz: cannot be read, truncated"),
        (lambda s: cut(s / "labels" / "a.nii.gz"), "labels/a.nii.gz: cannot be read, truncated"),
        (lambda s: (s / "images" / "a_0000.nii.gz").write_bytes(b""), "a_0000.nii.gz: is an empty file"),
        (lambda s: scan(s / "images" / "a_0000.nii.gz", fill=np.nan), "a_0000.nii.gz: 384 of 384 voxels are NaN"),
        (lambda s: scan(s / "images" / "a_0000.nii.gz", fill=7), "a_0000.nii.gz: every voxel is 7"),
        (lambda s: scan(s / "images" / "a_0000.nii.gz", (8, 8, 6, 2), (1, 1, 2, 1)), "a_0000.nii.gz: is 4-D"),
        (lambda s: label(s / "labels" / "a.nii.gz", spacing=(1, 1, 3)), "spacing .* against"),
        (lambda s: label(s / "labels" / "a.nii.gz", size=(8, 8, 7)), "size .* against"),
        (lambda s: label(s / "labels" / "a.nii.gz", values=(0, 3, 9)), r"label values \[3, 9\] are not among"),
        (lambda s: (s / "images" / "a_0000.nii.gz").unlink(), "labels/a.nii.gz has no image"),
        (lambda s: (s / "labels" / "a.nii.gz").unlink(), "a_0000.nii.gz has no label"),
        (lambda s: scan(s / "pool" / "a_0000.nii.gz"), "a: is both labeled and unlabeled"),
        (lambda s: scan(s / "images" / "a.nii.gz"), "a: is there twice"),
        (lambda s: scan(s / "images" / "a.nii"), "several types.*--file_ending"),
        (
            lambda s: scan(s / "images" / "$HOME_0000.nii.gz") and label(s / "labels" / "$HOME.nii.gz"),
            "expand the '\\$'",
        ),
    ],
)
def test_bad_labeled_input_is_refused(source, raw, capsys, spoil, message):
    spoil(source)
    error = refused(capsys, raw, convert(source))
    assert re.search(message, error), error


def test_all_bad_cases_are_listed(source, raw, capsys):
    cut(source / "images" / "a_0000.nii.gz")
    label(source / "labels" / "b.nii.gz", values=(0, 9))
    error = refused(capsys, raw, convert(source))
    assert "2 problem(s), so nothing was converted" in error
    assert "a_0000.nii.gz: cannot be read" in error and "[9]" in error


def test_same_case_in_two_pools(source, raw, capsys):
    scan(source / "more" / "c_0000.nii.gz")
    error = refused(capsys, raw, convert(source, pools=("pool", "more")))
    assert "c: is there twice, as" in error and "more/c_0000" in error and "pool/c_0000" in error


def test_channel_missing_or_not_named(tmp_path, raw, capsys):
    source = tmp_path / "mr"
    for name in ("a_0000", "b_0000", "b_0001", "d"):
        scan(source / "images" / f"{name}.nii.gz")
    for case in ("a", "b", "d"):
        label(source / "labels" / f"{case}.nii.gz")
    error = refused(capsys, raw, convert(source, "--channel_names", "T1", "T2", pools=()))
    assert "a: lacks channel(s) [1] of 2" in error and "d.nii.gz: its name must end with one of 2 channels" in error


def test_channels_of_different_geometry(tmp_path, raw, capsys):
    source = tmp_path / "mr"
    scan(source / "images" / "a_0000.nii.gz")
    scan(source / "images" / "a_0001.nii.gz", spacing=(1, 1, 4))
    label(source / "labels" / "a.nii.gz")
    error = refused(capsys, raw, convert(source, "--channel_names", "T1", "T2", pools=()))
    assert "a_0001.nii.gz does not lie on the voxels of" in error and "spacing (1.0, 1.0, 4.0)" in error


def test_bad_pool_scans_are_skipped_and_listed(source, raw, capsys):
    scan(source / "pool" / "d_0000.nii.gz", (8, 8, 6, 2), (1, 1, 2, 1))
    (source / "pool" / "e_0000.nii.gz").write_bytes(b"")
    (source / "pool" / "f_0000.nii.gz").symlink_to(source / "gone.nii.gz")
    assert convert(source) == 1
    error = capsys.readouterr().err
    assert "2 labeled and 1 unlabeled" in error and "skipped 3 unlabeled" in error
    assert all(
        text in error for text in ("d_0000.nii.gz: is 4-D", "e_0000.nii.gz: is an empty", "f_0000.nii.gz: is a link to")
    )
    assert list(as_nnunet_reads(raw / "Dataset005_Tiny")[2]) == ["c"]


def test_folders_that_cannot_be_read(source, raw, capsys):
    error = refused(capsys, raw, convert(source, pools=("nowhere",)))
    assert "nowhere: cannot be listed (No such file or directory)" in error
    (source / "empty").mkdir()
    assert "empty: has no .nii.gz" in refused(capsys, raw, convert(source, pools=("empty",)))
    assert "nowhere: cannot be listed (No such file or directory)" in refused(
        capsys, raw, main(["convert", "flare22", str(source / "nowhere")])
    )


@pytest.mark.parametrize("layout", ["folder", "flare22"])
def test_folder_without_permission_is_named(source, raw, monkeypatch, capsys, layout):
    """By hand, as root may read everything."""

    def denied(function):
        def call(folder="."):
            if str(folder) == str(source / "pool"):
                raise PermissionError(13, "Permission denied", folder)
            return function(folder)

        return call

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, denied(getattr(os, name)))
    code = convert(source) if layout == "folder" else main(["convert", "flare22", str(source)])
    assert f"error: {source / 'pool'}: cannot be listed (Permission denied): correct" in refused(capsys, raw, code)


def test_nnunet_raw_not_set(source, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_raw")
    assert convert(source) == 1
    assert "nnUNet_raw is not set: `export nnUNet_raw=" in capsys.readouterr().err


def test_id_or_name_that_cannot_be(source, raw, nnunet_folders, capsys):
    assert "number from 1 to 999" in refused(capsys, raw, convert(source, "-d", "1000"))
    assert "of letters, digits" in refused(capsys, raw, convert(source, "-n", "../Tiny"))
    (nnunet_folders / "nnUNet_preprocessed" / "Dataset005_Other").mkdir()
    assert "hold ['Dataset005_Other'] under this id" in refused(capsys, raw, convert(source))


def test_label_names(source, raw, tmp_path, capsys):
    assert "name each label once" in refused(capsys, raw, convert(source, labels=("one", "one")))
    assert "background is always 0" in refused(capsys, raw, convert(source, labels=("background", "one")))
    (tmp_path / "labels.json").write_text("{")
    assert "labels.json: is no JSON" in refused(capsys, raw, convert(source, labels=[str(tmp_path / "labels.json")]))
    for content, message in (
        ("[1]", "labels.json: the whole file: Input should be a valid dictionary, not [1]"),
        ('{"labels": 3}', "labels.json: labels: Input should be a valid dictionary, not 3"),
        ('{"one": "1"}', "labels.json: labels must be whole numbers"),
        ('{"labels": {"one": 1}, "regions_class_order": "x"}', "labels.json: regions_class_order: Input should be a"),
    ):
        (tmp_path / "labels.json").write_text(content)
        assert message in refused(capsys, raw, convert(source, labels=[str(tmp_path / "labels.json")]))


def test_same_source_again_updates_another_is_refused(source, raw, capsys):
    assert convert(source) == 0
    written = raw / "Dataset005_Tiny" / "dataset.json"
    scan(source / "pool" / "d_0000.nii.gz")
    assert convert(source) == 0
    content = written.read_text()
    assert list(json.loads(content)["unlabeled"]) == ["c", "d"]
    cut(source / "images" / "a_0000.nii.gz")
    assert convert(source) == 1  # and the earlier one stays
    assert written.read_text() == content
    source.rename(source.parent / "other")
    assert convert(source.parent / "other") == 1
    assert "dataset.json exists and was converted from" in capsys.readouterr().err
    for content in ("{}", "[]", '{"converted_from": 3}', '{"converted_'):
        written.write_text(content)
        assert convert(source.parent / "other") == 1
        assert "dataset.json exists and was not written by this command" in capsys.readouterr().err
        assert written.read_text() == content


def test_two_at_once_take_turns(source, raw, monkeypatch, capsys):
    """Another command writes the same data set: it is waited for; then it is one that was converted from elsewhere."""
    from nnunet_diffusion.conversion import dataset

    folder = raw / "Dataset005_Tiny"
    with locked(str(folder / ".nnunet_diffusion" / "lock"), "the data set"):
        monkeypatch.setattr(dataset, "locked", partial(locked, patience_s=0.2))
        assert convert(source) == 1
        message = rf"lock: another command works on the data set {folder} \(process {os.getpid()} on .*: wait for it"
        assert re.search(message, capsys.readouterr().err)
    check, checked = dataset.refuse_unusable, []

    def check_while_another_command_writes(*arguments):
        check(*arguments)
        checked.append((folder / "dataset.json").write_text(json.dumps({"converted_from": ["elsewhere"]})))

    monkeypatch.setattr(dataset, "refuse_unusable", check_while_another_command_writes)
    assert convert(source) == 1 and checked
    assert "dataset.json exists and was converted from ['elsewhere']" in capsys.readouterr().err
    assert sorted(os.listdir(folder)) == [".nnunet_diffusion", "dataset.json"]


def test_names_that_cannot_be_files(source, raw, capfd):
    """In the pool they are skipped, otherwise refused: no UTF-8, which would end the program, a line feed."""
    odd = [source / "pool" / "d\udcff_0000.nii.gz", source / "pool" / "e\nf_0000.nii.gz"]
    for path in odd:
        scan(source / "pool" / "x.nii.gz").rename(path)
    assert convert(source) == 1
    error = capfd.readouterr().err
    assert "2 labeled and 1 unlabeled cases" in error and "skipped 2 unlabeled case(s)" in error
    assert r"pool/d\udcff_0000.nii.gz': 'd\udcff' cannot be the name of a file or folder, it is no UTF-8" in error
    assert r"pool/e\nf_0000.nii.gz': 'e\nf' cannot be the name of a file or folder, it has a control char" in error
    assert list(as_nnunet_reads(raw / "Dataset005_Tiny")[2]) == ["c"]
    before = (raw / "Dataset005_Tiny" / "dataset.json").read_bytes()
    odd[1].rename(source / "images" / "e\nf_0000.nii.gz")
    label(source / "labels" / "e.nii.gz").rename(source / "labels" / "e\nf.nii.gz")
    assert convert(source) == 1
    assert r"labels/e\nf.nii.gz': 'e\nf' cannot be the name" in capfd.readouterr().err
    assert (raw / "Dataset005_Tiny" / "dataset.json").read_bytes() == before


def test_folder_that_is_no_utf8(source, raw, capfd):
    source.rename(source.parent / "so\udcffurce")
    assert convert(source.parent / "so\udcffurce", pools=()) == 1
    error = capfd.readouterr().err
    assert r"so\udcffurce/images/a_0000.nii.gz': is no UTF-8, which image readers need: rename" in error
    assert list(raw.iterdir()) == []


@pytest.mark.parametrize(
    ("training", "pools"),
    [
        ((FLARE22_TRAINING + "/images", FLARE22_TRAINING + "/labels"), ("Training/FLARE22_UnlabeledCase1-1000",)),
        (
            ("FLARE22Train/images", "FLARE22Train/labels"),
            ("FLARE22_UnlabeledCase1-500", "FLARE22_UnlabeledCase501-1000"),
        ),
        (("labeled_image", "labeled_mask"), ("unlabeled_image",)),
        (("imagesTr", "labelsTr"), ("Unlabeled/part1", "Unlabeled/part2")),
        ((".", "."), (".",)),
        ((FLARE22_TRAINING + "/images", FLARE22_TRAINING + "/labels"), ()),
    ],
)
def test_flare22_in_any_folders(tmp_path, raw, training, pools):
    source = tmp_path / "FLARE22"
    for number in (1, 50):
        scan(source / training[0] / f"FLARE22_Tr_{number:04d}_0000.nii.gz")
        label(source / training[1] / f"FLARE22_Tr_{number:04d}.nii.gz", values=range(14))
    for number, pool in enumerate(pools):
        scan(source / pool / f"Case_{number + 1:05d}_0000.nii.gz")
    for folder in ("Validation", "Testing"):  # the same names in both, as published
        scan(source / folder / "FLARETs_0001_0000.nii.gz")
    (source / "__MACOSX").mkdir()
    (source / "__MACOSX" / "._FLARE22_Tr_0001_0000.nii.gz").write_bytes(b"macOS")
    converted = convert_flare22(str(source))
    content, labeled, unlabeled = as_nnunet_reads(raw / "Dataset022_FLARE22")
    assert list(labeled) == ["FLARE22_Tr_0001", "FLARE22_Tr_0050"]
    assert labeled["FLARE22_Tr_0050"]["label"].endswith("FLARE22_Tr_0050.nii.gz")
    assert list(unlabeled) == [f"Case_{number + 1:05d}" for number in range(len(pools))]
    assert converted.notes == ["left 2 scan(s) that are not for this training where they are"]
    assert len(content["labels"]) == 14
    assert (content["labels"]["right kidney"], content["labels"]["left kidney"]) == (2, 13)


def test_scans_of_different_orientation_are_turned_to_one(source, raw, capsys):
    """Otherwise what is left in one scan is right in the other; a later one may be stored as none of these."""
    assert convert(source) == 0
    content = json.loads((raw / "Dataset005_Tiny" / "dataset.json").read_text())
    assert content["overwrite_image_reader_writer"] == "NibabelIOWithReorient"
    assert "stored as" not in capsys.readouterr().out
    for path in (source / "images" / "b_0000.nii.gz", source / "labels" / "b.nii.gz"):
        image = sitk.ReadImage(str(path))
        image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1))
        sitk.WriteImage(image, str(path))
    assert convert(source) == 0
    assert "scans are stored as LPS, RPS: NibabelIOWithReorient turns all to RAS" in capsys.readouterr().out
    content = json.loads((raw / "Dataset005_Tiny" / "dataset.json").read_text())
    assert content["overwrite_image_reader_writer"] == "NibabelIOWithReorient"


def test_flare22_bad_input(tmp_path, raw, capsys):
    source = tmp_path / "FLARE22"
    scan(source / "a" / "Case_00001_0000.nii.gz")
    error = refused(capsys, raw, main(["convert", "flare22", str(source)]))
    assert "has no case in or below it, an image such as CASE_0000.nii.gz with a label CASE.nii.gz" in error
    scan(source / "a" / "FLARE22_Tr_0001_0000.nii.gz")
    label(source / "FLARE22_Tr_0002.nii.gz")
    scan(source / "b" / "Case_00001_0000.nii.gz")
    error = refused(capsys, raw, main(["convert", "flare22", str(source)]))
    assert "FLARE22_Tr_0001_0000.nii.gz has no label" in error and "FLARE22_Tr_0002.nii.gz has no image" in error
    assert "Case_00001: is there twice" in error


def test_flare22_example(raw, shared_data, capsys):
    assert main(["convert", "flare22", str(shared_data / "flare_example"), "-d", "23", "-n", "Example", "--copy"]) == 0
    assert "no training case: took its labeled evaluation cases instead" in capsys.readouterr().out
    _, labeled, _ = as_nnunet_reads(raw / "Dataset023_Example")
    assert list(labeled) == ["FLARE22_Ts_0001", "FLARE22_Ts_0002", "FLARE22_Ts_0003"]
