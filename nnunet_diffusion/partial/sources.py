"""Data sets of several sources: which case is of which, and what a source must not tell about the labels.

`sources` in dataset.json: `{case: name of its source}`. Where each source annotates other labels, a network can learn
from the looks of a scan that "this scanner has no label c", and then finds no c there.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def drop_from_group(group: Tensor, share: float) -> Tensor:
    """Takes labels that a case annotates for not annotated, at random, each with its own draw.

    Label dropout (arXiv 2403.07818): what a case does not annotate no longer follows from how it looks.

    Args:
        group: (B, C) int64 group map, see `partial.merged_softmax`.
        share: Probability that a label, or a union, is dropped; background never is.

    Returns:
        (B, C) group map.
    """
    is_dropped = torch.rand(group.shape) < share
    is_dropped[:, 0] = False
    return torch.where(is_dropped.gather(1, group), 0, group)  # a union goes with its first label


def drop_from_mask(is_annotated: Tensor, share: float) -> Tensor:
    """Does the same to a (B, R) bool mask of regions."""
    return is_annotated & (torch.rand(is_annotated.shape) >= share)


def balanced_sources(cases: Sequence[str], source_of: Mapping[str, str]) -> list[str]:
    """Repeats cases so that each source has equally many draws, but for rounding.

    Args:
        cases: May hold a case several times: its share of its source's draws stays what it is.
        source_of: {case: source}; cases that are not in it are one more source.

    Returns:
        The cases; as they are if all are of one source.
    """
    count = Counter(source_of.get(case, "") for case in cases)
    most = max(count.values(), default=0)
    repeats = {source: max(1, round(10 * most / number)) for source, number in count.items()}
    if len(set(repeats.values())) < 2:
        return list(cases)
    return [case for case in cases for _ in range(repeats[source_of.get(case, "")])]
