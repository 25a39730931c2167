"""Published data sets whose files are recognized by their names: one description each, one conversion for all."""

import re
from dataclasses import dataclass

from nnunet_diffusion.conversion.dataset import REORIENTING_READER, Converted, convert, refuse
from nnunet_diffusion.conversion.files import files_below, is_image, matched, the_ending
from nnunet_diffusion.errors import UserError

ENDING = r"\.nii(?:\.gz)?"


@dataclass(frozen=True)
class Layout:
    """Where a published CT data set keeps its files, and what its labels mean.

    The patterns are regular expressions for the end of a path, beginning with a whole folder's or file's name;
    the group `case` names the case.
    """

    labels: tuple[str, ...]  # of the values 1, 2, ...
    image: str
    label: str
    left_out: str  # images that are not trained on, if they have no label
    reference: str
    trust_voxels: bool = False  # headers of label maps are known to be wrong
    unlabeled: str = r"(?!)"  # scans of the pool
    reader: str | None = REORIENTING_READER  # they store scans in several orientations; None: as the scans need it


def decathlon(prefix: str, labels: tuple[str, ...]) -> Layout:
    """Describes a CT task of the Medical Segmentation Decathlon: imagesTr, labelsTr, imagesTs of prefix_001.nii.gz."""
    case = rf"(?P<case>{prefix}_\d+){ENDING}"
    return Layout(labels, f"imagesTr/{case}", f"labelsTr/{case}", f"imagesTs/{case}", "http://medicaldecathlon.com")


def convert_layout(
    layout: Layout, source: str, dataset_id: int, name: str, copy: bool = False, num_threads: int = 1
) -> Converted:
    """Writes nnUNet_raw/DatasetXXX_Name from the cases of a published data set in or anywhere below `source`.

    Args:
        layout: The data set's.
        source: The folder that it was unpacked into.
        dataset_id: 1 to 999.
        name: What follows DatasetXXX_.
        copy: Copy the files into the data set; otherwise it refers to them where they are.
        num_threads: For the checks.

    Raises:
        UserError: If the folder cannot be read, a case is not whole or there twice, or is not usable.
        OSError: If the data set cannot be written.
    """
    files = [path for path in files_below(source) if is_image(path.rpartition("/")[2])]
    problems: list[str] = []
    patterns = (layout.image, layout.label, layout.unlabeled)
    images, labels, pool = (_found(files, pattern, problems) for pattern in patterns)
    evaluation = {path for path in files if matches(layout.left_out, path)}
    wanted = {case: [path] for case, path in images.items() if case in labels or path not in evaluation}
    labeled = matched(wanted, labels, problems)
    refuse(problems)
    if not labeled:
        image, label = map(example, (layout.image, layout.label))
        raise UserError(f"{source}: has no case in or below it, an image such as {image} with a label {label}")
    unlabeled = {case: [path] for case, path in pool.items()}
    ending = the_ending([path for (image,), label in labeled.values() for path in (image, label)] + list(pool.values()))
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{label: value for value, label in enumerate(layout.labels, start=1)}},
        "file_ending": ending,
        "reference": layout.reference,
        **({"overwrite_image_reader_writer": layout.reader} if layout.reader else {}),
    }
    values = {value: value for value in description["labels"].values()}
    relabeling = dict.fromkeys(labeled, values) if layout.trust_voxels else None
    converted = convert(
        dataset_id, name, labeled, unlabeled, description, [source], copy, num_threads, relabeling, layout.trust_voxels
    )
    if left := len(evaluation - {image for (image,), _ in labeled.values()}):
        converted.notes.append(f"left {left} scan(s) that are not for this training where they are")
    return converted


def example(pattern: str) -> str:
    """Writes a pattern of a `Layout` as a person would, with CASE for what names the case."""
    readable = re.sub(r"\(\?P<case>[^()]*(?:\([^()]*\)[^()]*)*\)", "CASE", pattern.replace(ENDING, ".nii.gz"))
    return readable.replace("\\d+", "NUMBER").replace("\\", "")


def matches(pattern: str, path: str) -> re.Match | None:
    """Finds a pattern of a `Layout` at the end of a path."""
    return re.search(f"(?:^|/)(?:{pattern})$", path)


def _found(files: list[str], pattern: str, problems: list[str]) -> dict[str, str]:
    cases: dict[str, str] = {}
    for path in files:
        if match := matches(pattern, path):
            if (earlier := cases.setdefault(match["case"], path)) != path:
                problems.append(f"{match['case']}: is there twice, as {earlier} and {path}: remove one")
    return cases
