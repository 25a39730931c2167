"""The filter of one round: which predictions are kept as pseudo labels; killed, it goes on with the next case."""

import os
from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from nnunet_diffusion.partial.annotations import Annotation
from nnunet_diffusion.records import Journal, made_from, read_journal
from nnunet_diffusion.rounds.cases import Cases
from nnunet_diffusion.rounds.constrained import NOTHING_ANNOTATED, ignore_uncertain, keep_labels
from nnunet_diffusion.rounds.gate import KEEP, Verdict, filter_case
from nnunet_diffusion.rounds.places import Places
from nnunet_diffusion.rounds.prediction import load_prediction, read_evidence
from nnunet_diffusion.rounds.pseudo_labels import ignoring, pseudo_cases, remove_pseudo_labels, save_pseudo_label
from nnunet_diffusion.rounds.report import draw, to_draw, write_report
from nnunet_diffusion.rounds.state import Round, anew, waited


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
    gate, number, folder = places.request.gate, entry.number, places.round(entry.number)
    lacking, priors = cases.to_predict(), cases.organ_priors()
    annotations = {name: lacking[name] for name in entry.cases if name in lacking}  # others were annotated meanwhile
    found = {name: read_evidence(places.predicted(number), name) for name in annotations}
    evidence = {
        name: {organ: found[name][0][organ] for organ in cases.lacking(annotation or NOTHING_ANNOTATED)}
        for name, annotation in annotations.items()
    }
    teachers = sorted({teacher for _, teacher in found.values()})
    origin = made_from({"teachers": teachers, "gate": gate.as_dict(), "priors": priors})
    journal = Journal(places.verdicts(number), origin)
    there = set(pseudo_cases(folder))
    done = {name for name, (decision, *_) in journal.entries.items() if decision != KEEP or name in there}
    for name in tqdm([name for name in annotations if name not in done], f"round {number}: filtering"):
        annotation = annotations[name]
        verdict = filter_case(evidence[name], priors, gate, waited(name, before), annotation is not None)
        if verdict.decision == KEEP:
            save(places, cases, number, name, annotation, set(verdict.organs))
        journal.add(name, verdict)
    verdicts = {name: Verdict(*journal.entries[name]) for name in annotations}
    kept = {name for name, verdict in verdicts.items() if verdict.decision == KEEP}
    remove_pseudo_labels(folder, sorted(set(pseudo_cases(folder)) - kept))
    report = os.path.join(places.reports, f"round_{number}")
    entry.decisions = write_report(report, f"{places.name}, round {number}", verdicts, evidence)
    chosen = to_draw(verdicts, evidence)
    draw(report, {name: cases.case(name) for name in chosen}, chosen, places.predicted(number), cases.plans,
         cases.dataset_json["labels"])  # fmt: skip
    entry.verdicts = journal.seal()


def save(places: Places, cases: Cases, number: int, name: str, annotation: Annotation | None, organs: set[str]) -> None:
    """Saves the pseudo label of a case that is kept: the organs that are accepted, and what was annotated."""
    gate, manager = places.request.gate, ignoring(cases.label_manager)
    prediction = load_prediction(places.predicted(number), name)
    labels = torch.from_numpy(prediction.labels)
    if not gate.is_open:
        confidence = torch.from_numpy(prediction.confidence)
        labels = ignore_uncertain(labels, confidence, gate.voxel_confidence, manager.ignore_label)
    known = annotation or NOTHING_ANNOTATED
    labels, says = keep_labels(labels, organs, known, cases.channels)
    patch_size, info = cases.configuration.patch_size, {"teacher": prediction.teacher}
    save_pseudo_label(places.round(number), name, labels.numpy(), says, manager, patch_size, annotation, info)
