"""What makes a scan or a label unusable, told before it costs hours of preprocessing or training."""

import math
import os
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import nibabel
import numpy as np
import pandas as pd
import SimpleITK as sitk

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.voxels import (
    GEOMETRIC_ENDINGS,
    NIFTI_ENDINGS,
    PICTURE_ENDINGS,
    read_voxels,
    require_readable_name,
    unreadable,
)


class Geometry(NamedTuple):
    """Where the voxels lie, in SimpleITK's axis order (x, y, z), lengths in mm, LPS; of a picture its size alone."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]


def read_geometry(path: str) -> Geometry | None:
    """Reads an image's header only; None for file types that are not known here.

    Raises:
        UserError: If the file is missing, empty or unreadable, or does not hold one 3-D image or picture.
    """
    require_readable_name(path)
    _require_content(path)
    if not path.endswith((*GEOMETRIC_ENDINGS, *PICTURE_ENDINGS)):
        return None
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise UserError(unreadable(path, error)) from error
    if path.endswith(PICTURE_ENDINGS):
        return Geometry(reader.GetSize(), (1.0, 1.0), (0.0, 0.0), (1.0, 0.0, 0.0, 1.0))
    size, components = reader.GetSize(), reader.GetNumberOfComponents()
    spacing = _nifti_spacing(path) if path.endswith(NIFTI_ENDINGS) else reader.GetSpacing()
    if len(size) != 3 or components != 1:
        raise UserError(
            f"{path}: is {len(size)}-D, of size {size}, with {components} value(s) a voxel: "
            "give every channel or time point as a 3-D file of its own"
        )
    if not all(math.isfinite(length) and length > 0 for length in spacing):
        said = _rounded(spacing)
        raise UserError(f"{path}: its header gives the spacing {said} mm: correct it, or take the case out")
    return Geometry(size, reader.GetSpacing(), reader.GetOrigin(), reader.GetDirection())


def number_of_channels(images: Sequence[str]) -> int:
    """Counts the channels that the files of a case hold together: one each, but for pictures.

    Raises:
        UserError: If a picture cannot be read.
    """
    shapes = [read_voxels(path).shape if path.endswith(PICTURE_ENDINGS) else () for path in images]
    return sum(shape[2] if len(shape) == 3 else 1 for shape in shapes)


def orientation(geometry: Geometry) -> str:
    """Says where the voxel axes run to, such as `LPS`; the nearest directions of an oblique scan."""
    return sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(geometry.direction)


def check_image(path: str) -> Geometry | None:
    """Reads a whole image once and refuses what nnU-Net cannot learn from; returns its geometry.

    Raises:
        UserError: If the file is missing, empty, truncated or unreadable, is not 3-D, holds NaN or infinite voxels,
            or all its voxels have the same value.
    """
    if geometry := read_geometry(path):
        check_values(path, read_voxels(path))
    return geometry


def check_values(path: str, voxels: np.ndarray) -> None:
    """Refuses the voxels of an image, in an array of any shape, if they are not finite or all the same.

    Raises:
        UserError: Beginning with `path`, the file that they were read from.
    """
    lowest, highest = voxels.min(), voxels.max()  # NaN if any voxel is
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        count = int(voxels.size - np.isfinite(voxels).sum())
        raise UserError(f"{path}: {count} of {voxels.size} voxels are NaN or infinite: mend or remove the file")
    if lowest == highest:
        raise UserError(f"{path}: every voxel is {lowest}, there is nothing to see: mend or remove the file")


def check_label(path: str, label_values: Collection[int]) -> Geometry | None:
    """Reads a whole label map once and refuses values that the data set does not declare; returns its geometry.

    Args:
        path: The label file.
        label_values: The integers that may occur, background and ignore label included.

    Raises:
        UserError: If the file cannot be read, is not 3-D or a picture of one channel, or has other values.
    """
    geometry = read_geometry(path)
    if geometry is None:
        return None
    if (channels := number_of_channels([path])) != 1:
        raise UserError(f"{path}: a label map has one value a pixel, not {channels}: save it in gray levels")
    found = np.sort(pd.unique(read_voxels(path).ravel()))  # hashing: much faster than np.unique on a scan
    if fractions := [float(value) for value in found if not float(value).is_integer()]:
        raise UserError(f"{path}: label values must be whole numbers, not {_some(fractions)}: is this an image?")
    if unknown := [int(value) for value in found if value not in label_values]:
        raise UserError(
            f"{path}: label values {_some(unknown)} are not among the declared {sorted(label_values)}: "
            "declare them or correct the file"
        )
    return geometry


def check_same_geometry(path: str, geometry: Geometry | None, reference: str, expected: Geometry | None) -> None:
    """Refuses a file that does not lie on the reference file's voxels.

    Spacings agree as nnU-Net's own verification demands. Directions and origins may differ by the rounding of a header:
    less than a voxel over a scan of 500, and a tenth of a voxel.

    Raises:
        UserError: Naming what differs of size, spacing, origin and direction, and both values.
    """
    if geometry is None or expected is None:
        return
    agrees = {
        "size": geometry.size == expected.size,
        "spacing": np.allclose(geometry.spacing, expected.spacing),
        "origin": np.allclose(geometry.origin, expected.origin, rtol=0, atol=0.1 * min(expected.spacing)),
        "direction": np.allclose(geometry.direction, expected.direction, rtol=0, atol=1e-3),
    }
    differences = [
        f"{name} {_rounded(getattr(geometry, name))} against {_rounded(getattr(expected, name))}"
        for name, same in agrees.items()
        if not same
    ]
    if differences:
        raise UserError(
            f"{path} does not lie on the voxels of {reference}: {'; '.join(differences)}: resample one onto the other"
        )


def check_channels(images: Sequence[str], read: Callable[[str], Geometry | None] = check_image) -> Geometry | None:
    """Refuses a case whose channels, one file each, are not usable images on the same voxels; returns their geometry.

    Args:
        images: One path per channel.
        read: `check_image`, or `read_geometry` to look at the headers only, which takes milliseconds.

    Raises:
        UserError: Naming the first file that is wrong, and how.
    """
    geometry = read(images[0])
    for path in images[1:]:
        check_same_geometry(path, read(path), images[0], geometry)
    return geometry


def check_labeled_case(
    images: Sequence[str], label: str, label_values: Collection[int], trust_voxels: bool = False
) -> None:
    """Refuses a labeled case with an unusable channel or label, or of which not all lie on the same voxels.

    Args:
        images: One path per channel.
        label: The label file.
        label_values: The integers that may occur in it, background and ignore label included.
        trust_voxels: The label lies on the image's voxels whatever its header says: only their sizes must agree.

    Raises:
        UserError: Naming the first file that is wrong, and how.
    """
    geometry = check_channels(images)
    label_geometry = check_label(label, label_values)
    if trust_voxels and geometry and label_geometry:
        label_geometry = geometry._replace(size=label_geometry.size)
    check_same_geometry(label, label_geometry, images[0], geometry)


def label_values(labels: dict[str, int | list[int]]) -> list[int]:
    """Lists the values that a label map may hold, sorted; `labels` as in dataset.json, a region is a list of them."""
    return sorted({0}.union(*([value] if isinstance(value, int) else value for value in labels.values())))


def _require_content(path: str) -> None:
    """Refuses what cannot be opened, with the system's reason: SimpleITK calls all of it missing."""
    try:
        with open(path, "rb") as f:
            is_empty = not f.read(1)
    except IsADirectoryError:
        raise UserError(f"{path}: is not a file: restore the file or take the case out") from None
    except OSError as error:
        link = f"is a link to {os.readlink(path)}, which " if os.path.islink(path) else ""
        reason = f"{link}cannot be read ({error.strerror})"
        raise UserError(f"{path}: {reason}: restore the file or take the case out") from error
    if is_empty:
        raise UserError(f"{path}: is an empty file: copy or download it again")


def _nifti_spacing(path: str) -> tuple[float, ...]:
    """Reads the header's own: SimpleITK and nibabel silently make 1 of a spacing of 0, SimpleITK of NaN as well."""
    kind = nibabel.Nifti2Image if nibabel.Nifti2Image.path_maybe_image(path)[0] else nibabel.Nifti1Image
    with nibabel.openers.ImageOpener(path) as f:
        header = kind.header_class.from_fileobj(f, check=False)
    return tuple(float(length) for length in header["pixdim"][1:4])


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.6g}") for value in values)


def _some(values: list, limit: int = 10) -> str:
    return str(values[:limit]) + (f" and {len(values) - limit} more" if len(values) > limit else "")
