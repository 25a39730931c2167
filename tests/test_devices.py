"""Every trainer on an emulated CUDA device, which refuses what a GPU would refuse."""

import os

import every_trainer
import numpy as np
import pytest
import torch
from emulated_cuda import CudaTensor, emulated_cuda
from every_trainer import CONFIGURATIONS, TRAINERS, VARIANTS

pytestmark = pytest.mark.slow
EVERY = [*((configuration, *case) for configuration in CONFIGURATIONS for case in TRAINERS)]
EVERY += [("2d", *case) for case in VARIANTS]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        yield every_trainer.prepare()


def test_the_emulated_device_refuses_what_cuda_refuses():
    with emulated_cuda() as device:
        x, y = torch.randn(2, 3, device=device), torch.randn(2, 3)
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            x + y
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            torch.cat([x, y])
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            y[torch.zeros(1, dtype=torch.long, device=device)]
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            x.numpy()
        assert (x + torch.tensor(1.0)).device == x[torch.tensor([0])].device == torch.device("cuda", 0)
        assert x.to(torch.float64).dtype == torch.float64 and type(x.cpu()) is torch.Tensor
        with torch.autocast("cuda"):
            product = x @ x.T
            dtypes = [value.dtype for value in (product, product.softmax(1), product.sum())]
            assert dtypes == [torch.float16, torch.float32, torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        assert y.bfloat16().softmax(1).dtype == torch.bfloat16, "the CPU's own list is back"


def test_gradients_of_the_emulated_device_are_those_of_the_cpu():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.InstanceNorm2d(4, affine=True), torch.nn.ReLU())
    x = torch.randn(2, 1, 8, 8)
    network(x).square().mean().backward()
    expected = [p.grad.clone() for p in network.parameters()]
    with emulated_cuda() as device:
        on_device = network.to(device)
        on_device.zero_grad()
        on_device(x.to(device)).square().mean().backward()
        found = [p.grad.cpu() for p in on_device.parameters()]
    torch.testing.assert_close(found, expected)


def tensors_of(trainer):
    """Weights, buffers, and what the optimizer keeps for them."""
    networks = [*trainer.trained_networks(), *(getattr(trainer, name) for name in ("ema",) if hasattr(trainer, name))]
    kept = [value for state in trainer.optimizer.state.values() for value in state.values()]
    kept = [value for value in kept if isinstance(value, torch.Tensor) and value.ndim]
    return [*(tensor for network in networks for tensor in network.state_dict().values()), *kept]


@pytest.mark.parametrize(("configuration", "name", "settings"), EVERY, ids=every_trainer.name_of)
def test_every_trainer_steps_and_resumes_on_cuda(world, configuration, name, settings):
    with emulated_cuda() as device:
        trainer = every_trainer.build(name, configuration, settings, device=device)
        trainer.on_train_start()
        assert trainer.device == device and trainer.grad_scaler.is_enabled()
        steps = every_trainer.train(trainer)
        trainer.on_train_epoch_end(steps)
        checks = every_trainer.validate(trainer)
        trainer.on_validation_epoch_end(checks)
        assert np.isfinite([report["loss"] for report in [*steps, *checks]]).all()
        assert [t.shape for t in tensors_of(trainer) if t.ndim and not isinstance(t, CudaTensor)] == []  # but scalars
        path = os.path.join(trainer.output_folder, "checkpoint_latest.pth")
        trainer.save_checkpoint(path)
        resumed = every_trainer.build(name, configuration, settings, resume=True, device=device)
        resumed.load_checkpoint(path)
        before, after = ([tensor.cpu() for tensor in tensors_of(one)] for one in (trainer, resumed))
        assert len(before) == len(after) and all(map(torch.equal, before, after))
        assert resumed.grad_scaler.get_scale() == trainer.grad_scaler.get_scale() > 1
        resumed.on_train_start()
        assert np.isfinite([report["loss"] for report in every_trainer.train(resumed, 1)]).all()


@pytest.mark.parametrize("name", ["DenoisingDiffusionTrainer", "DiffusionTeacherTrainer"])
def test_sheets_are_drawn_on_cuda(world, name):
    with emulated_cuda() as device:
        trainer = every_trainer.build(name, device=device)
        trainer.on_train_start()
        trainer.draw_samples("samples.png")
    assert os.path.isfile(os.path.join(trainer.output_folder, "samples.png"))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float16), ("bf16", torch.bfloat16), ("none", torch.float32)]
)
def test_precision_on_cuda(world, precision, dtype):
    seen = set()
    with emulated_cuda() as device:
        trainer = every_trainer.build("PartialLabelTrainer", device=device, mixed_precision=precision)
        trainer.on_train_start()
        for module in trainer.network.modules():
            if isinstance(module, torch.nn.Conv2d):
                module.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
        reports = [*every_trainer.train(trainer), *every_trainer.validate(trainer)]
    assert np.isfinite([report["loss"] for report in reports]).all()
    assert seen == {dtype} and (trainer.grad_scaler is None) == (precision != "auto")


def test_a_forgotten_transfer_is_found(world, monkeypatch):
    """As on a GPU, a step that leaves the images where the loader made them ends in an error."""
    with emulated_cuda() as device:
        trainer = every_trainer.build("PartialLabelTrainer", device=device)
        trainer.on_train_start()
        trainer.device = torch.device("cpu")
        with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
            every_trainer.train(trainer, 1)
