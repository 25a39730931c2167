"""Sections of the report about the data and the trainings."""

import base64
import io
import os
from collections.abc import Mapping

from nnunet_diffusion.report.charts import line_chart, share_bar
from nnunet_diffusion.report.collect import Fold, Model, Results
from nnunet_diffusion.report.html import Html, element, join, table

WIDEST = 1400  # pixels of an embedded picture


def data_section(results: Results, cases: list[str], pool: list[str]) -> Html:
    """What is annotated: by case, and by organ.

    Args:
        results: Everything.
        cases: The labelled ones.
        pool: The unlabelled ones.
    """
    partial = [case for case in cases if _is_partial(case, results.dataset_json)]
    tiles = {
        "labelled cases": (len(cases), f"{len(partial)} of them for some labels only" if partial else "all completely"),
        "unlabelled cases": (len(pool), "the pool"),
        "labels": (len(organ_names(results.dataset_json)), ", ".join(results.dataset_json["channel_names"].values())),
    }
    return element("section", element("h2", "Data"), tile_list(tiles), organ_table(results, cases), id="data")


def organ_table(results: Results, cases: list[str]) -> Html:
    """How many cases annotate each organ, and how many only in a union with others."""
    rows = []
    for organ in organ_names(results.dataset_json):
        kinds = [annotation_kind(case, organ, results.dataset_json) for case in cases]
        full, union = kinds.count("annotated"), kinds.count("union")
        parts = {"annotated": (full, "full"), "in a union only": (union, "union"),
                 "not annotated": (len(cases) - full - union, "none")}  # fmt: skip
        rows.append([organ, str(full), str(union), str(len(cases) - full - union), share_bar(parts, len(cases))])
    head = ["label", "annotated", "in a union only", "not", "share of the labelled cases"]
    return table("Cases in which each label was looked for", head, rows)


def annotation_kind(case: str, organ: str, dataset_json: Mapping) -> str:
    """What a case says of an organ: "annotated", "union" or "not"; as `data.annotated`, but forgiving."""
    annotated, unions = dataset_json.get("annotated_labels", {}), dataset_json.get("union_labels", {}).get(case, [])
    if any(organ in union for union in unions):
        return "union"
    return "annotated" if case not in annotated or organ in annotated[case] else "not"


def _is_partial(case: str, dataset_json: Mapping) -> bool:
    organs = organ_names(dataset_json)
    return any(annotation_kind(case, organ, dataset_json) != "annotated" for organ in organs)


def organ_names(dataset_json: Mapping) -> list[str]:
    """All labels or regions but background and the ignore label."""
    return [name for name, value in dataset_json.get("labels", {}).items() if value != 0 and name != "ignore"]


def training_section(results: Results) -> Html:
    """Each model: what it was trained on, how it started, its settings and curves."""
    parts = [element("h2", "Trainings")]
    if not results.models:
        parts.append(element("p", "Nothing was trained on this data set yet.", class_="soft"))
    for model in results.models:
        parts += [element("h3", model.name), _folds_table(results, model), *_missing_folds(results, model)]
        parts += _transfers(model)
        if model.settings:
            entries = [element("li", element("code", f"{key} = {value!r}")) for key, value in model.settings.items()]
            parts.append(element("details", element("summary", "Settings from the plan"), element("ul", *entries)))
        parts.append(_curves(results, model))
    return element("section", *parts, id="trainings")


def _missing_folds(results: Results, model: Model) -> list[Html]:
    there = {fold.name for fold in model.folds}
    missing = [str(number) for number in range(len(results.splits)) if str(number) not in there]
    if "all" in there or not missing or len(missing) == len(results.splits):
        return []
    return [element("p", f"Not trained, of {len(results.splits)} folds: {', '.join(missing)}.", class_="soft")]


def _folds_table(results: Results, model: Model) -> Html:
    rows = []
    for fold in model.folds:
        epochs = max((len(values) for values in fold.curves.values()), default=0)
        state = "finished" if fold.is_finished else "not finished"
        trained_on, start = _trained_on(results, model, fold), _started_from(model, fold)
        rows.append([fold.name, trained_on, start, str(epochs) if epochs else "no log", state])
    head = ["fold", "trained on", "started from", "epochs", "state"]
    return table(f"Folds of {model.trainer}", head, rows, numeric=False)


def _started_from(model: Model, fold: Fold) -> str:
    if fold.transfer:
        return f"{_short(fold.transfer['source'])}, folded at t* = {fold.transfer['timestep']}"
    if fold.denoiser is not None or model.settings.get("start") == "scratch":
        return "random weights"
    return model.settings.get("start") or "not recorded"


BESIDE_LABELS = {
    "PseudoLabelTrainer": ", and pseudo labels of the pool",
    "DiffusionCoTrainingTrainer": ", and images of the pool",
    "DiffusionCoTrainingTwinTrainer": ", and images of the pool",
}


def _trained_on(results: Results, model: Model, fold: Fold) -> str:
    if fold.denoiser is not None:
        training = fold.denoiser["training"]
        return f"{training.get('images', '?')} images, {training.get('of_the_pool', '?')} of them of the pool"
    if fold.name.isdigit() and int(fold.name) >= len(results.splits):
        return "its split is not known"
    everything = list(results.dataset_json.get("dataset", ()))  # nnU-Net's other layout does not name its cases
    cases = results.splits[int(fold.name)]["train"] if fold.name.isdigit() else everything
    labelled = f"{len(cases)} labelled cases" if cases else "all labelled cases"
    if model.trainer in ("DenoisingDiffusionTrainer", "DiffusionTeacherTrainer"):
        return f"images of {labelled}, and the pool"
    if partial := sum(_is_partial(case, results.dataset_json) for case in cases):
        labelled += f", {partial} for some labels only ({_counts(results, cases)})"
    return labelled + BESIDE_LABELS.get(model.trainer, "")


def _counts(results: Results, cases: list[str]) -> str:
    kinds = {organ: [annotation_kind(case, organ, results.dataset_json) for case in cases]
             for organ in organ_names(results.dataset_json)}  # fmt: skip
    return ", ".join(f"{organ} in {found.count('annotated')}" for organ, found in kinds.items())


def _transfers(model: Model) -> list[Html]:
    """What the folds' transfers had to say, those that say the same once."""
    folds: dict[str, list[Fold]] = {}
    for fold in (fold for fold in model.folds if fold.transfer):
        folds.setdefault(repr({**fold.transfer, "source": ""}), []).append(fold)
    parts = []
    for alike in folds.values():
        transfer, names = alike[0].transfer, ", ".join(fold.name for fold in alike)
        if transfer["warnings"]:
            parts.append(warning(f"The transfer of fold {names} warned", transfer["warnings"]))
        parts.append(_transfer(transfer, names))
    return parts


def _transfer(transfer: Mapping, folds: str) -> Html:
    counts = ", ".join(f"{len(transfer[key])} {key}" for key in ("matched", "adapted", "missing", "unexpected"))
    lists = [join(element("p", key), element("ul", *(element("li", element("code", n)) for n in transfer[key])))
             for key in ("adapted", "missing", "unexpected") if transfer[key]]  # fmt: skip
    summary = element("summary", f"Transfer from the denoiser, fold {folds}: {counts} parameters")
    return element("details", summary, *lists)


def _curves(results: Results, model: Model) -> Html:
    names = {"train_loss": "training", "val_loss": "validation"}
    if any(fold.denoiser is not None for fold in model.folds) or model.trainer.startswith("Denoising"):
        names["val_loss"] = "held-out images"
    lines = {label: _lines(model, key) for key, label in names.items()}
    lines = {label: found for label, found in lines.items() if found}
    dice = _lines(model, "pseudo_dice")
    charts = []
    if lines:
        charts.append(line_chart("Loss, a line for each fold", lines, "epoch", "loss"))
    if dice:
        charts.append(line_chart("Online Dice on validation patches", {"mean over labels": dice}, "epoch", "Dice"))
    if not charts:
        found = [picture(results, os.path.join(fold.folder, "progress.png"), f"nnU-Net's curves of fold {fold.name}")
                 for fold in model.folds]  # fmt: skip
        return join(*found) if any(found) else element("p", "No training log was found.", class_="soft")
    return element("div", *charts, class_="charts")


def _lines(model: Model, key: str) -> list[list[tuple[float, float]]]:
    found = [sorted(fold.curves.get(key, {}).items()) for fold in model.folds]
    return [[(epoch + 1, value) for epoch, value in line] for line in found if line]


def picture(results: Results, path: str | None, alt: str) -> Html:
    """A PNG of the results, made anew in a smaller format; nothing where there is none or it cannot be read."""
    from PIL import Image

    def read(path: str) -> Html:
        with Image.open(path) as image:
            image = image.convert("RGB")
        image.thumbnail((WIDEST, WIDEST * 4))
        buffer = io.BytesIO()
        image.save(buffer, "webp", quality=75)
        address = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        width, height = image.size
        return element("figure", element("img", src=address, alt=alt, width=width, height=height, class_="picture"))

    return results.attempt(path, read) or Html("") if path else Html("")


def tile_list(tiles: Mapping[str, tuple[object, str]]) -> Html:
    """Figures to see at a glance: name -> value and what is to be said of it."""
    items = [
        element("div", element("dt", name), element("dd", str(value), element("small", remark)))
        for name, (value, remark) in tiles.items()
    ]
    return element("dl", *items, class_="tiles")


def warning(heading: str, lines: list[str]) -> Html:
    """Something that must not be overlooked."""
    return element("div", element("strong", heading), element("ul", *(element("li", line) for line in lines)),
                   class_="warn", role="note")  # fmt: skip


def _short(path: str) -> str:
    """The end of a path: enough to know it again, nothing of whose machine it was."""
    return "/".join(path.replace("\\", "/").split("/")[-3:])
