"""Scans and figures that are written whole or not at all, though their libraries do not report a full disk."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic, not_written
from nnunet_diffusion.voxels import read_voxels, require_readable_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_scan(image: sitk.Image, path: str | os.PathLike) -> None:
    """Writes a scan or a label map, compressed, in the format that its name ends with; errors as `proven_to_hold`'s."""
    with proven_to_hold(sitk.GetArrayViewFromImage(image), path) as temporary:
        sitk.WriteImage(image, temporary, useCompression=True)


@contextmanager
def proven_to_hold(voxels: np.ndarray, path: str | os.PathLike) -> Iterator[str]:
    """Yields the name of a temporary file, as `atomic` does; it becomes `path` if it can be read and holds `voxels`.

    SimpleITK says nothing of a full disk when it writes NIfTI, and leaves half of a file.

    Args:
        voxels: In the order of the file, whatever their shape.
        path: The file.

    Raises:
        UserError: If the path is no UTF-8, for which SimpleITK would end the program.
        NotWritten: If the file holds anything else; `path` is then what it was.
        OSError: If the folder cannot be written to.
    """
    folder, name = os.path.split(os.path.abspath(path))
    require_readable_name(os.path.join(folder, name))
    with atomic(path) as temporary:
        try:
            yield temporary
        except RuntimeError as error:  # of other formats SimpleITK says it, each in its own way
            reason = " ".join(str(error).replace(temporary, name).split()).rpartition("ERROR: ")[2]
            raise not_written(name, folder, OSError(reason)) from error
        if not holds(temporary, voxels):
            raise not_written(name, folder, OSError("it cannot be read back"))


def holds(path: str, voxels: np.ndarray) -> bool:
    """Tells whether a file can be read to its end and has these voxels, in the order of the file."""
    try:
        return np.array_equal(read_voxels(path).ravel(), voxels.ravel(), equal_nan=True)
    except UserError:
        return False


def save_figure(figure: "Figure", path: str | os.PathLike, **options: Any) -> None:
    """Draws a matplotlib figure into memory, then writes the PNG whole or not at all.

    Args:
        figure: Of matplotlib.
        path: The PNG.
        **options: Of `Figure.savefig`.

    Raises:
        NotWritten: If the disk is full; `path` is then what it was.
        OSError: If the folder cannot be written to.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", **options)
    with atomic(path) as temporary, open(temporary, "wb") as f:
        f.write(drawn.getbuffer())
