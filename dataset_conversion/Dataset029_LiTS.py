"""LiTS, 131 CTs with the liver and its tumors (https://competitions.codalab.org/competitions/17094).

Read: volume-0.nii and segmentation-0.nii, in whichever folders ("Training Batch 1", "Training Batch 2"); test scans,
test-volume-0.nii and so on, are left. Headers of some segmentations are not those of their volumes, though the voxels
are (https://github.com/MIC-DKFZ/nnUNet/issues/850): they are all written anew with the volume's header.
"""

import sys
from functools import partial

from nnunet_diffusion.conversion.command_line import command_line
from nnunet_diffusion.conversion.layouts import ENDING, Layout, convert_layout

LITS = Layout(
    labels=("liver", "tumor"),
    image=r"volume-(?P<case>\d+)" + ENDING,
    label=r"segmentation-(?P<case>\d+)" + ENDING,
    left_out=r"test-volume-\d+" + ENDING,
    reference="https://competitions.codalab.org/competitions/17094",
    trust_voxels=True,
)
convert_lits = partial(convert_layout, LITS, dataset_id=29, name="LiTS")

if __name__ == "__main__":
    sys.exit(command_line(convert_lits, __doc__))
