"""Reads what there is of a data set's results; what cannot be read is a problem that the report names.

Nothing is unpickled: of nnU-Net's output its logs and JSON files are read, of ours denoiser.pth with `weights_only`.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nnunet_diffusion.files import read_json
from nnunet_diffusion.preprocessing.cases import read_splits

MODEL = re.compile(r"(?P<trainer>.+)__(?P<plans>.+)__(?P<configuration>.+)")
FOLD = re.compile(r"fold_(\d+|all)")
CASE_SCORES = dict[str, dict[str, float]]  # case -> organ -> value; what is not defined is not there


@dataclass
class Scores:
    """What a set of predictions scored."""

    source: str  # by which rules, of which cases
    measures: dict[str, CASE_SCORES] = field(default_factory=dict)  # "DSC", "NSD" -> scores


@dataclass
class Fold:
    """One training."""

    name: str
    folder: str
    is_finished: bool = False
    curves: dict[str, dict[int, float]] = field(default_factory=dict)  # train_loss, val_loss, pseudo_dice -> epoch
    transfer: dict[str, Any] | None = None
    validation: CASE_SCORES = field(default_factory=dict)
    evaluations: dict[str, dict] = field(default_factory=dict)  # rules -> content of evaluation_RULES.json
    denoiser: dict[str, Any] | None = None  # process, plan and training of denoiser.pth
    samples: dict[str, Any] = field(default_factory=dict)  # picture, description, qualities


@dataclass
class Model:
    """The trainings of one trainer, plan and configuration."""

    trainer: str
    plans: str
    configuration: str
    folder: str
    folds: list[Fold] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As a heading."""
        return f"{self.trainer}, {self.plans}, {self.configuration}"


@dataclass
class Results:
    """All that was found."""

    dataset: str
    dataset_json: dict[str, Any]
    models: list[Model] = field(default_factory=list)
    splits: list[dict[str, list[str]]] = field(default_factory=list)
    benchmarks: dict[str, dict] = field(default_factory=dict)  # label_efficiency or partial_labels folder -> content
    evaluations: dict[str, dict] = field(default_factory=dict)  # file -> content
    problems: list[str] = field(default_factory=list)

    def attempt(self, path: str, read: Callable[[str], Any]) -> Any:
        """What `read` makes of a file; None if there is none, or, which is noted, if it cannot be read."""
        if not os.path.isfile(path):
            return None
        try:
            return read(path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            said = f"{type(error).__name__}: {error}".replace(f"{path}: ", "").splitlines()[0][:200]
            self.problems.append(f"{path}: cannot be read, it is not whole or of another version ({said}): left out")
            return None


def collect(dataset: str, raw: str, preprocessed: str, results: str, evaluations: list[str]) -> Results:
    """Reads everything.

    Args:
        dataset: DatasetXXX_Name.
        raw: The data set's folder in nnUNet_raw; the others likewise. None of them needs to be there.
        preprocessed: In nnUNet_preprocessed.
        results: In nnUNet_results.
        evaluations: More files of `nnunet_diffusion evaluate`.
    """
    found = Results(dataset, {})
    for folder in (raw, preprocessed):
        found.dataset_json = found.dataset_json or found.attempt(os.path.join(folder, "dataset.json"), _dataset) or {}
    found.splits = found.attempt(os.path.join(preprocessed, "splits_final.json"), read_splits) or []
    for name in sorted(os.listdir(results)) if os.path.isdir(results) else ():
        folder, match = os.path.join(results, name), MODEL.fullmatch(name)
        for benchmark in ("label_efficiency", "partial_labels"):
            if content := found.attempt(os.path.join(folder, benchmark + ".json"), _benchmark):
                found.benchmarks[name] = content
        is_model = match and match["trainer"] not in ("rounds", "mutual")
        if is_model and (model := _model(found, folder, match)).folds:
            found.models.append(model)
    for path in evaluations:
        if content := found.attempt(path, _evaluation):
            found.evaluations[path] = content
        elif not os.path.isfile(path):
            found.problems.append(f"{path}: there is no such file: left out")
    return found


def _model(found: Results, folder: str, match: re.Match) -> Model:
    model = Model(*match.groups(), folder)
    if not found.dataset_json:
        found.dataset_json = found.attempt(os.path.join(folder, "dataset.json"), _dataset) or {}
    plans = found.attempt(os.path.join(folder, "plans.json"), read_json) or {}
    block = plans.get("nnunet_diffusion", {})
    model.settings = dict(block.get(model.trainer, {})) if isinstance(block, Mapping) else {}
    for name in sorted(os.listdir(folder)):
        if (fold := FOLD.fullmatch(name)) and os.path.isdir(os.path.join(folder, name)):
            model.folds.append(_fold(found, os.path.join(folder, name), fold[1]))
    return model


def _fold(found: Results, folder: str, name: str) -> Fold:
    def at(*parts: str) -> str:
        return os.path.join(folder, *parts)

    files = sorted(os.listdir(folder))
    fold = Fold(name, folder, bool({"checkpoint_final.pth", "denoiser.pth"} & set(files)))
    for log in (file for file in files if re.fullmatch(r"training_log_.*\.txt", file)):
        _merge(fold.curves, found.attempt(at(log), read_log) or {})
    fold.transfer = found.attempt(at("transfer_report.json"), _transfer)
    organs = organ_keys(found.dataset_json)
    ending = found.dataset_json.get("file_ending", "")
    fold.validation = found.attempt(at("validation", "summary.json"), lambda p: _summary(p, organs, ending)) or {}
    for rules in ("flare22", "nnunet"):
        if content := found.attempt(at("validation", f"evaluation_{rules}.json"), _evaluation):
            fold.evaluations[rules] = content
    fold.denoiser = found.attempt(at("denoiser.pth"), _denoiser)
    if fold.denoiser is not None:
        fold.samples = _samples(found, folder)
    return fold


def _samples(found: Results, folder: str) -> dict[str, Any]:
    pictures = [os.path.join(folder, "samples", "samples.png"), os.path.join(folder, "samples.png")]
    qualities = [os.path.join(folder, "samples", f"quality_{name}.json") for name in ("encoder", "inception")]
    return {
        "picture": next(filter(os.path.isfile, pictures), None),
        "qualities": [content for path in qualities if (content := found.attempt(path, _quality))],
    }


def read_log(path: str) -> dict[str, dict[int, float]]:
    """Curves of one of nnU-Net's training logs: epoch -> train_loss, val_loss, pseudo_dice (mean over the labels)."""
    patterns = {
        "train_loss": re.compile(r"\btrain_loss (\S+?),?\s"),
        "val_loss": re.compile(r"\b(?:val_loss|held-out loss) (\S+?),?\s"),
        "pseudo_dice": re.compile(r"\bPseudo dice \[(.*)\]"),
    }
    curves: dict[str, dict[int, float]] = {name: {} for name in patterns}
    epoch = None
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            if start := re.search(r": Epoch (\d+)\s*$", line):
                epoch = int(start[1])
            for name, pattern in patterns.items():
                if epoch is not None and (match := pattern.search(line)):
                    numbers = [float(n) for n in re.findall(r"(?<![\w.])-?\d+\.?\d*(?:e[-+]?\d+)?(?![\w.])", match[1])]
                    if numbers:
                        curves[name][epoch] = sum(numbers) / len(numbers)
    return curves


def _merge(curves: dict[str, dict[int, float]], later: dict[str, dict[int, float]]) -> None:
    """Adds a later log; one that starts at epoch 0 is another training, which replaced what was before."""
    starts = [min(values) for values in later.values() if values]
    if starts and min(starts) == 0:
        curves.clear()
    for name, values in later.items():
        curves.setdefault(name, {}).update(values)


def organ_keys(dataset_json: Mapping) -> dict[str, str]:
    """Key in nnU-Net's summary.json, "1" or "(1, 2)" -> name of the label or region."""
    labels = dataset_json.get("labels", {})
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in labels.items()}
    return {str(value): name for name, value in values.items() if value != 0 and name != "ignore"}


def _summary(path: str, organs: Mapping[str, str], ending: str) -> CASE_SCORES:
    scores = {}
    for entry in read_json(path)["metric_per_case"]:
        case = os.path.basename(entry["prediction_file"]).removesuffix(ending)
        dice = {organs.get(key, key): figures["Dice"] for key, figures in entry["metrics"].items() if "Dice" in figures}
        scores[case] = {name: value for name, value in dice.items() if value is not None and math.isfinite(value)}
    return scores


def evaluation_scores(content: Mapping) -> Scores:
    """Scores of a file of `nnunet_diffusion evaluate`."""
    scores = Scores(f"By the rules {content['rules']['name']}: {content['rules']['description']}")
    for measure, key in (("DSC", "dsc"), ("NSD", "nsd")):
        scores.measures[measure] = {
            case: {organ: float(value[key]) for organ, value in organs.items() if value[key] is not None}
            for case, organs in content["cases"].items()
        }
    return scores


def model_scores(model: Model) -> Scores:
    """Validation scores of all folds: by the rules that most cases were evaluated by, else nnU-Net's own Dice."""
    folds = [fold for fold in model.folds if fold.validation or fold.evaluations]
    validation = {case: dice for fold in folds for case, dice in fold.validation.items()}
    best = Scores("nnU-Net's validation, Dice only; nnunet_diffusion evaluate adds NSD", {"DSC": validation})
    for rules in ("nnunet", "flare22"):
        parts = [evaluation_scores(fold.evaluations[rules]) for fold in folds if rules in fold.evaluations]
        merged = {m: {c: s for part in parts for c, s in part.measures[m].items()} for m in ("DSC", "NSD")}
        if parts and len(merged["DSC"]) >= len(best.measures["DSC"]):
            best = Scores(parts[0].source, merged)
    return best


def _dataset(path: str) -> dict:
    content = read_json(path)
    names = [*content["labels"], *content["channel_names"].values()]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("names that are no text")
    return content


def _transfer(path: str) -> dict[str, Any]:
    content = read_json(path)
    lists = {key: [str(e) for e in content[key]] for key in ("matched", "adapted", "missing", "unexpected", "warnings")}
    return {**lists, "source": str(content["source"]), "timestep": int(content["timestep"])}


def _benchmark(path: str) -> dict:
    content = read_json(path)
    for group in content["summary"]:
        str(group["arm"]), str(group["budget"]), float(group["mean"]), float(group["sd"] or 0)
    for run in content["runs"]:
        str(run["arm"]), str(run["budget"]), float(run["dice"]), run["dice_per_organ"].items()
    content["summary"][0], len(content["test_cases"])
    return content


def _evaluation(path: str) -> dict:
    content = read_json(path)
    evaluation_scores(content)
    return content


def _quality(path: str) -> dict:
    content = read_json(path)
    values = {name: float(content["values"][name]) for name in ("FID", "sFID", "precision", "recall", "F1")}
    numbers = {key: int(content[key]) for key in ("samples", "real", "k")}
    warnings = [str(warning) for warning in content["warnings"]]
    return {**numbers, "values": values, "features": str(content["features"]), "warnings": warnings}


def _denoiser(path: str) -> dict[str, Any]:
    from nnunet_diffusion.pretraining.denoiser_file import load_denoiser

    content = load_denoiser(path)
    training, process = content["training"], content["process"]
    return {"timestep": int(content["timestep"]), "process": dict(process), "training": dict(training)}
