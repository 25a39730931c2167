"""Samples, their figures and the report of denoisers of a data set that nnU-Net planned and preprocessed."""

import json
import os
from pathlib import Path

import denoisers
import numpy as np
import pytest
import SimpleITK as sitk
import tiny
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.cli import main
from nnunet_diffusion.cli.sample import real_batches
from nnunet_diffusion.pretraining.denoiser_file import build, load_denoiser, plan_identity
from nnunet_diffusion.samples.features import INCEPTION_FILE, encoder_features
from nnunet_diffusion.samples.figures import frechet_distance
from nnunet_diffusion.samples.files import write_sample

pytestmark = pytest.mark.slow
WHERE = ("-d", str(tiny.ID), "-p", tiny.PLANS, "--device", "cpu", "--steps", "5", "-n", "10")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folders of a 2-D and a 3-D denoiser of the tiny data set, which have learned nothing."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        preprocessed = tiny.prepare()
        plans = PlansManager(str(preprocessed / f"{tiny.PLANS}.json"))
        dataset_json = json.loads((preprocessed / "dataset.json").read_text())
        found = {}
        for name in ("2d", "3d_fullres"):
            model = f"DenoisingDiffusionTrainer__{tiny.PLANS}__{name}"
            found[name] = Path(os.environ["nnUNet_results"], tiny.NAME, model, "fold_all")
            found[name].mkdir(parents=True)
            denoisers.write(found[name] / "denoiser.pth", plan_identity(plans, name, dataset_json), image_range=(-3, 3))
        yield found


@pytest.mark.parametrize(("configuration", "voxels"), [("2d", {1, 16}), ("3d_fullres", {8, 16})])
def test_from_a_denoiser_to_figures_and_a_page(folders, capsys, configuration, voxels):
    folder = folders[configuration] / "samples"
    assert main(["sample", *WHERE, "-c", configuration]) == 0
    assert "10 image(s) drawn" in capsys.readouterr().out
    scan = sitk.ReadImage(str(folder / "sample_00009_0000.nii.gz"))
    values = sitk.GetArrayFromImage(scan)
    assert set(scan.GetSize()) == voxels and set(scan.GetSpacing()) <= {1.0, 2.0, 3.0}
    assert np.isfinite(values).all() and -200 < values.min() < values.max() < 400  # the scans' own range
    assert main(["evaluate_samples", str(folder), "--device", "cpu", "--real", "12"]) == 0
    printed = capsys.readouterr().out
    content = json.loads((folder / "quality_encoder.json").read_text())
    assert "10 samples, 12 real patches of Dataset990_Tiny" in printed and content["features"] in printed
    assert content["values"]["FID"] > 0 and 0 <= content["values"]["precision"] <= 1
    main(["report", "-d", str(tiny.ID)])
    page = Path(os.environ["nnUNet_results"], tiny.NAME, "report.html").read_text()
    assert content["features"] in page and "Samples of the denoiser" in page


def test_inception_by_command_from_torchs_cache(folders, tmp_path, monkeypatch, capsys):
    """Weights that nobody trained, where torch keeps those that it downloaded."""
    from torchvision.models import inception_v3

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    network = inception_v3(weights=None, aux_logits=True, transform_input=False, init_weights=False)
    torch.save(network.state_dict(), tmp_path / "checkpoints" / INCEPTION_FILE)
    out = str(tmp_path / "samples")
    assert main(["sample", *WHERE, "-c", "2d", "-o", out, "-n", "5"]) == 0
    assert main(["evaluate_samples", out, "--device", "cpu", "--features", "inception"]) == 0
    content = json.loads((tmp_path / "samples" / "quality_inception.json").read_text())
    assert content["features"].startswith("torchvision Inception v3, weights ")
    assert content["features"] in capsys.readouterr().out
    assert all(np.isfinite(value) for value in content["values"].values())


def test_copies_of_real_patches_are_taken_for_real(folders, tmp_path, capsys):
    out = tmp_path / "samples"
    assert main(["sample", *WHERE, "-c", "2d", "-o", str(out)]) == 0
    description = json.loads((out / "samples.json").read_text())
    for number, image in enumerate(np.concatenate(list(real_batches(description, 2, 8)))[:10]):
        write_sample(str(out), number, image, description["plan"])
    assert main(["evaluate_samples", str(out), "--device", "cpu"]) == 0
    values = json.loads((out / "quality_encoder.json").read_text())["values"]
    assert values["precision"] == values["recall"] == values["F1"] == 1
    assert values["FID"] < 1e-3 and values["sFID"] < 1e-3  # 16-bit voxels are rounded


def test_real_patches_are_nearer_to_real_patches_than_noise_is(folders):
    content = load_denoiser(str(folders["2d"] / "denoiser.pth"))
    extractor = encoder_features(build(content).eval(), content["timestep"], "")
    description = {"plan": content["plan"], "body_share": 0.5}
    real = torch.from_numpy(np.concatenate(list(real_batches(description, 20, 8))))
    first, second, noise = (extractor.extract(x) for x in (real[:80], real[80:], torch.randn(80, *real.shape[1:])))
    for kind in (0, 1):
        between, to_noise = (frechet_distance(first[kind].numpy(), x[kind].numpy()) for x in (second, noise))
        assert between < 0.5 * to_noise
