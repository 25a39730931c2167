"""How much disk the pool will take, by hand."""

from types import SimpleNamespace

import pytest

from nnunet_diffusion.preprocessing.room import network_voxels
from nnunet_diffusion.preprocessing.scan_checks import Geometry


def test_voxels_in_the_networks_space_by_hand():
    scan = Geometry((100, 200, 10), (1.0, 2.0, 5.0), (0, 0, 0), ())
    assert network_voxels(scan, [0, 1, 2], SimpleNamespace(spacing=[2.5, 1.0, 1.0])) == 20 * 400 * 100
    assert network_voxels(scan, [0, 1, 2], SimpleNamespace(spacing=[1.0, 1.0])) == pytest.approx(10 * 400 * 100)
    along_x = SimpleNamespace(spacing=[2.5, 2.0])  # slices along x stay 1 mm apart
    assert network_voxels(scan, [2, 0, 1], along_x) == pytest.approx(100 * 20 * 200)


def test_the_command_says_it_before_it_starts(nnunet_folders, capsys):
    import tiny

    from nnunet_diffusion.cli import main

    tiny.write_raw(labeled=1, unlabeled=3)
    command = ["plan_and_preprocess", "-d", str(tiny.ID), "-pl", "CompactPlanner", "-c", "2d", "-np", "1"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert f"disk: 3 scans of the pool take at most {3 * 12 * 20 * 24 * 4 / 1e9:.3g} GB for 2d" in said
    assert main(command) == 0 and "disk:" not in capsys.readouterr().out, "all are there"
