"""From folders of image files to cases, by nnU-Net's naming: CASE_0000.nii.gz is channel 0 of CASE."""

import os
import re
from collections.abc import Sequence
from typing import Any

from nnunet_diffusion.conversion.dataset import Converted, convert, refuse
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.preprocessing.scan_checks import GEOMETRIC_ENDINGS, PICTURE_ENDINGS

IMAGE_ENDINGS = (*GEOMETRIC_ENDINGS, *PICTURE_ENDINGS)


def convert_folders(
    dataset_id: int,
    name: str,
    images: str,
    labels_folder: str,
    unlabeled_folders: Sequence[str],
    description: dict,
    file_ending: str | None = None,
    **options: Any,
) -> Converted:
    """Converts a folder of images, one of labels and any number of unlabeled images, named as nnU-Net names them.

    Args:
        dataset_id: 1 to 999.
        name: What follows DatasetXXX_.
        images: Folder with CASE_0000.nii.gz, ...; with one channel, CASE.nii.gz as well. A picture (png, bmp) may hold
            all channels in one file.
        labels_folder: Folder with CASE.nii.gz for every case of `images`.
        unlabeled_folders: Folders with images of other cases.
        description: `channel_names` and `labels`, and what else dataset.json shall say.
        file_ending: Leave out files that end otherwise; None: all must be of one type, which is found.
        **options: As `convert` has them.

    Raises:
        UserError: If anything cannot be used; it lists all of that.
        OSError: If the data set cannot be written.
    """
    scans, maps, *pool = (image_files(folder, file_ending) for folder in (images, labels_folder, *unlabeled_folders))
    unlabeled_scans = [path for paths in pool for path in paths]
    ending = file_ending or the_ending([*scans, *maps, *unlabeled_scans])
    problems: list[str] = []
    num_files = files_per_case(scans, ending, len(description["channel_names"]))
    labeled = matched(grouped(scans, ending, num_files, problems), single(maps, ending, problems), problems)
    unlabeled = grouped(unlabeled_scans, ending, num_files, problems)
    refuse(problems)
    source = [images, labels_folder]
    return convert(dataset_id, name, labeled, unlabeled, {**description, "file_ending": ending}, source, **options)


def image_files(folder: str, file_ending: str | None = None) -> list[str]:
    """Lists the image files in a folder, sorted; hidden files are left out.

    Args:
        folder: Is not searched below.
        file_ending: Take only files that end so; None takes scans of every type that SimpleITK reads, or pictures where
            there are no scans.

    Raises:
        UserError: If the folder cannot be listed or has no such file.
    """
    if file_ending is not None and file_ending not in IMAGE_ENDINGS:
        raise UserError(f"--file_ending {file_ending}: take one of {', '.join(IMAGE_ENDINGS)}")
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise _unlisted(folder, error) from error
    kinds = [file_ending] if file_ending else [GEOMETRIC_ENDINGS, PICTURE_ENDINGS]
    found = ([name for name in names if is_image(name, endings)] for endings in kinds)
    paths = [os.path.join(os.path.abspath(folder), name) for name in next(filter(None, found), [])]
    if not paths:
        raise UserError(f"{folder}: has no {file_ending or ', '.join(IMAGE_ENDINGS)} file: is it the right folder?")
    return paths


def files_below(source: str) -> list[str]:
    """Lists the absolute paths of all files in a folder and below it, sorted; links to folders are followed.

    Raises:
        UserError: If it, or a folder below it, cannot be listed.
    """

    def unreadable(error: OSError) -> None:
        raise _unlisted(error.filename, error) from error

    walk = os.walk(os.path.abspath(source), onerror=unreadable, followlinks=True)
    return sorted(os.path.join(folder, name) for folder, _, names in walk for name in names)


def _unlisted(folder: str, error: OSError) -> UserError:
    return UserError(f"{folder}: cannot be listed ({error.strerror}): correct the path or its permissions")


def is_image(name: str, endings: str | tuple[str, ...] = GEOMETRIC_ENDINGS) -> bool:
    """Tells an image's file name, also from those of hidden files, which archives of macOS are littered with."""
    return name.endswith(endings) and not name.startswith(".")


def the_ending(paths: list[str]) -> str:
    """Finds the one file ending that all these image files share, as nnU-Net needs it.

    Raises:
        UserError: If there are several.
    """
    examples = {next(ending for ending in IMAGE_ENDINGS if path.endswith(ending)): path for path in paths}
    if len(examples) > 1:
        raise UserError(
            f"files of several types, such as {' and '.join(examples.values())}: nnU-Net needs one type for images and "
            "labels; convert the files, or choose one with --file_ending"
        )
    return next(iter(examples))


def files_per_case(images: list[str], file_ending: str, num_channels: int) -> int:
    """Counts the files of a case: one a channel; of pictures one for all, unless there are some of a second channel."""
    is_whole = file_ending in PICTURE_ENDINGS and not any(path.endswith(f"_0001{file_ending}") for path in images)
    return 1 if is_whole else num_channels


def grouped(paths: list[str], file_ending: str, num_channels: int, problems: list[str]) -> dict[str, list[str]]:
    """Groups image files of any folders into cases; with one channel, the _0000 may be missing.

    Args:
        paths: Image files.
        file_ending: What all of them end with.
        num_channels: Of every case.
        problems: Gets a line for every file without a channel, and every channel that is missing or there twice.

    Returns:
        {case: [path per channel]}.
    """
    cases: dict[str, dict[int, str]] = {}
    for path in paths:
        stem = os.path.basename(path)[: -len(file_ending)]
        match = re.fullmatch(r"(.+)_(\d{4})", stem, re.DOTALL)
        if match and int(match[2]) < num_channels:
            case, channel = match[1], int(match[2])
        elif num_channels == 1:
            case, channel = stem, 0
        else:
            problems.append(
                f"{path}: its name must end with one of {num_channels} channels, as in CASE_0000{file_ending}"
            )
            continue
        if (earlier := cases.setdefault(case, {}).setdefault(channel, path)) != path:
            problems.append(f"{case}: is there twice, as {earlier} and {path}: remove or rename one")
    for case, channels in cases.items():
        if missing := sorted(set(range(num_channels)) - channels.keys()):
            problems.append(
                f"{case}: lacks channel(s) {missing} of {num_channels}: add the files, or remove the others"
            )
    return {case: [channels[channel] for channel in sorted(channels)] for case, channels in cases.items()}


def single(paths: list[str], file_ending: str, problems: list[str]) -> dict[str, str]:
    """Finds the label file of every case, which is called as the case is; duplicates become `problems`."""
    cases: dict[str, str] = {}
    for path in paths:
        case = os.path.basename(path)[: -len(file_ending)]
        if (earlier := cases.setdefault(case, path)) != path:
            problems.append(f"{case}: has two labels, {earlier} and {path}: remove one")
    return cases


def matched(
    images: dict[str, list[str]], labels: dict[str, str], problems: list[str]
) -> dict[str, tuple[list[str], str]]:
    """Pairs cases that have both, {case: (image paths, label path)}; those with only one become `problems`."""
    for case in sorted(images.keys() - labels.keys()):
        problems.append(f"{case}: {images[case][0]} has no label: add it, or give the image as an unlabeled one")
    for case in sorted(labels.keys() - images.keys()):
        problems.append(f"{case}: {labels[case]} has no image: add it, or remove the label")
    return {case: (images[case], labels[case]) for case in images if case in labels}
