"""The mean teacher through nnU-Net's own training loop, on a tiny data set."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.export import export_stock
from nnunet_diffusion.model_folder import load_predictor, trainers_of
from nnunet_diffusion.trainers.DenoisingDiffusionTrainer import DenoisingDiffusionTrainer
from nnunet_diffusion.trainers.DiffusionPretrainedTrainer import DiffusionPretrainedTrainer
from nnunet_diffusion.trainers.MeanTeacherTrainer import MeanTeacherTrainer

pytestmark = pytest.mark.slow  # each trains in nnU-Net's own loop, which takes seconds
NAME = "MeanTeacherTrainer"
SETTINGS = {"num_epochs": 3, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 2, "seed": 0,
            "start": "scratch", "confidence": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny data set."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        yield tiny.prepare()


@pytest.fixture
def plans(world):
    """Writes a plan of the tiny data set with other settings and returns its name."""

    def write(name, change=lambda plans: plans, **settings):
        content = json.loads((world / f"{tiny.PLANS}.json").read_text())
        block = {NAME: {**SETTINGS, **settings}, "DiffusionPretrainedTrainer": {"seed": 0, "start": "scratch"}}
        tiny.write_plans(change(content), name, **block)
        return name

    return write


@pytest.fixture
def ready(monkeypatch):
    """Lets the pool in after the first epoch: in so few steps a network recognizes nothing."""
    monkeypatch.setattr(MeanTeacherTrainer, "is_ready", lambda self: self.current_epoch >= 1)


def trained(plans, configuration="2d", cls=MeanTeacherTrainer):
    trainer = tiny.trainer(cls, configuration, plans=plans)
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    return trainer


def copied(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def equal(first, second):
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def log_of(trainer):
    return Path(trainer.log_file).read_text()


@pytest.mark.parametrize(
    ("configuration", "kind", "norm", "settings"),
    [
        ("2d", "PlainConvUNet", "InstanceNorm", {}),
        ("3d_fullres", "ResidualEncoderUNet", "BatchNorm", {"paste": "both", "absent": "unknown"}),
        ("2d", "ResidualEncoderUNet", "InstanceNorm", {"paste": "none", "adaptive": False}),
    ],
)
def test_it_trains_on_every_topology_and_is_stock(plans, ready, tmp_path, configuration, kind, norm, settings):
    name = plans(f"T{kind}{norm}", lambda p: tiny.shrunk(p, kind, norm), **settings)
    trainer = trained(name, configuration)
    log = log_of(trainer)
    assert log.count("Pool: loss") == 2 and log.count("From this epoch on the teacher labels the pool") == 1
    assert "the teacher is sure of 100.0% of the voxels" in log, "confidence 0"
    export_stock(trainer.output_folder_base, str(tmp_path / "stock"), ["0"], "checkpoint_final.pth")
    with trainers_of(""):
        plain = load_predictor(str(tmp_path / "stock"), [0], "checkpoint_final.pth")
    trainer.set_deep_supervision_enabled(False)
    patch = torch.randn(1, 1, *trainer.configuration_manager.patch_size)
    with torch.no_grad():
        plain.network.load_state_dict(plain.list_of_parameters[0])
        assert torch.equal(plain.network.eval()(patch), trainer.network.eval()(patch))


def test_until_the_pool_is_let_in_it_is_supervised_training(plans, monkeypatch):
    """The student recognizes nothing, and the log says what the pool waits for."""
    name = plans("Waits", supervised_share=0.3)
    monkeypatch.setattr(f"nnunet_diffusion.trainers.{NAME}.hard_counts", lambda *_: np.zeros((3, 3)))
    ours = trained(name)
    control = tiny.trainer(DiffusionPretrainedTrainer, plans=name)
    control.num_epochs = 3
    control.run_training()
    assert "The pool waits: on labeled patches the student does not recognize ['left ball', 'right" in log_of(ours)
    assert "Pool: loss" not in log_of(ours)
    for key, weight in control.network.state_dict().items():
        torch.testing.assert_close(weight, ours.network.state_dict()[key], atol=1e-5, rtol=1e-4)


def test_the_pool_is_let_in_when_every_label_is_recognized(plans):
    trainer = tiny.trainer(MeanTeacherTrainer, plans=plans("Ready", supervised_share=0.5))
    trainer.initialize()
    trainer.current_epoch = 1
    trainer.counts[0] = 1
    assert not trainer.is_ready(), "1 of 3 epochs is less than half"
    trainer.current_epoch = 2
    assert trainer.is_ready()
    trainer.counts[2, 1] = 17  # a Dice of 2 / 19
    assert trainer.is_ready()
    trainer.counts[2, 1] = 19  # 2 / 21
    assert not trainer.is_ready()
    assert "the student does not recognize ['right ball'] yet" in log_of(trainer)


def test_what_is_recognized_is_counted_on_labeled_patches_of_an_epoch(plans, monkeypatch):
    trainer = tiny.trainer(MeanTeacherTrainer, plans=plans("Counted", supervised_share=1.0))
    trainer.on_train_start()
    seen, forward = [], trainer.network.forward
    monkeypatch.setattr(trainer.network, "forward", lambda x: seen.append(forward(x)) or seen[-1])
    for epoch in range(2):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        seen.clear()
        batches = [next(trainer.dataloader_train) for _ in range(2)]
        for batch in batches:
            trainer.train_step(batch)
    expected = np.zeros((3, 3))
    for output, batch in zip(seen, batches, strict=True):
        predicted, target = output[0].argmax(1).numpy(), batch["target"][0][:, 0].numpy()
        for c in (1, 2, 3):
            of_class = (
                (predicted == c) & (target == c),
                (predicted == c) & (target != c),
                (predicted != c) & (target == c),
            )
            expected[:, c - 1] += [voxels.sum() for voxels in of_class]
    assert np.array_equal(trainer.counts, expected) and expected.any(), "of the last epoch alone"


def test_the_teacher_is_the_average_and_learns_by_nothing_else(plans, ready):
    name = plans("Average", ema_decay=0.5)
    trainer = tiny.trainer(MeanTeacherTrainer, plans=name)
    trainer.on_train_start()
    assert equal(copied(trainer.network), trainer.teacher.module.state_dict()), "it starts where the student starts"
    expected = copied(trainer.network)
    for epoch in range(2):
        trainer.current_epoch = epoch
        trainer.on_train_epoch_start()
        for _ in range(2):
            trainer.train_step(next(trainer.dataloader_train))
            n = int(trainer.teacher.n_averaged) - 1  # the first average is a copy; its decay starts low
            decay = min(0.5, (1 + n) / (10 + n)) if n else 0.0
            for key, weight in trainer.network.state_dict().items():
                expected[key] = decay * expected[key] + (1 - decay) * weight
    for key, weight in trainer.teacher.module.state_dict().items():
        torch.testing.assert_close(weight, expected[key], atol=1e-6, rtol=1e-5)
    assert all(p.grad is None for p in trainer.teacher.parameters()) and not trainer.teacher.training


def test_a_mixed_batch_has_true_labels_where_it_is_labeled_and_the_teachers_elsewhere(plans, ready, monkeypatch):
    trainer = tiny.trainer(MeanTeacherTrainer, plans=plans("Mixed", absent="background", confidence=0.6))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    shape, seen = (2, 1, 16, 16), {}
    weak, strong, labeled = torch.zeros(shape), torch.ones(shape), torch.full(shape, 2.0)
    monkeypatch.setattr(trainer, "next_of_pool", lambda: torch.cat([weak, strong], 1))
    pseudo = torch.full(shape, 4)  # of the ignore label: the teacher is not sure ...
    pseudo[:, :, 8:] = 3  # but of the lower half
    assert trainer.label_manager.ignore_label == 4
    monkeypatch.setattr(trainer, "labels_of_teacher", lambda images: seen.update(teacher=images) or pseudo)
    network = trainer.network
    monkeypatch.setattr(trainer, "network", lambda images: seen.update(student=images) or network(images))
    loss_of = trainer.loss.forward
    monkeypatch.setattr(trainer.loss, "forward", lambda o, targets: seen.update(targets=targets) or loss_of(o, targets))
    report = trainer.learn_from_pool(["tiny_000", "tiny_001"], labeled, torch.ones(shape))
    assert torch.equal(seen["teacher"], weak), "the teacher sees the pool as it is"
    is_labeled = seen["student"] == 2
    assert is_labeled.any() and torch.equal(seen["student"][~is_labeled], strong[~is_labeled])
    target = seen["targets"][0]
    assert (target[is_labeled] == 1).all() and torch.equal(target[~is_labeled], pseudo[~is_labeled])
    assert seen["targets"][1].shape == (2, 1, 8, 8) and set(seen["targets"][1].unique().tolist()) <= {1, 3, 4}
    assert report["is_sure"].tolist() == [0.5, 0.5] and report["found"].tolist() == pytest.approx([1 / 3, 1 / 3])


def test_resumed_it_is_the_uninterrupted_one(plans, ready):
    whole = trained(plans("Whole"))

    class Interrupted(MeanTeacherTrainer):
        def on_epoch_start(self):
            if self.current_epoch == 2:
                raise KeyboardInterrupt
            super().on_epoch_start()

    Interrupted.__name__ = NAME
    name = plans("Resumed", save_every=1)
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(Interrupted, plans=name).run_training()
    resumed = tiny.trainer(MeanTeacherTrainer, plans=name, resume=True)
    resumed.load_checkpoint(os.path.join(resumed.output_folder, "checkpoint_latest.pth"))
    assert resumed.first_epoch_with_pool == 1
    resumed.run_training()
    assert equal(copied(whole.network), resumed.network.state_dict())
    assert equal(copied(whole.teacher), resumed.teacher.state_dict())
    assert torch.equal(whole.thresholds.usual, resumed.thresholds.usual)


@pytest.fixture
def dataset_json(world):
    """Changes dataset.json for the length of a test."""
    path = world / "dataset.json"
    complete = path.read_text()
    yield lambda **tables: path.write_text(json.dumps({**json.loads(complete), **tables}))
    path.write_text(complete)


def test_partial_labels_train(plans, ready, dataset_json):
    dataset_json(annotated_labels={"tiny_000": ["box"], "tiny_001": ["left ball", "right ball"]})
    assert "Pool: loss" in log_of(trained(plans("Partial")))


def test_an_ignore_label_of_the_data_set_is_the_one_for_what_is_unsure(plans, ready, dataset_json):
    dataset_json(labels={**tiny.LABELS, "ignore": 4})
    trainer = tiny.trainer(MeanTeacherTrainer, plans=plans("Ignore"))
    trainer.initialize()
    assert trainer.label_manager.has_ignore_label and trainer.label_manager.ignore_label == 4
    batch = {"data": torch.randn(2, 1, 16, 16), "keys": ["tiny_000", "tiny_001"]}
    batch["target"] = [torch.randint(0, 5, (2, 1, size, size)) for size in (16, 8)]
    trainer.uses_pool, trainer.pool_weight = True, 0.5
    trainer.next_of_pool = lambda: torch.randn(2, 2, 16, 16)
    before = copied(trainer.network)
    report = trainer.train_step(batch)
    assert np.isfinite([report["loss"], report["pool_loss"]]).all() and not equal(before, trainer.network.state_dict())


def test_what_it_cannot_do_is_refused_by_name(world, plans, dataset_json):
    dataset_json(labels={"background": 0, "balls": [1, 2], "left": 1, "box": 3}, regions_class_order=[1, 2, 3])
    with pytest.raises(UserError, match="MeanTeacherTrainer: regions overlap"):
        tiny.trainer(MeanTeacherTrainer, plans=plans("Regions"))
    dataset_json(annotated_labels={f"tiny_{i:03d}": ["left ball", "right ball"] for i in range(3)})
    with pytest.raises(UserError, match=r"no training case annotates \['box'\]"):
        tiny.trainer(MeanTeacherTrainer, plans=plans("Unknown")).initialize()
    with pytest.raises(UserError, match="MeanTeacherTrainer.paste is 'all': it must be both or into_pool or none"):
        tiny.trainer(MeanTeacherTrainer, plans=plans("Paste", paste="all"))


def test_it_starts_from_the_data_sets_own_denoiser(world, plans, ready):
    with pytest.raises(UserError, match="no denoiser to start from"):
        tiny.trainer(MeanTeacherTrainer, plans=plans("Denoised", start="denoiser")).on_train_start()
    tiny.trainer(DenoisingDiffusionTrainer, fold="all", plans="Denoised").run_training()
    trainer = tiny.trainer(MeanTeacherTrainer, plans="Denoised")
    trainer.on_train_start()
    assert "denoiser.pth, folded at timestep 50" in log_of(trainer)
    assert equal(copied(trainer.network), trainer.teacher.module.state_dict())
