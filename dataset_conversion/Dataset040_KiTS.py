"""KiTS19, KiTS21 or KiTS23: 210, 300 or 489 CTs with kidneys and their tumors (https://kits-challenge.org).

Read: case_00000/imaging.nii.gz with segmentation.nii.gz (KiTS19, KiTS23) or aggregated_MAJ_seg.nii.gz (KiTS21), in
whichever folder (data, dataset). KiTS19 has no label for cysts, and no labels at all for case_00210 to case_00299, its
test scans: they are left. Later years hold the scans of the earlier ones: convert one of them. The year is told by the
files, unless they are a part that both KiTS19 and KiTS23 have.
"""

import sys

from nnunet_diffusion.conversion.command_line import command_line
from nnunet_diffusion.conversion.dataset import Converted
from nnunet_diffusion.conversion.files import files_below
from nnunet_diffusion.conversion.layouts import ENDING, Layout, convert_layout, matches
from nnunet_diffusion.errors import UserError

CASE = r"(?P<case>case_\d{5})"
NOTHING = r"(?!)"
YEARS = {
    year: Layout(
        labels=labels,
        image=f"{CASE}/imaging{ENDING}",
        label=f"{CASE}/{label}{ENDING}",
        left_out=left_out,
        reference=f"https://github.com/neheller/kits{year}",
    )
    for year, labels, label, left_out in (
        (19, ("kidney", "tumor"), "segmentation", rf"case_002[1-9]\d/imaging{ENDING}"),
        (21, ("kidney", "tumor", "cyst"), "aggregated_MAJ_seg", NOTHING),
        (23, ("kidney", "tumor", "cyst"), "segmentation", NOTHING),
    )
}

ONLY_IN = {
    21: f"{CASE}/aggregated_MAJ_seg{ENDING}",
    23: rf"case_00(2[1-9]|4\d|5\d)\d/segmentation{ENDING}",
    19: rf"case_002[1-9]\d/imaging{ENDING}",  # without labels, which 23 has
}


def convert_kits(
    source: str,
    year: int | None = None,
    dataset_id: int = 40,
    name: str = "KiTS",
    copy: bool = False,
    num_threads: int = 1,
) -> Converted:
    """Writes nnUNet_raw/DatasetXXX_KiTS; `year` is 19, 21 or 23, the rest and the errors are `convert_layout`'s."""
    year = find_year(source) if year is None else year
    if year not in YEARS:
        raise UserError(f"year {year}: KiTS was published in {sorted(YEARS)}")
    return convert_layout(YEARS[year], source, dataset_id, name, copy, num_threads)


def find_year(source: str) -> int:
    """Tells the year by files that no other year has.

    Raises:
        UserError: If there are none of them, or the folder cannot be read.
    """
    files = files_below(source)
    for year, pattern in ONLY_IN.items():
        if any(matches(pattern, path) for path in files):
            return year
    raise UserError(f"{source}: its files do not tell which KiTS they are of: give --year 19, with cysts 23")


if __name__ == "__main__":
    sys.exit(command_line(convert_kits, __doc__, year=tuple(YEARS)))
