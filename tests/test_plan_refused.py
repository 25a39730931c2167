"""What `nnunet_diffusion plan_and_preprocess` refuses before it writes or removes anything."""

import functools
import json
import os
import re

import minimal
import pytest
import tiny_dataset
from tqdm import tqdm

from nnunet_diffusion import locks
from nnunet_diffusion.cli import main
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.preprocessing.cases import fold_of, read_splits


@pytest.fixture
def planned(nnunet_folders):
    """A raw data set and a plan for it, as if preprocessed; returns both folders."""
    raw = tiny_dataset.make(nnunet_folders / "nnUNet_raw", labeled=2, unlabeled=1)
    preprocessed = nnunet_folders / "nnUNet_preprocessed" / tiny_dataset.NAME
    for name in ("nnUNetCompactPlans_2d", "gt_segmentations"):
        (preprocessed / name).mkdir(parents=True)
        (preprocessed / name / "l0.b2nd").write_bytes(b"x")
    plans = minimal.plans("2d", name="nnUNetCompactPlans") | {"dataset_name": tiny_dataset.NAME}
    resampling = {f"resampling_fn_{of}": "resample_data_or_seg_to_shape" for of in ("data", "seg")}
    plans["configurations"]["2d"] |= resampling | {f"{key}_kwargs": {} for key in resampling}
    (preprocessed / "nnUNetCompactPlans.json").write_text(json.dumps(plans))
    return raw, preprocessed


def edit(path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def run(*arguments: str) -> int:
    return main(["plan_and_preprocess", "-d", "9", "-np", "1", "-pl", "CompactPlanner", "-c", "2d", *arguments])


@pytest.mark.parametrize("key, value, message", [
    ("data_identifier", "../../nnUNet_raw/Dataset009_Tiny", "2d.data_identifier: '../../.* separator of paths"),
    ("data_identifier", ".", r"2d.data_identifier: '\.' .* begins with a dot"),
    ("data_identifier", "/tmp", "2d.data_identifier: '/tmp' .* separator of paths"),
    ("data_identifier", "", "2d.data_identifier: '' .* is empty"),
    ("data_identifier", "gt_segmentations", "'gt_segmentations' is the folder of the ground truth"),
    ("data_identifier", "GT_segmentations", "'GT_segmentations' is the folder of the ground truth"),
    ("data_identifier", "a_unlabeled", "'a_unlabeled' ends as a folder of other cases does"),
    ("data_identifier", "a_pseudo", "'a_pseudo' ends as a folder of other cases does"),
    ("inherits_from", "nothing", "2d.inherits_from: 'nothing' is no other configuration"),
    ("spacing", 5, "2d.spacing: .* not 5"),
    ("spacing", [3.0, 0.0], r"2d.spacing\[1\]: .* greater than 0, not 0.0"),
    ("spacing", [3.0, float("nan")], r"2d.spacing\[1\]: .*not nan"),
])  # fmt: skip
@pytest.mark.parametrize("part", [[], ["--num_parts", "2", "--part_id", "0"]])
def test_a_plan_that_leads_elsewhere_or_is_no_plan(planned, capsys, key, value, message, part):
    raw, preprocessed = planned
    edit(preprocessed / "nnUNetCompactPlans.json", lambda c: c["configurations"]["2d"].update({key: value}))
    before = contents(raw.parent.parent)
    assert run(*part) == 1
    captured = capsys.readouterr()
    assert "nnUNetCompactPlans.json: configurations." in captured.err and "--replan" in captured.err
    assert re.search(message, captured.err), captured.err
    assert contents(raw.parent.parent) == before


def test_configurations_that_would_replace_each_others_cases(planned, capsys):
    _, preprocessed = planned
    for own, message in (({}, "and other spacing: give fine one of its own"), ({"data_identifier": "fine"}, "-c 4d")):
        edit(preprocessed / "nnUNetCompactPlans.json", lambda c, own=own: c["configurations"].update({
            "fine": {"inherits_from": "2d", "spacing": [0.5, 0.5], **own},
            "same": {"inherits_from": "2d", "batch_size": 3},
        }))  # fmt: skip
        assert run("-c", "4d") == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../../evil", "", ".", "a/b", "a\nb", ".hidden"])
@pytest.mark.parametrize("table", ["dataset", "unlabeled"])
def test_a_case_whose_name_leads_elsewhere(planned, capsys, name, table):
    raw, preprocessed = planned
    edit(raw / "dataset.json", lambda c: c[table].update({name: c[table].pop(min(c[table]))}))
    before = contents(raw.parent.parent)
    assert run() == 1
    error = capsys.readouterr().err
    assert f"dataset.json: {table}: {name!r} cannot be the name of a file" in error and "rename the case" in error
    assert contents(raw.parent.parent) == before


@pytest.mark.parametrize("table", ["dataset", "unlabeled"])
def test_a_case_whose_image_would_replace_anothers_labels(planned, capsys, table):
    raw, preprocessed = planned
    edit(raw / "dataset.json", lambda c: c[table].update(l0_seg=c[table].pop(max(c[table]))))
    before = contents(raw.parent.parent)
    assert run() == 1
    assert f"dataset.json: {table}: 'l0_seg' ends with _seg" in capsys.readouterr().err
    assert contents(raw.parent.parent) == before


def test_a_plan_of_another_data_set(planned, capsys):
    raw, preprocessed = planned
    edit(preprocessed / "nnUNetCompactPlans.json", lambda c: c.update(dataset_name="Dataset010_Other"))
    before = contents(raw.parent.parent)
    assert run() == 1
    assert (
        "nnUNetCompactPlans.json: dataset_name: is 'Dataset010_Other', not 'Dataset009_Tiny'" in capsys.readouterr().err
    )
    assert contents(raw.parent.parent) == before


@pytest.mark.parametrize("change, message", [
    (lambda c: c.pop("numTraining"), "numTraining: Field required"),
    (lambda c: c.pop("labels"), "labels: Field required"),
    (lambda c: c.update(file_ending="/../x"), "file_ending: "),
    (lambda c: c["labels"].update(upper=[1, 2]), r"regions_class_order: must be 2 of [1, 2], not []"),
    (lambda c: c.update(labels={"background": 0, "all": [1, 2], "lower": 2}, regions_class_order=[1, 9]),
     "regions_class_order: must be 2 of [1, 2], not [1, 9]"),
    (lambda c: c["dataset"].update(l0={"images": "l0.nii.gz"}), "dataset.l0"),
    (lambda c: c["dataset"].update(l0=[]), "dataset.l0: "),
])  # fmt: skip
def test_a_malformed_dataset_json(planned, capsys, change, message):
    raw, _ = planned
    edit(raw / "dataset.json", change)
    before = contents(raw.parent.parent)
    assert run() == 1
    error = capsys.readouterr().err
    assert "dataset.json: " in error and message in error and "Traceback" not in error
    assert contents(raw.parent.parent) == before


def test_another_command_on_the_same_data_set_is_named(planned, capsys, monkeypatch):
    raw, preprocessed = planned
    file = str(preprocessed / ".nnunet_diffusion" / "plan_and_preprocess.lock")
    before = contents(raw.parent.parent)
    monkeypatch.setattr(locks, "locked", functools.partial(locks.locked, patience_s=0.1))
    for arguments in ((), ("--num_parts", "2", "--part_id", "0")):
        with locks.locked(file, "it"):
            assert run(*arguments) == 1
        error = capsys.readouterr().err
        assert f"another command works on the folder {preprocessed} (process {os.getpid()} on " in error
    assert contents(raw.parent.parent) == before


@pytest.mark.parametrize("error", [UserError("no scan"), OSError("no disk"), KeyboardInterrupt()])
def test_an_error_has_a_line_of_its_own_below_a_progress_bar(capsys, monkeypatch, error):
    def work(step):
        if step == 1:
            raise error

    def stop(_):
        list(work(step) for step in tqdm(range(3), "working"))  # noqa: C400, which keeps the bar as long as the error

    monkeypatch.setattr("nnunet_diffusion.cli.env.run", stop)
    assert main(["env"]) in (1, 130)
    *_, last = capsys.readouterr().err.rstrip("\n").split("\n")  # a bar returns to the line's beginning by "\r"
    assert last == f"nnunet_diffusion: {f'error: {error}' if str(error) else 'interrupted'}"


def test_folds(tmp_path):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a", "b"], "val": ["c"]}]))
    assert fold_of(str(path), "0") == (["a", "b"], ["c"])
    with pytest.raises(UserError, match="-f 1: .*splits_final.json has folds 0 to 0"):
        fold_of(str(path), 1)
    for content, message in [
        ('[{"train": [', "is no JSON"),
        ("[]", "at least 1 item"),
        ('[{"train": ["a"]}]', r"\[0\].val: Field required"),
        ('[{"train": ["../a"], "val": []}]', r"\[0\].train: '../a' cannot be the name of a file"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=f"splits_final.json: .*{message}.*: (take it out|.*nnUNetv2_train splits)"):
            read_splits(str(path))
