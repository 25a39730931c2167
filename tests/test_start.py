"""What a training can start from: checkpoints of nnssl, of nnU-Net and of MultiTalent; nothing trains here.

The files are synthetic, of narrow networks, and have exactly the keys that those projects write.
"""

import copy
import re

import denoisers
import minimal
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.pretraining.conditioning import fold
from nnunet_diffusion.pretraining.denoiser_file import build, load_denoiser
from nnunet_diffusion.pretraining.start import load_first_weights

UNETS = "dynamic_network_architectures.architectures.unet."
IMPORTS = ["conv_op", "norm_op", "dropout_op", "nonlin"]
DATASET = {**minimal.dataset_json(), "labels": {"background": 0, "liver": 1, "spleen": 2}}
PLACES = {
    "ResEncL": {
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
    },
    "PlainConvUNet": {
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stages.0",
        "keys_to_in_proj": ("encoder.stages.0.0.convs.0.all_modules.0", "encoder.stages.0.0.convs.0.conv"),
    },
}
MAE = {"type": "Pretraining Method", "name": "Masked Autoencoders", "apa_citations": ["He, K., et al. (2022)."]}


def architecture(kind="ResidualEncoderUNet", stages=3, kernels=None) -> dict:
    """Of a plan: a narrow 3-D network, of as many blocks in each stage as nnU-Net's residual encoders have."""
    blocks = "n_blocks_per_stage" if kind == "ResidualEncoderUNet" else "n_conv_per_stage"
    kwargs = {
        "n_stages": stages, "features_per_stage": [4, 6, 8, 10, 10, 10][:stages],
        "conv_op": "torch.nn.modules.conv.Conv3d", "kernel_sizes": kernels or [[3, 3, 3]] * stages,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)], blocks: [1, 3, 4, 6, 6, 6][:stages],
        "n_conv_per_stage_decoder": [1] * (stages - 1), "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {},
    }  # fmt: skip
    return {"network_class_name": UNETS + kind, "arch_kwargs": kwargs, "_kw_requires_import": IMPORTS}


def plans(scheme="CTNormalization", spacing=(1.0, 1.0, 1.0), **network) -> dict:
    content = minimal.plans("3d_fullres", name="P")
    content["configurations"]["3d_fullres"] |= {
        "patch_size": [16, 16, 16], "spacing": list(spacing), "normalization_schemes": [scheme],
        "architecture": architecture(**network),
    }  # fmt: skip
    intensities = {"mean": 50.0, "std": 100.0, "percentile_00_5": -200.0, "percentile_99_5": 300.0}
    return {**content, "foreground_intensity_properties_per_channel": {"0": intensities}}


def built(content: dict, channels=1, outputs=3, seed=0):
    """A network of the plan's, every parameter moved away from its initial value."""
    planned = content["configurations"]["3d_fullres"]["architecture"]
    torch.manual_seed(seed)
    network = get_network_from_plans(
        planned["network_class_name"], planned["arch_kwargs"], IMPORTS, channels, outputs, deep_supervision=True
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return network


def start(path, network, content=None, dataset_json=DATASET):
    return load_first_weights(
        str(path), network, [network], PlansManager(content or plans()), "3d_fullres", dataset_json, 50
    )


def nnssl_file(path, network, name="ResEncL", **changes) -> dict:
    """Writes what nnssl writes, of its keys; returns the weights."""
    configuration = {
        "spacing": [1, 1, 1], "patch_size": [160, 160, 160], "spacing_style": "onemmiso",
        "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False],
    }  # fmt: skip
    weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    content = {
        "network_weights": weights,
        "nnssl_adaptation_plan": {
            "architecture_plans": {
                "arch_class_name": name,
                "arch_kwargs": None,
                "arch_kwargs_requiring_import": None,
            },
            "pretrain_plan": {
                "dataset_name": "Dataset745_OpenMind",
                "plans_name": "nnsslPlans",
                "configurations": {"onemmiso": configuration},
            },
            "pretrain_num_input_channels": 1,
            "recommended_downstream_patchsize": [160, 160, 160],
            **PLACES["PlainConvUNet" if name == "PlainConvUNet" else "ResEncL"],
            "key_to_lpe": None,
        },
        "citations": [MAE],
    }
    for keys, value in changes.items():
        *outer, last = keys.split("__")
        place = content
        for key in outer:
            place = place[key]
        place[last] = value
    torch.save(content, path)
    return weights


def model_file(path, network, labels, content=None, **others) -> dict:
    """Writes what nnU-Net's trainers write, as far as it matters; returns the weights."""
    weights = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    init_args = {"plans": content or plans(), "configuration": "3d_fullres", "fold": "all",
                 "dataset_json": {**minimal.dataset_json(), "labels": labels}}  # fmt: skip
    torch.save({"network_weights": weights, "trainer_name": "nnUNetTrainer", "init_args": init_args, **others}, path)
    return weights


# ---------------------------------------------------------------- to others


def as_nnunets_head_reads(path, network) -> None:
    """Loads encoder and stem in the way of nnU-Net's development head, which asks for every key."""
    content = torch.load(path, weights_only=True)
    plan, weights = content["nnssl_adaptation_plan"], content["network_weights"]
    first = next(iter(plan["pretrain_plan"]["configurations"].values()))
    read = {key: plan[key] for key in ("keys_to_in_proj", "key_to_lpe", "recommended_downstream_patchsize")}
    read |= {key: first[key] for key in ("spacing", "patch_size")}
    read |= {key: plan["architecture_plans"][key] for key in ("arch_class_name", "arch_kwargs")}
    assert read["key_to_lpe"] is None, "a U-Net has no position embedding"
    assert plan["architecture_plans"]["arch_kwargs_requiring_import"] == IMPORTS
    assert plan["pretrain_num_input_channels"] == network.encoder.stages[0](torch.zeros(1, 1, 8, 8)).shape[0] == 1
    assert {weights[f"{key}.weight"].shape for key in read["keys_to_in_proj"]} == {torch.Size([4, 1, 3, 3])}
    for theirs, ours in ((plan["key_to_encoder"], network.key_to_encoder), (plan["key_to_stem"], network.key_to_stem)):
        chosen = {k.replace(theirs, "").lstrip("."): v for k, v in weights.items() if k.startswith(theirs)}
        network.get_submodule(ours).load_state_dict(chosen)  # strictly
    for citation in content["citations"]:
        assert citation["type"] and citation["name"] and (citation.get("apa_citations") or citation["bibtex_citations"])


def test_nnunets_head_reads_a_denoiser_key_by_key(tmp_path):
    content = load_denoiser(denoisers.write(tmp_path / "denoiser.pth"))
    plan = content["plan"]
    network = get_network_from_plans(
        plan["network_class"], plan["network_kwargs"], plan["network_kwargs_requiring_import"], 1, 5,
        deep_supervision=False,
    )  # fmt: skip
    as_nnunets_head_reads(tmp_path / "denoiser.pth", network)
    expected = fold(build(content), content["timestep"]).encoder.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.encoder.state_dict().items())


def test_our_own_reader_takes_a_denoiser_for_nnssls(tmp_path):
    """The same file without what makes it a denoiser."""
    denoisers.write(tmp_path / "denoiser.pth")
    content = torch.load(tmp_path / "denoiser.pth", weights_only=True)
    kept = {key: content[key] for key in ("network_weights", "nnssl_adaptation_plan", "citations")}
    torch.save(kept, tmp_path / "exported.pth")
    identity = denoisers.plan()
    own = minimal.plans("2d", name="P")
    own["configurations"]["2d"]["architecture"] = {
        "network_class_name": identity["network_class"], "arch_kwargs": identity["network_kwargs"],
        "_kw_requires_import": identity["network_kwargs_requiring_import"],
    }  # fmt: skip
    network = get_network_from_plans(identity["network_class"], identity["network_kwargs"], IMPORTS, 1, 3)
    report = load_first_weights(str(tmp_path / "exported.pth"), network, [network], PlansManager(own), "2d", DATASET, 0)
    weights = content["network_weights"]
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items() if k.startswith("encoder."))
    assert len(report.citations) == 2 and "Isensee" in report.citations[0] and "Ho, J." in report.citations[1]


# ---------------------------------------------------------------- from nnssl


@pytest.mark.parametrize("name", ["ResEncL", f"{UNETS}ResidualEncoderUNet", "PlainConvUNet"])
def test_an_encoder_of_nnssl_is_taken_and_nothing_else(tmp_path, name):
    content = plans(kind="PlainConvUNet" if name == "PlainConvUNet" else "ResidualEncoderUNet")
    weights = nnssl_file(tmp_path / "c.pth", built(content, outputs=1, seed=1), name.split(".")[-1])
    network = built(content, seed=2)
    before = copy.deepcopy(network.state_dict())
    report = start(tmp_path / "c.pth", network, content)
    for key, value in network.state_dict().items():
        is_encoder = key.startswith(("encoder.", "decoder.encoder."))
        assert torch.equal(value, weights[key] if is_encoder else before[key]), key
    parameters = [key for key, _ in network.named_parameters()]
    assert report.matched == [key for key in parameters if key.startswith("encoder.")] and not report.adapted
    stayed = {entry.split(" (")[0] for entry in report.missing}
    assert stayed == {key for key in parameters if key.startswith("decoder.")}
    assert "decoder.stages.0.convs.0.conv.weight (of the decoder, the encoder alone is taken)" in report.missing
    assert {entry.split(" (")[0] for entry in report.unexpected} == stayed, "what the file has for them is not used"
    assert report.citations == ["Masked Autoencoders (Pretraining Method): He, K., et al. (2022)."]
    assert "Please cite Masked Autoencoders" in str(report) and report.source.endswith("c.pth")


def test_z_score_under_ct_normalization_and_other_spacing_are_warned_of(tmp_path):
    nnssl_file(tmp_path / "c.pth", built(plans()))
    thick = plans(spacing=(2.0, 1.0, 1.0))
    spacing, scheme = start(tmp_path / "c.pth", built(thick), thick).warnings
    assert spacing == "spacing differs: pre-trained with [1, 1, 1], now [2.0, 1.0, 1.0]"
    assert "pre-trained with ['ZScoreNormalization'], now ['CTNormalization']: the same tissue has other" in scheme
    assert start(tmp_path / "c.pth", built(plans()), plans("ZScoreNormalization")).warnings == []


def test_scans_that_kept_their_spacing_are_warned_of(tmp_path):
    first = "nnssl_adaptation_plan__pretrain_plan__configurations__onemmiso"
    nnssl_file(tmp_path / "c.pth", built(plans()), **{f"{first}__spacing": None})
    (spacing,) = start(tmp_path / "c.pth", built(plans()), plans("ZScoreNormalization")).warnings
    assert spacing == "spacing differs: pre-trained with that of each scan, now [1.0, 1.0, 1.0]"


def test_a_kernel_of_one_voxel_is_the_mean_of_three(tmp_path):
    """As in thick slices; by hand: 1, 2 and 6 along the first axis become 3."""
    source = built(plans())
    with torch.no_grad():
        for number, value in enumerate((1.0, 2.0, 6.0)):
            source.encoder.stem.convs[0].conv.weight[:, :, number] = value
    nnssl_file(tmp_path / "c.pth", source)
    content = plans(kernels=[[1, 3, 3], [3, 3, 3], [3, 3, 3]])
    network = built(content, seed=2)
    report = start(tmp_path / "c.pth", network, content)
    assert (network.encoder.stem.convs[0].conv.weight == 3).all()
    assert "encoder.stem.convs.0.conv.weight (kernel of 3 x 3 x 3 averaged to 1 x 3 x 3)" in report.adapted
    assert len(report.adapted) == 3, "stem, and the two convolutions of the first stage"


def test_more_channels_share_the_stem_and_deeper_stages_stay(tmp_path):
    source = built(plans())
    nnssl_file(tmp_path / "c.pth", source)
    content = plans(stages=4)
    content["configurations"]["3d_fullres"]["normalization_schemes"] *= 2
    content["foreground_intensity_properties_per_channel"]["1"] = {"mean": 0.0, "std": 1.0}
    network = built(content, channels=2, seed=2)
    report = start(tmp_path / "c.pth", network, content, {**DATASET, "channel_names": {"0": "CT", "1": "PET"}})
    halved = source.encoder.stem.convs[0].conv.weight / 2
    assert torch.equal(network.encoder.stem.convs[0].conv.weight, halved.expand(-1, 2, -1, -1, -1))
    assert "encoder.stem.convs.0.conv.weight (1 to 2 of 2 input channels)" in report.adapted
    deeper = [entry for entry in report.missing if "so many stages" in entry]
    assert deeper and all(entry.startswith("encoder.stages.3.") for entry in deeper)


def test_stages_that_the_plan_has_not_are_named(tmp_path):
    nnssl_file(tmp_path / "c.pth", built(plans(stages=4)))
    report = start(tmp_path / "c.pth", built(plans(), seed=2))
    assert any(name.startswith("encoder.stages.3.") for name in report.unexpected)
    assert "more in transfer_report.json" in str(report)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"nnssl_adaptation_plan__architecture_plans__arch_class_name": "PrimusM"},
            "c.pth is a 'PrimusM': only encoders of ResEncL, .* Primus and networks without skip connections",
        ),
        (
            {"nnssl_adaptation_plan__architecture_plans__arch_class_name": "NoSkipResEncL"},
            "c.pth is a 'NoSkipResEncL': only encoders of ResEncL",
        ),
        (
            {"nnssl_adaptation_plan__architecture_plans__arch_class_name": "PlainConvUNet"},
            "c.pth is a 'PlainConvUNet', the plan's network a ResidualEncoderUNet: plan with nnU-Net's own planner",
        ),
        (
            {"nnssl_adaptation_plan__key_to_encoder": "eva"},
            r"(?s)c.pth: the checkpoint does not fit the planned network:.*stages.0.*checkpoint missing",
        ),
        ({"nnssl_adaptation_plan": {}}, "c.pth: nnssl_adaptation_plan.architecture_plans: Field required"),
        ({"nnssl_adaptation_plan__key_to_stem": 5}, "nnssl_adaptation_plan.key_to_stem: Input should be a valid"),
        ({"nnssl_adaptation_plan__pretrain_plan__configurations": {}}, "pretrain_plan.configurations: Dictionary"),
        ({"network_weights": {"encoder.stem": 3}}, "network_weights.encoder.stem: Value error, must be a tensor"),
        ({"network_weights": {"encoder.stem": torch.tensor([torch.nan])}}, "must not be NaN"),
    ],
)  # fmt: skip
def test_what_nnssl_has_and_a_plan_has_not_is_refused_by_name(tmp_path, changes, message):
    nnssl_file(tmp_path / "c.pth", built(plans()), **changes)
    network = built(plans(), seed=2)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match=message):
        start(tmp_path / "c.pth", network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items()), "untouched"


def test_an_encoder_of_other_widths_is_refused_with_a_table(tmp_path):
    wide = plans()
    wide["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 6, 12]
    nnssl_file(tmp_path / "c.pth", built(wide))
    with pytest.raises(UserError, match=r"(?s)does not fit.*stages.2.blocks.0.conv1.conv.weight: checkpoint \(12, 6,"):
        start(tmp_path / "c.pth", built(plans()))


@pytest.mark.parametrize("given", [None, [], "text", [1], [{"type": 3}], [{"apa_citations": "He"}]])
def test_citations_never_stand_in_the_way(tmp_path, given):
    nnssl_file(tmp_path / "c.pth", built(plans()), citations=given)
    assert start(tmp_path / "c.pth", built(plans())).citations == []


def test_citations_hold_nothing_that_a_terminal_obeys(tmp_path):
    evil = {"type": "a\x1b[2J", "name": "b\n\x07", "bibtex_citations": ["@article{x,\n title={y}}"]}
    nnssl_file(tmp_path / "c.pth", built(plans()), citations=[evil])
    (text,) = start(tmp_path / "c.pth", built(plans())).citations
    assert text == "b (a [2J): @article{x, title={y}}"


# ---------------------------------------------------------------- from nnU-Net and MultiTalent

MORE_LABELS = {"background": 0, **{f"organ {i}": i for i in range(1, 14)}}


def test_a_model_of_the_same_labels_is_taken_with_its_heads(tmp_path):
    weights = model_file(tmp_path / "c.pth", built(plans(), seed=1), DATASET["labels"])
    network = built(plans(), seed=2)
    report = start(tmp_path / "c.pth", network)
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert report.matched == [key for key, _ in network.named_parameters()] and not report.missing + report.warnings


@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("labels", [MORE_LABELS, {"background": 0, "spleen": 1, "liver": 2}])
def test_of_a_model_of_other_labels_encoder_and_decoder_are_taken(tmp_path, kind, labels):
    """Also of one whose outputs are as many, but mean something else."""
    content = plans(kind=kind)
    weights = model_file(tmp_path / "c.pth", built(content, outputs=len(labels), seed=1), labels, content)
    network = built(content, seed=2)
    heads = copy.deepcopy({k: v for k, v in network.state_dict().items() if "seg_layers" in k})
    report = start(tmp_path / "c.pth", network, content)
    for key, value in network.state_dict().items():
        assert torch.equal(value, heads[key] if key in heads else weights[key]), key
    assert {entry.split(" (")[0] for entry in report.missing} == set(heads)
    assert {entry.split(" (")[0] for entry in report.unexpected} == set(heads) and not report.adapted


def test_other_spacing_and_normalization_of_a_model_are_warned_of(tmp_path):
    trained = plans("ZScoreNormalization", (3.0, 1.0, 1.0))
    model_file(tmp_path / "c.pth", built(plans()), DATASET["labels"], trained)
    spacing, scheme = start(tmp_path / "c.pth", built(plans())).warnings
    assert "spacing differs: pre-trained with [3.0, 1.0, 1.0], now [1.0, 1.0, 1.0]" == spacing
    assert "['ZScoreNormalization'], now ['CTNormalization']" in scheme
    model_file(tmp_path / "c.pth", built(plans()), DATASET["labels"], {"plans_name": "no plan"})
    assert start(tmp_path / "c.pth", built(plans())).warnings == [
        "the checkpoint does not say which spacing and normalization it was trained with"
    ]


def multitalent_file(path, network, many_stems: bool) -> dict:
    """A model of several data sets: heads, and it may be stems, with the data sets' numbers in their names."""
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    for key in [key for key in weights if "seg_layers" in key or (many_stems and ".stem." in key)]:
        place = "seg_layers." if "seg_layers" in key else "stem."
        value = weights.pop(key)
        weights |= {key.replace(place, f"{place}{number}."): value for number in ("003", "221_0")}
    init_args = {"plans": plans("ZScoreNormalization"), "configuration": "3d_fullres",
                 "dataset_json": {"dataset_ids": ["3", "221"]}}  # fmt: skip
    torch.save({"network_weights": weights, "trainer_name": "MultiTalent_trainer", "init_args": init_args}, path)
    return weights


@pytest.mark.parametrize("many_stems", [False, True])
def test_multitalents_encoder_and_decoder_are_taken(tmp_path, many_stems):
    weights = multitalent_file(tmp_path / "c.pth", built(plans(), outputs=14, seed=1), many_stems)
    network = built(plans(), seed=2)
    before = copy.deepcopy(network.state_dict())
    report = start(tmp_path / "c.pth", network)
    for key, value in network.state_dict().items():
        stays = "seg_layers" in key or (many_stems and ".stem." in key)
        assert torch.equal(value, before[key] if stays else weights[key]), key
    stems = [entry for entry in report.missing if "a stem for each of its data sets" in entry]
    assert ("the stem is random" in str(report)) == many_stems
    assert bool(stems) == many_stems and all(entry.startswith("encoder.stem.") for entry in stems)
    assert any(name.startswith("decoder.seg_layers.221_0.") for name in report.unexpected)


def test_models_of_nnunet_v1_are_refused_by_name(tmp_path):
    torch.save({"epoch": 1000, "state_dict": {}, "optimizer_state_dict": {}}, tmp_path / "model_final.model")
    with pytest.raises(UserError, match="model_final.model holds a state_dict, as models of nnU-Net v1 do"):
        start(tmp_path / "model_final.model", built(plans()))


@pytest.mark.parametrize("change", ["wider", "plain", "two-dimensional"])
def test_a_model_of_another_plan_is_refused_with_a_table(tmp_path, change):
    content = plans(kind="PlainConvUNet") if change == "plain" else plans()
    kwargs = content["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    if change == "wider":
        kwargs["features_per_stage"] = [4, 6, 12]
    if change == "two-dimensional":
        kwargs |= {key: [size[1:] for size in kwargs[key]] for key in ("kernel_sizes", "strides")}
        kwargs |= {key: re.sub("3d", "2d", kwargs[key]) for key in ("conv_op", "norm_op")}
    model_file(tmp_path / "c.pth", built(content), MORE_LABELS, content)
    network = built(plans(), seed=2)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(UserError, match="(?s)c.pth: the checkpoint does not fit the planned .*of the same plan"):
        start(tmp_path / "c.pth", network)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items()), "untouched"
