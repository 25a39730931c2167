"""What a round kept and dropped, and why: for a person, for programs, in pictures."""

import os
from collections import Counter
from collections.abc import Mapping

import numpy as np
import SimpleITK as sitk

from nnunet_diffusion.evaluation.overlays import draw_overlay
from nnunet_diffusion.files import atomic, write_json
from nnunet_diffusion.preprocessing.case_files import load_properties
from nnunet_diffusion.rounds.evidence import Evidence
from nnunet_diffusion.rounds.gate import DROP, KEEP, WAIT, Verdict
from nnunet_diffusion.rounds.prediction import Case, load_prediction, read_preprocessed

PICTURES = 2  # of the best, and of the worst


def quality(evidence: Mapping[str, Evidence]) -> float:
    """Ranks cases by how good a prediction seems: the mean confidence of its organs, minus their mean u."""
    confidence = [entry.confidence for entry in evidence.values() if entry.confidence is not None]
    u = [entry.disagreement for entry in evidence.values() if entry.disagreement is not None]
    return float(np.mean(confidence or [0])) - float(np.mean(u or [0]))


def write_report(
    folder: str, title: str, verdicts: Mapping[str, Verdict], evidence: Mapping[str, Mapping[str, Evidence]]
) -> dict[str, int]:
    """Writes report.json and report.md, each whole or not at all; returns how many cases are kept, wait, are dropped.

    Args:
        folder: Is created if need be.
        title: Of the report.
        verdicts: {case: verdict}.
        evidence: {case: {organ: evidence}}.
    """
    os.makedirs(folder, exist_ok=True)
    cases = {
        case: {**verdict._asdict(), "evidence": {organ: e._asdict() for organ, e in evidence.get(case, {}).items()}}
        for case, verdict in verdicts.items()
    }
    counts = Counter(verdict.decision for verdict in verdicts.values())
    organs = Counter(organ for verdict in verdicts.values() for organ in verdict.organs)
    decisions = {decision: counts[decision] for decision in (KEEP, WAIT, DROP)}
    summary = {"decisions": decisions, "organs": dict(organs)}
    write_json(os.path.join(folder, "report.json"), {"title": title, **summary, "cases": cases})
    lines = [f"# {title}", "", f"Kept {counts[KEEP]}, waiting {counts[WAIT]}, dropped {counts[DROP]}.", ""]
    lines += ["| organ | accepted in |", "|---|---|", *(f"| {name} | {n} |" for name, n in organs.most_common()), ""]
    lines += ["| case | decision | quality | not accepted, and why |", "|---|---|---|---|"]
    for case in sorted(verdicts, key=lambda name: quality(evidence.get(name, {}))):
        verdict = verdicts[case]
        why = "; ".join(f"{organ}: {', '.join(found)}" for organ, found in verdict.reasons.items())
        lines.append(f"| {case} | {verdict.decision} | {quality(evidence.get(case, {})):.2f} | {why or '-'} |")
    lines += ["", "Cases are listed from worst to best, by mean confidence minus mean u; u needs a round before."]
    with atomic(os.path.join(folder, "report.md")) as temporary, open(temporary, "w", encoding="utf-8") as f:
        f.write("\n".join(lines) + "\n")
    return decisions


def draw(
    folder: str, cases: Mapping[str, Case], chosen: Mapping[str, str], predicted: str, plans, labels: dict
) -> None:
    """Draws predictions of scans, in the patient's own orientation as far as it is known.

    Args:
        folder: Gets a PNG for each.
        cases: {case: where its image is}.
        chosen: {case: what is said of it above its picture}.
        predicted: The folder of the predictions.
        plans: The `PlansManager`, which knows the order of the axes.
        labels: dataset.json's.
    """
    os.makedirs(folder, exist_ok=True)
    for case, heading in chosen.items():
        properties = load_properties(cases[case].image.removesuffix(".b2nd") + ".pkl")
        prediction, image = load_prediction(predicted, case), read_preprocessed(cases[case].image)[0]
        spacing = [cases[case].spacing_mm[axis] for axis in plans.transpose_backward]
        scans = []
        for array in (image, np.maximum(prediction.labels, 0)):
            scans.append(sitk.GetImageFromArray(array.transpose(plans.transpose_backward)))
            scans[-1].SetSpacing(spacing[::-1])
            if "sitk_stuff" in properties:
                scans[-1].SetDirection(properties["sitk_stuff"]["direction"])
        picture = os.path.join(folder, case + ".png")
        draw_overlay(picture, *scans, {}, labels, f"{case}: {heading}", is_ct=False, reference_name="predicted")


def to_draw(verdicts: Mapping[str, Verdict], evidence: Mapping[str, Mapping[str, Evidence]]) -> dict[str, str]:
    """Chooses the best of what was kept, and the worst of all, with what became of them."""
    order = sorted(verdicts, key=lambda case: quality(evidence[case]))
    best = [case for case in order if verdicts[case].decision == KEEP][-PICTURES:]
    return {case: verdicts[case].decision for case in [*order[:PICTURES], *best]}
