import json
import os
import re
import zipfile
from pathlib import Path

import minimal
import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_diffusion import export as stock
from nnunet_diffusion import installation, model_folder
from nnunet_diffusion.cli import main
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import NotWritten, atomic
from nnunet_diffusion.model_folder import load_checkpoint

DATASET = "Dataset777_Tiny"
DATASET_JSON = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "left": 1, "right": 2}, "numTraining": 1}
DATASET_JSON |= {"file_ending": ".nii.gz"}
COMMAND = ["export", "--stock", "-d", "777", "-tr", "SameTrainer", "-p", "TinyPlans", "-c", "2d"]

# Trainers of another folder than ours, so that these tests depend on no trainer's details: the planned network, one
# with weights of its own, one with the same weights and another function.
TRAINERS = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
import torch


class SameTrainer(nnUNetTrainer):
    pass


class ConditionedTrainer(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, inputs, outputs, enable_deep_supervision=True):
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, inputs, outputs, enable_deep_supervision
        )
        network.embedding = torch.nn.Linear(4, 4)
        return network


class SmootherTrainer(nnUNetTrainer):
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, inputs, outputs, enable_deep_supervision=True):
        network = nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, inputs, outputs, enable_deep_supervision
        )
        for module in network.modules():
            if isinstance(module, torch.nn.LeakyReLU):
                module.negative_slope = 0.02
        return network
"""


def plans() -> dict:
    kwargs = {
        "n_stages": 3,  # two stages in the decoder: with one, the heads of all stages are the head of the last
        "features_per_stage": [4, 6, 8],
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "kernel_sizes": [[3, 3], [3, 3], [3, 3]],
        "strides": [[1, 1], [2, 2], [2, 2]],
        "n_conv_per_stage": [1, 1, 1],
        "n_conv_per_stage_decoder": [1, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": kwargs,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    content = minimal.plans("2d", name="TinyPlans") | {"dataset_name": DATASET, "label_manager": "LabelManager"}
    content["configurations"]["2d"] |= {"patch_size": [16, 16], "architecture": architecture}
    return content


@pytest.fixture
def results(nnunet_folders, tmp_path, monkeypatch) -> Path:
    """The results folder of the tiny data set; nnU-Net finds the trainers above."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "Theirs.py").write_text(TRAINERS)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "theirs"))
    return nnunet_folders / "nnUNet_results" / DATASET


def make_model(results: Path, trainer: str = "SameTrainer", folds: tuple = (0, "all"), **extra) -> Path:
    """A model folder as nnUNetTrainer.save_checkpoint and on_train_start write it, of untrained networks."""
    folder = results / f"{trainer}__TinyPlans__2d"
    for fold in folds:
        (folder / f"fold_{fold}").mkdir(parents=True)
        save_json(plans(), str(folder / "plans.json"))
        save_json(DATASET_JSON, str(folder / "dataset.json"))
        save_json({"spacings": []}, str(folder / "dataset_fingerprint.json"))
        with model_folder.trainers_of(installation.with_our_trainers(installation.ext_trainer_folders())):
            network = stock.build(str(folder), "2d", recursive_find_trainer_class_by_name(trainer))
        checkpoint = {
            "network_weights": network.state_dict(),
            "optimizer_state": torch.optim.SGD(network.parameters(), 0.01, momentum=0.99).state_dict(),
            "grad_scaler_state": None,
            "logging": {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "lrs": [0.01], "dice": np.ones((1, 2))},
            "_best_ema": np.float64(0.5),
            "current_epoch": 1,
            "init_args": {
                "plans": plans(),
                "configuration": "2d",
                "fold": fold,
                "dataset_json": DATASET_JSON,
                "device": torch.device("cuda"),
            },  # fmt: skip
            "trainer_name": trainer,
            "inference_allowed_mirroring_axes": (1,),
        }
        torch.save({**checkpoint, **extra}, folder / f"fold_{fold}" / "checkpoint_final.pth")
    return folder


def test_plain_nnunet_predicts_the_same_with_the_export(results, monkeypatch, capsys):
    source = make_model(results)
    with model_folder.trainers_of(os.environ["nnUNet_extTrainer"]):
        ours = model_folder.load_predictor(str(source), ["0", "all"], "checkpoint_final.pth")
    assert main(COMMAND) == 0
    exported = results / "nnUNetTrainer__TinyPlans__2d"
    assert str(exported) in capsys.readouterr().out

    monkeypatch.delenv("nnUNet_extTrainer")
    plain = nnUNetPredictor(device=torch.device("cpu"))
    plain.initialize_from_trained_model_folder(str(exported), ("0", "all"))
    assert plain.trainer_name == "nnUNetTrainer"
    assert plain.allowed_mirroring_axes == (1,)
    image = torch.randn(1, 2, 24, 20)  # channel, two slices of more than one patch
    assert torch.equal(
        plain.predict_logits_from_preprocessed_data(image), ours.predict_logits_from_preprocessed_data(image)
    )
    for file in stock.DESCRIPTIONS:
        assert load_json(str(exported / file)) == load_json(str(source / file))


def test_checkpoint_keeps_all_but_the_trainers_name(results):
    source = make_model(results, folds=(0,))
    stock.export_stock(str(source), str(results / "out"), None, "checkpoint_final.pth")
    files = (folder / "fold_0" / "checkpoint_final.pth" for folder in (source, results / "out"))
    before, after = (torch.load(file, weights_only=False) for file in files)
    assert after.pop("exported_from") == before["trainer_name"] == "SameTrainer"
    assert after.pop("trainer_name") == "nnUNetTrainer"
    assert after.keys() == before.keys() - {"trainer_name"}
    assert str(after["logging"]) == str(before["logging"])
    for key in ("_best_ema", "current_epoch", "init_args", "inference_allowed_mirroring_axes"):
        assert after[key] == before[key]


def test_the_export_names_no_case(results):
    source = make_model(results, folds=(0,))
    named = {"dataset": {"SMITH": {"images": ["/SMITH.nii.gz"], "label": "/SMITH_seg.nii.gz"}}}
    tables = named | {"annotated_labels": {"SMITH": []}}
    save_json(load_json(str(source / "dataset.json")) | tables, str(source / "dataset.json"))
    file = source / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    checkpoint["init_args"]["dataset_json"] |= tables
    torch.save(checkpoint, file)
    stock.export_stock(str(source), str(results / "out"), None, "checkpoint_final.pth")
    assert b"SMITH" in file.read_bytes()
    assert not any(b"SMITH" in path.read_bytes() for path in (results / "out").rglob("*") if path.is_file())


def test_only_the_chosen_fold_goes_to_the_chosen_folder(results, tmp_path):
    make_model(results)
    assert main([*COMMAND, "-f", "all", "-o", str(tmp_path / "deep" / "model")]) == 0
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["model"]
    assert sorted(p.name for p in (tmp_path / "deep" / "model").iterdir()) == sorted([*stock.DESCRIPTIONS, "fold_all"])


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ("ConditionedTrainer", r"^ConditionedTrainer cannot .* 2 weights .*'embedding.bias' .\(4,\), planned: absent"),
        ("SmootherTrainer", "^SmootherTrainer cannot be exported as stock: in fold 0, plain nnU-Net's output differs"),
    ],
)
def test_another_network_is_refused_by_name_and_leaves_nothing(results, trainer, message):
    source = make_model(results, trainer)
    with pytest.raises(UserError, match=message):
        stock.export_stock(str(source), str(results / "out"), None, "checkpoint_final.pth")
    assert [path.name for path in results.iterdir()] == [source.name]


@pytest.mark.parametrize("trainer", ["DenoisingDiffusionTrainer", "DiffusionPretrainedLinearTrainer"])
def test_our_trainers_of_other_networks_are_refused(results, trainer):
    source = make_model(results, trainer, folds=(0,))
    with pytest.raises(UserError, match=f"^{trainer} cannot be exported as stock"):
        stock.export_stock(str(source), str(results / "out"), None, "checkpoint_final.pth")


@pytest.mark.parametrize(
    "trainer", ["ConfiguredTrainer", "DiffusionPretrainedTrainer", "DiffusionPretrainedDecoderTrainer"]
)
def test_our_trainers_of_the_planned_network_are_exported(results, trainer):
    source = make_model(results, trainer, folds=(0,))
    assert stock.export_stock(str(source), str(results / "out"), None, "checkpoint_final.pth") == ["0"]


def test_weights_of_another_network_under_a_stock_trainer_are_refused(results):
    source = make_model(results, network_weights={"encoder.weight": torch.zeros(3)})
    with pytest.raises(UserError, match=r"SameTrainer cannot be exported as stock: .* weights are not"):
        stock.export_stock(str(source), str(results / "out"), None, "checkpoint_final.pth")


def test_existing_folder_is_refused_and_untouched(results, capsys):
    make_model(results)
    existing = results / "nnUNetTrainer__TinyPlans__2d"
    existing.mkdir()
    (existing / "mine").write_text("mine")
    assert main(COMMAND) == 1
    assert "exists already: remove it, or give another folder" in capsys.readouterr().err
    assert [path.name for path in existing.iterdir()] == ["mine"]


def test_missing_parts_are_named(results, capsys):
    assert main(COMMAND) == 1
    assert "Could not find a dataset with the ID 777" in capsys.readouterr().err
    source = make_model(results, folds=(0,))
    for arguments, message in [
        (["-tr", "NoTrainer"], "NoTrainer__TinyPlans__2d is not a model folder, it has no plans.json"),
        (["-f", "0", "3"], "has no checkpoint_final.pth of fold 3"),
        (["-chk", "checkpoint_best.pth"], "has no checkpoint_best.pth of any fold"),
    ]:
        assert main([*COMMAND, *arguments]) == 1
        assert message in capsys.readouterr().err
    (source / "fold_0" / "checkpoint_final.pth").write_bytes(b"PK\x03\x04 cut")
    assert main(COMMAND) == 1
    assert "checkpoint_final.pth cannot be read, it is truncated or no PyTorch file" in capsys.readouterr().err


def test_trainer_that_nnunet_cannot_find_is_named(results, monkeypatch, capsys):
    make_model(results)
    monkeypatch.delenv("nnUNet_extTrainer")
    assert main(COMMAND) == 1
    assert "SameTrainer" in capsys.readouterr().err
    assert installation.EXT_TRAINER not in os.environ


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil_was_here",)


def test_code_in_a_checkpoint_is_not_run(results, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make_model(results, logging=Evil())
    with pytest.raises(UserError, match="checkpoint_final.pth holds more than .* it asks for posix.mkdir"):
        stock.export_stock(str(source), str(results / "out"), None, "checkpoint_final.pth")
    assert not (tmp_path / "evil_was_here").exists()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("plans.json", "{", "plans.json: is no JSON"),
        ("plans.json", "{}", "plans.json: dataset_name: Field required"),
        ("dataset.json", "[]", "dataset.json: the whole file: Input should be a valid dictionary"),
        (
            "dataset.json",
            json.dumps({**DATASET_JSON, "labels": {"a": 1, "b": 2}}),
            "and dataset.json (RuntimeError('Background label",
        ),
    ],
)
def test_a_model_folder_that_cannot_be_read_is_named(results, capsys, file, content, message):
    (make_model(results) / file).write_text(content)
    assert main(COMMAND) == 1
    assert message in capsys.readouterr().err
    assert len(list(results.iterdir())) == 1


def test_checkpoints_of_numpy_1_are_read(tmp_path):
    """It called the module that makes its scalars otherwise."""
    new, old = tmp_path / "new.pth", tmp_path / "old.pth"
    content = {"network_weights": {}, "trainer_name": "T", "init_args": {"configuration": "2d", "dataset_json": {}}}
    torch.save({**content, "logging": {"dice": [np.float64(0.5), np.arange(2)]}}, new)
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for name in source.namelist():
            target.writestr(name, source.read(name).replace(b"numpy._core.multi", b"numpy.core.multi"))
    assert old.stat().st_size < new.stat().st_size
    for path in (new, old):
        first, second = load_checkpoint(str(path))["logging"]["dice"]
        assert first == 0.5 and second.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "the whole file: Input should be a valid dictionary"),
        ({"network_weights": 3, "trainer_name": "T", "init_args": {}}, "network_weights: Input should be a valid dict"),
        ({"network_weights": {}, "trainer_name": "T", "init_args": {}}, "init_args.configuration: Field required"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(UserError, match=f"c.pth: {message}"):
        load_checkpoint(str(tmp_path / "c.pth"))


def test_full_disk_leaves_nothing(results, monkeypatch, capsys):
    """On a full disk torch.save raises RuntimeErrors of its own."""
    source, save = make_model(results), torch.save

    def full(content, path):
        Path(path).write_bytes(b"half")
        save(content, "/dev/full")

    monkeypatch.setattr(torch, "save", full)
    assert main(COMMAND) == 1
    assert re.search(rf"nnUNetTrainer__TinyPlans__2d was not written to {results}.*make room", capsys.readouterr().err)
    assert [path.name for path in results.iterdir()] == [source.name]


@pytest.mark.parametrize("values", [1, 10**6])
def test_full_disk_is_told_of_every_file_of_torch(tmp_path, values):
    file = tmp_path / "denoiser.pth"
    message = rf"^denoiser.pth was not written to {tmp_path}, where \d+ MB are free: .*; make room"
    with pytest.raises(NotWritten, match=message), atomic(file) as temporary:
        Path(temporary).touch()
        torch.save({"weights": torch.zeros(values)}, "/dev/full")
    with pytest.raises(RuntimeError, match="^out of memory$"), atomic(file):
        raise RuntimeError("out of memory")
    assert not list(tmp_path.iterdir())
