"""Pancreas of the Medical Segmentation Decathlon (http://medicaldecathlon.com): 281 CTs, pancreas and its masses.

Read: Task07_Pancreas/imagesTr/pancreas_*.nii.gz and labelsTr, as its dataset.json has them; imagesTs is left. FLARE22's
labelled scans are some of these.
"""

import sys

from nnunet_diffusion.conversion.dataset import Converted
from nnunet_diffusion.conversion.layouts import command_line, convert_layout, decathlon

PANCREAS = decathlon("pancreas", ("pancreas", "cancer"))


def convert_pancreas(
    source: str, dataset_id: int = 7, name: str = "Pancreas", copy: bool = False, num_threads: int = 1
) -> Converted:
    """Writes nnUNet_raw/DatasetXXX_Pancreas; arguments and errors are those of `convert_layout`."""
    return convert_layout(PANCREAS, source, dataset_id, name, copy, num_threads)


if __name__ == "__main__":
    sys.exit(command_line(convert_pancreas, __doc__))
