"""Liver of the Medical Segmentation Decathlon (http://medicaldecathlon.com): 131 CTs, liver and its tumours, as LiTS.

Read: Task03_Liver/imagesTr/liver_*.nii.gz and labelsTr, as its dataset.json has them; imagesTs is left.
"""

import sys

from nnunet_diffusion.conversion.dataset import Converted
from nnunet_diffusion.conversion.layouts import command_line, convert_layout, decathlon

LIVER = decathlon("liver", ("liver", "cancer"))


def convert_liver(
    source: str, dataset_id: int = 3, name: str = "Liver", copy: bool = False, num_threads: int = 1
) -> Converted:
    """Writes nnUNet_raw/DatasetXXX_Liver; arguments and errors are those of `convert_layout`."""
    return convert_layout(LIVER, source, dataset_id, name, copy, num_threads)


if __name__ == "__main__":
    sys.exit(command_line(convert_liver, __doc__))
