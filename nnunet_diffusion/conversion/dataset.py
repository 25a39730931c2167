"""From cases, and where their files lie, to a raw data set of nnU-Net; nothing is written before all is well."""

import filecmp
import gzip
import os
import re
import shutil
import zlib
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from tqdm import tqdm

from nnunet_diffusion.conversion.relabeling import relabel
from nnunet_diffusion.conversion.schemas import ConvertedFrom
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic, read_json, write_json
from nnunet_diffusion.locks import locked
from nnunet_diffusion.marks import WORK
from nnunet_diffusion.preprocessing.cases import case_name
from nnunet_diffusion.preprocessing.scan_checks import (
    GEOMETRIC_ENDINGS,
    NIFTI_ENDINGS,
    check_channels,
    check_labeled_case,
    orientation,
    read_geometry,
)

REORIENTING_READER = "NibabelIOWithReorient"  # nnU-Net's; turns NIfTI scans to RAS
Labeled = Mapping[str, tuple[list[str], str]]  # {case: ([path per channel], label path)}
Unlabeled = Mapping[str, list[str]]  # {case: [path per channel]}
Relabeling = Mapping[str, Mapping[int, int]]  # {case: {value in its label file: value in the data set}}


@dataclass
class Converted:
    """What a conversion did; `str` tells it to a person."""

    folder: str
    num_labeled: int
    num_unlabeled: int
    skipped: dict[str, str]  # unlabeled case -> what is wrong with it
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # what makes it a worse data set, though it can be trained on

    def __str__(self) -> str:
        lines = [f"{self.folder}: {self.num_labeled} labeled and {self.num_unlabeled} unlabeled cases", *self.notes]
        if self.skipped:
            lines += [f"skipped {len(self.skipped)} unlabeled case(s):", *(f"  {why}" for why in self.skipped.values())]
        return "\n".join(lines)


def convert(
    dataset_id: int,
    name: str,
    labeled: Labeled,
    unlabeled: Unlabeled,
    description: dict,
    source: list[str],
    copy: bool = False,
    num_threads: int = 1,
    relabeling: Relabeling | None = None,
    trust_voxels: bool = False,
) -> Converted:
    """Checks all cases and writes nnUNet_raw/DatasetXXX_Name/dataset.json with the tables `dataset` and `unlabeled`.

    Labeled cases are read whole; of unlabeled ones, which may be thousands, the headers only: an unusable one is
    skipped here, or by the preprocessing that reads it.

    Args:
        dataset_id: 1 to 999.
        name: What follows DatasetXXX_.
        labeled: {case: ([path per channel], label path)}.
        unlabeled: {case: [path per channel]}.
        description: The rest of dataset.json: `channel_names`, `labels`, `file_ending`, ...
        source: The folders that the cases came from: only a conversion of the same source may replace a data set.
        copy: Copy the files into imagesTr, labelsTr and imagesUn; otherwise the tables refer to them where they are.
        num_threads: For the checks.
        relabeling: Write the label maps anew into labelsTr, on the image's geometry, with these values; a label file
            may hold the keys alone.
        trust_voxels: Label maps lie on the images' voxels whatever their headers say; only with `relabeling`.

    Raises:
        UserError: If there is no labeled case or an unusable one, the data set exists already, or another command
            writes it.
        OSError: If something cannot be written; an earlier dataset.json is then what it was.
    """
    assert relabeling is not None or not trust_voxels
    folder = dataset_folder(dataset_id, name)
    source = [os.path.abspath(path) for path in source]
    refuse_other_conversion(os.path.join(folder, "dataset.json"), source)
    values = label_values(description)
    allowed = {case: table.keys() for case, table in relabeling.items()} if relabeling else {}
    allowed = allowed or annotated_values(description, labeled) or dict.fromkeys(labeled, values)
    refuse_unusable(labeled, unlabeled, allowed, num_threads, trust_voxels)
    tasks = {case: (_check_unlabeled_case, case, images) for case, images in unlabeled.items()}
    skipped = problems_of(tasks, "unlabeled headers", num_threads)
    reader, notes = {}, []
    if "overwrite_image_reader_writer" not in description:
        images = {case: paths for case, (paths, _) in labeled.items()} | dict(unlabeled)
        reader, notes = suitable_reader(images, description["file_ending"], num_threads)
    dataset = {case: {"images": images, "label": label} for case, (images, label) in labeled.items()}
    pool = {case: {"images": images} for case, images in unlabeled.items() if case not in skipped}
    with locked(os.path.join(folder, WORK, "lock"), f"the data set {folder}"):
        refuse_other_conversion(os.path.join(folder, "dataset.json"), source)  # another command may have been faster
        if relabeling is not None:
            labels = relabel_into(folder, labeled, relabeling, description["file_ending"], num_threads)
            dataset = {case: {**entry, "label": labels[case]} for case, entry in dataset.items()}
        if copy:
            copy_into(folder, dataset, pool, description["file_ending"])
        origin = {"converted_by": "nnunet_diffusion convert", "converted_from": source}
        tables = {"numTraining": len(dataset), "dataset": dataset, "unlabeled": pool}
        write_json(os.path.join(folder, "dataset.json"), {"name": name, **description, **reader, **origin, **tables})
    return Converted(folder, len(dataset), len(pool), skipped, notes)


def annotated_values(description: Mapping, cases: Collection[str]) -> dict[str, set[int]]:
    """Reads {case: label values that may occur} off the table `annotated_labels`; empty where there is none.

    Raises:
        UserError: If the table does not fit the labels, or these labeled cases.
    """
    if "annotated_labels" not in description:
        return {}
    from nnunetv2.utilities.label_handling.label_handling import LabelManager  # these import torch, which takes seconds

    from nnunet_diffusion.partial.annotations import known_values, output_channels, read_annotations

    manager = LabelManager(description["labels"], description.get("regions_class_order"))
    channels = output_channels(manager)
    ignored = {manager.ignore_label} - {None}
    annotations = read_annotations(dict(description), cases, channels)
    return {case: known_values(annotation, channels) | ignored for case, annotation in annotations.items()}


def suitable_reader(images: Unlabeled, file_ending: str, num_threads: int) -> tuple[dict[str, str], list[str]]:
    """Chooses nnU-Net's reader for these scans, if not its usual one, as dataset.json names it; and what to tell of it.

    The usual reader takes voxels as they are stored: where scans are stored in different orientations, also one that is
    predicted later, the network would see patients lying on every side, and left for right.

    Args:
        images: {case: [path per channel]}.
        file_ending: Only NIfTI files can be turned.
        num_threads: Headers at a time.
    """
    found = each_case({case: (_orientation, paths[0]) for case, paths in images.items()}, "orientations", num_threads)
    orientations = sorted(set(filter(None, found.values())))
    stored = f"scans are stored as {', '.join(orientations)}"
    if file_ending in NIFTI_ENDINGS and orientations:
        reader = {"overwrite_image_reader_writer": REORIENTING_READER}
        return reader, [f"{stored}: {REORIENTING_READER} turns all to RAS"] if len(orientations) > 1 else []
    if len(orientations) < 2:
        return {}, []
    return {}, [f"WARNING: {stored}, and nnU-Net turns only NIfTI files to one orientation: convert them to .nii.gz"]


def _orientation(path: str) -> str | None:
    with suppress(UserError):  # told, with all other problems, by the checks
        if path.endswith(GEOMETRIC_ENDINGS):
            return orientation(read_geometry(path))
    return None


def dataset_folder(dataset_id: int, name: str) -> str:
    """Names the folder where nnU-Net looks for the raw data set.

    Raises:
        UserError: If nnUNet_raw is not set, id or name cannot be used, or the id has another name already.
    """
    raw = os.environ.get("nnUNet_raw")
    if not raw:
        raise UserError("nnUNet_raw is not set: `export nnUNet_raw=FOLDER`, where the raw data sets shall be")
    if not 1 <= dataset_id <= 999:
        raise UserError(f"-d {dataset_id}: the id of a data set is a number from 1 to 999")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise UserError(f"-n {name!r}: the name of a data set is of letters, digits, '_', '-' and '.'")
    folder = f"Dataset{dataset_id:03d}_{name}"
    if others := [str(other) for other in find_candidate_datasets(dataset_id) if other != folder]:
        raise UserError(f"-d {dataset_id}: nnU-Net's folders hold {others} under this id: take another id or that name")
    return os.path.join(os.path.abspath(raw), folder)


def label_values(description: Mapping) -> set[int]:
    """Lists the values that may occur in a label file, of the `labels` of a dataset.json as nnU-Net defines them.

    Raises:
        UserError: If nnU-Net could not train with these labels.
    """
    labels = description["labels"]
    lists = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in labels.items()}
    flat = [value for entry in lists.values() for value in entry]
    if not all(type(value) is int for value in flat):
        raise UserError(f"labels must be whole numbers or lists of them, not {labels}")
    values = set(flat)
    if labels.get("background") != 0 or len(values) < 2 or sorted(values) != list(range(len(values))):
        raise UserError(f"labels must be 0 for 'background', then 1, 2, ... without a gap, not {labels}")
    if labels.get("ignore", max(values)) != max(values):
        raise UserError(f"the label 'ignore' must have the highest value, {max(values)}, not {labels['ignore']}")
    if any(len(entry) > 1 for entry in lists.values()):
        number = len(labels.keys() - {"background", "ignore"})
        order = description.get("regions_class_order")
        known = sorted(values - {0, labels.get("ignore")})
        if not isinstance(order, list) or len(order) != number or any(value not in known for value in order):
            raise UserError(
                f"labels that are lists need 'regions_class_order', {number} values of {known}, beside "
                f"'labels', not {order}"
            )
    elif len(flat) > len(values):
        raise UserError(f"two labels have the same value in {labels}")
    return values


def refuse_other_conversion(path: str, source: list[str]) -> None:
    """Raises UserError if `path`, a dataset.json, exists and is not a conversion of the same source."""
    try:
        earlier = read_json(path, ConvertedFrom)["converted_from"]
    except FileNotFoundError:
        return
    except UserError:
        earlier = None
    if earlier != source:
        origin = f"was converted from {earlier}, not {source}" if earlier else "was not written by this command"
        raise UserError(f"{path} exists and {origin}: take another id and name, or remove that folder")


def refuse_unusable(
    labeled: Labeled,
    unlabeled: Unlabeled,
    values: Mapping[str, Collection[int]],
    num_threads: int,
    trust_voxels: bool = False,
) -> None:
    """Raises UserError, listing all of them, if labeled cases cannot be used, or if there is none.

    Args:
        labeled: {case: ([path per channel], label path)}.
        unlabeled: {case: [path per channel]}; only their names are looked at.
        values: {case: label values that may occur} of every labeled case.
        num_threads: Cases at a time.
        trust_voxels: As `check_labeled_case` has it.
    """
    if not labeled:
        raise UserError(
            "no labeled case was found: nnU-Net needs the image and the label of one, or more, for its plan"
        )
    refuse([f"{case}: is both labeled and unlabeled: remove one" for case in labeled if case in unlabeled])
    paths = [path for images, label in labeled.values() for path in (*images, label)]
    paths += [path for images in unlabeled.values() for path in images]
    refuse([f"{path}: nnU-Net would expand the '$': rename it" for path in paths if os.path.expandvars(path) != path])
    tasks = {
        case: (_check_labeled_case, case, images, label, values[case], trust_voxels)
        for case, (images, label) in labeled.items()
    }
    refuse(list(problems_of(tasks, "labeled cases", num_threads).values()))


def _check_labeled_case(case: str, images: list[str], label: str, *options: Any) -> None:
    case_name(case, repr(label))  # escaped: the path may hold what made the name unsafe
    check_labeled_case(images, label, *options)


def _check_unlabeled_case(case: str, images: list[str]) -> None:
    case_name(case, repr(images[0]))
    check_channels(images, read_geometry)


def refuse(problems: list[str]) -> None:
    """Raises one UserError that lists all problems, if there are any."""
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} problem(s), so nothing was converted:", *problems]))


def problems_of(tasks: Mapping[str, tuple[Callable, ...]], title: str, num_threads: int) -> dict[str, str]:
    """Runs every case's (check, *arguments); returns {case: message} of those that are refused, in order."""

    def problem(check: Callable, *arguments: Any) -> str | None:
        try:
            check(*arguments)
        except UserError as error:
            return str(error)
        return None

    problems = each_case({case: (problem, *task) for case, task in tasks.items()}, f"checking {title}", num_threads)
    return {case: message for case, message in problems.items() if message}


def each_case(tasks: Mapping[str, tuple[Callable, ...]], title: str, num_threads: int) -> dict[str, Any]:
    """Calls every case's (function, *arguments) under a progress bar; returns {case: result}, in order.

    Threads will do: SimpleITK, zlib and numpy release the interpreter's lock.
    """
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        results = pool.map(lambda task: task[0](*task[1:]), tasks.values())
        bar = tqdm(results, title, len(tasks), disable=not tasks)
        return dict(zip(tasks, bar, strict=True))


def relabel_into(
    folder: str, labeled: Labeled, relabeling: Relabeling, file_ending: str, num_threads: int
) -> dict[str, str]:
    """Writes the label maps of all cases into labelsTr with new values; returns {case: path within `folder`}.

    What an interrupted run has written is not written again.

    Raises:
        UserError: If there is another file of that name.
        OSError: If a file cannot be written; the files that are there are whole.
    """
    os.makedirs(os.path.join(folder, "labelsTr"), exist_ok=True)
    names = {case: f"labelsTr/{case}{file_ending}" for case in labeled}
    tasks = {
        case: (relabel, label, images[0], relabeling[case], os.path.join(folder, names[case]))
        for case, (images, label) in labeled.items()
    }
    each_case(tasks, "writing labelsTr", num_threads)
    return names


def copy_into(folder: str, dataset: dict[str, dict], pool: dict[str, dict], file_ending: str) -> None:
    """Copies the files of both tables, as nnU-Net names them, into imagesTr, labelsTr and imagesUn; the tables follow.

    What an interrupted run has copied is not copied again. Labels that are in the folder already stay.

    Raises:
        UserError: If there is another file of that name.
        OSError: If a file cannot be copied; the files that are there are whole.
    """
    for subfolder, table in (("imagesTr", dataset), ("imagesUn", pool)):
        for case, entry in tqdm(table.items(), f"copying {subfolder}", disable=not table):
            names = [f"{subfolder}/{case}_{channel:04d}{file_ending}" for channel in range(len(entry["images"]))]
            entry["images"] = [_copy(path, folder, name) for path, name in zip(entry["images"], names, strict=True)]
            if os.path.isabs(entry.get("label", "")):
                entry["label"] = _copy(entry["label"], folder, f"labelsTr/{case}{file_ending}")


def _copy(original: str, folder: str, name: str) -> str:
    target = os.path.join(folder, name)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    packed = name.endswith(".gz") and not original.endswith(".gz")
    if not os.path.exists(target):
        with atomic(target) as temporary:
            if packed:
                _pack(original, temporary)
            else:
                shutil.copy2(original, temporary)  # with its time, by which filecmp recognizes a copy
    elif not (_unpacks_to(target, original) if packed else filecmp.cmp(original, target)):
        raise UserError(f"{target} exists and is not a copy of {original}: remove it, or take another id and name")
    return name


def _pack(original: str, target: str) -> None:
    with open(original, "rb") as f, gzip.open(target, "wb", compresslevel=6) as g:
        shutil.copyfileobj(f, g)


def _unpacks_to(packed: str, original: str) -> bool:
    with open(original, "rb") as f, gzip.open(packed) as g, suppress(EOFError, gzip.BadGzipFile, zlib.error):
        return all(chunk == g.read(len(chunk)) for chunk in iter(lambda: f.read(1 << 20), b"")) and not g.read(1)
    return False
