"""Steps are run once, continued and reported; the demo goes all the way on the real nnU-Net."""

import json
import math
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from full_disk import no_file_longer_than

from nnunet_diffusion.cli import main
from nnunet_diffusion.cli.demo import arms_table, verdict
from nnunet_diffusion.commands import Step, Steps, command_environment, link
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import NotWritten
from nnunet_diffusion.marks import WORK

APPEND = "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_text((p.read_text() if p.exists() else '') + 'x')"


@pytest.fixture
def steps_of(tmp_path):
    return lambda **environment: Steps(str(tmp_path / "run"), command_environment(None, "cpu") | environment, 2)


def python(title, code, output, *arguments, **options):
    command = [os.path.basename(sys.executable), "-c", code, str(output), *arguments]
    return Step(title, command, str(output), **options)


def test_finished_step_is_skipped_next_time(steps_of, tmp_path, capsys):
    step = python("one", APPEND, tmp_path / "a")
    steps_of().run(step)
    assert "[1/2] one\n  $ python" in capsys.readouterr().out
    steps_of().run(step)
    assert (tmp_path / "a").read_text() == "x"
    assert "[1/2] one: done before" in capsys.readouterr().out


def test_step_runs_again_when_its_output_is_gone_or_what_it_depends_on_changed(steps_of, tmp_path):
    steps_of().run(python("one", APPEND, tmp_path / "a", depends_on={"epochs": 1}))
    steps_of().run(python("one", APPEND, tmp_path / "a", depends_on={"epochs": 2}))
    assert (tmp_path / "a").read_text() == "xx"
    (tmp_path / "a").unlink()
    steps_of().run(python("one", APPEND, tmp_path / "a", depends_on={"epochs": 2}))
    assert (tmp_path / "a").read_text() == "x"


def test_log_on_a_full_disk_is_named(steps_of, tmp_path):
    talks = python("talks", "import sys; print('x' * 9999); open(sys.argv[1], 'w')", tmp_path / "a")
    message = rf"talks.txt was not written to {tmp_path}/run/logs, where \d+ MB are free: File too large; make room"
    with no_file_longer_than(4096), pytest.raises(NotWritten, match=message):
        steps_of().run(talks)
    steps_of().run(talks)
    assert (tmp_path / "run" / "logs" / "talks.txt").read_text() == "x" * 9999 + "\n"


def test_what_follows_a_step_that_ran_runs_too(steps_of, tmp_path):
    first, second = python("one", APPEND, tmp_path / "a"), python("two", APPEND, tmp_path / "b")
    for _ in range(2):
        steps = steps_of()
        steps.run(first)
        steps.run(second)
    assert (tmp_path / "b").read_text() == "x"
    (tmp_path / "a").unlink()
    steps = steps_of()
    steps.run(first)
    steps.run(second)
    assert (tmp_path / "b").read_text() == "xx"


def test_incremental_step_always_runs_but_does_not_make_later_ones_run(steps_of, tmp_path):
    first, second = python("one", APPEND, tmp_path / "a", is_incremental=True), python("two", APPEND, tmp_path / "b")
    for _ in range(2):
        steps = steps_of()
        steps.run(first)
        steps.run(second)
    assert (tmp_path / "a").read_text() == "xx" and (tmp_path / "b").read_text() == "x"


def test_failing_step_tells_the_end_of_its_log_and_is_continued(steps_of, tmp_path):
    """The first time it dies half-way; the second time it gets --c and finds what the first one left."""
    model = tmp_path / "model"
    code = (
        "import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(exist_ok=True)\n"
        "if '--c' not in sys.argv: (p.parent / 'half').touch(); sys.exit('no memory left')\n"
        "(p.parent / 'half').rename(p)"
    )
    step = python("train it", code, model / "done", resume_with=["--c"], replaces=str(model))
    with pytest.raises(
        UserError, match=r"step 1, train it, failed \(exit code 1\)\n  \| no memory left\n.*train_it\.txt"
    ):
        steps_of().run(step)
    assert "no memory left" in (tmp_path / "run" / "logs" / "train_it.txt").read_text()
    steps_of().run(step)
    assert sorted(os.listdir(model)) == [WORK, "done"]


def test_step_started_anew_does_not_continue_an_older_one_and_leaves_what_is_not_ours(steps_of, tmp_path):
    model = tmp_path / "model"
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).touch(); assert '--c' not in sys.argv"
    for epochs in (1, 2):
        options = {"resume_with": ["--c"], "replaces": str(model), "depends_on": {"epochs": epochs}}
        steps_of().run(python("train", code, model / "done", **options))
        assert sorted(os.listdir(model)) == [WORK, "done"]
        (model / "checkpoint of these settings").touch()
    shutil.rmtree(model)
    (model / "mine").mkdir(parents=True)
    options["depends_on"] = {"epochs": 3}
    with pytest.raises(UserError, match="model: was not made by nnunet_diffusion, which does not touch it"):
        steps_of().run(python("train", code, model / "done", **options))
    assert os.listdir(model) == ["mine"]


def test_steps_of_all_kinds_are_run_in_order_until_one_of_a_kind_had_something_to_do(steps_of, tmp_path):
    done, ended = [], []

    def steps(*titles):
        for title in titles:
            do, is_done = (lambda title=title: done.append(title)), (lambda title=title: title in done)
            yield Step(title, do=do, is_done=is_done, kind="even" if title in "bd" else "odd")

    def command():
        yield python("one", APPEND, tmp_path / "a", then=lambda: ended.append("one"))

    steps_of().run_all(steps("a", "b", "c"), "even")
    assert done == ["a", "b"]
    steps_of().run_all(steps("a", "b", "c", "d", "e"), "even")
    assert done == ["a", "b", "c", "d"]
    for _ in range(2):
        steps_of().run_all(command())
    assert (tmp_path / "a").read_text() == "x" and ended == ["one", "one"], "what is left to do may have been killed"


def test_a_finished_step_that_is_kept_is_not_made_anew_but_names_what_has_changed(steps_of, tmp_path):
    (tmp_path / "a").touch()
    for size in ("1@1", "1@1"):
        options = {"is_kept": True, "depends_on": {"lr": {"first": 1}}, "cases": {"pool": {"p": size, "q": size}}}
        steps_of().run(python("one", APPEND, tmp_path / "a", **options))
    assert (tmp_path / "a").read_text() == "", "made by hand, and taken as it is"
    options |= {"depends_on": {"lr": {"first": 2}}, "cases": {"pool": {"p": "2@2", "r": "1@1"}}}
    message = (
        "a: was made from something else: undo that, or remove the folder .* to make it anew\n"
        "  lr.first: was 1, now 2\n  pool cases: missing: q; new: r; changed: p"
    )
    with pytest.raises(UserError, match=message):
        steps_of().run(python("one", APPEND, tmp_path / "a", **options))


@pytest.mark.parametrize("content", ["{", "[]", '{"one": 5}', '{"one": {"seconds": 1.0}}', '{"one": {"made_from": 1}}'])
def test_a_damaged_record_of_steps_is_named(steps_of, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "steps.json").write_text(content)
    with pytest.raises(UserError, match="steps.json: .*remove it, and everything is done anew"):
        steps_of()


def test_a_full_disk_is_named_with_where_and_how_much_is_free(steps_of, tmp_path):
    code = "raise OSError(28, 'No space left on device')"
    says = rf"OSError: .Errno 28.*\nits disk is full: {tmp_path} has \d+ MB free: make room, then run the same"
    with pytest.raises(UserError, match=says):
        steps_of().run(python("one", code, tmp_path / "model" / "a"))
    (tmp_path / "run" / "logs" / "two.txt").symlink_to("/dev/full")
    with pytest.raises(NotWritten, match="^two.txt was not written to .*logs, where .* MB are free"):
        steps_of().run(python("two", "print('x')", tmp_path / "a"))


def test_where_a_step_runs_does_not_decide_whether_it_is_continued(steps_of, tmp_path):
    code = (
        "import sys, pathlib; p = pathlib.Path(sys.argv[1])\n"
        "if '--c' not in sys.argv: p.with_name('half').touch(); sys.exit(1)\n"
        "assert sys.argv[2:] == ['-device', 'cuda', '--c']; p.with_name('half').rename(p)"
    )
    for device in ("cpu", "cuda"):
        step = python("one", code, tmp_path / "a", where=["-device", device], resume_with=["--c"])
        if device == "cpu":
            with pytest.raises(UserError, match="step 1, one, failed"):
                steps_of().run(step)
    steps_of().run(step)
    assert (tmp_path / "a").exists()


def test_step_that_skipped_something_is_done_but_not_forgotten(steps_of, tmp_path, capsys):
    code = "import sys, pathlib; pathlib.Path(sys.argv[1]).touch(); sys.exit('1 scan was skipped, all else is done')"
    steps = steps_of()
    steps.run(python("one", code, tmp_path / "a", partly_done_if="all else is done"))
    assert steps.partly_done == ["one"] and "| 1 scan was skipped" in capsys.readouterr().out
    with pytest.raises(UserError, match="exit code 1"):
        steps_of().run(python("two", code, tmp_path / "b", partly_done_if="something else"))


def test_a_process_that_a_step_leaves_behind_does_not_hold_it_up(steps_of, tmp_path):
    code = (
        "import subprocess, sys, pathlib\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "pathlib.Path(sys.argv[1]).write_text(str(left.pid)); print('last words')"
    )
    start = time.monotonic()
    steps_of().run(python("one", code, tmp_path / "a"))
    assert time.monotonic() - start < 30
    os.kill(int((tmp_path / "a").read_text()), signal.SIGKILL)
    assert "last words" in (tmp_path / "run" / "logs" / "one.txt").read_text()


def test_step_without_its_output_failed(steps_of, tmp_path):
    with pytest.raises(UserError, match=r"it ended without .*nothing"):
        steps_of().run(python("one", "", tmp_path / "nothing"))


def test_command_that_is_not_installed_is_named(steps_of, tmp_path):
    with pytest.raises(UserError, match="nnUNetv2_nothing is not installed"):
        steps_of().run(Step("one", ["nnUNetv2_nothing"], str(tmp_path / "a")))


def test_environment_is_for_the_commands_only_and_keeps_what_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("nnUNet_extTrainer", "/somebody/elses")
    before = dict(os.environ)
    environment = command_environment(str(tmp_path), "cpu")
    assert dict(os.environ) == before
    assert environment["OMP_NUM_THREADS"] == "3" and environment["nnUNet_raw"] == str(tmp_path / "nnUNet_raw")
    assert environment["nnUNet_extTrainer"].split(os.pathsep)[-1] == "/somebody/elses"
    assert "OMP_NUM_THREADS" not in command_environment(None, "cuda")


def test_link_replaces_an_older_one(tmp_path):
    for content in ("a", "b"):
        (tmp_path / content).write_text(content)
        link(str(tmp_path / content), str(tmp_path / "link"))
    assert (tmp_path / "link").read_text() == "b" and (tmp_path / "a").read_text() == "a"


@pytest.mark.parametrize("is_link", [True, False])
def test_a_folder_of_the_users_is_not_filled_with_links(tmp_path, capsys, is_link):
    labels, out = tmp_path / "labels", tmp_path / "out"
    labels.mkdir()
    (labels / "a.nii.gz").write_text("by hand")
    out.mkdir()
    (out / "test_labels").symlink_to(labels) if is_link else labels.rename(out / "test_labels")
    assert main(["demo", "-o", str(out)]) == 1
    assert "test_labels: was not made by nnunet_diffusion" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["test_labels"]
    assert (out / "test_labels" / "a.nii.gz").read_text() == "by hand"


def test_table_shows_arms_beside_each_other_and_their_difference():
    scratch = {"a": {"liver": 0.5, "spleen": math.nan}}
    ours = {"a": {"liver": 0.75, "spleen": math.nan}}
    lines = arms_table({"labels alone": scratch, "all scans": ours}).splitlines()
    assert lines[0].split() == ["Dice", "labels", "alone", "all", "scans", "difference"]
    assert lines[2].split() == ["liver", "0.500", "0.750", "+0.250"]
    assert lines[3].split() == ["spleen", "-", "-", "-"]
    assert lines[-1].split() == ["mean", "0.500", "0.750", "+0.250"]
    assert len({len(line) for line in lines}) == 1


def test_verdict_says_who_is_ahead():
    low, high = {"a": {"liver": 0.5}, "b": {"liver": 0.7}}, {"a": {"liver": 0.8}, "b": {"liver": 0.6}}
    assert "is ahead of what learned from the labels alone by 0.100 Dice, and better in 1 of 2" in verdict(low, high)
    assert "is behind what learned from the labels alone by 0.100 Dice, and better in 1 of 2" in verdict(high, low)
    assert "is level with what learned from the labels alone by 0.000 Dice, and better in 0 of 2" in verdict(low, low)


def test_unset_folders_are_named_with_data(monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    assert main(["demo", "--data", "1"]) == 1
    assert "nnUNet_raw" in capsys.readouterr().err


def test_synthetic_data_needs_something_to_test_on(capsys):
    assert main(["demo", "--test", "0"]) == 1
    assert "--test: at least 1" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_end_to_end_and_again(tmp_path, capsys):
    """Every step on the real nnU-Net with tiny budgets; the second call finds all of it done."""
    small = "--labeled 2 --unlabeled 2 --test 2 --epochs 1 --pretraining_epochs 1".split()
    assert main(["demo", "-o", str(tmp_path), *small]) == 0
    out = capsys.readouterr().out
    assert "labels alone  all scans  difference" in out and "[8/8] report" in out
    assert out.splitlines()[-1] == f"Report: {tmp_path / 'report.html'}"
    page = (tmp_path / "report.html").read_text()
    assert "predictions/all_scans/evaluation_nnunet.json" in page and "Cases of MeanTeacherTrainer" in page
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["arms"]) == {"labels alone", "all scans"} and len(results["seconds"]) == 7
    assert all(len(arm["cases"]) == 2 and 0 <= arm["mean"] <= 1 for arm in results["arms"].values())
    assert len(list((tmp_path / "overlays").glob("*.png"))) == 2
    assert main(["demo", "-o", str(tmp_path), *small]) == 0
    assert capsys.readouterr().out.count("done before") == 7  # the report is made each time


@pytest.mark.slow
def test_demo_on_a_users_data_set_holds_fold_0_out(tmp_path, monkeypatch, capsys):
    from nnunet_diffusion.demo.phantom import write_phantom_dataset

    for kind in ("raw", "preprocessed", "results"):
        (tmp_path / kind).mkdir()
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    raw = tmp_path / "raw" / "Dataset007_Mine"
    write_phantom_dataset(raw, 5, 1, 0, shape=(16, 36, 48), spacing_mm=(20, 8, 8))
    arguments = ["demo", "--data", "7", "-o", str(tmp_path / "out"), "--epochs", "1", "--pretraining_epochs", "1"]
    assert main(arguments) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    held_out = json.loads((tmp_path / "preprocessed" / "Dataset007_Mine" / "splits_final.json").read_text())[0]["val"]
    assert set(results["arms"]["all scans"]["cases"]) == set(held_out) and len(held_out) == 1
    assert np.isfinite(results["arms"]["all scans"]["mean"]) and (tmp_path / "out" / "report.html").is_file()
    plan = json.loads((tmp_path / "preprocessed" / "Dataset007_Mine" / "nnUNetCompactPlans.json").read_text())
    assert plan["plans_name"] == "nnUNetCompactPlans"  # the user's own plan is as it was planned
    assert "scratch" not in json.dumps(plan)
