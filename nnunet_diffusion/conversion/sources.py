"""The data sets that a partial conversion joins: nnU-Net raw data sets, or folders of images and labels."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nnunet_diffusion.conversion.dataset import Labeled, Unlabeled, refuse
from nnunet_diffusion.conversion.files import grouped, image_files, matched, single, the_ending
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.preprocessing.cases import absolute_path, unlabeled_cases
from nnunet_diffusion.preprocessing.scan_checks import GEOMETRIC_ENDINGS

DATASET_KEYS = {"dataset"}
FOLDER_KEYS = {"images", "labels", "label_names", "channel_names"}
KEYS = {"name", "about", "unlabeled", "mapping", "inside", "excludes", *DATASET_KEYS, *FOLDER_KEYS}


@dataclass(frozen=True)
class Source:
    """One data set as its files are: cases by their own names, label values of its own.

    Attributes:
        name: What its cases are prefixed with.
        folders: Where its files are.
        labels: {name: value}, without background.
        channels: Names of the channels.
        file_ending: Of its files.
        reader: nnU-Net's reader that it asks for, if any.
        labeled: {case: ([path per channel], label path)}.
        unlabeled: {case: [path per channel]}.
        annotated: {case: labels that are annotated}, of cases that are annotated in part.
    """

    name: str
    folders: list[str]
    labels: dict[str, int]
    channels: list[str]
    file_ending: str
    reader: str | None
    labeled: Labeled
    unlabeled: Unlabeled
    annotated: Mapping[str, list[str]]


def read_source(entry: Mapping[str, Any], base: str) -> Source:
    """Lists the cases of one entry of the mapping's `sources`; headers and voxels are not read.

    Args:
        entry: `dataset`, a name in nnUNet_raw or a folder; or the folders `images` and `labels` with `label_names`,
            {name: value}, and `channel_names`, a list (CT if there is none). In addition `unlabeled`, folders.
        base: Folder below which relative paths lie.

    Raises:
        UserError: If the entry, a folder or a dataset.json is not what it should be.
    """
    where = f"source {entry['name']!r}"
    if ("dataset" in entry) == bool(FOLDER_KEYS & entry.keys()):
        raise UserError(f"{where}: give either 'dataset', or 'images', 'labels' and 'label_names'")
    source = _raw_dataset(entry, base, where) if "dataset" in entry else _folders(entry, base, where)
    more = entry.get("unlabeled", [])
    folders = [absolute_path(base, os.path.expanduser(path)) for path in ([more] if isinstance(more, str) else more)]
    problems: list[str] = []
    paths = [path for folder in folders for path in image_files(folder, source.file_ending)]
    pool = grouped(paths, source.file_ending, len(source.channels), problems)
    problems += [
        f"{case}: is there twice, as {images[0]} too" for case, images in pool.items() if case in source.unlabeled
    ]
    refuse([f"{where}: {problem}" for problem in problems])
    content = {**source.__dict__, "folders": [*source.folders, *folders], "unlabeled": {**source.unlabeled, **pool}}
    return Source(**content)


def _folders(entry: Mapping[str, Any], base: str, where: str) -> Source:
    if missing := sorted({"images", "labels", "label_names"} - entry.keys()):
        raise UserError(f"{where}: lacks {missing}: give 'images', 'labels' and 'label_names', or 'dataset'")
    channels = entry.get("channel_names", ["CT"])
    if not isinstance(channels, list) or not channels:
        raise UserError(f"{where}: 'channel_names' must be a list such as [\"CT\"], not {channels!r}")
    folders = [absolute_path(base, os.path.expanduser(entry[key])) for key in ("images", "labels")]
    scans, maps = (image_files(folder) for folder in folders)
    ending = the_ending([*scans, *maps])
    labeled = _matched(scans, maps, ending, len(channels), where)
    labels = _label_values(entry["label_names"], f"{where}: 'label_names'")
    return Source(entry["name"], folders, labels, channels, ending, None, labeled, {}, {})


def _matched(scans: list[str], maps: list[str], ending: str, num_channels: int, where: str) -> Labeled:
    problems: list[str] = []
    labeled = matched(grouped(scans, ending, num_channels, problems), single(maps, ending, problems), problems)
    refuse([f"{where}: {problem}" for problem in problems])
    return labeled


def _raw_dataset(entry: Mapping[str, Any], base: str, where: str) -> Source:
    folder = _dataset_folder(entry["dataset"], base, where)
    path = os.path.join(folder, "dataset.json")
    content = _read_dataset_json(path)
    if content.get("union_labels"):
        raise UserError(f"{path}: has 'union_labels', it was joined already: join its own sources instead")
    channels = [content["channel_names"][key] for key in sorted(content["channel_names"], key=int)]
    ending = content["file_ending"]
    if ending not in GEOMETRIC_ENDINGS:
        raise UserError(f"{path}: {ending} files cannot be joined, only {', '.join(GEOMETRIC_ENDINGS)}: convert them")
    if "dataset" in content:
        labeled = _table(folder, content["dataset"], len(channels))
    else:
        scans, maps = (image_files(os.path.join(folder, name), ending) for name in ("imagesTr", "labelsTr"))
        labeled = _matched(scans, maps, ending, len(channels), where)
    labels = _label_values(content["labels"], f"{path}: 'labels'")
    annotated = _annotated(path, content.get("annotated_labels", {}), labels, labeled)
    reader = content.get("overwrite_image_reader_writer", "None")
    pool = unlabeled_cases(folder, content)
    return Source(
        entry["name"],
        [folder],
        labels,
        channels,
        ending,
        None if reader == "None" else reader,
        labeled,
        pool,
        annotated,
    )


def _dataset_folder(dataset: str, base: str, where: str) -> str:
    beside = absolute_path(base, os.path.expanduser(dataset))
    candidates = [beside] if os.path.isabs(os.path.expandvars(os.path.expanduser(dataset))) else []
    candidates = candidates or [os.path.join(os.path.abspath(os.environ.get("nnUNet_raw", ".")), dataset), beside]
    for folder in candidates:
        if os.path.isfile(os.path.join(folder, "dataset.json")):
            return folder
    raise UserError(
        f"{where}: {dataset!r} is no nnU-Net data set, there is no dataset.json in {' or '.join(candidates)}: "
        "convert it first, correct its name, or leave this source out with --only"
    )


def _read_dataset_json(path: str) -> dict:
    with open(path, encoding="utf-8") as f:
        try:
            content = json.load(f)
        except ValueError as error:
            raise UserError(f"{path}: is no JSON ({error}): convert that data set again") from error
    if missing := sorted({"channel_names", "labels", "file_ending"} - content.keys()):
        raise UserError(f"{path}: lacks {missing}: nnU-Net could not use it either, convert that data set again")
    return content


def _table(folder: str, table: Mapping[str, Any], num_channels: int) -> dict[str, tuple[list[str], str]]:
    cases = {}
    for case, files in table.items():
        if (
            not isinstance(files, dict)
            or not {"images", "label"} <= files.keys()
            or len(files["images"]) != num_channels
        ):
            raise UserError(
                f'{folder}/dataset.json: case {case!r} must be {{"images": [path per channel], "label": path}} with '
                f"{num_channels} channel(s), not {files!r}"
            )
        images = [absolute_path(folder, path) for path in files["images"]]
        cases[case] = (images, absolute_path(folder, files["label"]))
    return cases


def _label_values(labels: Any, where: str) -> dict[str, int]:
    if not isinstance(labels, dict):
        raise UserError(f'{where} must be an object such as {{"liver": 1}}, not {labels!r}')
    if regions := [name for name, value in labels.items() if isinstance(value, list)]:
        raise UserError(f"{where} has regions {regions}, which cannot be joined: give every value a name of its own")
    table = {name: value for name, value in labels.items() if name != "background"}
    values = list(table.values())
    if not all(type(value) is int and 0 < value < 65536 for value in values) or len(set(values)) < len(values):
        raise UserError(f"{where} must be different whole numbers from 1 to 65535, not {labels}")
    return table


def _annotated(path: str, table: Any, labels: Mapping[str, int], labeled: Labeled) -> dict[str, list[str]]:
    if not isinstance(table, dict):
        raise UserError(
            f"{path}: 'annotated_labels' must map cases to lists of labels, not be a {type(table).__name__}"
        )
    for case, names in table.items():
        if case not in labeled:
            raise UserError(
                f"{path}: 'annotated_labels' names case {case!r}, which is not there: correct that data set"
            )
        if not isinstance(names, list):
            raise UserError(f"{path}: 'annotated_labels' of {case!r} must be a list of labels, not {names!r}")
        if unknown := [name for name in names if name not in labels and name != "background"]:
            raise UserError(f"{path}: 'annotated_labels' of {case!r} names {unknown}, not among {list(labels)}")
    return table
