"""The filter of one round: which predictions are kept as pseudo labels; killed, it goes on with the next case."""

import os
from collections.abc import Collection, Mapping, Sequence
from functools import partial

import torch

from nnunet_diffusion.mean_teacher.pseudo_labels import ClassThresholds
from nnunet_diffusion.partial.annotations import Annotation, Channels
from nnunet_diffusion.records import Journal, made_from, read_journal, read_lines
from nnunet_diffusion.rounds.cases import Cases
from nnunet_diffusion.rounds.constrained import NOTHING_ANNOTATED, ignore_uncertain, keep_labels
from nnunet_diffusion.rounds.evidence import Evidence, OrganPrior
from nnunet_diffusion.rounds.gate import KEEP, GateSettings, Verdict, filter_case, not_kept, organ_limits
from nnunet_diffusion.rounds.places import Places
from nnunet_diffusion.rounds.prediction import has_prediction, load_confidence, load_prediction, read_evidence
from nnunet_diffusion.rounds.pseudo_labels import ignoring, pseudo_cases, remove_pseudo_labels, save_pseudo_label
from nnunet_diffusion.rounds.report import draw, to_draw, write_report
from nnunet_diffusion.rounds.state import Round, anew, waited
from nnunet_diffusion.workers import work_on


def read_verdicts(places: Places, entry: Round) -> dict[str, Verdict]:
    """Reads what the filter decided in a round; nothing if it has not yet.

    Raises:
        UserError: If the file is not what the filter wrote.
    """
    if not entry.verdicts:
        return {}
    found = read_journal(places.verdicts(entry.number), entry.verdicts, Verdict, anew(places.state))
    return {case: Verdict(*verdict) for case, verdict in found.items()}


def filter_round(places: Places, cases: Cases, entry: Round, before: Sequence[Mapping[str, Verdict]]) -> None:
    """Filters the predictions of a round, saves the pseudo labels, reports, and records all in `entry`.

    Args:
        places: Of the run.
        cases: Of the run.
        entry: Of the round.
        before: The verdicts of the rounds before, in their order.

    Raises:
        UserError: If a prediction is missing or damaged.
        OSError: If something cannot be written.
    """
    number, workers = entry.number, places.request.workers
    lacking, priors = cases.to_predict(), cases.organ_priors(workers)
    annotations = {name: lacking[name] for name in entry.cases if name in lacking}  # others were annotated meanwhile
    failed = failed_predictions(places, number)
    evidence, teachers = predicted_evidence(places, cases, number, annotations.keys() - failed.keys())
    gate = places.request.gate
    limits = organ_limits(evidence.values(), gate)
    least = voxel_thresholds(evidence.values(), cases.channels, gate)
    origin = made_from({
        "teachers": teachers, "gate": gate.as_dict(), "priors": priors, "voxels": least.tolist(),
        "limits": {organ: limit.as_dict() for organ, limit in limits.items()},
    })  # fmt: skip
    journal, there = Journal(places.verdicts(number), origin), set(pseudo_cases(places.round(number)))
    done = {name for name, (decision, *_) in journal.entries.items() if decision != KEEP or name in there}
    tasks = {
        name: (name, evidence.get(name, {}), waited(name, before), failed.get(name))
        for name in annotations
        if name not in done
    }
    work = partial(decide, places, cases, number, priors, limits, least)
    for name, verdict in work_on(work, tasks, workers, f"round {number}: filtering"):
        journal.add(name, verdict)
    verdicts = {name: Verdict(*journal.entries[name]) for name in annotations}
    kept = {name for name, verdict in verdicts.items() if verdict.decision == KEEP}
    remove_pseudo_labels(places.round(number), sorted(set(pseudo_cases(places.round(number))) - kept))
    entry.decisions = report(places, cases, number, verdicts, evidence)
    entry.verdicts = journal.seal()


def failed_predictions(places: Places, number: int) -> dict[str, str]:
    """Reads which cases of a round could not be predicted, and why."""
    lines = read_lines(places.failed(number))[0][1:]
    return {name: why for name, why in lines if not has_prediction(places.predicted(number), name)}


def predicted_evidence(
    places: Places, cases: Cases, number: int, names: Collection[str]
) -> tuple[dict[str, dict[str, Evidence]], list[str]]:
    """Reads the evidence for the organs that each case lacks, and which teachers predicted them."""
    found = {name: read_evidence(places.predicted(number), name) for name in sorted(names)}
    lacking = {name: cases.lacking(cases.annotations.get(name, NOTHING_ANNOTATED)) for name in found}
    evidence = {name: {organ: found[name][0][organ] for organ in organs} for name, organs in lacking.items()}
    return evidence, sorted({teacher for _, teacher in found.values()})


def decide(
    places: Places,
    cases: Cases,
    number: int,
    priors: Mapping[str, OrganPrior],
    limits: Mapping[str, GateSettings],
    least: torch.Tensor,
    name: str,
    evidence: Mapping[str, Evidence],
    rounds_waited: int,
    failed: str | None,
) -> Verdict:
    """Decides about one case, in a worker, and saves its pseudo label if it is kept."""
    gate, annotation = places.request.gate, cases.annotations.get(name)
    if failed is not None:
        return not_kept(f"it was not predicted: {failed}", gate, rounds_waited, annotation is not None)
    verdict = filter_case(evidence, priors, gate, rounds_waited, annotation is not None, limits)
    if verdict.decision == KEEP:
        save(places, cases, number, name, annotation, set(verdict.organs), least)
    return verdict


def report(
    places: Places,
    cases: Cases,
    number: int,
    verdicts: Mapping[str, Verdict],
    evidence: Mapping[str, Mapping[str, Evidence]],
) -> dict[str, int]:
    """Writes what was decided, and draws the best and the worst; returns how many are kept, wait and are dropped."""
    folder = os.path.join(places.reports, f"round_{number}")
    decisions = write_report(folder, f"{places.name}, round {number}", verdicts, evidence)
    chosen = to_draw({name: verdicts[name] for name in evidence}, evidence)
    draw(folder, {name: cases.case(name) for name in chosen}, chosen, places.predicted(number), cases.plans,
         cases.dataset_json["labels"])  # fmt: skip
    return decisions


def voxel_thresholds(
    cases: Collection[Mapping[str, Evidence]], channels: Channels, settings: GateSettings
) -> torch.Tensor:
    """Returns the probability that a voxel must have, by its label value: lower for organs that are usually less sure.

    As the mean teacher has it; how sure the models usually are of an organ is the mean over cases, of the background 1.
    Regions have one threshold.

    Args:
        cases: {organ: evidence} of each case of the round.
        channels: The `output_channels`.
        settings: The limits.
    """
    values = max(max(channel) for channel in channels.values()) + 1
    has_regions = any(len(channel) > 1 for channel in channels.values())
    thresholds = ClassThresholds(values, settings.voxel_confidence, is_adaptive=settings.adaptive and not has_regions)
    for name, channel in channels.items():
        found = [case[name].confidence for case in cases if name in case and case[name].confidence is not None]
        if found:
            thresholds.usual[list(channel)] = sum(found) / len(found)
    return thresholds.thresholds()


def save(
    places: Places, cases: Cases, number: int, name: str, annotation: Annotation | None, organs: set[str],
    least: torch.Tensor,
) -> None:  # fmt: skip
    """Saves the pseudo label of a case that is kept: the organs that are accepted, and what was annotated."""
    gate, manager = places.request.gate, ignoring(cases.label_manager)
    prediction = load_prediction(places.predicted(number), name)
    labels = torch.from_numpy(prediction.labels)
    if not gate.is_open:
        confidence = torch.from_numpy(load_confidence(places.predicted(number), name))
        labels = ignore_uncertain(
            labels, confidence, least[labels.long().clamp(0, len(least) - 1)], manager.ignore_label
        )
    known = annotation or NOTHING_ANNOTATED
    labels, says = keep_labels(labels, organs, known, cases.channels)
    patch_size, info = cases.configuration.patch_size, {"teacher": prediction.teacher}
    save_pseudo_label(places.round(number), name, labels.numpy(), says, manager, patch_size, annotation, info)
