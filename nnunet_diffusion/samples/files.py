"""A folder of drawn images: NIfTI files that nnU-Net would take for scans, and samples.json, which says how they came.

Sample 7 is `sample_00007_0000.nii.gz`, with a file for each channel. They lie as a scan does: the plan's spacing, its
axes transposed back; the orientation is not in a plan and taken to be LPS. A 2-D sample is one slice, 1 mm thick.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import SimpleITK as sitk
from typing_extensions import NotRequired

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json, write_json
from nnunet_diffusion.image_files import write_scan
from nnunet_diffusion.names import safe_name
from nnunet_diffusion.pretraining.schemas import SampledPlan
from nnunet_diffusion.records import made_from, refuse_other
from nnunet_diffusion.samples.intensities import plan_scales, to_intensities, to_normalized
from nnunet_diffusion.schemas import Score, Strict

DESCRIPTION = "samples.json"
REMEDY = "draw them again with nnunet_diffusion sample"
SLICE_THICKNESS_MM = 1.0
FILE = re.compile(r"sample_(\d{5})_0000\.nii\.gz")


class Samples(Strict):
    """samples.json."""

    denoiser: str
    plan: SampledPlan
    body_share: NotRequired[Score]


def begin(folder: str, description: Mapping[str, Any]) -> None:
    """Creates the folder, or checks that what it holds was drawn in the same way.

    Args:
        folder: Of the samples.
        description: Denoiser, plan, sampler, steps and seed, as JSON has it.

    Raises:
        UserError: If it holds other samples.
    """
    path = os.path.join(folder, DESCRIPTION)
    wanted = made_from(description)["values"]
    if os.path.exists(path):
        refuse_other(folder, made_from(read_description(folder)), made_from(wanted), "remove it or give another -o")
    elif numbers_in(folder, 1):
        raise UserError(f"{folder}: has samples, but no {DESCRIPTION} that says whose they are: give another -o")
    os.makedirs(folder, exist_ok=True)
    write_json(path, wanted)


def read_description(folder: str) -> dict[str, Any]:
    """Reads samples.json.

    Raises:
        UserError: If there is none, or it is not one; with file and key.
    """
    path = os.path.join(folder, DESCRIPTION)
    try:
        content = read_json(path, Samples, REMEDY)
    except FileNotFoundError:
        raise UserError(f"{folder} has no {DESCRIPTION}: draw samples with nnunet_diffusion sample first") from None
    plan = content["plan"]
    for key in ("dataset_name", "plans_name"):
        safe_name(plan[key], f"{path}: plan.{key}", REMEDY)
    if sorted(plan["transpose_forward"]) != [0, 1, 2]:
        raise UserError(f"{path}: plan.transpose_forward: must be an order of 3 axes: {REMEDY}")
    if len(plan["normalization_schemes"]) != len(plan["channel_names"]):
        raise UserError(f"{path}: plan.normalization_schemes: must be one for each of plan.channel_names: {REMEDY}")
    try:
        plan_scales(plan)
    except KeyError as error:
        raise UserError(f"{path}: plan.intensities: a channel has no {error}: {REMEDY}") from error
    return {"body_share": 0.0, **content}


def numbers_in(folder: str, channels: int) -> list[int]:
    """Lists the samples of which every channel is there, sorted."""
    files = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    numbers = sorted(int(match[1]) for match in map(FILE.fullmatch, files) if match)
    return [n for n in numbers if all(file_name(n, channel) in files for channel in range(channels))]


def file_name(number: int, channel: int) -> str:
    """Names the file of one channel of a sample."""
    return f"sample_{number:05d}_{channel:04d}.nii.gz"


def write_sample(folder: str, number: int, image: np.ndarray, plan: Mapping[str, Any]) -> None:
    """Writes a (C, X, Y[, Z]) image in the plan's normalization, in intensities; each file whole or not at all."""
    intensities = to_intensities(image, plan_scales(plan))
    volumes, spacing_mm = intensities, list(plan["spacing"])
    if image.ndim == 3:
        volumes, spacing_mm = intensities[:, None], [SLICE_THICKNESS_MM, *spacing_mm]
    backward = np.argsort(plan["transpose_forward"])
    for channel in reversed(range(len(volumes))):  # with its first channel a sample is complete
        scan = sitk.GetImageFromArray(np.ascontiguousarray(volumes[channel].transpose(backward)))
        scan.SetSpacing([float(spacing_mm[axis]) for axis in backward[::-1]])
        write_scan(scan, os.path.join(folder, file_name(number, channel)))


def read_samples(folder: str, numbers: Sequence[int], plan: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Yields (C, X, Y[, Z]) images in the plan's normalization, as they were given to `write_sample`.

    Raises:
        UserError: If a file cannot be read or has another size than the plan's patch.
    """
    scales, shape = plan_scales(plan), tuple(plan["patch_size"])
    for number in numbers:
        paths = [os.path.join(folder, file_name(number, channel)) for channel in range(len(scales))]
        try:
            volumes = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(path)) for path in paths])
            volumes = volumes.transpose(0, *[axis + 1 for axis in plan["transpose_forward"]])
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{paths[0]}: cannot be read ({error}): remove it, and draw it again") from error
        image = volumes[:, 0] if len(shape) == 2 else volumes
        if image.shape[1:] != shape or len(volumes.shape) != 4:
            raise UserError(f"{paths[0]}: has {image.shape[1:]} voxels, the plan's patch {shape}: draw it again")
        yield to_normalized(image, scales)
