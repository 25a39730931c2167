"""Drawing images: seeded whatever the batch, in real intensities, as scans lie; the command and what it refuses."""

import json
import re
from typing import get_args, get_type_hints

import denoisers
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from full_disk import no_file_longer_than
from nnunetv2.preprocessing.normalization.default_normalization_schemes import CTNormalization, RGBTo01Normalization

from nnunet_diffusion import locks
from nnunet_diffusion.cli import main
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import NotWritten
from nnunet_diffusion.marks import WORK
from nnunet_diffusion.pretraining.denoiser_file import build, load_denoiser
from nnunet_diffusion.pretraining.diffusion import Diffusion
from nnunet_diffusion.pretraining.draw import draw_images
from nnunet_diffusion.pretraining.process import PREDICTIONS, SCHEDULES
from nnunet_diffusion.pretraining.schemas import Process
from nnunet_diffusion.samples.files import numbers_in, read_samples, write_sample
from nnunet_diffusion.samples.intensities import intensity_scale, to_intensities, to_normalized


def image_of(folder, number, channel=0):
    return sitk.ReadImage(str(folder / f"sample_{number:05d}_{channel:04d}.nii.gz"))


# ---------------------------------------------------------------- intensities


def test_hounsfield_units_by_hand():
    """Mean 40, standard deviation 200: -1 is -160 HU, 2 is 440 HU."""
    scale = intensity_scale("CTNormalization", denoisers.CT)
    assert scale.unit == "HU"
    assert to_intensities(np.array([[-1.0, 0.0, 2.0]]), [scale]).tolist() == [[-160.0, 40.0, 440.0]]


@pytest.mark.parametrize("nnunet", [CTNormalization, RGBTo01Normalization])
def test_inverts_nnunets_own_normalization(nnunet):
    image = np.random.default_rng(0).uniform(0, 255, (1, 5, 6)).astype(np.float32)
    normalized = nnunet(intensityproperties=denoisers.CT, use_mask_for_norm=False).run(image.copy())
    scale = intensity_scale(nnunet.__name__, denoisers.CT)
    np.testing.assert_allclose(to_intensities(normalized, [scale]), image, atol=1e-3)
    np.testing.assert_allclose(to_normalized(image, [scale]), normalized, atol=1e-6)


@pytest.mark.parametrize("scheme", ["ZScoreNormalization", "RescaleTo01Normalization", "SomebodysNormalization"])
def test_what_cannot_be_inverted_stays_and_says_so(scheme):
    scale = intensity_scale(scheme, denoisers.CT)
    assert scale[:2] == (1, 0) and f"({scheme} takes its numbers from each scan and cannot be inverted)" in scale.unit


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_nth_image_does_not_depend_on_the_batch(tmp_path, sampler, dim):
    content = load_denoiser(denoisers.write(tmp_path / "d.pth", denoisers.plan(dim)))
    denoiser, diffusion = build(content).eval(), Diffusion(**content["process"])

    def draw(numbers, batch_size, seed=5):
        batches = draw_images(denoiser, diffusion, content["plan"]["patch_size"], numbers, sampler, 6, seed, batch_size)
        return torch.cat(list(batches))

    together, alone = draw(range(5), 3), torch.cat([draw([n], 1) for n in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert len({image.sum().item() for image in together}) == 5
    assert (draw([0], 1, seed=6) - alone[0]).abs().max() > 0.1


@pytest.mark.parametrize("dim", [2, 3])
def test_each_channel_is_clipped_to_the_range_of_the_images(tmp_path, dim):
    """In the plan's normalization, whatever noise is in a channel; by the mean of both it would be 6 and 0.03."""
    path = denoisers.write(tmp_path / "d.pth", denoisers.plan(dim, channels=2), image_range=(-3.0, 3.0))
    denoiser = build(load_denoiser(path)).eval()
    denoiser.input_scale.copy_(torch.tensor([2.0, 0.01]))
    with torch.no_grad():
        for parameter in denoiser.network.decoder.seg_layers.parameters():
            parameter.zero_()  # it finds no noise: what it takes for x_0 is many times the images
        denoiser.network.decoder.seg_layers[-1].bias.copy_(torch.tensor([-100.0, 100.0]))
    (images,) = draw_images(denoiser, Diffusion("linear", 20), [8] * dim, range(2), steps=20)
    assert images[:, 0].unique().tolist() == pytest.approx([3.0]) and images[:, 1].unique().tolist() == pytest.approx(
        [-3.0]
    )


def test_a_file_alone_rebuilds_its_denoiser(tmp_path):
    torch.manual_seed(1)
    path = denoisers.write(tmp_path / "d.pth")
    denoiser = build(load_denoiser(path))
    for name, tensor in load_denoiser(path)["denoiser_weights"].items():
        assert torch.equal(denoiser.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("network_class", "subprocess.Popen"),
        ("network_class", "dynamic_network_architectures.architectures.unet.torch.hub.load"),
        ("conv_op", "os.system"),
        ("conv_op", "torch.nn.modules.conv.torch.hub.load"),
    ],
)
def test_a_file_does_not_choose_what_is_called(tmp_path, key, name):
    content = load_denoiser(denoisers.write(tmp_path / "d.pth"))
    (content["plan"] if key == "network_class" else content["plan"]["network_kwargs"])[key] = name
    with pytest.raises(UserError, match=f"the denoiser asks for {name}"):
        build(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("plan"), "plan: Field required"),
        (lambda c: c.update(plan=[1]), r"plan: Input should be a valid dictionary, not \[1\]"),
        (lambda c: c["plan"].update(spacing=5), "plan.spacing: Input should be a valid list, not 5"),
        (lambda c: c["plan"].update(patch_size=[8, 0]), r"plan.patch_size\[1\]: Input should be greater .* not 0"),
        (lambda c: c["denoiser_weights"].update(a=3), "denoiser_weights.a: .*must be a tensor, not 3"),
        (lambda c: c["denoiser_weights"]["input_scale"].fill_(np.nan), "input_scale: .*must not be NaN"),
        (lambda c: c["denoiser_weights"]["input_scale"].fill_(0), "input_scale: must be a positive number for each"),
        (lambda c: c["denoiser_weights"].pop("input_scale"), "input_scale: must be a positive number for each"),
        (lambda c: c["process"].update(timesteps="many"), "process.timesteps: .* integer, not 'many'"),
        (lambda c: c["process"].update(schedule="none"), "process.schedule: Input should be 'linear', 'cosine' or"),
        (lambda c: c["process"].update(prior=[[np.nan], [1.0]]), r"process.prior\[0\]\[0\]: .* finite number, not nan"),
        (lambda c: c.update(training=None), "training: Input should be a valid dictionary, not None"),
    ],
)
def test_what_a_denoiser_lacks_is_named(tmp_path, change, message):
    path = denoisers.write(tmp_path / "d.pth")
    content = load_denoiser(path)
    change(content)
    torch.save(content, path)
    with pytest.raises(UserError, match=f"d.pth: .*{message}.*"):
        load_denoiser(path)


def test_a_denoiser_whose_description_makes_no_network_is_named(tmp_path):
    content = load_denoiser(denoisers.write(tmp_path / "d.pth"))
    content["plan"]["network_kwargs"].pop("n_stages")
    with pytest.raises(UserError, match="the denoiser's plan.network_kwargs make no network"):
        build(content)


def test_schemas_know_every_process():
    """Which they name themselves, since the library's root imports none of its rooms."""
    names = get_type_hints(Process)
    assert get_args(names["schedule"]) == SCHEDULES and get_args(names["prediction"]) == PREDICTIONS


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("transpose", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_a_volume_lies_as_a_scan(tmp_path, transpose):
    """Second route: nnU-Net's own order, transposing the original axes forward, must give the sample back."""
    plan = denoisers.plan(3, transpose=transpose)
    image = np.random.default_rng(0).normal(size=(1, 8, 12, 16)).astype(np.float32)
    write_sample(str(tmp_path), 3, image, plan)
    scan = image_of(tmp_path, 3)
    original = sitk.GetArrayFromImage(scan)
    np.testing.assert_allclose((original.transpose(transpose) - 40) / 200, image[0], atol=1e-5)
    spacing = np.array(scan.GetSpacing()[::-1])
    assert spacing[list(transpose)].tolist() == plan["spacing"] == [2.0, 3.0, 4.0]
    np.testing.assert_allclose(next(read_samples(str(tmp_path), [3], plan)), image, atol=1e-5)


def test_a_slice_is_a_scan_of_one_slice(tmp_path):
    plan = denoisers.plan(2, channels=2)
    image = np.random.default_rng(0).normal(size=(2, 12, 16)).astype(np.float32)
    write_sample(str(tmp_path), 0, image, plan)
    scan = image_of(tmp_path, 0, 1)
    assert scan.GetSize() == (16, 1, 12) and scan.GetSpacing() == (4.0, 1.0, 3.0)  # x, y, z of transpose (1, 0, 2)
    np.testing.assert_allclose(next(read_samples(str(tmp_path), [0], plan)), image, atol=1e-5)


def test_what_a_full_disk_cut_is_missing_and_written_next_time(tmp_path):
    plan, image = denoisers.plan(2, channels=2), np.random.default_rng(0).normal(size=(2, 12, 16)).astype(np.float32)
    with no_file_longer_than(200), pytest.raises(NotWritten, match=f"sample_00000_0001.nii.gz was not .* {tmp_path}"):
        write_sample(str(tmp_path), 0, image, plan)
    assert list(tmp_path.iterdir()) == [] and numbers_in(str(tmp_path), 2) == []
    write_sample(str(tmp_path), 0, image, plan)
    assert numbers_in(str(tmp_path), 2) == [0]


# ---------------------------------------------------------------- the command


def run(*arguments):
    return main(["sample", *map(str, arguments), "--device", "cpu"])


def test_draws_what_is_missing(tmp_path, capsys):
    path, out = denoisers.write(tmp_path / "d.pth"), tmp_path / "samples"
    common = ("--denoiser", path, "--steps", 4, "-o", out)
    assert run(*common, "-n", 3, "--batch_size", 2) == 0
    printed = capsys.readouterr()
    assert "3 image(s) drawn" in printed.out and "channel CT: HU" in printed.out and "sampling" in printed.err
    before = (out / "sample_00001_0000.nii.gz").read_bytes()
    assert run(*common, "-n", 5) == 0
    assert "2 image(s) drawn, 3 there before" in capsys.readouterr().out
    assert (out / "sample_00001_0000.nii.gz").read_bytes() == before
    assert numbers_in(str(out), 1) == list(range(5)) and (out / "samples.png").stat().st_size > 1000
    assert json.loads((out / "samples.json").read_text())["steps"] == 4
    values = sitk.GetArrayFromImage(image_of(out, 0))
    assert -961 <= values.min() < values.max() <= 1041  # the range of the images that it was trained on


def test_the_sheet_needs_no_plan_of_this_machine(tmp_path, nnunet_folders, capsys):
    """Neither where there is a plan of that name without this configuration, nor where it is not preprocessed."""
    path = denoisers.write(tmp_path / "d.pth")
    folder = nnunet_folders / "nnUNet_preprocessed" / "Dataset990_Tiny"
    folder.mkdir()
    for configurations in ({}, {"2d": {"data_identifier": "nowhere", "architecture": {}}}):
        (folder / "nnUNetTinyPlans.json").write_text(json.dumps({"configurations": configurations}))
        (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "box": 1}}))
        out = tmp_path / f"samples_{len(configurations)}"
        assert run("--denoiser", path, "--steps", 2, "-n", 1, "-o", out) == 0
        assert (out / "samples.png").exists() and "No real images in the sheet: " in capsys.readouterr().out


def test_ddpm_visits_every_noise_level(tmp_path):
    assert run("--denoiser", denoisers.write(tmp_path / "d.pth"), "--sampler", "ddpm", "-n", 1) == 0
    assert json.loads((tmp_path / "samples" / "samples.json").read_text())["steps"] == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "which denoiser"),
        (("--denoiser", "nowhere.pth"), "there is no denoiser nowhere.pth"),
        (("--denoiser", "d.pth", "--steps", 21), "knows 20 noise levels: give 1 to 20"),
        (("--denoiser", "d.pth", "--batch_size", 0), "-n and --batch_size: at least 1"),
        (("--denoiser", "d.pth", "-n", 0), "-n and --batch_size: at least 1"),
        (("--denoiser", "d.pth", "--device", "abacus"), "device abacus: cannot be used here"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    denoisers.write(tmp_path / "d.pth")
    assert main(["sample", *map(str, arguments)]) == 1
    assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["d.pth"]


def test_the_plans_that_there_are_are_named(nnunet_folders, capsys):
    folder = nnunet_folders / "nnUNet_preprocessed" / "Dataset022_FLARE22"
    folder.mkdir()
    for name in ("nnUNetDiffusionPlans", "nnUNetDiffusionPlans_round1"):
        (folder / f"{name}.json").write_text("{}")
    assert run("-d", "22", "-c", "2d") == 1
    message = "-p nnUNetPlans: Dataset022_FLARE22 has other plans: give -p nnUNetDiffusionPlans\n"
    assert message in capsys.readouterr().err
    assert run("-d", "22", "-c", "2d", "-p", "nnUNetDiffusionPlans") == 1
    assert "make one with\n  nnUNetv2_train 22 2d all -tr DenoisingDiffusionTrainer" in capsys.readouterr().err


def test_the_only_denoiser_needs_no_plans(nnunet_folders):
    (nnunet_folders / "nnUNet_preprocessed" / "Dataset022_FLARE22").mkdir()
    results = nnunet_folders / "nnUNet_results" / "Dataset022_FLARE22"
    for name in ("nnUNetDiffusionPlans", "OtherPlans"):
        folder = results / f"DenoisingDiffusionTrainer__{name}__2d" / "fold_all"
        folder.mkdir(parents=True)
        denoisers.write(folder / "denoiser.pth")
        is_only = name == "nnUNetDiffusionPlans"
        assert run("-d", "22", "-c", "2d", "-n", "2", "--steps", "2") == (0 if is_only else 1)
    assert (results / "DenoisingDiffusionTrainer__nnUNetDiffusionPlans__2d/fold_all/samples/samples.png").exists()


def test_samples_of_two_denoisers_are_not_mixed(tmp_path, capsys):
    common = ("-n", 1, "--steps", 2, "-o", tmp_path / "samples")
    assert run("--denoiser", denoisers.write(tmp_path / "a.pth"), *common) == 0
    assert run("--denoiser", denoisers.write(tmp_path / "b.pth"), *common) == 1
    said = capsys.readouterr().err
    assert re.search(r"made from something else.*\n  denoiser: was .*\n  denoiser_sha256: was ", said)


def test_samples_of_nobody_are_not_taken_for_its_own(tmp_path, capsys):
    common = ("--denoiser", denoisers.write(tmp_path / "a.pth"), "-n", 1, "--steps", 2, "-o", tmp_path / "samples")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "sample_00000_0000.nii.gz").write_text("by hand")
    assert run(*common) == 1
    assert "samples: has samples, but no samples.json" in capsys.readouterr().err
    assert len(list((tmp_path / "samples").iterdir())) == 1


def test_a_denoiser_with_learned_statistics_draws_too(tmp_path):
    """Batch norm: its running statistics, not those of the batch, or the n-th image would depend on the others."""
    plan = denoisers.plan(2)
    plan["network_kwargs"]["norm_op"] = "torch.nn.modules.batchnorm.BatchNorm2d"
    denoiser = build(load_denoiser(denoisers.write(tmp_path / "d.pth", plan))).eval()
    common = (denoiser, Diffusion(timesteps=20), (12, 16), range(2), "ddim", 3, 0)
    draws = [torch.cat(list(draw_images(*common, batch_size))) for batch_size in (1, 2)]
    torch.testing.assert_close(*draws, atol=1e-4, rtol=1e-4)


def test_a_second_command_on_the_same_samples_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "PATIENCE_S", 0.2)
    arguments = ("--denoiser", denoisers.write(tmp_path / "d.pth"), "-n", 1, "--steps", 2, "-o", tmp_path / "samples")
    with locks.locked(str(tmp_path / "samples" / WORK / "lock"), "it"):
        assert run(*arguments) == 1
    assert f"another command works on the samples in {tmp_path / 'samples'} (process " in capsys.readouterr().err
    assert run(*arguments) == 0
