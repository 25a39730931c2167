"""Teacher and student through nnU-Net's own training loop, on a tiny data set."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pictures import write_pictures
from skimage.io import imread, imsave
from torch import distributed

from nnunet_diffusion import installation
from nnunet_diffusion.cli import main
from nnunet_diffusion.co_training.teacher_file import load_teacher
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.export import export_stock
from nnunet_diffusion.model_folder import load_predictor, trainers_of
from nnunet_diffusion.optimization import ramp_up
from nnunet_diffusion.trainers.DenoisingDiffusionTrainer import DenoisingDiffusionTrainer
from nnunet_diffusion.trainers.DiffusionCoTrainingTrainer import DiffusionCoTrainingTrainer
from nnunet_diffusion.trainers.DiffusionCoTrainingTwinTrainer import DiffusionCoTrainingTwinTrainer
from nnunet_diffusion.trainers.DiffusionTeacherTrainer import DiffusionTeacherTrainer

pytestmark = pytest.mark.slow  # each trains in nnU-Net's own loop, which takes seconds
SHORT = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 2, "seed": 0}
CO_TRAINING = {**SHORT, "start": "scratch"}
TWIN, STUDENT, TEACHER = "DiffusionCoTrainingTwinTrainer", "DiffusionCoTrainingTrainer", "DiffusionTeacherTrainer"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The tiny data set, and a teacher of fold `all` for 2d."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            patch.setenv(name, str(tmp_path_factory.mktemp(name)))
        folder = tiny.prepare()
        content = json.loads((folder / f"{tiny.PLANS}.json").read_text())
        tiny.write_plans(content, DiffusionTeacherTrainer=SHORT, DiffusionCoTrainingTrainer=CO_TRAINING,
                         DiffusionCoTrainingTwinTrainer=CO_TRAINING)  # fmt: skip
        tiny.trainer(DiffusionTeacherTrainer, fold="all").run_training()
        yield folder


@pytest.fixture
def plans(world):
    """Writes a plan of the tiny data set with other settings and returns its name."""

    def write(name, change=lambda plans: plans, **block):
        content = json.loads((world / f"{tiny.PLANS}.json").read_text())
        settings = {STUDENT: CO_TRAINING, TWIN: CO_TRAINING, TEACHER: SHORT}
        settings = {trainer: {**base, **block.get(trainer, {})} for trainer, base in settings.items()}
        tiny.write_plans(change(content), name, **settings)
        return name

    return write


def copied(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def moved(before, network):
    return {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}


def log_of(trainer):
    return Path(trainer.log_file).read_text()


def teacher_path(fold="all", plans=tiny.PLANS):
    folder = Path(os.environ["nnUNet_results"]) / tiny.NAME / f"{TEACHER}__{plans}__2d"
    return folder / f"fold_{fold}" / "teacher.pth"


def test_masked_mr_volumes(monkeypatch, tmp_path):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    folder = tiny.prepare(modality="MR")
    content = json.loads((folder / f"{tiny.PLANS}.json").read_text())
    tiny.write_plans(content, DiffusionTeacherTrainer=SHORT, DiffusionCoTrainingTrainer=CO_TRAINING)
    for cls in (DiffusionTeacherTrainer, DiffusionCoTrainingTrainer):
        trainer = tiny.trainer(cls, "3d_fullres")
        assert trainer.configuration_manager.normalization_schemes == ["ZScoreNormalization"]
        assert trainer.configuration_manager.use_mask_for_norm == [True]
        trainer.run_training()
        assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    assert "The teacher starts from" in log_of(trainer)


# ---------------------------------------------------------------- the teacher, without labels


def test_teacher_learns_from_all_images_and_says_what_its_masks_are(world):
    content = load_teacher(teacher_path())
    assert content["training"]["images"] == 7 and content["training"]["held_out"] == 1
    assert content["process"]["schedule"] == "sigmoid" and len(content["training"]["held_out_loss"]) == 2
    assert "of 4 classes used" in content["training"]["health"]
    (log,) = teacher_path().parent.glob("training_log*")
    assert log.read_text().count("classes used, the largest for") == 2, "every epoch"
    assert (teacher_path().parent / "progress.png").exists()


@pytest.mark.parametrize(
    ("configuration", "kind", "norm"),
    [("3d_fullres", "PlainConvUNet", "InstanceNorm"), ("2d", "ResidualEncoderUNet", "BatchNorm")],
)
def test_teacher_and_student_train_on_every_topology(plans, configuration, kind, norm):
    name = plans(f"Topology{kind}", lambda p: tiny.shrunk(p, kind, norm))
    path = world_plan(name)
    teacher = tiny.trainer(DiffusionTeacherTrainer, configuration, plans=name)
    teacher.initialize()
    before = copied(teacher.network)
    teacher.run_training()
    assert {"mask_pathway", "image_pathway"} <= {key.split(".")[0] for key in moved(before, teacher.network)}
    teacher.perform_actual_validation()
    assert (Path(teacher.output_folder) / "samples.png").exists() and path.exists()
    for cls in (DiffusionCoTrainingTrainer, DiffusionCoTrainingTwinTrainer):
        student = tiny.trainer(cls, configuration, plans=name)
        student.run_training()
        assert "The teacher starts from" in log_of(student)
        assert np.isfinite(student.logger.get_value("train_losses", step=None)).all()


def world_plan(name):
    return Path(os.environ["nnUNet_preprocessed"]) / tiny.NAME / f"{name}.json"


def test_resumed_teacher_is_the_uninterrupted_one(plans):
    name = plans("TeacherResume", **{TEACHER: {"num_epochs": 3, "save_every": 1}})
    whole = tiny.trainer(DiffusionTeacherTrainer, plans=name)
    whole.run_training()
    resumed = resume(DiffusionTeacherTrainer, name, at=2)
    assert moved(copied(whole.ema), resumed.ema) == set()


def test_teacher_trains_in_a_distributed_process(world):
    trainer = tiny.trainer(DiffusionTeacherTrainer)
    trainer.initialize()
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    distributed.init_process_group("gloo", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(trainer.network)
        batch = {"data": torch.randn(2, 1, 16, 16), "target": torch.zeros(2, 1, 16, 16)}
        for _ in range(2):  # the second step fails when the first left parameters without gradient
            trainer.loss_on(parallel, batch, torch.tensor([3, 4]), torch.randn(2, 1, 16, 16)).backward()
    finally:
        distributed.destroy_process_group()


def resume(cls, plans, at):
    """Trains until an epoch, is interrupted, and goes on in a new trainer."""

    class Interrupted(cls):
        def on_epoch_start(self):
            if self.current_epoch == at:
                raise KeyboardInterrupt
            super().on_epoch_start()

    Interrupted.__name__ = cls.__name__
    with pytest.raises(KeyboardInterrupt):
        tiny.trainer(Interrupted, plans=plans).run_training()
    trainer = tiny.trainer(cls, plans=plans, resume=True)
    trainer.load_checkpoint(os.path.join(trainer.output_folder, "checkpoint_latest.pth"))
    assert trainer.current_epoch == at
    trainer.run_training()
    return trainer


# ---------------------------------------------------------------- student and teacher


@pytest.fixture(scope="module")
def co_trained(world):
    """A finished co-training of each student, with what student and teacher were at its start."""
    made = {}
    for cls in (DiffusionCoTrainingTrainer, DiffusionCoTrainingTwinTrainer):
        started = {}

        class Watched(cls):
            def on_train_epoch_start(self, started=started):
                super().on_train_epoch_start()
                started.setdefault("student", copied(self.network))
                started.setdefault("teacher", copied(self.teacher))

        Watched.__name__ = cls.__name__
        trainer = tiny.trainer(Watched)
        trainer.run_training()
        made[cls.__name__] = trainer, started
    return made


@pytest.mark.parametrize("name", [STUDENT, TWIN])
def test_teacher_starts_from_its_file_and_both_move(co_trained, name):
    trainer, started = co_trained[name]
    weights = load_teacher(teacher_path())["teacher_weights"]
    assert all(torch.equal(started["teacher"][f"network.{key}"], value) for key, value in weights.items())
    assert any(key.startswith("network.mask_pathway.") for key in moved(started["teacher"], trainer.teacher))
    assert any(key.startswith("network.image_pathway.") for key in moved(started["teacher"], trainer.teacher))
    assert moved(started["student"], trainer.network)
    log = log_of(trainer)
    assert f"The teacher starts from {teacher_path()}" in log and "of 4 classes used" in log
    assert log.count("Student and teacher agree on the pool") == 2 and "kept" in log
    assert trainer.pool_weight == ramp_up(1, 2, 1.0) == 0.5


@pytest.mark.parametrize("cls", [DiffusionCoTrainingTrainer, DiffusionCoTrainingTwinTrainer])
def test_same_seed_same_result_also_when_resumed(co_trained, plans, cls):
    trainer, _ = co_trained[cls.__name__]
    name = plans("Again", **{cls.__name__: {"save_every": 1}})
    again = resume(cls, name, at=1) if cls is DiffusionCoTrainingTrainer else tiny.trainer(cls, plans=name)
    if cls is DiffusionCoTrainingTwinTrainer:
        again.teacher_file = str(teacher_path())
        again.run_training()
        assert moved(copied(trainer.network), again.network) == set()
        return
    whole = tiny.trainer(cls, plans=plans("Whole"))
    whole.run_training()
    assert moved(copied(whole.network), again.network) == moved(copied(whole.teacher), again.teacher) == set()


def test_planned_student_is_exported_as_stock_and_predicts_without_the_teacher(co_trained, tmp_path):
    trainer, _ = co_trained[STUDENT]
    export_stock(trainer.output_folder_base, str(tmp_path / "stock"), ["0"], "checkpoint_final.pth")
    with trainers_of(""):
        plain = load_predictor(str(tmp_path / "stock"), [0], "checkpoint_final.pth")
    trainer.set_deep_supervision_enabled(False)
    patch = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        plain.network.load_state_dict(plain.list_of_parameters[0])
        assert torch.equal(plain.network.eval()(patch), trainer.network.eval()(patch))


def test_twin_is_not_stock_and_its_model_folder_repeats_its_prediction(co_trained, tmp_path):
    trainer, _ = co_trained[TWIN]
    with pytest.raises(UserError, match="DiffusionCoTrainingTwinTrainer cannot be exported as stock"):
        export_stock(trainer.output_folder_base, str(tmp_path / "stock"), ["0"], "checkpoint_final.pth")
    with trainers_of(installation.with_our_trainers([])):
        predictors = [load_predictor(trainer.output_folder_base, [0], "checkpoint_final.pth") for _ in range(2)]
    images = torch.randn(1, 5, 20, 24)
    logits = []
    for predictor in predictors:
        predictor.network.load_state_dict(predictor.list_of_parameters[0])
        logits.append(predictor.predict_sliding_window_return_logits(images))
    assert torch.equal(*logits)
    with torch.no_grad():
        patch = torch.randn(1, 1, 16, 16)
        assert torch.equal(predictors[0].network.eval()(patch), trainer.network.eval()(patch))


@pytest.mark.parametrize("method", ["supervised", "cross_pseudo"])
def test_baselines_train_in_the_same_code(plans, method):
    name = plans(f"Method{method}", **{STUDENT: {"method": method, "save_every": 1}})
    trainer = tiny.trainer(DiffusionCoTrainingTrainer, plans=name)
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()
    assert ("pool_loss" in log_of(trainer)) == (method != "supervised")
    assert ("the gate" in log_of(trainer)) == (method == "cross_pseudo")
    resumed = tiny.trainer(DiffusionCoTrainingTrainer, plans=name, resume=True)
    resumed.load_checkpoint(os.path.join(resumed.output_folder, "checkpoint_final.pth"))
    assert moved(copied(trainer.teacher), resumed.teacher) == set()


def test_supervised_is_the_pretrained_trainer_from_random_weights(plans):
    """Method supervised is DiffusionPretrainedTrainer from random weights, bit by bit: the control."""
    from nnunet_diffusion.trainers.DiffusionPretrainedTrainer import DiffusionPretrainedTrainer

    name = plans("Supervised", **{STUDENT: {"method": "supervised"}})
    content = json.loads(world_plan(name).read_text())
    content["nnunet_diffusion"]["DiffusionPretrainedTrainer"] = CO_TRAINING
    world_plan(name).write_text(json.dumps(content))
    ours, control = (tiny.trainer(cls, plans=name) for cls in (DiffusionCoTrainingTrainer, DiffusionPretrainedTrainer))
    ours.run_training(), control.run_training()
    assert moved(copied(control.network), ours.network) == set()


def test_gate_keeps_nothing_and_redraws_train(plans):
    settings = {"gate": 1.5, "rounds": 2, "chained": False, "ramp": 0.0}
    trainer = tiny.trainer(DiffusionCoTrainingTrainer, plans=plans("Redraws", **{STUDENT: settings}))
    trainer.run_training()
    assert "kept 0.0% of 4 images" in log_of(trainer) and trainer.pool_weight == 1


# ---------------------------------------------------------------- refused, or warned of


@pytest.fixture
def dataset_json(world):
    """Changes dataset.json for the length of a test."""
    path = world / "dataset.json"
    complete = path.read_text()
    yield lambda **tables: path.write_text(json.dumps({**json.loads(complete), **tables}))
    path.write_text(complete)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rounds": 0}, "DiffusionCoTrainingTrainer.rounds is 0: it must be at least 1"),
        ({"method": "magic"}, "DiffusionCoTrainingTrainer.method is 'magic': it must be co_training or"),
    ],
)
def test_settings_that_make_no_sense_are_refused(plans, settings, message):
    name = plans("Refused", **{STUDENT: settings})
    with pytest.raises(UserError, match=message):
        tiny.trainer(DiffusionCoTrainingTrainer, plans=name)


def test_twin_refuses_what_only_the_planned_student_can(plans):
    with pytest.raises(UserError, match="start is 'denoiser': it must be scratch, or the path"):
        tiny.trainer(DiffusionCoTrainingTwinTrainer, plans=plans("Twin", **{TWIN: {"start": "denoiser"}}))
    with pytest.raises(UserError, match="setting timestep is 1000: it must be 0 to 999"):
        tiny.trainer(DiffusionCoTrainingTwinTrainer, plans=plans("Twin", **{TWIN: {"timestep": 1000}})).initialize()


def test_regions_are_refused_by_name(world, dataset_json):
    dataset_json(labels={"background": 0, "balls": [1, 2], "left": 1, "box": 3}, regions_class_order=[1, 2, 3])
    for cls in (DiffusionTeacherTrainer, DiffusionCoTrainingTrainer):
        with pytest.raises(UserError, match="regions overlap"):
            tiny.trainer(cls)


def test_a_label_that_nobody_annotates_is_refused(world, dataset_json):
    dataset_json(annotated_labels={f"tiny_{i:03d}": ["left ball", "right ball"] for i in range(3)})
    with pytest.raises(UserError, match=r"no training case annotates \['box'\]"):
        tiny.trainer(DiffusionCoTrainingTrainer).initialize()


def test_partial_labels_train(world, dataset_json):
    dataset_json(annotated_labels={"tiny_000": ["box"], "tiny_001": ["left ball", "right ball"]})
    trainer = tiny.trainer(DiffusionCoTrainingTrainer)
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", step=None)).all()


def test_no_pool_and_a_pool_of_other_channels_are_refused(world, plans):
    name = plans("Pool")
    data = json.loads(world_plan(name).read_text())["configurations"]["2d"]["data_identifier"]
    pool = world / f"{data}_unlabeled"
    away = pool.with_name("away")
    pool.rename(away)
    try:
        with pytest.raises(UserError, match=r"there is no unlabeled image in .*plan_and_preprocess"):
            tiny.trainer(DiffusionCoTrainingTrainer, plans=name).on_train_start()
        shutil.copytree(away, pool)
        from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

        (pool / "tiny_101.b2nd").unlink()
        nnUNetDatasetBlosc2.save_case(np.zeros((3, 4, 8, 8), np.float32), np.zeros((1, 4, 8, 8), np.int16), {},
                                      str(pool / "tiny_101"))  # fmt: skip
        with pytest.raises(UserError, match=r"tiny_101.b2nd has 3 channel\(s\), the labeled images have 1"):
            tiny.trainer(DiffusionCoTrainingTrainer, plans=name).on_train_start()
    finally:
        shutil.rmtree(pool, ignore_errors=True)
        away.rename(pool)


def test_teacher_of_another_plan_is_refused_with_a_table(plans):
    def wider(plans):
        plans["configurations"]["2d"]["architecture"]["arch_kwargs"]["features_per_stage"] = [6, 6, 8]
        return plans

    name = plans("Wider", wider, **{STUDENT: {"teacher_file": str(teacher_path())}})
    with pytest.raises(UserError, match=r"the teacher was made for another topology(.|\n)*image_pathway"):
        tiny.trainer(DiffusionCoTrainingTrainer, plans=name).on_train_start()


def test_teacher_that_is_missing_or_none_is_named(plans, tmp_path):
    none = tmp_path / "teacher.pth"
    torch.save({"a": 1}, none)
    for path, error, message in (
        (none, UserError, "is no teacher of nnunet_diffusion: give a file that DiffusionTeacherTrainer wrote"),
        (tmp_path / "gone.pth", FileNotFoundError, "there is no teacher .*gone.pth"),
    ):
        name = plans("Given", **{STUDENT: {"teacher_file": str(path)}})
        with pytest.raises(error, match=message):
            tiny.trainer(DiffusionCoTrainingTrainer, plans=name).on_train_start()


def test_a_teacher_from_random_weights_is_warned_of(plans):
    trainer = tiny.trainer(DiffusionCoTrainingTrainer, plans=plans("Random"))
    trainer.on_train_start()
    log = log_of(trainer)
    assert "WARNING: the teacher starts from random weights" in log
    assert "nnUNetv2_train 990 2d all -tr DiffusionTeacherTrainer -p Random" in log


# ---------------------------------------------------------------- color pictures


def test_color_pictures_from_folder_to_prediction(nnunet_folders, tmp_path):
    """One PNG with three channels a case: convert, plan, preprocess, teacher, student, nnU-Net's own prediction."""
    write_pictures(tmp_path / "data", labeled=4, unlabeled=3, size=48)
    folders = [str(tmp_path / "data" / name) for name in ("images", "labels", "more")]
    names = ["-d", "502", "-n", "Pictures", "--labels", "gland", "--channel_names", "red", "green", "blue"]
    assert main(["convert", "folder", *folders[:2], "--unlabeled", folders[2], *names]) == 0
    odd = Path(folders[2], "glands_004.png")
    imsave(odd, np.dstack([imread(odd), np.full((48, 48), 255, np.uint8)]))  # with an alpha channel now
    assert main(["plan_and_preprocess", "-d", "502", "-pl", "CompactPlanner", "-np", "1"]) == 1, "one is skipped"
    base = nnunet_folders / "nnUNet_preprocessed" / "Dataset502_Pictures"
    assert sorted(p.name for p in (base / "nnUNetCompactPlans_2d_unlabeled").glob("*.b2nd")) == [
        "glands_005.b2nd", "glands_006.b2nd",
    ]  # fmt: skip
    plans = json.loads((base / "nnUNetCompactPlans.json").read_text())
    kwargs = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [4] * kwargs["n_stages"]
    plans["configurations"]["2d"]["batch_size"] = 2
    plans["nnunet_diffusion"] = {TEACHER: {**SHORT, "sample_every": 0}, STUDENT: CO_TRAINING}
    dataset_json = json.loads((base / "dataset.json").read_text())
    for cls in (DiffusionTeacherTrainer, DiffusionCoTrainingTrainer):
        trainer = cls({**plans, "continue_training": False}, "2d", "all", dataset_json, torch.device("cpu"))
        trainer.run_training()
    assert "The teacher starts from" in log_of(trainer) and "2 unlabeled images" in log_of(trainer)
    with trainers_of(installation.with_our_trainers([])):
        predictor = load_predictor(trainer.output_folder_base, ["all"], "checkpoint_final.pth")
    predictor.predict_from_files_sequential([[str(Path(folders[0], "glands_000.png"))]], [str(tmp_path / "mask")])
    assert imread(tmp_path / "mask.png").shape == (48, 48)


def test_both_networks_of_cross_pseudo_supervision_start_from_the_denoiser(plans, tmp_path):
    """A second network from random weights would be a handicap of the baseline; its heads are its own."""
    denoiser = tiny.trainer(DenoisingDiffusionTrainer, fold="all", plans=plans("Denoised"))
    denoiser.num_epochs = 1
    denoiser.run_training()
    path = Path(denoiser.output_folder) / "denoiser.pth"
    name = plans("FromDenoiser", **{STUDENT: {"method": "cross_pseudo", "start": str(path)}})
    trainer = tiny.trainer(DiffusionCoTrainingTrainer, plans=name)
    trainer.initialize()
    trainer.take_first_weights()
    first, second = trainer.network.state_dict(), trainer.teacher.network.state_dict()
    differ = {key for key in first if not torch.equal(first[key], second[key])}
    assert differ and all("seg_layers" in key and key.endswith("weight") for key in differ)


def test_a_teacher_that_is_there_can_be_declined(plans):
    name = plans("Fresh", **{STUDENT: {"teacher_file": "none"}})
    trainer = tiny.trainer(DiffusionCoTrainingTrainer, plans=name)
    trainer.initialize()
    before = copied(trainer.teacher)
    trainer.start_teacher()
    assert moved(before, trainer.teacher) == set()
    assert "random weights, as the setting teacher_file says" in log_of(trainer)
