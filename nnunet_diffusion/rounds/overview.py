"""What a run has done, and what it would do."""

import json
from dataclasses import replace
from typing import Any

from nnunet_diffusion.progress import Progress, progress
from nnunet_diffusion.records import read_lines
from nnunet_diffusion.rounds.filtering import failed_predictions
from nnunet_diffusion.rounds.gate import DROP, KEEP, WAIT
from nnunet_diffusion.rounds.loop import Rounds
from nnunet_diffusion.rounds.state import Round
from nnunet_diffusion.tables import figure, text_table

HEADINGS = ("round", "predicted", "kept", "waiting", "dropped", "trained", "validation Dice")


def status(run: Rounds, rounds: int, as_json: bool = False) -> str:
    """Says what is done, a line for each round, and how far the one in work is; or all that for a program."""
    found = [round_status(run, number) for number in range(max(rounds + 1, len(run.state.rounds)))]
    if as_json:
        return json.dumps(found, indent=2)
    rows = []
    for entry in found:
        predicted = "-" if entry["cases"] is None else f"{entry['predicting']['done']}/{entry['cases']}"
        decided = [entry["decisions"].get(kind, "-") for kind in (KEEP, WAIT, DROP)]
        rows.append([entry["round"], predicted, *decided, "yes" if entry["trained"] else "no", figure(entry["dice"])])
    lines = [text_table(dict(zip(HEADINGS, zip(*rows, strict=True), strict=True)), has_footer=False)]
    for entry in found:
        if entry["cases"] is not None and not entry["decisions"]:
            lines += [Progress(**entry[stage]).told() for stage in ("predicting", "filtering")]
    return "\n".join(lines)


def round_status(run: Rounds, number: int) -> dict[str, Any]:
    """Looks at one round: how far its predictions and its filter are, what was decided, and how its model does."""
    entry = run.state.rounds[number] if number < len(run.state.rounds) else Round(number)
    found = {"round": number, "cases": None if entry.cases is None else len(entry.cases), "decisions": entry.decisions}
    found |= {"trained": bool(entry.checkpoints), "dice": entry.validation_dice}
    if entry.cases is not None:
        failed = failed_predictions(run.places, number)
        folder = run.places.predicted(number)
        predicting = progress(f"round {number}: predicting", entry.cases, folder, ".b2nd", failed)
        if entry.verdicts:  # then its predictions may be gone
            predicting = replace(predicting, done=len(entry.cases) - len(failed), left=0)
        decided = len({case for case, _ in read_lines(run.places.verdicts(number))[0][1:]} & set(entry.cases))
        filtering = Progress(f"round {number}: filtering", decided, {}, len(entry.cases) - decided, None, None)
        found |= {"predicting": predicting.as_dict(), "filtering": filtering.as_dict()}
    return found


def plan_of_work(run: Rounds, rounds: int) -> str:
    """Says what would be done, with the numbers of cases as they are now."""
    request, cases = run.places.request, run.cases
    trained = [entry.number for entry in run.state.rounds if entry.checkpoints]
    first = request.model or request.trainer
    work = [f"{first} on {len(cases.annotations)} annotated cases, less those validated on"]
    work += [f"predict {len(cases.pool)} scans of the pool, filter, train {request.round_trainer}"] * rounds
    lines = [f"round {number}: {what}{' (done)' if number in trained else ''}" for number, what in enumerate(work)]
    return "\n".join([*lines, f"then: {run.places.outcome()}"])
