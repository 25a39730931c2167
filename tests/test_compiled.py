"""Every trainer under torch.compile, the default on a GPU: its graphs are run as they are, so no compiler is needed."""

from functools import partial

import every_trainer
import numpy as np
import pytest
import torch
from every_trainer import TRAINERS, VARIANTS
from torch._dynamo.testing import CompileCounter

from nnunet_diffusion.trainers.ConfiguredTrainer import ConfiguredTrainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        yield every_trainer.prepare()


@pytest.mark.parametrize(("name", "settings"), [*TRAINERS, *VARIANTS], ids=every_trainer.name_of)
def test_every_trainer_trains_compiled(world, monkeypatch, name, settings):
    """The same losses as without: the graphs compute what the networks do."""
    plain, graphs = losses(name, settings), CompileCounter()
    torch._dynamo.reset()
    compile_with = partial(torch.compile, backend=graphs)
    monkeypatch.setattr(torch, "compile", lambda what, *args, **kwargs: compile_with(what))
    monkeypatch.setattr(ConfiguredTrainer, "_do_i_compile", lambda self: True)
    np.testing.assert_allclose(losses(name, settings), plain, rtol=1e-3)
    assert np.isfinite(plain).all() and graphs.frame_count > 0


def losses(name, settings):
    """Those of two train steps and of a validation step."""
    trainer = every_trainer.build(name, settings=settings)
    trainer.on_train_start()
    return [float(report["loss"]) for report in [*every_trainer.train(trainer), *every_trainer.validate(trainer)]]
