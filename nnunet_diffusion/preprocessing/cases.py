"""Which cases a data set has: labeled, unlabeled, preprocessed, in which fold; where their files are."""

import os
import re
from collections.abc import Iterable
from typing import Any

from nnunetv2.paths import nnUNet_raw

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import check_shape, read_json
from nnunet_diffusion.names import safe_name
from nnunet_diffusion.preprocessing.scan_checks import PICTURE_ENDINGS, label_values, number_of_channels
from nnunet_diffusion.schemas import Dataset, Splits, UnlabeledFiles

UNLABELED_FILES = (".pkl", ".b2nd")  # in the order in which they appear: with its .b2nd a case is complete
LABELED_FILES = (".pkl", "_seg.b2nd", ".b2nd")
RENAME = "rename the case"

# ---------------------------------------------------------------- raw


def case_name(case: str, where: str) -> str:
    """Returns the name of a case that may be preprocessed; `x_seg.b2nd` are the labels of x, not the image of x_seg.

    Raises:
        UserError: If it ends so, or cannot be a file's.
    """
    if case.endswith("_seg"):
        raise UserError(f"{where}: {case!r} ends with _seg, as nnU-Net's files of labels do: {RENAME}")
    return safe_name(case, where, RENAME)


def absolute_path(folder: str, path: str) -> str:
    """Reads a path of dataset.json as nnU-Net does: `$VARS` expanded, relative ones below the data set's folder."""
    return os.path.abspath(os.path.join(folder, os.path.expandvars(path)))


def labeled_cases(dataset_name: str) -> tuple[dict, dict]:
    """Finds the labeled cases of a data set in nnUNet_raw, as nnU-Net does.

    Returns:
        The content of dataset.json, and the files as `labeled_files` has them.

    Raises:
        UserError: If there is none, a label has no image, a case does not have one image per channel or has a name
            that cannot be a file's, or dataset.json is not what nnU-Net asks for.
    """
    folder = os.path.join(nnUNet_raw, dataset_name)
    dataset_json = read_json(os.path.join(folder, "dataset.json"), Dataset)
    _refuse_disorder(dataset_json, folder)
    dataset = labeled_files(folder, dataset_json)
    if "dataset" not in dataset_json:
        ending, labels = dataset_json["file_ending"], os.path.join(folder, "labelsTr")
        named = {name.removesuffix(ending) for name in os.listdir(labels) if name.endswith(ending)}
        if lonely := sorted(named - dataset.keys()):
            raise UserError(f"{labels}: {lonely} have no image in imagesTr: add it or take the label out")
    if not dataset:
        raise UserError(f"{folder}: no labeled case; nnU-Net plans with at least one")
    channels = len(dataset_json["channel_names"])
    if wrong := sorted(case for case, files in dataset.items() if number_of_channels(files["images"]) != channels):
        raise UserError(f"{folder}: {wrong} do not have one image (or, as a picture, one value) for each of the "
                        f"{channels} channels")  # fmt: skip
    return dataset_json, dataset


def _refuse_disorder(dataset_json: dict, folder: str) -> None:
    """Raises UserError if the values that regions are written with are not one label of the data set for each."""
    labels, order = dataset_json["labels"], dataset_json.get("regions_class_order", [])
    if any(isinstance(value, list) and len(value) > 1 for value in labels.values()):
        number, known = len(labels.keys() - {"background", "ignore"}), label_values(labels)[1:]
        if len(order) != number or not set(order) <= set(known):
            raise UserError(f"{folder}/dataset.json: regions_class_order: must be {number} of {known}, not {order}")


def labeled_files(dataset_folder: str, dataset_json: dict) -> dict[str, dict]:
    """Finds the labeled cases as nnU-Net does: case -> {"images": paths, "label": path}.

    nnU-Net lists a folder in twelve forks of the process, and one that has threads may wait for them for ever: here the
    process lists it itself.

    Raises:
        UserError: If a case has a name that cannot be a file's.
    """
    if "dataset" in dataset_json:
        found = {
            case: {
                "images": [absolute_path(dataset_folder, path) for path in files["images"]],
                "label": absolute_path(dataset_folder, files["label"]),
            }
            for case, files in dataset_json["dataset"].items()
        }
        where = f"{os.path.join(dataset_folder, 'dataset.json')}: dataset"
    else:
        where, ending = os.path.join(dataset_folder, "imagesTr"), dataset_json["file_ending"]
        found = {}
        for name in sorted(name for name in os.listdir(where) if name.endswith(ending)):
            case = name[: -len(ending) - 5]  # without the number of the channel, as _0000
            label = os.path.join(dataset_folder, "labelsTr", case + ending)
            files = found.setdefault(case, {"images": [], "label": label})
            if re.fullmatch(r"_\d{4}", name[len(case) : -len(ending)]):
                files["images"].append(os.path.join(where, name))
    return {case_name(case, where): files for case, files in found.items()}


def unlabeled_cases(dataset_folder: str, dataset_json: dict) -> dict[str, list[str]]:
    """Reads the absolute image paths, one per channel, of every unlabeled case.

    Args:
        dataset_folder: nnUNet_raw/DatasetXXX_Name, below which relative paths lie.
        dataset_json: The content of its dataset.json: `unlabeled` is `{case: {"images": [path per channel]}}`.

    Returns:
        {case: [path per channel]} in the table's order; empty if there is no such table. The files need not exist.

    Raises:
        UserError: If the table is not of that form, a case lacks a channel, is labeled as well, or has
            a name that cannot be a file's.
    """
    where = os.path.join(dataset_folder, "dataset.json")
    table = dataset_json.get("unlabeled", {})
    check_shape(table, dict[str, UnlabeledFiles], f"{where}: unlabeled", 'cases are {"images": [path per channel]}')
    num_channels = len(dataset_json["channel_names"])
    labeled = dataset_json.get("dataset", {})  # without it, nnU-Net takes what is in imagesTr and labelsTr
    cases = {}
    for case, entry in table.items():
        images = entry["images"]
        is_whole_picture = len(images) == 1 and images[0].endswith(PICTURE_ENDINGS)  # its channels are counted later
        if len(images) != num_channels and not is_whole_picture:
            raise UserError(f"{where}: unlabeled case {case!r} has {len(images)} images for {num_channels} channels")
        case_name(case, f"{where}: unlabeled")
        label = os.path.join(dataset_folder, "labelsTr", case + dataset_json["file_ending"])
        if case in labeled or os.path.exists(label):
            raise UserError(f"{where}: case {case!r} is both labeled and in 'unlabeled': take it out of one of them")
        cases[case] = [absolute_path(dataset_folder, path) for path in images]
    return cases


# ---------------------------------------------------------------- preprocessed


def pool_folder(preprocessed_dataset_folder_base: str, data_identifier: str) -> str:
    """Names the folder of the preprocessed unlabeled scans of one configuration."""
    return os.path.join(preprocessed_dataset_folder_base, data_identifier + "_unlabeled")


def pool_identifiers(folder: str) -> list[str]:
    """Lists the cases of which every file is there, sorted; none if there is no such folder."""
    return complete_cases(folder, UNLABELED_FILES)


def complete_cases(folder: str, endings: Iterable[str]) -> list[str]:
    """Lists the cases that have a file with each of `endings` in `folder`, sorted."""
    files = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    names = (name.removesuffix(".b2nd") for name in files if name.endswith(".b2nd"))
    return sorted(name for name in names if all(name + ending in files for ending in endings))


# ---------------------------------------------------------------- folds


def read_splits(path: str) -> list[dict[str, list[str]]]:
    """Reads the folds of a splits_final.json: [{"train": cases, "val": cases}, ...].

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


def fold_of(path: str, fold: int | str) -> tuple[list[str], list[str]]:
    """Reads the training and the validation cases of one fold of a splits_final.json.

    Raises:
        UserError: As `read_splits`, and if it has no such fold.
        OSError: If it cannot be read.
    """
    splits = read_splits(path)
    if int(fold) >= len(splits):
        raise UserError(f"-f {fold}: {path} has folds 0 to {len(splits) - 1}: add it there, or take all")
    return splits[int(fold)]["train"], splits[int(fold)]["val"]
