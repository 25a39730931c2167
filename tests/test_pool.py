"""The unlabeled pool and the labeled cases: preprocessed as nnU-Net does, once, whole or not at all."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from os.path import join
from pathlib import Path

import blosc2
import nnunetv2.utilities.utils
import numpy as np
import pytest
import SimpleITK as sitk
import tiny_dataset
from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from running import PYTHON, run_command

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import NotWritten, write_json
from nnunet_diffusion.marks import mark, mark_of
from nnunet_diffusion.preprocessing import preprocess as preprocessing
from nnunet_diffusion.preprocessing import replacement
from nnunet_diffusion.preprocessing.body import KEY, body_locations, in_body
from nnunet_diffusion.preprocessing.cases import labeled_files, pool_folder, pool_identifiers
from nnunet_diffusion.preprocessing.fingerprint import fingerprint_labeled, fingerprint_unlabeled, measure
from nnunet_diffusion.preprocessing.preprocess import preprocess_case, preprocess_labeled, preprocess_pool
from nnunet_diffusion.preprocessing.scan_checks import label_values
from nnunet_diffusion.pretraining import images
from nnunet_diffusion.pretraining.images import (
    ImageDataset,
    Outside,
    image_loader,
    image_statistics,
)
from nnunet_diffusion.workers import HERE, Workers

INTENSITIES = {"mean": 200.0, "std": 30.0, "percentile_00_5": 120.0, "percentile_99_5": 280.0}


@pytest.fixture
def dataset(nnunet_folders):
    """The raw tiny data set and a plan for it that resamples; returns (raw, preprocessed, plans manager)."""
    raw = tiny_dataset.make(nnunet_folders / "nnUNet_raw", labeled=2)
    preprocessed = nnunet_folders / "nnUNet_preprocessed" / tiny_dataset.NAME
    preprocessed.mkdir()
    write_json(preprocessed / "Plans.json", plans())
    (preprocessed / "dataset.json").write_text((raw / "dataset.json").read_text())
    return raw, str(preprocessed), PlansManager(plans())


def test_labeled_files_are_found_as_nnunet_finds_them_without_a_fork(tmp_path, monkeypatch):
    names = [f"imagesTr/{case}_{c:04d}.nii.gz" for case in ("b", "a", "a_b", "a.b") for c in (1, 0)]
    for name in [*names, "imagesTr/a_0000.json", "imagesTr/a_0000.nii", "labelsTr/a.nii.gz"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    content = {"file_ending": ".nii.gz"}
    expected = get_filenames_of_train_images_and_targets(str(tmp_path), content)
    monkeypatch.setattr(os, "fork", None)
    monkeypatch.setattr(nnunetv2.utilities.utils, "Pool", None)
    assert labeled_files(str(tmp_path), content) == expected and len(expected) == 4
    content["dataset"] = {"c": {"images": ["imagesTr/a_0000.nii.gz"], "label": "/elsewhere/c.nii.gz"}}
    assert labeled_files(str(tmp_path), content) == {
        "c": {"images": [str(tmp_path / "imagesTr/a_0000.nii.gz")], "label": "/elsewhere/c.nii.gz"}
    }


def plans() -> dict:
    """The part of a plan that preprocessing reads."""
    resampling = {"order": 3, "order_z": 0, "force_separate_z": None}
    return {
        "dataset_name": tiny_dataset.NAME,
        "plans_name": "Plans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [1, 0, 2],
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {"0": dict(INTENSITIES)},
        "configurations": {
            "3d_fullres": {
                "data_identifier": "Plans_3d_fullres",
                "preprocessor_name": "DefaultPreprocessor",
                "patch_size": [16, 16, 16],
                "spacing": [2.4, 2.0, 2.0],
                "normalization_schemes": ["CTNormalization"],
                "use_mask_for_norm": [False],
                "resampling_fn_data": "resample_data_or_seg_to_shape",
                "resampling_fn_data_kwargs": {"is_seg": False, **resampling},
                "resampling_fn_seg": "resample_data_or_seg_to_shape",
                "resampling_fn_seg_kwargs": {"is_seg": True, **resampling, "order": 1},
                "architecture": {},
            }
        },
    }


def preprocess(plans_manager, number=1) -> tuple[str, dict]:
    """Makes the pool; returns its folder and the failures."""
    failures = preprocess_pool(tiny_dataset.NAME, plans_manager, "3d_fullres", Workers(number))
    base = join(os.environ["nnUNet_preprocessed"], tiny_dataset.NAME)
    return pool_folder(base, "Plans_3d_fullres"), failures


def voxels(folder, name) -> np.ndarray:
    return blosc2.open(join(folder, name + ".b2nd"))[:]


def files(folder) -> list[str]:
    return sorted(name for name in os.listdir(folder) if os.path.isfile(join(folder, name)))


def assert_same(folder, other) -> None:
    """The same files with the same arrays and properties; threads order the blocks in a file, so bytes may differ."""
    assert files(folder) == files(other)
    for name in files(folder):
        if name.endswith(".b2nd"):
            found, expected = (blosc2.open(join(f, name)) for f in (folder, other))
            assert found.dtype == expected.dtype and found.chunks == expected.chunks and found.blocks == expected.blocks
            np.testing.assert_array_equal(found[:], expected[:])
        else:
            found, expected = (pickle.loads(Path(f, name).read_bytes()) for f in (folder, other))
            expected.setdefault(KEY, found[KEY])  # nnU-Net's own does not look for the body
            np.testing.assert_equal(found, expected)


def times(folder) -> dict[str, int]:
    return {name: os.stat(join(folder, name)).st_mtime_ns for name in files(folder)}


def test_pool_holds_what_the_plans_preprocessor_makes(dataset):
    raw, _, plans_manager = dataset
    folder, failures = preprocess(plans_manager)
    assert failures == {}
    assert pool_identifiers(folder) == ["u0", "u1", "u2", "u3"]
    configuration = plans_manager.get_configuration("3d_fullres")
    for case in pool_identifiers(folder):
        expected, _, properties = configuration.preprocessor_class(verbose=False).run_case(
            [str(raw / "scans" / f"{case}.nii.gz")], None, plans_manager, configuration, {}
        )
        np.testing.assert_array_equal(voxels(folder, case), expected)
        with open(join(folder, case + ".pkl"), "rb") as f:
            assert pickle.load(f)["spacing"] == properties["spacing"]
    assert sorted(os.listdir(folder)) == sorted(
        [".nnunet_diffusion", *(f"u{i}{ending}" for i in range(4) for ending in (".b2nd", ".pkl"))]
    )


@pytest.mark.slow
def test_labeled_cases_are_nnunets_own(dataset, nnunet_folders, monkeypatch):
    _, preprocessed, plans_manager = dataset
    preprocess_labeled(tiny_dataset.NAME, plans_manager, "3d_fullres")
    stock_folder = nnunet_folders / "stock" / tiny_dataset.NAME
    os.makedirs(stock_folder)
    for name in ("Plans.json", "dataset.json"):
        (stock_folder / name).write_bytes(open(join(preprocessed, name), "rb").read())
    monkeypatch.setenv("nnUNet_preprocessed", str(nnunet_folders / "stock"))
    preprocess_dataset(9, "Plans", ("3d_fullres",), (1,))
    assert len(files(stock_folder / "Plans_3d_fullres")) == 6
    assert_same(join(preprocessed, "Plans_3d_fullres"), stock_folder / "Plans_3d_fullres")
    folder, _ = preprocess(plans_manager)  # u0 shows what l0 shows
    np.testing.assert_array_equal(voxels(folder, "u0"), voxels(stock_folder / "Plans_3d_fullres", "l0"))
    assert (
        blosc2.open(join(folder, "u0.b2nd")).chunks == blosc2.open(stock_folder / "Plans_3d_fullres" / "l0.b2nd").chunks
    )


def test_only_missing_changed_and_unfinished_cases_are_done(dataset):
    raw, _, plans_manager = dataset
    folder, _ = preprocess(plans_manager)
    complete, before = shutil.copytree(folder, folder + "_complete"), times(folder)
    assert preprocess(plans_manager)[1] == {} and times(folder) == before
    os.remove(join(folder, "u0.pkl"))
    os.remove(join(folder, "u1.b2nd"))  # what a kill between the two moves leaves
    os.makedirs(join(folder, ".nnunet_diffusion", "u1"))
    open(join(folder, ".nnunet_diffusion", "u1", "u1.b2nd"), "w").close()  # a stale temporary
    later = time.time() + 1
    os.utime(raw / "scans" / "u2.nii.gz", (later, later))
    assert pool_identifiers(folder) == ["u2", "u3"]
    preprocess(plans_manager)
    assert_same(folder, complete)
    after = times(folder)
    assert {name[:2] for name in after if after[name] != before[name]} == {"u0", "u1", "u2"}
    assert os.listdir(join(folder, ".nnunet_diffusion")) == ["identity.json"]


def test_case_that_left_the_data_set_leaves_the_pool(dataset):
    raw, _, plans_manager = dataset
    folder, _ = preprocess(plans_manager)
    description = json.loads((raw / "dataset.json").read_text())
    del description["unlabeled"]["u3"]
    (raw / "dataset.json").write_text(json.dumps(description))
    preprocess(plans_manager)
    assert {name[:2] for name in files(folder)} == {"u0", "u1", "u2"}


def test_pool_of_another_plan_is_done_anew(dataset, capsys):
    _, _, plans_manager = dataset
    folder, _ = preprocess(plans_manager)
    before = times(folder)
    preprocess(PlansManager(other_plans()))
    assert "made with other intensities: done anew" in capsys.readouterr().out
    assert not set(times(folder).values()) & set(before.values())
    # (x - 100) / 30 instead of (x - 200) / 30
    first = voxels(folder, "u0")
    preprocess(plans_manager)
    np.testing.assert_allclose(first - voxels(folder, "u0"), 100 / 30, atol=1e-4)


def other_plans() -> dict:
    """Plans by which every preprocessed scan has other values."""
    other = plans()
    other["foreground_intensity_properties_per_channel"]["0"]["mean"] = 100.0
    return other


class Killed(Exception):
    """As if the process had ended here."""


def test_cases_of_another_plan_stay_until_the_new_ones_are_whole(dataset, monkeypatch):
    """Killed at each step of the replacement, the same command continues to what one run makes."""
    _, preprocessed, plans_manager = dataset
    other = PlansManager(other_plans())
    expected = shutil.move(preprocess(other)[0], join(preprocessed, "expected"))
    folder, _ = preprocess(plans_manager)
    old, before = shutil.copytree(folder, folder + "_copy"), times(folder)
    done = []

    def killed(*arguments, **named):
        if len(done) == 2:
            raise Killed
        done.append(arguments[0])
        return preprocess_case(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "preprocess_case", killed)
        with pytest.raises(Killed):
            preprocess(other)
    new = join(preprocessed, ".new_Plans_3d_fullres_unlabeled")
    assert times(folder) == before and pool_identifiers(new) == done == ["u0", "u1"]
    assert mark_of(new) == mark_of(expected) and mark_of(new)["folder"] == "Plans_3d_fullres_unlabeled"

    kept, rename, renamed = times(new), os.rename, []

    def killed_after_the_first(*arguments):
        if renamed:
            raise Killed
        renamed.append(arguments)
        rename(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed_after_the_first)
        with pytest.raises(Killed):
            preprocess(other)
    assert not os.path.exists(folder) and kept.items() <= times(new).items()
    with monkeypatch.context() as patch:
        patch.setattr(replacement, "remove_marked", lambda path, **_: 1 / int(not os.path.isdir(path)))
        with pytest.raises(ZeroDivisionError):
            preprocess(other)
    assert_same(folder, expected)
    assert_same(join(preprocessed, ".old_Plans_3d_fullres_unlabeled"), old)
    there = times(folder)
    preprocess(other)
    assert times(folder) == there and kept.items() <= there.items()
    assert not [name for name in os.listdir(preprocessed) if name.startswith((".new", ".old"))]


def test_a_plan_that_is_taken_back_finds_its_cases_as_they_were(dataset, monkeypatch):
    _, preprocessed, plans_manager = dataset
    folder, _ = preprocess(plans_manager)
    before = times(folder)
    with monkeypatch.context() as patch:
        patch.setattr(preprocessing, "preprocess_case", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            preprocess(PlansManager(other_plans()))
    preprocess(plans_manager)
    assert times(folder) == before and not os.path.exists(join(preprocessed, ".new_Plans_3d_fullres_unlabeled"))


def test_a_pool_is_not_replaced_by_nothing(dataset):
    """As when the drive with the scans is away."""
    raw, _, plans_manager = dataset
    folder, _ = preprocess(plans_manager)
    before = times(folder)
    os.rename(raw / "scans", raw / "away")
    assert set(preprocess(PlansManager(other_plans()))[1]) == {"u0", "u1", "u2", "u3"} and times(folder) == before
    os.rename(raw / "away", raw / "scans")
    assert preprocess(PlansManager(other_plans()))[1] == {} and not set(before.values()) & set(times(folder).values())


@pytest.mark.parametrize("mark_it, message", [
    (lambda folder: None, "was not made by nnunet_diffusion"),
    (lambda folder: mark(folder, dataset="Dataset010_A"), "was made for dataset 'Dataset010_A', not 'Dataset009_Tiny'"),
    (lambda folder: mark(folder, cases="labeled"), "was made for cases 'labeled', not 'unlabeled'"),
])  # fmt: skip
@pytest.mark.parametrize("part", [(), (2, 0)])
def test_a_folder_that_is_not_ours_stays_as_it_is(dataset, mark_it, message, part):
    _, preprocessed, plans_manager = dataset
    folder = join(preprocessed, "Plans_3d_fullres_unlabeled")
    os.makedirs(folder)
    mark_it(folder)
    open(join(folder, "u9.b2nd"), "w").close()
    with pytest.raises(UserError, match=f"Plans_3d_fullres_unlabeled: {message}.*: move it away, or remove it"):
        preprocess_pool(tiny_dataset.NAME, plans_manager, "3d_fullres", HERE, *part)
    assert files(folder) == ["u9.b2nd"]


def test_a_pool_of_the_version_before_is_used_again_and_marked(dataset):
    """Its identity.json holds what decides the values, and nothing of the data set."""
    _, _, plans_manager = dataset
    folder, _ = preprocess(plans_manager)
    before, said = times(folder), mark_of(folder)
    earlier = {key: said[key] for key in said if key not in ("dataset", "folder", "cases", "configuration")}
    assert sorted(earlier) == sorted([
        "preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data",
        "resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs", "transpose_forward",
        "image_reader_writer", "intensities",
    ])  # fmt: skip
    write_json(join(folder, ".nnunet_diffusion", "identity.json"), earlier)
    preprocess(plans_manager)
    assert times(folder) == before and mark_of(folder) == said


def test_what_a_user_put_into_the_folder_stays(dataset):
    raw, _, plans_manager = dataset
    folder, _ = preprocess(plans_manager)
    for name in ("notes.txt", "u9.pkl", "u9.b2nd"):
        open(join(folder, name), "w").close()
    preprocess(plans_manager)
    assert {"notes.txt"} == {name for name in files(folder) if name[:2] not in ("u0", "u1", "u2", "u3")}


@pytest.mark.parametrize("key, value, message", [
    ("preprocessor_name", "Nothing", "preprocessor_name: nnU-Net has no 'Nothing'"),
    ("resampling_fn_seg_kwargs", None, "resampling_fn_seg_kwargs: .*valid dictionary"),
])  # fmt: skip
def test_a_plan_that_nnunet_cannot_preprocess_by_costs_nothing(dataset, key, value, message):
    _, _, plans_manager = dataset
    folder, _ = preprocess(plans_manager)
    before, other = times(folder), plans()
    other["configurations"]["3d_fullres"][key] = value
    with pytest.raises(UserError, match=f"Plans.json: .*{message}.*--replan"):
        preprocess(PlansManager(other))
    assert times(folder) == before


def test_damaged_files_of_ours_are_measured_anew(dataset, capsys):
    _, preprocessed, _ = dataset
    assert fingerprint_unlabeled(tiny_dataset.NAME) == {}
    file = join(preprocessed, "unlabeled_fingerprint.json")
    whole = open(file).read()
    for left in ("", whole[:200], "[]", '{"u0": {"files": 3}}'):
        with open(file, "w") as f:
            f.write(left)
        assert fingerprint_unlabeled(tiny_dataset.NAME) == {} and open(file).read() == whole
        assert "unlabeled_fingerprint.json: " in (said := capsys.readouterr().out) and ": measured anew" in said


def test_labeled_cases_are_measured_anew_only_if_need_be(dataset, capsys, monkeypatch):
    """A kill can leave nnU-Net's dataset_fingerprint.json half written."""
    _, preprocessed, _ = dataset
    fingerprint = {
        "spacings": [[3.0, 2.0, 2.0]] * 2,
        "shapes_after_crop": [[24, 32, 32]] * 2,
        "foreground_intensity_properties_per_channel": {"0": dict(INTENSITIES)},
        "median_relative_size_after_cropping": 1.0,
    }
    file, runs = join(preprocessed, "dataset_fingerprint.json"), []

    def run(self, overwrite_existing):
        runs.append(overwrite_existing)
        write_json(file, fingerprint)

    monkeypatch.setattr("nnunet_diffusion.preprocessing.fingerprint.DatasetFingerprintExtractor.run", run)
    for _ in range(2):
        fingerprint_labeled(tiny_dataset.NAME)
    assert runs == [True] and capsys.readouterr().out == ""
    for damaged in (file, join(preprocessed, "labeled_files.json")):
        whole = open(damaged).read()
        for number, left in enumerate(("", whole[: len(whole) // 2], "{}"), 2):
            with open(damaged, "w") as f:
                f.write(left)
            fingerprint_labeled(tiny_dataset.NAME)
            assert open(damaged).read() == whole and len(runs) == number
            assert f"{damaged}: " in (said := capsys.readouterr().out) and ": measured anew" in said
        runs[1:] = []


def spoil(raw, case: str, how: str) -> None:
    path = raw / "scans" / f"{case}.nii.gz"
    image = tiny_dataset.scan(0)[0].astype(np.float32)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "missing":
        path.unlink()
    elif how == "4-D":
        sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(image)] * 2), str(path))
    else:
        image[...] = 0 if how == "constant" else image
        image[3, 3, 3] = np.nan if how == "NaN" else image[3, 3, 3]
        tiny_dataset.write(path, image, (3, 2, 2))


@pytest.mark.parametrize("how", ["truncated", "empty", "missing", "4-D", "constant", "NaN"])
def test_bad_scan_is_skipped_and_named(dataset, how):
    raw, preprocessed, plans_manager = dataset
    spoil(raw, "u1", how)
    folder, failures = preprocess(plans_manager)
    assert list(failures) == ["u1"] and "u1.nii.gz: " in failures["u1"]
    assert pool_identifiers(folder) == ["u0", "u2", "u3"]
    assert {name[:2] for name in files(folder)} == {"u0", "u2", "u3"}
    measured = fingerprint_unlabeled(tiny_dataset.NAME)
    assert measured == failures
    assert json.load(open(join(preprocessed, "unlabeled_fingerprint.json")))["u1"]["problem"] == failures["u1"]


def test_full_disk_names_the_case_and_leaves_nothing_half_done(dataset, monkeypatch):
    _, _, plans_manager = dataset

    def save_case(data, seg, properties, path, **_):
        open(path + ".b2nd", "w").close()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("nnunet_diffusion.preprocessing.preprocess.nnUNetDatasetBlosc2.save_case", save_case)
        with pytest.raises(OSError, match="u0 was not written to .*MB are free: No space left.*; make room"):
            preprocess(plans_manager)
    folder, failures = preprocess(plans_manager)
    assert failures == {} and len(pool_identifiers(folder)) == 4


@pytest.mark.parametrize("where", ["run_case", "save_case"])
def test_labeled_case_that_cannot_be_preprocessed_is_not_blamed_on_the_disk(dataset, monkeypatch, where):
    raw, _, plans_manager = dataset
    owner = {"run_case": DefaultPreprocessor, "save_case": nnUNetDatasetBlosc2}[where]

    def fail(*_, **__):
        raise RuntimeError("of torch or blosc2")

    monkeypatch.setattr(owner, where, fail)
    image = raw / "scans" / "l0.nii.gz"
    kind, message = {
        "run_case": (UserError, rf"^{image}: nnU-Net cannot preprocess this: RuntimeError\('of torch or blosc2'\)"),
        "save_case": (NotWritten, "^l0 was not written to .*MB are free: of torch or blosc2; make room"),
    }[where]
    with pytest.raises(kind, match=message):
        preprocess_labeled(tiny_dataset.NAME, plans_manager, "3d_fullres")


def test_scan_that_could_not_be_read_is_tried_again(dataset, monkeypatch):
    """Permissions and a network drive that was away change neither its size nor its time."""
    with monkeypatch.context() as patch:
        patch.setattr("nnunet_diffusion.preprocessing.fingerprint.measure", lambda *_: {"problem": "Permission denied"})
        assert set(fingerprint_unlabeled(tiny_dataset.NAME)) == {"u0", "u1", "u2", "u3"}
    assert fingerprint_unlabeled(tiny_dataset.NAME) == {}


def test_scans_are_measured_once(dataset, monkeypatch):
    raw, preprocessed, _ = dataset
    assert fingerprint_unlabeled(tiny_dataset.NAME) == {}
    found = json.load(open(join(preprocessed, "unlabeled_fingerprint.json")))
    assert found["u1"]["spacing"] == [2.5, 2, 2] and found["u1"]["shape_after_crop"] == [24, 32, 32]
    spoil(raw, "u2", "NaN")
    measured = []
    monkeypatch.setattr(
        "nnunet_diffusion.preprocessing.fingerprint.measure", lambda *args: measured.append(args[1]) or measure(*args)
    )
    assert list(fingerprint_unlabeled(tiny_dataset.NAME)) == ["u2"]
    assert measured == [[str(raw / "scans" / "u2.nii.gz")]]


def test_measures_are_nnunets(tmp_path):
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    image, label = tiny_dataset.scan(0)
    image[:3] = image[:, :, 30:] = 0  # cropped away
    image_file = tiny_dataset.write(tmp_path / "i.nii.gz", image, (3, 2, 1))
    label_file = tiny_dataset.write(tmp_path / "l.nii.gz", label, (3, 2, 1))
    shape, spacing, *_ = DatasetFingerprintExtractor.analyze_case([image_file], label_file, SimpleITKIO)
    assert measure(SimpleITKIO, [image_file]) == {"spacing": spacing, "shape_after_crop": list(shape)}
    assert shape == (21, 32, 30)


def test_regions_and_ignore_label_declare_all_their_values():
    assert label_values({"background": 0, "organ": [1, 2], "lesion": [2], "ignore": 3}) == [0, 1, 2, 3]


@pytest.mark.slow
def test_killed_and_continued_is_as_if_never_killed(dataset):
    raw, preprocessed, plans_manager = dataset
    folder, _ = preprocess(plans_manager)
    uninterrupted = folder + "_uninterrupted"
    os.rename(folder, uninterrupted)
    script = (
        "import sys\n"
        "if __name__ == '__main__':\n"
        "    from nnunet_diffusion.preprocessing.preprocess import preprocess_pool\n"
        "    from nnunet_diffusion.workers import Workers\n"
        "    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager\n"
        "    plans_manager = PlansManager(sys.argv[1])\n"
        f"    preprocess_pool({tiny_dataset.NAME!r}, plans_manager, '3d_fullres', Workers(2))\n"
    )
    script_file = raw / "make_pool.py"
    script_file.write_text(script)
    command = [PYTHON, str(script_file), join(preprocessed, "Plans.json")]
    done = -1
    for _ in range(3):  # kills when the next file appears; what is there then stays
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(pool_files(folder)) <= done + 1:
            time.sleep(0.0005)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = len(pool_files(folder))
        for case in pool_identifiers(folder):
            np.testing.assert_array_equal(voxels(folder, case), voxels(uninterrupted, case))
    assert done > 0, "never killed in the middle"
    run_command(command).check_returncode()
    assert_same(folder, uninterrupted)
    assert os.listdir(join(folder, ".nnunet_diffusion")) == ["identity.json"]


def pool_files(folder) -> list[str]:
    return [name for name in os.listdir(folder) if name[0] == "u"] if os.path.isdir(folder) else []


def test_parts_of_the_pool_are_done_beside_each_other(dataset):
    _, preprocessed, plans_manager = dataset
    folder, failures = preprocess(plans_manager)
    whole = pool_identifiers(folder)
    arrays = {case: blosc2.open(join(folder, case + ".b2nd"))[:] for case in whole}
    shutil.rmtree(folder)

    def part(part_id, plan=plans_manager):
        return preprocess_pool(tiny_dataset.NAME, plan, "3d_fullres", HERE, 2, part_id)

    assert part(1) == {} and pool_identifiers(folder) == whole[1::2]
    busy = join(folder, ".nnunet_diffusion", "another machine works here")
    for name in (busy, join(folder, ".nnunet_diffusion", f"{whole[0]}@1a2b")):  # the second is what a dead part left
        os.makedirs(name)
    assert part(0) == {} and pool_identifiers(folder) == whole and os.path.isdir(busy)
    assert all(np.array_equal(blosc2.open(join(folder, c + ".b2nd"))[:], arrays[c]) for c in whole)
    other = plans()
    other["configurations"]["3d_fullres"]["spacing"] = [2.0, 2.0, 2.0]
    with pytest.raises(UserError, match="made with another plan"):
        part(0, PlansManager(other))
    assert pool_identifiers(folder) == whole


PART = f"""
import os, sys, time
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunet_diffusion.preprocessing.preprocess import preprocess_pool
from nnunet_diffusion.workers import Workers
plans, part, started = PlansManager(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
open(os.path.join(started, str(part)), "w").close()
while len(os.listdir(started)) < 2:
    time.sleep(0.0005)
assert preprocess_pool({tiny_dataset.NAME!r}, plans, "3d_fullres", Workers(), 2, part) == {{}}
"""


@pytest.mark.slow
def test_two_parts_that_begin_at_the_same_moment_make_what_one_process_makes(dataset, tmp_path):
    _, preprocessed, plans_manager = dataset
    folder, _ = preprocess(plans_manager)
    whole = shutil.move(folder, folder + "_whole")
    (tmp_path / "started").mkdir()
    arguments = [join(preprocessed, "Plans.json"), str(tmp_path / "started")]
    commands = [[sys.executable, "-c", PART, arguments[0], part, arguments[1]] for part in "01"]
    with ThreadPool(2) as both:
        for done in both.imap(lambda command: run_command(command, 200), commands):
            assert done.returncode == 0, done.stderr
    assert_same(folder, whole)
    assert os.listdir(join(folder, ".nnunet_diffusion")) == ["identity.json"]


def test_what_is_outside_the_body_is_marked_as_nnunet_does():
    """-1 where all channels are 0; voxel by voxel, for a part as for the whole."""
    image = np.random.default_rng(0).integers(0, 2, (2, 4, 5, 6))
    expected = np.zeros((1, 4, 5, 6), int)
    for z, y, x in np.ndindex(4, 5, 6):
        expected[0, z, y, x] = -1 if image[0, z, y, x] == 0 and image[1, z, y, x] == 0 else 0
    labels = Outside(image)
    assert labels.shape == (1, 4, 5, 6) and expected.min() == -1 and expected.max() == 0
    part = (slice(0, 1), slice(1, 3), slice(0, 4), slice(2, 6))
    np.testing.assert_array_equal(labels[part], expected[part])
    np.testing.assert_array_equal(labels[(slice(None),) * 4], expected)


def test_patches_are_centered_on_the_body(tmp_path):
    """A bright box in dark air: all of it is found, and little else; with a share of 1 nearly all patches lie in it."""
    image = np.random.default_rng(0).normal(-1, 0.05, (1, 20, 30, 40)).astype(np.float32)
    image[0, 4:16, 10:20, 15:25] += 1
    found = body_locations(image, 5000)
    assert len(found) < 1.1 * 1200 and (image[tuple(found.T)] > -0.5).sum() == 1200
    assert body_locations(image, 50).shape == (50, 4) and len(body_locations(np.zeros((1, 4, 4, 4)))) == 0
    blosc2.asarray(image, urlpath=str(tmp_path / "scan.b2nd"))
    labels = PlansManager({"configurations": {}}).get_label_manager({"labels": {"background": 0, "box": 1}})
    for share, least, most in ((1.0, 0.9, 1.0), (0.0, 0.0, 0.5)):
        loader = image_loader(ImageDataset([str(tmp_path / "scan")]), 8, (4, 4, 4), (4, 4, 4), labels, body_share=share)
        centers = np.concatenate([next(loader)["data"][:, 0, 2, 2, 2].numpy() for _ in range(4)])
        assert least <= (centers > -0.5).mean() <= most


def test_the_body_is_searched_when_a_scan_is_preprocessed_and_not_again(dataset, monkeypatch):
    """Of scans without kept locations, as earlier versions and nnU-Net make them, it is searched as ever."""
    folder, _ = preprocess(dataset[2])
    cases = [join(folder, case) for case in pool_identifiers(folder)]
    expected = {case: body_locations(blosc2.open(f"{case}.b2nd")[:1]) for case in cases}
    older, missing = cases[:2]
    properties = pickle.loads(Path(f"{older}.pkl").read_bytes())
    del properties[KEY]
    Path(f"{older}.pkl").write_bytes(pickle.dumps(properties))
    os.remove(f"{missing}.pkl")
    searched = []
    monkeypatch.setattr(images, "body_locations", lambda image: searched.append(1) or body_locations(image))
    data = ImageDataset(cases)
    data.finds_body = True
    for number, case in enumerate(cases, 1):
        locations = data.load_case(case)[3]["class_locations"][1]
        np.testing.assert_array_equal(locations, expected[case])
        assert len(locations) and len(searched) == min(number, 2)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_the_share_of_patches_on_the_body_does_not_depend_on_the_batch(tmp_path, batch_size):
    """A body of one voxel, of which a random patch of 2700 has it in its center: two thirds of 600 patches do."""
    image = np.zeros((1, 9, 15, 20), np.float32)
    image[0, 4, 7, 10] = 1
    blosc2.asarray(image, urlpath=str(tmp_path / "scan.b2nd"))
    labels = PlansManager({"configurations": {}}).get_label_manager({"labels": {"background": 0, "box": 1}})
    data = ImageDataset([str(tmp_path / "scan")])
    loader = image_loader(data, batch_size, (3, 3, 3), (3, 3, 3), labels, body_share=0.67)
    on_body = np.concatenate([next(loader)["data"][:, 0, 1, 1, 1].numpy() for _ in range(600 // batch_size)])
    assert abs(on_body.mean() - 0.67) < 0.06  # three standard deviations
    per_batch = on_body.reshape(-1, batch_size).sum(1)
    assert set(per_batch) == set(range(batch_size + 1)), "every number from none to all occurs"


def test_noise_is_measured_in_what_varies_inside_the_body(tmp_path):
    """CT as a plan clips it: air at -3, soft tissue N(0, 0.2), bone at 4, which moves the root mean square alone."""
    rng = np.random.default_rng(0)
    for bone in (10, 40):
        image = np.full((1, 40, 50, 60), -3, np.float32)
        image[0, 10:30, 10:40, 10:50] = rng.normal(0, 0.2, (20, 30, 40))
        image[0, 12:14, 12:38, 5 : 5 + bone] = 4
        blosc2.asarray(image, urlpath=str(tmp_path / f"scan_{bone}.b2nd"))
        np.testing.assert_array_equal(in_body(image), image > -2)
    statistics = image_statistics(ImageDataset([str(tmp_path / f"scan_{bone}") for bone in (10, 40)]))
    np.testing.assert_allclose(statistics.spread, [0.2], rtol=0.1)
    assert (statistics.low, statistics.high) == (-3, 4)


def test_images_without_a_body_have_a_spread_too(tmp_path):
    """Constant channels: the root mean square; a channel of zeros is an error."""
    blosc2.asarray(np.full((1, 4, 5, 6), 2, np.float32), urlpath=str(tmp_path / "flat.b2nd"))
    np.testing.assert_allclose(image_statistics(ImageDataset([str(tmp_path / "flat")])).spread, [2])
    blosc2.asarray(np.zeros((1, 4, 5, 6), np.float32), urlpath=str(tmp_path / "empty.b2nd"))
    with pytest.raises(ValueError, match="a channel is empty"):
        image_statistics(ImageDataset([str(tmp_path / "empty")]))
