"""Training on pseudo labels in nnU-Net's own loop."""

import json
import os
from pathlib import Path

import blosc2
import numpy as np
import pytest
import tiny
import torch

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.partial.annotations import Annotation
from nnunet_diffusion.rounds.pseudo_labels import ignoring, pseudo_folder, save_pseudo_label
from nnunet_diffusion.trainers.DiffusionPretrainedTrainer import DiffusionPretrainedTrainer
from nnunet_diffusion.trainers.PseudoLabelTrainer import PseudoLabelTrainer

pytestmark = pytest.mark.slow
ALL = Annotation(frozenset(tiny.LABELS))
SOME = Annotation(frozenset({"background", "box"}))
NAME = "R__fold_{fold}/round_1"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny data set; scans 100 and 101 of the pool have pseudo labels, 101 for the box alone, 102 has none."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        folder = tiny.prepare()
        rng = np.random.default_rng(0)
        for configuration in ("2d", "3d_fullres"):
            identifier = f"nnUNetCompactPlans_{configuration}"
            manager = ignoring(build(folder, configuration=configuration).label_manager)
            for case, annotation, values in (("tiny_100", ALL, [0, 1, 2, 3, 4]), ("tiny_101", SOME, [0, 3, 4])):
                image = blosc2.open(str(folder / (identifier + "_unlabeled") / f"{case}.b2nd"))
                label = rng.choice(values, image.shape[1:])
                target = pseudo_folder(str(folder), identifier, "R__fold_0", "round_1")
                save_pseudo_label(target, case, label, annotation, manager, (16, 16))
        yield folder


def build(folder, cls=PseudoLabelTrainer, configuration="2d", fold=0, dataset_json=None, **settings):
    """A trainer with settings."""
    plans = json.loads((folder / f"{tiny.PLANS}.json").read_text())
    tiny.write_plans(plans, "P", **{cls.__name__: {"seed": 2, **settings}})
    path = folder / "dataset.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | (dataset_json or {})))
        return tiny.trainer(cls, configuration, fold, "P")
    finally:
        path.write_text(before)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_without_pseudo_labels_it_is_the_trainer_that_it_derives_from(world, configuration):
    weights = []
    for cls in (DiffusionPretrainedTrainer, PseudoLabelTrainer):
        trainer = build(world, cls, configuration, start="scratch")
        trainer.num_epochs = 1
        trainer.run_training()
        weights.append(trainer.network.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_it_trains_on_both_kinds_and_the_model_folder_is_stock(world, configuration):
    trainer = build(world, configuration=configuration, start="scratch", pseudo_labels=NAME, annotated_share=0.4)
    trainer.run_training()
    train, validation = trainer.get_tr_and_val_datasets()
    assert set(train.identifiers) == {"tiny_000", "tiny_001", "tiny_002", "tiny_100", "tiny_101"}
    assert set(validation.identifiers) == {"tiny_003", "tiny_004"}
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    checkpoint = torch.load(Path(trainer.output_folder, "checkpoint_final.pth"), weights_only=False)
    heads = [w for key, w in checkpoint["network_weights"].items() if key.endswith("seg_layers.0.weight")]
    assert [len(head) for head in heads] == [4], "one output a label, none for what is ignored"


def test_ignored_voxels_and_labels_that_a_pseudo_label_is_silent_about_teach_nothing(world):
    trainer = build(world, start="scratch", pseudo_labels=NAME)
    trainer.initialize()
    trainer.annotations = trainer.annotations | trainer.pseudo
    target = torch.randint(0, 2, (2, 1, 16, 16)) * 3
    target[:, :, :8] = 4
    targets = [target[:, :, :: 2**s, :: 2**s] for s in range(len(trainer._get_deep_supervision_scales()))]
    with trainer.with_annotations({"keys": ["tiny_101", "tiny_101"]}):
        outputs = [out.detach().requires_grad_() for out in trainer.network(torch.randn(2, 1, 16, 16))]
        trainer.loss(outputs, targets).backward()
    assert (outputs[0].grad[:, :, :8] == 0).all() and (outputs[0].grad[:, :, 8:] != 0).any()
    swapped = [out.detach()[:, [0, 2, 1, 3]].requires_grad_() for out in outputs]
    with trainer.with_annotations({"keys": ["tiny_101", "tiny_101"]}):
        trainer.loss(swapped, targets).backward()
    assert torch.allclose(outputs[0].grad[:, [0, 2, 1, 3]], swapped[0].grad, atol=1e-7), "the balls are exchangeable"


def test_regions_ignore_too(world):
    regions = {
        "labels": {"background": 0, "balls": [1, 2], "right ball": [2], "box": [3]},
        "regions_class_order": [1, 2, 3],
    }
    trainer = build(world, dataset_json=regions, start="scratch", pseudo_labels=NAME)
    trainer.num_epochs = 1
    trainer.initialize()
    trainer.pseudo = {case: Annotation(frozenset({"balls", "right ball", "box"})) for case in trainer.pseudo}
    trainer.run_training()
    batch = next(trainer.dataloader_train)
    target = batch["target"][0] if isinstance(batch["target"], list) else batch["target"]
    assert target.shape[1] == 4, "three regions and what is ignored"
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()


def test_it_starts_from_a_checkpoint_of_the_same_fold(world):
    first = build(world, start="scratch")
    first.num_epochs = 1
    first.run_training()
    path = os.path.join("PseudoLabelTrainer__P__2d", "fold_{fold}", "checkpoint_final.pth")
    second = build(world, start=path, pseudo_labels=NAME)
    second.on_train_start()
    saved = torch.load(os.path.join(first.output_folder, "checkpoint_final.pth"), weights_only=False)
    weights = second.network.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in saved["network_weights"].items())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": "nowhere.pth"}, "the setting start is 'nowhere.pth', but there is no .*nowhere.pth: give denoiser"),
        ({"start": "scratch", "pseudo_labels": "none/round_1"}, "has no pseudo labels"),
        ({"start": "scratch", "pseudo_labels": "../nnUNetCompactPlans_2d"}, "cannot be the name of a file or folder"),
        ({}, "no denoiser to start from"),
    ],
)
def test_what_it_cannot_start_from_is_named(world, settings, message):
    with pytest.raises(UserError, match=message):
        build(world, **settings).on_train_start()


def test_a_cascade_is_refused_by_name(world):
    trainer = build(world, start="scratch")
    trainer.is_cascaded = True
    with pytest.raises(UserError, match="2d is a cascade's second stage"):
        trainer.initialize()


def test_annotations_that_came_after_the_splits_are_trained_on_and_never_validated_on(world):
    path = world / "splits_final.json"
    before = path.read_text()
    path.write_text(
        json.dumps([{"train": ["tiny_000"], "val": ["tiny_003"]}, {"train": ["tiny_003"], "val": ["tiny_004"]}])
    )
    try:
        trainer = build(world, start="scratch")
        trainer.initialize()
        assert trainer.do_split() == (["tiny_000", "tiny_001", "tiny_002"], ["tiny_003"])
    finally:
        path.write_text(before)
