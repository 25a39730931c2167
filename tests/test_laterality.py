"""Which labels differ by side, and which axis runs from left to right."""

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_diffusion.partial.laterality import axes_not_to_mirror, lateral_pairs, left_right_axis


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("left kidney", "right kidney"),
        ("LeftParotid", "RightParotid"),
        ("kidney_left", "kidney_right"),
        ("Lung-L", "Lung-R"),
        ("lung_upper_lobe_left", "lung_upper_lobe_right"),
        ("left adrenal gland", "right adrenal gland"),
        ("L femur", "R femur"),
        ("LK", "RK"),
        ("LAG", "RAG"),
        ("lad", "rad"),
        ("lkid", "rkid"),
        ("LKidney", "RKidney"),
        ("lkidney", "RKIDNEY"),
        ("Parotid_Lt", "Parotid_Rt"),
        ("Lt Parotid", "Rt Parotid"),
        ("leftkidney", "rightkidney"),
        ("kidneyleft", "kidneyright"),
        ("OpticNrvL", "OpticNrvR"),
        ("L1", "R1"),
        ("rib_l12", "rib_r12"),
    ],
)
def test_pairs_are_found_in_any_notation(left, right):
    assert lateral_pairs(["background", right, "liver", left]) == [(left, right)]


@pytest.mark.parametrize(
    "names",
    [
        ["left kidney", "spleen", "right lung", "brightness", "leftover", "l", "larynx", "upright"],
        ["lung", "rung", "liver", "river", "lobe", "robe", "lectum", "rectum", "lens", "rib", "lib"],
        ["LAD", "LCX", "RCA", "left main"],  # coronary arteries
        ["vertebra L1", "vertebra R1", "vertebra T12"],
        ["L1", "L2", "R1", "T12", "S1"],
        ["RK", "LAG", "Lt Parotid", "rightkidney"],
    ],
)
def test_half_pairs_and_letters_inside_words_are_no_pairs(names):
    assert lateral_pairs(["background", *names]) == []


def test_ribs_are_pairs_beside_vertebrae():
    names = ["rib_L1", "rib_R1", "vertebrae_L1", "vertebrae_T12"]
    assert lateral_pairs(names) == [("rib_L1", "rib_R1")]


SIDED = """adrenal_gland atrial_appendage autochthon brachiocephalic_vein clavicula common_carotid_artery femur
gluteus_maximus gluteus_medius gluteus_minimus hip humerus iliac_artery iliac_vena iliopsoas kidney kidney_cyst
lung_lower_lobe lung_upper_lobe scapula subclavian_artery""".split()
TOTALSEGMENTATOR = [  # v2, task `total`
    *(f"{organ}_{side}" for organ in SIDED if organ != "atrial_appendage" for side in ("left", "right")),
    *(f"rib_{side}_{number}" for side in ("left", "right") for number in range(1, 13)),
    *(f"vertebrae_{level}" for level in ["S1", *(f"L{i}" for i in range(1, 6)), *(f"T{i}" for i in range(1, 13)),
                                         *(f"C{i}" for i in range(1, 8))]),
    "lung_middle_lobe_right", "atrial_appendage_left", "spleen", "gallbladder", "liver", "stomach", "pancreas",
    "esophagus", "trachea", "thyroid_gland", "small_bowel", "duodenum", "colon", "urinary_bladder", "prostate",
    "sacrum", "heart", "aorta", "pulmonary_vein", "brachiocephalic_trunk", "superior_vena_cava", "inferior_vena_cava",
    "portal_vein_and_splenic_vein", "spinal_cord", "brain", "skull", "sternum", "costal_cartilages",
]  # fmt: skip
AMOS = """spleen,right kidney,left kidney,gall bladder,esophagus,liver,stomach,arota,postcava,pancreas,
right adrenal gland,left adrenal gland,duodenum,bladder,prostate/uterus"""
BTCV = "spleen,rkid,lkid,gall,eso,liver,sto,aorta,IVC,veins,pancreas,rad,lad"
FLARE22 = "Liver,RK,Spleen,Pancreas,Aorta,IVC,RAG,LAG,Gallbladder,Esophagus,Stomach,Duodenum,LK"
OPENKBP = "Brainstem,SpinalCord,RightParotid,LeftParotid,Mandible,Larynx,Esophagus"


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (AMOS, [("left kidney", "right kidney"), ("left adrenal gland", "right adrenal gland")]),
        (BTCV, [("lkid", "rkid"), ("lad", "rad")]),
        (FLARE22, [("LK", "RK"), ("LAG", "RAG")]),
        (OPENKBP, [("LeftParotid", "RightParotid")]),
    ],
)
def test_public_label_tables(names, pairs):
    assert lateral_pairs(name.strip() for name in names.split(",")) == pairs


def test_totalsegmentators_labels():
    """All that its own words say, and no vertebra."""
    expected = {(n, n.replace("left", "right")) for n in TOTALSEGMENTATOR if n.replace("left", "right") in
                set(TOTALSEGMENTATOR) - {n}}  # fmt: skip
    assert len(TOTALSEGMENTATOR) == 117 and len(expected) == 32
    assert set(lateral_pairs(TOTALSEGMENTATOR)) == expected


def image_with_axes(folder, letters):
    """An image whose x, y, z index axes point to e.g. L, P, S; its array holds the patient's left-right position."""
    world = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    columns = np.array([world[letter] for letter in letters], float).T
    tilt = np.deg2rad(10)
    columns = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]]) @ columns
    image = sitk.Image((4, 5, 6), sitk.sitkFloat32)
    image.SetDirection(columns.flatten().tolist())
    array = np.zeros((6, 5, 4), np.float32)
    for index in np.ndindex(4, 5, 6):
        array[index[::-1]] = image.TransformIndexToPhysicalPoint(index)[0]
    filled = sitk.GetImageFromArray(array)
    filled.CopyInformation(image)
    path = str(folder / f"{letters}.nii.gz")
    sitk.WriteImage(filled, path)
    return path


@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO, NibabelIOWithReorient])
@pytest.mark.parametrize("letters", ["LPS", "RAI", "PSL", "SLP", "ARS", "SPR"])
def test_the_axis_is_the_one_along_which_left_right_position_changes_most(tmp_path, reader, letters):
    array, properties = reader().read_images([image_with_axes(tmp_path, letters)])
    steps = [np.abs(np.diff(array[0], axis=axis)).mean() for axis in range(3)]
    assert left_right_axis(properties) == int(np.argmax(steps))


def test_patch_axes_follow_the_transpose_and_the_dimensions(tmp_path):
    _, properties = SimpleITKIO().read_images([image_with_axes(tmp_path, "LPS")])  # left-right is array axis 2
    assert axes_not_to_mirror([properties], [0, 1, 2], 3) == {2}
    assert axes_not_to_mirror([properties], [2, 0, 1], 3) == {0}
    assert axes_not_to_mirror([properties], [1, 0, 2], 2) == {1}
    assert axes_not_to_mirror([properties], [2, 0, 1], 2) == set(), "2-D slices perpendicular to left-right"


def test_images_that_lie_differently_exclude_both_axes_and_pictures_none(tmp_path):
    several = [SimpleITKIO().read_images([image_with_axes(tmp_path, a)])[1] for a in ("LPS", "PSL")]
    assert axes_not_to_mirror(several, [0, 1, 2], 3) == {2, 0}
    assert axes_not_to_mirror([{"spacing": (999, 1, 1)}], [0, 1, 2], 2) == set()
