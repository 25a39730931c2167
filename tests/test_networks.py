"""Time conditioning and folding, on the two networks that nnU-Net plans, in two and three dimensions."""

from copy import deepcopy

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nnunet_diffusion.pretraining.conditioning import ConditionalNorm, condition, fold

IMPORTS = ["conv_op", "norm_op", "dropout_op", "nonlin"]


def planned_network(
    kind="PlainConvUNet", dim=2, channels=1, outputs=1, norm="InstanceNorm", deep_supervision=False, anisotropic=False
):
    """Thick slices, if it is anisotropic: the first stage and the first stride leave the first axis alone."""
    along_first = 1 if anisotropic else 3
    blocks = "n_blocks_per_stage" if kind == "ResidualEncoderUNet" else "n_conv_per_stage"
    kwargs = {
        "n_stages": 3,
        "features_per_stage": [4, 6, 8],
        "conv_op": f"torch.nn.modules.conv.Conv{dim}d",
        "kernel_sizes": [[along_first, *[3] * (dim - 1)], [3] * dim, [3] * dim],
        "strides": [[1] * dim, [(along_first + 1) // 2, *[2] * (dim - 1)], [2] * dim],
        blocks: [1, 2, 1],
        "n_conv_per_stage_decoder": [1, 2],
        "conv_bias": True,
        "norm_op": f"torch.nn.{norm}{dim}d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    name = f"dynamic_network_architectures.architectures.unet.{kind}"
    return get_network_from_plans(name, kwargs, IMPORTS, channels, outputs, deep_supervision=deep_supervision)


def trained(denoiser):
    """Every parameter moved away from its initial value, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        denoiser.input_scale.copy_(torch.linspace(0.7, 1.9, len(denoiser.input_scale)))
    return denoiser


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


NETWORKS = [
    (kind, dim, norm)
    for kind in ("PlainConvUNet", "ResidualEncoderUNet")
    for dim in (2, 3)
    for norm in ("InstanceNorm", "BatchNorm")
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize(
    ("kind", "dim", "norm", "anisotropic"),
    [(*network, False) for network in NETWORKS] + [(*network, True) for network in NETWORKS if network[1] == 3],
)
def test_folded_network_has_stock_keys_and_computes_the_denoiser(kind, dim, norm, anisotropic, dtype, tolerance):
    def plan():
        return planned_network(kind, dim, channels=2, outputs=2, norm=norm, anisotropic=anisotropic)

    stock_keys = list(plan().state_dict())
    denoiser = trained(condition(plan(), 2)).to(dtype).eval()
    images = torch.randn(3, 2, *[16] * dim, dtype=dtype)
    scale = denoiser.input_scale.reshape(1, 2, *[1] * dim)
    for timestep in (0, 300, 999):
        folded = fold(denoiser, timestep).eval()
        assert list(folded.state_dict()) == stock_keys
        with torch.no_grad():
            expected = denoiser(images / scale, torch.full((3,), timestep))
            assert relative_error(folded(images), expected) < tolerance
            assert relative_error(fold(denoiser, timestep + 200)(images), expected) > 1e-2, "time does nothing"


@pytest.mark.parametrize(("kind", "dim", "norm"), NETWORKS)
def test_an_untrained_condition_changes_nothing(kind, dim, norm):
    network = planned_network(kind, dim, norm=norm).eval()
    images = torch.randn(2, 1, *[16] * dim)
    with torch.no_grad():
        expected = network(images)
        assert relative_error(condition(network, 1)(images, torch.tensor([3, 700])), expected) < 1e-5


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.BatchNorm2d])
def test_conditional_norm_by_hand(norm):
    """One sample at a time, from the equation: y = norm(x) (1 + a) + b with norm(x) = gamma z + beta."""
    conditional = ConditionalNorm(norm(3, affine=True), 5)
    with torch.no_grad():
        conditional.norm.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
        conditional.norm.bias.copy_(torch.tensor([0.5, -0.5, 0.0]))
        conditional.scale_shift.weight.normal_()
    x, embedding = torch.randn(4, 3, 6, 6), torch.randn(4, 5)
    conditional.embedding = embedding
    y = conditional(x)
    a, b = conditional.scale_shift(embedding).chunk(2, 1)
    plain = deepcopy(conditional.norm)(x)
    for sample in range(4):
        for channel in range(3):
            expected = plain[sample, channel] * (1 + a[sample, channel]) + b[sample, channel]
            torch.testing.assert_close(y[sample, channel], expected, atol=1e-5, rtol=1e-5)


def test_conditional_norm_gradients():
    conditional = ConditionalNorm(nn.InstanceNorm2d(2, affine=True), 3).double()
    nn.init.normal_(conditional.scale_shift.weight)
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    embedding = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)

    def run(x, embedding):
        conditional.embedding = embedding
        return conditional(x)

    assert torch.autograd.gradcheck(run, (x, embedding))


def test_one_adam_step_moves_the_condition_no_further_than_the_norm():
    denoiser = condition(planned_network(), 1)
    norm = next(m for m in denoiser.modules() if isinstance(m, ConditionalNorm))
    timestep, rate = torch.tensor([0, 300, 999]), 1e-3
    before = [t.detach().clone() for t in norm.scale_shift(denoiser.time_embedding(timestep)).chunk(2, 1)]
    optimizer = torch.optim.Adam(norm.scale_shift.parameters(), rate)
    denoiser(torch.randn(3, 1, 16, 16), timestep).square().mean().backward()
    optimizer.step()
    for old, new in zip(before, norm.scale_shift(denoiser.time_embedding(timestep)).chunk(2, 1), strict=True):
        # the weights move a(t) by at most the rate, the bias of the layer by the rate once more
        assert 0 < (new - old).abs().max() <= 2 * rate * 1.001


def test_samples_do_not_see_each_others_time():
    denoiser = trained(condition(planned_network(), 1)).double()
    images = torch.randn(2, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        together = denoiser(images, torch.tensor([5, 900]))
        for i, timestep in enumerate((5, 900)):
            alone = denoiser(images[i : i + 1], torch.tensor([timestep]))
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-11, rtol=1e-11)


def test_copies_and_averages_have_parameters_of_their_own():
    """The trap of conditioning by hooks: a copy that reads the original's parameters."""
    denoiser = trained(condition(planned_network(), 1))
    denoiser(torch.randn(1, 1, 16, 16), torch.tensor([5])).sum().backward()
    images, timestep = torch.randn(1, 1, 16, 16), torch.tensor([400])
    copies = [deepcopy(denoiser), AveragedModel(denoiser).module]
    with torch.no_grad():
        before = denoiser(images, timestep)
        for parameter in denoiser.parameters():
            parameter.mul_(-1.5)
        for copy in copies:
            torch.testing.assert_close(copy(images, timestep), before)


def test_every_parameter_gets_a_gradient_except_unused_heads():
    denoiser = condition(planned_network(), 1)
    denoiser(torch.randn(2, 1, 16, 16), torch.tensor([5, 6])).square().mean().backward()
    without = {name for name, p in denoiser.named_parameters() if p.grad is None}
    assert without == {"network.decoder.seg_layers.0.weight", "network.decoder.seg_layers.0.bias"}


def test_compiles_into_one_graph():
    denoiser = trained(condition(planned_network(), 1))
    compiled = torch.compile(denoiser, backend="eager", fullgraph=True)
    images, timestep = torch.randn(2, 1, 16, 16), torch.tensor([5, 900])
    torch.testing.assert_close(compiled(images, timestep), denoiser(images, timestep))


@pytest.mark.parametrize(
    ("layer", "message"),
    [(nn.GroupNorm(2, 4), "only affine instance or batch"), (nn.InstanceNorm2d(4), "only affine instance or batch")],
)
def test_norms_that_cannot_fold_are_refused(layer, message):
    with pytest.raises(NotImplementedError, match=message):
        condition(nn.Sequential(nn.Conv2d(1, 4, 3), layer), 1)


def test_a_network_without_norms_is_refused():
    with pytest.raises(NotImplementedError, match="no normalization layer"):
        condition(nn.Sequential(nn.Conv2d(1, 4, 3)), 1)
