"""Liver of the Medical Segmentation Decathlon (http://medicaldecathlon.com): 131 CTs, liver and its tumors, as LiTS.

Read: Task03_Liver/imagesTr/liver_*.nii.gz and labelsTr, as its dataset.json has them; imagesTs is left.
"""

import sys
from functools import partial

from nnunet_diffusion.conversion.command_line import command_line
from nnunet_diffusion.conversion.layouts import convert_layout, decathlon

LIVER = decathlon("liver", ("liver", "cancer"))
convert_liver = partial(convert_layout, LIVER, dataset_id=3, name="Liver")

if __name__ == "__main__":
    sys.exit(command_line(convert_liver, __doc__))
