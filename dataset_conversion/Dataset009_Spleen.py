"""Spleen of the Medical Segmentation Decathlon (http://medicaldecathlon.com): 41 CTs.

Read: Task09_Spleen/imagesTr/spleen_*.nii.gz and labelsTr, as its dataset.json has them; imagesTs is left.
"""

import sys
from functools import partial

from nnunet_diffusion.conversion.command_line import command_line
from nnunet_diffusion.conversion.layouts import convert_layout, decathlon

SPLEEN = decathlon("spleen", ("spleen",))
convert_spleen = partial(convert_layout, SPLEEN, dataset_id=9, name="Spleen")

if __name__ == "__main__":
    sys.exit(command_line(convert_spleen, __doc__))
