"""How far a work on many cases is: from files whose times are known."""

import json
import os
import time

import pytest

from nnunet_diffusion.cli import main
from nnunet_diffusion.progress import Progress, progress, rate
from nnunet_diffusion.records import Journal, read_lines


def test_the_rate_is_that_of_the_last_cases():
    now = time.time()
    per_hour, idle_s = rate([now - 100, now - 90, now - 80])
    assert per_hour == pytest.approx(2 / 20 * 3600) and idle_s == pytest.approx(80, abs=1)
    assert rate([]) == (None, None) and rate([now])[0] is None
    slow_then_fast = [now - 1e6 - 100 * i for i in range(300)] + [now - i for i in range(200)]
    assert rate(slow_then_fast)[0] == pytest.approx(3600)


def test_done_failed_and_left_by_hand(tmp_path):
    for case in ("a", "b", "other"):
        (tmp_path / f"{case}.b2nd").touch()
    found = progress(
        "pool", ["a", "b", "c", "d"], str(tmp_path), ".b2nd", {"b": "was bad, is done", "c": "bad", "x": ""}
    )
    assert (found.done, found.failed, found.left) == (2, {"c": "bad"}, 1)
    assert found.told().splitlines()[1] == "  c: bad" and "2 done, 1 failed, 1 left" in found.told()
    nothing = progress("pool", ["a"], str(tmp_path / "none"), ".b2nd", {})
    assert nothing == Progress("pool", 0, {}, 1, None, None) and nothing.told() == "pool: 0 done, 0 failed, 1 left"
    many = Progress("pool", 0, {str(i): "bad" for i in range(7)}, 0, None, None).told()
    assert many.count("bad") == 5 and many.endswith("...")


def test_looking_at_a_journal_leaves_what_another_process_is_writing(tmp_path):
    path = tmp_path / "failed.jsonl"
    Journal(str(path), {}).add("a", "bad")
    with open(path, "a") as f:
        f.write('["b", "ba')
    before = path.read_bytes()
    assert [line[0] for line in read_lines(str(path))[0]] == ["made from", "a"] and path.read_bytes() == before
    assert read_lines(str(tmp_path / "none")) == ([], 0)


def test_json_goes_with_status(nnunet_folders, capsys):
    for command in (["plan_and_preprocess", "-d", "1"], ["rounds", "-d", "1", "-c", "2d", "-f", "0"]):
        assert main([*command, "--json"]) == 1
        assert "--json: goes with --status" in capsys.readouterr().err


def test_the_command_says_how_far_the_pool_is(nnunet_folders, capsys):
    import tiny

    raw = tiny.write_raw(labeled=1, unlabeled=3)
    (raw / "imagesUn" / "tiny_101_0000.nii.gz").write_bytes(b"no scan")
    command = ["plan_and_preprocess", "-d", str(tiny.ID), "-pl", "CompactPlanner", "-c", "2d", "-np", "1"]
    assert main(command) == 1
    folder = nnunet_folders / "nnUNet_preprocessed" / tiny.NAME / "nnUNetCompactPlans_2d_unlabeled"
    os.remove(folder / "tiny_102.b2nd")
    capsys.readouterr()
    assert main([*command, "--status", "--json"]) == 1
    labeled, pool = json.loads(capsys.readouterr().out)
    assert (labeled["done"], labeled["failed"], labeled["left"]) == (1, {}, 0)
    assert (pool["done"], list(pool["failed"]), pool["left"]) == (1, ["tiny_101"], 1)
    assert "tiny_101_0000.nii.gz" in pool["failed"]["tiny_101"]
    tiny.write_scans(raw / "imagesUn", 3, first=100)
    assert main(command) == 0 and main([*command, "--status"]) == 0
    assert "2d, pool: 3 done, 0 failed, 0 left" in capsys.readouterr().out
