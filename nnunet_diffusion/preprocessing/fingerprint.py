"""What a plan is made from: the labeled cases as nnU-Net measures them, and the geometry of the unlabeled scans.

Both are kept in the preprocessed data set's folder and measured again only where a file has changed.
"""

import os
import time
from os.path import join
from typing import Any

from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from tqdm import tqdm

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import check_shape, naming_full_disk, read_json, write_json
from nnunet_diffusion.preprocessing.cases import labeled_cases, unlabeled_cases
from nnunet_diffusion.preprocessing.preprocess import read_scan
from nnunet_diffusion.preprocessing.scan_checks import check_labeled_case, label_values
from nnunet_diffusion.schemas import Dataset, Fingerprint, LabeledStamps, Measures, PlannableDataset
from nnunet_diffusion.workers import HERE, Workers, work_on

FINGERPRINT_FILE = "dataset_fingerprint.json"  # nnU-Net's
UNLABELED_FILE = "unlabeled_fingerprint.json"
MEASURED_FILE = "labeled_files.json"  # what dataset_fingerprint.json was measured from
SECONDS_BETWEEN_SAVES, GROWTH = 10, 1.05  # the file is written whole: so often that all of it stays proportional


def fingerprint_labeled(dataset_name: str, workers: Workers = HERE) -> None:
    """Checks every labeled case and lets nnU-Net measure them; does nothing if both are done and no file has changed.

    Args:
        dataset_name: DatasetXXX_Name, a folder in nnUNet_raw.
        workers: Where.

    Raises:
        UserError: Listing every case that cannot be used; nothing is written then.
    """
    dataset_json, dataset = labeled_cases(dataset_name)
    check_shape(dataset_json, PlannableDataset, join(nnUNet_raw, dataset_name, "dataset.json"))
    folder = join(nnUNet_preprocessed, dataset_name)
    described = {key: dataset_json.get(key) for key in ("channel_names", "labels", "regions_class_order")}
    measured = described | {
        "cases": {case: _stamps([*files["images"], files["label"]]) for case, files in dataset.items()}
    }
    if _known(join(folder, MEASURED_FILE), LabeledStamps) == measured and _known(
        join(folder, FINGERPRINT_FILE), Fingerprint
    ):
        return
    values = label_values(dataset_json["labels"])
    tasks = {case: (files["images"], files["label"], values) for case, files in dataset.items()}
    results = work_on(_problem, tasks, workers, "Checking labeled cases")
    if problems := {case: problem for case, problem in results if problem is not None}:
        listed = "".join(f"\n  {case}: {problems[case]}" for case in sorted(problems))
        raise UserError(f"{len(problems)} of {len(dataset)} labeled cases cannot be used:{listed}")
    os.makedirs(folder, exist_ok=True)
    with naming_full_disk(join(folder, FINGERPRINT_FILE)):
        DatasetFingerprintExtractor(dataset_name, workers.number_here).run(overwrite_existing=True)
    write_json(join(folder, MEASURED_FILE), measured)


def fingerprint_unlabeled(dataset_name: str, workers: Workers = HERE) -> dict[str, str]:
    """Measures the spacing and the shape after cropping of every unlabeled scan that is new or has changed.

    Args:
        dataset_name: DatasetXXX_Name, a folder in nnUNet_raw.
        workers: Where.

    Returns:
        What is wrong with each scan that cannot be used: case -> message.
    """
    dataset_folder = join(nnUNet_raw, dataset_name)
    dataset_json = read_json(join(dataset_folder, "dataset.json"), Dataset)
    cases = unlabeled_cases(dataset_folder, dataset_json)
    file = join(nnUNet_preprocessed, dataset_name, UNLABELED_FILE)
    saved, stamps = _known(file, dict[str, Measures]) or {}, {case: _stamps(images) for case, images in cases.items()}
    # A scan with a problem is read again: its permissions, or the error of a network drive, leave no mark on a file.
    known = {c: entry for c, entry in saved.items() if entry.get("files") == stamps.get(c) and "problem" not in entry}
    reader = determine_reader_writer_from_dataset_json(dataset_json, verbose=False)
    tasks = {case: (reader, images) for case, images in cases.items() if case not in known}
    last, number, killed = time.monotonic(), len(known), {}
    for case, measures in work_on(measure, tasks, workers, "Measuring unlabeled scans", killed):
        known[case] = {"files": stamps[case]} | measures
        if time.monotonic() - last > SECONDS_BETWEEN_SAVES and len(known) > GROWTH * number:
            write_json(file, known)
            last, number = time.monotonic(), len(known)
    known |= {case: {"files": stamps[case], "problem": problem} for case, problem in killed.items()}
    if known != saved:
        write_json(file, {case: known[case] for case in cases})
    return {case: known[case]["problem"] for case in cases if "problem" in known[case]}


def measure(reader_class, images: list[str]) -> dict:
    """Measures the spacing (mm) and the shape (voxels) after cropping to what is not zero, as nnU-Net does.

    Returns:
        {"spacing": 3 numbers, "shape_after_crop": 3 integers}, slowest axis first; or {"problem": message}.
    """
    try:
        data, properties = read_scan(reader_class(), images)
    except UserError as problem:
        return {"problem": str(problem)}
    shape = crop_to_nonzero(data)[0].shape[1:]
    return {"spacing": [float(i) for i in properties["spacing"]], "shape_after_crop": [int(i) for i in shape]}


def with_unlabeled_geometry(fingerprint: dict, dataset_name: str, dataset_json: dict) -> dict:
    """Adds the spacings and shapes of the unlabeled scans to nnU-Net's fingerprint, behind those of the labeled cases.

    Raises:
        UserError: If there are unlabeled scans that were not measured.
    """
    cases = unlabeled_cases(join(nnUNet_raw, dataset_name), dataset_json)
    measures = _known(join(nnUNet_preprocessed, dataset_name, UNLABELED_FILE), dict[str, Measures]) or {}
    if missing := sorted(cases.keys() - measures.keys()):
        raise UserError(
            f"{len(missing)} unlabeled scans of {dataset_name} were not measured ({missing[0]}, ...): plan with "
            "`nnunet_diffusion plan_and_preprocess`, which does it"
        )
    usable = [measures[case] for case in cases if "problem" not in measures[case]]
    return fingerprint | {
        "spacings": [*fingerprint["spacings"], *(entry["spacing"] for entry in usable)],
        "shapes_after_crop": [*fingerprint["shapes_after_crop"], *(entry["shape_after_crop"] for entry in usable)],
    }


def _problem(*arguments) -> str | None:
    try:
        check_labeled_case(*arguments)
    except UserError as problem:
        return str(problem)
    return None


def _stamps(paths: list[str]) -> list[list]:
    """Tells whether a file is still the same: path, bytes, modification time; None for what is missing."""
    found = [os.stat(path) if os.path.exists(path) else None for path in paths]
    return [[path, f and f.st_size, f and f.st_mtime_ns] for path, f in zip(paths, found, strict=True)]


def _known(file: str, schema: Any) -> Any:
    """Reads what was measured before; None if there is no such file, or, which is said, if it is damaged."""
    try:
        return read_json(file, schema, "measured anew")
    except FileNotFoundError:
        return None
    except UserError as problem:
        tqdm.write(str(problem))
        return None
