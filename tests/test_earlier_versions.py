"""What earlier versions left behind: models, denoisers, teachers and preprocessed cases that must still be of use.

The archives beside `fixtures/make.py` were made by it, with the code of their time.
"""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch

from nnunet_diffusion import trainers
from nnunet_diffusion.co_training.mask_diffusion import build_pair
from nnunet_diffusion.co_training.teacher_file import load_teacher, restore_teacher
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.export import export_stock
from nnunet_diffusion.installation import trainers_folder
from nnunet_diffusion.marks import refuse_foreign
from nnunet_diffusion.model_folder import load_predictor, trainers_of
from nnunet_diffusion.preprocessing.cases import pool_identifiers
from nnunet_diffusion.preprocessing.preprocess import preprocessing_identity
from nnunet_diffusion.preprocessing.replacement import differing
from nnunet_diffusion.pretraining.denoiser_file import build, load_denoiser
from nnunet_diffusion.trainers.ConfiguredTrainer import ConfiguredTrainer
from nnunet_diffusion.trainers.DenoisingDiffusionTrainer import DenoisingDiffusionTrainer
from nnunet_diffusion.trainers.DiffusionPretrainedTrainer import DiffusionPretrainedTrainer

ARCHIVES = sorted(Path(__file__).with_name("fixtures").glob("*.tar.xz"))
MODEL = "DiffusionPretrainedTrainer"


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def world(request, tmp_path_factory):
    """nnU-Net's folders with what that version left; the plan without settings that have another name now."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name / tiny.NAME).mkdir(parents=True)
            patch.setenv(f"nnUNet_{name}", str(root / name))
        shutil.unpack_archive(request.param, root / "made")
        for name in ("preprocessed", "results"):
            shutil.copytree(root / "made" / name, root / name / tiny.NAME, dirs_exist_ok=True)
        plans = root / "preprocessed" / tiny.NAME / f"{tiny.PLANS}.json"
        content = json.loads(plans.read_text())
        for replaced in ("scratch", "denoiser"):
            content["nnunet_diffusion"][MODEL].pop(replaced, None)
        plans.write_text(json.dumps(content))
        yield root


def result(world, trainer, fold, name=""):
    return world / "results" / tiny.NAME / f"{trainer}__{tiny.PLANS}__2d" / f"fold_{fold}" / name


def test_there_is_something_of_the_version_before():
    assert [path.name for path in ARCHIVES] == ["before.tar.xz"]


def test_a_denoiser_is_rebuilt_and_a_teacher_restored(world):
    denoiser = build(load_denoiser(str(result(world, "DenoisingDiffusionTrainer", "all", "denoiser.pth"))))
    with torch.no_grad():
        assert torch.isfinite(denoiser(torch.randn(2, 1, 16, 16), torch.tensor([0, 999]))).all()
    content = load_teacher(str(result(world, "DiffusionTeacherTrainer", "all", "teacher.pth")))
    trainer = tiny.trainer(ConfiguredTrainer)
    pair = build_pair(trainer.plans_manager, trainer.configuration_manager, 1, len(tiny.LABELS))
    restore_teacher(content, pair)
    assert all(torch.equal(content["teacher_weights"][name], value) for name, value in pair.state_dict().items())


def test_its_settings_that_have_another_name_are_named(world, monkeypatch):
    plans = json.loads((result(world, MODEL, 0).parent / "plans.json").read_text()) | {"continue_training": False}
    dataset_json = json.loads((result(world, MODEL, 0).parent / "dataset.json").read_text())
    with pytest.raises(UserError, match="DiffusionPretrainedTrainer.scratch is no longer a setting: give .* start"):
        DiffusionPretrainedTrainer(plans, "2d", 0, dataset_json, torch.device("cpu"))


def test_preprocessed_cases_are_still_of_their_plan(world):
    trainer = tiny.trainer(DenoisingDiffusionTrainer)
    identity = preprocessing_identity(trainer.plans_manager, trainer.configuration_manager)
    folders = [Path(f"{trainer.preprocessed_dataset_folder}{suffix}") for suffix in ("", "_unlabeled")]
    for folder in folders:
        assert differing(str(folder), identity) == []
        refuse_foreign(str(folder), dataset=tiny.NAME)
    assert pool_identifiers(str(folders[1])) == ["tiny_100", "tiny_101", "tiny_102"]
    images, _ = trainer.get_tr_and_val_datasets()
    assert len(images.identifiers) == 6 and images.load_case(images.identifiers[-1])[0].shape[0] == 1


@pytest.mark.slow
def test_a_denoiser_is_transferred_and_a_training_resumed(world):
    started = tiny.trainer(DiffusionPretrainedTrainer, fold=1)
    started.on_train_start()
    report = json.loads(Path(started.output_folder, "transfer_report.json").read_text())
    assert report["source"].endswith("fold_all/denoiser.pth") and report["timestep"] == 50
    assert len(report["missing"]) == 4

    resumed = tiny.trainer(DiffusionPretrainedTrainer, resume=True)
    resumed.load_checkpoint(str(result(world, MODEL, 0, "checkpoint_latest.pth")))
    assert resumed.is_resumed and resumed.current_epoch == 1
    shutil.copytree(result(world, MODEL, 0), world / "kept")
    resumed.run_training()
    assert len(resumed.logger.get_value("train_losses", step=None)) == 2
    shutil.copytree(world / "kept", result(world, MODEL, 0), dirs_exist_ok=True)


@pytest.mark.slow
def test_a_model_predicts_and_is_exported(world, tmp_path):
    folder = result(world, MODEL, 0).parent
    with trainers_of(trainers_folder()):
        predictor = load_predictor(str(folder), ["0"], "checkpoint_final.pth")
    logits = predictor.predict_sliding_window_return_logits(torch.randn(1, 6, 20, 24))
    assert logits.shape == (4, 6, 20, 24) and torch.isfinite(logits).all()
    assert export_stock(str(folder), str(tmp_path / "stock"), None, "checkpoint_final.pth") == ["0"]


def test_trainers_have_the_names_that_they_had():
    """They are the names of results folders, and stand in checkpoints."""
    assert {cls.__name__ for cls in trainers.our_trainers()} >= {
        "ConfiguredTrainer", "DenoisingDiffusionTrainer", "DiffusionCoTrainingTrainer",
        "DiffusionCoTrainingTwinTrainer", "DiffusionPretrainedDecoderTrainer", "DiffusionPretrainedLinearTrainer",
        "DiffusionPretrainedTrainer", "DiffusionTeacherTrainer", "MutualDifferenceTrainer", "MutualSimilarityTrainer",
        "PartialLabelTrainer", "PseudoLabelTrainer",
    }  # fmt: skip
