"""Several planned networks in one: what they compute, how they predict together, what they cost."""

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from nnunet_diffusion.mutual.network import (
    FullOrganMembers,
    PartialOrganMembers,
    alike,
    decode,
    log_odds,
    predicted_labels,
)
from nnunet_diffusion.mutual.terms import organ_features

CLASSES = 4
OWNED = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.uint8)


def planned(kind="PlainConvUNet", dim=2, deep_supervision=False, features=(4, 6, 8)):
    """A small planned network."""
    kwargs = {
        "n_stages": 3, "features_per_stage": features, "conv_op": f"torch.nn.Conv{dim}d", "kernel_sizes": [3, 3, 3],
        "strides": [1, 2, 2], "n_conv_per_stage_decoder": [1, 1], "conv_bias": True,
        "norm_op": f"torch.nn.InstanceNorm{dim}d", "norm_op_kwargs": {"affine": True}, "nonlin": "torch.nn.LeakyReLU",
        ("n_blocks_per_stage" if "Residual" in kind else "n_conv_per_stage"): [1, 1, 1],
    }  # fmt: skip
    requires_import = ["conv_op", "norm_op", "nonlin"]
    name = f"dynamic_network_architectures.architectures.unet.{kind}"
    return get_network_from_plans(name, kwargs, requires_import, 1, CLASSES, True, deep_supervision)


def full(members=2, **kwargs):
    return FullOrganMembers([planned(**kwargs) for _ in range(members)])


def partial(**kwargs):
    network = PartialOrganMembers([planned(**kwargs) for _ in range(2)], CLASSES)
    network.owned.copy_(OWNED)
    return network


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_a_member_computes_what_the_planned_network_does(kind, dim):
    network, x = full(kind=kind, dim=dim), torch.randn(2, 1, *[16] * dim)
    network.deep_supervision = True
    for output, member in zip(network(x), network.members, strict=True):
        member.decoder.deep_supervision = True
        for mine, theirs in zip(output.logits, member(x), strict=True):
            assert torch.equal(mine, theirs)
    network.deep_supervision = False
    member.decoder.deep_supervision = False
    (finest,) = network(x)[1].logits
    assert torch.equal(finest, member(x))
    network.eval()
    network.only = 1
    assert torch.equal(network(x), member(x))


def test_features_are_those_of_the_chosen_stage():
    network, x = full(), torch.randn(2, 1, 16, 16)
    assert network(x)[0].features.shape == (2, 4, 16, 16)
    network.feature_stage = 9  # as deep as there is
    assert network(x)[0].features.shape == (2, 6, 8, 8)
    assert torch.equal(network(x)[0].features, decode(network.members[0], x)[1])


def test_the_mean_is_in_probabilities():
    network, x = full(3).eval(), torch.randn(2, 1, 16, 16)
    mean = torch.stack([member(x).softmax(1) for member in network.members]).mean(0)
    assert torch.allclose(network(x).softmax(1), mean, atol=1e-6)
    assert torch.equal(network(x).argmax(1), mean.argmax(1))
    network.deep_supervision = True
    assert [tuple(z.shape[2:]) for z in network(x)] == [(16, 16), (8, 8)]


def test_the_mean_of_sure_members_is_finite():
    z = torch.tensor([200.0, -200.0])[None, :, None]
    assert full().combine((z, -z)).softmax(1).flatten().tolist() == [0.5, 0.5]
    assert full().combine((z, z)).isfinite().all()


def test_log_odds_and_claims_by_hand():
    # probabilities 0.1, 0.6, 0.1, 0.2 and 0.3, 0.2, 0.2, 0.3; classes 1 and 2 are owned: 0.6 / 0.3, then 0.2 / 0.6
    z = torch.tensor([[0.1, 0.6, 0.1, 0.2], [0.3, 0.2, 0.2, 0.3]]).log().T[None, ..., None]
    odds = log_odds(z, OWNED[0].bool()).exp()
    assert odds[0, 1, :, 0].tolist() == pytest.approx([2, 1 / 3]) and odds[0, 2, 0, 0] == pytest.approx(1 / 3)
    assert predicted_labels(z, OWNED[0].bool()).flatten().tolist() == [1, 0]


def test_partial_members_predict_the_posterior_of_independent_experts():
    network, x = partial().eval(), torch.randn(2, 1, 16, 16)
    p = [member(x).softmax(1).double() for member in network.members]
    nothing = [1 - p[0][:, 1] - p[0][:, 2], 1 - p[1][:, 3]]  # what each leaves to the background
    joint = [nothing[0] * nothing[1], p[0][:, 1] * nothing[1], p[0][:, 2] * nothing[1], nothing[0] * p[1][:, 3]]
    posterior = torch.stack(joint, 1) / sum(joint)[:, None]
    assert torch.allclose(network(x).softmax(1).double(), posterior, atol=1e-6)
    for k, member in enumerate(network.members):  # nobody sees anything where the posterior's best is background
        assert not predicted_labels(member(x), OWNED[k].bool())[:, 0][posterior.argmax(1) == 0].any()


def test_who_owns_what_is_saved_with_the_weights():
    other = PartialOrganMembers([planned(), planned()], CLASSES)
    other.load_state_dict(partial().state_dict())
    assert torch.equal(other.owned, OWNED)


def sum_of(outputs):
    return sum(output.logits[0].square().mean() + output.features.mean() for output in outputs)


def test_checkpointing_changes_no_gradient():
    network, x, grads = full(), torch.randn(2, 1, 16, 16), []
    for network.checkpointing in (False, True):
        network.zero_grad()
        sum_of(network(x)).backward()
        grads.append({name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def saved_bytes(network, x):
    """What autograd keeps for the backward pass, beside parameters."""
    kept, own = {}, {p.data_ptr() for p in network.parameters()}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = network(x)
    return sum(kept.values()), outputs


def test_checkpointing_and_turns_keep_little():
    network, x = full(3), torch.randn(2, 1, 64, 64)
    whole, _ = saved_bytes(network, x)
    network.learner = 1
    turn, outputs = saved_bytes(network, x)
    network.learner = None
    assert turn < 0.4 * whole
    assert [o.logits[0].requires_grad for o in outputs] == [False, True, False]
    network.checkpointing = True
    assert saved_bytes(network, x)[0] < 0.1 * whole


@pytest.mark.parametrize("checkpointing", [False, True])
def test_distributed_training_reaches_every_member(checkpointing, unused_tcp_port=29537):
    network = partial()
    network.checkpointing = checkpointing
    network.deep_supervision = True
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{unused_tcp_port + checkpointing}", rank=0, world_size=1)
    try:
        parallel = DistributedDataParallel(network)
        for _ in range(2):  # the second step fails when the first left parameters without gradient
            outputs = parallel(torch.randn(2, 1, 16, 16))
            sum(z.square().mean() for output in outputs for z in output.logits).backward()
        assert all(p.grad is not None for p in network.parameters())
    finally:
        distributed.destroy_process_group()


def scene(cases=8, size=32):
    """Images in noise with a bright organ, a dark one and one of stripes, and their labels."""
    images, labels = torch.randn(cases, 1, size, size) / 4, torch.zeros(cases, 1, size, size, dtype=torch.long)
    for image, seg in zip(images, labels, strict=True):
        stripes = torch.tensor([2.0, -2.0]).repeat_interleave(2).repeat(2)
        for label, (x, y, brightness) in enumerate([(3, 3, 2.0), (20, 20, stripes), (3, 20, -2.0)], 1):
            place = (slice(x, x + 8), slice(y, y + 8))
            image[0][place] += brightness
            seg[0][place] = label
    return images, labels


def learn(network, organs, steps=40):
    """Trains a network on some organs, the others being background."""
    optimizer = torch.optim.Adam(network.parameters(), 3e-4)
    for _ in range(steps):
        images, labels = scene()
        known = torch.where(torch.isin(labels, torch.tensor(organs)), labels, 0)[:, 0]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images), known).backward()
        optimizer.step()


def separation(networks):
    """How often two networks' features of the same organ are closer than those of two organs (an AUC)."""
    images, labels = scene()
    with torch.no_grad():
        one, other = (organ_features(decode(n, images)[1], labels, CLASSES).means[:, 1:] for n in networks)
    cosine = torch.nn.functional.cosine_similarity(one[:, :, None], other[:, None], dim=3)
    is_same = torch.eye(3, dtype=torch.bool).expand_as(cosine)
    return (cosine[is_same][:, None] > cosine[~is_same]).float().mean()


@pytest.mark.slow
def test_features_of_members_that_began_alike_can_be_compared():
    """Each has learned other organs; with random starts of their own the cosine says nothing of which organ it is."""
    together, apart = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        wide = [planned(features=(32, 32, 32)) for _ in range(3)]
        for networks, found in ((alike(wide[0], 2), together), (wide[1:], apart)):
            learn(networks[0], [1, 2])
            learn(networks[1], [3])
            found.append(separation(networks))
    assert torch.stack(together).mean() > 0.8
    assert torch.stack(apart).mean() < 0.65
