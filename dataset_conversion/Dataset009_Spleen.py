"""Spleen of the Medical Segmentation Decathlon (http://medicaldecathlon.com): 41 CTs.

Read: Task09_Spleen/imagesTr/spleen_*.nii.gz and labelsTr, as its dataset.json has them; imagesTs is left.
"""

import sys

from nnunet_diffusion.conversion.dataset import Converted
from nnunet_diffusion.conversion.layouts import command_line, convert_layout, decathlon

SPLEEN = decathlon("spleen", ("spleen",))


def convert_spleen(
    source: str, dataset_id: int = 9, name: str = "Spleen", copy: bool = False, num_threads: int = 1
) -> Converted:
    """Writes nnUNet_raw/DatasetXXX_Spleen; arguments and errors are those of `convert_layout`."""
    return convert_layout(SPLEEN, source, dataset_id, name, copy, num_threads)


if __name__ == "__main__":
    sys.exit(command_line(convert_spleen, __doc__))
