"""Figures of generated images: closed forms, brute force, published implementations; extractors; the command."""

import json
import math
import re

import denoisers
import numpy as np
import pytest
import torch

from nnunet_diffusion.cli import main
from nnunet_diffusion.cli.evaluate_samples import measure
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.pretraining.denoiser_file import build, load_denoiser
from nnunet_diffusion.samples.features import INCEPTION_FILE, encoder_features, inception_features
from nnunet_diffusion.samples.figures import f1, frechet_distance, precision_and_recall


def gaussian(n, d, mean=0.0, seed=0):
    return np.random.default_rng(seed).normal(mean, 1, (n, d))


# ---------------------------------------------------------------- Fréchet distance


def test_frechet_by_hand():
    """One feature: (m_r - m_g)^2 + (s_r - s_g)^2. {0, 2} has 1 and sqrt 2, {3, 9} has 6 and sqrt 18: 25 + 8."""
    assert frechet_distance(np.array([[0.0], [2.0]]), np.array([[3.0], [9.0]])) == pytest.approx(33)


@pytest.mark.parametrize(("n", "d"), [(50, 4), (10, 30)])  # more images than features, and fewer
def test_identical_sets_are_at_0_and_a_shift_costs_its_square(n, d):
    x = gaussian(n, d)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x[::-1] + 2) == pytest.approx(4 * d)


def test_scaled_sets_have_a_closed_form():
    """C_g = 9 C_r: tr(C + 9 C - 2 * 3 C) = 4 tr(C)."""
    x = gaussian(100, 6)
    x -= x.mean(0)
    assert frechet_distance(x, 3 * x) == pytest.approx(4 * np.trace(np.cov(x.T)))


def test_large_shifted_gaussians_reach_the_closed_form():
    """N(0, 1) and N(0.5, 1) in 5 dimensions: 5 * 0.25 = 1.25, from samples about that."""
    assert frechet_distance(gaussian(20000, 5), gaussian(20000, 5, 0.5, seed=1)) == pytest.approx(1.25, abs=0.05)


@pytest.mark.parametrize(("n", "m", "d"), [(60, 40, 7), (12, 9, 15)])
def test_agrees_with_the_square_root_of_a_matrix(n, m, d):
    """Second route, as published: the trace is the sum of the roots of the eigenvalues of C_r C_g."""
    x, y = gaussian(n, d) * np.arange(1, d + 1), gaussian(m, d, 1, seed=1) @ gaussian(d, d, seed=2)
    covariances = np.cov(x.T), np.cov(y.T)
    trace = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(0)).sum()
    slow = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1]) - 2 * trace
    assert frechet_distance(x, y) == pytest.approx(slow, rel=1e-6)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y))


def test_turning_and_shifting_all_changes_nothing():
    x, y = gaussian(40, 6), gaussian(30, 6, 0.3, seed=1)
    turn = np.linalg.qr(gaussian(6, 6, seed=2))[0]
    assert frechet_distance(x @ turn + 5, y @ turn + 5) == pytest.approx(frechet_distance(x, y))


# ---------------------------------------------------------------- precision and recall


def test_precision_and_recall_by_hand():
    """One neighbor, real 0 1 5: radii 1 1 4. Generated 1.5 9 20: radii 7.5 7.5 11.

    1.5 is within 1 of 1 (and within 4 of 5), 9 within 4 of 5, 20 within none: precision 2/3. All of 0, 1, 5 are within
    7.5 of 1.5: recall 1.
    """
    real, generated = np.array([[0.0], [1.0], [5.0]]), np.array([[1.5], [9.0], [20.0]])
    assert precision_and_recall(real, generated, 1) == pytest.approx((2 / 3, 1))
    assert f1(2 / 3, 1) == pytest.approx(0.8) and f1(0, 0) == 0


def test_identical_and_disjoint_sets():
    x = gaussian(30, 4)
    assert precision_and_recall(x, x) == (1, 1)
    assert precision_and_recall(x, x + 100) == (0, 0)


def test_a_collapsed_generator_is_precise_and_recalls_little():
    real = gaussian(200, 3)
    precision, recall = precision_and_recall(real, 0.05 * gaussian(200, 3, seed=1))
    assert precision > 0.95 and recall < 0.1


@pytest.mark.parametrize("k", [1, 3])
def test_agrees_with_loops(k):
    real, generated = gaussian(25, 2), 2 + 0.5 * gaussian(18, 2, seed=1)

    def covered(points, members):
        radii = [sorted(math.dist(a, b) for b in members)[k] for a in members]
        return np.mean([any(math.dist(p, m) <= r for m, r in zip(members, radii, strict=True)) for p in points])

    expected = covered(generated, real), covered(real, generated)
    assert precision_and_recall(real, generated, k) == pytest.approx(expected)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1


def test_many_points_are_compared_in_blocks():
    real, generated = gaussian(700, 2), gaussian(1100, 2, seed=1)
    precision, recall = precision_and_recall(real, generated)
    order = np.random.default_rng(0).permutation
    assert (precision, recall) == precision_and_recall(real[order(700)], generated[order(1100)])


@pytest.mark.parametrize("function", [frechet_distance, precision_and_recall])
def test_too_few_or_other_features_are_refused(function):
    with pytest.raises(ValueError, match="this takes at least"):
        function(gaussian(1, 3), gaussian(9, 3))
    with pytest.raises(ValueError, match=r"must be \(n, d\)"):
        function(gaussian(9, 3), gaussian(9, 4))


# ---------------------------------------------------------------- published implementations


class Identity(torch.nn.Module):
    """torchmetrics' interface of an extractor, for features that are there already."""

    num_features = 6

    def forward(self, x):
        return x


def test_agrees_with_torchmetrics():
    image = pytest.importorskip("torchmetrics.image.fid", reason="needs the extra `reference`")
    x, y = gaussian(50, 6), gaussian(40, 6, 0.5, seed=1)
    metric = image.FrechetInceptionDistance(feature=Identity(), input_img_size=(6,)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(x), real=True)
    metric.update(torch.from_numpy(y), real=False)
    assert frechet_distance(x, y) == pytest.approx(metric.compute().item(), rel=1e-4)


def test_agrees_with_prdc():
    prdc = pytest.importorskip("prdc", reason="needs the extra `reference`")
    x, y = gaussian(80, 5), gaussian(60, 5, 0.5, seed=1)
    theirs = prdc.compute_prdc(x, y, nearest_k=3)
    assert precision_and_recall(x, y, 3) == pytest.approx((theirs["precision"], theirs["recall"]))


# ---------------------------------------------------------------- extractors


@pytest.mark.parametrize(("dim", "grid"), [(2, 64), (3, 64)])
def test_encoder_features_have_a_name_and_a_size(tmp_path, dim, grid):
    plan = denoisers.plan(dim)
    denoiser = build(load_denoiser(denoisers.write(tmp_path / "d.pth", plan))).eval()
    extractor = encoder_features(denoiser, 10, "abc")
    pooled, spatial = extractor.extract(torch.randn(5, 1, *plan["patch_size"]))
    assert pooled.shape == (5, 8) and spatial.shape == (5, 6 * grid)  # 8 features, a middle stage of 6 channels
    assert extractor.name == "encoder of denoiser abc, folded at timestep 10"


def test_missing_inception_weights_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=rf"no .*{INCEPTION_FILE}.*--inception_weights, or take --features enc"):
        inception_features(None, (0, 1), "cpu")
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="weights.pth holds no state dict of torchvision's inception_v3"):
        inception_features(str(tmp_path / "weights.pth"), (0, 1), "cpu")


@pytest.mark.slow
def test_inception_shows_gray_levels_to_torchvisions_network(tmp_path):
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, aux_logits=True, transform_input=False, init_weights=False).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    extractor = inception_features(str(tmp_path / "weights.pth"), (-2.0, 2.0), "cpu")
    image = torch.linspace(-2, 2, 299).expand(1, 1, 299, 299)  # of full size: resizing changes nothing
    pooled, spatial = extractor.extract(image)
    assert pooled.shape == (1, 2048) and spatial.shape == (1, 7 * 17 * 17)
    network.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(pooled, network((image / 2).expand(-1, 3, -1, -1)), atol=1e-4, rtol=1e-4)
    in_3d = extractor.extract(torch.stack([image * 0, image, image * 0], 2))[0]
    torch.testing.assert_close(in_3d, pooled, atol=1e-4, rtol=1e-4)  # the middle slice


def test_all_figures_of_sets_with_known_answers():
    """Pooled features of the same images decide FID, precision and recall; spatial ones, moved by 2, decide sFID."""
    x, spatial = gaussian(60, 4), gaussian(60, 3, seed=1)
    values = measure([x, spatial], [x, spatial + 2], 3)["values"]
    assert values == pytest.approx({"FID": 0, "sFID": 4 * 3, "precision": 1, "recall": 1, "F1": 1}, abs=1e-6)
    collapsed = 0.05 * gaussian(60, 4, seed=2)
    values = measure([x, spatial], [collapsed, spatial], 3)["values"]
    assert values["precision"] > 0.9 and values["recall"] < 0.2 and values["sFID"] == pytest.approx(0, abs=1e-6)
    assert values["FID"] > 1 and values["F1"] == pytest.approx(f1(values["precision"], values["recall"]))


def test_fewer_images_than_features_is_said():
    few = measure([gaussian(6, 8), gaussian(6, 3)], [gaussian(9, 8), gaussian(9, 3)], 3)
    assert [warning[:40] for warning in few["warnings"]] == ["FID: 6 images for 8 features: the covari"]


# ---------------------------------------------------------------- the command


def test_an_empty_or_foreign_folder_is_named(tmp_path, session_folders, capsys):
    assert main(["evaluate_samples", str(tmp_path)]) == 1
    assert f"{tmp_path} has no samples.json: draw samples with" in capsys.readouterr().err
    (tmp_path / "samples.json").write_text("[]")
    assert main(["evaluate_samples", str(tmp_path)]) == 1
    assert "samples.json: the whole file: Input should be a valid dictionary, not []: draw" in capsys.readouterr().err
    (tmp_path / "samples.json").write_text(json.dumps({"denoiser": "d.pth", "plan": denoisers.plan()}))
    assert main(["evaluate_samples", str(tmp_path)]) == 1
    assert "0 sample(s) and 0 real patches: -k 3 takes at least 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("denoiser", 3),
        ("plan", None),
        ("plan.dataset_name", "../x"),
        ("plan.plans_name", ["x"]),
        ("plan.patch_size", [8]),
        ("plan.transpose_forward", [0, 0, 1]),
        ("plan.normalization_schemes", ["CTNormalization"] * 2),
        ("plan.intensities", {"0": {"mean": 1.0}}),
        ("plan.channel_names", {}),
        ("body_share", 2.0),
    ],
)
def test_a_faulty_description_is_named_with_its_key(tmp_path, session_folders, capsys, key, value):
    content = {"denoiser": "d.pth", "plan": denoisers.plan()}
    part = content["plan"] if key.startswith("plan.") else content
    part[key.removeprefix("plan.")] = value
    (tmp_path / "samples.json").write_text(json.dumps(content))
    assert main(["evaluate_samples", str(tmp_path)]) == 1
    assert re.search(rf"samples.json: {key}: .*: draw them again with nnunet_diff", capsys.readouterr().err)


def test_other_features_than_asked_for_and_another_denoiser_are_named(tmp_path, session_folders, capsys):
    path, out = denoisers.write(tmp_path / "d.pth"), str(tmp_path / "samples")
    assert main(["sample", "--denoiser", path, "-n", "4", "--steps", "2", "-o", out, "--device", "cpu"]) == 0
    command = ["evaluate_samples", out, "--device", "cpu"]
    two = denoisers.write(tmp_path / "two.pth", denoisers.plan(channels=2))
    for more, message in (
        (["--inception_weights", "x.pth"], "--inception_weights: only with --features inception"),
        (["--denoiser", two], "two.pth was made for other patches than the samples"),
        ([], "-p nnUNetTinyPlans: there is no "),
    ):
        assert main([*command, *more]) == 1
        assert message in capsys.readouterr().err
