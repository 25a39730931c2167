"""What a run has done so far: a typed record of each round, and pure functions of it.

`state.json` is written whole or not at all, a few times a round. What the filter decided about each case lies in a file
of the round, to which a line is added for each.
"""

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from nnunet_diffusion.commands import MadeFrom, StepRecord
from nnunet_diffusion.names import safe_name
from nnunet_diffusion.records import read_sealed, sha256, size_and_time, write_sealed
from nnunet_diffusion.rounds.gate import DROP, KEEP, Verdict

FORMAT = 2


@dataclass
class Round:
    """What is known of one round; round 0 is the first training."""

    number: int
    cases: list[str] | None = None  # that it predicts; None: that is not fixed yet
    dropped: list[str] = field(default_factory=list)  # in the rounds before
    verdicts: str = ""  # SHA-256 of the file of verdicts; empty: not filtered yet
    decisions: dict[str, int] = field(default_factory=dict)  # keep, wait, drop -> number of cases
    checkpoints: dict[str, str] = field(default_factory=dict)  # path -> SHA-256; empty: not trained yet
    denoiser: dict[str, str] = field(default_factory=dict)  # that the training started from, likewise
    validation_dice: float | None = None  # mean over the labels; None where nothing is held out


@dataclass
class State:
    """All that a run of rounds, or of mutual learning, must remember."""

    made_from: MadeFrom
    rounds: list[Round] = field(default_factory=list)
    steps: dict[str, StepRecord] = field(default_factory=dict)
    hashes: dict[str, list[str]] = field(default_factory=dict)  # path -> size and time, SHA-256

    def sha256(self, path: str) -> str:
        """Returns the SHA-256 of a checkpoint or denoiser, which is read again only if its size or time has changed."""
        stamp = size_and_time("", path, [""])
        if self.hashes.get(path, [""])[0] != stamp:
            self.hashes[path] = [stamp, sha256(path)]
        return self.hashes[path][1]

    def round(self, number: int) -> Round:
        """Returns the record of a round, a new one if need be."""
        self.rounds += [Round(n) for n in range(len(self.rounds), number + 1)]
        return self.rounds[number]

    def save(self, path: str) -> None:
        """Writes the state, whole or not at all."""
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write_sealed(path, asdict(self), FORMAT)


def load_state(path: str) -> State | None:
    """Loads the state of a run; None if it has not begun.

    Raises:
        UserError: If the file is cut, edited or of another version.
    """
    content = read_sealed(path, State, FORMAT, anew(path))
    if content is None:
        return None
    rounds = [Round(**entry) for entry in content["rounds"]]
    for case in {case for entry in rounds for case in entry.cases or ()}:
        safe_name(case, f"{path}: rounds", anew(path))
    return State(**{**content, "rounds": rounds})


def anew(path: str) -> str:
    """Says what a user can do about a run that cannot go on."""
    return f"remove the folder {os.path.dirname(path)} to start anew"


# ---------------------------------------------------------------- pure functions


def fallen(dices: Sequence[float | None], tolerance: float) -> int | None:
    """Finds the first round whose model is worse than the best one before.

    Args:
        dices: Validation Dice of each round's model; None where there is none.
        tolerance: By how much it may be below the best so far.

    Returns:
        Its number; None so far.
    """
    best = -math.inf
    for number, dice in enumerate(dices):
        if dice is not None:
            if dice < best - tolerance:
                return number
            best = max(best, dice)
    return None


def last_good(dices: Sequence[float | None], rounds: int, tolerance: float) -> int:
    """Finds the round whose model is the outcome.

    Args:
        dices: Validation Dice of the model of each round that was trained.
        rounds: How many were asked for.
        tolerance: As `fallen` has it.
    """
    last, first_bad = min(rounds, len(dices) - 1), fallen(dices, tolerance)
    return last if first_bad is None else min(last, first_bad - 1)


def cases_of_round(
    candidates: Collection[str], verdicts: Mapping[str, Verdict], dropped: Collection[str]
) -> tuple[list[str], list[str]]:
    """Fixes which cases a round predicts.

    Args:
        candidates: All cases that lack labels.
        verdicts: Of the round before.
        dropped: In the rounds before that one.

    Returns:
        The cases, and those dropped so far, sorted.
    """
    gone = {*dropped, *(case for case, verdict in verdicts.items() if verdict.decision == DROP)}
    return sorted(set(candidates) - gone), sorted(gone)


def waited(case: str, rounds_before: Sequence[Mapping[str, Verdict]]) -> int:
    """Counts in how many rounds, one after the other up to the last, a case was predicted and not kept."""
    count = 0
    for verdicts in reversed(rounds_before):
        if case not in verdicts or verdicts[case].decision == KEEP:
            break
        count += 1
    return count
