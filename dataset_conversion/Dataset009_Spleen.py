"""Spleen of the Medical Segmentation Decathlon (http://medicaldecathlon.com): 41 CTs.

Read: Task09_Spleen/imagesTr/spleen_*.nii.gz and labelsTr, as its dataset.json has them; imagesTs is left.
"""

from functools import partial

from nnunet_diffusion.conversion.layouts import convert_layout, decathlon

SPLEEN = decathlon("spleen", ("spleen",))
convert_spleen = partial(convert_layout, SPLEEN, dataset_id=9, name="Spleen")
