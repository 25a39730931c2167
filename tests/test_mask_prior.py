"""A diffusion model of masks: what it sees, what it learns, what it draws."""

import json

import numpy as np
import pytest
import tiny
import torch
from test_mask_diffusion import CHANNELS, CLASSES, pathway

from nnunet_diffusion.co_training.mask_diffusion import Draw
from nnunet_diffusion.co_training.mask_prior import MaskPrior
from nnunet_diffusion.trainers.DiffusionMeanTeacherTrainer import DiffusionMeanTeacherTrainer


def prior(dim=2):
    made = MaskPrior(pathway("PlainConvUNet", dim, CLASSES), CLASSES)
    made.pathway.input_scale.fill_(1)
    made.calibrate(torch.tensor([0.5, 2.0]), torch.tensor([-9.0, 9.0]))
    return made


def test_a_mask_is_yes_no_or_blank():
    labels = torch.tensor([[[[0, 2], [9, -1]]]])  # 9 is ignored, -1 outside
    assert prior().encode(labels)[0].permute(1, 2, 0).tolist() == [
        [[1, -1, -1], [-1, -1, 1]], [[0, 0, 0], [0, 0, 0]],
    ]  # fmt: skip


@pytest.mark.parametrize("dim", [2, 3])
def test_denoising_by_hand(dim):
    made = prior(dim)
    images = torch.randn(2, CHANNELS, *[8] * dim)
    labels, draw = torch.randint(0, CLASSES, (2, 1, *[8] * dim)), made.draw(images)
    logits = made.denoise(images, labels, draw)
    scale = torch.tensor([0.5, 2.0]).reshape(-1, *[1] * dim)
    for b in range(2):
        a = made.alpha_bar[draw.timestep[b]]
        mask = torch.stack([2.0 * (labels[b, 0] == c) - 1 for c in range(CLASSES)])
        seen = torch.cat([a.sqrt() * mask + (1 - a).sqrt() * draw.noise[b], images[b] / scale])[None]
        alone = made.pathway(seen, draw.timestep[b : b + 1])[0]
        torch.testing.assert_close(logits[b], alone, atol=1e-4, rtol=1e-4)


def test_samples_are_probabilities_and_one_step_is_the_network_itself():
    made, images = prior().eval(), torch.randn(2, CHANNELS, 8, 8)
    drawn = made.sample(images, 4)
    assert drawn.shape == (2, CLASSES, 8, 8) and drawn.min() >= -1e-5
    torch.testing.assert_close(drawn.sum(1), torch.ones(2, 8, 8), atol=1e-4, rtol=1e-4)
    torch.manual_seed(0)
    one = made.sample(images, 1)
    torch.manual_seed(0)
    noise = made.draw(images).noise
    with torch.no_grad():
        expected = made.logits(noise, images, torch.tensor([999, 999])).softmax(1)
    torch.testing.assert_close(one, expected, atol=1e-3, rtol=1e-2)  # divided by sqrt(alpha_bar), near 0 there


def test_a_model_that_knows_the_mask_draws_it(monkeypatch):
    """Whatever the noise, and in any number of steps."""
    made, images = prior(), torch.randn(2, CHANNELS, 8, 8)
    labels = torch.randint(0, CLASSES, (2, 1, 8, 8))
    monkeypatch.setattr(made, "logits", lambda x_t, images, timestep: 50 * made.encode(labels))
    for steps in (1, 2, 5):
        assert torch.equal(made.sample(images, steps).argmax(1), labels[:, 0])


def test_it_learns_to_denoise():
    """Images say nothing; a mask that is hardly noised is read off its noised self."""
    torch.manual_seed(0)
    made = MaskPrior(pathway("PlainConvUNet", 2, CLASSES).float(), CLASSES).train()
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    images, losses = torch.zeros(4, CHANNELS, 8, 8), []
    for _ in range(60):
        labels = torch.randint(0, CLASSES, (4, 1, 8, 8))
        draw = Draw(torch.full((4,), 200), torch.randn(4, CLASSES, 8, 8))
        loss = torch.nn.functional.cross_entropy(made.denoise(images, labels, draw), labels[:, 0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert np.mean(losses[-5:]) < 0.65 * np.mean(losses[:5]) and np.mean(losses[-5:]) < 0.65 * np.log(CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_it_trains_beside_the_mean_teacher_and_is_resumed(monkeypatch, tmp_path, configuration):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tiny.prepare()
    settings = {"start": "scratch", "seed": 0, "supervised_share": 0.5, "least_dice": 0.0}
    content = json.loads((folder / f"{tiny.PLANS}.json").read_text())
    tiny.write_plans(content, MeanTeacherTrainer=settings)
    trainer = tiny.trainer(DiffusionMeanTeacherTrainer, configuration)
    trainer.initialize()
    before = {name: tensor.clone() for name, tensor in trainer.prior.state_dict().items()}
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    after = trainer.prior.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before if "seg_layers" in name)
    assert (after["pathway.input_scale"][-1] != 1) and "Pool: loss" in open(trainer.log_file).read()
    images = torch.randn(2, 1, *trainer.configuration_manager.patch_size)
    torch.manual_seed(1)
    mixed = trainer.teacher_probabilities(images)
    torch.manual_seed(1)
    drawn, plain = trainer.prior.eval().sample(images, 3), super(type(trainer), trainer).teacher_probabilities(images)
    torch.testing.assert_close(mixed, (drawn + plain) / 2, atol=1e-5, rtol=1e-4)
    resumed = tiny.trainer(DiffusionMeanTeacherTrainer, configuration, resume=True)
    resumed.load_checkpoint(f"{trainer.output_folder}/checkpoint_final.pth")
    assert all(torch.equal(after[name], tensor) for name, tensor in resumed.prior.state_dict().items())
