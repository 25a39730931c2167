"""Writes what an evaluation found, for a person and for programs: a table, CSV and JSON."""

import csv
import math
import os
from collections.abc import Mapping

from nnunet_diffusion.evaluation.folders import Evaluation
from nnunet_diffusion.evaluation.rules import Score
from nnunet_diffusion.files import atomic, write_json
from nnunet_diffusion.records import some
from nnunet_diffusion.tables import Scores, defined, deviation, figure, mean, text_table

MOST_NAMES = 20  # in a line


def summarize(evaluation: Evaluation) -> dict[str, dict]:
    """Returns mean, standard deviation over the cases (of two or more) and number of counted pairs, by organ or union.

    Returns:
        Target -> measure -> {"mean", "sd", "pairs"}; NaN for what is not defined.
    """
    names = [*evaluation.organs, *evaluation.unions]
    scores = {name: [case[name] for case in evaluation.scores.values() if name in case] for name in names}
    return {
        name: {measure: _statistics([getattr(s, measure) for s in scores[name]]) for measure in Score._fields}
        for name in names
    }


def organ_mean(evaluation: Evaluation, summary: Mapping[str, dict]) -> dict[str, float]:
    """Averages each measure's mean over the organs: every organ counts the same, unions do not count."""
    return {m: mean(summary[organ][m]["mean"] for organ in evaluation.organs) for m in Score._fields}


def dice_scores(evaluation: Evaluation) -> Scores:
    """Returns the DSC of each case and organ, without unions; NaN where it is not defined."""
    return {
        case: {name: score.dsc for name, score in scores.items() if name in evaluation.organs}
        for case, scores in evaluation.scores.items()
    }


def summary_table(evaluation: Evaluation) -> str:
    """Writes a line for each organ and union, then the mean over the organs."""
    summary, targets = summarize(evaluation), evaluation.organs | evaluation.unions
    means = organ_mean(evaluation, summary)

    def measured(measure: str, digits: int) -> list[str]:
        found = [summary[name][measure] for name in targets]
        return [*(figure(s["mean"], s["sd"], digits) for s in found), figure(means[measure], digits=digits)]

    def pairs(measure: str) -> list:
        return [*(summary[name][measure]["pairs"] for name in targets), ""]

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


def remarks(evaluation: Evaluation) -> list[str]:
    """Lists what a reader of the table must know: the rules, and what does not count."""
    lines = [f"Rules {evaluation.rules.name}: {evaluation.rules.description}."]
    lines.append("DSC and NSD: mean ± standard deviation; HD95 of the pairs where both have the organ.")
    for organ in evaluation.organs:
        cases = [case for case, left_out in evaluation.left_out.items() if organ in left_out]
        if cases:
            lines.append(
                f"Not annotated by itself, so not counted: {organ} in {len(cases)} case(s): {some(cases, MOST_NAMES)}"
            )
    return lines


def problems(evaluation: Evaluation) -> list[str]:
    """Lists what was not compared, and why."""
    failed = evaluation.failed.items()
    lines = [f"{case}: {problem}".encode("utf-8", "backslashreplace").decode() for case, problem in failed]
    if missing := evaluation.missing:
        lines.append(f"no prediction for {len(missing)} reference(s): {some(missing, MOST_NAMES)}")
    if others := evaluation.unexpected:
        lines.append(f"no reference for {len(others)} prediction(s): {some(others, MOST_NAMES)}")
    return lines


def write_results(folder: str, evaluation: Evaluation) -> list[str]:
    """Writes evaluation_RULES.csv and .json to a folder, created if need be; returns their paths."""
    os.makedirs(folder, exist_ok=True)
    files = [os.path.join(folder, f"evaluation_{evaluation.rules.name}.{ending}") for ending in ("csv", "json")]
    write_csv(files[0], evaluation)
    write_summary(files[1], evaluation)
    return files


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


def _statistics(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "sd": deviation(values), "pairs": len(defined(values))}


def _without_nan(content):
    if isinstance(content, Mapping):
        return {key: _without_nan(value) for key, value in content.items()}
    return None if isinstance(content, float) and math.isnan(content) else content
