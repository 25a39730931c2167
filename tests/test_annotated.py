"""What was annotated is read as it was declared, contradictions are named, and label files are held against it."""

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.partial.annotations import (
    Annotation,
    annotated_mask,
    group_map,
    known_values,
    output_channels,
    read_annotations,
)
from nnunet_diffusion.partial.losses import merged_into_background
from nnunet_diffusion.preprocessing.supervision import check_counts, count_labels, summarize, table

# Not in the order of their values: the network's outputs are.
LABELS = {"background": 0, "right kidney": 2, "left kidney": 1, "liver": 3, "spleen": 4, "ignore": 5}
CHANNELS = output_channels(LabelManager(LABELS, None))
CASES = ["a", "b", "c", "d"]
DECLARED = {
    "annotated_labels": {"a": ["liver"], "b": ["liver", "spleen", "background"], "c": []},
    "union_labels": {"b": [["right kidney", "left kidney"]]},
}
REGIONS = {"background": 0, "kidneys": [1, 2], "left": [1], "right": 2, "tumor": [3, 4], "core": 4}
REGION_CHANNELS = output_channels(LabelManager(REGIONS, [1, 1, 2, 3, 4]))


def test_channels_are_in_the_order_of_the_network():
    assert list(CHANNELS) == ["background", "left kidney", "right kidney", "liver", "spleen"]
    assert list(REGION_CHANNELS) == ["kidneys", "left", "right", "tumor", "core"]


def test_mask_by_hand():
    mask = annotated_mask(["b", "a", "d", "c", "b"], read_annotations(DECLARED, CASES, CHANNELS), CHANNELS)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [
        [1, 0, 0, 1, 1],  # b: of the kidneys only the union is known
        [1, 0, 0, 1, 0],
        [1, 1, 1, 1, 1],  # d is not listed
        [1, 0, 0, 0, 0],  # c was looked at for nothing
        [1, 0, 0, 1, 1],
    ]


def test_groups_by_hand():
    annotations = read_annotations(DECLARED, CASES, CHANNELS)
    groups = group_map(["b", "a", "d", "c"], annotations, CHANNELS)
    assert groups.dtype == torch.int64
    # b: the left kidney (1) is merged into the right one (2), the first name of the union.
    assert groups.tolist() == [[0, 2, 2, 3, 4], [0, 0, 0, 3, 0], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]


def test_without_unions_the_groups_are_those_of_the_mask():
    annotations = read_annotations({"annotated_labels": DECLARED["annotated_labels"]}, CASES, CHANNELS)
    mask = annotated_mask(CASES, annotations, CHANNELS)
    assert torch.equal(group_map(CASES, annotations, CHANNELS), merged_into_background(mask))


def test_case_with_a_union_alone_is_annotated_for_the_others():
    annotations = read_annotations({"union_labels": {"a": [["liver", "spleen"]]}}, CASES, CHANNELS)
    assert annotations["a"] == Annotation({"background", "left kidney", "right kidney"}, (("liver", "spleen"),))
    assert group_map(["a"], annotations, CHANNELS).tolist() == [[0, 1, 2, 3, 3]]


def test_nothing_declared_is_everything_annotated():
    assert annotated_mask(CASES, read_annotations({}, CASES, CHANNELS), CHANNELS).all()


@pytest.mark.parametrize(
    ("named", "known"),
    [
        (["kidneys"], [1, 0, 0, 0, 0]),  # the sum says nothing of the sides
        (["left", "right"], [1, 1, 1, 0, 0]),  # but the sides say all of the sum
        (["left"], [0, 1, 0, 0, 0]),
        (["core"], [0, 0, 0, 0, 1]),
        (["tumor", "left"], [0, 1, 0, 1, 0]),
    ],
)
def test_region_is_annotated_if_each_label_in_it_is(named, known):
    annotations = read_annotations({"annotated_labels": {"a": named}}, ["a", "b"], REGION_CHANNELS)
    mask = annotated_mask(["a", "b"], annotations, REGION_CHANNELS).int().tolist()
    assert mask == [known, [1, 1, 1, 1, 1]]


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"annotated_labels": ["a"]}, r"'annotated_labels' must be \{case: list\}, not a list"),
        ({"annotated_labels": {"z": ["liver"]}}, "annotated_labels names case 'z', which is not a labeled case"),
        ({"union_labels": {"z": []}}, "union_labels names case 'z'"),
        ({"annotated_labels": {"a": ["lever", "liver"]}}, r"annotated_labels of case 'a' names \['lever'\], not among"),
        ({"annotated_labels": {"a": ["ignore"]}}, r"names \['ignore'\]"),
        ({"annotated_labels": {"a": "liver"}}, "case 'a' must be a list of label names, not 'liver'"),
        ({"annotated_labels": {"a": None}}, "case 'a' must be a list of label names, not None"),
        ({"annotated_labels": {"a": [3]}}, r"case 'a' must be a list of label names, not \[3\]"),
        ({"union_labels": {"a": ["liver", "spleen"]}}, "union_labels of case 'a' must be a list of label names"),
        ({"union_labels": {"a": 1}}, "must be a list of lists"),
        ({"union_labels": {"a": [["liver", "lung"]]}}, r"names \['lung'\]"),
        ({"union_labels": {"a": [["liver"]]}}, r"\['liver'\] must be two labels or more"),
        ({"union_labels": {"a": [["liver", "background"]]}}, "background cannot be in a union"),
        ({"union_labels": {"a": [["liver", "spleen"], ["spleen", "left kidney"]]}}, r"\['spleen'\] occur more than"),
        ({"annotated_labels": {"a": ["liver"]}, "union_labels": {"a": [["liver", "spleen"]]}}, r"\['liver'\] are in"),
    ],
)
def test_what_cannot_be_meant_is_named(declared, message):
    with pytest.raises(UserError, match=message):
        read_annotations(declared, CASES, CHANNELS)


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(UserError, match=r"(?s)3 problem\(s\).*'z'.*'x'.*'y'"):
        read_annotations({"annotated_labels": {"z": [], "a": ["x"], "b": ["y"]}}, CASES, CHANNELS)


def test_union_of_regions_is_refused_with_the_way_to_say_it():
    with pytest.raises(UserError, match="has regions: name a region that is the union in annotated_labels"):
        read_annotations({"union_labels": {"a": [["left", "right"]]}}, ["a"], REGION_CHANNELS)


def test_values_that_a_label_file_may_hold():
    annotations = read_annotations(DECLARED, CASES, CHANNELS)
    assert [known_values(annotations[case], CHANNELS) for case in CASES] == [{0, 3}, {0, 2, 3, 4}, {0}, {0, 1, 2, 3, 4}]


def test_value_that_is_not_declared_is_named():
    annotations = read_annotations(DECLARED, CASES, CHANNELS)
    check_counts({"a": {0: 5, 3: 1, 5: 2}, "b": {2: 1}}, annotations, CHANNELS, ignore_label=5)
    with pytest.raises(UserError, match=r"case 'a' has voxels with the value\(s\) \[4\] \(spleen\) but does not"):
        check_counts({"a": {0: 5, 4: 1}}, annotations, CHANNELS, ignore_label=5)
    with pytest.raises(UserError, match=r"case 'b' .* \[1\] \(left kidney\)"):  # not the first name of the union
        check_counts({"b": {0: 5, 1: 1}}, annotations, CHANNELS)
    with pytest.raises(UserError, match=r"case 'd' .* \[5, 9\] \(no label\)"):
        check_counts({"d": {5: 5, 9: 1}}, annotations, CHANNELS)


def test_label_files_are_counted(tmp_path):
    files = {}
    for i, case in enumerate(CASES):
        files[case] = str(tmp_path / f"{case}.nii.gz")
        voxels = np.zeros((3, 4, 5), np.uint8)
        voxels.flat[: i + 1] = 3
        sitk.WriteImage(sitk.GetImageFromArray(voxels), files[case])
    counts = count_labels({"file_ending": ".nii.gz"}, files)
    assert counts == {case: {0: 59 - i, 3: 1 + i} for i, case in enumerate(CASES)}


def test_unreadable_label_file_is_named(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(b"no scan")
    with pytest.raises(UserError, match=r"a\.nii\.gz: nnU-Net cannot read this"):
        count_labels({"file_ending": ".nii.gz"}, {"a": str(tmp_path / "a.nii.gz")})


def test_image_in_place_of_labels_is_named(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(np.full((2, 2, 2), 0.5, np.float32)), str(tmp_path / "a.nii.gz"))
    with pytest.raises(UserError, match=r"a\.nii\.gz: label values must be whole numbers, not \[0\.5\]"):
        count_labels({"file_ending": ".nii.gz"}, {"a": str(tmp_path / "a.nii.gz")})


def test_table_counts_annotated_pairs_and_shouts_about_the_others():
    declared = {"annotated_labels": {"a": ["liver"], "b": []}, "union_labels": {"b": [["right kidney", "left kidney"]]}}
    counts = {"a": {0: 9, 3: 7}, "b": {0: 9, 2: 4}}
    rows = summarize(counts, read_annotations(declared, ["a", "b"], CHANNELS), CHANNELS)
    assert [tuple(row) for row in rows] == [
        ("left kidney", 0, 1, 0, 0),
        ("right kidney", 0, 1, 0, 0),
        ("liver", 1, 0, 1, 7),
        ("spleen", 0, 0, 0, 0),
    ]
    text = table(rows).splitlines()
    assert text[4].split() == ["liver", "1", "0", "1", "7"]
    assert text[6].startswith("WARNING: NO CASE ANNOTATES: spleen: ")
    assert text[7].startswith("WARNING: ONLY IN UNIONS, SO THAT NOTHING TELLS THEM FROM THE OTHERS: left kidney, right")


def test_table_of_regions():
    annotations = read_annotations({"annotated_labels": {"a": ["kidneys"]}}, ["a", "b"], REGION_CHANNELS)
    rows = summarize({"a": {0: 1, 1: 5}, "b": {0: 1, 2: 3}}, annotations, REGION_CHANNELS)
    assert tuple(rows[0]) == ("kidneys", 2, 0, 2, 8)
    assert tuple(rows[1]) == ("left", 1, 0, 0, 0)
    assert "WARNING: ANNOTATED, BUT NO CASE HAS A VOXEL OF: left, tumor, core" in table(rows)
