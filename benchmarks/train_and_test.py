"""One run of a benchmark: trains one arm on some of the labels, tests it, writes one JSON.

Started by the benchmarks that train, with the path of a job description; nnU-Net's folders point to the
run's own work folder.
"""

import json
import os
import pickle
import platform
import random
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor, comp_blosc2_params
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from regimes import keep_slices

from nnunet_diffusion.files import write_json
from nnunet_diffusion.preprocessing.cases import labeled_files


def link_cases(source: Path, target: Path, cases: list[str], endings: tuple[str, ...]) -> None:
    """Links the preprocessed files of some cases into another folder."""
    target.mkdir(parents=True, exist_ok=True)
    for case in cases:
        for ending in endings:
            if not (source / (case + ending)).exists():
                raise FileNotFoundError(f"{source / (case + ending)} is missing: preprocess the data set again")
            (target / (case + ending)).symlink_to(source / (case + ending))


def axial_axis(image: sitk.Image) -> int:
    """Returns the array axis (reversed against SimpleITK's own order) that runs along the patient."""
    direction = np.abs(np.array(image.GetDirection()).reshape(3, 3))
    return 2 - int(direction[2].argmax())


def label_slices(job: dict, plans: PlansManager, dataset_json: dict, target: Path) -> dict[str, list[int]]:
    """Preprocesses the label of every training case with only its few slices annotated; the images stay what they were.

    Returns:
        case -> indices of the annotated slices in the raw label file.
    """
    configuration = plans.get_configuration(job["configuration"])
    raw_json = json.loads(Path(job["raw"], "dataset.json").read_text())
    raw = labeled_files(job["raw"], raw_json)
    chosen = {}
    for case, number in job["cases"].items():
        label = sitk.ReadImage(raw[case]["label"])
        array, chosen[case] = keep_slices(
            sitk.GetArrayFromImage(label),
            axial_axis(label),
            number,
            dataset_json["labels"]["ignore"],
            f"{job['seed']} {case}",
        )
        masked = sitk.GetImageFromArray(array)
        masked.CopyInformation(label)
        file = str(target.parent / f"{case}{dataset_json['file_ending']}")
        sitk.WriteImage(masked, file)
        _, seg, properties = DefaultPreprocessor(verbose=False).run_case(
            raw[case]["images"], file, plans, configuration, dataset_json
        )
        seg = seg.astype(np.int16)
        blocks, chunks = comp_blosc2_params(seg.shape, tuple(configuration.patch_size), seg.itemsize)
        nnUNetDatasetBlosc2.save_seg(seg, str(target / f"{case}_seg"), chunks, blocks)
        (target / f"{case}.pkl").write_bytes(pickle.dumps(properties))
    return chosen


def erase_labels(job: dict, dataset_json: dict, source: Path, target: Path) -> None:
    """Saves the training cases' segmentations with only the kept labels, in nnU-Net's own preprocessed format."""
    dataset = nnUNetDatasetBlosc2(str(source), list(job["cases"]))
    for case, names in job["kept_labels"].items():
        values = {dataset_json["labels"][name] for name in names}
        _, seg, _, properties = dataset.load_case(case)
        seg = seg[:]
        seg[~np.isin(seg, [*values, -1, 0, dataset_json["labels"].get("ignore", 0)])] = 0
        locations = {label: found for label, found in properties["class_locations"].items() if label in values}
        blocks, chunks = comp_blosc2_params(seg.shape, job["patch_size"], seg.itemsize)
        nnUNetDatasetBlosc2.save_seg(seg, str(target / f"{case}_seg"), chunks, blocks)
        (target / f"{case}.pkl").write_bytes(pickle.dumps({**properties, "class_locations": locations}))


def prepare(job: dict) -> dict[str, list[int]]:
    """Lays out the run's own nnUNet_preprocessed folder; returns the annotated slices, if the budget is in slices."""
    source = Path(job["preprocessed"])
    base = Path(os.environ["nnUNet_preprocessed"], source.name)
    base.mkdir(parents=True)
    plans = json.loads((source / f"{job['plans']}.json").read_text())
    dataset_json = json.loads((source / "dataset.json").read_text())
    block = plans.setdefault("nnunet_diffusion", {})
    if job["trainer"] != "nnUNetTrainer":
        block[job["trainer"]] = {**block.get(job["trainer"], {}), "seed": -1, **job["settings"]}  # seeded here
    for key in ("annotated_labels", "union_labels"):  # a case that is not in the folder is an error there
        dataset_json[key] = {case: names for case, names in dataset_json.get(key, {}).items() if case in job["cases"]}
    manager = PlansManager(plans)
    data = manager.get_configuration(job["configuration"]).data_identifier
    whole = (".b2nd", "_seg.b2nd", ".pkl")
    in_slices, in_part = any(job["cases"].values()), "kept_labels" in job
    link_cases(source / data, base / data, list(job["cases"]), whole[:1] if in_slices or in_part else whole)
    for folder, cases in job.get("pool", {}).items():
        link_cases(source / folder, base / f"{data}_unlabeled", cases, (".b2nd", ".pkl"))
    if in_part:
        job["patch_size"] = tuple(manager.get_configuration(job["configuration"]).patch_size)
        erase_labels(job, dataset_json, source / data, base / data)
        dataset_json["annotated_labels"] = job["kept_labels"] if job["is_told"] else {}
    if in_slices:
        dataset_json["labels"].setdefault("ignore", int(max(manager.get_label_manager(dataset_json).all_labels)) + 1)
    write_json(base / f"{job['plans']}.json", plans)
    write_json(base / "dataset.json", dataset_json)
    cases = sorted(job["cases"])  # the test cases are not even in the folder
    write_json(base / "splits_final.json", [{"train": cases, "val": cases}])
    (base / "dataset_fingerprint.json").symlink_to(source / "dataset_fingerprint.json")
    return label_slices(job, manager, dataset_json, base / data) if in_slices else {}


def seed_everything(seed: int) -> None:
    """Seeds every generator that nnU-Net draws from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build_trainer(job: dict):
    """Builds the arm's trainer through nnU-Net's API; its batches depend on the seed alone, not on the arm."""
    seed_everything(job["seed"])
    trainer = get_trainer_from_args(
        Path(job["preprocessed"]).name,
        job["configuration"],
        0,
        job["trainer"],
        job["plans"],
        device=torch.device(job["device"]),
    )
    if job["trainer"] == "nnUNetTrainer":
        for name, value in job["settings"].items():
            if not hasattr(trainer, name):
                raise ValueError(f"nnUNetTrainer has no setting {name!r}")
            setattr(trainer, name, value)
    trainer.disable_checkpointing = True  # the final weights are tested in memory; nothing is selected
    start = trainer.on_train_start

    def on_train_start() -> None:
        start()
        seed_everything(job["seed"])  # the arms drew different numbers while they built their networks

    trainer.on_train_start = on_train_start
    return trainer


def test(trainer, job: dict) -> dict[str, dict[str, float | None]]:
    """Predicts and scores the test cases as nnU-Net's validation does, with the weights as they are, in this process.

    Returns:
        case -> organ -> Dice; None where neither mask has the organ.
    """
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    plans, configuration, dataset_json = trainer.plans_manager, trainer.configuration_manager, trainer.dataset_json
    predictor = nnUNetPredictor(
        device=trainer.device, allow_tqdm=False, perform_everything_on_device=trainer.device.type == "cuda"
    )
    predictor.manual_initialization(
        trainer.network,
        plans,
        configuration,
        None,
        dataset_json,
        job["trainer"],
        trainer.inference_allowed_mirroring_axes,
    )
    source, ending = Path(job["preprocessed"]), dataset_json["file_ending"]
    dataset = trainer.dataset_class(str(source / configuration.data_identifier), list(job["test_cases"]))
    organs = {
        tuple(v) if isinstance(v, list) else v: n for n, v in dataset_json["labels"].items() if v != 0 and n != "ignore"
    }
    dice = {}
    for case in dataset.identifiers:
        data, _, _, properties = dataset.load_case(case)
        logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(data[:])).cpu()
        prediction = os.path.join(trainer.output_folder, case)
        export_prediction_from_logits(logits, properties, configuration, plans, dataset_json, prediction)
        reference = str(source / "gt_segmentations" / (case + ending))
        scores = compute_metrics(
            reference,
            prediction + ending,
            plans.image_reader_writer_class(),
            list(organs),
            trainer.label_manager.ignore_label,
        )
        values = {organs[label]: float(score["Dice"]) for label, score in scores["metrics"].items()}
        dice[case] = {organ: None if np.isnan(value) else value for organ, value in values.items()}
    return dice


def describe_machine(device: str) -> dict[str, str]:
    """Versions and device, for the record."""
    versions = {name: version(name) for name in ("nnunet_diffusion", "nnunetv2", "torch", "numpy")}
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU"
    return {"python": platform.python_version(), **versions, "device": name, "threads": str(torch.get_num_threads())}


def run(job: dict) -> None:
    """Prepares, trains, tests, and writes the run's JSON."""
    times = [time.time()]
    slices = prepare(job)
    times.append(time.time())
    trainer = build_trainer(job)
    trainer.run_training()
    times.append(time.time())
    dice = test(trainer, job)
    times.append(time.time())
    seconds = dict(zip(("prepare", "train", "test"), np.diff(times).round(1).tolist(), strict=True))
    write_json(
        job["result"],
        {
            **{key: job[key] for key in ("arm", "budget", "seed", "trainer", "protocol", "test_cases")},
            "training_cases": sorted(job["cases"]),
            "slices": slices,
            "dice": dice,
            "seconds": seconds,
            "machine": describe_machine(job["device"]),
        },
    )


def end_with_parent() -> None:
    """Ends this process when the benchmark that started it is killed, so that a second start finds nobody at work."""
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=end_with_parent, daemon=True).start()
    run(json.loads(Path(sys.argv[1]).read_text()))
