"""Reads what there is of a data set's results; what cannot be read is a problem that the report names.

Nothing is unpickled: of nnU-Net's output its logs and JSON files are read, of ours denoiser.pth with `weights_only`.
"""

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import read_json
from nnunet_diffusion.preprocessing.cases import read_splits
from nnunet_diffusion.report import schemas
from nnunet_diffusion.report.slices import Picture, read_picture
from nnunet_diffusion.schemas import Dataset
from nnunet_diffusion.settings import SettingsOf, given_settings
from nnunet_diffusion.tables import Scores

MODEL = re.compile(r"(?P<trainer>.+)__(?P<plans>.+)__(?P<configuration>.+)", re.DOTALL)
FOLD = re.compile(r"fold_([0-9]+|all)")
NO_MODELS = ("rounds", "mutual")  # folders of these commands, named like a trainer's
MEASURES = {"DSC": "dsc", "NSD": "nsd"}
# File -> its schema, and what the user can do if it cannot be read.
FILES = {
    "dataset.json": (Dataset, "correct it"),
    "plans.json": (schemas.ModelPlans, "copy it from nnUNet_preprocessed"),
    "transfer_report.json": (schemas.Transfer, "train the fold again to have it"),
    "summary.json": (schemas.Summary, "make it anew with nnUNetv2_train ... --val"),
    "evaluation": (schemas.EvaluationFile, "make it anew with nnunet_diffusion evaluate"),
    "quality": (schemas.Quality, "make it anew with nnunet_diffusion evaluate_samples"),
    "benchmark": (schemas.Benchmark, "run the benchmark again"),
    "report.json": (schemas.RoundReport, "run nnunet_diffusion rounds again to have it"),
}


@dataclass
class Evaluated:
    """Scores of a set of predictions."""

    source: str  # by which rules, of which cases
    measures: dict[str, Scores] = field(default_factory=dict)  # "DSC", "NSD" -> scores; undefined ones are not there


@dataclass
class Fold:
    """One training."""

    name: str
    folder: str
    is_finished: bool = False
    curves: dict[str, dict[int, float]] = field(default_factory=dict)  # train_loss, val_loss, pseudo_dice -> epoch
    transfer: dict[str, Any] | None = None
    validation: Scores = field(default_factory=dict)
    evaluations: dict[str, Evaluated] = field(default_factory=dict)  # by the name of the rules
    denoiser: dict[str, Any] | None = None  # what its denoiser.pth says of its training
    qualities: list[dict[str, Any]] = field(default_factory=list)  # figures of its samples


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
        """Writes the name as a heading."""
        return f"{self.trainer}, {self.plans}, {self.configuration}"


@dataclass
class Results:
    """All that was found."""

    dataset: str
    dataset_json: dict[str, Any]
    models: list[Model] = field(default_factory=list)
    splits: list[dict[str, list[str]]] = field(default_factory=list)
    benchmarks: dict[str, dict] = field(default_factory=dict)  # label_efficiency or partial_labels folder -> content
    evaluations: dict[str, Evaluated] = field(default_factory=dict)  # by file
    problems: list[str] = field(default_factory=list)

    @property
    def organs(self) -> list[str]:
        """Lists the labels or regions but background and the ignore label."""
        return [name for name, value in self.dataset_json["labels"].items() if value != 0 and name != "ignore"]

    def attempt(self, path: str, read: Callable[[str], Any]) -> Any:
        """Returns what `read` makes of a file or folder; None if there is none or, which is noted, it cannot be read.

        Whatever a file holds must not cost the rest of the page: every error of `read` is a problem of this file.
        """
        try:
            return read(path)
        except FileNotFoundError:
            if not os.path.islink(path):
                return None
            problem = f"{path}: is a link to nothing"
        except UserError as error:
            problem = str(error) if path in str(error) else f"{path}: {error}"
        except OSError as error:
            problem = f"{path}: cannot be read ({error.strerror or error})"
        except Exception as error:
            problem = f"{path}: cannot be read ({type(error).__name__}: {error})"
        self.note(f"{' '.join(problem.split())[:500]}: left out")
        return None

    def note(self, problem: str) -> None:
        """Adds a problem; names of files that are not UTF-8 are written so that they can be printed."""
        self.problems.append(problem.encode("utf-8", "backslashreplace").decode())

    def json(self, path: str, kind: str = "") -> Any:
        """Returns the content of a JSON file of a `kind` of FILES, by default its name's, by `attempt`."""
        schema, remedy = FILES[kind or os.path.basename(path)]
        return self.attempt(path, partial(read_json, schema=schema, remedy=remedy))

    def picture(self, path: str, alt: str) -> Picture | None:
        """Returns a picture of the results, by `attempt`."""
        return self.attempt(path, partial(read_picture, alt=alt))

    def entries(self, folder: str) -> list[str]:
        """Returns the names in a folder, sorted, by `attempt`."""
        return sorted(self.attempt(folder, os.listdir) or ())


def collect(
    dataset: str,
    raw: str,
    preprocessed: str,
    results: str,
    evaluations: list[str],
    settings_of: SettingsOf = given_settings,
) -> Results:
    """Reads everything.

    Args:
        dataset: DatasetXXX_Name.
        raw: The data set's folder in nnUNet_raw; the others likewise. None of them needs to be there.
        preprocessed: In nnUNet_preprocessed.
        results: In nnUNet_results.
        evaluations: More files of `nnunet_diffusion evaluate`.
        settings_of: Says what settings a model's plans give its trainer.
    """
    found = Results(dataset, {})
    names = found.entries(results)
    models = [match for name in names if (match := MODEL.fullmatch(name)) and match["trainer"] not in NO_MODELS]
    for folder in (raw, preprocessed, *(os.path.join(results, match[0]) for match in models)):
        found.dataset_json = found.dataset_json or found.json(os.path.join(folder, "dataset.json")) or {}
    found.splits = found.attempt(os.path.join(preprocessed, "splits_final.json"), read_splits) or []
    for name in filter(lambda name: os.path.isdir(os.path.join(results, name)), names):
        for benchmark in ("label_efficiency", "partial_labels"):
            if content := found.json(os.path.join(results, name, benchmark + ".json"), "benchmark"):
                found.benchmarks[name] = content
    candidates = (_model(found, os.path.join(results, match[0]), match, settings_of) for match in models)
    found.models = [model for model in candidates if model.folds]
    for path in evaluations:
        if evaluated := _evaluated(found, path):
            found.evaluations[path] = evaluated
        elif not os.path.lexists(path):
            found.note(f"{path}: there is no such file: left out")
    return found


def _model(found: Results, folder: str, match: re.Match, settings_of: SettingsOf) -> Model:
    model = Model(*match.groups(), folder)
    names, plans = found.entries(folder), found.json(os.path.join(folder, "plans.json")) or {}
    model.settings = settings_of(plans, model.trainer)
    for fold in filter(None, map(FOLD.fullmatch, names)):
        if (files := found.attempt(os.path.join(folder, fold[0]), os.listdir)) is not None:
            model.folds.append(_fold(found, os.path.join(folder, fold[0]), fold[1], sorted(files)))
    return model


def _fold(found: Results, folder: str, name: str, files: list[str]) -> Fold:
    def at(*parts: str) -> str:
        return os.path.join(folder, *parts)

    fold = Fold(name, folder, bool({"checkpoint_final.pth", "denoiser.pth"} & set(files)))
    for log in (file for file in files if re.fullmatch(r"training_log_.*\.txt", file)):
        _merge(fold.curves, found.attempt(at(log), read_log) or {})
    fold.transfer = found.json(at("transfer_report.json"))
    if summary := found.json(at("validation", "summary.json")):
        fold.validation = _dice(summary, found.dataset_json)
    for rules in ("flare22", "nnunet"):
        if evaluated := _evaluated(found, at("validation", f"evaluation_{rules}.json")):
            fold.evaluations[rules] = evaluated
    fold.denoiser = found.attempt(at("denoiser.pth"), _denoiser)
    qualities = (found.json(at("samples", f"quality_{name}.json"), "quality") for name in ("encoder", "inception"))
    fold.qualities = [content for content in qualities if content]
    return fold


def read_log(path: str) -> dict[str, dict[int, float]]:
    """Reads the curves of one of nnU-Net's logs: epoch -> train_loss, val_loss, pseudo_dice (mean over the labels)."""
    patterns = {
        "train_loss": re.compile(r"\btrain_loss (\S+?),?\s"),
        "val_loss": re.compile(r"\b(?:val_loss|held-out loss) (\S+?),?\s"),
        "pseudo_dice": re.compile(r"\bPseudo dice \[(.*)\]"),
    }
    curves: dict[str, dict[int, float]] = {name: {} for name in patterns}
    epoch = None
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            if start := re.search(r": Epoch ([0-9]{1,9})\s*$", line):
                epoch = int(start[1])
            for name, pattern in patterns.items():
                if epoch is not None and (match := pattern.search(line)):
                    numbers = [float(n) for n in re.findall(r"(?<![\w.])-?\d+\.?\d*(?:e[-+]?\d+)?(?![\w.])", match[1])]
                    if numbers and math.isfinite(sum(numbers)):
                        curves[name][epoch] = sum(numbers) / len(numbers)
    return curves


def _merge(curves: dict[str, dict[int, float]], later: dict[str, dict[int, float]]) -> None:
    """Adds a later log; one that starts at epoch 0 is another training, which replaced what was before."""
    starts = [min(values) for values in later.values() if values]
    if starts and min(starts) == 0:
        curves.clear()
    for name, values in later.items():
        curves.setdefault(name, {}).update(values)


def _dice(summary: Mapping, dataset_json: Mapping) -> Scores:
    """Returns the Dice of nnU-Net's summary.json, whose keys are values: "1" of a label, "(1, 2)" of a region."""
    labels, ending = dataset_json.get("labels", {}), dataset_json.get("file_ending", "")
    organs = {str(tuple(v) if isinstance(v, list) else v): name for name, v in labels.items()}
    return {
        os.path.basename(entry["prediction_file"]).removesuffix(ending): {
            organs.get(key, key): figures["Dice"]
            for key, figures in entry["metrics"].items()
            if figures.get("Dice") is not None and not math.isnan(figures["Dice"])
        }
        for entry in summary["metric_per_case"]
    }


def _evaluated(found: Results, path: str) -> Evaluated | None:
    content = found.json(path, "evaluation")
    return evaluated_scores(content) if content else None


def evaluated_scores(content: Mapping) -> Evaluated:
    """Returns the scores of a file of `nnunet_diffusion evaluate`."""
    measures = {
        measure: {
            case: {organ: value[key] for organ, value in organs.items() if value[key] is not None}
            for case, organs in content["cases"].items()
        }
        for measure, key in MEASURES.items()
    }
    return Evaluated(f"By the rules {content['rules']['name']}: {content['rules']['description']}", measures)


def model_scores(model: Model) -> Evaluated:
    """Returns the validation scores of all folds: by the rules that most cases were evaluated by, else nnU-Net's."""
    validation = {case: dice for fold in model.folds for case, dice in fold.validation.items()}
    best = Evaluated("nnU-Net's validation, Dice only; nnunet_diffusion evaluate adds NSD", {"DSC": validation})
    for rules in ("nnunet", "flare22"):
        parts = [fold.evaluations[rules] for fold in model.folds if rules in fold.evaluations]
        merged = {m: {c: s for part in parts for c, s in part.measures[m].items()} for m in MEASURES}
        if parts and len(merged["DSC"]) >= len(best.measures["DSC"]):
            best = Evaluated(parts[0].source, merged)
    return best


def _denoiser(path: str) -> dict[str, Any]:
    from nnunet_diffusion.pretraining.denoiser_file import load_denoiser

    return dict(load_denoiser(path)["training"])
