"""Data sets of several sources: label dropout, equal draws, scores by source."""

import pytest
import torch

from nnunet_diffusion.partial.merged_softmax import check_group
from nnunet_diffusion.partial.sources import balanced_sources, drop_from_group, drop_from_mask
from nnunet_diffusion.report.outcome import source_rows


def test_each_label_is_dropped_as_often_as_asked_and_background_never():
    torch.manual_seed(0)
    group = torch.arange(4).expand(5000, 4)
    dropped = drop_from_group(group, 0.3)
    assert (dropped[:, 0] == 0).all() and set(dropped[:, 2].tolist()) == {0, 2}
    shares = (dropped == 0).float().mean(0)[1:]
    assert shares.tolist() == pytest.approx([0.3] * 3, abs=0.03)
    both = ((dropped[:, 1] == 0) & (dropped[:, 2] == 0)).float().mean()
    assert both == pytest.approx(0.09, abs=0.02), "each has a draw of its own"
    assert torch.equal(drop_from_group(group, 0.0), group) and (drop_from_group(group, 1.0) == 0).all()


def test_a_union_is_dropped_whole_and_what_is_not_annotated_stays_so():
    torch.manual_seed(0)
    group = torch.tensor([[0, 1, 2, 2, 0]] * 2000)  # 2 and 3 are a union, 4 is not annotated
    dropped = drop_from_group(group, 0.5)
    check_group(dropped)
    assert torch.equal(dropped[:, 2], dropped[:, 3]) and set(dropped[:, 2].tolist()) == {0, 2}
    assert (dropped[:, 4] == 0).all()
    assert (dropped[:, 2] == 0).float().mean() == pytest.approx(0.5, abs=0.04)


def test_regions_are_dropped_but_never_added():
    torch.manual_seed(0)
    mask = torch.tensor([[True, False, True]] * 2000)
    dropped = drop_from_mask(mask, 0.25)
    assert not dropped[:, 1].any() and dropped.float().mean(0)[[0, 2]].tolist() == pytest.approx([0.75] * 2, abs=0.04)


def test_sources_are_drawn_equally_often():
    source_of = {**dict.fromkeys("abcdef", "large"), **dict.fromkeys("xy", "small")}
    cases = balanced_sources([*"abcdefxyz"], source_of)  # z is of no source: one of its own
    draws = {source: sum(source_of.get(case, "") == source for case in cases) for source in ("large", "small", "")}
    assert draws == {"large": 60, "small": 60, "": 60}
    assert balanced_sources([*"abc"], source_of) == [*"abc"]
    assert balanced_sources([], source_of) == []
    # a case that another balance repeats keeps its share of its source's draws: a three times as often as b
    repeated = balanced_sources([*"aaabxy"], source_of)
    assert repeated.count("a") == 3 * repeated.count("b") == 30 and repeated.count("x") == 20


def test_scores_by_source():
    dsc = {"a": {"liver": 0.5, "spleen": 0.7}, "b": {"liver": 0.7}, "x": {"liver": 0.9, "spleen": 0.1}}
    rows = source_rows(["liver", "spleen"], dsc, {"a": "KiTS", "b": "KiTS", "x": "LiTS"})
    assert [row[:2] for row in rows] == [["KiTS", "2"], ["LiTS", "1"]]
    assert [float(value) for value in rows[0][2:]] == pytest.approx([0.65, 0.6, 0.7])
    assert [float(value) for value in rows[1][2:]] == pytest.approx([0.5, 0.9, 0.1])
    assert source_rows(["liver"], dsc, {}) == [], "one source is no comparison"
