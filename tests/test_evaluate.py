"""DSC, NSD and HD95: by hand, as published, by each set of rules, and through the command."""

import csv
import json
import math
import os
import re
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import surface_masks

from nnunet_diffusion.cli import main
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.evaluation.folders import annotations_of, evaluate_case
from nnunet_diffusion.evaluation.rules import (
    FLARE22,
    FLARE22_TOLERANCES_MM,
    NNUNET,
    Score,
    Target,
    flare22_organs,
    score,
)
from nnunet_diffusion.evaluation.surface import (
    element_areas,
    hausdorff_distance,
    surface_dice,
    surface_distances,
)
from nnunet_diffusion.evaluation.targets import case_targets, organ_targets

UNIT = (1.0, 1.0, 1.0)
LABELS = {"background": 0, "liver": 1, "left kidney": 2, "right kidney": 3, "aorta": 4}
DATASET = {"labels": LABELS, "file_ending": ".nii.gz"}
PAIRS = surface_masks.pairs()
PUBLISHED = json.loads(Path(__file__).with_name("surface_published.json").read_text())


def mask(shape, *voxels):
    array = np.zeros(shape, bool)
    array[tuple(np.transpose(voxels))] = True
    return array


# By hand


def test_two_neighboring_voxels():
    """Each has 8 corners; 4 are common (0 mm apart), 4 are 1 mm from the other's: half of both surfaces is at 0 mm."""
    distances = surface_distances(mask((1, 1, 3), (0, 0, 0)), mask((1, 1, 3), (0, 0, 1)), UNIT)
    assert sorted(distances.reference_mm) == sorted(distances.prediction_mm) == [0] * 4 + [1] * 4
    # A corner is cut off through the middles of three edges: an equilateral triangle with sides of sqrt(1/2).
    assert distances.reference_mm2 == pytest.approx([math.sqrt(3) / 4 * 0.5] * 8)
    assert [surface_dice(distances, mm) for mm in (0, 0.99, 1)] == pytest.approx([0.5, 0.5, 1])
    assert hausdorff_distance(distances) == 1 and hausdorff_distance(distances, 0.5) == 0


def test_element_of_a_flat_surface_is_a_voxels_face():
    four_below = 0b11110000  # the first index of the eight voxels runs slowest: a plane across the first axis
    assert element_areas((9.0, 2.0, 3.0))[four_below] == pytest.approx(2 * 3)
    assert (element_areas(UNIT)[[0, 255]] == 0).all() and (element_areas(UNIT)[1:255] > 0).all()


def test_what_is_absent_scores_by_the_rules():
    nothing, something = np.zeros((3, 3, 3), bool), mask((3, 3, 3), (1, 1, 1))
    target = Target("liver", (1,), 1.0)
    assert score(nothing, nothing, UNIT, target, FLARE22)[:2] == (1, 1)
    assert all(math.isnan(value) for value in score(nothing, nothing, UNIT, target, NNUNET))
    for rules in (FLARE22, NNUNET):
        for pair in ((nothing, something), (something, nothing)):
            assert score(*pair, UNIT, target, rules)[:2] == (0, 0)
            assert math.isnan(score(*pair, UNIT, target, rules).hd95_mm)
        assert score(something, something, UNIT, target, rules) == (1, 1, 0)


def test_flare22_compares_the_aorta_in_the_references_slices_without_the_last():
    reference, prediction = np.zeros((6, 4, 4), bool), np.zeros((6, 4, 4), bool)
    reference[1:4, 1:3, 1:3], prediction[:, 1:3, 1:3] = True, True
    prediction[3] = False  # only the reference's last slice, which is left out, differs
    aorta, liver = Target("aorta", (4,), 2.0, is_cut=True), Target("liver", (1,), 2.0)
    assert score(reference, prediction, UNIT, aorta, FLARE22) == (1, 1, 0)
    assert score(reference, prediction, UNIT, liver, FLARE22).dsc == pytest.approx(2 * 8 / (12 + 20), abs=5e-5)
    single = np.zeros((6, 4, 4), bool)
    single[2, 1:3, 1:3] = True
    assert score(single, prediction, UNIT, aorta, FLARE22) == (1, 1, 0)
    assert score(single, np.roll(single, 1, 0), UNIT, aorta, FLARE22)[:2] == (0, 0)  # nothing predicted in its slice


def test_flare22_rounds_and_gives_no_nsd_for_a_low_dsc():
    reference, prediction = mask((1, 1, 9), *((0, 0, x) for x in range(3))), mask((1, 1, 9), (0, 0, 2))
    target = Target("liver", (1,), 5.0)
    assert score(reference, prediction, UNIT, target, FLARE22)[:2] == (0.5, 1)  # 2 * 1 / (3 + 1)
    prediction |= mask((1, 1, 9), (0, 0, 3), (0, 0, 4))
    assert score(reference, prediction, UNIT, target, FLARE22).dsc == 0.3333
    assert score(reference, prediction, UNIT, target, NNUNET).dsc == pytest.approx(1 / 3, abs=1e-12)
    reference[..., 2] = False  # nothing shared, all within 5 mm
    assert score(reference, prediction, UNIT, target, FLARE22).nsd == 0
    assert score(reference, prediction, UNIT, target, NNUNET).nsd == 1


def test_flare22_knows_its_organs_in_other_spellings():
    names = {"RightKidney": "right kidney", "kidney_right": "right kidney", "IVC": "inferior vena cava"}
    names |= {"Oesophagus": "esophagus", "adrenal_gland_left": "left adrenal gland", "gall-bladder": "gallbladder"}
    names |= {"LK": "left kidney", "RKidney": "right kidney", "kidney_Rt": "right kidney", "lad": "left adrenal gland"}
    names |= {"rad": "right adrenal gland", "RAG": "right adrenal gland", "leftadrenal": "left adrenal gland"}
    assert flare22_organs(names) == names
    assert set(flare22_organs(["kidney", "left lung", "", "LAD", "left liver"]).values()) == {None}
    assert len(FLARE22_TOLERANCES_MM) == 13


# As published


@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_published_implementation(name):
    distances = surface_distances(*PAIRS[name])
    nsd = [surface_dice(distances, mm) for mm in surface_masks.TOLERANCES_MM]
    hd95_mm = hausdorff_distance(distances)
    published = PUBLISHED[name]
    assert nsd == pytest.approx([math.nan if v is None else v for v in published["nsd"]], abs=1e-12, nan_ok=True)
    assert hd95_mm == pytest.approx(math.inf if published["hd95_mm"] is None else published["hd95_mm"], abs=1e-12)


def test_dice_is_nnunets_with_regions_and_ignored_voxels(tmp_path):
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    labels = {"background": 0, "whole": [1, 2], "core": 2, "nowhere": 4, "ignore": 5}
    rng = np.random.RandomState(0)
    reference = write(tmp_path / "r" / "a.nii.gz", rng.choice([0, 1, 2, 3, 5], (4, 5, 6)))
    prediction = write(tmp_path / "p" / "a.nii.gz", rng.choice([0, 1, 2, 3], (4, 5, 6)))
    targets = list(organ_targets({"labels": labels}, NNUNET).values())
    ours = evaluate_case(reference, prediction, targets, NNUNET, range(6), 5)
    theirs = compute_metrics(reference, prediction, SimpleITKIO(), [target.labels for target in targets], 5)["metrics"]
    assert [target.name for target in targets] == ["whole", "core", "nowhere"]
    for target in targets:
        assert ours[target.name].dsc == pytest.approx(theirs[target.labels]["Dice"], abs=1e-12, nan_ok=True)


# Another route, and what must not matter


def test_equals_a_loop_over_all_corners():
    reference, prediction, spacing_mm = PAIRS["random 0"]

    def corners(array):
        padded = np.pad(array, 1)
        found = [padded[x : x + 2, y : y + 2, z : z + 2] for x, y, z in np.ndindex(*np.add(array.shape, 1))]
        return np.argwhere([0 < cube.sum() < 8 for cube in found]).ravel()

    def places(array):
        return np.transpose(np.unravel_index(corners(array), np.add(array.shape, 1))) * spacing_mm

    between = np.linalg.norm(places(reference)[:, None] - places(prediction)[None], axis=-1)
    distances = surface_distances(reference, prediction, spacing_mm)
    assert np.sort(distances.reference_mm) == pytest.approx(np.sort(between.min(1)))
    assert np.sort(distances.prediction_mm) == pytest.approx(np.sort(between.min(0)))


def test_axes_sides_margins_and_units_do_not_matter():
    reference, prediction, spacing_mm = PAIRS["random 1"]
    expected = surface_distances(reference, prediction, spacing_mm)
    values = [surface_dice(expected, 2), hausdorff_distance(expected)]
    for axes in permutations(range(3)):
        turned = surface_distances(
            np.flip(reference.transpose(axes), 0), np.flip(prediction.transpose(axes), 0), np.take(spacing_mm, axes)
        )
        assert [surface_dice(turned, 2), hausdorff_distance(turned)] == pytest.approx(values)
    other = surface_distances(np.pad(prediction, 2), np.pad(reference, 2), np.multiply(spacing_mm, 10))
    assert [surface_dice(other, 20), hausdorff_distance(other) / 10] == pytest.approx(values)


# Partial annotations


def targets_of(case, dataset, rules):
    annotations, channels = annotations_of([case], dataset)
    return case_targets(annotations[case], channels, organ_targets(dataset, rules))


def test_case_that_is_not_listed_is_fully_annotated():
    dataset = DATASET | {"annotated_labels": {"a": ["aorta", "background"], "none": []}}
    assert list(targets_of("a", dataset, NNUNET)) == ["aorta"]
    assert targets_of("none", dataset, NNUNET) == {}
    assert targets_of("b", dataset, NNUNET) == organ_targets(DATASET, NNUNET)


def test_union_takes_the_place_of_its_members():
    dataset = DATASET | {"union_labels": {"a": [["right kidney", "left kidney"]]}, "annotated_labels": {"a": ["liver"]}}
    targets = targets_of("a", dataset, FLARE22)
    assert list(targets) == ["liver", "left kidney + right kidney"]
    assert targets["left kidney + right kidney"].labels == (2, 3)
    assert targets["left kidney + right kidney"].tolerance_mm == 3
    kidneys = ["left kidney", "right kidney"]
    both = dataset | {"union_labels": {"a": [["aorta", "liver"]]}, "annotated_labels": {"a": kidneys}}
    targets = targets_of("a", both, FLARE22)
    assert list(targets) == [*kidneys, "liver + aorta"]
    assert targets["liver + aorta"] == Target("liver + aorta", (1, 4), 2.0, is_cut=False)


def test_region_is_annotated_if_the_named_ones_in_it_cover_it():
    labels = {"background": 0, "tumor": [1, 2], "core": [1], "edema": [2]}
    tables = {"annotated_labels": {"a": ["core", "edema"], "b": ["core"], "c": ["tumor"]}}
    dataset = {"labels": labels, "regions_class_order": [1, 1, 2]} | tables
    assert {case: list(targets_of(case, dataset, NNUNET)) for case in "abc"} == {
        "a": ["tumor", "core", "edema"], "b": ["core"], "c": ["tumor"]
    }  # fmt: skip


# The command


def write(path, array, spacing=(1.0, 1.0, 2.0), origin=(0.0, 0.0, 0.0)):
    path.parent.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(np.asarray(array, np.uint8))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(path))
    return str(path)


@pytest.fixture
def folders(tmp_path):
    """Case a: liver exact, kidneys swapped, no aorta. Case b: only the liver annotated, half of it found."""
    reference, prediction = np.zeros((2, 4, 6, 8))
    reference[1:3, 1:3, 1:3], reference[1, 1, 4:6], reference[1, 4, 4:6] = 1, 2, 3
    prediction[1:3, 1:3, 1:3], prediction[1, 1, 4:6], prediction[1, 4, 4:6] = 1, 3, 2
    write(tmp_path / "labelsTr" / "a.nii.gz", reference)
    write(tmp_path / "predicted" / "a.nii.gz", prediction)
    prediction[1:3, 1:3, 2], reference[reference > 1] = 0, 0
    write(tmp_path / "labelsTr" / "b.nii.gz", reference)
    write(tmp_path / "predicted" / "b.nii.gz", prediction)
    describe(tmp_path, annotated_labels={"b": ["liver"]})
    return tmp_path


def describe(folder, **more):
    (folder / "dataset.json").write_text(json.dumps(DATASET | more))


def evaluate(folder, *options):
    return main(["evaluate", str(folder / "predicted"), str(folder / "labelsTr"), "-np", "1", *options])


def test_command_counts_what_is_annotated(folders, capsys):
    assert evaluate(folders, "-o", str(folders / "out" / "new"), "--tolerance", "1") == 0
    out = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in out.splitlines()}
    # b: 4 of the liver's 8 voxels are found: 2 * 4 / (8 + 4); mean of that and 1, deviation |1 - 2/3| / sqrt(2)
    assert lines["liver"][1:5] == ["2", "0.833", "±", "0.236"]
    assert lines["left kidney"][2:4] == ["1", "0.000"] and lines["aorta"][1:3] == ["0", "-"]
    assert lines["mean"][1] == f"{(5 / 6 + 0 + 0) / 3:.3f}"
    assert "Rules nnunet: an organ in neither reference nor prediction is not counted" in out
    assert "Not annotated by itself, so not counted: aorta in 1 case(s): b" in out
    content = json.loads((folders / "out" / "new" / "evaluation_nnunet.json").read_text())
    assert content["cases"]["b"] == {"liver": {"dsc": pytest.approx(2 / 3), "nsd": 1, "hd95_mm": 1}}
    assert content["cases"]["a"]["aorta"] == dict.fromkeys(Score._fields)  # null
    assert content["not_counted"] == {"b": ["left kidney", "right kidney", "aorta"]}
    assert content["organs"]["left kidney"]["dsc"] == {"mean": 0, "sd": None, "pairs": 1}
    with open(folders / "out" / "new" / "evaluation_nnunet.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [(row["case"], row["organ"]) for row in rows] == [
        *(("a", name) for name in LABELS if name != "background")
    ] + [("b", "liver")]
    assert list(rows[0].items())[2:] == [
        ("dsc", "1.0"),
        ("nsd", "1.0"),
        ("hd95_mm", "0.0"),
        ("tolerance_mm", "1.0"),
        ("rules", "nnunet"),
    ]
    assert rows[3]["dsc"] == rows[3]["hd95_mm"] == ""  # the aorta, absent from both
    assert {path.name for path in (folders / "out" / "new").iterdir()} == {
        "evaluation_nnunet.csv",
        "evaluation_nnunet.json",
    }


def test_command_scores_the_union_of_what_was_drawn_as_one(folders, capsys):
    describe(folders, annotated_labels={"b": ["liver"]}, union_labels={"a": [["left kidney", "right kidney"]]})
    assert evaluate(folders, "--rules", "flare22") == 0
    out = capsys.readouterr().out
    content = json.loads((folders / "predicted" / "evaluation_flare22.json").read_text())
    assert content["cases"]["a"]["left kidney + right kidney"] == {
        "dsc": 1,
        "nsd": 1,
        "hd95_mm": 0,
    }  # swapped: the same
    assert content["cases"]["a"]["aorta"]["dsc"] == 1  # in neither
    assert content["tolerances_mm"]["liver"] == 5 and content["rules"]["name"] == "flare22"
    assert content["not_counted"]["a"] == ["left kidney", "right kidney"]
    assert content["mean"]["dsc"] == pytest.approx((0.83335 + 1) / 2)  # liver and aorta; a union is no organ
    assert "left kidney + right kidney" in out and "left kidney in 2 case(s): a, b" in out


def test_what_cannot_be_compared_is_named_and_the_rest_is_done(folders, capsys):
    reference = sitk.GetArrayFromImage(sitk.ReadImage(str(folders / "labelsTr" / "a.nii.gz")))
    for case in ("moved", "missing", "strange", "broken"):
        write(folders / "labelsTr" / f"{case}.nii.gz", reference)
    write(folders / "predicted" / "moved.nii.gz", reference, origin=(0.0, 0.0, 30.0))
    write(folders / "predicted" / "strange.nii.gz", reference * 5)
    write(folders / "predicted" / "extra.nii.gz", reference)
    (folders / "predicted" / "broken.nii.gz").write_bytes(b"no image")
    assert evaluate(folders) == 1
    out, err = capsys.readouterr()
    assert "moved.nii.gz does not lie on the voxels of" in err and "origin" in err
    assert "strange.nii.gz: label values [5, 10, 15] are not among the declared [0, 1, 2, 3, 4]" in err
    assert "broken.nii.gz: cannot be read" in err
    assert "no prediction for 1 reference(s): missing" in err and "no reference for 1 prediction(s): extra" in err
    assert "liver" in out
    content = json.loads((folders / "predicted" / "evaluation_nnunet.json").read_text())
    assert list(content["cases"]) == ["a", "b"] and list(content["failed"]) == ["broken", "moved", "strange"]
    assert content["missing"] == ["missing"] and content["without_reference"] == ["extra"]


def test_chill_is_no_excuse_for_failures(folders, capsys):
    (folders / "predicted" / "b.nii.gz").unlink()
    assert evaluate(folders) == 1
    assert evaluate(folders, "--chill") == 0
    (folders / "predicted" / "b.nii.gz").write_bytes(b"")
    assert evaluate(folders, "--chill") == 1
    assert "b.nii.gz: is an empty file" in capsys.readouterr().err


# Bad input


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"annotated_labels": {"a": ["heart"]}}, r"annotated_labels of case 'a' names \['heart'\].*correct the name"),
        ({"annotated_labels": {"a": "liver"}}, "annotated_labels of case 'a' must be a list of label names, not 'l"),
        ({"union_labels": {"a": ["liver"]}}, "union_labels of case 'a' must be a list of label names, not 'liver'"),
        ({"annotated_labels": []}, "'annotated_labels' must be {case: list}, not a list"),
        ({"union_labels": {"a": [["liver", "ignore"]]}}, r"union_labels of case 'a' names \['ignore'\]"),
        ({"file_ending": ".png"}, "file ending .png: distances in mm need files with a spacing"),
        ({"file_ending": ".mha"}, r"labelsTr: holds no file that ends with .mha"),
    ],
)
def test_faulty_description_is_named(folders, capsys, content, message):
    describe(folders, **content)
    assert evaluate(folders) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not list((folders / "predicted").glob("evaluation*"))


def test_flare22_wants_a_tolerance_for_what_it_does_not_know():
    dataset = {"labels": {"background": 0, "liver": 1, "left lung": 2}}
    with pytest.raises(UserError, match=r"no tolerance for left lung: give theirs with --tolerance MM"):
        organ_targets(dataset, FLARE22)
    assert [target.tolerance_mm for target in organ_targets(dataset, FLARE22, 1.5).values()] == [5, 1.5]
    assert [target.tolerance_mm for target in organ_targets(dataset, NNUNET, 0.0).values()] == [0, 0]


@pytest.mark.parametrize("value", [None, -3, "x", [], {}, True, ["liver"], math.inf, math.nan, "\ud800"])
def test_labels_of_a_wrong_shape_are_named_with_what_came(folders, capsys, value):
    for key, labels in (("labels", value), ("labels.liver", LABELS | {"liver": value})):
        describe(folders, labels=labels)
        assert evaluate(folders) == 1
        assert f"dataset.json: {key}" in (err := capsys.readouterr().err) and f", not {value!r}" in err
    for key, other in (("ignore", None), ("file_ending", 3), ("regions_class_order", "x")):
        describe(folders, **{"labels": LABELS | {"ignore": value}} if key == "ignore" else {key: other})
        assert evaluate(folders) == 1 and "dataset.json: " in capsys.readouterr().err


def test_names_that_simpleitk_ends_the_process_for_are_named(folders, capsys):
    for folder in ("labelsTr", "predicted"):
        (folders / folder / "a.nii.gz").rename(folders / folder / os.fsdecode(b"Caf\xe9.nii.gz"))
    assert main(["evaluate", str(folders / "predicted"), str(folders / "labelsTr"), "-np", "1"]) == 1
    out, err = capsys.readouterr()
    assert "Caf\\udce9: its name is no UTF-8: rename its files" in err and "liver" in out


def test_wrong_paths_and_numbers_are_named(folders, capsys, monkeypatch):
    predicted, labels = str(folders / "predicted"), str(folders / "labelsTr")
    (folders / "empty").mkdir()
    (folders / "no.json").write_text("{")
    (folders / "other.json").write_text('{"labels": 3}')
    (folders / "old.json").write_text('{"labels": {"0": "background", "1": "liver"}, "file_ending": ".nii.gz"}')
    cases = {
        (predicted, str(folders / "nowhere")): "nowhere: is not a folder",
        (str(folders / "empty"), labels): "nothing could be compared",
        (predicted, labels, "--tolerance", "-1"): "--tolerance -1.0: a distance in mm is 0 or more",
        (predicted, labels, "--dataset_json", str(folders / "no.json")): "no.json: is no JSON",
        (predicted, labels, "--dataset_json", str(folders / "other.json")): "other.json: labels: Input should be a val",
        (predicted, labels, "--dataset_json", str(folders / "old.json")): "old.json: labels.0",
        (predicted, labels, "--dataset_json", str(folders / "gone.json")): "gone.json",
    }
    for arguments, message in cases.items():
        assert main(["evaluate", *arguments, "-np", "1"]) == 1
        assert message in capsys.readouterr().err
    (folders / "dataset.json").unlink()
    assert evaluate(folders) == 1
    assert "no dataset.json, which names the labels" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        evaluate(folders, "--rules", "mine")


def test_data_set_is_found_by_its_id(folders, nnunet_folders, capsys):
    raw = nnunet_folders / "nnUNet_raw" / "Dataset501_Half"
    raw.mkdir()
    (folders / "dataset.json").rename(raw / "dataset.json")
    assert evaluate(folders, "-d", "501") == 0
    assert f"Labels: {raw / 'dataset.json'}" in capsys.readouterr().out
