"""Preprocesses what is missing, case by case, whole or not at all: the unlabeled pool and the labeled cases alike.

A folder of preprocessed cases is what nnU-Net's own preprocessing leaves, plus our mark (`nnunet_diffusion.marks`) with
what decides the values, and temporary files beside the mark. When that changes, see `replacement`.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import chain
from os.path import basename, exists, getmtime, isdir, join, realpath
from tempfile import mkdtemp

import numpy as np
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic, check_shape, not_written, read_json
from nnunet_diffusion.marks import WORK
from nnunet_diffusion.plans import REMEDY
from nnunet_diffusion.preprocessing import body
from nnunet_diffusion.preprocessing.cases import (
    LABELED_FILES,
    UNLABELED_FILES,
    complete_cases,
    labeled_cases,
    labeled_files,
    pool_folder,
    unlabeled_cases,
)
from nnunet_diffusion.preprocessing.replacement import place_to_fill, replace
from nnunet_diffusion.preprocessing.scan_checks import check_channels
from nnunet_diffusion.records import Journal
from nnunet_diffusion.schemas import Dataset, PreprocessedConfiguration
from nnunet_diffusion.workers import HERE, Workers, work_on

FAILED_FILES = "failed*.jsonl"


def preprocess_pool(
    dataset_name, plans_manager, configuration, workers: Workers = HERE, num_parts=1, part_id=0
) -> dict[str, str]:
    """Preprocesses the unlabeled scans with the plan's own preprocessor; arguments as `preprocess_labeled`.

    Args:
        dataset_name: As said.
        plans_manager: As said.
        configuration: As said.
        workers: As said.
        num_parts: Of so many parts, which may be done at the same time by many machines, only one is done here.
        part_id: Which one, from 0. Scans that are no longer in the table stay until all is done as one part.

    Returns:
        What is wrong with each scan that was left out: case -> message.

    Raises:
        UserError: As `preprocess_labeled`, or if a part finds what was made with another plan.
    """
    dataset_folder = join(nnUNet_raw, dataset_name)
    dataset_json = read_json(join(dataset_folder, "dataset.json"), Dataset)
    cases = {case: (images, None) for case, images in unlabeled_cases(dataset_folder, dataset_json).items()}
    identifier = plans_manager.get_configuration(configuration).data_identifier
    folder = pool_folder(join(nnUNet_preprocessed, dataset_name), identifier)
    if not cases and not isdir(folder):
        return {}
    part = (num_parts, part_id)
    return _preprocess(cases, folder, UNLABELED_FILES, plans_manager, configuration, dataset_json, workers, part)


def preprocess_labeled(dataset_name, plans_manager, configuration, workers: Workers = HERE) -> None:
    """Preprocesses the labeled cases as `nnUNetv2_preprocess` does, but only those that are missing or changed.

    Args:
        dataset_name: DatasetXXX_Name, a folder in nnUNet_raw.
        plans_manager: The `PlansManager` of the plan, which `check_plans` has let pass.
        configuration: A configuration of that plan.
        workers: Where; each process holds one case in memory.

    Raises:
        UserError: If a case cannot be preprocessed, a worker was killed, or the folder is not ours.
    """
    dataset_folder = join(nnUNet_raw, dataset_name)
    dataset_json = read_json(join(dataset_folder, "dataset.json"), Dataset)
    dataset = labeled_files(dataset_folder, dataset_json)
    cases = {case: (files["images"], files["label"]) for case, files in dataset.items()}
    identifier = plans_manager.get_configuration(configuration).data_identifier
    folder = join(nnUNet_preprocessed, dataset_name, identifier)
    _preprocess(cases, folder, LABELED_FILES, plans_manager, configuration, dataset_json, workers)


def copy_labels(dataset_name: str) -> None:
    """Puts the labels where nnU-Net validates, as its own preprocessing does; only what is new or newer."""
    dataset_json, dataset = labeled_cases(dataset_name)
    folder = join(nnUNet_preprocessed, dataset_name, "gt_segmentations")
    os.makedirs(folder, exist_ok=True)
    for case, files in dataset.items():
        target = join(folder, case + dataset_json["file_ending"])
        if not exists(target) or getmtime(files["label"]) > getmtime(target):
            with atomic(target) as temporary:
                shutil.copyfile(files["label"], temporary)


def _preprocess(
    cases, folder, endings, plans_manager, configuration, dataset_json, workers, part=(1, 0)
) -> dict[str, str]:
    configuration_manager = plans_manager.get_configuration(configuration)
    identity = preprocessing_identity(plans_manager, configuration_manager)
    what = {"dataset": plans_manager.dataset_name, "folder": basename(folder)}
    what["cases"] = "labeled" if endings is LABELED_FILES else "unlabeled"
    if endings is LABELED_FILES:
        identity["labels"] = [dataset_json["labels"], dataset_json.get("regions_class_order")]
    _refuse_unknown_classes(plans_manager, configuration_manager)
    folder = realpath(folder)  # it may be a link to another disk: what is made beside it must be on the same
    num_parts, part_id = part
    is_part = num_parts > 1
    if is_part:
        cases = {case: cases[case] for case in sorted(cases)[part_id::num_parts]}
    place = place_to_fill(folder, what, identity, configuration, is_part)
    for name in os.listdir(join(place, WORK)):  # what a dead process left; parts leave others'
        if isdir(join(place, WORK, name)) and (not is_part or name.rpartition("@")[0] in cases):
            shutil.rmtree(join(place, WORK, name))
    complete = set(complete_cases(place, endings))
    todo = [c for c, files in cases.items() if c not in complete or _has_changed(join(place, c + ".b2nd"), files)]
    plan = (plans_manager, configuration_manager, dataset_json)
    work = partial(preprocess_case, folder=place, endings=endings, plan=plan)
    tasks = {case: (case, *cases[case]) for case in todo}
    description = f"{basename(folder)} ({len(cases) - len(todo)} there)"
    problems = _collect(work, tasks, workers, description, failed_file(place, part), endings is UNLABELED_FILES)
    if not is_part:
        _remove_unlisted(place, set(cases), endings)
    if place != folder and len(problems) < max(1, len(cases)):  # not if no scan can be read, as of a drive that is away
        replace(folder, what)
    return problems


def _collect(work, tasks, workers: Workers, description: str, file: str, may_fail: bool) -> dict[str, str]:
    """Preprocesses cases; returns what is wrong with those left out, which is in the file as soon as it is known."""
    with suppress(FileNotFoundError):
        os.remove(file)
    killed = {} if may_fail else None
    journal = None
    for case, problem in chain(work_on(work, tasks, workers, description, killed), _later(killed)):
        if problem is not None:
            journal = journal or Journal(file, {})
            journal.add(case, problem)
    return dict(journal.entries) if journal else {}


def _later(killed: dict[str, str] | None) -> Iterator[tuple[str, str]]:
    """Yields what is in a table by the time that it is asked for."""
    yield from (killed or {}).items()


def failed_file(folder: str, part: tuple[int, int] = (1, 0)) -> str:
    """Names the journal of the scans that a command, or a part of one, could not preprocess into a folder."""
    num_parts, part_id = part
    return join(folder, WORK, f"failed_{part_id}_of_{num_parts}.jsonl" if num_parts > 1 else "failed.jsonl")


def _refuse_unknown_classes(plans_manager, configuration_manager) -> None:
    """Raises UserError if nnU-Net does not know the classes that a plan names."""
    where = f"{plans_manager.plans_name}.json"
    try:
        plans_manager.image_reader_writer_class  # noqa: B018
        is_known = configuration_manager.preprocessor_class is not None
    except RuntimeError as error:
        raise UserError(f"{where}: image_reader_writer: {error}: {REMEDY}") from error
    if not is_known:
        name = configuration_manager.preprocessor_name
        raise UserError(f"{where}: preprocessor_name: nnU-Net has no {name!r}: {REMEDY}")


def preprocessing_identity(plans_manager, configuration_manager) -> dict:
    """Lists what in a plan decides the values of a preprocessed scan, as it comes back from JSON.

    Raises:
        UserError: If the plan lacks some of it.
    """
    where = f"{plans_manager.plans_name}.json: a configuration"
    check_shape(configuration_manager.configuration, PreprocessedConfiguration, where, REMEDY)
    identity = {key: configuration_manager.configuration[key] for key in PreprocessedConfiguration.__annotations__}
    identity["transpose_forward"] = plans_manager.transpose_forward
    identity["image_reader_writer"] = plans_manager.plans["image_reader_writer"]
    identity["intensities"] = plans_manager.foreground_intensity_properties_per_channel
    return json.loads(json.dumps(identity))


def refuse_shared_folders(plans_manager) -> None:
    """Refuses plans by which one configuration's cases would replace another's: one inherits, and changes the spacing.

    Raises:
        UserError: Naming both configurations and what differs.
    """
    first: dict[str, tuple[str, dict]] = {}
    for name in plans_manager.available_configurations:
        configuration = plans_manager.get_configuration(name)
        identity = preprocessing_identity(plans_manager, configuration)
        other, theirs = first.setdefault(configuration.data_identifier, (name, identity))
        if others := sorted(key for key in identity if identity[key] != theirs[key]):
            raise UserError(
                f"{plans_manager.plans_name}.json: configurations {other} and {name} have the same data_identifier, "
                f"{configuration.data_identifier!r}, and other {', '.join(others)}: give {name} one of its own"
            )


def _remove_unlisted(folder: str, cases: set[str], endings: Iterable[str]) -> None:
    """Removes the files of cases that have left the data set."""
    for name in os.listdir(folder):
        of = {name.removesuffix(ending) for ending in endings if name.endswith(ending)}
        if of and not of & cases:
            os.remove(join(folder, name))


def _has_changed(output: str, files: tuple[list[str], str | None]) -> bool:
    images, label = files
    sources = [*images, label] if label else images
    return any(exists(source) and getmtime(source) > getmtime(output) for source in sources)


def preprocess_case(case, images, label, folder, endings, plan) -> str | None:
    """Preprocesses one case as nnU-Net does and moves its files into `folder` when all are written.

    Args:
        case: Its name.
        images: One path per channel.
        label: The label file; None for an unlabeled scan.
        folder: Of the preprocessed cases.
        endings: Of the case's files, in the order in which they appear.
        plan: What nnU-Net's preprocessors take: plans manager, configuration manager, content of dataset.json.

    Returns:
        None, or what is wrong with the unlabeled scan; nothing is written then.

    Raises:
        UserError: If nnU-Net cannot preprocess the labeled case.
        OSError: If the files cannot be written.
    """
    is_complete = all(exists(join(folder, case + ending)) for ending in endings)
    if is_complete and not _has_changed(join(folder, case + ".b2nd"), (images, label)):
        return None  # by a worker that was lost before it could say so
    temporary = mkdtemp(prefix=f"{case}@", dir=join(folder, WORK))  # another worker's, that is lost, may be there
    try:
        made = _run(images, label, plan)
        try:
            _save(*made, join(temporary, case), tuple(plan[1].patch_size))
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


def _run(images, label, plan) -> tuple:
    plans_manager, configuration_manager, dataset_json = plan
    preprocessor = configuration_manager.preprocessor_class(verbose=False)
    if label is None:
        data, properties = read_scan(plans_manager.image_reader_writer_class(), images)
        if len(data) != (expected := len(dataset_json["channel_names"])):
            raise UserError(f"{', '.join(images)}: has {len(data)} channel(s), the data set has {expected}")
    try:
        if label is None:
            return preprocessor.run_case_npy(data, None, properties, *plan)
        return preprocessor.run_case(images, label, *plan)
    except Exception as error:  # whatever a strange scan provokes must not cost the others
        raise UserError(f"{images[0]}: nnU-Net cannot preprocess this: {error!r}") from error


def _save(data, seg, properties, path, patch_size) -> None:
    """Saves a case as nnU-Net's `run_case_save` does, and where the body is; without a label seg marks what is zero."""
    data, seg = data.astype(np.float32, copy=False), seg.astype(np.int16, copy=False)
    properties = {**properties, body.KEY: body.body_locations(data[:1])}
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
