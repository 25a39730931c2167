"""Pre-training and fine-tuning through nnU-Net's own training loop, on a tiny data set."""

import importlib
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch.nn import functional as F

from nnunet_diffusion import installation, locks
from nnunet_diffusion.cli import main
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import NotWritten
from nnunet_diffusion.marks import WORK
from nnunet_diffusion.pretraining.conditioning import fold
from nnunet_diffusion.pretraining.denoiser_file import load_denoiser, rebuild
from nnunet_diffusion.pretraining.start import find_start
from nnunet_diffusion.trainers import our_trainer
from nnunet_diffusion.trainers.ConfiguredTrainer import ConfiguredTrainer
from nnunet_diffusion.trainers.DenoisingDiffusionTrainer import DenoisingDiffusionTrainer
from nnunet_diffusion.trainers.DiffusionPretrainedDecoderTrainer import DiffusionPretrainedDecoderTrainer
from nnunet_diffusion.trainers.DiffusionPretrainedLinearTrainer import DiffusionPretrainedLinearTrainer
from nnunet_diffusion.trainers.DiffusionPretrainedTrainer import DiffusionPretrainedTrainer
from nnunet_diffusion.trainers.PartialLabelTrainer import PartialLabelTrainer
from nnunet_diffusion.trainers.PseudoLabelTrainer import PseudoLabelTrainer

pytestmark = pytest.mark.slow  # each trains in nnU-Net's own loop, which takes seconds
PLANS_DATA = "nnUNetCompactPlans_2d"
PRETRAINED = [DiffusionPretrainedTrainer, DiffusionPretrainedDecoderTrainer, DiffusionPretrainedLinearTrainer]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny data set, and a denoiser of fold `all` for each configuration."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            folder = tmp_path_factory.mktemp(name)
            patch.setenv(name, str(folder))
        folder = tiny.prepare()
        for configuration in ("2d", "3d_fullres"):
            tiny.trainer(DenoisingDiffusionTrainer, configuration, "all").run_training()
        yield folder


@pytest.fixture
def plans(world):
    """Writes a plan of the tiny data set with other settings and returns its name."""

    def write(name, source=tiny.PLANS, change=lambda plans: plans, **block):
        content = json.loads((world / f"{source}.json").read_text())
        tiny.write_plans(change(content), name, **block)
        return name

    return write


def denoiser_path(configuration="2d", fold="all", plans=tiny.PLANS):
    folder = f"DenoisingDiffusionTrainer__{plans}__{configuration}"
    return Path(os.environ["nnUNet_results"]) / tiny.NAME / folder / f"fold_{fold}" / "denoiser.pth"


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


# ---------------------------------------------------------------- pre-training


def test_denoiser_holds_what_the_contract_says(world):
    content = torch.load(denoiser_path(), weights_only=True)
    assert content["timestep"] == 50 and content["process"]["schedule"] == "linear"
    assert content["plan"]["plans_name"] == tiny.PLANS and content["plan"]["spacing"] == [2.0, 2.0]
    assert content["plan"]["normalization_schemes"] == ["CTNormalization"]
    assert content["training"]["images"] == 7 and content["training"]["held_out"] == 1, "5 labeled, 3 of the pool"
    stock = tiny.trainer(nnUNetTrainer)
    stock.initialize()
    keys = {k for k in stock.network.state_dict() if "seg_layers" not in k}
    assert keys == {k for k in content["network_weights"] if "seg_layers" not in k}
    adaptation, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    assert adaptation["pretrain_num_input_channels"] == 1 and adaptation["recommended_downstream_patchsize"] == [16, 16]
    assert adaptation["architecture_plans"]["arch_class_name"].endswith("PlainConvUNet")
    for place in (adaptation["key_to_encoder"], adaptation["key_to_stem"], *adaptation["keys_to_in_proj"]):
        assert any(key.startswith(f"{place}.") for key in weights), place
    assert adaptation["key_to_lpe"] is None and content["citations"][0]["apa_citations"]


def test_samples_are_drawn_at_intervals(plans):
    name = plans("Sheets", DenoisingDiffusionTrainer={"num_epochs": 3, "sample_every": 2})
    trainer = tiny.trainer(DenoisingDiffusionTrainer, plans=name)
    trainer.run_training()
    assert {p.name for p in Path(trainer.output_folder).glob("samples*")} == {"samples_epoch_2.png"}


def test_a_plan_of_nnunets_own_planner_is_enough(world):
    """No block of settings in it: everything as it comes, but for the length of the training."""
    assert main(["plan_and_preprocess", "-d", str(tiny.ID), "-pl", "ExperimentPlanner", "-c", "2d", "-np", "1"]) == 0
    assert "nnunet_diffusion" not in json.loads((world / "nnUNetPlans.json").read_text())
    for cls in (DenoisingDiffusionTrainer, DiffusionPretrainedTrainer):
        trainer = tiny.trainer(cls, plans="nnUNetPlans")
        assert trainer.num_epochs > 100
        trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
        trainer.batch_size = 2
        trainer.run_training()
    report = json.loads(Path(trainer.output_folder, "transfer_report.json").read_text())
    assert report["matched"] and not report["adapted"] and all("seg_layers" in key for key in report["missing"])


def test_folds_leave_their_validation_images_out(world):
    trainer = tiny.trainer(DenoisingDiffusionTrainer, fold=0)
    train, held_out = trainer.get_tr_and_val_datasets()
    names = {os.path.basename(i) for i in train.identifiers}
    assert names == {"tiny_000", "tiny_001", "tiny_002", "tiny_100", "tiny_101", "tiny_102"}
    assert {os.path.basename(i) for i in held_out.identifiers} == {"tiny_003", "tiny_004"}


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_resumed_pretraining_is_the_uninterrupted_one(plans, configuration):
    """Four epochs at once, and two, a checkpoint, and two more in a new trainer: the same weights, bit by bit."""
    name = plans("Resume", DenoisingDiffusionTrainer={"num_epochs": 4, "save_every": 2})
    whole = tiny.trainer(DenoisingDiffusionTrainer, configuration, plans=name)
    whole.run_training()
    held_out = load_denoiser(denoiser_path(configuration, 0, name))["training"]["held_out_loss"]
    weights, average = copied(whole.network.state_dict()), copied(whole.ema.state_dict())

    class Interrupted(DenoisingDiffusionTrainer):
        def on_epoch_start(self):
            if self.current_epoch == 2 and not self.is_resumed:
                raise KeyboardInterrupt
            super().on_epoch_start()

    Interrupted.__name__ = "DenoisingDiffusionTrainer"
    first = tiny.trainer(Interrupted, configuration, plans=name)
    with pytest.raises(KeyboardInterrupt):
        first.run_training()
    second = tiny.trainer(DenoisingDiffusionTrainer, configuration, plans=name, resume=True)
    second.load_checkpoint(os.path.join(second.output_folder, "checkpoint_latest.pth"))
    assert second.current_epoch == 2
    second.run_training()
    assert all(torch.equal(weights[k], v) for k, v in second.network.state_dict().items())
    assert all(torch.equal(average[k], v) for k, v in second.ema.state_dict().items())
    assert len(held_out) == 4
    assert load_denoiser(denoiser_path(configuration, 0, name))["training"]["held_out_loss"] == held_out


def test_the_held_out_loss_of_the_same_weights_is_always_the_same(world):
    trainer = tiny.trainer(DenoisingDiffusionTrainer)
    trainer.on_train_start()
    trainer.on_validation_epoch_start()
    losses = []
    for seed in range(2):
        torch.manual_seed(seed), np.random.seed(seed)
        with torch.no_grad():
            steps = [trainer.validation_step(next(trainer.dataloader_val)) for _ in range(2)]
        losses.append([float(step["loss"]) for step in steps])
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


@pytest.mark.parametrize(
    "settings", [{"prediction": "v", "weighting": "min_snr", "schedule": "cosine"}, {"augment": False}]
)
def test_other_processes_train_and_sample(plans, settings):
    name = plans("Other", DenoisingDiffusionTrainer=settings)
    trainer = tiny.trainer(DenoisingDiffusionTrainer, plans=name)
    trainer.run_training()
    trainer.perform_actual_validation()
    assert {"denoiser.pth", "samples.png", "progress.png"} <= set(os.listdir(trainer.output_folder))


def test_noise_is_measured_in_the_spread_of_the_body(plans):
    files = []
    for share in (1.0, 0.25):
        name = plans(f"Noise{share}", DenoisingDiffusionTrainer={"noise_scale": share})
        trainer = tiny.trainer(DenoisingDiffusionTrainer, fold="all", plans=name)
        trainer.run_training()
        assert torch.isfinite(torch.tensor(trainer.logger.get_value("train_losses", step=None))).all()
        files.append(load_denoiser(denoiser_path(plans=name)))
    scales = [content["denoiser_weights"]["input_scale"] for content in files]
    torch.testing.assert_close(scales[1], 0.25 * scales[0])
    priors = [np.array(content["process"]["prior"]) for content in files]
    assert (priors[0][1] > 0).all()
    np.testing.assert_allclose(priors[1], 4 * priors[0], rtol=1e-4)


def test_pretraining_lowers_the_loss(plans):
    settings = {"num_epochs": 8, "num_iterations_per_epoch": 12, "initial_lr": 1e-2, "warmup_epochs": 0}
    trainer = tiny.trainer(DenoisingDiffusionTrainer, plans=plans("Longer", DenoisingDiffusionTrainer=settings))
    trainer.run_training()
    losses = trainer.logger.get_value("val_losses", step=None)
    assert losses[-1] < 0.5 * losses[0]


def test_unused_heads_do_not_stop_distributed_training(world):
    from torch import distributed

    network = tiny.trainer(DenoisingDiffusionTrainer)
    network.initialize()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29531")
    distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(network.network)
        for _ in range(2):  # the second step fails when the first left parameters without gradient
            parallel(torch.randn(2, 1, 16, 16), torch.tensor([3, 4])).mean().backward()
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "quadratic"}, "schedule is 'quadratic': it must be linear or cosine or sigmoid"),
        ({"prediction": "x0"}, "prediction is 'x0': it must be epsilon or v"),
        ({"weighting": "p2"}, "weighting is 'p2': it must be uniform or min_snr"),
        ({"timestep": 1000}, "timestep is 1000: it must be 0 to 999"),
        ({"num_epochs": -1}, "num_epochs is -1: it must be at least 1"),
        ({"noise_scale": 0.0}, "noise_scale is 0.0: it must be above 0"),
        ({"body_share": 1.5}, "body_share is 1.5: it must be 0 to 1"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_their_key(plans, settings, message):
    name = plans("Senseless", DenoisingDiffusionTrainer=settings)
    with pytest.raises(UserError, match=f"plans.json: nnunet_diffusion.DenoisingDiffusionTrainer.{message}"):
        tiny.trainer(DenoisingDiffusionTrainer, plans=name)
    assert not denoiser_path(plans=name).parent.parent.exists()


def test_a_cascade_is_refused_by_name(plans):
    def cascade(plans):
        plans["configurations"]["2d"]["previous_stage"] = "3d_fullres"
        return plans

    with pytest.raises(UserError, match="2d is a cascade's second stage"):
        tiny.trainer(DenoisingDiffusionTrainer, plans=plans("Cascade", change=cascade))


# ---------------------------------------------------------------- fine-tuning


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("cls", PRETRAINED)
def test_training_starts_from_the_folded_denoiser_and_frozen_means_frozen(world, cls, configuration):
    trainer = tiny.trainer(cls, configuration)
    trainer.initialize()
    initial = copied(trainer.network.state_dict())
    content = load_denoiser(denoiser_path(configuration))
    planned = nnUNetTrainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 1, False
    )
    folded = fold(rebuild(content, planned), trainer.timestep).state_dict()
    started = {}

    class Watched(cls):
        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            started.setdefault("state", copied(self.network.state_dict()))

    Watched.__name__ = cls.__name__
    trainer = tiny.trainer(Watched, configuration)
    trainer.seed = 0
    trainer.run_training()
    for name, tensor in started["state"].items():
        assert "seg_layers" in name or torch.equal(tensor, folded[name]), name
    assert {k for k in initial} == set(started["state"])
    moved = {k for k, v in trainer.network.state_dict().items() if not torch.equal(v, started["state"][k])}
    frozen = {
        DiffusionPretrainedTrainer: lambda k: False,
        DiffusionPretrainedDecoderTrainer: lambda k: k.startswith(("encoder.", "decoder.encoder.")),
        DiffusionPretrainedLinearTrainer: lambda k: "seg_layers" not in k,
    }[cls]
    assert not {k for k in moved if frozen(k)}
    lowest_head = "decoder.seg_layers.0."  # nnU-Net's loss gives it no weight under deep supervision
    trains = {k for k in started["state"] if not frozen(k) and not k.startswith(lowest_head)}
    without_effect = {k for k in trains if k.endswith(("conv.bias", "all_modules.0.bias"))}  # a norm follows
    assert trains - without_effect <= moved
    report = json.loads(Path(trainer.output_folder, "transfer_report.json").read_text())
    assert report["adapted"] == [] and report["warnings"] == []
    assert len(report["missing"]) == sum("seg_layers" in key for key in started["state"])
    assert report["timestep"] == trainer.timestep and report["source"] == str(denoiser_path(configuration))


def test_frozen_statistics_do_not_move(plans):
    name = plans("Batch", change=lambda p: tiny.shrunk(p, "ResidualEncoderUNet", "BatchNorm"))
    tiny.trainer(DenoisingDiffusionTrainer, fold="all", plans=name).run_training()
    for cls in (DiffusionPretrainedDecoderTrainer, DiffusionPretrainedLinearTrainer):
        trainer = tiny.trainer(cls, plans=name)
        trainer.run_training()
        content = load_denoiser(denoiser_path(plans=name))
        planned = nnUNetTrainer.build_network_architecture(
            trainer.plans_manager, trainer.configuration_manager, 1, 1, False
        )
        folded = fold(rebuild(content, planned), trainer.timestep).state_dict()
        state = trainer.network.state_dict()
        statistics = [k for k in state if k.startswith("encoder.") and "running" in k]
        assert statistics and all(torch.equal(state[k], folded[k]) for k in statistics)


def test_heads_are_initialized_as_nnunet_does(plans):
    """The setting `seed` makes stock and ours draw the same weights; ours keeps the heads."""
    settings = {"seed": 5, "start": str(denoiser_path())}
    name = plans("Seeded", DiffusionPretrainedTrainer=settings, ConfiguredTrainer={"seed": 5})
    ours, control = tiny.trainer(DiffusionPretrainedTrainer, plans=name), tiny.trainer(ConfiguredTrainer, plans=name)
    ours.initialize(), control.initialize()
    ours.take_first_weights()
    heads = {k: v for k, v in control.network.state_dict().items() if "seg_layers" in k}
    assert heads and all(torch.equal(ours.network.state_dict()[k], v) for k, v in heads.items())


def test_heads_have_a_learning_rate_of_their_own(plans):
    settings = {"start": "scratch", "head_lr_factor": 5.0, "initial_lr": 1e-3}
    for optimizer_name in ("SGD", "AdamW"):
        name = plans("Heads", DiffusionPretrainedTrainer={**settings, "optimizer_name": optimizer_name})
        trainer = tiny.trainer(DiffusionPretrainedTrainer, plans=name)
        trainer.initialize()
        rest, heads = trainer.optimizer.param_groups
        assert heads["lr"] == pytest.approx(5 * rest["lr"]) == pytest.approx(5e-3)
        assert {id(p) for p in heads["params"]} == {id(p) for p in trainer.network.decoder.seg_layers.parameters()}
        assert len(rest["params"]) + len(heads["params"]) == len(list(trainer.network.parameters()))
    name = plans("Optimizer", DiffusionPretrainedTrainer={"optimizer_name": "Adam"})
    with pytest.raises(UserError, match="optimizer_name is 'Adam': it must be SGD or AdamW"):
        tiny.trainer(DiffusionPretrainedTrainer, plans=name).initialize()


def test_linear_classifier_is_linear_in_the_concatenated_features(world):
    """Second route: upsample the features of all stages, concatenate, one 1x1 convolution with the stacked weights."""
    trainer = tiny.trainer(DiffusionPretrainedLinearTrainer)
    trainer.initialize()
    network = trainer.network.eval()
    features = []
    stages = [*network.encoder.stages, *network.decoder.stages]
    hooks = [s.register_forward_hook(lambda m, i, o: features.append(o)) for s in stages]
    with torch.no_grad():
        logits = network(torch.randn(2, 1, 16, 16))
        upsampled = [F.interpolate(f, (16, 16), mode="bilinear", align_corners=False) for f in features]
        heads = [*network.of_encoder["seg_layers"], *network.decoder.seg_layers]
        weight, bias = torch.cat([h.weight for h in heads], 1), sum(h.bias for h in heads)
        expected = F.conv2d(torch.cat(upsampled, 1), weight, bias)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_scratch_needs_no_denoiser_and_is_the_same_training(plans):
    name = plans("Scratch", DiffusionPretrainedTrainer={"start": "scratch"})
    trainer = tiny.trainer(DiffusionPretrainedTrainer, plans=name)
    trainer.run_training()
    assert not os.path.exists(os.path.join(trainer.output_folder, "transfer_report.json"))


def test_a_second_training_of_a_fold_is_refused(world, monkeypatch):
    trainer = tiny.trainer(ConfiguredTrainer)
    monkeypatch.setattr(locks, "PATIENCE_S", 0.2)
    says = r"another command works on the training in .*fold_0 \(process "
    with locks.locked(str(Path(trainer.output_folder) / WORK / "lock"), "it"), pytest.raises(UserError, match=says):
        trainer.run_training()


def test_resumed_fine_tuning_does_not_transfer_again(world):
    trainer = tiny.trainer(DiffusionPretrainedTrainer)
    trainer.run_training()
    learned = copied(trainer.network.state_dict())
    again = tiny.trainer(DiffusionPretrainedTrainer, resume=True)
    again.load_checkpoint(os.path.join(again.output_folder, "checkpoint_final.pth"))
    again.on_train_start()
    assert all(torch.equal(learned[k], v) for k, v in again.network.state_dict().items())


def start_of(trainer):
    return find_start(trainer.start, trainer.plans_manager, trainer.configuration_name, trainer.fold)


def test_own_fold_comes_before_fold_all(world):
    trainer = tiny.trainer(DiffusionPretrainedTrainer)
    assert start_of(trainer) == str(denoiser_path(fold="all"))
    own = denoiser_path(fold=0)
    own.parent.mkdir(exist_ok=True)
    own.write_bytes(denoiser_path(fold="all").read_bytes())
    assert start_of(trainer) == str(own)
    own.unlink()


def test_more_channels_share_the_first_convolution(plans, monkeypatch):
    """The response to an image whose channels are equal is the denoiser's to one channel."""
    trainer = tiny.trainer(DiffusionPretrainedTrainer, plans=plans("Channels"))
    Path(trainer.output_folder).mkdir(parents=True, exist_ok=True)
    trainer.dataset_json = {**trainer.dataset_json, "channel_names": {"0": "CT", "1": "CT"}}
    trainer.start = str(denoiser_path())
    trainer.initialize()
    trainer.take_first_weights()
    report = json.loads(Path(trainer.output_folder, "transfer_report.json").read_text())
    assert len(report["adapted"]) == 1 and "1 to 2 of 2 input channels" in report["adapted"][0]
    single = tiny.trainer(DiffusionPretrainedTrainer)
    single.initialize()
    single.take_first_weights()
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        two, one = (t.network.encoder(i) for t, i in ((trainer, image.expand(-1, 2, -1, -1)), (single, image)))
    for a, b in zip(two, one, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert "channel_names differs" in report["warnings"][0]


def test_another_patch_size_takes_every_weight(plans):
    def larger(plans):
        plans["configurations"]["2d"]["patch_size"] = [24, 16]
        return plans

    name = plans("Larger", change=larger, DiffusionPretrainedTrainer={"start": str(denoiser_path())})
    trainer = tiny.trainer(DiffusionPretrainedTrainer, plans=name)
    trainer.run_training()
    report = json.loads(Path(trainer.output_folder, "transfer_report.json").read_text())
    assert report["matched"] and not report["adapted"] and all("seg_layers" in key for key in report["missing"])


def test_other_normalization_and_spacing_warn_loudly(plans):
    def other(plans):
        plans["configurations"]["2d"]["spacing"] = [1.0, 1.0]
        plans["foreground_intensity_properties_per_channel"]["0"]["mean"] += 500
        return plans

    name = plans("OtherSpacing", change=other, DiffusionPretrainedTrainer={"start": str(denoiser_path())})
    trainer = tiny.trainer(DiffusionPretrainedTrainer, plans=name)
    trainer.initialize()
    trainer.take_first_weights()
    log = Path(trainer.log_file).read_text()
    assert "WARNING: spacing differs: pre-trained with [2.0, 2.0], now [1.0, 1.0]" in log
    assert "WARNING: CT normalization of channel 0 differs in its mean" in log


# ---------------------------------------------------------------- the command line's weights


@pytest.mark.parametrize("cls", [PartialLabelTrainer, *PRETRAINED])
def test_pretrained_weights_of_the_command_line_are_noticed(world, cls):
    """nnU-Net's own loader does not tell its trainers."""
    trainer = tiny.trainer(cls)
    maybe_load_checkpoint(trainer, False, False, str(denoiser_path()))
    trainer.on_train_start()
    report = json.loads(Path(trainer.output_folder, "transfer_report.json").read_text())
    assert report["source"] == "-pretrained_weights" and report["timestep"] is None
    weights = torch.load(denoiser_path(), weights_only=True)["network_weights"]
    state = trainer.network.state_dict()
    assert all(torch.equal(state[key], weights[key]) for key in state if "seg_layers" not in key)
    assert report["matched"] and not any("seg_layers" in name for name in report["matched"])
    assert "Starts from -pretrained_weights:" in Path(trainer.log_file).read_text()


def wider(plans):
    plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 6, 10]
    return plans


def train(plans, *arguments, trainer="DiffusionPretrainedTrainer"):
    return main(["train", str(tiny.ID), "2d", "0", "-p", plans, "-tr", trainer, "-device", "cpu", *arguments])


def test_validation_of_what_was_not_trained_is_refused(plans, capsys):
    assert train(plans("Untrained"), "--val") == 1
    assert re.search(r"--val: there is no .*Untrained__2d/fold_0/checkpoint_final.pth: finish", capsys.readouterr().err)


@pytest.mark.parametrize("trainer", ["DiffusionPretrainedTrainer", "DiffusionCoTrainingTwinTrainer", "nnUNetTrainer"])
def test_pretrained_weights_of_another_network_are_refused_with_file_and_remedy(plans, capsys, trainer):
    """Before nnU-Net's own loader asserts."""
    path = str(denoiser_path())
    assert train(plans("WiderGiven", change=wider), "-pretrained_weights", path, trainer=trainer) == 1
    said = capsys.readouterr().err
    assert f"-pretrained_weights {path} does not fit the network of this training: " in said
    assert "Traceback" not in said and "can be given with the setting start" in said
    if trainer != "DiffusionCoTrainingTwinTrainer":
        assert "stages.2.0.convs.0.conv.weight: file (8, 6, 3, 3), planned network (10, 6, 3, 3)" in said


def test_stock_nnunet_starts_from_the_file(world):
    trainer = tiny.trainer(nnUNetTrainer)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(denoiser_path()))
    weights = torch.load(denoiser_path(), weights_only=True)["network_weights"]
    state = trainer.network.state_dict()
    assert all(torch.equal(state[k], weights[k]) for k in state if "seg_layers" not in k)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("name", installation.trainer_names())
def test_no_trainer_runs_what_pretrained_weights_hold(world, tmp_path, monkeypatch, name):
    """nnU-Net itself would."""
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    torch.save({"network_weights": Bomb()}, tmp_path / "given.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Bomb()))
    for file in ("given.pth", "old.pth"):
        trainer = tiny.trainer(our_trainer(name))
        with pytest.raises((UserError, pickle.UnpicklingError)):
            maybe_load_checkpoint(trainer, False, False, str(tmp_path / file))
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize(("file", "how"), [("latest", (True, False)), ("final", (False, True))])
@pytest.mark.parametrize("cls", [ConfiguredTrainer, DenoisingDiffusionTrainer])
def test_a_checkpoint_that_holds_code_is_neither_continued_nor_validated(plans, tmp_path, monkeypatch, cls, file, how):
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    trainer = tiny.trainer(cls, plans=plans(f"Harmful{file}"))
    path = Path(trainer.output_folder, f"checkpoint_{file}.pth")
    torch.save({"network_weights": {}, "trainer_name": "", "init_args": {}, "logging": Bomb()}, path)
    with pytest.raises(UserError, match=f"checkpoint_{file}.pth holds more than .*posix.mkdir.*nothing in it was run"):
        maybe_load_checkpoint(trainer, *how)
    assert not (tmp_path / "bomb").exists()


def test_a_checkpoint_of_stock_nnunet_is_read(plans, monkeypatch):
    """Its training log holds numpy scalars."""
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    stock = tiny.trainer(nnUNetTrainer, plans=plans("Stock"))
    stock.num_epochs = stock.num_iterations_per_epoch = stock.num_val_iterations_per_epoch = 1
    stock.run_training()
    path = os.path.join(stock.output_folder, "checkpoint_final.pth")
    kinds = {type(value) for value in torch.load(path, weights_only=False)["logging"]["mean_fg_dice"]}
    assert issubclass(*kinds, np.generic)
    for how in ({"continue": True}, {}):
        trainer = tiny.trainer(ConfiguredTrainer, plans=plans("Stock"), resume=bool(how))
        trainer.load_checkpoint(path) if how else maybe_load_checkpoint(trainer, False, False, path)
        state = trainer.network.state_dict()
        theirs = stock.network.state_dict()
        assert all(torch.equal(state[key], theirs[key]) for key in theirs if how or "seg_layers" not in key)
        assert trainer.is_resumed == bool(how)


@pytest.mark.parametrize("how", ["command line", "setting"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path, good: path.write_bytes(good[: len(good) // 2]), "truncated or no PyTorch file"),
        (lambda path, good: path.write_bytes(b""), "truncated or no PyTorch file"),
        (lambda path, good: path.write_bytes(bytes(range(256)) * 9), "truncated or no PyTorch file"),
        (lambda path, good: torch.save({"network_weights": Bomb()}, path), "more than tensors .*asks for posix.mkdir"),
        (lambda path, good: path.write_bytes(pickle.dumps(Bomb(), 2)), "more than tensors .*asks for posix.mkdir"),
        (lambda path, good: torch.save({"network_weights": 1}, path), "has no network_weights|network_weights: Input"),
        (lambda path, good: None, "No such file|there is no "),
    ],
)
def test_files_to_start_from_are_refused_before_anything_in_them_runs(
    plans, tmp_path, monkeypatch, capsys, make, message, how
):
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))
    path = tmp_path / "given.pth"
    make(path, denoiser_path().read_bytes())
    if how == "command line":
        assert train(plans("Given"), "-pretrained_weights", str(path)) == 1
    else:
        assert train(plans("Given", DiffusionPretrainedTrainer={"start": str(path)})) == 1
    said = capsys.readouterr().err
    assert re.search(message, said) and str(path) in said and "Traceback" not in said
    assert not (tmp_path / "bomb").exists()


def test_any_trainer_starts_from_a_checkpoint(plans):
    """Of nnU-Net's or ours, output heads and all; the path may be below the data set's results."""
    trained = tiny.trainer(ConfiguredTrainer, plans=plans("Given"))
    trained.run_training()
    path = "ConfiguredTrainer__Given__2d/fold_{fold}/checkpoint_final.pth"
    for cls in (PartialLabelTrainer, DiffusionPretrainedTrainer, PseudoLabelTrainer):
        trainer = tiny.trainer(cls, plans=plans("FromModel", PartialLabelTrainer={"start": path},
                                                DiffusionPretrainedTrainer={"start": path}))  # fmt: skip
        trainer.on_train_start()
        state = trainer.network.state_dict()
        assert all(torch.equal(state[key], value) for key, value in trained.network.state_dict().items())
        report = json.loads(Path(trainer.output_folder, "transfer_report.json").read_text())
        assert report["source"].endswith("fold_0/checkpoint_final.pth") and len(report["matched"]) == len(
            list(trainer.network.parameters())
        )
    name = plans("WiderModel", change=wider, PartialLabelTrainer={"start": path})
    with pytest.raises(UserError, match=r"(?s)checkpoint_final.pth: the checkpoint does not fit .*\(8, 6, .*same plan"):
        tiny.trainer(PartialLabelTrainer, plans=name).on_train_start()


def test_a_teacher_is_nothing_to_start_from(plans, tmp_path):
    torch.save({"format": "nnunet_diffusion teacher"}, tmp_path / "teacher.pth")
    name = plans("FromTeacher", PartialLabelTrainer={"start": str(tmp_path / "teacher.pth")})
    with pytest.raises(UserError, match="teacher.pth: network_weights: Field required"):
        tiny.trainer(PartialLabelTrainer, plans=name).on_train_start()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scratch": True}, r"DiffusionPretrainedTrainer.scratch is no longer a setting: give the setting start"),
        ({"denoiser": "a.pth"}, r"denoiser is no longer a setting: give its path with the setting start"),
        ({"start_from": "a"}, r"start_from is no longer a setting: give that path with the setting start"),
        ({"plans_of_denoiser": "a"}, r"plans_of_denoiser is no longer a setting: .*give its path as start"),
        ({"start": ""}, r"start is '': it must be scratch, denoiser or a path"),
    ],
)
def test_earlier_settings_name_the_new_one(plans, setting, message):
    name = plans("Earlier", DiffusionPretrainedTrainer=setting)
    with pytest.raises(UserError, match=message):
        tiny.trainer(DiffusionPretrainedTrainer, plans=name)


def test_a_timestep_that_the_denoiser_has_not_is_named(plans):
    name = plans("Later", DiffusionPretrainedTrainer={"timestep": 1000, "start": str(denoiser_path())})
    with pytest.raises(UserError, match="the setting timestep is 1000: .*denoiser.pth knows 0 to 999"):
        tiny.trainer(DiffusionPretrainedTrainer, plans=name).on_train_start()


def test_plans_of_a_round_find_the_denoiser_of_the_plans_below(plans):
    trainer = tiny.trainer(PseudoLabelTrainer, plans=plans(f"{tiny.PLANS}_round3"))
    assert start_of(trainer) == str(denoiser_path())


def test_another_version_is_refused(world, tmp_path):
    content = {**torch.load(denoiser_path(), weights_only=True), "format_version": 99}
    torch.save(content, tmp_path / "later.pth")
    with pytest.raises(UserError, match="later.pth has format version 99"):
        load_denoiser(str(tmp_path / "later.pth"))


def test_another_topology_is_an_error_with_a_table(plans):
    name = plans("Wider", change=wider, DiffusionPretrainedTrainer={"start": str(denoiser_path())})
    with pytest.raises(
        UserError, match=r"(?s)another topology \(Dataset990_Tiny, .*stages.2.*denoiser \(8.*network \(10"
    ):
        tiny.trainer(DiffusionPretrainedTrainer, plans=name).on_train_start()


def test_without_a_denoiser_it_refuses_and_says_which_command_makes_one(plans):
    name = plans("Nothing")
    with pytest.raises(
        UserError, match=r"(?s)no denoiser.*nnUNetv2_train 990 2d all -tr DenoisingDiffusionTrainer -p Nothing"
    ):
        tiny.trainer(DiffusionPretrainedTrainer, plans=name).on_train_start()


def test_start_and_pretrained_weights_contradict_each_other(plans):
    for start in ("scratch", "denoiser"):
        trainer = tiny.trainer(PartialLabelTrainer, plans=plans("Both", PartialLabelTrainer={"start": start}))
        maybe_load_checkpoint(trainer, False, False, str(denoiser_path()))
        with pytest.raises(UserError, match=f"-pretrained_weights contradicts the setting start, '{start}'"):
            trainer.on_train_start()


# ---------------------------------------------------------------- the base


@pytest.mark.parametrize(
    ("configuration", "mirroring", "axes"),
    [("2d", "auto", None), ("3d_fullres", "auto", None), ("2d", "all", (0,)), ("3d_fullres", "all", (0, 1))],
)
@pytest.mark.parametrize("cls", [ConfiguredTrainer, DiffusionPretrainedLinearTrainer])
def test_the_checkpoint_carries_mirrored_axes_to_prediction(plans, cls, configuration, mirroring, axes):
    """The scans all lie the same way, and the labels have sides."""
    trainer = tiny.trainer(
        cls,
        configuration,
        plans=plans(
            "Mirrored", ConfiguredTrainer={"mirroring": mirroring}, DiffusionPretrainedTrainer={"start": "scratch"}
        ),
    )
    trainer.run_training()
    assert trainer.inference_allowed_mirroring_axes == axes
    checkpoint = torch.load(os.path.join(trainer.output_folder, "checkpoint_final.pth"), weights_only=False)
    assert checkpoint["inference_allowed_mirroring_axes"] == axes
    assert checkpoint["trainer_name"] == cls.__name__


@pytest.mark.parametrize("name", installation.trainer_names())
def test_every_trainer_shows_the_views_that_the_settings_say(plans, name):
    cls = getattr(importlib.import_module(f"nnunet_diffusion.trainers.{name}"), name)
    trainer = tiny.trainer(cls)
    rotation, _, _, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert axes == () and trainer.inference_allowed_mirroring_axes is None and rotation[1] == pytest.approx(np.pi / 12)
    trainer = tiny.trainer(cls, plans=plans("All", ConfiguredTrainer={"mirroring": "all", "rotation_degrees": 90}))
    rotation, _, _, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert axes == trainer.inference_allowed_mirroring_axes == (0,) and rotation[1] == pytest.approx(np.pi / 4)


def test_scans_that_lie_differently_are_shown_as_nnunet_shows_them(world, plans):
    """One scan of the pool is turned around: nothing is known of how the next one lies."""
    path = next((world / f"{PLANS_DATA}_unlabeled").glob("*.pkl"))
    before = path.read_bytes()
    properties = pickle.loads(before)
    properties["sitk_stuff"]["direction"] = (-1, 0, 0, 0, -1, 0, 0, 0, 1)
    path.write_bytes(pickle.dumps(properties))
    try:
        trainer = tiny.trainer(ConfiguredTrainer)
        rotation, _, _, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        assert axes == (0,) and rotation[1] == pytest.approx(np.pi / 4), "sides are labeled, else it were nnU-Net's 180"
    finally:
        path.write_bytes(before)


def test_more_processes_than_patches_are_refused_with_both_numbers(world, monkeypatch):
    trainer = tiny.trainer(ConfiguredTrainer)
    trainer.is_ddp = True
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    message = (
        r"3 processes share a batch of 2 patch\(es\), and each needs one: start 2, or give configuration 2d .* of 3"
    )
    with pytest.raises(UserError, match=message):
        trainer.initialize()


def test_unknown_settings_stop_the_trainer(plans):
    name = plans("Unknown", ConfiguredTrainer={"epochs": 3})
    with pytest.raises(UserError, match="ConfiguredTrainer.epochs is not a setting"):
        tiny.trainer(ConfiguredTrainer, plans=name)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("splits_final.json", '[{"train": ["tiny_000"', "splits_final.json: is no JSON .*: nnUNetv2_train splits anew"),
        ("splits_final.json", '[{"train": ["a"], "val": 3}]', r"splits_final.json: \[0\].val: .* valid list, not 3"),
        ("splits_final.json", '[{"train": ["../a"], "val": []}]', r"splits_final.json: \[0\].train: '../a' cannot be"),
    ],
)
def test_splits_that_cannot_be_read_are_named(world, file, content, message):
    path = world / file
    before = path.read_text()
    path.write_text(content)
    try:
        for cls in (ConfiguredTrainer, DenoisingDiffusionTrainer, PseudoLabelTrainer):
            with pytest.raises(UserError, match=message):
                tiny.trainer(cls).do_split()
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plans, _: plans["configurations"]["2d"].update(spacing=5), "plans.json: configurations.2d.spacing"),
        (lambda plans, _: plans["configurations"]["2d"].update(data_identifier=".."), "2d.data_identifier: '..'"),
        (lambda _, dataset: dataset.pop("labels"), "dataset.json: labels: Field required"),
        (lambda _, dataset: dataset.update(channel_names=[]), "dataset.json: channel_names"),
    ],
)
def test_plans_and_data_sets_are_checked_before_there_are_results(world, change, message):
    plans = json.loads((world / f"{tiny.PLANS}.json").read_text()) | {"continue_training": False, "plans_name": "Bad"}
    dataset_json = json.loads((world / "dataset.json").read_text())
    change(plans, dataset_json)
    with pytest.raises(UserError, match=message):
        ConfiguredTrainer(plans, "2d", 0, dataset_json, torch.device("cpu"))
    assert not list(Path(os.environ["nnUNet_results"]).rglob("*__Bad__*"))


def test_what_nnunet_cannot_write_is_named_with_its_folder(plans, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nnUNetTrainer, "_save_debug_information", full_disk)
    trainer = tiny.trainer(ConfiguredTrainer, plans=plans("Full"))
    with pytest.raises(NotWritten, match=r"was not written to .*ConfiguredTrainer__Full__2d/fold_0, where \d+ MB"):
        trainer.run_training()


def test_extra_state_is_written_with_the_rest_at_once(plans, monkeypatch):
    trainer = tiny.trainer(DenoisingDiffusionTrainer, plans=plans("Once"))
    trainer.initialize()
    written, save = [], torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: (written.append(file), save(content, file)))
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_latest.pth"))
    assert sum(isinstance(file, str) for file in written) == 1


def test_checkpoints_are_written_whole_or_not_at_all(world, monkeypatch):
    trainer = tiny.trainer(ConfiguredTrainer)
    trainer.initialize()
    path = Path(trainer.output_folder) / "checkpoint_latest.pth"
    path.write_text("the earlier one")

    def full_disk(*args, **kwargs):
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(str(path))
    assert path.read_text() == "the earlier one"
    assert not [name for name in os.listdir(trainer.output_folder) if name.startswith(".tmp")]
