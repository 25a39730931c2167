"""What only a GPU shows; skipped without one. `benchmarks/gpu_check.sh` runs these first."""

import json
import os

import numpy as np
import pytest
import tiny
import torch

from nnunet_diffusion.trainers.DenoisingDiffusionTrainer import DenoisingDiffusionTrainer
from nnunet_diffusion.trainers.DiffusionPretrainedTrainer import DiffusionPretrainedTrainer
from nnunet_diffusion.trainers.MeanTeacherTrainer import MeanTeacherTrainer

pytestmark = [
    pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny data set; compiled, as nnU-Net does on a GPU, and with two workers."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        patch.setenv("nnUNet_compile", "true")
        patch.setenv("nnUNet_n_proc_DA", "2")
        folder = tiny.prepare()
        content = json.loads((folder / f"{tiny.PLANS}.json").read_text())
        tiny.write_plans(content, MeanTeacherTrainer={"supervised_share": 0.0, "least_dice": 0.0})
        yield folder


def on_cuda(cls, configuration, **kwargs):
    trainer = tiny.trainer(cls, configuration, **kwargs)
    content = trainer.my_init_kwargs
    return cls(**{**content, "plans": {**content["plans"], "continue_training": False}, "device": torch.device("cuda")})


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_the_whole_way_on_a_gpu(world, configuration):
    """Pre-train, fine-tune with and without the pool; nothing is left on the CPU, and checkpoints load there."""
    for cls in (DenoisingDiffusionTrainer, DiffusionPretrainedTrainer, MeanTeacherTrainer):
        trainer = on_cuda(cls, configuration)
        trainer.run_training()
        assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
        assert {p.device.type for p in trainer.network.parameters()} == {"cuda"}
        path = os.path.join(trainer.output_folder, "checkpoint_final.pth")
        resumed = tiny.trainer(cls, configuration, resume=True)
        resumed.load_checkpoint(path)
        assert {p.device.type for p in resumed.network.parameters()} == {"cpu"}


def test_half_precision_is_active(world):
    trainer = on_cuda(DiffusionPretrainedTrainer, "2d")
    trainer.on_train_start()
    seen = []
    convolution = next(m for m in trainer.network.modules() if isinstance(m, torch.nn.Conv2d))
    convolution.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    assert seen == [torch.float16] and trainer.grad_scaler is not None
