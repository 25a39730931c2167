"""Mask pathway and image pathway: what they compute, how a round goes on, where gradients flow."""

import pytest
import torch
from test_networks import planned_network, trained

from nnunet_diffusion.co_training.health import held_out_figures, mask_health
from nnunet_diffusion.co_training.mask_diffusion import (
    Draw,
    MaskDiffusion,
    MaskStudent,
    draw_rounds,
    one_class,
)
from nnunet_diffusion.co_training.teachers import CrossPseudo, DiffusionTeacher, Teacher
from nnunet_diffusion.pretraining.conditioning import condition
from nnunet_diffusion.pretraining.diffusion import Diffusion

CLASSES, CHANNELS = 3, 2
NETWORKS = [(kind, dim) for kind in ("PlainConvUNet", "ResidualEncoderUNet") for dim in (2, 3)]


def pathway(kind, dim, outputs):
    both = CLASSES + CHANNELS
    return trained(condition(planned_network(kind, dim, channels=both, outputs=outputs), both))


def pair(kind="PlainConvUNet", dim=2):
    made = MaskDiffusion(pathway(kind, dim, CLASSES), pathway(kind, dim, CHANNELS), CHANNELS).double()
    made.mask_pathway.input_scale.fill_(1)
    made.calibrate(torch.tensor([0.5, 2.0]), torch.tensor([-9.0, 9.0]))
    return made


def inputs(dim=2, rounds=0, diffusion=None):
    images = torch.randn(2, CHANNELS, *[8] * dim, dtype=torch.float64)
    draws = draw_rounds(images, CLASSES, rounds, 1000)
    as_double = [draws.first, *(draw for pair in draws.later for draw in pair)]
    assert all(draw.noise.shape[0] == 2 for draw in as_double)
    return images, draws


@pytest.fixture
def diffusion():
    made = Diffusion("sigmoid")
    made.alpha_bar = made.alpha_bar.double()
    return made


# ---------------------------------------------------------------- one pass


@pytest.mark.parametrize(("kind", "dim"), NETWORKS)
def test_pathways_by_hand(kind, dim, diffusion):
    """S sees sqrt(1 - a) noise and x; R sees sqrt(a) x + sqrt(1 - a) noise and the mask; each told its t.

    x is the image in units of its noise.
    """
    networks, (images, draws) = pair(kind, dim), inputs(dim, 1)
    (image_draw, _), mask = draws.later[0], torch.rand(2, CLASSES, *[8] * dim, dtype=torch.float64)
    logits = networks.segment(images, draws.first, diffusion)
    restored, error = networks.restore(images, mask, image_draw, diffusion)
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64).reshape(-1, *[1] * dim)
    for b in range(2):
        a = diffusion.alpha_bar[draws.first.timestep[b]]
        seen = torch.cat([(1 - a).sqrt() * draws.first.noise[b], images[b] / scale])[None]
        alone = networks.mask_pathway(seen, draws.first.timestep[b : b + 1])[0]
        torch.testing.assert_close(logits[b], alone, atol=1e-9, rtol=1e-7)
    errors = []
    for b in range(2):
        a = diffusion.alpha_bar[image_draw.timestep[b]]
        x_t = a.sqrt() * images[b] / scale + (1 - a).sqrt() * image_draw.noise[b]
        timestep = image_draw.timestep[b : b + 1]
        noise = diffusion.predict(
            lambda x, t, b=b: networks.image_pathway(torch.cat([x, mask[b : b + 1]], 1), t), x_t[None], timestep
        )[0]
        errors.append((noise - image_draw.noise[b]).square().mean())
        expected = scale * (x_t - (1 - a).sqrt() * noise) / a.sqrt()
        torch.testing.assert_close(restored[b], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(error, sum(errors) / 2, atol=1e-5, rtol=1e-5)


def test_a_perfect_prediction_restores_the_image(diffusion):
    networks, (images, draws) = pair(), inputs(rounds=1)
    image_draw = draws.later[0][0]
    diffusion.predict = lambda network, x_t, timestep: image_draw.noise.double()
    restored, error = networks.restore(images, torch.zeros(2, CLASSES, 8, 8), image_draw, diffusion)
    torch.testing.assert_close(restored, images, atol=1e-6, rtol=1e-6)
    assert error < 1e-12


def test_images_are_noised_no_further_than_half():
    images = torch.zeros(2000, 1, 1, 1)
    draws = draw_rounds(images, CLASSES, 1, 1000)
    image_draw, mask_draw = draws.later[0]
    assert image_draw.timestep.max() < 500 < mask_draw.timestep.max() and draws.first.timestep.max() > 990
    assert Diffusion("sigmoid").alpha_bar[499] == pytest.approx(0.5, abs=2e-3)


# ---------------------------------------------------------------- the cycle


@pytest.mark.parametrize(("kind", "dim"), NETWORKS)
def test_the_gradient_reaches_the_mask_pathway_through_the_restored_image(kind, dim, diffusion):
    networks, (images, draws) = pair(kind, dim), inputs(dim, 1)
    image_draw = draws.later[0][0]
    logits, error = networks(images, draws.first, image_draw, diffusion)
    error.backward()
    used = {name for name, p in networks.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {"mask_pathway", "image_pathway"} == {name.split(".")[0] for name in used}
    detached = one_class(logits).detach()
    gradients = torch.autograd.grad(
        networks.restore(images, detached, image_draw, diffusion)[1],
        list(networks.mask_pathway.parameters()), allow_unused=True,
    )  # fmt: skip
    assert all(gradient is None for gradient in gradients), "only the mask leads there"


def test_masks_of_one_class_have_the_gradient_of_the_probabilities():
    logits = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    mask, weight = one_class(logits), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert set(mask.detach().unique().tolist()) == {0.0, 1.0} and torch.equal(mask.argmax(1), logits.argmax(1))
    torch.testing.assert_close(*(torch.autograd.grad((m * weight).sum(), logits)[0] for m in (mask, logits.softmax(1))))


def test_the_gradient_of_the_cycle_is_the_slope(diffusion, monkeypatch):
    """Central difference along a random direction of the mask pathway's weights; of soft masks, which have a slope."""
    monkeypatch.setattr("nnunet_diffusion.co_training.mask_diffusion.one_class", lambda logits: logits.softmax(1))
    networks, (images, draws) = pair(), inputs(rounds=1)
    diffusion.predict = lambda network, x_t, timestep: network(x_t, timestep)  # in float64 throughout
    image_draw = Draw(draws.later[0][0].timestep, draws.later[0][0].noise.double())
    weight = networks.mask_pathway.network.decoder.seg_layers[-1].weight
    direction = torch.randn_like(weight)
    networks(images, draws.first, image_draw, diffusion)[1].backward()
    slope, step, errors = (weight.grad * direction).sum(), 1e-5, []
    with torch.no_grad():
        for sign in (1, -2):
            weight.add_(sign * step * direction)
            errors.append(networks(images, draws.first, image_draw, diffusion)[1])
    torch.testing.assert_close((errors[0] - errors[1]) / (2 * step), slope, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- rounds


@pytest.mark.parametrize("chained", [True, False])
def test_rounds_against_the_formula(chained, diffusion):
    """p_j = S(R(x | p_j-1)) chained, p_j = S(R(x | p_0)) redrawn: step by step."""
    networks, (images, draws) = pair(), inputs(rounds=3)
    masks, errors = networks.refine(images, draws, diffusion, chained)
    assert len(masks) == 4 and len(errors) == 3
    expected = [networks.segment(images, draws.first, diffusion)]
    for j, (image_draw, mask_draw) in enumerate(draws.later, 1):
        mask = expected[j - 1] if chained else expected[0]
        restored, error = networks.restore(images, one_class(mask), image_draw, diffusion)
        expected.append(networks.segment(restored, mask_draw, diffusion))
        torch.testing.assert_close(errors[j - 1], error)
    for mask, other in zip(masks, expected, strict=True):
        torch.testing.assert_close(mask, other)


def test_a_chain_and_redraws_part_in_the_second_round(diffusion):
    networks, (images, draws) = pair(), inputs(rounds=2)
    chain, redraws = (networks.refine(images, draws, diffusion, chained)[0] for chained in (True, False))
    assert torch.equal(chain[0], redraws[0]) and torch.equal(chain[1], redraws[1])
    assert (chain[2] - redraws[2]).abs().max() > 1e-6


def test_nothing_flows_between_the_pathways_unless_asked_for(diffusion):
    """E_1 teaches R alone, D(q_1) S alone; not detached, each teaches both."""
    networks, (images, draws) = pair(), inputs(rounds=1)
    for is_detached in (True, False):
        masks, errors = networks.refine(images, draws, diffusion, is_detached=is_detached)
        for loss, own in ((errors[0], "image_pathway"), (masks[1].square().mean(), "mask_pathway")):
            networks.zero_grad()
            loss.backward(retain_graph=True)
            reached = {name.split(".")[0] for name, p in networks.named_parameters()
                       if p.grad is not None and p.grad.abs().max() > 0}  # fmt: skip
            assert reached == ({own} if is_detached else {"mask_pathway", "image_pathway"})


def test_a_chain_carries_the_gradient_back_to_the_first_mask(diffusion):
    networks, (images, draws) = pair(), inputs(rounds=2)
    images.requires_grad_()
    masks, _ = networks.refine(images, draws, diffusion, is_detached=False)
    (through_masks,) = torch.autograd.grad(masks[2].sum(), masks[0], retain_graph=True)
    assert through_masks.abs().max() > 0


# ---------------------------------------------------------------- the twin student


def test_student_repeats_its_prediction_and_draws_in_training():
    student = MaskStudent(pathway("PlainConvUNet", 2, CLASSES), CLASSES, (8, 8))
    student.timestep.fill_(700)
    images = torch.randn(2, CHANNELS, 8, 8)
    with torch.no_grad():
        assert not torch.equal(student(images), student(images))
        student.eval()
        predicted = student(images)
        assert torch.equal(predicted, student(images))
        torch.testing.assert_close(predicted[1:], student(images[1:]), atol=1e-5, rtol=1e-4)
        again = MaskStudent(pathway("PlainConvUNet", 2, CLASSES), CLASSES, (8, 8)).eval()
        again.load_state_dict(student.state_dict())
        assert torch.equal(predicted, again(images)), "a model folder holds all that decides"


# ---------------------------------------------------------------- teachers


def counting(network):
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    return calls


def labeled_judge(output):
    return (output[0] if isinstance(output, list) else output).square().mean()


@pytest.mark.parametrize("rounds", [1, 3])
def test_cost_of_a_diffusion_teacher_is_what_the_docs_say(rounds):
    """A batch takes one pass of the student, 1 + K of the mask pathway and K of the image pathway."""
    networks = pair().float()
    student = planned_network(channels=CHANNELS, outputs=CLASSES)
    teacher = DiffusionTeacher(networks, 0.0, True, Diffusion("sigmoid"), CLASSES, rounds, True)
    calls = [counting(n) for n in (student, networks.mask_pathway, networks.image_pathway)]
    images = torch.randn(2, CHANNELS, 8, 8)
    loss, figures = teacher.unlabeled(student, images)
    assert [len(c) for c in calls] == [1, 1 + rounds, rounds] and figures["agreement"].shape == (2,)
    (loss + teacher.labeled(student, images, labeled_judge)).backward()
    assert all(any(p.grad is not None and p.grad.abs().max() > 0 for p in n.parameters()) for n in
               (student, networks.mask_pathway, networks.image_pathway))  # fmt: skip


def test_cross_pseudo_takes_outputs_of_all_stages_and_both_learn():
    student, second = (planned_network(channels=1, outputs=CLASSES, deep_supervision=True) for _ in range(2))
    teacher, images = CrossPseudo(second, 0.0, False), torch.randn(2, 1, 8, 8)
    (teacher.unlabeled(student, images)[0] + teacher.labeled(student, images, labeled_judge)).backward()
    assert all(network.decoder.seg_layers[-1].weight.grad.abs().max() > 0 for network in (student, second))


def test_no_teacher_is_supervised_training():
    student = planned_network(channels=1, outputs=CLASSES)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(Teacher().labeled(student, images, labeled_judge), labeled_judge(student(images)))


def test_pathways_compile_into_one_graph(diffusion):
    networks, (images, draws) = pair(), inputs(rounds=1)
    expected = networks.refine(images, draws, diffusion)[0]
    keys = list(networks.state_dict())
    networks.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(networks.refine(images, draws, diffusion)[0], expected)
    assert list(networks.state_dict()) == keys


# ---------------------------------------------------------------- health


def test_health_is_of_masks_of_one_class(diffusion, monkeypatch):
    """Second route: the error with one-hot masks, and with the better of two masks that say nothing."""
    networks, (images, draws) = pair(), inputs(rounds=1)
    draw = draws.later[0][0]
    seen, restore = [], networks.restore
    monkeypatch.setattr(networks, "restore", lambda x, mask, *rest: seen.append(mask) or restore(x, mask, *rest))
    figures = held_out_figures(networks, images, CLASSES, draw, 0, diffusion)
    mask, *blank = (each.detach().argmax(1) for each in seen)
    assert all(set(each.detach().unique().tolist()) <= {0.0, 1.0} for each in (seen[0], seen[2]))
    shares = torch.stack([(mask == c).double().mean() for c in range(CLASSES)])
    torch.testing.assert_close(figures["shares"].double(), shares)
    torch.testing.assert_close(seen[1][0, :, 0, 0].detach().double(), shares)
    assert (blank[1] == shares.argmax()).all()
    errors = [restore(images, each, draw, diffusion)[1] for each in seen]
    torch.testing.assert_close(figures["loss"], errors[0])
    torch.testing.assert_close(figures["blank_loss"], min(errors[1:]))


@pytest.mark.parametrize(
    ("loss", "blank", "shares", "words"),
    [
        (0.10, 0.20, [0.6, 0.3, 0.1], "The masks help"),
        (0.10, 0.20, [0.995, 0.005, 0.0], "WARNING: the masks are all of one class"),
        (0.20, 0.20, [0.6, 0.3, 0.1], "WARNING: the masks do not help"),
        (float("nan"), 0.20, [0.6, 0.3, 0.1], "WARNING: the masks do not help"),
    ],
)
def test_health_is_told_in_words(loss, blank, shares, words):
    assert mask_health(loss, blank, shares).startswith(words)


def test_health_gives_its_figures():
    text = mask_health(0.125, 0.25, [0.75, 0.25, 0.0])
    assert "2 of 3 classes" in text and "75%" in text and "0.1250" in text and "0.2500" in text
