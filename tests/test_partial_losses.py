"""Losses of partly annotated cases: by hand, against nnU-Net's, against slow loops, and where gradients are 0."""

import itertools
import math
import socket

import pytest
import torch
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch.testing import assert_close

from nnunet_diffusion.partial import merged_softmax as module
from nnunet_diffusion.partial.losses import (
    PartialLabelLoss,
    annotated,
    exclusion_loss,
    marginal_cross_entropy,
    marginal_dice,
    merged_into_background,
)
from nnunet_diffusion.partial.merged_softmax import check_group, merged_softmax
from nnunet_diffusion.partial.region_loss import PartialRegionLoss

IGNORE = 5
SHAPE = (3, 4, 5)
BOTH_2, BOTH_3 = (list(itertools.product([False, True], repeat=number)) for number in (2, 3))
GROUPS = torch.tensor(
    [
        [0, 1, 2, 3, 4],  # everything
        [0, 0, 2, 0, 4],  # 1 and 3 are not annotated
        [0, 0, 2, 3, 3],  # 1 is not annotated, 3 and 4 only as a union
        [0, 0, 0, 0, 0],  # nothing
    ]
)


def example(groups=GROUPS, ignore=False, dtype=torch.float64, shape=SHAPE):
    """Random logits and labels; the labels know more than was annotated, which must not matter."""
    batch, classes = groups.shape
    logits = 2 * torch.randn(batch, classes, *shape, dtype=dtype)
    target = torch.randint(0, classes + ignore, (batch, 1, *shape))
    return logits.requires_grad_(), target


def evaluate(loss, annotation, logits, target):
    """The loss and the gradient of the logits."""
    with annotated(loss, annotation):
        value = loss(logits, target)
    return value.detach(), torch.autograd.grad(value, logits)[0]


def stock(batch_dice=False, ignore_label=None, do_bg=False):
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": do_bg, "ddp": False}
    return DC_and_CE_loss(dice, {}, 1, 1, ignore_label, MemoryEfficientSoftDiceLoss)


# 1. By hand.


def two_voxels(group, labels=(0, 1)):
    """Three classes; probabilities (1/2, 1/4, 1/4) and (1/8, 1/4, 5/8)."""
    p = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 4, 5 / 8]], dtype=torch.float64)
    logits = p.T.log()[None, :, :, None] + 7  # (1, 3, 2, 1); a constant does not matter
    return merged_softmax(logits, torch.tensor(labels).view(1, 1, 2, 1), torch.tensor([group]))


def test_merged_sums_by_hand():
    merged = two_voxels([0, 1, 0])  # class 2 is not annotated
    assert_close(merged.log_target.exp(), torch.tensor([[3 / 4, 1 / 4]], dtype=torch.float64))
    assert_close(merged.mass, torch.tensor([[5 / 8, 1 / 2, 7 / 8]], dtype=torch.float64))
    # The target of the first voxel is the group of classes 0 and 2, that of the second is class 1.
    assert_close(merged.inside, torch.tensor([[1 / 2, 1 / 4, 1 / 4]], dtype=torch.float64))
    assert merged.voxels.tolist() == [[1, 1, 1]]


def test_losses_by_hand():
    merged = two_voxels([0, 1, 0])
    # Merged: background 1/2 + 1/4 in the first voxel; class 1 in the second 1/4.
    assert marginal_cross_entropy(merged).item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)
    # Class 1: 2 * 1/4 over one voxel and a mass of 1/4 + 1/4.
    assert marginal_dice(merged, smooth=0).item() == pytest.approx(-(2 * 1 / 4) / (1 + 1 / 2))
    # With the background: 2 * 3/4 over one voxel and a mass of 3/4 + 3/4.
    with_background = -((2 * 3 / 4) / (1 + 3 / 2) + (2 * 1 / 4) / (1 + 1 / 2)) / 2
    assert marginal_dice(merged, smooth=0, do_bg=True).item() == pytest.approx(with_background)
    # Class 2 must not be in the second voxel, where it is to 5/8: twice that over one voxel and a mass of 7/8.
    assert exclusion_loss(merged).item() == pytest.approx(2 * 5 / 8 / (1 + 7 / 8))


def test_union_by_hand():
    merged = two_voxels([0, 1, 1])
    assert marginal_cross_entropy(merged).item() == pytest.approx(-(math.log(1 / 2) + math.log(7 / 8)) / 2)
    # Classes 1 and 2: 2 * 7/8 over one voxel and a mass of 1/2 + 7/8.
    assert marginal_dice(merged, smooth=0).item() == pytest.approx(-(2 * 7 / 8) / (1 + 11 / 8))
    assert exclusion_loss(merged).item() == 0


def test_group_of_a_mask():
    mask = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 0, 0]]).bool()
    assert merged_into_background(mask).tolist() == [[0, 0, 2], [0, 1, 2], [0, 0, 0]]
    with pytest.raises(ValueError, match="background is always annotated"):
        merged_into_background(~mask)


# 2. Reduces to nnU-Net's.

EVERYTHING = torch.arange(5).expand(4, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("batch_dice", "ignore"), BOTH_2)
def test_everything_annotated_is_nnunets_loss_to_the_bit(batch_dice, ignore, dtype):
    logits, target = example(EVERYTHING, ignore, dtype)
    label = IGNORE if ignore else None
    value, gradient = evaluate(PartialLabelLoss(batch_dice, ignore_label=label), EVERYTHING, logits, target)
    expected = stock(batch_dice, label)(logits, target)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize(("shape", "dtype"), [((3, 4, 5), torch.float64), ((7, 9), torch.float32)])
@pytest.mark.parametrize(("batch_dice", "ignore", "do_bg"), BOTH_3)
def test_so_is_the_way_of_partial_batches(batch_dice, ignore, do_bg, shape, dtype):
    logits, target = example(EVERYTHING, ignore, dtype, shape)
    label = IGNORE if ignore else None
    loss = PartialLabelLoss(batch_dice, ignore_label=label, do_bg=do_bg)
    loss.may_be_complete = False
    value, gradient = evaluate(loss, EVERYTHING, logits, target)
    expected = stock(batch_dice, label, do_bg)(logits, target)
    # Of float64, nnU-Net sums the Dice in float32; of float32, the sum of a loss near 3 is off by 2e-7 a rounding.
    assert_close(value, expected, rtol=0, atol=1e-7 if dtype == torch.float64 else 1e-6)
    assert_close(gradient, torch.autograd.grad(expected, logits)[0], rtol=1e-5, atol=1e-8)


def test_deep_supervision_is_nnunets_wrapper():
    outputs = [example(dtype=torch.float32, shape=shape) for shape in [(4, 4, 4), (2, 2, 2), (1, 1, 1)]]
    logits, targets = zip(*outputs, strict=True)
    loss, weights = PartialLabelLoss(batch_dice=True), (0.75, 0.25, 0)
    with annotated(DeepSupervisionWrapper(loss, weights), GROUPS):
        value = DeepSupervisionWrapper(loss, weights)(logits, targets)
        single = [loss(*output) for output in outputs]
    assert_close(value, 0.75 * single[0] + 0.25 * single[1], rtol=0, atol=0)


# 3. A second route.


def slow_loss(logits, target, groups, batch_dice, ignore_label, exclusion_weight):
    """Cross-entropy, Dice and exclusion from the equations: loops over cases, voxels and classes."""
    batch, classes = groups.shape
    entropies, dice_terms, exclusion = [], {}, []
    for b in range(batch):
        group = groups[b].tolist()
        p = logits[b].flatten(1).softmax(0)
        labels = target[b].flatten().tolist()
        voxels = [v for v, label in enumerate(labels) if label != ignore_label]
        merged = {v: group[labels[v]] for v in voxels}
        for v in voxels:
            entropies.append(-torch.log(sum(p[c, v] for c in range(classes) if group[c] == merged[v])))
        for g in sorted(set(group) - {0}):
            members = [c for c in range(classes) if group[c] == g]
            mass = sum(p[c, v] for c in members for v in voxels)
            inside = sum((p[c, v] for c in members for v in voxels if merged[v] == g), torch.tensor(0.0))
            key = (g, len(members) > 1) if batch_dice else (g, b)
            dice_terms.setdefault(key, []).append((inside, mass, sum(merged[v] == g for v in voxels)))
        for c in range(1, classes):
            if group[c] == 0:
                foreground = [v for v in voxels if merged[v] > 0]
                overlap = sum((p[c, v] for v in foreground), torch.tensor(0.0))
                exclusion.append(2 * overlap / (sum(p[c, v] for v in voxels) + len(foreground)))
    dice = []
    for terms in dice_terms.values():
        inside, mass, count = (sum(term[i] for term in terms) for i in range(3))
        dice.append((2 * inside + 1e-5) / (mass + count + 1e-5))
    mean = [sum(values) / len(values) if values else 0 for values in (entropies, dice, exclusion)]
    return mean[0] - mean[1] + exclusion_weight * mean[2]


@pytest.mark.parametrize(("batch_dice", "ignore"), BOTH_2)
def test_loops_agree(batch_dice, ignore, monkeypatch):
    monkeypatch.setitem(module.SLAB_VALUES, "cpu", 4 * 5 * 7)  # 12 voxels in slabs of 7
    logits, target = example(ignore=ignore, shape=(3, 2, 2))
    label = IGNORE if ignore else None
    value, gradient = evaluate(PartialLabelLoss(batch_dice, ignore_label=label), GROUPS, logits, target)
    slow = slow_loss(logits, target, GROUPS, batch_dice, label, 2)
    assert_close(value, slow.detach())
    assert_close(gradient, torch.autograd.grad(slow, logits)[0])


def test_batch_dice_of_a_class_is_that_of_the_cases_that_annotate_it():
    groups = torch.tensor([[0, 1, 0], [0, 0, 2], [0, 1, 0]])
    logits, target = example(groups)
    joint = marginal_dice(merged_softmax(logits, target, groups), batch_dice=True)
    first, second = torch.tensor([[0, 1, 0]] * 2), torch.tensor([[0, 0, 2]])
    parts = [
        marginal_dice(merged_softmax(logits[cases], target[cases], group), batch_dice=True)
        for cases, group in (([0, 2], first), ([1], second))
    ]
    assert_close(joint, sum(parts) / 2)


def test_batch_dice_does_not_add_a_union_to_a_single_class():
    groups = torch.tensor([[0, 1, 1], [0, 1, 2]])
    logits, target = example(groups)
    joint = marginal_dice(merged_softmax(logits, target, groups), batch_dice=True)
    union, single = (marginal_dice(merged_softmax(logits[[b]], target[[b]], groups[[b]])) for b in range(2))
    assert_close(joint, (union + 2 * single) / 3)


# 4. Gradients.


@pytest.mark.parametrize(("batch_dice", "ignore"), BOTH_2)
def test_gradcheck(batch_dice, ignore):
    logits, target = example(ignore=ignore, shape=(2,))
    loss = PartialLabelLoss(batch_dice, ignore_label=IGNORE if ignore else None, do_bg=True)
    with annotated(loss, GROUPS):
        assert torch.autograd.gradcheck(lambda x: loss(x, target), logits)


@pytest.mark.parametrize("ignore_label", [None, IGNORE])
def test_gradcheck_of_each_sum(ignore_label):
    logits, target = example(ignore=ignore_label is not None, shape=(2,))
    for field in ("log_target", "mass", "inside"):
        assert torch.autograd.gradcheck(
            lambda x, field=field: getattr(merged_softmax(x, target, GROUPS, ignore_label), field), logits
        )


def test_probability_moves_freely_within_a_group():
    groups = torch.tensor([[0, 0, 2, 0, 4], [0, 1, 1, 3, 3]])
    logits, target = example(groups)
    _, gradient = evaluate(PartialLabelLoss(exclusion_weight=0), groups, logits, target)
    p = logits.detach().softmax(1)
    # The loss sees q = p_a + p_b only: with dq/dz_c = p_c dL/dq for both, the gradients are as p_a : p_b.
    for case, a, b in [(0, 0, 1), (0, 0, 3), (1, 1, 2), (1, 3, 4)]:
        assert_close(gradient[case, a] * p[case, b], gradient[case, b] * p[case, a])


@pytest.mark.parametrize("batch_dice", [False, True])
def test_case_without_annotation_gets_no_gradient(batch_dice):
    logits, target = example(dtype=torch.float32)
    _, gradient = evaluate(PartialLabelLoss(batch_dice), GROUPS, logits, target)
    assert (gradient[3] == 0).all()
    assert (gradient[:3] != 0).all()


def test_ignored_voxels_get_no_gradient_and_their_logits_do_not_matter():
    logits, target = example(ignore=True)
    loss = PartialLabelLoss(ignore_label=IGNORE)
    value, gradient = evaluate(loss, GROUPS, logits, target)
    is_ignored = (target == IGNORE).expand_as(logits)
    assert (gradient[is_ignored] == 0).all()
    changed = torch.where(is_ignored, torch.randn_like(logits), logits).detach().requires_grad_()
    assert_close(evaluate(loss, GROUPS, changed, target)[0], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_nothing_annotated_is_zero_with_a_graph(batch_dice, dtype):
    logits, target = example(torch.zeros_like(GROUPS), dtype=dtype)
    value, gradient = evaluate(PartialLabelLoss(batch_dice), torch.zeros_like(GROUPS), logits, target)
    assert value == 0
    assert (gradient == 0).all()


@pytest.mark.parametrize("groups", [GROUPS, EVERYTHING])
def test_everything_ignored_is_finite(groups):
    logits, target = example(groups)
    loss = PartialLabelLoss(ignore_label=IGNORE)
    loss.may_be_complete = False
    value, gradient = evaluate(loss, groups, logits, torch.full_like(target, IGNORE))
    expected = stock(ignore_label=IGNORE)(logits, torch.full_like(target, IGNORE))
    assert_close(value, expected.to(value.dtype), rtol=1e-6, atol=0)
    assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1, 1000])
def test_half_precision_is_finite_and_close(dtype, scale):
    logits, target = example(dtype=torch.float32)
    half = (scale * logits.detach()).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        value, gradient = evaluate(PartialLabelLoss(batch_dice=True), GROUPS, half, target)
    single = half.detach().float().requires_grad_()
    expected, expected_gradient = evaluate(PartialLabelLoss(batch_dice=True), GROUPS, single, target)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert value.isfinite() and gradient.isfinite().all()
    assert_close(value, expected)
    assert_close(gradient.float(), expected_gradient, rtol=1e-2, atol=1e-4)


def test_hopeless_voxels_keep_their_gradient():
    logits = torch.tensor([0.0, 1.0, 500.0]).view(1, 3, 1, 1).requires_grad_()  # p_0 + p_1 underflows
    merged = merged_softmax(logits, torch.zeros(1, 1, 1, 1), torch.tensor([[0, 0, 2]]))
    loss = marginal_cross_entropy(merged)
    assert loss.item() == pytest.approx(500 - math.log(1 + math.e))
    gradient = torch.autograd.grad(loss, logits)[0].flatten().tolist()
    assert gradient == pytest.approx([-1 / (1 + math.e), -math.e / (1 + math.e), 1])


# 5. Invariance.


def test_unannotated_classes_are_interchangeable():
    groups = torch.tensor([[0, 0, 2, 0, 0], [0, 0, 2, 0, 4]])
    logits, target = example(groups)
    target[target == 4] = 2
    order = [0, 3, 2, 1, 4]  # exchanges 1 and 3, annotated in neither case
    loss = PartialLabelLoss(batch_dice=True)
    value, gradient = evaluate(loss, groups, logits, target)
    permuted, permuted_gradient = evaluate(loss, groups, logits.detach()[:, order].requires_grad_(), target)
    assert_close(permuted, value)
    assert_close(permuted_gradient, gradient[:, order])


def test_label_of_a_class_that_is_not_annotated_is_background():
    logits, target = example()
    cleaned = GROUPS.gather(1, target.flatten(1)).view_as(target)
    loss = PartialLabelLoss()
    assert torch.equal(evaluate(loss, GROUPS, logits, target)[0], evaluate(loss, GROUPS, logits, cleaned)[0])


def test_exclusion_pushes_organs_out_of_each_other():
    logits, target = example(torch.tensor([[0, 1, 0]]))
    merged = merged_softmax(logits, target, torch.tensor([[0, 1, 0]]))
    gradient = torch.autograd.grad(exclusion_loss(merged), logits)[0]
    assert (gradient[0, 2][target[0, 0] == 1] > 0).all()


# What must be known, and what cannot be.


def test_annotation_must_be_known_and_is_forgotten():
    logits, target = example()
    loss = PartialLabelLoss()
    with annotated(loss, GROUPS):
        loss(logits, target)
    with pytest.raises(RuntimeError, match="call the loss inside `with annotated`"):
        loss(logits, target)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (torch.tensor([[1, 1, 2]]), "must map background to 0"),
        (torch.tensor([[0, 2, 1]]), "each channel that it maps to onto itself"),
        (torch.tensor([[0, 1, 3]]), "channels 0 to 3: there are 3"),
        (torch.tensor([[True, True]]), r"must be \(B, C\) int64"),
    ],
)
def test_bad_group_is_refused(group, message):
    with pytest.raises(ValueError, match=message):
        check_group(group)
    with pytest.raises(ValueError, match=message), annotated(PartialLabelLoss(), group):
        pass


def test_group_of_another_batch_is_refused():
    logits, target = example()
    with annotated(PartialLabelLoss(), GROUPS[:2]), pytest.raises(ValueError, match=r"\(2, 5\): it must be \(4, 5\)"):
        merged_softmax(logits, target, GROUPS[:2])


# Regions.

REGIONS_KNOWN = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 0, 0]]).bool()


def region_example(ignore=False, shape=SHAPE):
    return torch.randn(3, 3, *shape, dtype=torch.float64).requires_grad_(), torch.rand(3, 3 + ignore, *shape) > 0.6


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize(("batch_dice", "ignore"), BOTH_2)
def test_all_regions_annotated_is_nnunets_loss(batch_dice, ignore, general):
    logits, target = region_example(ignore)
    loss = PartialRegionLoss(batch_dice, use_ignore_label=ignore)
    loss.may_be_complete = not general
    value, gradient = evaluate(loss, torch.ones_like(REGIONS_KNOWN), logits, target)
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": True, "ddp": False}
    expected = DC_and_BCE_loss({}, dice, use_ignore_label=ignore)(logits, target)
    precision = {"rtol": 1e-6, "atol": 1e-7} if general else {"rtol": 0, "atol": 0}  # nnU-Net sums in float32
    assert_close(value, expected, check_dtype=False, **precision)
    assert_close(gradient, torch.autograd.grad(expected, logits)[0], **precision)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_regions_by_a_second_route(batch_dice):
    logits, target = region_example()
    value, gradient = evaluate(PartialRegionLoss(batch_dice), REGIONS_KNOWN, logits, target)
    pairs = [(0, 0), (0, 2), (1, 2)]
    p, y = logits.sigmoid(), target.double()
    bce = sum(-(y[i] * p[i].log() + (1 - y[i]) * (1 - p[i]).log()).mean() for i in pairs) / 3
    dice = []
    for terms in [[(0, 0)], [(0, 2), (1, 2)]] if batch_dice else [[pair] for pair in pairs]:
        inside, total = sum((p[i] * y[i]).sum() for i in terms), sum((p[i] + y[i]).sum() for i in terms)
        dice.append((2 * inside + 1e-5) / (total + 1e-5))
    expected = bce - sum(dice) / len(dice)
    assert_close(value, expected.detach())
    assert_close(gradient, torch.autograd.grad(expected, logits)[0])
    assert (gradient[~REGIONS_KNOWN] == 0).all()


@pytest.mark.parametrize("ignore", [False, True])
def test_regions_gradcheck_and_nothing_annotated(ignore):
    logits, target = region_example(ignore, (2, 2))
    loss = PartialRegionLoss(use_ignore_label=ignore)
    with annotated(loss, REGIONS_KNOWN):
        assert torch.autograd.gradcheck(lambda x: loss(x, target), logits)
    value, gradient = evaluate(loss, torch.zeros_like(REGIONS_KNOWN), logits, target)
    assert value == 0 and (gradient == 0).all()
    with pytest.raises(ValueError, match=r"mask must be \(B, R\) bool"), annotated(loss, GROUPS):
        pass


# Several processes.


def train_process(rank, port, groups, logits, target, regions, region_logits, region_target, folder):
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    part = [slice(0, 2), slice(2, 4)][rank]
    x = logits[part].clone().requires_grad_()
    labels = evaluate(PartialLabelLoss(True, ddp=True), groups[part], x, target[part])
    part = [slice(0, 1), slice(1, 3)][rank]  # nnU-Net's batches may differ in size
    x = region_logits[part].clone().requires_grad_()
    by_region = evaluate(PartialRegionLoss(True, ddp=True), regions[part], x, region_target[part])
    torch.save((labels, by_region), folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_the_joint_batch(tmp_path):
    # As many unannotated classes in both: exclusion is each process's own mean, as is the cross-entropy.
    groups = torch.tensor([[0, 1, 2, 0, 4], [0, 1, 0, 3, 3], [0, 0, 2, 3, 4], [0, 0, 2, 3, 3]])
    logits, target = example(groups)
    regions = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]]).bool()
    region_logits, region_target = region_example()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    inputs = (groups, logits.detach(), target, regions, region_logits.detach(), region_target)
    torch.multiprocessing.spawn(train_process, (port, *inputs, tmp_path), nprocs=2)
    labels, by_region = zip(*(torch.load(tmp_path / f"{rank}.pth") for rank in range(2)), strict=True)
    value, gradient = evaluate(PartialLabelLoss(True), groups, logits, target)
    # DDP takes the mean of the processes' gradients.
    assert_close((labels[0][0] + labels[1][0]) / 2, value)
    assert_close(torch.cat([labels[0][1], labels[1][1]]) / 2, gradient)
    # Of batches that differ in size, only the Dice is that of the joint batch.
    joint = evaluate(PartialRegionLoss(True), regions, region_logits, region_target)[0]
    expected = joint - own_entropy(regions, region_logits, region_target)
    for (loss, _), part in zip(by_region, [slice(0, 1), slice(1, 3)], strict=True):
        assert_close(loss - own_entropy(regions[part], region_logits[part], region_target[part]), expected)


def own_entropy(regions, logits, target):
    entropy = torch.nn.functional.binary_cross_entropy_with_logits
    return entropy(logits.detach()[regions], target[regions].double())
