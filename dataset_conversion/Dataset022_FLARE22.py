"""FLARE22, abdominal CT with 13 organs: 50 labeled and 2000 unlabeled scans (https://flare22.grand-challenge.org).

Read: FLARE22_Tr_0001_0000.nii.gz with its label FLARE22_Tr_0001.nii.gz, and Case_00001_0000.nii.gz without one, in
whichever folders. The evaluation scans (FLARETs_0001_0000.nii.gz, FLARE22_Ts_...) are left, for nnUNetv2_predict takes
their folder as it is; only where there is no training case at all are those of them that have labels taken instead.
"""

import sys
from dataclasses import replace

from nnunet_diffusion.conversion.command_line import command_line
from nnunet_diffusion.conversion.dataset import Converted
from nnunet_diffusion.conversion.files import files_below
from nnunet_diffusion.conversion.layouts import ENDING, Layout, convert_layout, matches

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
TRAINING, TEST = (rf"(?P<case>FLARE(?:22)?_?{part}_\d+)" for part in ("Tr", "Ts"))
FLARE22 = Layout(
    labels=ORGANS,
    image=f"{TRAINING}_0000{ENDING}",
    label=f"{TRAINING}{ENDING}",
    left_out=f"{TEST}_0000{ENDING}",
    reference="https://flare22.grand-challenge.org",
    unlabeled=rf"(?P<case>Case_\d+)_0000{ENDING}",
    reader=None,
)
EVALUATION = replace(FLARE22, image=FLARE22.left_out, label=f"{TEST}{ENDING}")


def convert_flare22(
    source: str, dataset_id: int = 22, name: str = "FLARE22", copy: bool = False, num_threads: int = 1
) -> Converted:
    """Writes nnUNet_raw/DatasetXXX_FLARE22; arguments and errors are those of `convert_layout`."""
    files = files_below(source)
    has_training = any(matches(pattern, path) for pattern in (FLARE22.image, FLARE22.label) for path in files)
    has_evaluation = any(matches(EVALUATION.label, path) for path in files)
    layout = EVALUATION if has_evaluation and not has_training else FLARE22
    converted = convert_layout(layout, source, dataset_id, name, copy, num_threads)
    if layout is EVALUATION:
        converted.notes.append(f"{source} has no training case: took its labeled evaluation cases instead")
    return converted


if __name__ == "__main__":
    sys.exit(command_line(convert_flare22, __doc__))
