"""Scans and figures on a disk that runs full: no half of a file under a final name, and the file is named."""

import re
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from full_disk import no_file_longer_than
from matplotlib.figure import Figure

from nnunet_diffusion.conversion.relabeling import relabel
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.evaluation.overlays import draw_overlay
from nnunet_diffusion.files import NotWritten
from nnunet_diffusion.image_files import save_figure, write_scan

VOXELS = np.random.default_rng(0).normal(0, 100, (9, 20, 30)).astype(np.float32)
ENDINGS = (".nii.gz", ".nii", ".nrrd", ".mha")


def message(path: Path) -> str:
    said = rf"^{re.escape(path.name)} was not written to {re.escape(str(path.parent))}, where \d+ MB are free: .*; "
    return said + "make room if that is too little, then run the same command again$"


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("kind", [np.float32, np.int16, np.uint8])
def test_what_is_written_is_what_is_read(tmp_path, ending, kind):
    path, voxels = tmp_path / f"a{ending}", VOXELS.astype(kind)
    scan = sitk.GetImageFromArray(voxels)
    scan.SetSpacing((1.0, 2.0, 3.0))
    write_scan(scan, path)
    read = sitk.ReadImage(str(path))
    assert np.array_equal(sitk.GetArrayFromImage(read), voxels) and read.GetSpacing() == (1.0, 2.0, 3.0)


@pytest.mark.parametrize("ending", ENDINGS)
def test_scan_on_a_full_disk(tmp_path, ending):
    """SimpleITK says nothing of it; afterwards the same call goes on."""
    path, scan = tmp_path / f"a{ending}", sitk.GetImageFromArray(VOXELS)
    path.write_bytes(b"the earlier one")
    with no_file_longer_than(4096), pytest.raises(NotWritten, match=message(path)):
        write_scan(scan, path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"the earlier one"]
    write_scan(scan, path)
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(path))), VOXELS)


def test_folder_that_is_no_utf8_is_refused(tmp_path):
    """SimpleITK would end the program."""
    with pytest.raises(UserError, match=r"\\udcff/a.nii.gz': is no UTF-8"):
        write_scan(sitk.GetImageFromArray(VOXELS), tmp_path / "\udcff" / "a.nii.gz")


def test_zeros_for_the_end_of_a_scan_are_noticed(tmp_path, monkeypatch):
    """A file of the right size that does not hold what was written."""

    def write_half(image, path, **_):
        voxels = sitk.GetArrayFromImage(image)
        voxels[5:] = 0
        write(sitk.GetImageFromArray(voxels), path)

    write = sitk.WriteImage
    monkeypatch.setattr(sitk, "WriteImage", write_half)
    with pytest.raises(NotWritten, match=message(tmp_path / "a.nii")):
        write_scan(sitk.GetImageFromArray(VOXELS), tmp_path / "a.nii")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_label_map_on_a_full_disk(tmp_path, ending):
    image, target = tmp_path / f"image{ending}", tmp_path / "new" / f"a{ending}"
    labels = np.random.default_rng(0).integers(0, 200, (30, 40, 50)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(image))
    target.parent.mkdir()
    values = {value: value + 1 for value in range(200)}
    with no_file_longer_than(4096), pytest.raises(NotWritten, match=message(target)):
        relabel(str(image), str(image), values, str(target))
    assert list(target.parent.iterdir()) == []
    relabel(str(image), str(image), values, str(target))
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(target))), labels + 1)


def test_label_map_keeps_a_header_with_a_scale(tmp_path):
    """The image's scale is not the label map's: voxels are what they were."""
    image = nibabel.Nifti1Image(VOXELS, np.diag([1.0, 2.0, 3.0, 1.0]))
    image.header.set_slope_inter(2.0, 5.0)
    nibabel.save(image, tmp_path / "image.nii.gz")
    labels = np.resize(np.arange(3, dtype=np.uint8), VOXELS.shape)
    nibabel.save(nibabel.Nifti1Image(labels, image.affine), tmp_path / "label.nii.gz")
    paths = [str(tmp_path / name) for name in ("label.nii.gz", "image.nii.gz", "new.nii.gz")]
    relabel(paths[0], paths[1], {0: 0, 1: 2, 2: 1}, paths[2])
    assert np.array_equal(nibabel.load(paths[2]).get_fdata(), np.array([0, 2, 1])[labels])


def test_figure_on_a_full_disk(tmp_path):
    figure, path = Figure(), tmp_path / "a.png"
    figure.subplots().imshow(VOXELS[0])
    with no_file_longer_than(4096), pytest.raises(NotWritten, match=message(path)):
        save_figure(figure, path)
    assert list(tmp_path.iterdir()) == []
    save_figure(figure, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_overlay_of_scans_that_are_in_no_file(tmp_path):
    scans = [sitk.GetImageFromArray(array) for array in (VOXELS, (VOXELS > 0).astype(np.uint8))]
    paths = [str(tmp_path / name) for name in ("image.nii.gz", "labels.nii.gz")]
    for scan, path in zip(scans, paths, strict=True):
        scan.SetSpacing((1.0, 1.5, 3.0))
        scan.SetDirection((-1, 0, 0, 0, 0, 1, 0, -1, 0))
        sitk.WriteImage(scan, path)
    draw_overlay(tmp_path / "scans.png", *scans, {}, {"background": 0, "organ": 1}, "a", is_ct=False)
    draw_overlay(tmp_path / "files.png", *paths, {}, {"background": 0, "organ": 1}, "a", is_ct=False)
    assert (tmp_path / "scans.png").read_bytes() == (tmp_path / "files.png").read_bytes()
