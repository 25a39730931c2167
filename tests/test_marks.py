"""Folders that say that this program made them, and what they are: only those are removed."""

import json
import os

import pytest

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.marks import MARK, WORK, mark, mark_of, refuse_foreign, remove_marked


def test_a_marked_folder_says_what_it_is_and_can_be_removed(tmp_path):
    folder = tmp_path / "cases"
    assert mark_of(str(folder)) is None
    refuse_foreign(str(folder), dataset="A")
    mark(str(folder), dataset="A", spacing=[1.0, 2.0])
    assert mark_of(str(folder)) == {"dataset": "A", "spacing": [1.0, 2.0]}
    (folder / "a.b2nd").write_bytes(b"x")
    (folder / "below").mkdir()
    refuse_foreign(str(folder), dataset="A")
    remove_marked(str(folder), dataset="A")
    assert not folder.exists()
    remove_marked(str(folder), dataset="A")


@pytest.mark.parametrize("prepare", [
    lambda folder: (folder / "a.nii.gz").write_bytes(b"x"),
    lambda folder: mark(str(folder), dataset="B"),
])  # fmt: skip
def test_a_foreign_folder_is_named_and_stays(tmp_path, prepare):
    folder = tmp_path / "cases"
    folder.mkdir()
    prepare(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match="cases: was (not made by|made for dataset 'B', not 'A').*move it away"):
        remove_marked(str(folder), dataset="A")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("content", ["", '{"dataset": "A', "[1]", json.dumps({"spacing": [1.0]})])
def test_a_damaged_mark_and_one_of_an_earlier_version_are_still_ours(tmp_path, content):
    mark(str(tmp_path / "cases"), dataset="A")
    (tmp_path / "cases" / WORK / MARK).write_text(content)
    (tmp_path / "cases" / "a.b2nd").write_bytes(b"x")
    remove_marked(str(tmp_path / "cases"), dataset="A")
    assert not (tmp_path / "cases").exists()


def test_a_removal_that_was_killed_is_continued(tmp_path, monkeypatch):
    """The mark goes last, and a folder with nothing but what is left of it is still ours."""
    folder = str(tmp_path / "cases")
    mark(folder, dataset="A")
    for name in "abc":
        (tmp_path / "cases" / name).write_bytes(b"x")
    removed = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "remove", lambda path: removed.append(path) if len(removed) < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            remove_marked(folder, dataset="A")
    assert mark_of(folder) == {"dataset": "A"}
    for name in "abc":
        (tmp_path / "cases" / name).unlink()
    (tmp_path / "cases" / WORK / MARK).unlink()
    refuse_foreign(folder, dataset="A")
    remove_marked(folder, dataset="A")
    assert not os.path.exists(folder)


def test_a_link_to_a_folder_elsewhere_is_not_followed_into_it(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "scan.nii.gz").write_bytes(b"x")
    mark(str(tmp_path / "cases"), dataset="A")
    (tmp_path / "cases" / "link").symlink_to(tmp_path / "elsewhere")
    remove_marked(str(tmp_path / "cases"), dataset="A")
    assert (tmp_path / "elsewhere" / "scan.nii.gz").exists() and not (tmp_path / "cases").exists()
