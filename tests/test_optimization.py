"""The optimizer and its schedule, against torch's and nnU-Net's own."""

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunet_diffusion.optimization import WarmupPolyLR, adamw


def weights():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(2)]


def steps(optimizer, parameters, number=10):
    torch.manual_seed(1)
    for _ in range(number):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


@pytest.mark.parametrize("can_fuse", [True, False])
def test_adamw_steps_as_torchs_does(monkeypatch, can_fuse):
    """Two groups, one with a rate of its own; also where torch cannot fuse."""
    ours, theirs = weights(), weights()
    groups = [[{"params": w[:1]}, {"params": w[1:], "lr": 0.05}] for w in (ours, theirs)]
    reference = torch.optim.AdamW(groups[1], 0.01, weight_decay=0.1)
    if not can_fuse:
        real = torch.optim.AdamW

        def unfused(*args, fused=False, **kwargs):
            if fused:
                raise RuntimeError("`fused=True` requires another device")
            return real(*args, **kwargs)

        monkeypatch.setattr(torch.optim, "AdamW", unfused)
    optimizer = adamw(groups[0], 0.01, 0.1)
    assert bool(optimizer.defaults["fused"]) == can_fuse
    steps(optimizer, ours)
    steps(reference, theirs)
    torch.testing.assert_close(ours, theirs)


def test_without_warm_up_the_schedule_is_nnunets():
    ours, theirs = (torch.optim.SGD(weights(), 0.3) for _ in range(2))
    pair = WarmupPolyLR(ours, 7), PolyLRScheduler(theirs, 0.3, 7)
    for epoch in range(7):
        for scheduler in pair:
            scheduler.step(epoch)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
