"""Every kind of file that nnU-Net could not learn from is refused, naming the file; good ones pass."""

import errno
import gzip
import json

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.preprocessing.cases import unlabeled_cases
from nnunet_diffusion.preprocessing.scan_checks import (
    Geometry,
    check_channels,
    check_image,
    check_label,
    check_labeled_case,
    number_of_channels,
    read_geometry,
)

SHAPE = (6, 7, 8)  # z, y, x


def noise(shape=SHAPE):
    return np.random.default_rng(0).normal(0, 100, shape).astype(np.float32)


def write(path, array, spacing=(1.0, 1.5, 2.5), origin=(-10.0, 20.0, 3.0), direction=(1, 0, 0, 0, 1, 0, 0, 0, 1)):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path))
    return str(path)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_good_image_passes_in_every_format(tmp_path, ending):
    path = write(tmp_path / f"scan{ending}", noise())
    geometry = check_image(path)
    assert geometry == read_geometry(path)
    assert geometry.size == (8, 7, 6)
    assert np.allclose(geometry.spacing, (1.0, 1.5, 2.5)) and np.allclose(geometry.origin, (-10, 20, 3))


def test_int16_with_slope_is_not_taken_for_truncated(tmp_path):
    # The header of a scaled NIfTI makes SimpleITK report floats, twice the bytes that are in the file.
    image = nibabel.Nifti1Image(noise().astype(np.int16), np.eye(4), dtype=np.int16)
    image.header.set_slope_inter(2.0, 1.0)
    nibabel.save(image, tmp_path / "scan.nii")
    check_image(str(tmp_path / "scan.nii"))


def test_other_byte_order(tmp_path):
    array = np.zeros(SHAPE, np.int16)
    array[0, 0, 0] = 2
    image = nibabel.Nifti1Image(array, np.eye(4), nibabel.Nifti1Header(endianness=">"))
    nibabel.save(image, tmp_path / "label.nii.gz")
    check_image(str(tmp_path / "label.nii.gz"))
    with pytest.raises(UserError, match=r"values \[2\] are not"):  # 512 if its bytes were taken in the wrong order
        check_label(str(tmp_path / "label.nii.gz"), {0, 1})


def test_compressed_after_truncation(tmp_path):
    path = write(tmp_path / "scan.nii.gz", noise())
    with open(path, "rb") as f:
        content = gzip.decompress(f.read())
    with gzip.open(path, "wb") as f:
        f.write(content[:-100])
    with pytest.raises(UserError, match=r"scan.nii.gz: cannot be read.*1596 bytes.*announces 1696"):
        check_image(path)  # 352 + 4 * 6 * 7 * 8 = 1696


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("lost", [9, 600])
def test_truncated_file(tmp_path, ending, lost):
    path = write(tmp_path / f"scan{ending}", noise())
    with open(path, "rb") as f:
        content = f.read()
    with open(path, "wb") as f:
        f.write(content[:-lost])
    with pytest.raises(UserError, match=rf"scan{ending}: cannot be read"):
        check_image(path)


def test_empty_file_foreign_file_folder_and_nothing(tmp_path):
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    (tmp_path / "text.nii.gz").write_text("this is no image")
    (tmp_path / "folder.nii.gz").mkdir()
    for name, message in [
        ("empty.nii.gz", "is an empty file: copy"),
        ("text.nii.gz", "cannot be read, truncated or no image"),
        ("folder.nii.gz", "is not a file"),
        ("nothing.nii.gz", "cannot be read .No such file"),
    ]:
        for read in (read_geometry, check_image):
            with pytest.raises(UserError, match=f"{name}: {message}"):
                read(str(tmp_path / name))


def test_four_dimensions_and_colors(tmp_path):
    volume = sitk.GetImageFromArray(noise())
    sitk.WriteImage(sitk.JoinSeries([volume, volume, volume]), str(tmp_path / "film.nii.gz"))
    sitk.WriteImage(sitk.Compose(volume, volume), str(tmp_path / "color.nii.gz"))
    with pytest.raises(UserError, match=r"film.nii.gz: is 4-D, of size \(8, 7, 6, 3\)"):
        read_geometry(str(tmp_path / "film.nii.gz"))
    with pytest.raises(UserError, match="color.nii.gz: is 3-D.* 2 value"):
        read_geometry(str(tmp_path / "color.nii.gz"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite(tmp_path, value):
    # SimpleITK writes them to NIfTI but reads 0.
    array = noise()
    array[1, 2, 3] = array[0, 0, 0] = value
    for ending in (".nii.gz", ".nii", ".mha"):
        with pytest.raises(UserError, match=f"scan{ending}: 2 of 336 voxels are NaN or infinite"):
            check_image(write(tmp_path / f"scan{ending}", array))


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha"])
@pytest.mark.parametrize("length", [0.0, -1.5, np.nan, np.inf])
def test_spacing_that_is_no_length(tmp_path, ending, length):
    """SimpleITK reads 1 where a NIfTI header gives 0, NaN or infinity, and hands the others on."""
    path = tmp_path / f"scan{ending}"
    write(path, noise())
    if ending == ".mha":
        path.write_bytes(path.read_bytes().replace(b"ElementSpacing = 1 1.5", b"ElementSpacing = 1 %g" % length))
    else:
        content = gzip.decompress(path.read_bytes()) if ending == ".nii.gz" else path.read_bytes()
        content = content[:84] + np.float32(length).tobytes() + content[88:]  # pixdim[2]
        path.write_bytes(gzip.compress(content) if ending == ".nii.gz" else content)
    with pytest.raises(UserError, match=rf"scan{ending}: its header gives the spacing \(.*: correct it"):
        read_geometry(str(path))


def test_what_is_there_but_cannot_be_read_is_not_called_missing(tmp_path, monkeypatch):
    path = write(tmp_path / "scan.nii.gz", noise())
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "gone.nii.gz")
    with pytest.raises(UserError, match="link.nii.gz: is a link to .*gone.nii.gz, which cannot be read .No such file"):
        read_geometry(str(tmp_path / "link.nii.gz"))

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)  # tests may run as root, who may read everything
    with pytest.raises(UserError, match="scan.nii.gz: cannot be read .Permission denied.: restore"):
        read_geometry(path)


def test_constant_image(tmp_path):
    path = write(tmp_path / "scan.nii.gz", np.full(SHAPE, -1000, np.int16))
    read_geometry(path)  # its header is fine
    with pytest.raises(UserError, match="scan.nii.gz: every voxel is -1000"):
        check_image(path)


def test_label_values(tmp_path):
    array = np.zeros(SHAPE, np.uint8)
    array[0, 0, :4] = [1, 2, 7, 9]
    path = write(tmp_path / "label.nii.gz", array)
    check_label(path, {0, 1, 2, 7, 9})
    with pytest.raises(UserError, match=r"label.nii.gz: label values \[7, 9\] are not among the declared \[0, 1, 2\]"):
        check_label(path, {0, 1, 2})
    check_label(write(tmp_path / "label.nii.gz", array.astype(np.float32)), {0, 1, 2, 7, 9})
    with pytest.raises(UserError, match=r"whole numbers, not \[0.5, 3.5, 4.5\]"):
        check_label(write(tmp_path / "label.nii.gz", array / 2.0), {0, 1})
    scaled = nibabel.Nifti1Image(array, np.eye(4))
    scaled.header.set_slope_inter(0.5, 0)
    nibabel.save(scaled, tmp_path / "label.nii.gz")
    array = array.astype(np.float32)
    array[0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"whole numbers, not \[nan\]"):
        check_label(write(tmp_path / "label.nii.gz", array), {0, 1, 2, 7, 9})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (6, 7, 9)}, r"size \(9.0, 7.0, 6.0\) against \(8.0, 7.0, 6.0\)"),
        ({"spacing": (1.0, 1.5, 2.0)}, r"spacing \(1.0, 1.5, 2.0\) against \(1.0, 1.5, 2.5\)"),
        ({"origin": (-10, 21, 3)}, r"origin \(-10.0, 21.0, 3.0\) against \(-10.0, 20.0, 3.0\)"),
        ({"direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)}, r"direction \(-1.0, .*against \(1.0, "),
    ],
)
def test_geometry_that_differs_is_named(tmp_path, change, message):
    image = write(tmp_path / "scan_0000.nii.gz", noise())
    shape = change.pop("shape", SHAPE)
    label = write(tmp_path / "scan.nii.gz", np.zeros(shape, np.uint8), **change)
    with pytest.raises(UserError, match=r"scan.nii.gz does not lie on the voxels of .*scan_0000.nii.gz: " + message):
        check_labeled_case([image], label, {0, 1})
    second = write(tmp_path / "scan_0001.nii.gz", noise(shape), **change)
    for read in (read_geometry, check_image):
        with pytest.raises(UserError, match=r"scan_0001.nii.gz does not lie on .*scan_0000.nii.gz: " + message):
            check_channels([image, second], read)


def test_rounding_in_headers_is_no_mismatch(tmp_path):
    image = write(tmp_path / "scan_0000.nii.gz", noise())
    label = write(tmp_path / "scan.nii.gz", np.zeros(SHAPE, np.uint8), origin=(-10.01, 20.0, 3.0))
    check_labeled_case([image], label, {0})


def test_files_without_geometry_are_left_to_nnunet(tmp_path):
    (tmp_path / "scan.tif").write_bytes(b"x")
    assert check_image(str(tmp_path / "scan.tif")) is None
    assert isinstance(read_geometry(write(tmp_path / "a.nrrd", noise())), Geometry)


def table(**unlabeled):
    return {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "dataset": {"a": {}}, "unlabeled": unlabeled}


def test_unlabeled_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("SCANS", "/scans")
    content = table(
        b={"images": ["imagesUn/b.nii.gz"]}, c={"images": ["$SCANS/c.nii.gz"]}, d={"images": ["../d.nii.gz"]}
    )
    assert unlabeled_cases(str(tmp_path), json.loads(json.dumps(content))) == {
        "b": [str(tmp_path / "imagesUn" / "b.nii.gz")],
        "c": ["/scans/c.nii.gz"],
        "d": [str(tmp_path.parent / "d.nii.gz")],
    }
    assert unlabeled_cases(str(tmp_path), {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}) == {}


@pytest.mark.parametrize(
    ("unlabeled", "message"),
    [
        ({"b": ["b.nii.gz"]}, r"unlabeled: b: .*not \['b.nii.gz'\]: cases are"),
        ({"b": {"images": "b.nii.gz"}}, "unlabeled: b.images: .*not 'b.nii.gz': cases are"),
        ({"b": {"images": ["b.nii.gz", "c.nii.gz"]}}, "unlabeled case 'b' has 2 images for 1 channels"),
        ({"../b": {"images": ["b.nii.gz"]}}, "unlabeled: '../b' cannot be the name of a file .*separator.*rename"),
        ({"a": {"images": ["a.nii.gz"]}}, "case 'a' is both labeled and in 'unlabeled'"),
    ],
)
def test_malformed_table_of_unlabeled_cases(tmp_path, unlabeled, message):
    with pytest.raises(UserError, match=f"dataset.json: {message}"):
        unlabeled_cases(str(tmp_path), table(**unlabeled))


def test_unlabeled_must_be_a_table_and_not_in_labels_folder(tmp_path):
    content = {"channel_names": {"0": "CT"}, "file_ending": ".nii.gz", "unlabeled": ["b.nii.gz"]}
    with pytest.raises(UserError, match=r"dataset.json: unlabeled: .*valid dictionary, not \['b.nii.gz'\]"):
        unlabeled_cases(str(tmp_path), content)
    (tmp_path / "labelsTr").mkdir()
    (tmp_path / "labelsTr" / "b.nii.gz").write_bytes(b"x")
    content["unlabeled"] = {"b": {"images": ["b.nii.gz"]}}
    with pytest.raises(UserError, match="'b' is both labeled"):
        unlabeled_cases(str(tmp_path), content)


def test_nnunet_itself_would_read_over_these(tmp_path):
    # Why images are read here a second time; when this fails, nnU-Net's reader has learned to refuse.
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    array = noise()
    array[1, 2, 3] = np.nan
    path = write(tmp_path / "nan.nii.gz", array)
    assert np.isfinite(SimpleITKIO().read_images([path])[0]).all()
    with pytest.raises(UserError, match="nan.nii.gz: 1 of 336 voxels"):
        check_image(path)
    short = write(tmp_path / "short.nii.gz", noise())
    with open(short, "rb") as f:
        content = f.read()
    with open(short, "wb") as f:
        f.write(content[: len(content) // 2])
    SimpleITKIO().read_images([short])
    with pytest.raises(UserError, match="short.nii.gz: cannot be read"):
        check_image(short)


# ---------------------------------------------------------------- pictures


def picture(path, *shape, values=255):
    array = np.random.default_rng(0).integers(0, values, shape, dtype=np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=len(shape) == 3), str(path))
    return str(path)


def test_a_picture_has_a_size_and_as_many_channels_as_it_says(tmp_path):
    color, gray = picture(tmp_path / "a.png", 5, 7, 3), picture(tmp_path / "b.bmp", 5, 7)
    assert check_image(color).size == read_geometry(gray).size == (7, 5)
    assert [number_of_channels([path]) for path in (color, gray, "scan.nii.gz")] == [3, 1, 1]
    check_labeled_case([color], picture(tmp_path / "label.png", 5, 7, values=2), {0, 1})


def test_pictures_that_cannot_be_used_are_named(tmp_path):
    image = picture(tmp_path / "a.png", 5, 7, 3)
    with pytest.raises(UserError, match=r"b.png does not lie on the voxels of .*a.png: size \(7.0, 6.0\) against"):
        check_labeled_case([image], picture(tmp_path / "b.png", 6, 7, values=2), {0, 1})
    with pytest.raises(UserError, match=r"c.png: a label map has one value a pixel, not 3"):
        check_labeled_case([image], picture(tmp_path / "c.png", 5, 7, 3, values=2), {0, 1})
    with pytest.raises(UserError, match=r"d.png: every voxel is 0"):
        check_image(picture(tmp_path / "d.png", 5, 7, values=1))
    (tmp_path / "e.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"e.png: cannot be read, truncated or no image"):
        check_image(str(tmp_path / "e.png"))
