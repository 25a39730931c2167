"""What something was made from: recorded, compared, sealed; results of cases appended line by line."""

import json
import os

import pytest

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import NotWritten
from nnunet_diffusion.records import (
    Journal,
    differs,
    made_from,
    read_journal,
    read_sealed,
    refuse_other,
    sha256,
    size_and_time,
    some,
    write_sealed,
)


def test_what_differs_is_named_value_by_value_and_case_by_case():
    known = made_from({"lr": {"a": 1, "b": (1, 2)}, "gone": 5, "same": None}, {"pool": {"p": "1@1", "q": "1@1"}})
    now = made_from({"lr": {"a": 2, "b": [1, 2]}, "same": None}, {"pool": {"p": "1@2", "r": "1@1"}, "more": {"x": ""}})
    assert differs(known, known) == []
    assert differs(known, now) == [
        "lr.a: was 1, now 2",
        "gone: was 5, now None",
        "pool cases: missing: q; new: r; changed: p",
        "more cases: new: x",
    ]
    assert differs(known, now, growing=("pool", "more"))[2:] == ["pool cases: missing: q; changed: p"]
    with pytest.raises(UserError, match=r"^out: was made from something else: undo that, or remove it\n  lr.a: was 1"):
        refuse_other("out", known, now, "remove it")
    refuse_other("out", known, json.loads(json.dumps(known)), "remove it")


def test_long_lists_and_values_are_shortened():
    assert some("abcde") == "a, b, c, d, e" and some(f"c{i:02d}" for i in range(20_000)).endswith("c04 and 19995 more")
    assert len(differs(made_from({"x": "a" * 999}), made_from({"x": "b" * 999}))[0]) < 450


def test_scans_are_recorded_without_being_read(tmp_path):
    (tmp_path / "a.pkl").write_text("12")
    (tmp_path / "a.b2nd").write_text("123")
    for path in tmp_path.iterdir():
        os.utime(path, ns=(5, 7))
        path.chmod(0)
    assert size_and_time(str(tmp_path), "a", (".pkl", ".b2nd")) == "2@7 3@7"
    with pytest.raises(FileNotFoundError):
        size_and_time(str(tmp_path), "a", ("_seg.b2nd",))


def test_a_sealed_file_comes_back_and_says_when_it_was_edited(tmp_path):
    path = str(tmp_path / "s.json")
    assert read_sealed(path, dict[str, int], 3, "remove it") is None
    write_sealed(path, {"a": 1}, 3)
    assert read_sealed(path, dict[str, int], 3, "remove it") == {"a": 1}
    with pytest.raises(UserError, match="has format 3, this version writes 4: finish with that version, or remove it"):
        read_sealed(path, dict[str, int], 4, "remove it")
    with pytest.raises(UserError, match="s.json: a: .* not 1: restore it, or remove it"):
        read_sealed(path, dict[str, list], 3, "remove it")
    text = (tmp_path / "s.json").read_text()
    (tmp_path / "s.json").write_text(text.replace("1", "2", 1))
    with pytest.raises(UserError, match="s.json: was edited"):
        read_sealed(path, dict[str, int], 3, "remove it")


def test_a_journal_goes_on_after_a_kill_at_any_byte(tmp_path):
    path = tmp_path / "folder" / "j.jsonl"
    origin = made_from({"teacher": "a"})
    journal = Journal(str(path), origin)
    for case in "abc":
        journal.add(case, ["keep", {"é": case}])
    whole, entries = path.read_bytes(), journal.entries
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        journal = Journal(str(path), origin)
        assert all(entries[case] == entry for case, entry in journal.entries.items())
        for case in sorted(set(entries) - set(journal.entries)):
            journal.add(case, entries[case])
        assert path.read_bytes() == whole
    assert Journal(str(path), made_from({"teacher": "b"})).entries == {}, "of another teacher: from the beginning"


def test_a_finished_journal_says_when_it_was_edited_cut_or_holds_something_else(tmp_path):
    path = str(tmp_path / "j.jsonl")
    journal = Journal(path, made_from({}))
    journal.add("a", 5)
    seal = journal.seal()
    assert seal == sha256(path) and read_journal(path, seal, int, "anew") == {"a": 5}
    with pytest.raises(UserError, match="j.jsonl: a: .* not 5: restore it, or anew"):
        read_journal(path, seal, str, "anew")
    journal.add("b", 6)
    with pytest.raises(UserError, match="j.jsonl: is missing, was edited or cut: restore it, or anew"):
        read_journal(path, seal, int, "anew")


def test_a_full_disk_is_named(tmp_path):
    journal = Journal(str(tmp_path / "j.jsonl"), made_from({}))
    (tmp_path / "j.jsonl").unlink()
    (tmp_path / "j.jsonl").symlink_to("/dev/full")
    with pytest.raises(NotWritten, match="^j.jsonl was not written to"):
        journal.add("a", 5)
