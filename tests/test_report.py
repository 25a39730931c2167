"""The report: reads what is there, survives what is not, escapes every name, and works in a browser."""

import base64
import io
import json
import os
import re
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import denoisers
import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib.figure import Figure
from PIL import Image
from running import run_command

from nnunet_diffusion.cli import main
from nnunet_diffusion.demo.phantom import LABELS, phantom
from nnunet_diffusion.evaluation.folders import annotations_of
from nnunet_diffusion.records import made_from
from nnunet_diffusion.report import charts
from nnunet_diffusion.report.charts import chart, draw_budgets, draw_lines, draw_strips
from nnunet_diffusion.report.collect import Fold, Model, collect, evaluated_scores, model_scores, read_log
from nnunet_diffusion.report.outcome import best_median_worst
from nnunet_diffusion.report.rounds import describe_run, find_rounds
from nnunet_diffusion.report.slices import case_planes, organ_colors, slices_to_show
from nnunet_diffusion.report.training import annotation_kind
from nnunet_diffusion.rounds.state import Round, State
from nnunet_diffusion.tables import mean_over_organs

NAME = "Dataset995_Report"
EVIL = "<img src=x onerror=alert(1)>\"&'"
PUBLISHED = Path(__file__).parent.parent / "benchmarks" / "results"
MODEL = "DiffusionPretrainedTrainer__nnUNetPlans__2d"


def save(array, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((4.0, 4.0, 6.0))
    sitk.WriteImage(image, str(path))


def make_results(root, cases=4, files=4, models=(MODEL,), names=LABELS, shape=(12, 36, 48)):
    """A data set with results, the first `files` cases with real files: phantoms, moved by a voxel as predictions."""
    spacing_mm = tuple(extent / voxels for extent, voxels in zip((300.0, 288.0, 384.0), shape, strict=True))
    raw, preprocessed, results = (root / f"nnUNet_{kind}" / NAME for kind in ("raw", "preprocessed", "results"))
    case_names = [f"case_{i:03d}" for i in range(cases)]
    values = list(range(len(names)))
    dataset = {c: {"images": [f"imagesTr/{c}.nii.gz"], "label": f"labelsTr/{c}.nii.gz"} for c in case_names}
    content = {
        "channel_names": {"0": "CT"}, "labels": dict(zip(names, values, strict=True)), "numTraining": cases,
        "file_ending": ".nii.gz", "dataset": dataset, "unlabeled": {"pool_0": {"images": ["pool_0.nii.gz"]}},
        "annotated_labels": {case_names[0]: list(names)[1:3]},
    }  # fmt: skip
    raw.mkdir(parents=True)
    (raw / "dataset.json").write_text(json.dumps(content))
    for i, case in enumerate(case_names[:files]):
        image, label = phantom(i, shape, spacing_mm)
        save(image.astype(np.int16), raw / "imagesTr" / f"{case}.nii.gz")
        save(label.astype(np.uint8), preprocessed / "gt_segmentations" / f"{case}.nii.gz")
        for model in models:
            save(np.roll(label, 1, 2).astype(np.uint8), results / model / "fold_0" / "validation" / f"{case}.nii.gz")
    rng = np.random.default_rng(0)
    for model in models:
        fold = results / model / "fold_0"
        (fold / "validation").mkdir(parents=True, exist_ok=True)
        per_case = [
            # the first cases are best, median and worst, so that those with files are shown
            {"prediction_file": f"/x/{c}.nii.gz", "metrics": {str(v): {"Dice": dice} for v in values[1:]}}
            for c, dice in zip(case_names, [0.5, 0.99, 0.01, *rng.choice([0.2, 0.8], cases - 3)], strict=True)
        ]
        (fold / "validation" / "summary.json").write_text(json.dumps({"metric_per_case": per_case}))
        (fold / "training_log_2026_1_1_00_00_00.txt").write_text(LOG)
    return raw, preprocessed, results


LOG = """2026-01-01 00:00:00: Using splits
2026-01-01 00:00:01.5: Epoch 0\x20
2026-01-01 00:00:02: train_loss 0.25\x20
2026-01-01 00:00:02: val_loss -0.5\x20
2026-01-01 00:00:02: Pseudo dice [np.float32(0.5), np.float32(0.7), nan]\x20
2026-01-01 00:00:03: Epoch 1\x20
2026-01-01 00:00:04: train_loss 1e-05, held-out loss 0.2000, epoch time 3.0 s
2026-01-01 00:00:05: Epoch 2\x20
2026-01-01 00:00:06: train_loss nan\x20
"""


@pytest.fixture
def root(nnunet_folders):
    return nnunet_folders


def report(root, *arguments):
    code = main(["report", "-d", "995", *arguments])
    return code, (root / "nnUNet_results" / NAME / "report.html").read_text()


# ---------------------------------------------------------------- parts, by hand


def test_log_by_hand(tmp_path):
    (tmp_path / "log.txt").write_text(LOG)
    curves = read_log(str(tmp_path / "log.txt"))
    assert curves["train_loss"] == {0: 0.25, 1: 1e-5} and curves["val_loss"] == {0: -0.5, 1: 0.2}
    assert curves["pseudo_dice"] == {0: pytest.approx(0.6)}


def test_a_resumed_log_continues_and_a_new_training_replaces(root):
    _, preprocessed, results = make_results(root, files=0)
    fold = results / MODEL / "fold_0"
    log = "x: Epoch 2\nx: train_loss 0.5 \nx: Epoch 3\nx: train_loss 0.4 \n"
    (fold / "training_log_2026_1_2_00_00_00.txt").write_text(log)

    def losses():
        return collect(NAME, "", str(preprocessed), str(results), []).models[0].folds[0].curves["train_loss"]

    assert losses() == {0: 0.25, 1: 1e-5, 2: 0.5, 3: 0.4}
    (fold / "training_log_2026_1_3_00_00_00.txt").write_text("x: Epoch 0\nx: train_loss 9.0 \n")
    assert losses() == {0: 9.0}


def test_best_median_and_worst_by_hand():
    scores = {"a": {"x": 0.2, "y": 0.4}, "b": {"x": 0.9}, "c": {"y": 0.5}, "d": {}, "e": {"x": 0.1}}
    assert best_median_worst(scores) == {"b": "best", "a": "median", "e": "worst"}  # 0.9 0.5 0.3 0.1; d has none
    assert best_median_worst({"a": {"x": 1.0}}) == {"a": "worst"} and best_median_worst({"d": {}}) == {}
    assert mean_over_organs(scores) == pytest.approx((0.4 + 0.45) / 2)


def test_scores_of_an_evaluation_go_before_nnunets_if_they_cover_as_many_cases():
    organs = {"dsc": 0.7, "nsd": None, "hd95_mm": None}
    scores = evaluated_scores({"rules": {"name": "nnunet", "description": "d"}, "cases": {"a": {"x": organs}}})
    assert scores.measures == {"DSC": {"a": {"x": 0.7}}, "NSD": {"a": {}}}
    fold = Fold("0", "", validation={"a": {"x": 0.6}}, evaluations={"nnunet": scores})
    model = Model("T", "P", "2d", "", [fold])
    assert model_scores(model).measures["DSC"] == {"a": {"x": 0.7}}
    fold.validation["b"] = {"x": 0.1}
    assert list(model_scores(model).measures) == ["DSC"]


def test_annotation_of_an_organ_by_hand():
    tables = {"annotated_labels": {"a": ["x"]}, "union_labels": {"b": [["y", "z"]]}}
    labels = {"background": 0, "x": 1, "y": 2, "z": 3}
    annotations, channels = annotations_of("abc", {"labels": labels, **tables})
    kinds = {case: [annotation_kind(organ, annotations[case], channels) for organ in "xy"] for case in "abc"}
    assert kinds == {"a": ["annotated", "not"], "b": ["annotated", "union"], "c": ["annotated", "annotated"]}


def test_slices_cover_what_is_segmented():
    reference, prediction = np.zeros((2, 20, 3, 3), bool)
    reference[5], prediction[9] = True, True
    assert slices_to_show(reference, prediction, 100) == list(range(4, 11))
    assert slices_to_show(reference, prediction, 3) == [4, 7, 10]
    assert slices_to_show(reference & False, prediction & False, 2) == [0, 19]


def test_planes_show_right_on_the_left_and_the_head_on_top(tmp_path):
    """A voxel at the patient's right, front and head; SimpleITK's axes run to left, back and head."""
    image, label = np.full((10, 10, 10), 40, np.int16), np.zeros((10, 10, 10), np.uint8)
    label[9, 0, 0] = 1
    for name, array in (("image", image), ("label", label)):
        save(array, tmp_path / f"{name}.nii.gz")
    files = [str(tmp_path / f"{name}.nii.gz") for name in ("image", "label", "label")]
    planes = {plane.name: plane for plane in case_planes(*files, {"background": 0, "a": 1}, True, 5)}
    assert planes["axial"].total == 10 and planes["axial"].positions[planes["axial"].start] == 10
    for plane, (x, y) in {"axial": (0, 0), "coronal": (0, 0), "sagittal": (0, 0)}.items():
        layer = planes[plane].layers["prediction"][planes[plane].start]
        picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(layer.split(",")[1]))).convert("RGBA"))[..., 3]
        assert picture[y, x] > 0 and picture[-1, -1] == 0 and picture[-1, 0] == 0 and picture[0, -1] == 0, plane
    assert planes["coronal"].size[1] / planes["coronal"].size[0] == pytest.approx(1.5, abs=0.02)  # 6 mm by 4 mm


def test_regions_get_the_name_of_the_smallest():
    colors = organ_colors({"background": 0, "whole": [1, 2], "core": [2]})
    assert {value: name for value, (name, _) in colors.items()} == {1: "whole", 2: "core"}


def svg_of(drawn):
    """The document that a chart's address holds."""
    return base64.b64decode(drawn.address.removeprefix("data:image/svg+xml;base64,")).decode()


def test_charts_describe_themselves_and_every_case_is_a_dot():
    lines = chart("Loss", 2.5, draw_lines, {"a<b": [[(1, 0.5), (2, 0.25)]], "c": [[(1, 0.5)]]}, "epoch", "loss")
    assert lines.description == "Loss: a<b ends at 0.25, c ends at 0.5" and "a&lt;b" in svg_of(lines)
    axes = Figure().subplots()
    assert draw_strips(axes, {"x": [0.4, 0.6, 1.0], "y": []}, "DSC") == "means x 0.667"
    assert list(axes.lines[0].get_xdata()) == [0.4, 0.6, 1.0] and axes.get_xlim() == (0, 1)


def test_dice_axes_run_from_0_to_1_and_only_losses_are_logarithmic():
    for limits, scale in (((0, 1), "linear"), (None, "log")):
        axes = Figure().subplots()
        draw_lines(axes, {"x": [[(1, 0.001), (2, 0.9)]]}, "epoch", "y", limits)
        assert axes.get_yscale() == scale and (limits is None or axes.get_ylim() == limits)


@pytest.mark.parametrize("name", [EVIL, "$\\frac{1}$", "$x", "a\0\ud800\udcff\ufffe", "肝臓", "_", "x" * 500])
def test_no_name_breaks_a_chart(name):
    group = {"arm": name, "budget": name, "mean": 0.5, "sd": None, "dice": 0.5}
    drawn = [chart(name, 2, draw_strips, {name: [0.5]}, "DSC"), chart(name, 2, draw_budgets, [group], [group], "", "")]
    for svg in map(svg_of, drawn):
        texts = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
        assert charts.label(name) in ["".join(text.itertext()) for text in texts]


# ---------------------------------------------------------------- the command


def test_shows_what_there_is(root, capsys):
    make_results(root)
    code, page = report(root)
    assert code == 0 and "report.html" in capsys.readouterr().out
    for text in ("4 labeled, 1 not", "Best: case_001, mean DSC 0.990", "Worst: case_002"):
        assert text in page, text
    assert "1 of them for some labels only" in page
    assert page.count('type="range"') == 9
    assert not re.search(r'(?:src|href)="(?!data:|#)', page), "loads something from somewhere"


def test_a_validation_on_training_cases_says_so(root):
    _, _, results = make_results(root, files=0)
    note = " (cases that it was trained on)"
    assert note not in report(root)[1]
    (results / MODEL / "fold_0").rename(results / MODEL / "fold_all")
    page = report(root)[1]
    assert f"validation cases of fold all{note}" in page and page.count(note) == 2  # and beside the highest DSC


def test_a_data_set_without_results_has_a_page_too(root):
    results = make_results(root, files=0)[2]
    shutil.rmtree(results)
    code, page = report(root)
    assert code == 0 and "Nothing was trained on this data set yet" in page


def test_names_are_escaped(root):
    names = {EVIL: 1} | {f"organ {i}": i for i in range(2, len(LABELS))}
    _, _, results = make_results(root, files=0, names=["background", *names])
    evil = results / f"Trainer{EVIL.replace('/', '')}__P__2d" / "fold_0"
    evil.mkdir(parents=True)
    (evil / "training_log_1.txt").write_text(LOG)
    transfer = {key: [EVIL] for key in ("matched", "adapted", "missing", "unexpected", "warnings")}
    (evil / "transfer_report.json").write_text(json.dumps({**transfer, "source": EVIL, "timestep": 3}))
    code, page = report(root)
    assert code == 1, "the cases' files are not there"
    assert "<img src=x" not in page and page.count("&lt;img src=x onerror=alert(1)&gt;") > 5


def test_weights_that_are_no_denoisers_are_shown_without_a_timestep(root):
    fold = make_results(root, files=0)[2] / MODEL / "fold_0"
    transfer = {key: [] for key in ("matched", "adapted", "missing", "unexpected", "warnings", "citations")}
    (fold / "transfer_report.json").write_text(json.dumps({**transfer, "source": "/a/b/c/d.pth", "timestep": None}))
    page = report(root)[1]
    assert "b/c/d.pth" in page and "folded at" not in page and "transfer_report.json:" not in page


SAMPLES = "../DenoisingDiffusionTrainer__P__2d/fold_all/samples"
STATE = "../../../nnUNet_preprocessed/Dataset995_Report/P_2d_pseudo/P__2d__fold_0/state.json"
SPLITS = "../../../nnUNet_preprocessed/Dataset995_Report/splits_final.json"
ROUND = "../rounds__P__2d/fold_0/round_1/report.json"
RULES = '{"name": "n", "description": "d"}'
DICE = '{"metric_per_case": [{"prediction_file": "a", "metrics": {"1": {"Dice": %s}}}]}'
HARMFUL = {  # file -> what it may hold instead
    "fold_0/validation/summary.json": ['{"metric_per_case": [{"prediction', '{"results": []}', DICE % 7, DICE % '"x"'],
    "fold_0/validation/evaluation_nnunet.json": ['{"rules": "old"}', f'{{"rules": {RULES}, "cases": [1]}}', "[]"],
    "fold_0/transfer_report.json": ["[1, 2]", '{"source": "x", "timestep": "3"}', "null"],
    "fold_0/denoiser.pth": ["not torch", "\x80\x02}q\0(X\x06\0\0\0formatq\x01u.", "PK\x03\x04"],
    "plans.json": ["{", '{"nnunet_diffusion": {"DiffusionPretrainedTrainer": 3}}', "[" * 100_000],
    "../label_efficiency__P__2d/label_efficiency.json": ['{"summary": []}', '{"summary": [{"arm": 1}], "runs": 2}'],
    SPLITS: ["[{", '[{"train": [1], "val": []}]', '{"train": [], "val": []}'],
    STATE: ['{"rounds": 3}', "\ufeff", '{"format": 1}'],
    ROUND: ['{"decisions": {"keep": "many"}}', '{"title"', "3"],
    f"{SAMPLES}/quality_encoder.json": ['{"values": {"FID": 1}}'],
    f"{SAMPLES}/samples.png": ["no picture"],
    "fold_0/progress.png": ["no picture"],
}


@pytest.mark.parametrize("number", range(4))
def test_what_is_half_written_or_of_another_version_is_named(root, capsys, number):
    _, _, results = make_results(root, files=0)
    model = results / MODEL
    (model / SAMPLES).mkdir(parents=True)
    denoisers.write(model / SAMPLES / "../denoiser.pth")
    for file, contents in HARMFUL.items():
        (model / file).parent.mkdir(parents=True, exist_ok=True)
        (model / file).write_bytes(contents[min(number, len(contents) - 1)].encode("latin-1", "ignore"))
    (model / "fold_0" / "training_log_2026_1_1_00_00_00.txt").write_text("no epochs")
    (model / "fold_0" / "training_log_2.txt").write_bytes(np.random.default_rng(0).bytes(9999))
    code, page = report(root)
    lines = capsys.readouterr().err.splitlines()
    assert code == 1 and "Not everything could be read" in page and "denoiser.pth" in page
    for name in (f"/{Path(file).name}" for file in HARMFUL):
        (line,) = [line for line in lines if name in line]
        assert re.fullmatch(rf"WARNING: .*{name}.+: left out", line), line
    assert f"<h3>{MODEL.replace('__', ', ')}</h3>" in page and "DenoisingDiffusionTrainer, P, 2d" in page


def put_file(path):
    path.write_text("a file")


def put_broken_link(path):
    path.symlink_to("nowhere")


def put_link_to_itself(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("put", [put_file, put_broken_link, put_link_to_itself, Path.mkdir])
def test_odd_folders_and_files_do_not_cost_the_rest(root, capsys, put):
    """A file or a link where a folder is expected, a folder or a link where a file is: named, and the rest is there."""
    _, _, results = make_results(root, files=0)
    folders = ["A__P__2d", f"{MODEL}/fold_1", "rounds__P__2d", "rounds__Q__2d/fold_1", "rounds__Q__2d/fold_0/round_2"]
    files = ["plans.json", "fold_0/denoiser.pth", "fold_0/validation/evaluation_nnunet.json", "fold_0/progress.png"]
    (results / "rounds__Q__2d" / "fold_0").mkdir(parents=True)
    (results / MODEL / "fold_0" / "training_log_2026_1_1_00_00_00.txt").write_text("no epochs")
    odd = (folders if put is not Path.mkdir else []) + [f"{MODEL}/{file}" for file in files]
    for name in odd:
        put(results / name)
    code, page = report(root)
    assert code == 1 and f"{MODEL.replace('__', ', ')}: validation cases of fold 0" in page
    err = capsys.readouterr().err
    assert [name for name in odd if str(results / name) not in page or f"WARNING: {results / name}" not in err] == []


def test_folders_whose_names_say_nothing_are_none_of_the_results(root):
    _, _, results = make_results(root, files=0)
    for name in ("rounds__", "rounds__x", "__", "a__b", f"{MODEL}/fold_", f"{MODEL}/fold_²", f"{MODEL}/fold_x"):
        (results / name).mkdir()
    for name in ("round_", "round_²"):
        (results / "rounds__P__2d" / "fold_0" / name).mkdir(parents=True)
    code, page = report(root)
    assert page.count("its split is not known") == 1 and "round_" not in page


def test_names_that_are_not_utf8_are_written_readably(root, capsys):
    raw, _, results = make_results(root)  # with files, for whose paths SimpleITK ends the process
    os.rename(results / MODEL, os.fsencode(results) + b"/Caf\xe9__P__2d")
    content = json.loads((raw / "dataset.json").read_text())
    content["labels"] = {"background": 0, "li\ud800ver\u0000": 1}
    (raw / "dataset.json").write_text(json.dumps(content | {"annotated_labels": {}}))
    code, page = report(root)
    assert "Caf\\udce9, P, 2d" in page and "li\\ud800ver" in page and "case_001" in capsys.readouterr().err


def test_faulty_annotations_and_names_that_lead_elsewhere_are_named(root, capsys):
    raw, _, results = make_results(root, files=0)
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(content | {"annotated_labels": {"case_000": 3}}))
    summary = results / MODEL / "fold_0" / "validation" / "summary.json"
    summary.write_text(summary.read_text().replace("/x/case_001.nii.gz", ".."))
    code, page = report(root)
    err = capsys.readouterr().err
    assert code == 1 and "annotated_labels of case 'case_000' must be a list" in err and "4 labeled, 1 not" in page
    assert "case .." in err


def test_an_organ_that_a_case_does_not_have_has_no_score(root, capsys):
    """nnU-Net writes NaN where neither reference nor prediction has a label."""
    _, _, results = make_results(root, files=0)
    summary = results / MODEL / "fold_0" / "validation" / "summary.json"
    content = json.loads(summary.read_text())
    content["metric_per_case"][0]["metrics"]["1"]["Dice"] = float("nan")
    summary.write_text(json.dumps(content))
    report(root)
    assert "summary.json" not in capsys.readouterr().err


def make_rounds(preprocessed, results):
    """What two rounds leave; returns the last one's folder, the state's file and the rounds that it holds."""
    for number, kept in ((1, 3), (2, 5)):
        folder = results / "rounds__nnUNetPlans__2d" / "fold_0" / f"round_{number}"
        folder.mkdir(parents=True)
        reasons = {"liver": [f"confidence 0.{number}1 below 0.8"], EVIL: [EVIL]}
        cases = {"p<1>": {"decision": "keep", "organs": [], "reasons": reasons, "evidence": {}}}
        decisions = {"keep": kept, "wait": 2, "drop": 1}
        report_json = {"title": "t", "decisions": decisions, "organs": {"liver": kept}, "cases": cases}
        (folder / "report.json").write_text(json.dumps(report_json))
    state = preprocessed / "nnUNetPlans_2d_pseudo" / "nnUNetPlans__2d__fold_0" / "state.json"
    state.parent.mkdir(parents=True)
    rounds = [Round(i, validation_dice=dice) for i, dice in enumerate([0.61, 0.66, None])]
    State(made_from({}), rounds).save(str(state))
    return folder, state


def test_rounds_are_shown_and_are_no_model(root):
    _, preprocessed, results = make_results(root, files=0)
    folder, state = make_rounds(preprocessed, results)
    found = collect(NAME, "", str(preprocessed), str(results), [])
    assert [model.trainer for model in found.models] == ["DiffusionPretrainedTrainer"]
    runs = find_rounds(found, str(results), str(preprocessed))
    ((name, (first, second, third)),) = runs.items()
    assert name == "nnUNetPlans, 2d, fold 0" and [r.dice for r in (first, second, third)] == [0.61, 0.66, None]
    assert third.decisions == {"keep": 5, "wait": 2, "drop": 1} and third.organs == {"liver": 5}
    evil = EVIL.replace("1", "N")
    assert third.reasons == {"confidence N below N": 1, evil: 1} and found.problems == []
    described = describe_run(found, runs[name])
    assert described["rows"][2][:5] == [2, 5, 2, 1, "-"] and "Dice ends at 0.66" in described["charts"][0].description
    assert "kept 5, waiting 2, dropped 1" in report(root)[1]
    (folder / "report.json").write_text('{"title"')
    assert find_rounds(found, str(results), str(preprocessed))[name][2].organs == {} and len(found.problems) == 1
    state.write_text(state.read_text().replace('"format": 2', '"format": 3'))
    assert [entry.dice for entry in find_rounds(found, str(results), str(preprocessed))[name]] == [None, None]
    assert f"{state}" in found.problems[1] and "has format 3, this version writes 2" in found.problems[1]


def test_what_was_trained_beside_the_labels_is_said_and_mutual_logs_are_no_model(root):
    trainers = ("PartialLabelTrainer", "PseudoLabelTrainer", "DiffusionCoTrainingTrainer", "DiffusionTeacherTrainer")
    _, preprocessed, results = make_results(root, files=0, models=[f"{name}__P__2d" for name in trainers])
    (preprocessed / "splits_final.json").parent.mkdir(parents=True, exist_ok=True)
    (preprocessed / "splits_final.json").write_text(json.dumps([{"train": ["case_000", "case_001"], "val": []}]))
    (results / "mutual__P__2d" / "fold_0" / "logs").mkdir(parents=True)
    _, page = report(root)
    names = list(LABELS)[1:]  # one of the two cases has the first two of them only
    counts = ", ".join(f"{name} in {2 if name in names[:2] else 1}" for name in names)
    for end in ("</td>", ", and pseudo labels of the pool</td>", ", and images of the pool</td>"):
        assert page.count(f"<td>2 labeled cases, 1 for some labels only ({counts}){end}") == 1
    assert page.count("<td>images of 2 labeled cases, and the pool</td>") == 1
    assert "mutual" not in page


def copy_benchmarks(results):
    for name in ("label_efficiency", "partial_labels"):
        (results / f"{name}__P__2d").mkdir()
        shutil.copyfile(PUBLISHED / f"openkbp_{name}.json", results / f"{name}__P__2d" / f"{name}.json")


def test_the_benchmarks_are_shown_as_curves_with_every_seed(root):
    """The results that are committed, as their benchmarks leave them."""
    _, _, results = make_results(root, files=0)
    copy_benchmarks(results)
    _, page = report(root)
    section = page[page.index('id="labels"') :]
    for name in ("label_efficiency", "partial_labels"):
        content = json.loads((PUBLISHED / f"openkbp_{name}.json").read_text())
        groups, runs = content["summary"], content["runs"]
        arms, budgets = ({group[key] for group in groups} for key in ("arm", "budget"))
        assert f"<h3>{name}__P__2d</h3>" in section and f"{groups[0]['arm']} with {groups[0]['budget']}: " in section
        axes = Figure().subplots()
        draw_budgets(axes, groups, runs, "", "")
        curves = [container.lines[0] for container in axes.containers]
        assert len(curves) == len(arms) and all(len(curve.get_xdata()) == len(budgets) for curve in curves)
        dots = [line for line in axes.lines if line.get_fillstyle() == "none"]
        assert sum(len(line.get_xdata()) for line in dots) == len(runs) and axes.get_ylim() == (0, 1)
        for group in content["summary"]:
            assert re.search(rf"<t[dh][^>]*>{re.escape(group['arm'])}</t[dh]>", section)
            assert f"{group['mean']:.3f}" in section


def test_folds_that_are_missing_are_named(root):
    _, preprocessed, _ = make_results(root, files=0)
    preprocessed.mkdir(parents=True, exist_ok=True)
    splits = [{"train": ["case_000"], "val": ["case_001"]}] * 3
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))
    _, page = report(root)
    assert "Not trained, of 3 folds: 1, 2." in page


def test_names_of_channels_and_cases_are_escaped(root):
    raw, _, results = make_results(root, files=0)
    content = json.loads((raw / "dataset.json").read_text())
    (raw / "dataset.json").write_text(json.dumps(content | {"channel_names": {"0": EVIL}}))
    summary = results / MODEL / "fold_0" / "validation" / "summary.json"
    summary.write_text(summary.read_text().replace("case_001", "<img onerror=x>"))
    _, page = report(root)
    assert EVIL not in page and "<img onerror" not in page and "&lt;img onerror=x&gt;" in page


def test_a_case_whose_files_are_gone_is_named(root, capsys):
    _, preprocessed, _ = make_results(root)
    (preprocessed / "gt_segmentations" / "case_002.nii.gz").unlink()
    code, page = report(root)
    assert code == 1 and "case case_002 is not shown, its reference is not there" in capsys.readouterr().err
    assert "Best: case_001" in page and "Worst: case_002" not in page


def test_an_unknown_data_set_is_named(root, capsys):
    assert main(["report", "-d", "996"]) == 1
    assert "-d 996" in capsys.readouterr().err


def luminance(color):
    """Relative luminance of #rrggbb, WCAG 2.1."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return np.dot(linear, (0.2126, 0.7152, 0.0722))


def contrast(color, other):
    """From 1 to 21, WCAG 2.1."""
    dark, light = sorted(map(luminance, (color, other)))
    return (light + 0.05) / (dark + 0.05)


def test_what_is_read_by_its_color_stands_out():
    """At least 3:1 against white, WCAG 2.1's least for what is not text, and 4.5:1 of text against what it is on."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21) and contrast("#777777", "#ffffff") < 4.5
    css = Path(find_rounds.__code__.co_filename).with_name("page.css").read_text()
    colors = re.findall(r"(?:outline: 3px solid |\.(?:full|union|none) { background: )(#[0-9a-f]{6})", css)
    assert len(colors) == 4 and "opacity" not in css
    for color in [*colors, *charts.COLORS, charts.INK, charts.SOFT, charts.DOT, charts.MEAN]:
        assert contrast(color, "#ffffff") >= 3, color
    named = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", css)) | {"white": "#ffffff"}
    texts = {text for text in re.findall(r"[^-]color: var\(--([a-z-]+)\)", css)}
    on = {"ink": ["paper", "ground"], "soft": ["paper", "ground"], "accent": ["paper", "ground"],
          "warn": ["warn-ground"], "white": ["accent"]}  # fmt: skip
    assert texts | {"white"} == set(on), "a color of text that this test does not know"
    for text, ground in ((text, ground) for text, grounds in on.items() for ground in grounds):
        assert contrast(named[text], named[ground]) >= 4.5, f"{text} on {ground}"


def make_everything(root):
    """`make_results` and all else that a page can show."""
    _, preprocessed, results = make_results(root)
    fold = results / MODEL / "fold_0"
    transfer = {"matched": ["stem"], "adapted": [], "missing": ["heads"], "unexpected": [], "warnings": ["a warning"]}
    (fold / "transfer_report.json").write_text(json.dumps({**transfer, "source": "denoiser.pth", "timestep": 300}))
    other = {**transfer, "source": "denoiser.pth", "timestep": 300, "warnings": [f"only fold 1: {EVIL}"]}
    (results / MODEL / "fold_1").mkdir()
    (results / MODEL / "fold_1" / "transfer_report.json").write_text(json.dumps(other))
    Image.new("RGB", (64, 32), "teal").save(fold / "progress.png")
    organs = {organ: {"dsc": 0.5, "nsd": 0.625, "hd95_mm": 3.0} for organ in list(LABELS)[1:]}
    scores = {"rules": {"name": "nnunet", "description": EVIL}, "cases": {f"case_{i:03d}": organs for i in range(4)}}
    (fold / "validation" / "evaluation_nnunet.json").write_text(json.dumps(scores))
    (results / MODEL / "plans.json").write_text(json.dumps({"nnunet_diffusion": {MODEL.split("__")[0]: {"x": EVIL}}}))
    make_rounds(preprocessed, results)
    copy_benchmarks(results)
    samples = results / "DenoisingDiffusionTrainer__nnUNetPlans__2d" / "fold_all" / "samples"
    samples.mkdir(parents=True)
    denoisers.write(samples.parent / "denoiser.pth")
    Image.new("L", (64, 32), 128).save(samples / "samples.png")
    values = dict.fromkeys(("FID", "sFID", "precision", "recall", "F1"), 0.5)
    quality = {"samples": 9, "real": 9, "k": 3, "values": values, "features": EVIL, "warnings": [EVIL]}
    (samples / "quality_encoder.json").write_text(json.dumps(quality))


# ---------------------------------------------------------------- in a browser

PROBE = """<script>addEventListener("load", async () => {
const loaded = src => new Promise(resolve => {
  const i = new Image(); i.onload = () => resolve(i.naturalWidth > 0); i.onerror = () => resolve(false); i.src = src;
});
const bad = [], moved = [];
for (const plane of document.querySelectorAll(".plane")) {
  const slider = plane.querySelector("input"), scan = plane.querySelector(".scan"), seen = new Set();
  for (let i = 0; i <= Number(slider.max); i++) {
    slider.value = i; slider.dispatchEvent(new Event("input"));
    seen.add(scan.src + plane.querySelector("output").textContent + scan.alt);
    for (const img of plane.querySelectorAll("img")) if (!await loaded(img.src)) bad.push(img.className + i);
  }
  moved.push(seen.size === Number(slider.max) + 1);
}
for (const img of document.images) if (!await loaded(img.src) || !img.hasAttribute("alt")) bad.push(img.alt);
const box = document.querySelector("[data-layer=prediction]"), layer = document.querySelector(".prediction");
box.click(); const hidden = getComputedStyle(layer).visibility; box.click();
const wide = document.documentElement.scrollWidth > document.documentElement.clientWidth;
const result = { bad, moved: moved.length && moved.every(Boolean), planes: moved.length, hidden,
  shown: getComputedStyle(layer).visibility, wide, pictures: document.images.length, inner: innerWidth };
parent.postMessage("RESULT" + JSON.stringify(result) + "END", "*");
});</script>"""
# A window is never narrower than 500 pixels, a frame can be.
FRAME = """<body style="margin: 0"><iframe src="probed.html" width="{}" height="800" style="border: 0"></iframe>
<script>addEventListener("message", event => document.title = event.data)</script>"""


SECTIONS = ["glance", "data", "trainings", "results", "cases", "rounds", "labels", "samples"]
FLAGS = """--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --disable-breakpad
--disable-sync --disable-background-networking --disable-component-update --disable-quic
--enable-logging=stderr --v=0 --virtual-time-budget=60000""".split()


def load(chromium, file, width=800, then="--dump-dom"):
    """Loads a page in headless Chromium; one that does not answer in time is started once more."""
    for attempt in range(2):
        with tempfile.TemporaryDirectory() as profile:
            command = [chromium, *FLAGS, then, f"--window-size={width},900", f"--user-data-dir={profile}"]
            command.append(file.as_uri())
            try:
                return run_command(command, timeout=60)
            except TimeoutError:
                if attempt:
                    raise


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A Chromium that can show a page on this machine; without one the test is skipped."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium")
    file = tmp_path_factory.mktemp("page") / "page.html"
    file.write_text("<title>shown</title>")
    try:
        is_shown = "<title>shown</title>" in load(found, file).stdout
    except TimeoutError:
        is_shown = False
    if not is_shown:
        pytest.skip(f"{found} shows no page on this machine")
    return found


def browse(chromium, page, tmp_path, width):
    """Returns what the probe found on a page, and what the console said."""
    (tmp_path / "probed.html").write_text(page.replace("</body>", PROBE + "</body>"))
    (tmp_path / "frame.html").write_text(FRAME.format(width))
    done = load(chromium, tmp_path / "frame.html", width)
    found = re.search(r"RESULT(\{.*?\})END", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(found[1].replace("&amp;", "&")), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_works_in_a_browser(chromium, root, tmp_path, width):
    """On a desk and on a phone, with every section that a page can have."""
    make_everything(root)
    code, page = report(root)
    assert code == 0 and re.findall(r'<section id="([a-z]+)', page) == SECTIONS
    assert EVIL not in page and "<img src=x" not in page
    assert "only fold 1: " in page and "NSD" in page and page.count("0.625") >= len(LABELS) - 1
    assert all(alt for alt in re.findall(r'<img [^>]*alt="([^"]*)"[^>]*class="(?:scan|picture)"', page))
    found, console = browse(chromium, page, tmp_path, width)
    assert console == []
    fine = {"bad": [], "moved": True, "planes": 9, "hidden": "hidden", "shown": "visible", "wide": False}
    assert found == {**fine, "pictures": len(re.findall("<img ", page)), "inner": width}


@pytest.mark.slow
def test_prints_on_paper(chromium, root, tmp_path):
    """Pages, and on them the pictures: those of the cases, samples and curves."""
    make_everything(root)
    report(root)
    page, paper = root / "nnUNet_results" / NAME / "report.html", tmp_path / "report.pdf"
    load(chromium, page, then=f"--print-to-pdf={paper}")
    content = paper.read_bytes()
    assert content.startswith(b"%PDF-") and len(re.findall(rb"/Type\s*/Page\b", content)) >= 3
    assert len(re.findall(rb"/Subtype\s*/Image\b", content)) >= 9 * 2


@pytest.mark.slow
def test_two_hundred_cases_and_six_models_stay_under_20_mb(root):
    """Pictures at full size of scans that are noisier than a CT, which compress badly."""
    make_results(root, 200, 3, [f"Trainer{i}__nnUNetPlans__3d_fullres" for i in range(6)], shape=(72, 144, 192))
    size = len(report(root)[1])
    assert 5e6 < size < 20e6
