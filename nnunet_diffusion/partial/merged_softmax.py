"""A softmax whose classes are merged per case, reduced to what marginal losses need of it.

Merging adds probabilities. All losses in `partial` are functions of the few numbers below, so the probabilities, which
are as large as the network's output, are never kept: the backward pass makes them again.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Values of a temporary tensor: what stays in a CPU's cache, and what keeps a GPU busy (64 MiB).
SLAB_VALUES = {"cpu": 2**17, "cuda": 2**24}


class MergedSoftmax(NamedTuple):
    """Sums over the voxels of every case; p_c is the softmax, a class's group is what it is merged into.

    Ignored voxels count nowhere.
    """

    log_target: Tensor  # (B, V) log of the summed p of the target's group, 0 where ignored
    mass: Tensor  # (B, C) sum of p_c
    inside: Tensor  # (B, C) sum of p_c where the target belongs to the group of c
    voxels: Tensor  # (B, C) how many voxels these are
    group: Tensor  # (B, C) int64, the channel that stands for the group of c


def merged_softmax(logits: Tensor, target: Tensor, group: Tensor, ignore_label: int | None = None) -> MergedSoftmax:
    """Computes the softmax, merges it by `group` and reduces it.

    Args:
        logits: (B, C, X, Y[, Z]) network output before the softmax; half precision is computed in float32.
        target: (B, 1, X, Y[, Z]) labels 0 ... C - 1 of any type, or `ignore_label`; merged by `group` as well.
        group: (B, C) int64: `group[b, c]` is the channel that class c of case b is merged into: c itself if it is
            annotated; 0, the background, if it is not; the first class of a union. Best on the CPU.
        ignore_label: Voxels of this label count nowhere.

    Raises:
        ValueError: If `group` does not fit the logits, or is no such map.
    """
    check_group(group)
    if group.shape != logits.shape[:2]:
        raise ValueError(f"group is {tuple(group.shape)}: it must be {tuple(logits.shape[:2])}, as the logits are")
    group = group.to(logits.device, non_blocking=True)
    target = target.flatten(1).long()
    valid = None
    if ignore_label is not None:
        valid = target != ignore_label
        target = torch.where(valid, target, 0)
    return MergedSoftmax(*_Reduce.apply(logits.flatten(2), group.gather(1, target), group, valid), group)


def check_group(group: Tensor) -> None:
    """Refuses what does not map each class of each case to a channel that stands for itself, background to 0.

    Raises:
        ValueError: As said.
    """
    if group.dtype != torch.int64 or group.ndim != 2:
        raise ValueError(f"group must be (B, C) int64, not {tuple(group.shape)} {group.dtype}")
    if group.min() < 0 or group.max() >= group.shape[1]:
        raise ValueError(f"group maps to channels {group.min()} to {group.max()}: there are {group.shape[1]}")
    if (group[:, 0] != 0).any() or (group.gather(1, group) != group).any():
        raise ValueError(f"group must map background to 0, and each channel that it maps to onto itself: {group}")


class _Reduce(torch.autograd.Function):
    """MergedSoftmax without its `group`. Shapes: logits (B, C, V), target and valid (B, V), group (B, C).

    With q the merged probability of the target, d log q / dz_c = r_c - p_c, where r is the softmax within the target's
    group, and dp_k / dz_c = p_k ([k = c] - p_c). Both passes go over the voxels slab by slab.
    """

    @staticmethod
    def forward(ctx, logits, target, group, valid):
        ctx.save_for_backward(logits, target, group, valid)
        log_target = logits.new_empty(target.shape, dtype=_precision(logits))
        mass, inside = (log_target.new_zeros(group.shape) for _ in range(2))
        voxels = torch.zeros_like(group)
        for slab in _slabs(logits):
            z, is_member = logits[..., slab].to(log_target.dtype), target[:, None, slab] == group[:, :, None]
            p, log_sum = _softmax(z)
            log_target[:, slab] = _softmax(torch.where(is_member, z, -torch.inf))[1] - log_sum
            if valid is not None:
                p.mul_(valid[:, None, slab])
                log_target[:, slab] *= valid[:, slab]
                is_member &= valid[:, None, slab]
            mass += p.sum(2)
            inside += p.mul_(is_member).sum(2)
            voxels += is_member.sum(2)
        ctx.mark_non_differentiable(voxels)
        return log_target, mass, inside, voxels

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_target, grad_mass, grad_inside, _):
        logits, target, group, valid = ctx.saved_tensors
        if valid is not None:
            grad_log_target = grad_log_target * valid
        grad = torch.empty_like(logits)
        for slab in _slabs(logits):
            z, is_member = logits[..., slab].to(grad_mass.dtype), target[:, None, slab] == group[:, :, None]
            r = torch.where(is_member, z, -torch.inf).softmax(1)
            p = z.softmax(1)
            # First the difference: it is exactly 0 where all classes are one group.
            grad_z = r.sub_(p).mul_(grad_log_target[:, None, slab])
            if valid is not None:
                p.mul_(valid[:, None, slab])
            weighted = torch.where(is_member, (grad_mass + grad_inside)[..., None], grad_mass[..., None]).mul_(p)
            grad_z.add_(weighted).addcmul_(p, weighted.sum(1, keepdim=True), value=-1)
            grad[..., slab] = grad_z
        return grad, None, None, None


def _softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the softmax (B, C, V) and the log of its denominator (B, V), by the largest p, at least 1 / C."""
    p = z.softmax(1)
    return p, z.amax(1) - p.amax(1).log()


def _precision(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _slabs(logits: Tensor) -> list[slice]:
    """Parts of the voxels, so that temporary tensors grow neither with the patch nor with the classes."""
    batch, classes, voxels = logits.shape
    size = max(1, SLAB_VALUES.get(logits.device.type, 2**24) // (batch * classes))
    return [slice(start, start + size) for start in range(0, voxels, size)]
