"""The pseudo-label filter, called gate: which predictions are trained on. Pure functions of evidence and settings.

An organ is accepted, or left out of this round. A case is kept with the organs that are accepted, or waits for the next
round, or is dropped for good when it has waited too often. To filter cases by cross-round disagreement is what the
winner of FLARE22 (team blackbean) did; everything else here is ours.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.rounds.evidence import Evidence, OrganPrior

KEEP, WAIT, DROP = "keep", "wait", "drop"
EMPTY: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class GateSettings:
    """The limits; all are ours and untuned.

    Attributes:
        is_open: Let everything through, every voxel: the loop without a gate.
        voxel_confidence: Voxels below this probability are ignored in training.
        adaptive: In rounds, lower for organs of which the models are usually less sure; False: the same for all.
        organ_confidence: An organ's mean probability must not be below it.
        max_disagreement: An organ's u with the round before must not be above it.
        min_agreement: The mean Dice of an ensemble's models must not be below it.
        volume_factor: An organ must not be smaller than the smallest annotated one by more than this factor, nor larger
            than the largest.
        position_margin: An organ's center must not be farther outside the annotated ones' range, as a share of the
            image's extent.
        worst_share: In rounds, `organ_confidence`, `max_disagreement` and `min_agreement` each refuse at most this
            share of an organ's predictions, the worst; 1: all that fail.
        min_organs: A scan of the pool is kept if at least this share of its organs is accepted; 0: one is enough.
        patience: A case that was not kept in so many rounds, one after the other, is dropped.
    """

    is_open: bool = False
    voxel_confidence: float = 0.7
    adaptive: bool = True
    organ_confidence: float = 0.8
    max_disagreement: float = 0.5
    min_agreement: float = 0.7
    volume_factor: float = 2.0
    position_margin: float = 0.15
    worst_share: float = 0.1
    min_organs: float = 0.0
    patience: int = 3

    @classmethod
    def from_pairs(cls, pairs: Sequence[str]) -> "GateSettings":
        """Reads settings from KEY=VALUE texts.

        Raises:
            UserError: If a key is unknown or a value has another type.
        """
        kinds = {field.name: type(field.default) for field in fields(cls)}
        values: dict[str, Any] = {}
        for pair in pairs:
            key, _, text = pair.partition("=")
            if key not in kinds:
                raise UserError(f"--gate {pair}: known are {', '.join(kinds)}, as KEY=VALUE")
            try:
                values[key] = {"true": True, "false": False}[text] if kinds[key] is bool else kinds[key](text)
                if values[key] != values[key]:
                    raise ValueError("not a number")
            except (ValueError, KeyError) as error:
                raise UserError(f"--gate {pair}: the value must be of type {kinds[key].__name__}") from error
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return asdict(self)


class Verdict(NamedTuple):
    """What becomes of one case."""

    decision: str  # keep, wait or drop
    organs: list[str]  # that are accepted
    reasons: dict[str, list[str]]  # organ -> why it is not accepted; "case" -> why the case is not kept


def organ_limits(cases: Collection[Mapping[str, Evidence]], settings: GateSettings) -> dict[str, GateSettings]:
    """Loosens the limits of each organ until each of three refuses no more than `worst_share` of its predictions.

    Args:
        cases: {organ: evidence} of each case of the round.
        settings: The limits for all organs.
    """
    found: dict[str, list[Evidence]] = {}
    for evidence in cases:
        for organ, entry in evidence.items():
            found.setdefault(organ, []).append(entry)
    return {
        organ: replace(
            settings,
            organ_confidence=_loosened(settings.organ_confidence, [e.confidence for e in entries], settings),
            min_agreement=_loosened(settings.min_agreement, [e.agreement for e in entries], settings),
            max_disagreement=-_loosened(
                -settings.max_disagreement, [None if e.disagreement is None else -e.disagreement for e in entries],
                settings,
            ),
        )
        for organ, entries in found.items()
    }  # fmt: skip


def _loosened(least: float, values: Sequence[float | None], settings: GateSettings) -> float:
    measured = sorted(value for value in values if value is not None)
    refused = int(settings.worst_share * len(measured))
    return min(least, measured[refused]) if refused < len(measured) else least


def objections(evidence: Evidence, prior: OrganPrior | None, settings: GateSettings) -> list[str]:
    """Says why an organ's prediction is not accepted, in words with the numbers; nothing if it is.

    Args:
        evidence: Of the prediction.
        prior: Of the organ; None if no case annotates it.
        settings: The limits.
    """
    found = []
    if evidence.confidence is not None and evidence.confidence < settings.organ_confidence:
        found.append(f"confidence {evidence.confidence:.2f} is below {settings.organ_confidence:g}")
    if evidence.agreement is not None and evidence.agreement < settings.min_agreement:
        found.append(f"the models agree by a Dice of {evidence.agreement:.2f} only, below {settings.min_agreement:g}")
    if evidence.disagreement is not None and evidence.disagreement > settings.max_disagreement:
        found.append(f"u with the round before is {evidence.disagreement:.2f}, above {settings.max_disagreement:g}")
    if prior is None or not prior.annotated:
        return [*found, "no annotated case shows what it looks like"]
    return found + implausible(evidence, prior, settings)


def implausible(evidence: Evidence, prior: OrganPrior, settings: GateSettings) -> list[str]:
    """Says what no annotated case shows: an absence, a size or a position."""
    if evidence.volume_ml == 0:
        is_always_there = len(prior.volumes_ml) == prior.annotated
        return [f"it is nowhere, but in all {prior.annotated} annotated cases"] if is_always_there else []
    if not prior.volumes_ml:
        return [f"it is in none of the {prior.annotated} annotated cases"]
    found = []
    least, most = min(prior.volumes_ml), max(prior.volumes_ml)
    if not least / settings.volume_factor <= evidence.volume_ml <= most * settings.volume_factor:
        found.append(f"volume {evidence.volume_ml:.3g} ml, annotated ones have {least:.3g} to {most:.3g} ml")
    for axis, share in enumerate(evidence.position):
        low, high = (pick(position[axis] for position in prior.positions) for pick in (min, max))
        if not low - settings.position_margin <= share <= high + settings.position_margin:
            found.append(f"its center is at {share:.0%} of axis {axis}, annotated ones are at {low:.0%} to {high:.0%}")
    return found


def filter_case(
    evidence: Mapping[str, Evidence],
    priors: Mapping[str, OrganPrior],
    settings: GateSettings,
    waited: int = 0,
    is_partly_annotated: bool = False,
    limits: Mapping[str, GateSettings] = EMPTY,
) -> Verdict:
    """Decides whether a case is kept, waits or is dropped, and which of its organs are accepted.

    Args:
        evidence: {organ: evidence} of the predicted organs; of a partly annotated case, of those that it lacks.
        priors: The `organ_priors` of the annotated training cases.
        settings: The limits.
        waited: In how many rounds before this one, one after the other, it was not kept.
        is_partly_annotated: One accepted organ is enough, and it is never dropped.
        limits: The `organ_limits`; for an organ that is not among them, `settings`.
    """
    if settings.is_open:
        return Verdict(KEEP, list(evidence), {})
    reasons = {
        organ: objections(entry, priors.get(organ), limits.get(organ, settings)) for organ, entry in evidence.items()
    }
    reasons = {organ: found for organ, found in reasons.items() if found}
    organs = [organ for organ in evidence if organ not in reasons]
    is_empty = not is_partly_annotated and not any(evidence[organ].volume_ml for organ in organs)
    if organs and not is_empty and (is_partly_annotated or len(organs) >= settings.min_organs * len(evidence)):
        return Verdict(KEEP, organs, reasons)
    what = f"only {len(organs)} of {len(evidence)} organs are accepted" if organs else "no organ is accepted"
    if is_empty and organs:
        what = "no organ that is accepted is there"
    return not_kept(what, settings, waited, is_partly_annotated, reasons)


def not_kept(
    why: str, settings: GateSettings, waited: int, is_partly_annotated: bool, reasons: Mapping[str, list[str]] = EMPTY
) -> Verdict:
    """Lets a case wait, or drops it when it has waited too often; also one that could not be predicted."""
    if waited + 1 >= settings.patience and not is_partly_annotated:
        return Verdict(DROP, [], {**reasons, "case": [why, f"and so it was in {waited} round(s) before"]})
    return Verdict(WAIT, [], {**reasons, "case": [why]})
