"""What a run has done, and what it would do."""

from nnunet_diffusion.rounds.gate import DROP, KEEP, WAIT
from nnunet_diffusion.rounds.loop import Rounds
from nnunet_diffusion.rounds.places import TRAINER
from nnunet_diffusion.rounds.prediction import has_prediction
from nnunet_diffusion.rounds.state import Round
from nnunet_diffusion.tables import figure, text_table


def status(run: Rounds, rounds: int) -> str:
    """Says what is done, a line for each round."""
    rows = [("round", "predicted", "kept", "waiting", "dropped", "trained", "validation Dice")]
    for number in range(rounds + 1):
        entry = run.state.rounds[number] if number < len(run.state.rounds) else Round(number)
        there = sum(has_prediction(run.places.predicted(number), case) for case in entry.cases or ())
        decided = [entry.decisions.get(kind, "-") for kind in (KEEP, WAIT, DROP)]
        predicted = "-" if entry.cases is None else f"{there}/{len(entry.cases)}"
        trained = "yes" if entry.checkpoints else "no"
        rows.append((number, predicted, *decided, trained, figure(entry.validation_dice)))
    return text_table({heading: cells for heading, *cells in zip(*rows, strict=True)}, has_footer=False)


def plan_of_work(run: Rounds, rounds: int) -> str:
    """Says what would be done, with the numbers of cases as they are now."""
    request, cases = run.places.request, run.cases
    trained = [entry.number for entry in run.state.rounds if entry.checkpoints]
    first = request.model or request.trainer
    work = [f"{first} on {len(cases.annotations)} annotated cases, less those validated on"]
    work += [f"predict {len(cases.pool)} scans of the pool, filter, train {TRAINER}"] * rounds
    lines = [f"round {number}: {what}{' (done)' if number in trained else ''}" for number, what in enumerate(work)]
    return "\n".join([*lines, f"then: {run.places.outcome()}"])
