"""AdamW; schedules of learning rates, which keep the ratio between parameter groups, and of loss weights; averages."""

from collections.abc import Callable, Iterable

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn


def adamw(parameters: Iterable, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Builds AdamW, fused where torch can: a quarter of the time on a CPU, 2 % of a step of a small network."""
    try:
        return torch.optim.AdamW(parameters, rate, weight_decay=weight_decay, fused=True)
    except RuntimeError:  # this device or this torch cannot
        return torch.optim.AdamW(parameters, rate, weight_decay=weight_decay)


class WarmupPolyLR(LRScheduler):
    """nnU-Net's polynomial decay after a linear warm-up, for every parameter group from its own initial rate.

    With no warm-up and one group this is nnU-Net's `PolyLRScheduler`, which would give all groups the same rate.
    """

    def __init__(self, optimizer: Optimizer, epochs: int, warmup_epochs: int = 0, exponent: float = 0.9):
        self.initial_rates = [group["lr"] for group in optimizer.param_groups]
        self.epochs, self.warmup_epochs, self.exponent = epochs, warmup_epochs, exponent
        super().__init__(optimizer)

    def factor(self, epoch: int) -> float:
        """Returns the share of the initial rate at an epoch."""
        if epoch < self.warmup_epochs:
            return (epoch + 1) / (self.warmup_epochs + 1)
        progress = (epoch - self.warmup_epochs) / max(1, self.epochs - self.warmup_epochs)
        return (1 - progress) ** self.exponent

    def step(self, current_step: int | None = None) -> None:
        """Sets the rates for an epoch; as nnU-Net calls its own scheduler."""
        for group, rate in zip(self.optimizer.param_groups, self.initial_rates, strict=True):
            group["lr"] = rate * self.factor(current_step or 0)


def ramp_up(epoch: int, num_epochs: int, share: float) -> float:
    """Returns the weight of a loss term that grows linearly from 0 in the first epoch to 1 after a share of epochs."""
    return min(1.0, epoch / (share * num_epochs)) if share > 0 else 1.0


def warming_ema(decay: float) -> Callable:
    """Returns an exponential moving average whose decay starts low, min(decay, (1 + n) / (10 + n)) after n updates.

    Returns:
        A `multi_avg_fn` for `torch.optim.swa_utils.AveragedModel`.
    """

    @torch.no_grad()
    def average(averaged: list, current: list, num_averaged: torch.Tensor | int) -> None:
        n = int(num_averaged)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, num_averaged)

    return average
