"""The pure parts of the benchmarks: who is tested on, what a budget may see, and what is made of the numbers."""

import json
import sys
from pathlib import Path

import minimal
import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import label_efficiency  # noqa: E402
from flare22 import comparison, write_plans  # noqa: E402
from flare22 import parse_arguments as flare22_arguments  # noqa: E402
from label_efficiency import parse_arguments, read_arm  # noqa: E402
from mutual import deal, of_one_member  # noqa: E402
from regimes import draw, group_by_patient, hold_out, keep_labels, keep_slices, parse_budget  # noqa: E402
from report import summarize, write_arms_figure, write_figure  # noqa: E402
from train_and_test import erase_labels  # noqa: E402

from nnunet_diffusion.errors import UserError  # noqa: E402

CASES = [f"case{i:02d}" for i in range(20)]
PATIENTS = group_by_patient(CASES, {case: f"p{i // 2}" for i, case in enumerate(CASES)})  # two scans each


@pytest.mark.parametrize(
    ("text", "budget"), [("8", ("cases", 8)), ("10%", ("percent", 10.0)), ("4slices", ("slices", 4))]
)
def test_budget_is_read(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize("text", ["0", "-2", "0slices", "0%", "101%", "four", "4 slices", "2.5", ""])
def test_bad_budget_is_named(text):
    with pytest.raises(UserError, match=f"budget '{text}'"):
        parse_budget(text)


def test_a_patient_is_on_one_side_only():
    test = hold_out(PATIENTS, 3, seed=0)
    assert len(test) == 6
    assert all(set(cases) <= set(test) or not set(cases) & set(test) for cases in PATIENTS.values())
    assert test == hold_out(dict(reversed(PATIENTS.items())), 3, seed=0)
    assert test != hold_out(PATIENTS, 3, seed=1)


@pytest.mark.parametrize("number", [0, 10, 11])
def test_somebody_is_left_to_train_and_to_test_on(number):
    with pytest.raises(UserError, match="hold out"):
        hold_out(PATIENTS, number, seed=0)


def test_a_case_without_a_patient_is_named():
    with pytest.raises(UserError, match="case19"):
        group_by_patient(CASES, dict.fromkeys(CASES[:-1], "p"))


@pytest.mark.parametrize("budgets", [["1", "2", "7", "20"], ["1%", "20%", "50%", "100%"]])
@pytest.mark.parametrize("seed", [0, 1])
def test_smaller_budgets_are_part_of_larger_ones(budgets, seed):
    drawn = [set(draw(budget, PATIENTS, seed)) for budget in budgets]
    assert all(small < large for small, large in zip(drawn, drawn[1:], strict=False))
    assert drawn[-1] == set(CASES)


def test_per_cent_counts_patients_and_is_never_nobody():
    assert len(draw("20%", PATIENTS, 0)) == 4  # 2 of 10 patients, two scans each
    assert len(draw("1%", PATIENTS, 0)) == 2


def test_seeds_draw_different_cases():
    assert len({frozenset(draw("4", PATIENTS, seed)) for seed in range(5)}) > 1


def test_slices_come_from_different_patients_where_possible():
    assert list(draw("4slices", PATIENTS, 0).values()) == [1] * 4
    assert sorted(draw("23slices", PATIENTS, 0).values()) == [2] * 7 + [3] * 3  # 10 patients: 2 each, 3 left over
    few, many = draw("4slices", PATIENTS, 0), draw("23slices", PATIENTS, 0)
    assert all(many[case] >= number for case, number in few.items())


def test_more_cases_than_there_are_is_refused():
    with pytest.raises(UserError, match="only 20 training cases"):
        draw("21", PATIENTS, 0)


@pytest.mark.parametrize("axis", [0, 2])
def test_exactly_the_drawn_slices_stay_labeled(axis):
    label = np.zeros((6, 5, 6), np.uint8)
    label[2:5, 1, 2:5] = 3
    masked, chosen = keep_slices(label, axis, 2, ignore=4, seed="0 case")
    masked, reference = np.moveaxis(masked, axis, 0), np.moveaxis(label, axis, 0)
    assert len(chosen) == 2 and set(chosen) <= {2, 3, 4}
    for i in range(6):
        assert (masked[i] == (reference[i] if i in chosen else 4)).all()
    assert label.max() == 3
    assert set(keep_slices(label, axis, 1, ignore=4, seed="0 case")[1]) < set(chosen)


def test_too_many_slices_are_refused():
    label = np.zeros((6, 4, 4), np.uint8)
    label[1:3] = 1
    with pytest.raises(UserError, match="only 2 show an organ"):
        keep_slices(label, 0, 3, ignore=2, seed="")


def test_settings_reach_the_arm():
    given = ["DiffusionPretrainedTrainer.initial_lr=0.01", "nnUNetTrainer.x=1"]
    trainer, settings = read_arm("full,timestep=150", given)
    assert (trainer, settings) == ("DiffusionPretrainedTrainer", {"initial_lr": 0.01, "timestep": 150})
    assert read_arm("scratch", [])[1] == {"start": "scratch"}
    with pytest.raises(UserError, match="no arm 'ful'"):
        read_arm("ful", [])
    with pytest.raises(UserError, match="key=value"):
        read_arm("full,timestep", [])


@pytest.mark.parametrize("seed", range(3))
def test_some_cases_stay_complete_and_the_others_keep_few_labels(seed):
    labels = ["liver", "spleen", "aorta", "colon"]
    kept = keep_labels(CASES, labels, 3, (1, 2), seed)
    numbers = [len(names) for names in kept.values()]
    assert list(kept) == CASES
    assert sorted(set(numbers)) == [1, 2, 4]
    assert numbers.count(4) == 3
    assert kept == keep_labels(CASES[::-1], labels, 3, (1, 2), seed) != keep_labels(CASES, labels, 3, (1, 2), seed + 3)
    assert all(names == [name for name in labels if name in names] for names in kept.values())


@pytest.mark.parametrize(("complete", "keep"), [(21, (1, 2)), (0, (0, 2)), (0, (2, 1)), (0, (1, 5))])
def test_more_labels_than_there_are_cannot_be_kept(complete, keep):
    with pytest.raises(UserError, match="cannot keep"):
        keep_labels(CASES, ["a", "b", "c", "d"], complete, keep, 0)


def test_erased_labels_are_background_and_are_not_sampled(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    seg = np.array([-1, 0, 1, 2, 3, 4], dtype=np.int8).reshape(1, 1, 2, 3)
    locations = {label: np.argwhere(seg == label) for label in (1, 2, 3)}
    image = np.ones(seg.shape, np.float32)
    nnUNetDatasetBlosc2.save_case(image, seg, {"class_locations": locations, "spacing": 1}, str(source / "a"))
    job = {"cases": {"a": None}, "kept_labels": {"a": ["spleen"]}, "patch_size": (2, 3)}
    dataset_json = {"labels": {"background": 0, "liver": 1, "spleen": 2, "aorta": 3, "ignore": 4}}
    erase_labels(job, dataset_json, source, target)
    (target / "a.b2nd").symlink_to(source / "a.b2nd")
    _, erased, _, properties = nnUNetDatasetBlosc2(str(target), ["a"]).load_case("a")
    assert erased[:].ravel().tolist() == [-1, 0, 0, 2, 0, 4]
    assert list(properties["class_locations"]) == [2]
    assert nnUNetDatasetBlosc2(str(source), ["a"]).load_case("a")[1][:].tolist() == seg.tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_every_group_is_dealt_as_many_cases(seed):
    groups = [["a"], ["b", "c"], ["d"]]
    dealt = deal(CASES, groups, seed)
    assert sorted(list(dealt.values()).count(group) for group in groups) == [6, 7, 7]
    assert dealt == deal(CASES[::-1], groups, seed) != deal(CASES, groups, seed + 2)


def test_one_member_is_the_mean_over_members():
    members = [{"b": {"liver": 0.2, "spleen": None}}, {"b": {"liver": 0.4, "spleen": None}}]
    run = of_one_member({"arm": "ps", "dice": {}, "members": members})
    assert run["arm"] == "ps, one member" and run["dice"] == {"b": {"liver": pytest.approx(0.3), "spleen": None}}


def make_run(arm, seed, dice):
    return {
        "arm": arm,
        "budget": "2",
        "seed": seed,
        "trainer": "T",
        "training_cases": ["a"],
        "test_cases": ["b", "c"],
        "dice": {"b": {"liver": dice, "spleen": None}, "c": {"liver": dice, "spleen": dice + 0.1}},
        "protocol": {"dataset": "D", "configuration": "2d"},
        "seconds": {"train": 1.0},
        "machine": {},
    }


def test_differences_are_paired_by_seed(tmp_path):
    dice = {("scratch", 0): 0.4, ("scratch", 1): 0.6, ("full", 0): 0.5, ("full", 1): 0.6}
    table, content = summarize([make_run(arm, seed, value) for (arm, seed), value in dice.items()], "scratch")
    full = next(group for group in content["summary"] if group["arm"] == "full")
    # liver 0.5 and spleen 0.6 make 0.55, then 0.65: mean 0.6, sd 0.1 / sqrt 2; scratch has 0.45 and 0.65
    assert (full["mean"], full["sd"], full["minus_control"]) == (0.6, 0.0707, [0.1, 0.0])
    assert "| 2 | full | 2 | 0.600 ± 0.071 | +0.050 ± 0.071 | 1 of 2 |" in table
    write_figure(content, tmp_path / "figure.png")
    write_arms_figure(content, tmp_path / "arms.png", "scratch")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["arms.png", "figure.png"]


def test_the_papers_figures_stand_above_ours_and_only_where_they_belong():
    protocol = {"dataset": "Dataset501_KBP", "configuration": "2d"}
    run = {**make_run("full", 0, 0.4), "budget": "10%", "protocol": protocol}
    content = summarize([run, {**run, "budget": "2"}], "scratch")[1]
    table = comparison(content)
    assert "| Dice | 10% | 2 |\n|---|---|---|\n| Huang et al. 2024, FLARE22, as published | 0.785 |  |" in table
    assert "| ours, full | 0.450 | 0.450 |" in table and "**Dataset501_KBP is not FLARE22" in table
    content["arms"]["full"]["dataset"] = "Dataset022_FLARE22"
    assert "is not FLARE22" not in comparison(content) and "What is known to differ" in comparison(content)


def test_the_length_of_pretraining_goes_into_a_copy_of_the_plan(tmp_path):
    block = {"DenoisingDiffusionTrainer": {"schedule": "cosine"}}
    (tmp_path / "P.json").write_text(json.dumps({"plans_name": "P", "nnunet_diffusion": block}))
    args = flare22_arguments(["--pretraining_epochs", "3"])
    assert write_plans(tmp_path, "P", args) == "P_flare22"
    copy = json.loads((tmp_path / "P_flare22.json").read_text())
    assert copy["plans_name"] == "P_flare22"
    assert copy["nnunet_diffusion"]["DenoisingDiffusionTrainer"] == {"schedule": "cosine", "num_epochs": 3}
    assert json.loads((tmp_path / "P.json").read_text())["plans_name"] == "P"


def test_help_is_quick_and_complete(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["label_efficiency.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        parse_arguments()
    assert "--make_split" in capsys.readouterr().out


def test_the_pool_is_what_is_neither_labeled_nor_tested_on(tmp_path, monkeypatch):
    base = tmp_path / "Dataset501_Neck"
    for folder, cases, endings in (
        ("data", CASES, (".b2nd", "_seg.b2nd", ".pkl")), ("data_unlabeled", ["u1", "u2"], (".b2nd", ".pkl")),
    ):  # fmt: skip
        (base / folder).mkdir(parents=True)
        for case in cases:
            for ending in endings:
                (base / folder / f"{case}{ending}").touch()
    plans = minimal.plans("2d", name="p") | {"dataset_name": base.name}
    plans["configurations"]["2d"]["data_identifier"] = "data"
    (base / "p.json").write_text(json.dumps(plans))
    (tmp_path / "aside").write_text(f"{CASES[0]}\n")
    arms = [f"{arm},start=scratch" for arm in label_efficiency.POOL_ARMS]
    command = f"x -d 501 -c 2d -p p --test_cases 5 --budgets 4 --seeds 0 --no_teacher --set_aside {tmp_path / 'aside'}"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--arms", *arms])
    jobs = label_efficiency.describe_runs(label_efficiency.parse_arguments(), base, tmp_path)
    assert [job["arm"] for job in jobs] == arms
    for job in jobs:
        pool, labeled, test = job["pool"], set(job["cases"]), set(job["test_cases"])
        assert len(labeled) == 4 and len(test) == 5 and not labeled & test
        assert pool["data_unlabeled"] == ["u1", "u2"] and set(pool["data"]) == set(CASES) - labeled - test - {CASES[0]}
        assert (
            CASES[0] not in labeled
            and job["protocol"]["pool"] == 2 + len(pool["data"])
            and job["settings"]["start"] == "scratch"
        )
    assert {tuple(job["cases"]) for job in jobs} == {tuple(jobs[0]["cases"])}, "the same labels for every arm"
