"""The unlabelled scans of a data set: the table `unlabeled` of dataset.json."""

import os
from typing import Any

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json
from nnunet_diffusion.names import safe_name
from nnunet_diffusion.preprocessing.scan_checks import PICTURE_ENDINGS
from nnunet_diffusion.schemas import Splits


def absolute_path(folder: str, path: str) -> str:
    """A path of dataset.json as nnU-Net reads it: `$VARS` expanded, relative ones below the data set's folder."""
    return os.path.abspath(os.path.join(folder, os.path.expandvars(path)))


def is_case_name(name: str) -> bool:
    """Whether a case may be called so: the name becomes a file's name, in whichever folder nnU-Net puts the case."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0")


def unlabeled_cases(dataset_folder: str, dataset_json: dict) -> dict[str, list[str]]:
    """The absolute image paths, one per channel, of every unlabelled case.

    Args:
        dataset_folder: nnUNet_raw/DatasetXXX_Name, below which relative paths lie.
        dataset_json: The content of its dataset.json: `unlabeled` is `{case: {"images": [path per channel]}}`.

    Returns:
        {case: [path per channel]} in the table's order; empty if there is no such table. The files need not exist.

    Raises:
        UserError: If the table is not of that form, a case lacks a channel, is labelled as well, or has
            a name that cannot be a file's.
    """
    where = os.path.join(dataset_folder, "dataset.json")
    table = dataset_json.get("unlabeled", {})
    if not isinstance(table, dict):
        raise UserError(f"{where}: 'unlabeled' must map cases to their images, not be a {type(table).__name__}")
    num_channels = len(dataset_json["channel_names"])
    labeled = dataset_json.get("dataset", {})  # without it, nnU-Net takes what is in imagesTr and labelsTr
    cases = {}
    for case, entry in table.items():
        images = entry.get("images") if isinstance(entry, dict) else None
        if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
            raise UserError(f'{where}: unlabeled case {case!r} must be {{"images": [path per channel]}}, not {entry!r}')
        is_whole_picture = len(images) == 1 and images[0].endswith(PICTURE_ENDINGS)  # its channels are counted later
        if len(images) != num_channels and not is_whole_picture:
            raise UserError(f"{where}: unlabeled case {case!r} has {len(images)} images for {num_channels} channels")
        if not is_case_name(case):
            raise UserError(f"{where}: unlabeled case {case!r} cannot be a file's name: rename it")
        label = os.path.join(dataset_folder, "labelsTr", case + dataset_json["file_ending"])
        if case in labeled or os.path.exists(label):
            raise UserError(f"{where}: case {case!r} is both labelled and in 'unlabeled': take it out of one of them")
        cases[case] = [absolute_path(dataset_folder, path) for path in images]
    return cases


# ---------------------------------------------------------------- folds


def read_splits(path: str) -> list[dict[str, list[str]]]:
    """The folds of a splits_final.json: [{"train": cases, "val": cases}, ...].

    Raises:
        UserError: If it is damaged, or a case has a name that cannot be a file's.
        OSError: If it cannot be read.
    """
    splits: list[dict[str, Any]] = read_json(path, Splits, "correct it, or remove it: nnUNetv2_train splits anew")
    for number, split in enumerate(splits):
        for part in ("train", "val"):
            for case in split[part]:
                safe_name(case, f"{path}: [{number}].{part}", "take it out")
    return splits
