"""The data sets that a partial conversion joins: nnU-Net raw data sets, or folders of images and labels."""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from nnunet_diffusion.conversion.dataset import Labeled, Unlabeled, refuse
from nnunet_diffusion.conversion.files import grouped, image_files, matched, single, the_ending
from nnunet_diffusion.conversion.schemas import SourceDataset
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json
from nnunet_diffusion.preprocessing.cases import absolute_path, labeled_files, unlabeled_cases
from nnunet_diffusion.preprocessing.scan_checks import GEOMETRIC_ENDINGS

FOLDER_KEYS = {"images", "labels", "label_names", "channel_names"}
REMEDY = "convert that data set again"


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
    folders = [_below(base, path) for path in ([more] if isinstance(more, str) else more)]
    problems: list[str] = []
    paths = [path for folder in folders for path in image_files(folder, source.file_ending)]
    pool = grouped(paths, source.file_ending, len(source.channels), problems)
    problems += [
        f"{case}: is there twice, as {images[0]} too" for case, images in pool.items() if case in source.unlabeled
    ]
    refuse([f"{where}: {problem}" for problem in problems])
    return replace(source, folders=[*source.folders, *folders], unlabeled={**source.unlabeled, **pool})


def _folders(entry: Mapping[str, Any], base: str, where: str) -> Source:
    if missing := sorted({"images", "labels", "label_names"} - entry.keys()):
        raise UserError(f"{where}: lacks {missing}: give 'images', 'labels' and 'label_names', or 'dataset'")
    channels = entry.get("channel_names", ["CT"])
    folders = [_below(base, entry[key]) for key in ("images", "labels")]
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
    content = read_json(path, SourceDataset, REMEDY)
    if content.get("union_labels"):
        raise UserError(f"{path}: has 'union_labels', it was joined already: join its own sources instead")
    channels = [content["channel_names"][key] for key in sorted(content["channel_names"], key=int)]
    ending = content["file_ending"]
    if ending not in GEOMETRIC_ENDINGS:
        raise UserError(f"{path}: {ending} files cannot be joined, only {', '.join(GEOMETRIC_ENDINGS)}: convert them")
    if "dataset" in content:
        labeled = _listed(path, content, len(channels))
    else:
        scans, maps = (image_files(os.path.join(folder, name), ending) for name in ("imagesTr", "labelsTr"))
        labeled = _matched(scans, maps, ending, len(channels), where)
    labels = _label_values(content["labels"], f"{path}: 'labels'")
    annotated = _annotated(path, content.get("annotated_labels", {}), labels, labeled)
    reader = content.get("overwrite_image_reader_writer", "None")
    pool = unlabeled_cases(folder, content)
    reader = None if reader == "None" else reader
    return Source(entry["name"], [folder], labels, channels, ending, reader, labeled, pool, annotated)


def _below(base: str, path: str) -> str:
    return absolute_path(base, os.path.expanduser(path))


def _dataset_folder(dataset: str, base: str, where: str) -> str:
    raw = os.path.abspath(os.environ.get("nnUNet_raw", "."))
    candidates = list(dict.fromkeys([_below(raw, dataset), _below(base, dataset)]))
    for folder in candidates:
        with suppress(FileNotFoundError, NotADirectoryError):  # what cannot be read is not missing
            os.stat(os.path.join(folder, "dataset.json"))
            return folder
    raise UserError(
        f"{where}: {dataset!r} is no nnU-Net data set, there is no dataset.json in {' or '.join(candidates)}: "
        "convert it first, correct its name, or leave this source out with --only"
    )


def _listed(path: str, content: dict[str, Any], num_channels: int) -> Labeled:
    for case, files in content["dataset"].items():
        if len(files["images"]) != num_channels:
            raise UserError(
                f"{path}: dataset.{case}.images: must be {num_channels} file(s), one for each channel, not "
                f"{files['images']}: {REMEDY}"
            )
    found = labeled_files(os.path.dirname(path), content)
    return {case: (files["images"], files["label"]) for case, files in found.items()}


def _label_values(labels: Mapping[str, Any], where: str) -> dict[str, int]:
    if regions := [name for name, value in labels.items() if isinstance(value, list)]:
        raise UserError(f"{where} has regions {regions}, which cannot be joined: give every value a name of its own")
    table = {name: value for name, value in labels.items() if name != "background"}
    values = list(table.values())
    if not all(type(value) is int and 0 < value < 65536 for value in values) or len(set(values)) < len(values):
        raise UserError(f"{where} must be different whole numbers from 1 to 65535, not {labels}")
    return table


def _annotated(
    path: str, table: dict[str, list[str]], labels: Mapping[str, int], labeled: Labeled
) -> dict[str, list[str]]:
    for case, names in table.items():
        if case not in labeled:
            raise UserError(
                f"{path}: 'annotated_labels' names case {case!r}, which is not there: correct that data set"
            )
        if unknown := [name for name in names if name not in labels and name != "background"]:
            raise UserError(f"{path}: 'annotated_labels' of {case!r} names {unknown}, not among {list(labels)}")
    return table
