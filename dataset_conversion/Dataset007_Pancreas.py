"""Pancreas of the Medical Segmentation Decathlon (http://medicaldecathlon.com): 281 CTs, pancreas and its masses.

Read: Task07_Pancreas/imagesTr/pancreas_*.nii.gz and labelsTr, as its dataset.json has them; imagesTs is left. FLARE22's
labeled scans are some of these.
"""

import sys
from functools import partial

from nnunet_diffusion.conversion.command_line import command_line
from nnunet_diffusion.conversion.layouts import convert_layout, decathlon

PANCREAS = decathlon("pancreas", ("pancreas", "cancer"))
convert_pancreas = partial(convert_layout, PANCREAS, dataset_id=7, name="Pancreas")

if __name__ == "__main__":
    sys.exit(command_line(convert_pancreas, __doc__))
