"""Groups of cases with the same annotated labels: found, named, refused; and batches that hold all of them."""

from collections import Counter

import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffusion.cli import main
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.mutual.completion import read_report
from nnunet_diffusion.mutual.groups import Group, GroupedLoader, find_groups, owned_channels
from nnunet_diffusion.partial.annotations import output_channels, read_annotations

MANAGER = LabelManager({"background": 0, "liver": 1, "spleen": 2, "aorta": 3}, None)
CHANNELS = output_channels(MANAGER)


def annotations(unions=None, **annotated):
    table = {"annotated_labels": annotated, "union_labels": unions or {}}
    return read_annotations(table, list(annotated), CHANNELS)


def test_groups_are_found_in_the_order_of_their_labels():
    found = find_groups(annotations(a=["aorta", "spleen"], b=["liver"], c=["spleen", "aorta"], d=["liver"]), CHANNELS)
    assert found == [Group(("liver",), ("b", "d")), Group(("spleen", "aorta"), ("a", "c"))]
    owned = owned_channels([group.labels for group in found], CHANNELS)
    assert owned.tolist() == [[False, True, False, False], [False, False, True, True]]


def test_named_groups_hold_cases_that_annotate_a_part_of_them():
    cases = annotations(a=["aorta"], b=["liver"], c=["spleen", "aorta"])
    found = find_groups(cases, CHANNELS, [["aorta", "spleen"], ["liver"]])
    assert found == [Group(("spleen", "aorta"), ("a", "c")), Group(("liver",), ("b",))]


@pytest.mark.parametrize(
    ("cases", "named", "message"),
    [
        ({"a": ["liver", "spleen", "aorta"]}, [], r"all 1 training cases annotate the same .*two groups or more"),
        ({"a": ["liver", "spleen"], "b": ["spleen", "aorta"]}, [], r"groups overlap: case 'a' annotates .*case 'b'"),
        ({"a": ["liver"], "b": ["liver", "spleen", "aorta"]}, [], "groups overlap: case 'a'"),
        ({"a": ["liver"], "b": ["spleen"]}, [], r"no group of training cases annotates \['aorta'\]: add cases"),
        ({"a": ["liver"], "b": ["spleen", "aorta"], "c": []}, [], r"case\(s\) 'c': annotated for nothing"),
        (
            {"a": ["liver"], "b": ["spleen", "aorta"]},
            [["liver"], ["liver", "spleen"]],
            r"\['liver'\] are in two groups",
        ),
        (
            {"a": ["liver"], "b": ["spleen"]},
            [["liver"], ["spleen"], ["aorta"]],
            r"no training case annotates \['aorta'\]",
        ),
        ({"a": ["liver"], "b": ["spleen", "aorta"]}, [["liver", "spleen"], ["aorta"]], r"case\(s\) 'b': annotated for"),
        ({"a": ["liver"], "b": ["spleen", "aorta"]}, [["liver"], ["heart"]], r"\['heart'\] are not among the labels"),
        ({"a": ["liver"], "b": ["spleen", "aorta"]}, ["liver", "spleen"], "must be a list of lists of label names"),
    ],
)
def test_what_cannot_be_grouped_is_named(cases, named, message):
    with pytest.raises(UserError, match=message):
        find_groups(annotations(**cases), CHANNELS, named)


def test_unions_are_refused_by_name():
    cases = annotations({"b": [["spleen", "aorta"]]}, a=["liver"], b=[])
    with pytest.raises(UserError, match=r"case\(s\) 'b': union_labels"):
        find_groups(cases, CHANNELS)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"made_from": {"values": {}, "cases": {}}, "cases": {"a": {}}}', '{"made_from": 5}']
)
def test_a_damaged_report_of_a_completion_is_named(tmp_path, content):
    assert read_report(str(tmp_path)) is None
    (tmp_path / "completed.json").write_text(content)
    with pytest.raises(UserError, match="completed.json: .*: remove it: the cases are completed anew"):
        read_report(str(tmp_path))


def test_the_name_of_a_plan_is_no_path(nnunet_folders, capsys):
    assert main(["mutual", "-d", "1", "-c", "2d", "-f", "0", "-p", "../plans"]) == 1
    assert "-p: '../plans' cannot be the name of a file or folder" in capsys.readouterr().err


class Named(nnUNetBaseDataset):
    """Only names."""

    load_case = save_case = get_identifiers = None


def test_every_batch_holds_every_group():
    groups = [["a"], ["b1", "b2", "b3"], ["c1", "c2"]]
    dataset = Named("", [case for group in groups for case in group])
    loader = GroupedLoader(groups, dataset, 4, (8, 8), (8, 8), MANAGER)
    batches = [loader.get_indices() for _ in range(600)]
    counts = [Counter(case[0] for case in batch) for batch in batches]
    assert {tuple(sorted(count.values())) for count in counts} == {(1, 1, 2)}
    twice = Counter(next(group for group, number in count.items() if number == 2) for count in counts)
    assert all(150 < twice[group] < 250 for group in "abc"), "the extra place goes round"
    last = Counter(batch[-1][0] for batch in batches)
    assert all(150 < last[group] < 250 for group in "abc"), "nnU-Net centers the last places on foreground"
