"""Rounds of pseudo labels: evidence, gate and state by hand; the loop on the real nnU-Net, killed and resumed."""

import errno
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace

import blosc2
import minimal
import numpy as np
import pytest
import SimpleITK as sitk
import tiny
import torch
from running import killable, run_command

from nnunet_diffusion.cli import main
from nnunet_diffusion.commands import command_environment
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.locks import locked
from nnunet_diffusion.partial.annotations import Annotation
from nnunet_diffusion.pretraining.start import find_start
from nnunet_diffusion.records import digest
from nnunet_diffusion.rounds import places
from nnunet_diffusion.rounds.constrained import ignore_uncertain, most_probable
from nnunet_diffusion.rounds.disk import mark_predictions, remove_rounds
from nnunet_diffusion.rounds.evidence import (
    Evidence,
    OrganPrior,
    center,
    disagreement,
    measure,
    organ_priors,
    pairwise_dice,
)
from nnunet_diffusion.rounds.filtering import filter_round, read_verdicts, voxel_thresholds
from nnunet_diffusion.rounds.gate import DROP, KEEP, WAIT, GateSettings, Verdict, filter_case, objections, organ_limits
from nnunet_diffusion.rounds.given_model import INTENSITIES, check_model, refuse_other_data, refuse_unusable_start
from nnunet_diffusion.rounds.outcome import publish
from nnunet_diffusion.rounds.places import Places, Request
from nnunet_diffusion.rounds.prediction import (
    Case,
    confidence_folder,
    load_confidence,
    load_prediction,
    network_spacing,
    predict_case,
    read_evidence,
    read_preprocessed,
)
from nnunet_diffusion.rounds.pseudo_labels import open_pseudo_label, pseudo_cases, save_pseudo_label, write_array
from nnunet_diffusion.rounds.stale import remove_stale
from nnunet_diffusion.rounds.state import Round, State, cases_of_round, fallen, last_good, load_state, waited
from nnunet_diffusion.rounds.teacher import AT_ONCE, Model, Teacher
from nnunet_diffusion.rounds.training import denoiser_of, validation_dice, write_plans
from nnunet_diffusion.workers import Workers

KILLS = int(os.environ.get("NNUNET_DIFFUSION_KILLS", "2"))

# ---------------------------------------------------------------- evidence


def test_disagreement_by_hand():
    before, now = np.array([0, 1, 1, 2, 0]), np.array([0, 1, 2, 2, 2])
    assert disagreement(before, now) == 2 / 4, "two voxels changed, four are foreground now"
    assert disagreement(before, before) == 0
    assert disagreement(np.array([1, 1, 0, 0]), np.array([0, 0, 1, 1])) == 2, "as large, but elsewhere"


def test_disagreement_of_empty_foregrounds():
    empty, full = np.zeros(4, int), np.ones(4, int)
    assert disagreement(empty, empty) == 0
    assert disagreement(full, empty) == 4, "all that vanished"
    assert disagreement(empty, full) == 1
    assert disagreement(-full, empty) == 0, "outside the body is no foreground"


def test_pairwise_dice_is_the_mean_over_pairs():
    a, b, c = (np.array(mask, bool) for mask in ([1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]))
    assert pairwise_dice([a, b, c]) == pytest.approx((2 / 3 + 0 + 0) / 3)
    assert pairwise_dice([c, c]) == 1 and pairwise_dice([a]) is None and pairwise_dice([]) is None


def test_center_equals_the_mean_of_coordinates():
    mask = np.random.default_rng(0).random((5, 6, 7)) > 0.7
    expected = (np.argwhere(mask).mean(0) + 0.5) / mask.shape
    assert center(mask) == pytest.approx(tuple(expected))
    assert center(np.zeros((2, 2, 2), bool)) is None


def test_measure_by_hand():
    labels = np.array([[[1, 1, 0, -1]]])
    channels = {"background": frozenset({0}), "liver": frozenset({1}), "spleen": frozenset({2})}
    confidence = np.array([[[0.5, 0.9, 1.0, 1.0]]])
    found = measure(labels, channels, (10, 10, 5), confidence, [labels, labels * 0], np.array([[[1, 0, 2, 0]]]))
    assert found["liver"] == Evidence(1.0, (0.5, 0.5, 0.25), pytest.approx(0.7), 0.0, 0.5)
    assert found["spleen"] == Evidence(0.0, None, None, 1.0, 1.0)
    regions = measure(labels, {"body": frozenset({1, 2})}, (10, 10, 5))
    assert regions == {"body": Evidence(1.0, (0.5, 0.5, 0.25), None, None, None)}


def test_priors_count_absences():
    there, absent = Evidence(2.0, (0.1, 0.2, 0.3), None, None, None), Evidence(0.0, None, None, None, None)
    assert organ_priors([{"liver": there}, {"liver": absent, "spleen": there}]) == {
        "liver": OrganPrior(2, (2.0,), ((0.1, 0.2, 0.3),)),
        "spleen": OrganPrior(1, (2.0,), ((0.1, 0.2, 0.3),)),
    }


# ---------------------------------------------------------------- gate

PRIOR = OrganPrior(3, (100.0, 120.0, 150.0), ((0.5, 0.5, 0.5), (0.55, 0.5, 0.5), (0.6, 0.5, 0.5)))
GOOD = Evidence(110.0, (0.5, 0.5, 0.5), 0.95, 0.9, 0.1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"confidence": None, "agreement": None, "disagreement": None}, None),
        ({"confidence": 0.79}, "confidence 0.79 is below 0.8"),
        ({"agreement": 0.69}, "agree by a Dice of 0.69"),
        ({"disagreement": 0.51}, "u with the round before is 0.51, above 0.5"),
        ({"volume_ml": 301.0}, "volume 301 ml, annotated ones have 100 to 150 ml"),
        ({"volume_ml": 300.0}, None),
        ({"volume_ml": 49.0}, "volume 49 ml"),
        ({"position": (0.34, 0.5, 0.5)}, "at 34% of axis 0, annotated ones are at 50% to 60%"),
        ({"position": (0.5, 0.5, 0.66)}, "at 66% of axis 2"),
        ({"volume_ml": 0.0, "position": None, "confidence": None}, "nowhere, but in all 3 annotated cases"),
    ],
)
def test_every_objection_is_named(change, reason):
    found = objections(GOOD._replace(**change), PRIOR, GateSettings())
    assert len(found) == (reason is not None) and all(reason in text for text in found)


def test_what_no_annotated_case_shows_is_not_accepted():
    assert "no annotated case" in objections(GOOD, None, GateSettings())[0]
    assert "in none of the 3" in objections(GOOD, OrganPrior(3, (), ()), GateSettings())[0]
    absent = GOOD._replace(volume_ml=0.0, position=None, confidence=None)
    assert objections(absent, OrganPrior(3, (), ()), GateSettings()) == []
    sometimes = OrganPrior(3, (100.0,), ((0.5, 0.5, 0.5),))
    assert objections(absent, sometimes, GateSettings()) == [], "some patients lack it"


def test_a_case_is_kept_waits_and_is_dropped():
    priors, bad = dict.fromkeys("abc", PRIOR), GOOD._replace(confidence=0.1)
    verdict = filter_case({"a": GOOD, "b": GOOD, "c": bad}, priors, GateSettings())
    assert (verdict.decision, verdict.organs) == (KEEP, ["a", "b"]) and list(verdict.reasons) == ["c"]
    evidence = {"a": GOOD, "b": bad, "c": bad}
    strict = GateSettings(min_organs=0.5)
    decisions = [filter_case(evidence, priors, strict, rounds).decision for rounds in (0, 1, 2)]
    assert decisions == [WAIT, WAIT, DROP]
    assert "only 1 of 3 organs" in filter_case(evidence, priors, strict).reasons["case"][0]
    assert filter_case(evidence, priors, GateSettings()).decision == KEEP, "one organ is enough"
    partly = filter_case(evidence, priors, GateSettings(), 5, is_partly_annotated=True)
    assert (partly.decision, partly.organs) == (KEEP, ["a"])
    assert filter_case({"a": bad}, priors, GateSettings(), 5, is_partly_annotated=True).decision == WAIT
    assert filter_case(evidence, priors, GateSettings(is_open=True)).organs == ["a", "b", "c"]


def test_limits_refuse_the_worst_of_an_organ_and_no_more_of_it_than_a_share():
    """Ten cases whose confidence is 0.0 to 0.9 and whose u is 1 to 10: all fail in u, eight in confidence."""
    cases = [{"a": GOOD._replace(confidence=n / 10, disagreement=10.0 - n)} for n in range(10)]

    def accepted(**settings):
        gate = GateSettings(**settings)
        limits = organ_limits(cases, gate)
        return [n for n, case in enumerate(cases) if filter_case(case, {"a": PRIOR}, gate, limits=limits).organs]

    assert accepted() == list(range(1, 10)), "one is the worst in both"
    assert accepted(worst_share=0.3, max_disagreement=20.0) == list(range(3, 10))
    assert accepted(worst_share=0.9, max_disagreement=20.0) == [8, 9], "no limit is stricter than was asked for"
    assert accepted(worst_share=0.05) == list(range(10)) and accepted(worst_share=1.0) == []
    two = [{"a": GOOD, "b": GOOD._replace(confidence=0.1, agreement=None)}] * 2
    limits = organ_limits(two, GateSettings())
    assert limits["a"] == GateSettings() and limits["b"] == GateSettings(organ_confidence=0.1), "each on its own"


def test_voxels_of_organs_that_are_usually_less_sure_need_less_confidence():
    channels = {"background": frozenset({0}), "liver": frozenset({1}), "vein": frozenset({2}), "duct": frozenset({3})}
    absent = GOOD._replace(confidence=None)
    cases = [{"liver": GOOD._replace(confidence=c), "vein": GOOD._replace(confidence=0.5), "duct": absent}
             for c in (0.8, 1.0)]  # fmt: skip
    least = voxel_thresholds(cases, channels, GateSettings(voxel_confidence=0.8))
    assert least.tolist() == pytest.approx([0.8, 0.72, 0.4, 0.8])
    same = voxel_thresholds(cases, channels, GateSettings(voxel_confidence=0.8, adaptive=False))
    assert same.tolist() == pytest.approx([0.8] * 4)
    regions = {"body": frozenset({1, 2}), "core": frozenset({2})}
    found = [dict.fromkeys(regions, GOOD._replace(confidence=0.5))]
    assert voxel_thresholds(found, regions, GateSettings()).tolist() == pytest.approx([0.7] * 3)
    labels, confidence = torch.tensor([[[-1, 0, 1, 2]]]), torch.tensor([[[0.1, 0.7, 0.7, 0.45]]])
    assert ignore_uncertain(labels, confidence, least[labels.clamp_min(0)], 4).flatten().tolist() == [-1, 4, 4, 2]


def test_gate_settings_are_read_and_mistakes_are_named():
    settings = GateSettings.from_pairs(["is_open=true", "patience=5", "organ_confidence=0.5"])
    assert (settings.is_open, settings.patience, settings.organ_confidence) == (True, 5, 0.5)
    for pair, message in (
        ("x=1", "known are"),
        ("patience=a", "type int"),
        ("is_open=1", "type bool"),
        ("min_organs=nan", "type float"),
    ):
        with pytest.raises(UserError, match=message):
            GateSettings.from_pairs([pair])


# ---------------------------------------------------------------- state


ORIGIN = {"values": {}, "cases": {}}


def test_a_state_comes_back_and_one_that_was_edited_cut_or_of_another_version_is_named(tmp_path):
    path = str(tmp_path / "state.json")
    assert load_state(path) is None
    state = State(ORIGIN, [Round(0, checkpoints={"a": "b"}, validation_dice=0.5), Round(1, cases=["a"])])
    state.save(path)
    assert load_state(path) == state
    text = Path(path).read_text()
    for content, message in (
        (text.replace("0.5", "0.9"), "state.json: was edited, its digest does not fit: restore it, or remove"),
        (text[: len(text) // 2], "state.json: is no JSON .*: restore it, or remove the folder .* to start anew"),
        ("[]", "state.json: the whole file: "),
        (text.replace('"format": 2', '"format": 3'), "has format 3, this version writes 2: finish with that version"),
        (sealed(format=2, made_from=ORIGIN, rounds=5, steps={}, hashes={}), "state.json: rounds: .* not 5"),
        (sealed(format=2, made_from=ORIGIN, rounds=[{}], steps={}, hashes={}), r"rounds\[0\].number: .*required"),
    ):
        Path(path).write_text(content)
        with pytest.raises(UserError, match=message):
            load_state(path)


def sealed(**content):
    return json.dumps({**content, "digest": digest(content)})


def test_the_state_of_the_version_before_is_refused_by_name(tmp_path):
    """As that version wrote it, after the first training and a round of a run on the data of these tests."""
    shutil.copy(Path(__file__).with_name("rounds_state_of_format_1.json"), tmp_path / "state.json")
    message = "state.json: has format 1, this version writes 2: finish with that version, or remove the folder"
    with pytest.raises(UserError, match=f"{message} {tmp_path}"):
        load_state(str(tmp_path / "state.json"))


@pytest.mark.parametrize(
    ("dices", "first_bad", "outcome"),
    [
        ([0.5, 0.6, 0.595, 0.58], 3, 2),
        ([0.5, 0.6, 0.595, None], None, 3),
        ([0.5, 0.4, 0.9], 1, 0),
        ([0.5, None, 0.4], 2, 1),
        ([None, None], None, 1),
        ([0.5], None, 0),
    ],
)
def test_the_rounds_stop_when_the_validation_dice_falls_and_the_model_before_is_the_outcome(dices, first_bad, outcome):
    assert fallen(dices, 0.01) == first_bad and last_good(dices, 9, 0.01) == outcome
    assert last_good(dices, 0, 0.01) == 0, "only the first training was asked for"


def test_a_round_predicts_what_lacks_labels_and_was_not_dropped():
    verdicts = {"a": Verdict(KEEP, [], {}), "b": Verdict(DROP, [], {}), "c": Verdict(WAIT, [], {})}
    assert cases_of_round(["d", "c", "b", "a"], verdicts, ["x"]) == (["a", "c", "d"], ["b", "x"])
    assert cases_of_round({"b", "a"}, {}, []) == (["a", "b"], [])


def test_rounds_waited_are_counted_back_from_the_last():
    kept, waits = {"a": Verdict(KEEP, [], {})}, {"a": Verdict(WAIT, [], {})}
    assert [waited("a", before) for before in ([], [waits], [waits, waits], [waits, kept, waits], [waits, kept])] == [
        0, 1, 2, 1, 0,
    ]  # fmt: skip
    assert waited("a", [waits, {}]) == 0, "it was not predicted in the last round"


def test_a_second_command_on_the_same_run_is_refused(tmp_path):
    path = str(tmp_path / "lock")
    refused = pytest.raises(UserError, match=r"another command works on it \(process \d+ on .* since .*: ")
    with locked(path, "it"), refused, locked(path, "it", patience_s=0.2):
        pass
    with locked(path, "it", patience_s=0.2):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EIO])
def test_a_file_system_without_locks_is_named_at_once_and_not_taken_for_another_command(tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    path = str(tmp_path / "lock")
    message = (
        rf"lock: its file system has no locks \({os.strerror(number)}\), .*: mount it with locks, or take a folder"
    )
    began = time.monotonic()
    with pytest.raises(UserError, match=message), locked(path, "it"):
        pass
    assert time.monotonic() - began < 5, "there is nobody to wait for"
    with locked(path, "it", is_optional=True) as file:
        assert os.fstat(file)


def test_what_killed_writers_left_is_removed_and_what_others_write_is_not(tmp_path):
    """By hand: hours since the last write, the process, whether the file goes."""
    gone, running = 999_999_999, os.getpid()  # no system has so many processes
    files = {(0.0, gone): False, (0.9, gone): False, (1.1, gone): True, (23.0, running): False, (25.0, running): True}
    names = {case: f".tmp{case[1]}_tiny_{i}.b2nd" for i, case in enumerate(files)}
    folder = tmp_path / "round_1" / "predicted"
    folder.mkdir(parents=True)
    for name, hours in [*((name, case[0]) for case, name in names.items()), ("tiny_1.b2nd", 99), (".tmp_fold_0", 99)]:
        (folder / name).touch()
        os.utime(folder / name, (time.time() - 3600 * hours,) * 2)
    remove_stale(str(tmp_path))
    kept = {names[case] for case, goes in files.items() if not goes}
    assert {path.name for path in folder.iterdir()} == {*kept, "tiny_1.b2nd", ".tmp_fold_0"}


OTHER = {
    "labels": {"background": 0, "box": 1}, "channel_names": {"0": "MR"}, INTENSITIES: {"0": {"mean": 7.0}},
    "spacing": [1.0, 3.0], "patch_size": [16, 16], "normalization_schemes": ["ZScoreNormalization"], "architecture": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("dataset.json", ["labels"]),
        ("dataset.json", ["channel_names"]),
        ("plans.json", [INTENSITIES]),
        *(("plans.json", ["configurations", "2d", key])
          for key in ("spacing", "patch_size", "normalization_schemes", "architecture")),
    ],
)  # fmt: skip
def test_a_model_of_another_data_set_is_named_with_what_differs(tmp_path, file, keys):
    """Of a plan and a data set that differ in one value; what comes from elsewhere may differ."""
    plans = minimal.plans("2d", "3d_fullres")
    plans["configurations"]["2d"]["architecture"] = {"arch_kwargs": {"n_stages": 3}}
    dataset_json = minimal.dataset_json()
    its = {"plans.json": json.loads(json.dumps(plans)) | {"plans_name": "other"}, "dataset.json": dict(dataset_json)}
    for name, content in its.items():
        (tmp_path / name).write_text(json.dumps(content))
    refuse_other_data(str(tmp_path), plans, "2d", dataset_json)
    block = its[file]
    for key in keys[:-1]:
        block = block[key]
    block[keys[-1]] = OTHER[keys[-1]]
    (tmp_path / file).write_text(json.dumps(its[file]))
    with pytest.raises(UserError, match=rf"is a model of another data set or plan, {keys[-1]} differ from this run's"):
        refuse_other_data(str(tmp_path), plans, "2d", dataset_json)


@pytest.mark.parametrize(
    "content", ['{"fo', "[]", "{}", '{"foreground_mean": 5}', '{"foreground_mean": {"Dice": "x"}}']
)
def test_a_damaged_summary_is_named_with_how_it_is_made_anew(tmp_path, content):
    summary = tmp_path / "fold_0" / "validation" / "summary.json"
    assert validation_dice(str(tmp_path), "0") is None
    summary.parent.mkdir(parents=True)
    for dice, expected in (("0.5", 0.5), ("NaN", None), ("null", None)):
        summary.write_text(f'{{"foreground_mean": {{"Dice": {dice}}}}}')
        assert validation_dice(str(tmp_path), "0") == expected and validation_dice(str(tmp_path), "all") is None
    summary.write_text(content)
    with pytest.raises(UserError, match=f"{summary}: .*make it anew: nnUNetv2_train with the same arguments and --val"):
        validation_dice(str(tmp_path), "0")


@pytest.mark.parametrize("content", ['{"so', "[]", "{}", '{"source": 5}'])
def test_a_damaged_transfer_report_is_named(tmp_path, content):
    report = tmp_path / "fold_0" / "transfer_report.json"
    assert denoiser_of(str(tmp_path), "0") == ""
    report.parent.mkdir()
    report.write_text(json.dumps({"source": str(report)}))
    assert denoiser_of(str(tmp_path), "0") == str(report)
    report.write_text(content)
    with pytest.raises(UserError, match=f"{report}: .*remove it"):
        denoiser_of(str(tmp_path), "0")


def places_of(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "nnUNet_results", str(tmp_path / "results"))
    return Places(Request("Dataset990_Tiny", "2d", "0", "R"), "id")


def test_the_outcome_is_replaced_whole_and_only_if_a_run_put_it_there(tmp_path, monkeypatch):
    run = places_of(tmp_path, monkeypatch)
    trained, outcome = (Path(run.model(1), "fold_0"), Path(run.outcome(), "fold_0"))
    trained.mkdir(parents=True)
    (trained.parent / "plans.json").write_text("{}")
    for weights in ("first", "second", "second"):
        (trained / "checkpoint_final.pth").write_text(weights)
        publish(run, 1)
        assert (outcome / "checkpoint_final.pth").read_text() == weights
        assert sorted(os.listdir(run.outcome())) == ["fold_0", "plans.json"]
    for left in (".tmp_fold_0", ".old_fold_0"):  # by a kill
        shutil.copytree(outcome, outcome.with_name(left))
    (trained / "checkpoint_final.pth").write_text("third")
    publish(run, 1)
    assert sorted(os.listdir(run.outcome())) == ["fold_0", "plans.json"]
    shutil.rmtree(outcome)
    for name in ("fold_0", "fold_1", ".old_fold_0"):  # of the user
        mine = outcome.with_name(name)
        mine.mkdir()
        (mine / "checkpoint_final.pth").write_text("mine")
        with pytest.raises(UserError, match=f"{mine}: was not made by nnunet_diffusion, which does not touch it"):
            publish(run, 1)
        assert (mine / "checkpoint_final.pth").read_text() == "mine"
        shutil.rmtree(mine)


def test_the_folds_of_a_given_model_are_those_that_are_finished(tmp_path, monkeypatch):
    run = places_of(tmp_path, monkeypatch)
    object.__setattr__(run.request, "model", str(tmp_path))
    object.__setattr__(run.request, "fold", "all")
    for name in ("fold_0", "fold_1", "other", "fold_2"):
        (tmp_path / name).mkdir()
        if name != "fold_2":
            (tmp_path / name / "checkpoint_final.pth").touch()
    assert run.folds(0) == ["0", "1"] and run.folds(1) == ["all"]


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("{", "is no prediction"),
        (5, "is no prediction"),
        ("[]", "the whole file: "),
        ('{"teacher": 5, "evidence": {}}', "teacher: .* not 5"),
        ('{"teacher": "t", "evidence": {"liver": {}}}', "evidence.liver.volume_ml: Field required"),
        ('{"teacher": "t", "evidence": []}', "evidence: "),
    ],
)
def test_a_damaged_prediction_is_named(tmp_path, about, message):
    write_array(str(tmp_path / "a.b2nd"), np.zeros((1, 4, 8, 8), np.int16), (8, 8), about)
    for read in (read_evidence, load_prediction):
        with pytest.raises(UserError, match=f"a.b2nd: {message}.*: remove it and run the same command again"):
            read(str(tmp_path), "a")


def test_a_spacing_that_is_none_is_named(tmp_path):
    plans, configuration = SimpleNamespace(transpose_forward=[0, 1, 2]), SimpleNamespace(spacing=[1.0, 1.0])
    path = tmp_path / "a.pkl"
    for spacing, expected in (([3.0, 2.0, 2.0], (3.0, 1.0, 1.0)), ("x", None), (5, None), ([], None)):
        path.write_bytes(pickle.dumps({"spacing": spacing}))
        if expected:
            assert network_spacing(str(path), plans, configuration) == expected
            continue
        with pytest.raises(UserError, match="a.pkl: spacing: is .*, not three numbers: remove the case's files"):
            network_spacing(str(path), plans, configuration)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "--rounds 0"),
        (["--num_parts", "2"], "give both"),
        (["--num_parts", "2", "--part_id", "2"], "from 0 to 1"),
        (["--tolerance", "nan"], "--tolerance nan"),
        (["-p", "../R"], "-p: '../R' cannot be the name"),
        (["-c", "../c"], "-c: '../c' cannot be the name"),
        (["-tr", "../T"], "-tr: '../T' cannot be the name"),
    ],
)
def test_usage_is_checked_before_anything_is_loaded(arguments, message, nnunet_folders, capsys):
    assert main(["rounds", "-d", "1", "-c", "2d", "-f", "0", *arguments]) == 1
    assert message in capsys.readouterr().err


# ---------------------------------------------------------------- the loop

COMMAND = ["rounds", "-d", str(tiny.ID), "-c", "2d", "-f", "0", "-p", "R", "-device", "cpu", "--start", "scratch"]
# after two epochs of two steps, nothing is certain: only the most uncertain organs are to be dropped
GATE = ["organ_confidence=0.39", "volume_factor=1e9", "position_margin=1", "voxel_confidence=0.3", "min_organs=0.3"]
GATE += ["worst_share=1"]
COMMAND += ["--tolerance", "1", "--gate", *GATE]


def write_partly_annotated_raw(write):
    """The tiny data set; case 1 is annotated for the box alone."""

    def write_raw(*args, **kwargs):
        raw = write(*args, **kwargs)
        label = raw / "labelsTr" / "tiny_001.nii.gz"
        seg = sitk.GetArrayFromImage(sitk.ReadImage(str(label)))
        tiny.save(np.where(seg == 3, 3, 0).astype(np.uint8), label)
        content = json.loads((raw / "dataset.json").read_text())
        content["annotated_labels"] = {"tiny_001": ["box"]}
        (raw / "dataset.json").write_text(json.dumps(content))
        return raw

    return write_raw


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The preprocessed data set and what one uninterrupted round made of it: folder, seconds, the data before."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        patch.setattr(tiny, "write_raw", write_partly_annotated_raw(tiny.write_raw))
        folder = tiny.prepare()
        settings = {"seed": 1, "save_every": 1}
        plans = json.loads((folder / f"{tiny.PLANS}.json").read_text())
        tiny.write_plans(plans, "R", DiffusionPretrainedTrainer={"start": "scratch", **settings},
                         PseudoLabelTrainer=settings)  # fmt: skip
        fresh = tmp_path_factory.mktemp("fresh") / folder.name
        shutil.copytree(folder, fresh)
        start = time.monotonic()
        assert main([*COMMAND, "--rounds", "1"]) == 0
        yield folder, time.monotonic() - start, fresh


@pytest.fixture
def results(world):
    return Path(os.environ["nnUNet_results"]) / tiny.NAME


def run_folder(folder):
    return folder / "nnUNetCompactPlans_2d_pseudo" / "R__2d__fold_0"


def kept_in(run):
    """The cases that round 1 of a run kept."""
    lines = [json.loads(line) for line in (run / "round_1" / "verdicts.jsonl").read_text().splitlines()]
    return sorted(case for case, verdict in dict(lines[1:]).items() if verdict[0] == KEEP)


def the_run(**changes):
    from nnunet_diffusion.rounds.loop import Rounds
    from nnunet_diffusion.rounds.places import Request

    gate = GateSettings.from_pairs(GATE)
    return Rounds(Request(tiny.NAME, "2d", "0", "R", start="scratch", gate=gate, tolerance=1, device="cpu", **changes))


@pytest.mark.slow
def test_one_command_trains_predicts_gates_and_trains_again(world, results):
    folder, _, _ = world
    kept = kept_in(run_folder(folder))
    assert kept and kept == pseudo_cases(run_folder(folder) / "round_1")
    assert all(0 <= entry.validation_dice <= 1 for entry in load_state(str(run_folder(folder) / "state.json")).rounds)
    report = json.loads((results / "rounds__R__2d" / "fold_0" / "round_1" / "report.json").read_text())
    assert sorted(report["cases"]) == ["tiny_001", "tiny_100", "tiny_101", "tiny_102"]
    assert list((results / "rounds__R__2d" / "fold_0" / "round_1").glob("*.png"))
    final, last = (results / f"PseudoLabelTrainer__R{part}__2d" / "fold_0" for part in ("", "_round1"))
    assert (final / "checkpoint_final.pth").read_bytes() == (last / "checkpoint_final.pth").read_bytes()
    log = next(last.glob("training_log*")).read_text()
    assert f"2 annotated cases, {len(kept)}" in log or f"3 annotated cases, {len(kept)}" in log


@pytest.mark.slow
def test_true_labels_and_everything_annotated_are_untouched(world):
    folder, _, fresh = world
    for name in ("nnUNetCompactPlans_2d", "nnUNetCompactPlans_2d_unlabeled", "gt_segmentations"):
        assert contents(folder / name) == contents(fresh / name)


@pytest.mark.slow
def test_a_partly_annotated_case_gets_pseudo_labels_for_what_is_missing_only(world):
    folder, _, _ = world
    label = open_pseudo_label(run_folder(folder) / "round_1", "tiny_001")
    true = blosc2.open(str(folder / "nnUNetCompactPlans_2d" / "tiny_001_seg.b2nd"))[:]
    assert label.completes == Annotation(frozenset({"background", "box"})) and "box" in label.annotation.labels
    assert label.annotation.labels & {"left ball", "right ball"}
    assert np.array_equal(label.segmentation[:] == 3, true == 3)


@pytest.mark.slow
def test_validation_cases_are_neither_predicted_nor_trained_on_nor_looked_at(world):
    from nnunet_diffusion.trainers.PseudoLabelTrainer import PseudoLabelTrainer

    folder, _, _ = world
    rounds = the_run()
    validation = {"tiny_003", "tiny_004"}
    assert set(rounds.cases.split()[1]) == validation and not validation & set(rounds.cases.to_predict())
    priors = rounds.cases.organ_priors()
    assert priors["box"].annotated == 3 and priors["left ball"].annotated == 2
    trainer = tiny.trainer(PseudoLabelTrainer, plans="R_round1")
    trainer.initialize()
    train, held_out = trainer.get_tr_and_val_datasets()
    assert set(held_out.identifiers) == validation and not validation & set(train.identifiers)
    assert set(train.identifiers) == {"tiny_000", "tiny_001", "tiny_002", *pseudo_cases(run_folder(folder) / "round_1")}
    planted = folder / "nnUNetCompactPlans_2d_pseudo" / "planted"
    known = Annotation(frozenset({"background", "box", "left ball", "right ball"}))
    save_pseudo_label(planted, "tiny_003", np.zeros((2, 2, 2)), known, trainer.label_manager, (2, 2), known)
    trainer.pseudo_folder, trainer.pseudo = str(planted), {"tiny_003": known}
    with pytest.raises(UserError, match="tiny_003.*which fold 0 is validated on"):
        trainer.get_tr_and_val_datasets()


@pytest.mark.slow
def test_a_model_that_may_have_seen_the_validation_cases_is_refused(world, results, tmp_path):
    rounds = the_run()
    source = results / "DiffusionPretrainedTrainer__R__2d"
    for name, prepare, message in (
        ("unvalidated", lambda model: shutil.rmtree(model / "fold_0" / "validation"), "may have learned from them"),
        (
            "other",
            lambda model: edit_json(model / "dataset.json", labels={"background": 0, "other": 1}),
            "labels differ from this run",
        ),
        ("empty", lambda model: (model / "plans.json").unlink(), "is no model folder"),
    ):
        shutil.copytree(source, tmp_path / name)
        prepare(tmp_path / name)
        object.__setattr__(rounds.request, "model", str(tmp_path / name))
        with pytest.raises(UserError, match=message):
            check_model(rounds.places, rounds.cases, rounds.plans)
    object.__setattr__(rounds.request, "model", str(source))
    check_model(rounds.places, rounds.cases, rounds.plans)
    object.__setattr__(rounds.request, "model", rounds.places.outcome())
    with pytest.raises(UserError, match="is where the outcome goes"):
        refuse_unusable_start(rounds.places, rounds.plans)
    (tmp_path / "unvalidated" / "fold_1").mkdir()
    (tmp_path / "unvalidated" / "fold_1" / "checkpoint_final.pth").touch()
    for name, value in (("model", str(tmp_path / "unvalidated")), ("fold", "all"), ("start", "previous")):
        object.__setattr__(rounds.request, name, value)
    with pytest.raises(UserError, match="an ensemble has no weights to go on from"):
        refuse_unusable_start(rounds.places, rounds.plans)


@pytest.mark.slow
def test_an_ensemble_teaches_with_its_mean_and_its_disagreement(world, results, tmp_path):
    """Fold all, from a model of two folds: the second is the first with other weights."""
    folder, _, _ = world
    model = tmp_path / "DiffusionPretrainedTrainer__R__2d"
    shutil.copytree(results / model.name, model)
    shutil.copytree(model / "fold_0", model / "fold_1")
    other = torch.load(model / "fold_1" / "checkpoint_final.pth", weights_only=False)
    for key, values in other["network_weights"].items():
        if key.startswith("decoder.seg_layers") and key.endswith("weight"):
            values.copy_(values.flip(0))
    torch.save(other, model / "fold_1" / "checkpoint_final.pth")
    arguments = ["all" if before == "-f" else word for before, word in zip(["", *COMMAND], COMMAND, strict=False)]
    gate = ["min_agreement=1.01", *GATE]
    arguments = [*arguments[: arguments.index("--gate")], "--gate", *gate, "--from", str(model)]
    assert main([*arguments, "--rounds", "1", "--stop_after", "gate"]) == 0
    run = folder / "nnUNetCompactPlans_2d_pseudo" / "R__2d__fold_all"
    teachers = [Teacher(Model(str(model), (fold,), "one", "cpu")) for fold in ("0", "1")]
    image = read_preprocessed(str(folder / "nnUNetCompactPlans_2d_unlabeled" / "tiny_100.b2nd"))
    logits = [teacher.logits(torch.from_numpy(image))[0] for teacher in teachers]
    prediction = load_prediction(str(run / "round_1" / "predicted"), "tiny_100")
    np.testing.assert_array_equal(prediction.labels, most_probable(sum(logits) / 2, teachers[0].label_manager)[0])
    first, second = (most_probable(each, teachers[0].label_manager)[0].numpy() for each in logits)
    for name, value in tiny.LABELS.items():
        if value:
            dice = pairwise_dice([first == value, second == value])
            assert prediction.evidence[name].agreement == (dice if dice is None else pytest.approx(dice))
    assert not kept_in(run)
    shutil.rmtree(run)


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.slow
def test_a_round_starts_from_the_denoiser_of_the_plan_that_it_was_made_from(world, results):
    """Or says before any training that there is none."""
    from nnunet_diffusion.rounds.loop import Rounds
    from nnunet_diffusion.rounds.places import Request
    from nnunet_diffusion.trainers.PseudoLabelTrainer import PseudoLabelTrainer

    tiny.write_plans(json.loads((world[0] / "R.json").read_text()), "D")
    rounds = Rounds(Request(tiny.NAME, "2d", "0", "D", device="cpu"))
    with pytest.raises(UserError, match="no denoiser to start from(.|\n)*2d all -tr DenoisingDiffusionTrainer -p D\n"):
        rounds.first_training(1)
    denoiser = results / "DenoisingDiffusionTrainer__D__2d" / "fold_all" / "denoiser.pth"
    denoiser.parent.mkdir(parents=True)
    denoiser.touch()
    refuse_unusable_start(rounds.places, rounds.plans)
    write_plans(rounds.places, rounds.plans, 1, 0)
    trainer = tiny.trainer(PseudoLabelTrainer, plans="D_round1")
    assert find_start(trainer.start, trainer.plans_manager, "2d", 0) == str(denoiser)


@pytest.mark.slow
def test_what_changed_is_named_and_not_mixed(world, results, tmp_path, capsys):
    folder, _, _ = world
    first, state = results / "DiffusionPretrainedTrainer__R__2d" / "fold_0", run_folder(folder) / "state.json"
    denoiser, transfer, before = tmp_path / "denoiser.pth", first / "transfer_report.json", state.read_text()
    denoiser.write_bytes(b"weights")
    transfer.write_text(json.dumps({"source": str(denoiser)}))  # as if the first training had started from it
    rounds = the_run()
    rounds.finish(rounds.state.round(0), 0)
    assert main([*COMMAND, "--rounds", "3", "--status"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["3", "-"]
    with pytest.raises(UserError, match="trainer: was 'DiffusionPretrainedTrainer', now 'PartialLabelTrainer'"):
        the_run(trainer="PartialLabelTrainer")
    changes = {
        folder / "nnUNetCompactPlans_2d_unlabeled" / "tiny_101.b2nd": "pool cases: changed: tiny_101",
        folder / "nnUNetCompactPlans_2d" / "tiny_002_seg.b2nd": "annotated cases: changed: tiny_002",
        results / "PseudoLabelTrainer__R_round1__2d" / "fold_0" / "checkpoint_final.pth": "that round 1 ended with",
        denoiser: "denoiser.pth: is not the denoiser that round 0 started from",
    }
    for path, message in changes.items():
        content, stat = path.read_bytes(), path.stat()
        path.write_bytes(content + b"x")
        with pytest.raises(UserError, match=message):
            the_run()
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    description = (folder / "dataset.json").read_text()
    edit_json(folder / "dataset.json", annotated_labels={"tiny_001": ["left ball"]})
    with pytest.raises(UserError, match="annotated cases: changed: tiny_001"):
        the_run()
    (folder / "dataset.json").write_text(description)
    with pytest.raises(UserError, match="mirroring: was True, now False"):
        the_run(mirroring=False)
    plans = (folder / "R.json").read_text()
    edit_json(folder / "R.json", more=1)
    with pytest.raises(UserError, match="plan: was"):
        the_run()
    (folder / "R.json").write_text(plans)
    the_run()
    transfer.unlink()
    state.write_text(before)


PART = """import os, signal, sys
from nnunet_diffusion.cli import main
from nnunet_diffusion.rounds import loop
work_on, last = loop.work_on, int(sys.argv[1])

def work_or_die(*arguments):
    for number, found in enumerate(work_on(*arguments), 1):
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)
        yield found

loop.work_on = work_or_die
sys.exit(main(sys.argv[2:]))"""  # its first argument: after which prediction it is killed


def predictions(folder):
    """All of a folder as plain values; how blosc2 orders the blocks in a file may differ between processes."""
    names = [path.name.removesuffix(".b2nd") for path in folder.glob("*.b2nd") if path.name[0] != "."]
    confidence = {name: load_confidence(str(folder), name) for name in names}
    read = {name: load_prediction(str(folder), name) for name in names}
    return {n: (p.labels.tolist(), confidence[n].tolist(), p.evidence, p.teacher) for n, p in read.items()}


@pytest.mark.slow
def test_new_scans_and_annotations_join_the_next_round_which_parts_predict(world):
    """Two parts predict at the same time, one is killed and started again: what one process predicts, bit by bit."""
    folder, _, _ = world
    pool, state = folder / "nnUNetCompactPlans_2d_unlabeled", run_folder(folder) / "state.json"
    before = state.read_text()
    for ending in (".pkl", ".b2nd"):
        shutil.copyfile(pool / f"tiny_100{ending}", pool / f"tiny_200{ending}")
    try:
        rounds = the_run()
        assert rounds.new_cases == ["tiny_200"] and "tiny_200" not in rounds.state.round(1).cases
        entry = rounds.begin(2)
        assert entry.cases == ["tiny_001", "tiny_100", "tiny_101", "tiny_102", "tiny_200"]
        arguments, predicted = (
            [*COMMAND, "--rounds", "2", "--num_parts", "2", "--part_id"],
            Path(rounds.places.predicted(2)),
        )
        commands = [[sys.executable, "-c", PART, last, *arguments, part] for last, part in (("9", "0"), ("1", "1"))]
        with ThreadPool(2) as both:
            done = both.map(run_command, commands)
        assert [part.returncode for part in done] == [0, -signal.SIGKILL], [part.stderr for part in done]
        there = {path: path.stat().st_mtime_ns for path in predicted.glob("tiny_*")}
        assert {"001", "101", "200"} < {path.name[5:8] for path in there}
        left = predicted / ".tmp999999999_tiny_102.b2nd"  # as a worker that was killed in the middle
        left.touch()
        assert main([*arguments, "1"]) == 0
        assert {path: path.stat().st_mtime_ns for path in there} == there and left.exists()
        os.utime(left, (time.time() - 4000,) * 2)
        remove_stale(rounds.places.folder)
        by_parts = predictions(predicted)
        shutil.rmtree(predicted)
        shutil.rmtree(confidence_folder(str(predicted)))
        rounds.predict(entry)
        assert predictions(predicted) == by_parts and len(by_parts) == 5
        rounds.filter(entry)
        report = json.loads(Path(rounds.places.reports, "round_2", "report.json").read_text())
        evidence = report["cases"]["tiny_100"]["evidence"].values()
        assert all(math.isfinite(entry["disagreement"]) for entry in evidence)
    finally:
        for path in pool.glob("tiny_200*"):
            path.unlink()
        shutil.rmtree(run_folder(folder) / "round_2", ignore_errors=True)
        state.write_text(before)


@pytest.mark.slow
def test_a_fall_of_the_validation_dice_ends_the_run_with_the_model_before(world, results, capsys):
    rounds, final = the_run(), results / "PseudoLabelTrainer__R__2d" / "fold_0" / "checkpoint_final.pth"
    file, last = Path(rounds.places.state), final.read_bytes()
    state = file.read_text()
    for entry, dice in zip(rounds.state.rounds, (0.9, 0.1), strict=True):
        entry.validation_dice = dice
    object.__setattr__(rounds.request, "tolerance", 0.01)
    stale = run_folder(world[0]) / "round_1" / ".tmp999999999_tiny_100_seg.b2nd"
    stale.touch()
    os.utime(stale, (time.time() - 4000,) * 2)
    report = results / "rounds__R__2d" / "fold_0" / "round_1" / ".tmp999999999_report.json"
    report.touch()
    rounds.run(3)
    assert not stale.exists() and not report.exists()
    assert "round 1: the validation Dice fell: stopped" in capsys.readouterr().out
    first = results / "DiffusionPretrainedTrainer__R__2d" / "fold_0" / "checkpoint_final.pth"
    assert final.read_bytes() == first.read_bytes() and len(rounds.state.rounds) == 2
    file.write_text(state)
    publish(rounds.places, 1)
    assert final.read_bytes() == last


@pytest.mark.slow
def test_an_annotation_that_comes_later_takes_the_place_of_the_pseudo_label(world):
    from nnunet_diffusion.trainers.PseudoLabelTrainer import PseudoLabelTrainer

    folder, _, _ = world
    case = pseudo_cases(run_folder(folder) / "round_1")[-1]
    labeled, pool = folder / "nnUNetCompactPlans_2d", folder / "nnUNetCompactPlans_2d_unlabeled"
    assert (pool / f"{case}.b2nd").exists()
    state = run_folder(folder) / "state.json"
    before = state.read_text()
    for source, target in ((pool / f"{case}.b2nd", f"{case}.b2nd"), (pool / f"{case}.pkl", f"{case}.pkl"),
                           (labeled / "tiny_000_seg.b2nd", f"{case}_seg.b2nd")):  # fmt: skip
        shutil.copyfile(source, labeled / target)
    try:
        rounds = the_run()
        assert rounds.new_cases == [case] and case in rounds.cases.split()[0]
        assert case not in rounds.begin(2).cases
        trainer = tiny.trainer(PseudoLabelTrainer, plans="R_round1")
        trainer.initialize()
        train, _ = trainer.get_tr_and_val_datasets()
        assert case not in trainer.pseudo and case in train.identifiers
    finally:
        for path in labeled.glob(f"{case}*"):
            path.unlink()
        state.write_text(before)


@pytest.mark.slow
def test_looking_changes_nothing(world, capsys):
    before = contents(run_folder(world[0]))
    assert main([*COMMAND, "--rounds", "2", "--dry_run"]) == 0 and "round 2" in capsys.readouterr().out
    assert main([*COMMAND, "--rounds", "2", "--status"]) == 0
    assert contents(run_folder(world[0])) == before


@pytest.mark.slow
def test_a_scan_that_the_plan_cannot_hold_is_named(world, results, tmp_path):
    teacher = Teacher(Model(str(results / "DiffusionPretrainedTrainer__R__2d"), ("0",), "one", "cpu"))
    path = str(tmp_path / "odd.b2nd")
    blosc2.asarray(np.zeros((2, 4, 16, 16), np.float32), urlpath=path)
    with pytest.raises(UserError, match="odd.b2nd is .2, 4, 16, 16.: the plan holds .channel, x, y, z. with 1"):
        predict_case(teacher, "odd", Case(path, (1.0, 1.0, 1.0), None), str(tmp_path / "predicted"), "", {})


@pytest.mark.slow
def test_a_full_disk_then_weights_of_the_round_before_a_last_fine_tuning_and_stock_prediction(
    world, results, tmp_path, monkeypatch, capsys
):
    """A run of its own on the same data: the second pseudo label finds no space, the same command goes on later."""
    from nnunet_diffusion.rounds import filtering

    folder, _, _ = world
    shutil.copyfile(folder / "R.json", folder / "P.json")
    edit_json(folder / "P.json", plans_name="P")
    settings = json.loads((folder / "P.json").read_text())["nnunet_diffusion"]
    settings["ConfiguredTrainer"]["mirroring"] = "all"  # so that --disable_tta makes a difference
    edit_json(folder / "P.json", nnunet_diffusion=settings)
    command = [*("P" if part == "R" else part for part in COMMAND), "--rounds", "1", "--finetune", "--disable_tta"]
    command[command.index("--start") + 1] = "previous"
    saved, save = [], filtering.save_pseudo_label

    def save_until_full(to, case, *args):
        if saved:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), case)
        saved.append(case)
        save(to, case, *args)

    with monkeypatch.context() as patch:
        patch.setattr(filtering, "save_pseudo_label", save_until_full)
        assert main(command) == 1
    assert os.strerror(errno.ENOSPC) in capsys.readouterr().err
    run = folder / "nnUNetCompactPlans_2d_pseudo" / "P__2d__fold_0"
    assert not load_state(str(run / "state.json")).rounds[1].verdicts
    begun = (run / "round_1" / "verdicts.jsonl").read_text()
    assert saved[0] in begun, "it goes on with the next case"
    assert main(command) == 0
    assert len(pseudo_cases(run / "round_1")) > 1 and pseudo_cases(run / "round_1") == kept_in(run)
    assert (run / "round_1" / "verdicts.jsonl").read_text().startswith(begun)

    models = ("DiffusionPretrainedTrainer__P", "PseudoLabelTrainer__P_round1", "PseudoLabelTrainer__P_roundfinetune")
    first, second, last = (results / f"{model}__2d" / "fold_0" for model in models)
    for before, after in ((first, second), (second, last)):
        assert str(before / "checkpoint_final.pth") in next(after.glob("training_log*")).read_text()
    image = torch.from_numpy(read_preprocessed(str(folder / "nnUNetCompactPlans_2d_unlabeled" / "tiny_100.b2nd")))
    teachers = [Teacher(Model(str(first.parent), ("0",), "", "cpu", mirroring)) for mirroring in (False, True)]
    plain, mirrored = (most_probable(t.logits(image)[0], t.label_manager)[0].numpy() for t in teachers)
    labels = load_prediction(str(run / "round_1" / "predicted"), "tiny_100").labels
    assert np.array_equal(labels, plain) and not np.array_equal(labels, mirrored)
    assert not Path(confidence_folder(str(run / "round_1" / "predicted"))).exists()
    final = results / "PseudoLabelTrainer__P__2d" / "fold_0" / "checkpoint_final.pth"
    assert final.read_bytes() == (last / "checkpoint_final.pth").read_bytes()

    images = Path(os.environ["nnUNet_raw"]) / tiny.NAME / "imagesTr"
    (tmp_path / "in").mkdir()
    shutil.copy(next(images.glob("tiny_003*")), tmp_path / "in")
    predict = ["nnUNetv2_predict", "-d", str(tiny.ID), "-c", "2d", "-f", "0", "-tr", "PseudoLabelTrainer", "-p", "P"]
    predict += ["-i", tmp_path / "in", "-o", tmp_path / "out", "-device", "cpu", "-npp", "1", "-nps", "1"]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ  # stock nnU-Net's own commands do not inherit it
    run_command(predict, env=os.environ | command_environment(None, "cpu")).check_returncode()
    assert (tmp_path / "out" / "tiny_003.nii.gz").is_file()


@pytest.mark.slow
def test_the_mean_teacher_trains_a_round_and_the_fine_tuning_leaves_the_pool_out(world, results):
    """A run of its own on the same data; the teacher speaks from the first step on."""
    folder, _, _ = world
    shutil.copyfile(folder / "R.json", folder / "M.json")
    block = json.loads((folder / "M.json").read_text())["nnunet_diffusion"]
    block["MeanTeacherTrainer"] = {"supervised_share": 0.0, "least_dice": 0.0}
    edit_json(folder / "M.json", plans_name="M", nnunet_diffusion=block)
    command = ["M" if part == "R" else part for part in COMMAND]
    trainer = "PseudoLabelMeanTeacherTrainer"
    assert main([*command, "--round_trainer", trainer, "--finetune"]) == 0
    with_pool, last = (results / f"{trainer}__M_{name}__2d" / "fold_0" for name in ("round1", "roundfinetune"))
    log, last_log = (next(fold.glob("training_log*")).read_text() for fold in (with_pool, last))
    kept = pseudo_cases(folder / "nnUNetCompactPlans_2d_pseudo" / "M__2d__fold_0" / "round_1")
    assert f"annotated cases, {len(kept)} cases with pseudo labels" in log and "Pool: loss" in log
    assert "unlabeled images" in log and "unlabeled images" not in last_log and "Pool: loss" not in last_log
    outcome = results / f"{trainer}__M__2d" / "fold_0" / "checkpoint_final.pth"
    assert outcome.read_bytes() == (last / "checkpoint_final.pth").read_bytes()
    assert main([*command, "--round_trainer", trainer, "--finetune", "--status"]) == 0
    assert main([*command, "--finetune"]) == 1, "another trainer of the rounds is another run"


@pytest.mark.slow
def test_killed_at_random_moments_the_same_command_ends_the_same(world, tmp_path):
    """Two kills, or as many as NNUNET_DIFFUSION_KILLS says; kept cases, pseudo labels and weights are the same."""
    folder, seconds, fresh = world
    environment = os.environ | {
        "nnUNet_preprocessed": str(tmp_path / "preprocessed"),
        "nnUNet_results": str(tmp_path / "results"),
    }
    command = killable(*COMMAND, "--rounds", "1")
    rng, kills, is_new = random.Random(0), 0, True
    while kills < KILLS:
        if is_new:
            shutil.rmtree(tmp_path / "results", ignore_errors=True)
            shutil.rmtree(tmp_path / "preprocessed", ignore_errors=True)
            shutil.copytree(fresh, tmp_path / "preprocessed" / tiny.NAME)
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(rng.uniform(0.1, 0.9) * seconds) == 0
            is_new = True  # the end came before the kill: once more from the beginning
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            is_new = False
            kills += 1
    run_command(command, env=environment).check_returncode()
    mine = run_folder(tmp_path / "preprocessed" / tiny.NAME)
    verdicts = [(run / "round_1" / "verdicts.jsonl").read_text().splitlines() for run in (mine, run_folder(folder))]
    assert verdicts[0][1:] == verdicts[1][1:], "the first line says by which teacher"
    assert pseudo_cases(mine / "round_1") == pseudo_cases(run_folder(folder) / "round_1")
    for case in pseudo_cases(mine / "round_1"):
        maps = [open_pseudo_label(run / "round_1", case).segmentation[:] for run in (mine, run_folder(folder))]
        assert np.array_equal(*maps)
    name = Path(tiny.NAME, "PseudoLabelTrainer__R__2d", "fold_0", "checkpoint_final.pth")
    weights = [
        torch.load(root / name, map_location="cpu", weights_only=False)["network_weights"]
        for root in (tmp_path / "results", Path(os.environ["nnUNet_results"]))
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_an_empty_pool_and_a_pool_of_another_plan_are_named(world):
    folder, _, _ = world
    pool = folder / "nnUNetCompactPlans_2d_unlabeled"
    identity = pool / ".nnunet_diffusion" / "identity.json"
    content = identity.read_text()
    edit_json(identity, spacing=[9, 9])
    with pytest.raises(UserError, match="preprocessed with other spacing"):
        the_run()
    identity.write_text(content)
    pool.rename(folder / "away")
    try:
        with pytest.raises(UserError, match="the pool is empty"):
            the_run()
    finally:
        (folder / "away").rename(pool)


def no_network_here(*_, **__):
    raise AssertionError("the process that goes on to train loads no network and touches no GPU")


@pytest.fixture
def without_networks(monkeypatch):
    """This process may neither load a network nor make a CUDA context: other processes have to."""
    monkeypatch.setattr("nnunet_diffusion.rounds.teacher.nnUNetPredictor.__init__", no_network_here)
    monkeypatch.setattr(torch.cuda, "_lazy_init", no_network_here)


@pytest.mark.slow
def test_the_process_that_trains_next_never_predicts_and_as_many_others_do_as_there_are_gpus(
    world, without_networks, tmp_path, monkeypatch
):
    """Two processes, each with several cases in its hands, and a filter in two more: what one made before."""
    folder, _, _ = world
    rounds = the_run(num_gpus=2, workers=Workers(2))
    entry, run = Round(1, cases=rounds.state.round(1).cases), run_folder(folder)
    before = {case: load_prediction(str(run / "round_1" / "predicted"), case) for case in entry.cases}
    monkeypatch.setattr(rounds.places, "folder", str(tmp_path / "run"))
    monkeypatch.setattr(rounds.places, "reports", str(tmp_path / "reports"))
    assert rounds.request.predictors == Workers(2, at_once=AT_ONCE)
    rounds.predict(entry)
    assert not torch.cuda.is_initialized()
    for case in entry.cases:
        now = load_prediction(rounds.places.predicted(1), case)
        assert np.array_equal(now.labels, before[case].labels) and now[1:] == before[case][1:]
    filter_round(rounds.places, rounds.cases, entry, [])
    assert pseudo_cases(rounds.places.round(1)) == pseudo_cases(run / "round_1")
    assert read_verdicts(rounds.places, entry) == read_verdicts(the_run().places, the_run().state.round(1))


@pytest.mark.slow
def test_a_case_that_cannot_be_predicted_waits_with_the_reason(world, tmp_path, monkeypatch):
    rounds = the_run()
    entry = Round(1, cases=rounds.state.round(1).cases)
    monkeypatch.setattr(rounds.places, "folder", str(tmp_path / "run"))
    monkeypatch.setattr(rounds.places, "reports", str(tmp_path / "reports"))
    shutil.copytree(run_folder(world[0]) / "round_1" / "predicted", rounds.places.predicted(1))
    Path(rounds.places.predicted(1), "tiny_101.b2nd").unlink()
    with pytest.raises(FileNotFoundError, match="tiny_101"):
        filter_round(rounds.places, rounds.cases, entry, [])
    killed_cases = {}

    def kill_one(work, tasks, workers, description, killed):
        killed_cases.update(tasks)
        killed["tiny_101"] = "its worker died"
        return iter(())

    monkeypatch.setattr("nnunet_diffusion.rounds.loop.work_on", kill_one)
    rounds.predict(entry)
    assert list(killed_cases) == ["tiny_101"]
    monkeypatch.setattr("nnunet_diffusion.rounds.filtering.save", lambda *_: None)
    monkeypatch.setattr("nnunet_diffusion.rounds.filtering.remove_pseudo_labels", lambda *_: None)
    filter_round(rounds.places, rounds.cases, entry, [])
    verdict = read_verdicts(rounds.places, entry)["tiny_101"]
    assert verdict == Verdict(WAIT, [], {"case": ["it was not predicted: its worker died"]})
    assert "it was not predicted" in Path(rounds.places.reports, "round_1", "report.md").read_text()


@pytest.mark.slow
def test_what_only_the_filter_needs_goes_and_rounds_that_are_not_kept(world, tmp_path, monkeypatch):
    rounds = the_run(keep_rounds=1)
    assert not Path(confidence_folder(rounds.places.predicted(1))).exists(), "it was filtered"
    run, places = run_folder(world[0]), rounds.places
    monkeypatch.setattr(places, "folder", str(tmp_path / "run"))
    for number in (1, 2, 3):
        shutil.copytree(run / "round_1", places.round(number))
        shutil.rmtree(places.predicted(number))
        mark_predictions(places, number)
    foreign = Path(places.predicted(2), "mine.b2nd")
    foreign.touch()
    verdicts = Path(places.verdicts(1)).read_text()
    remove_rounds(places, 2)
    assert not Path(places.predicted(1)).exists() and not pseudo_cases(places.round(1))
    assert Path(places.verdicts(1)).read_text() == verdicts
    assert pseudo_cases(places.round(2)) == pseudo_cases(run / "round_1") and foreign.exists()
    shutil.rmtree(Path(places.predicted(2)) / ".nnunet_diffusion")
    with pytest.raises(UserError, match="predicted: was not made by nnunet_diffusion, which does not touch it"):
        remove_rounds(places, 3)
    assert foreign.exists() and pseudo_cases(places.round(3))
    object.__setattr__(places.request, "keep_rounds", 0)
    remove_rounds(places, 9)
    assert foreign.exists()
