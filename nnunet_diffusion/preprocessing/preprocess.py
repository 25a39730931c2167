"""Preprocesses what is missing, case by case, whole or not at all: the unlabelled pool and the labelled cases alike.

A folder of preprocessed cases is what nnU-Net's own preprocessing leaves, plus one hidden folder with the identity of
the preprocessing and the temporary files: it goes when nnU-Net deletes the folder, and nnU-Net does not look into it.
"""

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from os.path import basename, exists, getmtime, isdir, isfile, join

import numpy as np
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.configuration import default_num_processes
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2
from nnunetv2.utilities.utils import (
    create_paths_fn,
    get_filenames_of_train_images_and_targets,
    get_identifiers_from_splitted_dataset_folder,
)
from tqdm import tqdm

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import not_written, write_json
from nnunet_diffusion.preprocessing.cases import unlabeled_cases
from nnunet_diffusion.preprocessing.scan_checks import check_channels
from nnunet_diffusion.processes import run_in_processes

WORK = ".nnunet_diffusion"
UNLABELED_FILES = (".pkl", ".b2nd")  # in the order in which they appear: with its .b2nd a case is complete
LABELED_FILES = (".pkl", "_seg.b2nd", ".b2nd")


def pool_folder(preprocessed_dataset_folder_base: str, data_identifier: str) -> str:
    """The folder of the preprocessed unlabelled scans of one configuration."""
    return join(preprocessed_dataset_folder_base, data_identifier + "_unlabeled")


def pool_identifiers(folder: str) -> list[str]:
    """The cases of which every file is there, sorted; none if there is no such folder."""
    return complete_cases(folder, UNLABELED_FILES)


def complete_cases(folder: str, endings: Iterable[str]) -> list[str]:
    """Names of the cases that have a file with each of `endings` in `folder`, sorted."""
    files = set(os.listdir(folder)) if isdir(folder) else set()
    names = (name.removesuffix(".b2nd") for name in files if name.endswith(".b2nd"))
    return sorted(name for name in names if all(name + ending in files for ending in endings))


def preprocess_pool(
    dataset_name, plans_manager, configuration, num_processes=default_num_processes, num_parts=1, part_id=0
) -> dict[str, str]:
    """Preprocesses the unlabelled scans with the plan's own preprocessor; arguments as `preprocess_labeled`.

    Args:
        dataset_name: As said.
        plans_manager: As said.
        configuration: As said.
        num_processes: As said.
        num_parts: Of so many parts, which may be done at the same time by many machines, only one is done here.
        part_id: Which one, from 0. Scans that are no longer in the table stay until all is done as one part.

    Returns:
        What is wrong with each scan that was left out: case -> message.
    """
    dataset_folder = join(nnUNet_raw, dataset_name)
    dataset_json = load_json(join(dataset_folder, "dataset.json"))
    cases = {case: (images, None) for case, images in unlabeled_cases(dataset_folder, dataset_json).items()}
    identifier = plans_manager.get_configuration(configuration).data_identifier
    folder = pool_folder(join(nnUNet_preprocessed, dataset_name), identifier)
    if not cases and not isdir(folder):
        return {}
    part = (num_parts, part_id)
    return _preprocess(cases, folder, UNLABELED_FILES, plans_manager, configuration, dataset_json, num_processes, part)


def labeled_files(dataset_folder: str, dataset_json: dict) -> dict[str, dict]:
    """Case -> {"images": paths, "label": path} of the labelled cases, as nnU-Net finds them.

    nnU-Net lists a folder in twelve forks of the process, and one that has threads may wait for them for ever: here the
    process lists it itself.
    """
    if "dataset" in dataset_json:
        return get_filenames_of_train_images_and_targets(dataset_folder, dataset_json)
    images, labels = join(dataset_folder, "imagesTr"), join(dataset_folder, "labelsTr")
    ending, files = dataset_json["file_ending"], sorted(os.listdir(images))
    return {
        str(case): {"images": create_paths_fn(images, files, ending, case), "label": join(labels, case + ending)}
        for case in get_identifiers_from_splitted_dataset_folder(images, ending)
    }


def preprocess_labeled(dataset_name, plans_manager, configuration, num_processes=default_num_processes) -> None:
    """Preprocesses the labelled cases as `nnUNetv2_preprocess` does, but only those that are missing or changed.

    Args:
        dataset_name: DatasetXXX_Name, a folder in nnUNet_raw.
        plans_manager: The `PlansManager` of the plan.
        configuration: A configuration of that plan.
        num_processes: Number of worker processes; each holds one case in memory.

    Raises:
        UserError: If a worker process was killed.
    """
    dataset_folder = join(nnUNet_raw, dataset_name)
    dataset_json = load_json(join(dataset_folder, "dataset.json"))
    dataset = labeled_files(dataset_folder, dataset_json)
    cases = {case: (files["images"], files["label"]) for case, files in dataset.items()}
    identifier = plans_manager.get_configuration(configuration).data_identifier
    folder = join(nnUNet_preprocessed, dataset_name, identifier)
    _preprocess(cases, folder, LABELED_FILES, plans_manager, configuration, dataset_json, num_processes)


def _preprocess(
    cases, folder, endings, plans_manager, configuration, dataset_json, num_processes, part=(1, 0)
) -> dict[str, str]:
    configuration_manager = plans_manager.get_configuration(configuration)
    identity = preprocessing_identity(plans_manager, configuration_manager)
    if endings is LABELED_FILES:
        identity["labels"] = [dataset_json["labels"], dataset_json.get("regions_class_order")]
    num_parts, part_id = part
    if num_parts > 1:
        cases = {case: cases[case] for case in sorted(cases)[part_id::num_parts]}
        _prepare_part(folder, identity, cases)
    else:
        _prepare(folder, identity)
        _remove_unlisted(folder, set(cases))
    complete = set(complete_cases(folder, endings))
    todo = [c for c, files in cases.items() if c not in complete or _has_changed(join(folder, c + ".b2nd"), files)]
    work = partial(
        preprocess_case,
        folder=folder,
        endings=endings,
        plans_manager=plans_manager,
        configuration_manager=configuration_manager,
        dataset_json=dataset_json,
    )
    tasks = {case: (case, *cases[case]) for case in todo}
    results = run_in_processes(work, tasks, num_processes, f"{basename(folder)} ({len(cases) - len(todo)} there)")
    return {case: problem for case, problem in results if problem is not None}


def preprocessing_identity(plans_manager, configuration_manager) -> dict:
    """Everything in a plan that decides the values of a preprocessed scan, as it comes back from JSON."""
    keys = ("preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm")
    keys += ("resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_seg", "resampling_fn_seg_kwargs")
    identity = {key: configuration_manager.configuration[key] for key in keys}
    identity["transpose_forward"] = plans_manager.transpose_forward
    identity["image_reader_writer"] = plans_manager.plans["image_reader_writer"]
    identity["intensities"] = plans_manager.foreground_intensity_properties_per_channel
    return json.loads(json.dumps(identity))


def _prepare(folder: str, identity: dict) -> None:
    """Leaves a folder of that identity without stale temporaries; of another or no identity, an empty one."""
    identity_file = join(folder, WORK, "identity.json")
    known = load_json(identity_file) if isfile(identity_file) else {}
    if isdir(folder) and known != identity:
        differing = sorted(key for key in identity if identity[key] != known.get(key))
        tqdm.write(f"{folder}: made with other {', '.join(differing)}: done anew")
        shutil.rmtree(folder)
    os.makedirs(join(folder, WORK), exist_ok=True)
    for name in os.listdir(join(folder, WORK)):
        if isdir(join(folder, WORK, name)):
            shutil.rmtree(join(folder, WORK, name))
    write_json(identity_file, identity)


def _prepare_part(folder: str, identity: dict, cases: Iterable[str]) -> None:
    """Readies a folder that others may be working in: removes nothing but what a dead process left of these cases.

    Raises:
        UserError: If the folder was made with another identity.
    """
    identity_file = join(folder, WORK, "identity.json")
    os.makedirs(join(folder, WORK), exist_ok=True)
    if not isfile(identity_file) and not complete_cases(folder, (".b2nd",)):
        with suppress(FileNotFoundError):  # another part wrote it just now
            write_json(identity_file, identity)
    if not isfile(identity_file) or load_json(identity_file) != identity:
        raise UserError(f"{folder}: was made with another plan: run the command once without --num_parts")
    for case in cases:
        shutil.rmtree(join(folder, WORK, case), ignore_errors=True)


def _remove_unlisted(folder: str, cases: set[str]) -> None:
    for name in os.listdir(folder):
        case = name.removesuffix(".b2nd").removesuffix(".pkl")
        if case not in cases and case.removesuffix("_seg") not in cases and isfile(join(folder, name)):
            os.remove(join(folder, name))


def _has_changed(output: str, files: tuple[list[str], str | None]) -> bool:
    images, label = files
    sources = [*images, label] if label else images
    return any(exists(source) and getmtime(source) > getmtime(output) for source in sources)


def preprocess_case(
    case, images, label, folder, endings, plans_manager, configuration_manager, dataset_json
) -> str | None:
    """Preprocesses one case as nnU-Net does and moves its files into `folder` when all are written.

    Returns:
        None, or what is wrong with the unlabelled scan; nothing is written then.

    Raises:
        UserError: If nnU-Net cannot preprocess the labelled case.
        OSError: If the files cannot be written.
    """
    preprocessor = configuration_manager.preprocessor_class(verbose=False)
    temporary = join(folder, WORK, case)
    os.makedirs(temporary)
    plan = plans_manager, configuration_manager, dataset_json
    try:
        made = _run(preprocessor, images, label, *plan)
        try:
            _save(*made, join(temporary, case), configuration_manager)
            for ending in endings:
                os.replace(join(temporary, case + ending), join(folder, case + ending))
        except (RuntimeError, OSError) as error:
            raise not_written(case, folder, error) from error
    except UserError as problem:
        if label is not None:
            raise
        return str(problem)
    finally:
        shutil.rmtree(temporary)
    return None


def _run(preprocessor, images, label, *plan) -> tuple:
    if label is None:
        data, properties = read_scan(plan[0].image_reader_writer_class(), images)
        if len(data) != (expected := len(plan[2]["channel_names"])):
            raise UserError(f"{', '.join(images)}: has {len(data)} channel(s), the data set has {expected}")
    try:
        if label is None:
            return preprocessor.run_case_npy(data, None, properties, *plan)
        return preprocessor.run_case(images, label, *plan)
    except Exception as error:  # whatever a strange scan provokes must not cost the others
        raise UserError(f"{images[0]}: nnU-Net cannot preprocess this: {error!r}") from error


def _save(data, seg, properties, path, configuration_manager) -> None:
    """Saves a case as nnU-Net's `run_case_save` does; without a label the segmentation only marks what is zero."""
    data, seg = data.astype(np.float32, copy=False), seg.astype(np.int16, copy=False)
    patch_size = tuple(configuration_manager.patch_size)
    blocks, chunks = comp_blosc2_params(data.shape, patch_size, data.itemsize)
    blocks_seg, chunks_seg = comp_blosc2_params(seg.shape, patch_size, seg.itemsize)
    nnUNetDatasetBlosc2.save_case(
        data, seg, properties, path, chunks=chunks, blocks=blocks, chunks_seg=chunks_seg, blocks_seg=blocks_seg
    )


def read_scan(reader, images: list[str]) -> tuple[np.ndarray, dict]:
    """Checks a scan's channels, then reads them with nnU-Net's reader.

    Returns:
        (C, Z, Y, X) array and nnU-Net's properties.

    Raises:
        UserError: If a file cannot be read, is not 3-D or a picture, is not aligned with the first, holds NaN or is
            constant.
    """
    check_channels(images)
    try:
        return reader.read_images(images)
    except Exception as error:  # each of nnU-Net's readers has errors of its own
        raise UserError(f"{', '.join(images)}: nnU-Net cannot read this: {error}") from error
