"""The voxels of image files, read to the end."""

import gzip
import math
import zlib

import nibabel
import numpy as np
import SimpleITK as sitk
import skimage.io

from nnunet_diffusion.errors import UserError

# What SimpleITK reads and nnU-Net calls an image with a geometry; other files (tif) are only looked at for size 0.
NIFTI_ENDINGS = (".nii.gz", ".nii")
GEOMETRIC_ENDINGS = (*NIFTI_ENDINGS, ".nrrd", ".mha", ".gipl")
PICTURE_ENDINGS = (".png", ".bmp")  # 2-D, without a geometry; one file may hold several channels, such as RGB


def read_voxels(path: str) -> np.ndarray:
    """Reads all values of an image file, in any order and shape; of a picture as nnU-Net reads it, channels last.

    NIfTI files are read here because SimpleITK, without a word, makes up what is missing of a truncated one and turns
    NaN and infinity into 0; other formats it refuses, or reads as they are.

    Raises:
        UserError: If it cannot be read to its end.
    """
    try:
        if path.endswith(NIFTI_ENDINGS):
            return _nifti_voxels(path)
        if path.endswith(PICTURE_ENDINGS):
            return skimage.io.imread(path)
        return sitk.GetArrayFromImage(sitk.ReadImage(path))
    except (RuntimeError, OSError, EOFError, SyntaxError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise UserError(unreadable(path, error)) from error


def _nifti_voxels(path: str) -> np.ndarray:
    header = nibabel.load(path).dataobj
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
        content = f.read()  # to the end, where gzip compares the checksum
    count = math.prod(header.shape)
    expected = header.offset + count * header.dtype.itemsize
    if len(content) < expected:
        raise EOFError(f"{len(content)} bytes where its header announces {expected}")
    voxels = np.frombuffer(content, header.dtype, count, header.offset)
    voxels = voxels.astype(header.dtype.newbyteorder("="), copy=False)  # pandas refuses the other byte order
    return voxels if (header.slope, header.inter) == (1, 0) else voxels * header.slope + header.inter


def require_readable_name(path: str) -> None:
    """Refuses a path that is no UTF-8 (SimpleITK ends the program) or has a null character, which no file can have."""
    if "\0" in path or path.encode(errors="replace").decode() != path:
        raise UserError(f"{path!r}: is no UTF-8, which image readers need: rename the file or its folder")


def unreadable(path: str, error: Exception | str) -> str:
    """Says why an image file cannot be read."""
    reason = " ".join(str(error).split()).rpartition("ERROR: ")[2]  # SimpleITK tells its own source lines first
    return f"{path}: cannot be read, truncated or no image ({reason.rstrip('.')}): copy or download it again"
