"""BTCV, 30 CTs with 13 abdominal organs (https://www.synapse.org/Synapse:syn3193805, Abdomen/RawData.zip).

Read: img0001.nii.gz and label0001.nii.gz, in whichever folders (RawData/Training/img and label); the test scans,
img0061 to img0080, are left.
"""

import sys
from functools import partial

from nnunet_diffusion.conversion.command_line import command_line
from nnunet_diffusion.conversion.layouts import ENDING, Layout, convert_layout

BTCV = Layout(
    labels=(
        "spleen",
        "right kidney",
        "left kidney",
        "gallbladder",
        "esophagus",
        "liver",
        "stomach",
        "aorta",
        "inferior vena cava",
        "portal vein and splenic vein",
        "pancreas",
        "right adrenal gland",
        "left adrenal gland",
    ),
    image=r"img(?P<case>\d{4})" + ENDING,
    label=r"label(?P<case>\d{4})" + ENDING,
    left_out=r"img00(6[1-9]|7\d|80)" + ENDING,
    reference="https://www.synapse.org/Synapse:syn3193805",
)
convert_btcv = partial(convert_layout, BTCV, dataset_id=17, name="BTCV")

if __name__ == "__main__":
    sys.exit(command_line(convert_btcv, __doc__))
