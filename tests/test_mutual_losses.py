"""What members teach each other: by hand, against slow second routes, and where gradients may flow."""

import math

import pytest
import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from torch.nn import functional as F

from nnunet_diffusion.mutual.losses import DifferenceLoss, GroupedBatch, SimilarityLoss, of_owners
from nnunet_diffusion.mutual.network import MemberOutput, predicted_labels
from nnunet_diffusion.mutual.terms import (
    OrganFeatures,
    feature_difference,
    feature_similarity,
    organ_errors,
    organ_features,
    prediction_difference,
    prediction_similarity,
    ramp_up,
)
from nnunet_diffusion.partial.losses import PartialLabelLoss, annotated, merged_into_background
from nnunet_diffusion.partial.merged_softmax import merged_softmax

CLASSES = 4  # background, 1 and 2 of group 0, 3 of group 1
OWNED = torch.tensor([[False, True, True, False], [False, False, False, True]])
GROUP = torch.tensor([0, 1, 1, 0])  # of the cases of a batch
ANNOTATION = merged_into_background(torch.tensor([[True, True, True, False], [True, False, False, True]]))[GROUP]
# Of the first case all was completed, of the others class 2 was not believed, unless somebody annotated it.
COMPLETED = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 3], [0, 1, 0, 3], [0, 1, 2, 3]])


def probabilities(*voxels):
    """Logits (1, C, V, 1) of voxels with these probabilities."""
    return torch.tensor(voxels, dtype=torch.float64).log().T[None, ..., None]


def labels(*values):
    return torch.tensor(values)[None, None, :, None]


def random_batch(shape=(8, 6), scales=2, seed=0, members=2):
    """Outputs of all members on four cases of two groups, and the batch with completed labels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return (3 * torch.randn(*size, generator=generator, dtype=torch.float64)).requires_grad_()

    sizes = [[n // 2**s for n in shape] for s in range(scales)]
    outputs = [
        MemberOutput([draw(4, CLASSES, *size) for size in sizes], draw(4, 5, *sizes[-1])) for _ in range(members)
    ]
    completed = [torch.randint(0, CLASSES, (4, 1, *size), generator=generator) for size in sizes]
    completed = [COMPLETED.gather(1, c.flatten(1)).reshape(c.shape) for c in completed]
    targets = [torch.cat([ANNOTATION.gather(1, c.flatten(1)).reshape(c.shape), c], 1) for c in completed]
    return outputs, GroupedBatch(targets, ANNOTATION, GROUP, COMPLETED)


def supervision(scales=2):
    loss = PartialLabelLoss(exclusion_weight=0.0)
    return DeepSupervisionWrapper(loss, [2 / 3, 1 / 3][:scales]) if scales > 1 else loss


def gradients(loss, outputs):
    """Of each member's finest logits, coarser logits and features; None where nothing flows."""
    tensors = [t for output in outputs for t in (*output.logits, output.features)]
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [g if g is not None and g.any() else None for g in found]


# ---------------------------------------------------------------- the terms


def test_ramp_by_hand():
    assert [ramp_up(epoch, 2, 2) for epoch in range(2)] == [0, 0]
    assert ramp_up(2, 2, 2) == pytest.approx(math.exp(-5 / 4))  # half of the ramp
    assert [ramp_up(epoch, 2, 2) for epoch in (3, 9)] == [1, 1]
    assert ramp_up(0, 0, 0) == 1


def test_prediction_difference_by_hand():
    # The member owns classes 1 and 2; the case annotates 3, at voxels 0 and 1, of which it claims 0.5 and 0.2.
    logits = probabilities([0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1], [0.6, 0.2, 0.1, 0.1], [0.3, 0.4, 0.2, 0.1])
    difference = prediction_difference(logits, labels(3, 3, 0, 0), OWNED[0])
    assert difference == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)


def test_prediction_difference_against_a_loop_with_ignored_voxels():
    torch.manual_seed(0)
    logits = torch.randn(3, CLASSES, 5, 4, dtype=torch.float64)
    target = torch.tensor([0, 3, 9])[torch.randint(3, (3, 1, 5, 4))]
    terms = []
    for z, y in zip(logits, target, strict=True):
        p, y = z.softmax(0).flatten(1).T, y.flatten()
        found = [-math.log(1 - float(q[1] + q[2])) for q, label in zip(p, y, strict=True) if label == 3]
        terms.append(sum(found) / len(found))
    assert prediction_difference(logits, target, OWNED[0]) == pytest.approx(sum(terms) / 3)


def test_prediction_difference_gradient():
    """Right, nothing in the background, and where it acts away from the organs that the network owns."""
    torch.manual_seed(0)
    target = torch.tensor([0, 3])[torch.randint(2, (2, 1, 4, 3))]
    logits = torch.randn(2, CLASSES, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: prediction_difference(z, target, OWNED[0]), logits)
    (gradient,) = torch.autograd.grad(prediction_difference(logits, target, OWNED[0]), logits)
    gradient, is_organ = gradient.movedim(1, -1), target[:, 0] == 3
    assert not gradient[~is_organ].any()
    assert (gradient[is_organ][:, OWNED[0]] > 0).all() and (gradient[is_organ][:, ~OWNED[0]] < 0).all()


def test_a_patch_without_organs_has_no_difference_and_no_nan():
    logits = torch.full((1, CLASSES, 3, 1), -30.0).index_fill(1, torch.tensor([0]), 30.0).requires_grad_()
    loss = prediction_difference(logits, labels(0, 0, 0), OWNED[0])
    loss.backward()
    assert loss == 0 and logits.grad.isfinite().all()


def test_organ_features_by_hand():
    # Label map of 4 x 2 voxels, features of 2 x 1: nearest neighbor takes voxels 0 and 2 of the first column.
    label_map = torch.tensor([[1, 3], [0, 0], [7, 0], [2, 2]])[None, None]
    features = torch.tensor([[2.0], [5.0]])[None, None].repeat(1, 3, 1, 1).half()
    seen = organ_features(features, label_map, CLASSES)
    assert seen.is_present.tolist() == [[False, True, False, False]]  # 7 is an ignore label
    assert seen.means.dtype == torch.float32 and seen.means[0].tolist() == [[0] * 3, [2] * 3, [0] * 3, [0] * 3]


def test_organ_features_against_a_loop():
    torch.manual_seed(0)
    features, label_map = torch.randn(2, 3, 4, 5, 2, dtype=torch.float64), torch.randint(0, CLASSES, (2, 1, 4, 5, 2))
    seen = organ_features(features, label_map, CLASSES)
    for b in range(2):
        assert not seen.is_present[b, 0] and not seen.means[b, 0].any()
        for c in range(1, CLASSES):
            expected = features[b][:, label_map[b, 0] == c].mean(1)
            assert seen.is_present[b, c] and torch.allclose(seen.means[b, c], expected)


def random_features(seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(2, CLASSES, 5, generator=generator, dtype=torch.float64, **kwargs)
    present = torch.tensor([[False, True, True, True], [False, True, False, False]])
    return OrganFeatures(means, present)


def test_feature_difference_against_a_loop():
    own, other = random_features(0), random_features(1)
    pairs = [
        abs(float(F.cosine_similarity(own.means[b, c], other.means[b, d], dim=0)))
        for b in range(2) for c in range(CLASSES) for d in range(CLASSES)
        if own.is_present[b, c] and other.is_present[b, d]
    ]  # fmt: skip
    assert len(pairs) == 10
    assert feature_difference(own, other) == pytest.approx(sum(pairs) / 10)
    assert feature_difference(own, OrganFeatures(other.means, other.is_present & False)) == 0


def test_feature_difference_by_hand():
    # The network claims organ 1 with (3, 4) and organ 2 with (-4, 3); the owner sees organ 3 as (6, 8):
    # cosines (18 + 32) / (5 * 10) = 1 and (-24 + 24) / 50 = 0, mean 1/2. Seen as (0, 2) they are 8 / 10 and 6 / 10,
    # mean 0.7; as (-1, 0), in the other direction, -3 / 5 and 4 / 5: their sizes count, mean 0.7.
    own = OrganFeatures(torch.tensor([[[0, 0], [3, 4], [-4, 3], [0, 0]]]).double(), torch.tensor([[0, 1, 1, 0]]) > 0)
    for owner, expected in (((6, 8), 0.5), ((0, 2), 0.7), ((-1, 0), 0.7)):
        true = torch.zeros(1, CLASSES, 2, dtype=torch.float64)
        true[0, 3] = torch.tensor(owner)
        found = feature_difference(own, OrganFeatures(true, torch.tensor([[0, 0, 0, 1]]) > 0))
        assert found == pytest.approx(expected)


def test_the_owners_features_are_constant():
    own, other = random_features(0, requires_grad=True), random_features(1, requires_grad=True)
    feature_difference(own, other).backward()
    assert own.means.grad.any() and other.means.grad is None
    assert not own.means.grad[~own.is_present].any(), "an organ that is not there teaches nothing"


def test_prediction_similarity_by_hand():
    # KL((1/2, 1/2) || (1/4, 3/4)) = 1/2 log 2 + 1/2 log 2/3, in one of two voxels.
    p, other = probabilities([0.25, 0.75], [0.1, 0.9]), probabilities([0.5, 0.5], [0.1, 0.9])
    assert prediction_similarity(p, other) == pytest.approx(0.25 * math.log(4 / 3))


def test_prediction_similarity_is_zero_for_the_same_and_constant_to_the_other():
    z = torch.randn(2, CLASSES, 3, 4, dtype=torch.float64, requires_grad=True)
    same = z.detach().clone().requires_grad_()
    loss = prediction_similarity(z, same)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-12 and z.grad.abs().max() < 1e-12 and same.grad is None
    other = torch.randn(2, CLASSES, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: prediction_similarity(x, other), z.detach().requires_grad_())
    # of a KL with a constant other side, the gradient of each logit is (p - p_other) / voxels
    (grad,) = torch.autograd.grad(prediction_similarity(z, other), z)
    assert torch.allclose(grad, (z.softmax(1) - other.softmax(1)) / 24)


def test_half_precision_is_computed_in_float32():
    z, other = torch.randn(2, 1, CLASSES, 500).half()
    assert prediction_similarity(z, other).dtype == torch.float32


def test_organ_errors_by_hand():
    # class 1 has 0.8 and 0.4 at its two voxels and 0.2 elsewhere: 1 - 2 * 1.2 / (2 + 1.4)
    logits = probabilities([0.2, 0.8], [0.6, 0.4], [0.8, 0.2])
    errors = organ_errors(merged_softmax(logits, labels(1, 1, 0), torch.arange(2)[None]), smooth=0)
    assert errors[0, 1] == pytest.approx(1 - 2.4 / 3.4)


def test_the_better_member_gives_its_features_and_gets_no_gradient():
    seen = [random_features(seed, requires_grad=True) for seed in range(3)]
    errors = torch.full((3, 2, CLASSES), 0.5)
    best = torch.tensor([[0, 2, 0, 1], [0, 1, 1, 1]])  # of the organs that are there: 2, 0, 1 and 1
    errors.scatter_(0, best[None], 0.1)
    losses = feature_similarity(seen, errors)
    there = [(0, 1), (0, 2), (0, 3), (1, 1)]
    for k in range(3):
        terms = [
            1 - F.cosine_similarity(seen[k].means[b, c], seen[best[b, c]].means[b, c], dim=0)
            for b, c in there if best[b, c] != k
        ]  # fmt: skip
        assert torch.allclose(losses[k], sum(terms) / len(terms))
    sum(losses).backward()
    for k in range(3):
        learns = torch.zeros(2, CLASSES, dtype=torch.bool)
        for b, c in there:
            learns[b, c] = best[b, c] != k
        assert (seen[k].means.grad.any(2) == learns).all()


def test_feature_similarity_by_hand():
    # Network 0 sees organ 1 as (3, 4), network 1 as (4, 3): cosine (12 + 12) / 25 = 0.96. Organ 2 is (1, 0) and (0, 2):
    # cosine 0. Organ 3 is not there. Network 0 is better at organ 1, so network 1 has 1 - 0.96 to learn; network 1 is
    # better at organ 2, so network 0 has 1 - 0 to learn. If network 0 is better at both, network 1 learns from both.
    means = [[[0, 0], [3, 4], [1, 0], [5, 5]], [[0, 0], [4, 3], [0, 2], [9, 1]]]
    seen = [OrganFeatures(torch.tensor([m]).double(), torch.tensor([[0, 1, 1, 0]]) > 0) for m in means]
    errors = torch.tensor([[[0.9, 0.2, 0.6, 0.9]], [[0.1, 0.3, 0.5, 0.1]]])
    assert [float(loss) for loss in feature_similarity(seen, errors)] == pytest.approx([1, 0.04])
    errors[1, 0, 2] = 0.7
    assert [float(loss) for loss in feature_similarity(seen, errors)] == pytest.approx([0, (0.04 + 1) / 2])


def test_identical_features_teach_nothing():
    seen = [random_features(0, requires_grad=True) for _ in range(2)]
    losses = feature_similarity(seen, torch.tensor([0.1, 0.2])[:, None, None].expand(2, 2, CLASSES))
    assert losses[0] == 0 and abs(float(losses[1].detach())) < 1e-12
    (grad,) = torch.autograd.grad(losses[1], seen[1].means)
    assert grad.abs().max() < 1e-12


# ---------------------------------------------------------------- the losses of a batch


@pytest.mark.parametrize("scales", [1, 2])
def test_stage_1_with_one_group_is_the_supervised_loss(scales):
    outputs, batch = random_batch(scales=scales, members=1)
    everything = torch.arange(CLASSES).expand(4, -1)
    batch = GroupedBatch([t[:, 1:] for t in batch.targets], everything, torch.zeros(4, dtype=torch.long))
    loss = DifferenceLoss(supervision(scales), torch.tensor([[False, True, True, True]]))(outputs, batch, [0], 1.0)
    plain = supervision(scales)
    with annotated(plain, everything):
        targets = batch.targets if scales > 1 else batch.targets[0]
        assert loss == plain(outputs[0].logits if scales > 1 else outputs[0].logits[0], targets)


def slow_difference_loss(outputs, batch, prediction_weight, feature_weight):
    """Stage 1 case by case, scale by scale, organ by organ."""
    total, weights = 0, [2 / 3, 1 / 3]
    for k in range(2):
        is_own = batch.group == k
        with annotated(partial := PartialLabelLoss(exclusion_weight=0.0), ANNOTATION[is_own]):
            for weight, z, y in zip(weights, outputs[k].logits, batch.targets, strict=True):
                total = total + weight * partial(z[is_own], y[is_own, :1])
        others = [b for b in range(4) if not is_own[b]]
        organs, foreign = OWNED[k].nonzero().flatten().tolist(), OWNED[1 - k].nonzero().flatten().tolist()
        for weight, z, y in zip(weights, outputs[k].logits, batch.targets, strict=True):
            for b in others:
                q, is_labeled = z[b].softmax(0)[organs].sum(0), torch.isin(y[b, 0], torch.tensor(foreign))
                total = total - prediction_weight * weight * (1 - q[is_labeled]).log().mean() / len(others)
        cosines = []
        for b in others:
            claimed = predicted_labels(outputs[k].logits[0][b : b + 1].detach(), OWNED[k])
            own = organ_features(outputs[k].features[b : b + 1], claimed, CLASSES)
            true = organ_features(outputs[1 - k].features[b : b + 1].detach(), batch.targets[0][b : b + 1, :1], CLASSES)
            cosines += [
                F.cosine_similarity(own.means[0, c], true.means[0, d], dim=0).abs()
                for c in organs for d in foreign if own.is_present[0, c] and true.is_present[0, d]
            ]  # fmt: skip
        total = total + feature_weight * sum(cosines) / len(cosines)
    return total


def test_stage_1_against_a_slow_route():
    outputs, batch = random_batch()
    fast = DifferenceLoss(supervision(), OWNED, None, 0.7, 0.3)(outputs, batch, range(2), 0.5)
    slow = slow_difference_loss(outputs, batch, 0.35, 0.15)
    assert torch.allclose(fast, slow)
    for one, other in zip(gradients(fast, outputs), gradients(slow, outputs), strict=True):
        assert torch.allclose(one, other)


def slow_similarity_loss(outputs, batch, prediction_weight, strength, feature_weight):
    """Stage 2 member by member."""
    total, weights = 0, [2 / 3, 1 / 3]
    complete = PartialLabelLoss(exclusion_weight=0.0)
    for k in range(2):
        own, others = (batch.group == k).nonzero().flatten(), (batch.group != k).nonzero().flatten()
        for weight, z, z_other, y in zip(weights, outputs[k].logits, outputs[1 - k].logits, batch.targets, strict=True):
            with annotated(complete, COMPLETED[own]):
                total = total + weight * complete(z[own], y[own, 1:])
            with annotated(complete, ANNOTATION[others]):
                total = total + prediction_weight * weight * complete(z[others], y[others, :1])
            p, q = z[others].softmax(1), z_other[others].softmax(1).detach()
            kl = (q * (q.log() - p.log())).sum(1).mean()
            total = total + prediction_weight * strength * weight * kl
    terms = {0: [], 1: []}
    truth = batch.targets[0][:, :1]
    sums = [merged_softmax(o.logits[0], truth, ANNOTATION) for o in outputs]
    seen = [organ_features(o.features, truth, CLASSES) for o in outputs]
    for b in range(4):
        for c in range(1, CLASSES):
            if seen[0].is_present[b, c]:
                dice = [2 * m.inside[b, c] / (m.mass[b, c] + m.voxels[b, c]) for m in sums]
                worse = 0 if dice[0] < dice[1] else 1
                better = seen[1 - worse].means[b, c].detach()
                terms[worse].append(1 - F.cosine_similarity(seen[worse].means[b, c], better, dim=0))
    return total + strength * feature_weight * sum(sum(found) / len(found) for found in terms.values() if found)


def test_stage_2_against_a_slow_route():
    outputs, batch = random_batch()
    fast = SimilarityLoss(supervision(), OWNED, None, 0.7, 0.3)(outputs, batch, range(2), 0.5)
    slow = slow_similarity_loss(outputs, batch, 0.7, 0.5, 0.3)
    assert torch.allclose(fast, slow)
    for one, other in zip(gradients(fast, outputs), gradients(slow, outputs), strict=True):
        assert torch.allclose(one, other)


def test_identical_members_have_nothing_to_teach_in_stage_2():
    outputs, batch = random_batch()
    outputs = [outputs[0], MemberOutput([z.detach().clone() for z in outputs[0].logits], outputs[0].features.detach())]
    mutual = SimilarityLoss(supervision(), OWNED)(outputs, batch, [0], 1.0)
    supervised = SimilarityLoss(supervision(), OWNED)(outputs, batch, [0], 0.0)
    assert torch.allclose(mutual, supervised)


@pytest.mark.parametrize("cls", [DifferenceLoss, SimilarityLoss])
def test_a_members_loss_reaches_no_other_member(cls):
    outputs, batch = random_batch()
    loss = cls(supervision(), OWNED)
    for learner in range(2):
        alone = gradients(loss(outputs, batch, [learner], 1.0), outputs)
        own, other = (alone[:3], alone[3:]) if learner == 0 else (alone[3:], alone[:3])
        assert all(g is None for g in other) and all(g is not None for g in own)
        together = gradients(loss(outputs, batch, range(2), 1.0), outputs)
        for g, expected in zip(own, together[:3] if learner == 0 else together[3:], strict=True):
            assert torch.allclose(g, expected), "in turn or all at once: the same gradient"


def test_without_strength_other_groups_teach_nothing_in_stage_1():
    outputs, batch = random_batch()
    grads = gradients(DifferenceLoss(supervision(), OWNED)(outputs, batch, range(2), 0.0), outputs)
    for k in range(2):
        fine, coarse, features = grads[3 * k : 3 * k + 3]
        assert features is None
        assert not fine[GROUP != k].any() and not coarse[GROUP != k].any() and fine[GROUP == k].any()


def test_of_owners_takes_each_case_from_its_group():
    tensors = [torch.full((4, 2), float(k), requires_grad=True) for k in range(2)]
    found = of_owners(tensors, GROUP)
    assert found[:, 0].tolist() == [0, 1, 1, 0] and not found.requires_grad
