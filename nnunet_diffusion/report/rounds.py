"""Pseudo-label rounds in the report; reads the files that `nnunet_diffusion rounds` leaves."""

import glob
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from nnunet_diffusion.report.charts import chart, draw_lines
from nnunet_diffusion.report.collect import Results
from nnunet_diffusion.rounds.state import load_state
from nnunet_diffusion.tables import figure

KINDS = {"keep": ("kept", "full"), "wait": ("waiting", "union"), "drop": ("dropped", "none")}
FOLDER, FOLD, ROUND = (re.compile(p) for p in ("rounds__(.+__.+)", r"fold_([0-9]+|all)", "round_([0-9]+)"))
PICTURES = 4  # of the last round


@dataclass
class Round:
    """What one round's gate decided, and how good the model is that was trained on it."""

    number: int
    folder: str = ""
    dice: float | None = None  # mean validation Dice of the round's model
    decisions: Counter = field(default_factory=Counter)
    organs: Counter = field(default_factory=Counter)  # organ -> cases in which it is believed
    reasons: Counter = field(default_factory=Counter)


def find_rounds(results: Results, folder: str, preprocessed: str) -> dict[str, list[Round]]:
    """Finds every run of rounds, by plan, configuration and fold; round 0 is the model that the first one started from.

    Args:
        results: Gets the problems.
        folder: The data set's in nnUNet_results.
        preprocessed: The data set's in nnUNet_preprocessed.
    """
    found = {}
    for match in filter(None, map(FOLDER.fullmatch, results.entries(folder))):
        for fold in filter(None, map(FOLD.fullmatch, results.entries(os.path.join(folder, match[0])))):
            run = os.path.join(folder, match[0], fold[0])
            states = os.path.join("*_pseudo", glob.escape(f"{match[1]}__{fold[0]}"), "state.json")
            if rounds := _read_run(results, run, glob.glob(os.path.join(glob.escape(preprocessed), states))):
                found[f"{match[1]}__fold {fold[1]}".replace("__", ", ")] = rounds
    return found


def describe_run(results: Results, rounds: list[Round]) -> dict[str, Any]:
    """Describes a run: kept, waiting and dropped scans and the Dice of each round, and what the last one believed."""
    title = "Mean validation Dice by round; 0: before the first"
    line, last = [(r.number, r.dice) for r in rounds if r.dice is not None], rounds[-1]
    charts = [chart(title, 2.5, draw_lines, {"Dice": [line]}, "round", "Dice", (0, 1))] if len(line) > 1 else []
    pictures = glob.glob(os.path.join(glob.escape(last.folder), "**", "*.png"), recursive=True) if last.folder else []
    alts = {path: f"{os.path.basename(path)[:-4]}, round {last.number}" for path in sorted(pictures)[:PICTURES]}
    return {
        "rows": [_row(entry) for entry in rounds],
        "charts": charts,
        "last": last,
        "pictures": [found for p, alt in alts.items() if (found := results.picture(p, f"Pseudo labels of {alt}"))],
    }


def _row(entry: Round) -> list:
    counts = [entry.decisions[decision] for decision in KINDS]
    shares = [(name, count, color) for (name, color), count in zip(KINDS.values(), counts, strict=True)]
    return [entry.number, *counts, figure(entry.dice), shares if sum(counts) else "-"]


def _read_run(results: Results, folder: str, states: list[str]) -> list[Round]:
    rounds = {}
    for file in states:
        for number, dice in enumerate(results.attempt(file, _dice) or []):
            rounds[number] = Round(number, dice=dice)
    for match in filter(None, map(ROUND.fullmatch, results.entries(folder))):
        entry = rounds.setdefault(int(match[1]), Round(int(match[1])))
        entry.folder = os.path.join(folder, match[0])
        has_report = "report.json" in results.entries(entry.folder)
        if report := has_report and results.json(os.path.join(entry.folder, "report.json")):
            entry.decisions, entry.organs = Counter(report["decisions"]), Counter(report["organs"])
            reasons = (why for case in report["cases"].values() for found in case["reasons"].values() for why in found)
            entry.reasons = Counter(re.sub(r"-?\d+(\.\d+)?", "N", why) for why in reasons)  # which limit, not how much
    return [rounds[number] for number in sorted(rounds)]


def _dice(path: str) -> list[float | None]:
    return [entry.validation_dice for entry in load_state(path).rounds]
