"""FLARE22, abdominal CT with 13 organs: 50 labeled and 2000 unlabeled scans (https://flare22.grand-challenge.org).

Read: FLARE22_Tr_0001_0000.nii.gz with its label FLARE22_Tr_0001.nii.gz, and Case_00001_0000.nii.gz without one, in
whichever folders. The evaluation scans (FLARETs_0001_0000.nii.gz, FLARE22_Ts_...) are left, for nnUNetv2_predict takes
their folder as it is; only where there is no training case at all are those of them that have labels taken instead.
"""

import os
import re
import sys

from nnunet_diffusion.conversion.command_line import command_line
from nnunet_diffusion.conversion.dataset import Converted, convert, refuse
from nnunet_diffusion.conversion.files import files_below, grouped, matched, single
from nnunet_diffusion.errors import UserError

FILE_ENDING = ".nii.gz"
ORGANS = (
    "liver",
    "right kidney",
    "spleen",
    "pancreas",
    "aorta",
    "inferior vena cava",
    "right adrenal gland",
    "left adrenal gland",
    "gallbladder",
    "esophagus",
    "stomach",
    "duodenum",
    "left kidney",
)
# Only the files' names count, they are always the same. The folders' are not: Training/FLARE22_LabeledCase50/images,
# FLARE22Train, FLARE22_UnlabeledCase1-1000, ...1-500, Unlabeled, Tuning, Validation, ValidationSet, imagesTr.
TRAINING, UNLABELED, EVALUATION = r"FLARE(?:22)?_?Tr_\d+", r"Case_\d+", r"FLARE(?:22)?_?Ts_\d+"


def convert_flare22(
    source: str, dataset_id: int = 22, name: str = "FLARE22", copy: bool = False, num_threads: int = 1
) -> Converted:
    """Writes nnUNet_raw/DatasetXXX_FLARE22 from what there is of FLARE22 in or anywhere below `source`.

    Args:
        source: The folder that FLARE22 was unpacked into.
        dataset_id: 1 to 999.
        name: What follows DatasetXXX_.
        copy: Copy the files into the data set; otherwise it refers to them where they are.
        num_threads: For the checks.

    Raises:
        UserError: If the folder cannot be read, a case is not whole or there twice, or is not usable.
        OSError: If the data set cannot be written.
    """
    files = files_below(source)
    problems: list[str] = []
    notes = []
    labeled = matched(*_found(files, TRAINING, problems), problems)
    if not labeled and not problems:
        labeled = matched(*_found(files, EVALUATION, problems), [])  # that one has no label is no problem
        notes.append(f"{source} has no training case: took its {len(labeled)} labeled evaluation case(s) instead")
    elif evaluation := _named(files, EVALUATION + "_0000"):
        notes.append(f"left {len(evaluation)} evaluation scan(s) where they are")
    unlabeled = grouped(_named(files, UNLABELED + "_0000"), FILE_ENDING, 1, problems)
    refuse(problems)
    if not labeled:
        raise UserError(
            f"{source}: has no labeled case in or below it, such as FLARE22_Tr_0001_0000.nii.gz and its label "
            "FLARE22_Tr_0001.nii.gz: add the labeled part of FLARE22, nnU-Net's plan is made from it"
        )
    description = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, **{organ: value for value, organ in enumerate(ORGANS, start=1)}},
        "file_ending": FILE_ENDING,
        "reference": "https://flare22.grand-challenge.org",
    }
    converted = convert(dataset_id, name, labeled, unlabeled, description, [source], copy, num_threads)
    converted.notes += notes
    return converted


def _named(files: list[str], stem: str) -> list[str]:
    return [path for path in files if re.fullmatch(stem + re.escape(FILE_ENDING), os.path.basename(path))]


def _found(files: list[str], case: str, problems: list[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    images = grouped(_named(files, case + "_0000"), FILE_ENDING, 1, problems)
    return images, single(_named(files, case), FILE_ENDING, problems)


if __name__ == "__main__":
    sys.exit(command_line(convert_flare22, __doc__))
