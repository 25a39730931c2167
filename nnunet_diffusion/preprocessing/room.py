"""How much disk the pool will take, by the headers of some of its scans."""

import shutil
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from os.path import join

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json
from nnunet_diffusion.preprocessing.cases import pool_folder, pool_identifiers, unlabeled_cases
from nnunet_diffusion.preprocessing.scan_checks import Geometry, read_geometry
from nnunet_diffusion.schemas import Dataset

VOXEL_BYTES = 4  # float32, before compression
SAMPLE = 20  # scans that are looked at


def told_room(dataset_name: str, plans_manager: PlansManager, configuration: str) -> str:
    """Says how much disk the scans that are not there take at most, and what is free; nothing if all are there."""
    raw = join(nnUNet_raw, dataset_name)
    dataset_json = read_json(join(raw, "dataset.json"), Dataset)
    plan = plans_manager.get_configuration(configuration)
    base = join(nnUNet_preprocessed, dataset_name)
    there = set(pool_identifiers(pool_folder(base, plan.data_identifier)))
    todo = [images for case, images in unlabeled_cases(raw, dataset_json).items() if case not in there]
    found = [network_voxels(geometry, plans_manager.transpose_forward, plan) for geometry in geometries(todo)]
    if not found:
        return ""
    most = sum(found) / len(found) * len(todo) * len(dataset_json["channel_names"]) * VOXEL_BYTES
    free = shutil.disk_usage(nnUNet_preprocessed).free
    return (
        f"disk: {len(todo)} scans of the pool take at most {most / 1e9:.3g} GB for {configuration}, not compressed; "
        f"{free / 1e9:.3g} GB are free"
    )


def geometries(scans: Sequence[Sequence[str]]) -> list[Geometry]:
    """Reads the headers of some scans, evenly drawn; those that cannot be read are named when they are preprocessed."""
    found = []
    for images in scans[:: max(1, len(scans) // SAMPLE)][:SAMPLE]:
        with suppress(UserError):
            found.append(read_geometry(images[0]))
    return [geometry for geometry in found if geometry is not None and len(geometry.size) == 3]


def network_voxels(geometry: Geometry, transpose_forward: Sequence[int], plan: ConfigurationManager) -> float:
    """Computes how many voxels a scan has in the network's space, without cropping.

    Args:
        geometry: Of the scan, (x, y, z).
        transpose_forward: The plan's order of the axes of (z, y, x).
        plan: With the spacing in mm in that order; a 2d plan keeps the distance between slices, along the first axis.
    """
    spacing = list(plan.spacing)
    if len(spacing) == 2:
        spacing.insert(0, geometry.spacing[::-1][transpose_forward[0]])
    return prod(geometry.size) * prod(geometry.spacing) / prod(spacing)
