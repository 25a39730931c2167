"""Properties of preprocessed cases are read as nnU-Net wrote them, and run no code."""

import os
import pickle
from collections import OrderedDict

import blosc2
import numpy as np
import pytest

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.preprocessing.case_files import (
    check_preprocessed,
    load_properties,
    read_preprocessed,
    refuse_unreadable,
)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_scalars_and_plain_values_come_back(tmp_path, protocol):
    path = tmp_path / "a.pkl"
    voxels = np.arange(8, dtype=np.int64).reshape(2, 4)
    written = {"spacing": [1.0, np.float64(2)], "class_locations": OrderedDict({(1, 2): voxels, 3: np.zeros((0, 4))})}
    written["sitk_stuff"] = {"direction": (1.0, 0.0), "size": np.int32(3), "affine": np.asfortranarray(voxels)}
    path.write_bytes(pickle.dumps(written, protocol))
    read = load_properties(str(path))
    assert read["spacing"] == [1, 2] and read["sitk_stuff"]["direction"] == (1, 0) and read["sitk_stuff"]["size"] == 3
    assert list(read["class_locations"]) == [(1, 2), 3] and read["class_locations"][3].shape == (0, 4)
    assert all(np.array_equal(a, voxels) for a in (read["class_locations"][1, 2], read["sitk_stuff"]["affine"]))


def test_code_is_not_run_and_damage_is_named(tmp_path):
    path = tmp_path / "a.pkl"
    for content, message in (
        (pickle.dumps({"spacing": Touch(tmp_path / "made")}), "a.pkl: .*posix.mkdir is no plain value"),
        (pickle.dumps({"spacing": np.array([Touch(tmp_path / "made")])}), "posix.mkdir is no plain value"),
        (pickle.dumps({"a": 1})[:-5], "a.pkl: is damaged"),
        (b"", "a.pkl: is damaged"),
        (pickle.dumps([1]), "a.pkl: holds a list, no properties of a case: remove .* plan_and_preprocess"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            load_properties(str(path))
    assert not (tmp_path / "made").exists()


def test_an_array_that_was_damaged_within_is_named(tmp_path):
    path = tmp_path / "a.b2nd"
    blosc2.asarray(np.arange(4096.0).reshape(1, 16, 16, 16), urlpath=str(path), mode="w")
    assert read_preprocessed(str(path)).shape == (1, 16, 16, 16)
    content = bytearray(path.read_bytes())
    content[300:600] = bytes(300)
    path.write_bytes(content)
    with pytest.raises(UserError, match="a.b2nd: is damaged .*: remove the case's files and run"):
        read_preprocessed(str(path))
    with pytest.raises(UserError, match="a.b2nd: is damaged"):
        refuse_unreadable(str(tmp_path), ["b", "a"])


def test_cases_are_looked_at_before_the_data_loader_opens_them(tmp_path):
    def write(**content):
        (tmp_path / "a.pkl").write_bytes(content.get("pkl", pickle.dumps({"spacing": [1.0]})))
        for ending in (".b2nd", "_seg.b2nd"):
            path = str(tmp_path / f"a{ending}")
            blosc2.asarray(np.zeros((1, 8, 8, 8), np.float32), urlpath=path, mode="w")

    with pytest.raises(UserError, match="a: is not preprocessed: run nnunet_diffusion plan_and_preprocess"):
        check_preprocessed(str(tmp_path), ["a"])
    write()
    check_preprocessed(str(tmp_path), ["a", "a"])
    for ending in (".b2nd", "_seg.b2nd"):
        write()
        path = tmp_path / f"a{ending}"
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(UserError, match=f"a{ending}: is damaged .*: remove the case's files and run"):
            check_preprocessed(str(tmp_path), ["a"])
    write(pkl=pickle.dumps({"spacing": Touch(tmp_path / "made")}))
    with pytest.raises(UserError, match="a.pkl: .*posix.mkdir is no plain value"):
        check_preprocessed(str(tmp_path), ["a"])
    assert not (tmp_path / "made").exists()
