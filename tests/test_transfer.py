"""Transfer of a folded denoiser into a segmentation network, without nnU-Net's training around it."""

import itertools

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from test_networks import planned_network, trained
from torch import nn

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.optimization import WarmupPolyLR, warming_ema
from nnunet_diffusion.pretraining.conditioning import condition, fold
from nnunet_diffusion.pretraining.linear import LinearClassifier
from nnunet_diffusion.pretraining.start import first_existing, own_pretraining
from nnunet_diffusion.pretraining.transfer import (
    adapt_input_channels,
    parameter_sums,
    plan_differences,
    report_loaded,
    transfer,
)


def folded_denoiser(kind="PlainConvUNet", dim=2):
    return fold(trained(condition(planned_network(kind, dim), 1)), 300).state_dict()


@pytest.mark.parametrize("dim", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_everything_but_the_heads_is_copied_under_all_its_names(kind, dim):
    network = planned_network(kind, dim, outputs=4, deep_supervision=True)
    heads = {k: v.clone() for k, v in network.state_dict().items() if "seg_layers" in k}
    folded = folded_denoiser(kind, dim)
    report = transfer(network, folded, 1)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, heads[name] if name in heads else folded[name]), name
    assert len(report.matched) + len(report.missing) == len(list(network.parameters()))
    assert not report.adapted and all("seg_layers" in name for name in report.missing + report.unexpected)
    assert "matched" in str(report) and "new output head" in str(report)


def test_a_cascades_label_channels_stay_as_they_were():
    network = planned_network(channels=4, outputs=3)
    first = network.encoder.stages[0][0].convs[0].conv.weight
    before, folded = first.detach().clone(), folded_denoiser()
    report = transfer(network, folded, image_channels=1)
    assert torch.equal(first[:, :1], folded["encoder.stages.0.0.convs.0.conv.weight"])
    assert torch.equal(first[:, 1:], before[:, 1:])
    assert report.adapted == ["encoder.stages.0.0.convs.0.conv.weight (1 to 1 of 4 input channels)"]


def test_channels_by_hand():
    """Weights 1 and 3 on two channels make 4 in all: 4 / 3 on each of three, 4 on one."""
    weight = torch.tensor([1.0, 3.0]).reshape(1, 2, 1, 1)
    assert adapt_input_channels(weight, 3).flatten().tolist() == pytest.approx([4 / 3] * 3)
    assert adapt_input_channels(weight, 1).flatten().tolist() == [4.0]
    assert adapt_input_channels(weight, 2) is weight


def test_a_network_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"(?s)does not fit the planned network:.*denoiser missing"):
        transfer(planned_network("ResidualEncoderUNet"), folded_denoiser("PlainConvUNet"), 1)


def test_linear_classifier_has_heads_on_all_stages_and_trains_them_only():
    network = planned_network(outputs=3)
    keys, stages = set(network.state_dict()), len(network.encoder.output_channels)
    classifier = LinearClassifier(network)
    heads = {f"of_encoder.seg_layers.{i}.{w}" for i in range(stages) for w in ("weight", "bias")}
    assert set(classifier.state_dict()) == keys | heads
    trainable = {name for name, p in classifier.named_parameters() if p.requires_grad}
    assert trainable == heads | {f"decoder.seg_layers.{i}.{w}" for i in (0, 1) for w in ("weight", "bias")}
    classifier.train()
    assert not any(m.training for m in classifier.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    assert classifier(torch.randn(2, 1, 16, 16)).shape == (2, 3, 16, 16)


def test_a_linear_model_without_heads_on_the_encoder_computes_what_it_did():
    """Models were trained so before there were any; the second route sums the decoder's heads alone."""
    classifier, image = LinearClassifier(planned_network(outputs=3)).eval(), torch.randn(2, 1, 16, 16)
    state = {name: tensor.clone() for name, tensor in classifier.state_dict().items() if "of_encoder" not in name}
    finest, *coarser = classifier.decoder(classifier.encoder(image))
    expected = finest + sum(nn.functional.interpolate(x, (16, 16), mode="bilinear") for x in coarser)
    assert not torch.allclose(classifier(image), expected)
    classifier.load_state_dict(state)
    torch.testing.assert_close(classifier(image), expected)
    with pytest.raises(RuntimeError, match="Missing key.*encoder.stages"):
        classifier.load_state_dict({name: x for name, x in state.items() if "encoder.stages" not in name})


IDENTITY = {
    "spacing": [2.0, 1.0],
    "normalization_schemes": ["CTNormalization"],
    "channel_names": {"0": "CT"},
    "intensities": {"0": {"mean": 50.0, "std": 100.0, "percentile_00_5": -200.0, "percentile_99_5": 300.0}},
}


def test_plan_differences_name_both_sides():
    assert plan_differences(IDENTITY, IDENTITY) == []
    nearly = {**IDENTITY, "intensities": {"0": {**IDENTITY["intensities"]["0"], "mean": 55.0}}}
    assert plan_differences(IDENTITY, nearly) == [], "a twentieth of the standard deviation"
    other = {**IDENTITY, "spacing": [3.0, 1.0], "intensities": {"0": {**IDENTITY["intensities"]["0"], "mean": 90.0}}}
    spacing, mean = plan_differences(IDENTITY, other)
    assert "[2.0, 1.0]" in spacing and "[3.0, 1.0]" in spacing
    assert "mean" in mean and "50.0" in mean and "90.0" in mean


def test_weights_that_somebody_else_loaded_are_reported():
    network = planned_network(outputs=3)
    before = parameter_sums(network)
    assert report_loaded(network, before) is None
    folded = {name: tensor for name, tensor in folded_denoiser().items() if "seg_layers" not in name}
    network.load_state_dict(folded, strict=False)
    report = report_loaded(network, before)
    assert len(report.matched) + len(report.missing) == len(before) and report.source == "-pretrained_weights"
    assert report.matched and not any("seg_layers" in name for name in report.matched)


def test_the_first_file_that_exists(tmp_path):
    (tmp_path / "b").touch()
    assert first_existing([str(tmp_path / "a"), str(tmp_path / "b")], "") == str(tmp_path / "b")
    with pytest.raises(UserError, match=r"(?s)no denoiser.*/a\nmake one"):
        first_existing([str(tmp_path / "a")], "make one")


def test_schedule_is_nnunets_without_warm_up_and_keeps_ratios_between_groups():
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

    parameter = nn.Parameter(torch.zeros(1))
    ours = torch.optim.SGD([{"params": [parameter]}], 0.01)
    theirs = torch.optim.SGD([parameter], 0.01)
    schedules = WarmupPolyLR(ours, 20), PolyLRScheduler(theirs, 0.01, 20)
    for epoch in range(20):
        for schedule in schedules:
            schedule.step(epoch)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
    two = torch.optim.SGD([{"params": [parameter], "lr": 0.1}, {"params": [nn.Parameter(torch.zeros(1))]}], 0.01)
    schedule = WarmupPolyLR(two, 10, warmup_epochs=3)
    rates = []
    for epoch in range(10):
        schedule.step(epoch)
        first, second = (group["lr"] for group in two.param_groups)
        assert first == pytest.approx(10 * second)
        rates.append(second)
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01]) and rates[-1] < 0.003


def test_weight_average_by_hand():
    """After n updates the decay is (1 + n) / (10 + n), at most 0.5 here: 1 / 10, 2 / 11, ... 0.5 from n = 8."""
    average = warming_ema(0.5)
    averaged, expected = [torch.tensor([1.0])], 1.0
    for n in range(12):
        average(averaged, [torch.tensor([float(n)])], n)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert averaged[0].item() == pytest.approx(expected, rel=1e-6)


def test_a_pre_training_is_looked_for_in_all_configurations_that_are_inherited(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    configurations = {"a": {}, "b": {"inherits_from": "a"}, "c": {"inherits_from": "b"}}
    plans = PlansManager({"dataset_name": "Dataset001_X", "plans_name": "P_round1", "configurations": configurations})
    found = own_pretraining(plans, "c", 3, "T", "denoiser.pth")
    places = itertools.product(("P_round1", "P"), "cba", ("3", "all"))
    folder = tmp_path / "Dataset001_X"
    assert found == [str(folder / f"T__{p}__{c}" / f"fold_{f}" / "denoiser.pth") for p, c, f in places]
