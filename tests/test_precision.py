"""The setting mixed_precision: as it comes exactly nnU-Net's, in bfloat16 every step of every trainer."""

from functools import partial

import every_trainer
import numpy as np
import pytest
import tiny
import torch
from every_trainer import TRAINERS, VARIANTS
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.nn.modules.module import register_module_forward_hook

from nnunet_diffusion.trainers.ConfiguredTrainer import ConfiguredTrainer
from nnunet_diffusion.trainers.PartialLabelTrainer import PartialLabelTrainer

pytestmark = pytest.mark.slow
# Their losses are of masks of one class a voxel, of which a network that has learned nothing is nowhere sure.
OF_HARD_MASKS = ("DiffusionTeacherTrainer", "DiffusionCoTrainingTrainer", "DiffusionCoTrainingTwinTrainer")
CONVOLUTIONS = (torch.nn.Conv2d, torch.nn.Conv3d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        yield every_trainer.prepare()


def batch(trainer):
    """A random batch whose cases annotate everything, for nnU-Net's own steps."""
    scales = range(len(trainer._get_deep_supervision_scales()))
    target = torch.randint(0, 4, (2, 1, 16, 16))
    return {"data": torch.randn(2, 1, 16, 16), "target": [target[:, :, :: 2**s, :: 2**s] for s in scales]}


@pytest.mark.parametrize("cls", [ConfiguredTrainer, PartialLabelTrainer])
def test_as_it_comes_a_step_is_nnunets_bit_by_bit(world, cls):
    """Two steps and a validation step, of which the counts are the same as well."""
    every_trainer.build(cls.__name__, settings={"exclusion_weight": 0.0} if cls is PartialLabelTrainer else {})
    reports, weights = [], []
    for kind in (nnUNetTrainer, cls):
        trainer = tiny.trainer(kind)
        torch.manual_seed(1)
        trainer.initialize()
        trainer.annotations = {} if kind is nnUNetTrainer else dict.fromkeys(["a", "b"], every_trainer.ALL)
        torch.manual_seed(2)
        trainer.network.load_state_dict({k: torch.randn_like(v) / 9 for k, v in trainer.network.state_dict().items()})
        batches = [{**batch(trainer), "keys": ["a", "b"]} for _ in range(3)]
        trainer.network.train()
        steps = [trainer.train_step(batches[0]), trainer.train_step(batches[1])]
        with torch.no_grad():
            reports.append([*steps, trainer.validation_step(batches[2])])
        weights.append(trainer.network.state_dict())
    for nnunet, ours in zip(*reports, strict=True):
        assert nnunet.keys() == ours.keys()
        for key in nnunet:
            np.testing.assert_array_equal(nnunet[key], ours[key])
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())


def note_dtype(seen, module, inputs, output):
    """Is told of every module that computes something; notes in what a convolution does."""
    if isinstance(module, CONVOLUTIONS):
        seen.add(output.dtype)


@pytest.mark.parametrize(("name", "settings"), [*TRAINERS, *VARIANTS], ids=every_trainer.name_of)
def test_every_step_of_every_trainer_is_in_bfloat16(world, name, settings):
    """And has the losses of float32 to about two digits."""
    losses = {}
    for precision, dtype in (("none", torch.float32), ("bf16", torch.bfloat16)):
        trainer = every_trainer.build(name, settings=settings, mixed_precision=precision)
        trainer.on_train_start()
        assert trainer.grad_scaler is None
        for work in (every_trainer.train, every_trainer.validate):
            seen = set()
            hook = register_module_forward_hook(partial(note_dtype, seen))
            losses.setdefault(precision, []).extend(float(report["loss"]) for report in work(trainer))
            hook.remove()
            assert seen == {dtype}
        assert {p.dtype for p in trainer.network.parameters()} == {torch.float32}
    assert losses["bf16"] != losses["none"]
    rtol = 0.1 if name in OF_HARD_MASKS else 0.01
    np.testing.assert_allclose(losses["bf16"], losses["none"], rtol=rtol)


def test_float16_needs_a_gpu(world):
    trainer = every_trainer.build("ConfiguredTrainer")
    with trainer.autocast():
        assert not torch.is_autocast_enabled("cpu"), "as it comes, a CPU computes in float32"
