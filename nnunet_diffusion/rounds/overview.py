"""What a run has done, and what it would do."""

import pandas as pd

from nnunet_diffusion.rounds.gate import DROP, KEEP, WAIT
from nnunet_diffusion.rounds.loop import Rounds
from nnunet_diffusion.rounds.places import TRAINER
from nnunet_diffusion.rounds.prediction import has_prediction
from nnunet_diffusion.rounds.state import Round


def status(run: Rounds, rounds: int) -> str:
    """What is done, a line for each round."""
    rows = []
    for number in range(rounds + 1):
        entry = run.state.rounds[number] if number < len(run.state.rounds) else Round(number)
        there = sum(has_prediction(run.places.predicted(number), case) for case in entry.cases or ())
        decided = [entry.decisions.get(kind, "-") for kind in (KEEP, WAIT, DROP)]
        dice = "-" if entry.validation_dice is None else f"{entry.validation_dice:.3f}"
        predicted = "-" if entry.cases is None else f"{there}/{len(entry.cases)}"
        rows.append([number, predicted, *decided, "yes" if entry.checkpoints else "no", dice])
    heading = ["round", "predicted", "kept", "waiting", "dropped", "trained", "validation Dice"]
    return pd.DataFrame(rows, columns=heading).to_string(index=False)


def plan_of_work(run: Rounds, rounds: int) -> str:
    """What would be done, with the numbers of cases as they are now."""
    request, cases = run.places.request, run.cases
    trained = [entry.number for entry in run.state.rounds if entry.checkpoints]
    first = request.model or request.trainer
    lines = [f"round 0: {first} on {len(cases.annotations)} annotated cases, less those validated on"]
    lines += [
        f"round {number}: predict {len(cases.pool)} scans of the pool, filter, train {TRAINER}"
        for number in range(1, rounds + 1)
    ]
    lines = [line + (" (done)" if number in trained else "") for number, line in enumerate(lines)]
    return "\n".join([*lines, f"then: {run.places.outcome()}"])
