"""AMOS22, its 300 CTs with 15 abdominal organs (https://amos22.grand-challenge.org, https://zenodo.org/records/7262581).

Read: imagesTr/amos_0001.nii.gz with labelsTr, and imagesVa with labelsVa, of the ids to 500, which are CTs; MRIs (501
to 600) and test scans (imagesTs) are left. Label names are those of its dataset.json, with "aorta" spelled right.
"""

import sys
from functools import partial

from nnunet_diffusion.conversion.command_line import command_line
from nnunet_diffusion.conversion.layouts import ENDING, Layout, convert_layout

CT, ANY = r"(?P<case>amos_0([0-4]\d\d|500))", r"amos_\d{4}"
AMOS22 = Layout(
    labels=(
        "spleen",
        "right kidney",
        "left kidney",
        "gall bladder",
        "esophagus",
        "liver",
        "stomach",
        "aorta",
        "postcava",
        "pancreas",
        "right adrenal gland",
        "left adrenal gland",
        "duodenum",
        "bladder",
        "prostate/uterus",
    ),
    image=f"images(Tr|Va)/{CT}{ENDING}",
    label=f"labels(Tr|Va)/{CT}{ENDING}",
    left_out=rf"images(Ts/{ANY}|(Tr|Va)/amos_0(5(0[1-9]|[1-9]\d)|600)){ENDING}",
    reference="https://amos22.grand-challenge.org",
)
convert_amos22 = partial(convert_layout, AMOS22, dataset_id=218, name="AMOS22")

if __name__ == "__main__":
    sys.exit(command_line(convert_amos22, __doc__))
