"""Label maps with new values, on the voxels of their images."""

import os
from collections.abc import Mapping

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.image_files import holds, proven_to_hold, write_scan
from nnunet_diffusion.preprocessing.scan_checks import NIFTI_ENDINGS, read_geometry, read_voxels


def relabel(label: str, image: str, values: Mapping[int, int], target: str) -> None:
    """Writes a label map with other values; its header is the image's.

    Args:
        label: The label file; each of its voxels has one of the keys of `values`.
        image: A file of the same size and file type, whose geometry is taken; nnU-Net's readers disagree about which
            field of a NIfTI header counts, so a header that is not the image's may mean another place to one of them.
        values: {value in `label`: value in `target`}, 0 to 65535.
        target: Where to write; a file that holds the same already stays.

    Raises:
        UserError: If `target` exists with other voxels.
        OSError: If it cannot be written; it is then what it was.
    """
    voxels = mapped(read_voxels(label), values)
    if not os.path.exists(target):
        _write(voxels, image, target)
    elif not holds(target, voxels):
        raise UserError(
            f"{target} exists and is not what {label} becomes: remove the data set, or take another id and name"
        )


def mapped(voxels: np.ndarray, values: Mapping[int, int]) -> np.ndarray:
    """Looks every voxel up in `values`; returns the smallest unsigned type that holds all new values.

    By hand: voxels [0, 3, 3, 1] with {0: 0, 1: 5, 3: 2} become [0, 2, 2, 5].
    """
    table = np.zeros(max(values) + 1, np.min_scalar_type(max(values.values())))
    table[list(values)] = list(values.values())
    return table[np.rint(voxels).astype(np.uint16)]


def _write(voxels: np.ndarray, image: str, path: str) -> None:
    if path.endswith(NIFTI_ENDINGS):
        like = nibabel.load(image)
        header = like.header.copy()
        header.set_data_dtype(voxels.dtype)
        with proven_to_hold(voxels, path) as temporary:
            nibabel.save(type(like)(voxels.reshape(like.shape, order="F"), None, header), temporary)
        return
    geometry = read_geometry(image)
    assert geometry is not None, "SimpleITK's file types have a geometry"
    output = sitk.GetImageFromArray(voxels)
    output.SetSpacing(geometry.spacing)
    output.SetOrigin(geometry.origin)
    output.SetDirection(geometry.direction)
    write_scan(output, path)
