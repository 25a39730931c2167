"""What an evaluation found, for a person and for programs: a table, CSV and JSON."""

import csv
import math
import os
from collections.abc import Iterable, Mapping

import numpy as np

from nnunet_diffusion.evaluation.folders import Evaluation
from nnunet_diffusion.evaluation.rules import Score
from nnunet_diffusion.files import atomic, write_json

SHOWN = 20  # names in a line


def summarize(evaluation: Evaluation) -> dict[str, dict]:
    """Mean, standard deviation over the cases (of two or more) and number of counted pairs, by organ or union.

    Returns:
        Target -> measure -> {"mean", "sd", "pairs"}; NaN for what is not defined.
    """
    names = [*evaluation.organs, *evaluation.unions]
    scores = {name: [case[name] for case in evaluation.scores.values() if name in case] for name in names}
    return {
        name: {measure: _statistics(getattr(s, measure) for s in scores[name]) for measure in Score._fields}
        for name in names
    }


def organ_mean(evaluation: Evaluation, summary: Mapping[str, dict]) -> dict[str, float]:
    """Mean over the organs of each measure's mean: every organ counts the same, unions do not count."""
    return {
        measure: _statistics(summary[organ][measure]["mean"] for organ in evaluation.organs)["mean"]
        for measure in Score._fields
    }


def summary_table(evaluation: Evaluation) -> str:
    """A line for each organ and union, then the mean over the organs."""
    summary, targets = summarize(evaluation), evaluation.organs | evaluation.unions
    mean = organ_mean(evaluation, summary)

    def measured(measure: str, digits: int) -> list[str]:
        return [*(_mean_and_sd(summary[name][measure], digits) for name in targets), _cell(mean[measure], digits)]

    def pairs(measure: str) -> list[str]:
        return [*(str(summary[name][measure]["pairs"]) for name in targets), ""]

    return text_table(
        {
            "organ": [*targets, "mean"],
            "pairs": pairs("dsc"),
            "DSC": measured("dsc", 3),
            "NSD": measured("nsd", 3),
            "tolerance mm": [*(f"{target.tolerance_mm:g}" for target in targets.values()), ""],
            "HD95 mm": measured("hd95_mm", 1),
            "in both": pairs("hd95_mm"),
        }
    )


def text_table(columns: Mapping[str, list[str]]) -> str:
    """Columns of text beside each other, the first to the left, the others to the right; rules around the body.

    Args:
        columns: Heading -> cells; the last row is a footer.
    """
    padded = []
    for number, (heading, cells) in enumerate(columns.items()):
        width = max(map(len, [heading, *cells]))
        padded.append([text.rjust(width) if number else text.ljust(width) for text in [heading, *cells]])
    lines = ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])


def remarks(evaluation: Evaluation) -> list[str]:
    """What a reader of the table must know: the rules, and what does not count."""
    lines = [f"Rules {evaluation.rules.name}: {evaluation.rules.description}."]
    lines.append("DSC and NSD: mean ± standard deviation; HD95 of the pairs where both have the organ.")
    for organ in evaluation.organs:
        cases = [case for case, left_out in evaluation.left_out.items() if organ in left_out]
        if cases:
            lines.append(f"Not annotated by itself, so not counted: {organ} in {len(cases)} case(s): {listed(cases)}")
    return lines


def problems(evaluation: Evaluation) -> list[str]:
    """What was not compared, and why."""
    lines = [f"{case}: {problem}" for case, problem in evaluation.failed.items()]
    if evaluation.missing:
        lines.append(f"no prediction for {len(evaluation.missing)} reference(s): {listed(evaluation.missing)}")
    if evaluation.unexpected:
        lines.append(f"no reference for {len(evaluation.unexpected)} prediction(s): {listed(evaluation.unexpected)}")
    return lines


def listed(names: list[str]) -> str:
    """Names in a line, not more than a person reads."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def write_csv(path: str | os.PathLike, evaluation: Evaluation) -> None:
    """Writes a line for each counted pair of case and organ, whole or not at all; what is not defined is empty."""
    targets = evaluation.organs | evaluation.unions
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["case", "organ", "dsc", "nsd", "hd95_mm", "tolerance_mm", "rules"])
        for case, scores in evaluation.scores.items():
            for name, score in scores.items():
                cells = ["" if math.isnan(value) else value for value in score]
                writer.writerow([case, name, *cells, targets[name].tolerance_mm, evaluation.rules.name])


def write_summary(path: str | os.PathLike, evaluation: Evaluation) -> None:
    """Writes everything as JSON, whole or not at all; what is not defined is null."""
    summary = summarize(evaluation)
    targets = evaluation.organs | evaluation.unions
    content = {
        "rules": {"name": evaluation.rules.name, "description": evaluation.rules.description},
        "tolerances_mm": {name: target.tolerance_mm for name, target in targets.items()},
        "mean": organ_mean(evaluation, summary),
        "organs": {name: summary[name] for name in evaluation.organs},
        "unions": {name: summary[name] for name in evaluation.unions},
        "cases": {case: {n: s._asdict() for n, s in scores.items()} for case, scores in evaluation.scores.items()},
        "not_counted": evaluation.left_out,
        "missing": evaluation.missing,
        "failed": evaluation.failed,
        "without_reference": evaluation.unexpected,
    }
    write_json(path, _without_nan(content))


def _statistics(values: Iterable[float]) -> dict[str, float]:
    defined = [value for value in values if not math.isnan(value)]
    return {
        "mean": float(np.mean(defined)) if defined else math.nan,
        "sd": float(np.std(defined, ddof=1)) if len(defined) > 1 else math.nan,
        "pairs": len(defined),
    }


def _without_nan(content):
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content


def _mean_and_sd(statistics: Mapping[str, float], digits: int) -> str:
    if math.isnan(statistics["sd"]):
        return _cell(statistics["mean"], digits)
    return f"{_cell(statistics['mean'], digits)} ± {statistics['sd']:.{digits}f}"


def _cell(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
