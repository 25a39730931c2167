"""Section of the report about pseudo-label rounds; reads the files that `nnunet_diffusion rounds` leaves."""

import glob
import os
import re
from collections import Counter
from dataclasses import dataclass, field

from nnunet_diffusion.files import read_json
from nnunet_diffusion.report.charts import line_chart, share_bar
from nnunet_diffusion.report.collect import Results
from nnunet_diffusion.report.html import Html, element, join, table
from nnunet_diffusion.report.training import picture
from nnunet_diffusion.rounds.state import load_state

DECISIONS = ("keep", "wait", "drop")
FOLDER = re.compile(r"rounds__(?P<model>.+__.+)")


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
    """Every run of rounds, by plan, configuration and fold; round 0 is the model that the first round started from."""
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), "rounds__*", "fold_*"))):
        match, fold = FOLDER.fullmatch(os.path.basename(os.path.dirname(path))), os.path.basename(path)
        run = os.path.join("*_pseudo", glob.escape(f"{match['model']}__{fold}"), "state.json")
        rounds = {}
        for file in glob.glob(os.path.join(glob.escape(preprocessed), run)):
            for number, dice in enumerate(results.attempt(file, _dice) or []):
                rounds[number] = Round(number, dice=dice)
        for entry in glob.glob(os.path.join(glob.escape(path), "round_*")):
            if (number := os.path.basename(entry).removeprefix("round_")).isdigit():
                known = rounds.setdefault(int(number), Round(int(number)))
                known.folder = entry
                known.decisions, known.organs, known.reasons = results.attempt(
                    os.path.join(entry, "report.json"), _report
                ) or (Counter(), Counter(), Counter())
        if rounds:
            name = f"{match['model']}__{fold}".replace("__", ", ").replace("fold_", "fold ")
            found[name] = [rounds[number] for number in sorted(rounds)]
    return found


def rounds_section(results: Results, runs: dict[str, list[Round]]) -> Html:
    """Kept, waiting and dropped scans and the Dice of each round."""
    parts = [element("h2", "Pseudo-label rounds")]
    for name, rounds in runs.items():
        parts += [element("h3", name), _rounds_table(rounds)]
        line = [(r.number, r.dice) for r in rounds if r.dice is not None]
        if len(line) > 1:
            title = "Mean validation Dice by round; 0: before the first"
            parts.append(line_chart(title, {"Dice": [line]}, "round", "Dice"))
        last = rounds[-1]
        if last.organs:
            rows = [[organ, str(count)] for organ, count in last.organs.most_common()]
            parts.append(table(f"Round {last.number}: scans in which each label is believed", ["label", "scans"], rows))
        if last.reasons:
            reasons = element("ul", *(element("li", f"{why}: {n}") for why, n in last.reasons.most_common(12)))
            parts.append(element("details", element("summary", "Why labels were not believed"), reasons))
        for file in sorted(glob.glob(os.path.join(glob.escape(last.folder), "**", "*.png"), recursive=True))[:4]:
            parts.append(picture(results, file, f"Pseudo labels of {os.path.basename(file)[:-4]}, round {last.number}"))
    key = join(element("span", element("span", class_="key", style="background:#007a5a"), "kept"),
               element("span", element("span", class_="key", style="background:#a86500"), "waiting"),
               element("span", element("span", class_="key", style="background:#7f8b92"), "dropped"))  # fmt: skip
    return element("section", parts[0], element("div", key, class_="organs"), *parts[1:], id="rounds")


def _rounds_table(rounds: list[Round]) -> Html:
    rows = []
    for entry in rounds:
        counts = [entry.decisions[decision] for decision in DECISIONS]
        kinds = zip(("kept", "waiting", "dropped"), counts, ("full", "union", "none"), strict=True)
        bar = share_bar({what: (count, kind) for what, count, kind in kinds}, sum(counts)) if sum(counts) else "–"
        dice = "–" if entry.dice is None else f"{entry.dice:.3f}"
        rows.append([str(entry.number), *map(str, counts), dice, bar])
    return table("What the gate did with the scans, and the Dice of the model trained on them",
                 ["round", "kept", "waiting", "dropped", "mean validation Dice", "share"], rows)  # fmt: skip


def _dice(path: str) -> list[float | None]:
    values = [entry.validation_dice for entry in load_state(path).rounds]
    return values


def _report(path: str) -> tuple[Counter, Counter, Counter]:
    content = read_json(path)
    reasons = Counter(
        re.sub(r"-?\d+(\.\d+)?", "N", str(reason))  # which limit it was, not by how much
        for case in content["cases"].values()
        for found in case["reasons"].values()
        for reason in found
    )
    decisions = {decision: int(content["decisions"][decision]) for decision in DECISIONS}
    return Counter(decisions), Counter({str(o): int(n) for o, n in content["organs"].items()}), reasons
