"""The process by hand and by slow second routes; the sampler on data whose denoiser is known in closed form."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from nnunet_diffusion.pretraining import pictures, process
from nnunet_diffusion.pretraining.conditioning import Denoiser
from nnunet_diffusion.pretraining.diffusion import Diffusion
from nnunet_diffusion.pretraining.images import ImageStatistics
from nnunet_diffusion.pretraining.sampler import ddim


def test_linear_schedule_by_hand():
    """Betas 0.0001..0.02: the first alpha_bar is 0.9999, the last the product of all 1 - beta."""
    alpha_bar = process.alpha_bar_schedule("linear", 1000)
    assert alpha_bar[0].item() == pytest.approx(0.9999, abs=1e-12)
    product = 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
    assert alpha_bar[-1].item() == pytest.approx(product, rel=1e-9)


@pytest.mark.parametrize(
    ("schedule", "power"),
    [
        ("cosine", lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2),
        ("sigmoid", lambda u: 1 / (1 + math.exp(-(3 - 6 * u))) - 1 / (1 + math.exp(3))),
    ],
)
def test_closed_form_schedules(schedule, power):
    """alpha_bar_t is f((t + 1) / T) / f(0), up to the last steps, where beta is capped."""
    alpha_bar = process.alpha_bar_schedule(schedule, 1000)
    for t in (0, 250, 500, 900):
        assert alpha_bar[t].item() == pytest.approx(power((t + 1) / 1000) / power(0), rel=1e-9)


@pytest.mark.parametrize("schedule", process.SCHEDULES)
@pytest.mark.parametrize("timesteps", [10, 100, 1000])
def test_schedules_fall_from_signal_to_noise(schedule, timesteps):
    alpha_bar = process.alpha_bar_schedule(schedule, timesteps)
    assert alpha_bar.shape == (timesteps,) and (alpha_bar.diff() < 0).all()
    assert alpha_bar[0] > 0.85 and 0 < alpha_bar[-1] < 0.01


def test_noise_is_added_as_one_step_after_another_would():
    """Slow route: x_t = sqrt(1 - beta_t) x_(t-1) + sqrt(beta_t) eps_t, its mean and variance after every step."""
    alpha_bar = process.alpha_bar_schedule("linear", 1000)
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    mean, variance, x_0 = torch.tensor(1.7, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64), 1.7
    for t in range(301):
        mean, variance = (1 - betas[t]).sqrt() * mean, (1 - betas[t]) * variance + betas[t]
    zero, one = torch.zeros(1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, dtype=torch.float64)
    a = alpha_bar[300:301]
    assert process.add_noise(x_0 * one, zero, a).item() == pytest.approx(mean.item(), rel=1e-9)
    assert process.add_noise(zero, one, a).item() == pytest.approx(variance.sqrt().item(), rel=1e-9)


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_a_perfect_prediction_gives_back_image_and_noise(prediction):
    x_0, noise = torch.randn(2, 4, 1, 5, 5, dtype=torch.float64)
    a = torch.tensor([0.999, 0.7, 0.1, 1e-3], dtype=torch.float64)
    x_t = process.add_noise(x_0, noise, a)
    target = process.prediction_target(prediction, x_0, noise, a)
    for estimated, true in zip(process.estimate(prediction, target, x_t, a), (x_0, noise), strict=True):
        torch.testing.assert_close(estimated, true, atol=1e-9, rtol=1e-9)


def test_v_by_hand():
    """With a = 0.64, v = 0.8 eps - 0.6 x_0 = 0.8 * 2 - 0.6 * 5 = -1.4."""
    v = process.prediction_target("v", torch.full((1, 1), 5.0), torch.full((1, 1), 2.0), torch.tensor([0.64]))
    assert v.item() == pytest.approx(-1.4)


def test_min_snr_weights_by_hand():
    """With a = 0.5, SNR 1, not capped: 1 / 1 and 1 / 2. a = 0.95: SNR 19, capped at 5: 5 / 19 and 5 / 20."""
    a = torch.tensor([0.5, 0.95])
    torch.testing.assert_close(process.loss_weight("min_snr", "epsilon", a), torch.tensor([1.0, 5 / 19]))
    torch.testing.assert_close(process.loss_weight("min_snr", "v", a), torch.tensor([0.5, 0.25]))
    assert process.loss_weight("uniform", "v", a).tolist() == [1, 1]


def test_the_mean_of_v_is_restored_where_it_can_be_known():
    """A constant patch of value 2 under little noise: v's mean is -sqrt(1 - a) * 2."""
    a = torch.tensor([0.9])
    x_0, noise = torch.full((1, 1, 64, 64), 2.0), torch.randn(1, 1, 64, 64)
    mean = process.patch_mean("v", process.add_noise(x_0, noise, a), a, (torch.zeros(1), torch.ones(1)))
    assert mean.shape == (1, 1, 1, 1)
    assert mean.item() == pytest.approx(-math.sqrt(0.1) * 2, abs=0.02)


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_the_mean_is_the_best_linear_estimate(prediction):
    """Second route: a line fitted to the true means of many noised patches of 16 voxels, channel by channel."""
    a = torch.full((20000,), 0.03)
    prior = torch.tensor([0.0, -4.0]), torch.tensor([1.0, 2.5])
    x_0 = (prior[0] + prior[1] * torch.randn(20000, 2)).reshape(20000, 2, 1, 1).expand(-1, 2, 4, 4)
    noise = torch.randn(20000, 2, 4, 4)
    x_t = process.add_noise(x_0, noise, a)
    true = process.prediction_target(prediction, x_0, noise, a).mean((2, 3))
    seen = x_t.mean((2, 3))
    ours = process.patch_mean(prediction, x_t, a, prior)
    assert ours.shape == (20000, 2, 1, 1)
    for channel in range(2):
        slope, intercept = np.polyfit(seen[:, channel], true[:, channel], 1)
        fitted, found = slope * seen[:, channel] + intercept, ours[:, channel].flatten()
        torch.testing.assert_close(found, fitted.float(), atol=0.05 * found.std().item(), rtol=0.05)


def test_sampling_starts_from_means_of_noised_images():
    """Second route: mean and spread of the patch means of many images noised to the last timestep."""
    a = torch.full((20000,), 0.004)
    prior = torch.tensor([3.0, -4.0]), torch.tensor([0.5, 2.5])
    x_0 = (prior[0] + prior[1] * torch.randn(20000, 2)).reshape(20000, 2, 1, 1).expand(-1, 2, 8, 8)
    expected = process.add_noise(x_0, torch.randn(20000, 2, 8, 8), a).mean((2, 3))
    noise = torch.randn(20000, 2, 8, 8)
    start = process.with_spread_means(noise, a, prior)
    found = start.mean((2, 3))
    torch.testing.assert_close(found.mean(0), expected.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(found.std(0), expected.std(0), atol=0, rtol=0.02)
    flat = [each - each.mean((2, 3), keepdim=True) for each in (start, noise)]
    torch.testing.assert_close(*flat, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
def test_samples_have_the_brightness_of_the_images(prediction):
    """Flat patches: their mean is all there is to know, and a network behind instance norm knows nothing of it."""
    prior = ([-4.0], [1.5])
    diffusion = Diffusion("linear", 1000, prediction, prior=prior)
    x_T = torch.randn(500, 1, 16, 16, generator=torch.Generator().manual_seed(0))

    def network(x, t):
        flat = x - x.mean((1, 2, 3), keepdim=True)  # the noise, but for its mean
        a = process.per_sample(diffusion.alpha_bar[t], x)
        return flat / (1 - a).sqrt() if prediction == "epsilon" else flat / (1 - a).sqrt() * a.sqrt()

    samples = diffusion.sample(network, x_T, 200)
    assert samples.mean().item() == pytest.approx(-4, abs=0.2)
    assert samples.mean((1, 2, 3)).std().item() == pytest.approx(1.5, abs=0.15)


def test_what_is_known_of_images_by_hand():
    """Two patches of means 2 and 6 with noise of 0.5 * 4: means of 1 and 3 in units of noise."""
    diffusion, network = Diffusion(), torch.nn.Module()
    network.input_scale, network.image_range = torch.ones(1), torch.zeros(2)
    network.calibrate = partial(Denoiser.calibrate, network)
    patches = [torch.full((1, 1, 2, 2), 2.0), torch.full((1, 1, 2, 2), 6.0)]
    diffusion.calibrate([network], ImageStatistics(np.array([0.5]), -1.0, 9.0), patches, 4)
    assert network.input_scale.tolist() == [2] and network.image_range.tolist() == [-1, 9]
    assert diffusion.description["prior"] == [[2.0], [1.0]]
    again = Diffusion(**diffusion.description)
    assert [values.tolist() for values in again.prior] == [[2.0], [1.0]]


def test_antithetic_timesteps_come_in_pairs():
    t = process.draw_timesteps(7, 1000, antithetic=True)
    assert t.shape == (7,) and (t[0::2][:3] + t[1::2] == 999).all()
    assert len(process.draw_timesteps(100, 1000, antithetic=False).unique()) > 80


def test_unknown_choices_are_refused():
    with pytest.raises(ValueError, match="schedule is 'quadratic'"):
        Diffusion(schedule="quadratic")
    with pytest.raises(ValueError, match="prediction is 'x0'"):
        Diffusion(prediction="x0")
    with pytest.raises(ValueError, match="weighting is 'p2'"):
        Diffusion(weighting="p2")
    with pytest.raises(ValueError, match="timesteps is 0"):
        Diffusion(timesteps=0)


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
@pytest.mark.parametrize("weighting", process.WEIGHTINGS)
def test_loss_equals_a_loop_over_samples(prediction, weighting):
    m, s = 0.7, 1.8
    diffusion = Diffusion("cosine", 100, prediction, weighting, prior=([m], [s]))
    x_0, noise = torch.randn(2, 3, 2, 6, 6)
    timestep = torch.tensor([3, 50, 98])

    def network(x, t):
        return 0.3 * x + t.reshape(-1, 1, 1, 1) / 100

    total = 0.0
    for i in range(3):
        a = diffusion.alpha_bar[timestep[i]].item()
        x_t = math.sqrt(a) * x_0[i] + math.sqrt(1 - a) * noise[i]
        output = 0.3 * x_t + timestep[i] / 100
        target, mean = noise[i], x_t.mean((1, 2), keepdim=True)
        mean_of_noise = math.sqrt(1 - a) / 36 / (a * s**2 + (1 - a) / 36) * (mean - math.sqrt(a) * m)
        if prediction == "epsilon":
            output = output + mean_of_noise
        else:
            target = math.sqrt(a) * noise[i] - math.sqrt(1 - a) * x_0[i]
            output = output + (mean_of_noise - math.sqrt(1 - a) * mean) / math.sqrt(a)
        snr = a / (1 - a)
        weight = {"uniform": 1, "min_snr": min(snr, 5) / (snr if prediction == "epsilon" else snr + 1)}[weighting]
        total += weight * ((output - target) ** 2).mean().item() / 3
    assert diffusion.loss(network, x_0, timestep, noise).item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("prediction", process.PREDICTIONS)
@pytest.mark.parametrize(("eta", "steps"), [(0.0, 200), (1.0, 1000)])
def test_samples_follow_a_gaussian_whose_denoiser_is_known(prediction, eta, steps):
    """For x_0 ~ N(m, s^2), E[eps | x_t] = sqrt(1 - a) (x_t - sqrt(a) m) / (a s^2 + 1 - a)."""
    m, s = 0.8, 0.3
    alpha_bar = process.alpha_bar_schedule("linear", 1000)

    def predict(x, t):
        a = process.per_sample(alpha_bar[t], x)
        noise = (1 - a).sqrt() * (x - a.sqrt() * m) / (a * s**2 + 1 - a)
        return noise if prediction == "epsilon" else (noise - (1 - a).sqrt() * x) / a.sqrt()

    generator = torch.Generator().manual_seed(3)
    x_T = torch.randn(4, 1, 50, 50, generator=generator, dtype=torch.float64)
    samples = ddim(predict, x_T, alpha_bar, prediction, steps=steps, eta=eta, generator=generator)
    assert samples.mean().item() == pytest.approx(m, abs=0.02)
    assert samples.std().item() == pytest.approx(s, abs=0.02)


def test_clipped_samples_stay_in_range():
    alpha_bar = process.alpha_bar_schedule("linear", 100)
    for most in (torch.tensor(0.5), torch.tensor([0.5, 5.0]).reshape(1, 2, 1, 1)):
        x_T = torch.randn(2, 2, 8, 8)
        samples = ddim(lambda x, t: torch.zeros_like(x), x_T, alpha_bar, steps=10, clip=(-most, most))
        assert (samples.abs() <= most + 1e-6).all() and samples.abs().amax((0, 2, 3)).tolist() == pytest.approx(
            most.expand(1, 2, 1, 1).flatten().tolist()
        )


def test_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="needs the extra `reference`")
    for ours, theirs in (("linear", "linear"), ("cosine", "squaredcos_cap_v2")):
        scheduler = diffusers.DDIMScheduler(1000, beta_schedule=theirs, clip_sample=False, steps_offset=0)
        expected = scheduler.alphas_cumprod.double()
        torch.testing.assert_close(process.alpha_bar_schedule(ours, 1000), expected, atol=1e-5, rtol=1e-4)


def test_pictures_are_written(tmp_path):
    pictures.loss_curves(str(tmp_path / "progress.png"), [1.0, 0.5], [0.9, 0.6], [1e-3, 5e-4])
    for shape in ((5, 1, 8, 9), (2, 2, 4, 8, 9)):
        pictures.sample_sheet(
            str(tmp_path / "sheet.png"), np.random.rand(*shape), np.random.rand(3, *shape[1:]), "name"
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["progress.png", "sheet.png"]
