"""Training and validating on what was annotated: counts, balance, and the trainer in nnU-Net's own loop."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from nnunetv2.evaluation.evaluate_predictions import save_summary_json
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.partial.annotations import Annotation, balanced_cases, output_channels, read_annotations
from nnunet_diffusion.partial.validation import hard_counts, restrict_summary
from nnunet_diffusion.trainers.ConfiguredTrainer import ConfiguredTrainer
from nnunet_diffusion.trainers.PartialLabelTrainer import PartialLabelTrainer

LABELS = {"background": 0, "liver": 1, "spleen": 2}


def one_hot_logits(labels, classes):
    return torch.nn.functional.one_hot(torch.tensor(labels), classes).movedim(-1, 1).float()


# ---------------------------------------------------------------- counts


def test_hard_counts_by_hand():
    # Case 0 annotates both: predicted 1 1 2 0, true 1 0 2 2: liver tp 1 fp 1 fn 0, spleen tp 1 fp 0 fn 1.
    # Case 1 annotates the liver: predicted 2 1 0 0, true 1 1 0 0: liver tp 1 fp 0 fn 1; its spleen counts nowhere.
    output = one_hot_logits([[[1, 1, 2, 0]], [[2, 1, 0, 0]]], 3)
    target = torch.tensor([[[[1, 0, 2, 2]]], [[[1, 1, 0, 0]]]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    tp, fp, fn = hard_counts(output, target, mask, LabelManager(LABELS, None))
    assert tp.tolist() == [2, 1] and fp.tolist() == [1, 0] and fn.tolist() == [1, 1]


def test_hard_counts_leave_ignored_voxels_out():
    output = one_hot_logits([[[1, 1, 2, 0]]], 3)
    target = torch.tensor([[[[1, 3, 3, 2]]]])
    manager = LabelManager({**LABELS, "ignore": 3}, None)
    tp, fp, fn = hard_counts(output, target, torch.ones(1, 3, dtype=torch.bool), manager)
    assert tp.tolist() == [1, 0] and fp.tolist() == [0, 0] and fn.tolist() == [0, 1]


def test_hard_counts_of_regions_by_hand():
    manager = LabelManager({"background": 0, "body": [1, 2], "core": [2]}, [1, 2])
    output = torch.tensor([[[[1.0, -1, 1]], [[1, 1, -1]]]])  # body: yes no yes, core: yes yes no
    target = torch.tensor([[[[True, True, False]], [[True, False, False]]]])
    tp, fp, fn = hard_counts(output, target, torch.tensor([[True, False]]), manager)
    assert tp.tolist() == [1, 0] and fp.tolist() == [1, 0] and fn.tolist() == [1, 0], "the core was not annotated"


def case_figures(case, liver, spleen):
    figures = {1: {"Dice": liver, "TP": 1}, 2: {"Dice": spleen, "TP": 3}}
    return {"reference_file": f"gt/{case}.nii.gz", "prediction_file": f"pred/{case}.nii.gz", "metrics": figures}


def test_summary_is_restricted_to_annotated_pairs(tmp_path):
    cases = [case_figures("a", 0.5, 0.25), case_figures("b", 1.0, 0.0), case_figures("c", float("nan"), 0.75)]
    mean = {label: {"Dice": 0.0, "TP": 0.0} for label in (1, 2)}
    path = tmp_path / "summary.json"
    save_summary_json({"metric_per_case": cases, "mean": mean, "foreground_mean": {"Dice": 0.0, "TP": 0.0}}, str(path))
    channels = output_channels(LabelManager(LABELS, None))
    annotations = read_annotations({"annotated_labels": {"b": ["liver"]}}, ["a", "b", "c"], channels)
    restrict_summary(str(path), ".nii.gz", annotations, channels)
    summary = json.loads(path.read_text())
    # liver: 0.5 and 1.0, c has none; spleen: 0.25 and 0.75, b was not annotated for it
    assert summary["mean"]["1"]["Dice"] == 0.75 and summary["mean"]["2"]["Dice"] == 0.5
    assert summary["foreground_mean"]["Dice"] == 0.625
    assert summary["counted_pairs"] == {
        "liver": {"annotated": 3, "with_dice": 2},
        "spleen": {"annotated": 2, "with_dice": 2},
    }
    assert summary["metric_per_case"][1]["metrics"] == {"1": {"Dice": 1.0, "TP": 1}, "2": {}}


# ---------------------------------------------------------------- balance


def test_balance_draws_every_label_as_often():
    background = {"background"}
    annotations = {f"liver {i}": Annotation(frozenset({"liver"} | background)) for i in range(8)}
    annotations |= {f"spleen {i}": Annotation(frozenset({"spleen"} | background)) for i in range(2)}
    annotations["none"] = Annotation(frozenset(background))
    drawn = Counter(case.split()[0] for case in balanced_cases(list(annotations), annotations))
    assert drawn["liver"] == drawn["spleen"] and drawn["none"] == 0
    assert balanced_cases(["none"], annotations) == ["none"]
    alike = ["liver 1", "liver 0"]
    assert balanced_cases(alike, annotations) == alike, "or a completely annotated data set would be drawn otherwise"


# ---------------------------------------------------------------- the trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny data set."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            folder = tmp_path_factory.mktemp(name)
            patch.setenv(name, str(folder))
        yield tiny.prepare()


def partial(world, tables, configuration="2d", cls=PartialLabelTrainer, **block):
    """A trainer on the tiny data set with other tables in its dataset.json."""
    content = json.loads((world / f"{tiny.PLANS}.json").read_text())
    tiny.write_plans(content, "Partial", **block)
    path = world / "dataset.json"
    complete = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(complete), **tables}))
        return tiny.trainer(cls, configuration, plans="Partial")
    finally:
        path.write_text(complete)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_complete_annotation_trains_as_nnunet(world, configuration):
    weights = []
    for cls in (ConfiguredTrainer, PartialLabelTrainer):
        trainer = partial(world, {}, configuration, cls, **{cls.__name__: {"seed": 3}})
        trainer.num_epochs = 1
        trainer.run_training()
        weights.append(trainer.network.state_dict())
        assert np.isfinite(trainer.logger.get_value("mean_fg_dice", step=None)[-1])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.slow
def test_partial_annotation_end_to_end(world):
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (world / "gt_segmentations").glob("*.nii.gz"))
    tables = {
        "annotated_labels": {cases[0]: ["box"], cases[1]: ["left ball", "right ball"], cases[3]: ["box"]},
        "union_labels": {cases[2]: [["left ball", "right ball"]]},
    }
    trainer = partial(world, tables, PartialLabelTrainer={"balanced": True})
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    trainer.perform_actual_validation()
    summary = json.loads(Path(trainer.output_folder, "validation", "summary.json").read_text())
    counted = {name: entry["annotated"] for name, entry in summary["counted_pairs"].items()}
    assert counted == {"left ball": 1, "right ball": 1, "box": 2}, "case 3 annotates the box alone, case 4 everything"
    assert "Only annotated pairs of case and label count" in Path(trainer.log_file).read_text()


@pytest.mark.slow
def test_the_exclusion_term_grows_over_its_share_of_the_epochs(world):
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (world / "gt_segmentations").glob("*.nii.gz"))
    settings = {"exclusion_weight": 3.0, "exclusion_ramp": 0.5, "num_epochs": 4}
    trainer = partial(world, {"annotated_labels": dict.fromkeys(cases, ["box"])}, PartialLabelTrainer=settings)
    trainer.initialize()
    weights = []
    for trainer.current_epoch in range(4):
        trainer.on_train_epoch_start()
        weights.append(trainer.loss.loss.exclusion_weight)
    assert weights == [0, 1.5, 3, 3]


@pytest.mark.slow
def test_voxels_of_a_label_that_was_not_annotated_teach_nothing(world):
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (world / "gt_segmentations").glob("*.nii.gz"))
    trainer = partial(world, {"annotated_labels": {case: ["box"] for case in cases}})
    trainer.initialize()
    data, target = torch.randn(2, 1, 16, 16), torch.randint(0, 2, (2, 1, 16, 16)) * 3  # background and box
    targets = [target[:, :, ::s, ::s].float() for s in (1, 2, 4)][: len(trainer._get_deep_supervision_scales())]
    with trainer.with_annotations({"keys": cases[:2]}):
        outputs = [out.detach().requires_grad_() for out in trainer.network(data)]
        trainer.loss(outputs, targets).backward()
    swapped = [out.detach()[:, [0, 2, 1, 3]].requires_grad_() for out in outputs]
    with trainer.with_annotations({"keys": cases[:2]}):
        trainer.loss(swapped, targets).backward()
    for out, other in zip(outputs, swapped, strict=True):
        if out.grad is not None:
            assert torch.allclose(out.grad[:, [0, 2, 1, 3]], other.grad, atol=1e-7), "the two balls are exchangeable"


@pytest.mark.slow
def test_labels_are_dropped_in_training_alone_and_sources_are_drawn_equally_often(world):
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (world / "gt_segmentations").glob("*.nii.gz"))
    settings = {"label_dropout": 1.0, "balanced_sources": True}
    tables = {"sources": {cases[0]: "a", cases[1]: "a", cases[2]: "b"}}
    trainer = partial(world, tables, PartialLabelTrainer=settings)
    trainer.initialize()
    train, _ = trainer.get_tr_and_val_datasets()
    assert Counter(train.identifiers) == {cases[0]: 10, cases[1]: 10, cases[2]: 20}
    batch = {"keys": cases[:2], "data": torch.randn(2, 1, 16, 16)}
    batch["target"] = [torch.randint(0, 4, (2, 1, size, size)) for size in (16, 8)]
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    trainer.weight_decay = 0.0
    assert float(trainer.train_step(batch)["loss"]) == pytest.approx(0, abs=1e-6), "all is background: nothing to learn"
    moved = [
        name for name, tensor in trainer.network.state_dict().items() if (tensor - before[name]).abs().max() > 1e-4
    ]
    assert moved == []
    with torch.no_grad():
        assert float(trainer.validation_step(batch)["loss"]) > 0.1


@pytest.mark.slow
def test_an_epoch_without_annotated_labels_does_not_spoil_the_moving_average(world):
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (world / "gt_segmentations").glob("*.nii.gz"))
    trainer = partial(world, {"annotated_labels": {case: [] for case in cases}})
    trainer.run_training()
    assert trainer.logger.get_value("ema_fg_dice", step=None) == [0, 0]
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()


@pytest.mark.slow
def test_wrong_tables_are_refused_by_name(world):
    with pytest.raises(UserError, match="nobody"):
        partial(world, {"annotated_labels": {"nobody": ["box"]}}).initialize()
    with pytest.raises(UserError, match="left foot"):
        partial(world, {"annotated_labels": {"tiny_000": ["left foot"]}}).initialize()
