"""Sums scores up and writes them: one mean over cases and organs, one way to write a figure, one table of text."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

Scores = Mapping[str, Mapping[str, float | None]]  # case -> organ -> value; None and NaN: not defined


def mean(values: Iterable[float | None]) -> float:
    """Averages what is defined, as nnU-Net does: None and NaN are left out, and the mean of nothing is NaN."""
    found = defined(values)
    return float(np.mean(found)) if found else math.nan


def deviation(values: Iterable[float | None]) -> float:
    """Returns the sample standard deviation of what is defined; NaN of fewer than two values."""
    found = defined(values)
    return float(np.std(found, ddof=1)) if len(found) > 1 else math.nan


def organ_means(scores: Scores) -> dict[str, float]:
    """Averages each organ over the cases in which it is defined."""
    organs = dict.fromkeys(organ for case in scores.values() for organ in case)
    return {organ: mean(case.get(organ) for case in scores.values()) for organ in organs}


def mean_over_organs(scores: Scores) -> float:
    """Averages the organs' means over the cases: every organ counts the same, however rare."""
    return mean(organ_means(scores).values())


def defined(values: Iterable[float | None]) -> list[float]:
    """Returns the values that are neither None nor NaN."""
    return [value for value in values if value is not None and not math.isnan(value)]


def figure(value: float | None, deviation: float | None = None, digits: int = 3, sign: str = "") -> str:
    """Writes a value, and its deviation where that is defined; a dash if the value is not."""
    spread = "".join(f" ± {known:.{digits}f}" for known in defined([deviation]))
    return "".join(f"{known:{sign}.{digits}f}{spread}" for known in defined([value])) or "-"


def text_table(columns: Mapping[str, Sequence], has_footer: bool = True) -> str:
    """Sets columns beside each other, the first to the left, the others to the right; rules around the body.

    Args:
        columns: Heading -> cells.
        has_footer: Whether the last row stands below the second rule.
    """
    padded = []
    for heading, cells in columns.items():
        texts = [str(cell) for cell in (heading, *cells)]
        align, width = str.rjust if padded else str.ljust, max(map(len, texts))
        padded.append([align(text, width) for text in texts])
    head, *body = ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]
    rule = "-" * max(map(len, [head, *body]))
    return "\n".join([head, rule, *body[:-1], rule, body[-1]] if has_footer else [head, rule, *body])
