"""What ours costs against stock nnU-Net, as ratios measured in one run: A B A B, medians, the same machine.

Batches are loaded before the clock starts, so a step is computation alone. Predictions mirror over the same axes.

example, on a CPU:
  python benchmarks/speed.py -d 501 -c 2d -p nnUNetCompactPlans --device cpu
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path

import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from train_and_test import describe_machine

from nnunet_diffusion.files import write_json
from nnunet_diffusion.marks import WORK
from nnunet_diffusion.preprocessing.cases import UNLABELED_FILES, labeled_files
from nnunet_diffusion.preprocessing.preprocess import preprocess_case

STOCK, FINE_TUNING, PRE_TRAINING = "nnUNetTrainer", "DiffusionPretrainedTrainer", "DenoisingDiffusionTrainer"
WITH_POOL = {
    "mean teacher step": ("MeanTeacherTrainer", {"supervised_share": 0.0, "least_dice": 0.0}),
    "cross pseudo step": ("DiffusionCoTrainingTrainer", {"method": "cross_pseudo"}),
    "co-training step": ("DiffusionCoTrainingTrainer", {}),
    "co-training step, 3 rounds": ("DiffusionCoTrainingTrainer", {"rounds": 3}),
}


def load(dataset: str, plans: str, trainer: str = FINE_TUNING, settings: dict | None = None) -> tuple[dict, dict]:
    """Loads the plans, with fine-tuning from random weights (which costs the same), and dataset.json.

    Args:
        dataset: DatasetXXX_Name.
        plans: Their name.
        trainer: Its name.
        settings: Of it.
    """
    folder = Path(str(nnUNet_preprocessed), dataset)
    content = json.loads((folder / f"{plans}.json").read_text())
    content.setdefault("nnunet_diffusion", {}).setdefault(FINE_TUNING, {})["start"] = "scratch"
    if settings is not None:
        content["nnunet_diffusion"][trainer] = {"start": "scratch", **settings}
    return content, json.loads((folder / "dataset.json").read_text())


def start_trainer(name: str, args: argparse.Namespace, settings: dict | None = None):
    """Returns a trainer in the middle of its first epoch."""
    plans, dataset_json = load(args.dataset, args.p, name, settings)
    trainer = recursive_find_trainer_class_by_name(name)(
        plans={**plans, "continue_training": False},
        configuration=args.c,
        fold="all",
        dataset_json=dataset_json,
        device=torch.device(args.device),
    )
    trainer.on_train_start()
    trainer.on_epoch_start()
    trainer.on_train_epoch_start()
    return trainer


def stepper(trainer) -> Callable[[], None]:
    """Returns a function that trains one step on a batch that is already loaded."""
    batches = cycle([next(trainer.dataloader_train) for _ in range(4)])
    if getattr(trainer, "pool_loader", None):
        trainer.pool_loader = cycle([next(trainer.pool_loader) for _ in range(4)])
    return lambda: trainer.train_step(next(batches))


def predictor(trainer, axes: tuple[int, ...]) -> Callable[[], None]:
    """Returns a function that predicts one preprocessed case with the trainer's network, mirroring over `axes`."""
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    predict = nnUNetPredictor(
        device=trainer.device, allow_tqdm=False, perform_everything_on_device=trainer.device.type == "cuda"
    )
    predict.manual_initialization(
        trainer.network,
        trainer.plans_manager,
        trainer.configuration_manager,
        None,
        trainer.dataset_json,
        type(trainer).__name__,
        axes,
    )
    dataset = trainer.dataset_class(trainer.preprocessed_dataset_folder)
    data = torch.from_numpy(dataset.load_case(dataset.identifiers[0])[0][:])
    return lambda: predict.predict_sliding_window_return_logits(data)


def preprocessors(args: argparse.Namespace, folder: Path) -> tuple[Callable[[], None], Callable[[], None]]:
    """Functions that preprocess the next labeled case: as a scan of the pool, and as nnU-Net does."""
    plans, dataset_json = load(args.dataset, args.p)
    manager = PlansManager(plans)
    configuration = manager.get_configuration(args.c)
    files = labeled_files(str(Path(str(nnUNet_raw), args.dataset)), dataset_json)
    cases = list(islice(files.items(), args.cases))
    (folder / WORK).mkdir(parents=True)
    as_pool, as_stock = cycle(cases), enumerate(cycle(cases))  # nnU-Net's writer does not overwrite

    def pool() -> None:
        case, paths = next(as_pool)
        for ending in UNLABELED_FILES:  # what is there already would not be made again
            (folder / f"{case}{ending}").unlink(missing_ok=True)
        plan = (manager, configuration, dataset_json)
        problem = preprocess_case(case, paths["images"], None, str(folder), UNLABELED_FILES, plan)
        if problem:
            raise ValueError(problem)

    def stock() -> None:
        number, (_, paths) = next(as_stock)
        output = str(folder / f"stock{number}")
        DefaultPreprocessor(verbose=False).run_case_save(
            output, paths["images"], paths["label"], manager, configuration, dataset_json
        )

    return pool, stock


def interleave(ours: Callable, stock: Callable, rounds: int, device: str, warm_up: int = 1) -> dict:
    """Times two functions in turn; returns the medians in seconds, and median and quartiles of the pairs' ratios."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = {"ours": [], "stock": []}
    for number in range(warm_up + rounds):
        for name, function in (("ours", ours), ("stock", stock)):
            wait()
            start = time.perf_counter()
            function()
            wait()
            if number >= warm_up:
                times[name].append(time.perf_counter() - start)
    medians = {f"{name}_seconds": statistics.median(values) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["ours"], times["stock"], strict=True)]  # a busy moment slows both of a pair
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    return {**medians, "ratio": quartiles[1], "ratio_quartiles": [quartiles[0], quartiles[2]], "rounds": rounds}


def training(args: argparse.Namespace, name: str, settings: dict | None = None) -> Callable[[], None]:
    """Returns a trainer's step."""
    return stepper(start_trainer(name, args, settings))


def prediction(args: argparse.Namespace, name: str) -> Callable[[], None]:
    """Returns a trainer's prediction of a case."""
    trainer = start_trainer(name, args)
    return predictor(trainer, trainer.inference_allowed_mirroring_axes)


def preprocessing(args: argparse.Namespace, folder: str, which: int) -> Callable[[], None]:
    """Returns one of `preprocessors`."""
    return preprocessors(args, Path(folder))[which]


def peak_memory(args: argparse.Namespace, what: str, prepare: Callable, *arguments) -> dict[str, float | str]:
    """Measures peak MiB of doing a few times what `prepare(args, *arguments)` returns, in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:  # may have workers of its own
        return process.submit(_peak_memory, args, what, prepare, *arguments).result()


def _peak_memory(args, what, prepare, *arguments) -> dict[str, float | str]:
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB on Linux
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    work = prepare(args, *arguments)
    for _ in range(5):
        work()
    if args.device == "cuda":
        return {"what": what, "peak_mib": torch.cuda.max_memory_allocated() / 2**20}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"what": what, "peak_mib": peak, "of_which_imports_mib": before}


def measure_pool(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Steps with a pool against stock steps, which have one batch where these have two: rows of ratios, of memory."""
    memory = [peak_memory(args, "stock step", training, STOCK)]
    memory += [peak_memory(args, what, training, *trainer) for what, trainer in WITH_POOL.items()]
    stock, rows = stepper(start_trainer(STOCK, args)), []
    for title, (name, settings) in WITH_POOL.items():
        ours = stepper(start_trainer(name, args, settings))
        rows.append({"what": title, "goal": "", **interleave(ours, stock, args.rounds, args.device, warm_up=3)})
    return rows, memory


def measure(args: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Measures all: rows of ratios, rows of memory."""
    names = {"stock": STOCK, "fine-tuning": FINE_TUNING, "pre-training": PRE_TRAINING}
    # first: a child's peak counts its parent's size at the fork
    memory = [peak_memory(args, f"{title} step", training, name) for title, name in names.items()]
    memory += [peak_memory(args, f"prediction, {name}", prediction, name) for name in (STOCK, FINE_TUNING)]
    for which, title in enumerate(("pool", "stock")):
        with tempfile.TemporaryDirectory() as folder:
            memory.append(peak_memory(args, f"preprocessing, {title}", preprocessing, folder, which))
    stock, tuned, denoiser = (start_trainer(name, args) for name in (STOCK, FINE_TUNING, PRE_TRAINING))
    timed = partial(interleave, device=args.device)
    steps = partial(timed, stock=stepper(stock), rounds=args.rounds, warm_up=5)
    rows = [
        {"what": "fine-tuning step", "goal": 1.02, **steps(stepper(tuned))},
        {"what": "pre-training step", "goal": 1.15, **steps(stepper(denoiser))},
    ]
    axes, own = (trainer.inference_allowed_mirroring_axes for trainer in (stock, tuned))
    for what, ours in (("prediction of a case", axes), ("prediction of a case, mirrored as trained", own)):
        times = timed(predictor(tuned, ours), predictor(stock, axes), max(3, args.rounds // 5))
        rows.append({"what": what, "goal": 1.0, **times})
    with tempfile.TemporaryDirectory() as folder:
        pool, nnunet = preprocessors(args, Path(folder, "pool"))
        rows.append(
            {
                "what": "preprocessing of a pool scan",
                "goal": 1.05,
                **timed(pool, nnunet, 2 * args.cases, warm_up=args.cases),
            }
        )
    return rows, memory


def tabulate(rows: list[dict], memory: list[dict]) -> str:
    """Writes the measurements as Markdown."""
    lines = ["| what | ours, s | stock, s | ratio | goal |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['what']} | {r['ours_seconds']:.4f} | {r['stock_seconds']:.4f} | {r['ratio']:.3f} | {r['goal']} |"
        for r in rows
    ]
    lines += ["", "| what | peak memory, MiB | of which imports |", "|---|---|---|"]
    return "\n".join(
        lines + [f"| {m['what']} | {m['peak_mib']:.0f} | {m.get('of_which_imports_mib', 0):.0f} |" for m in memory]
    )


def main() -> None:
    """Measures, prints a table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, type=int, help="data set id")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans name (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=30, help="timed pairs of steps (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=5, help="scans to preprocess (default: %(default)s)")
    parser.add_argument("--pool", action="store_true", help="the steps of trainers that learn from the pool instead")
    parser.add_argument("-o", default="speed.json", help="JSON to write (default: %(default)s)")
    args = parser.parse_args()
    plug_in = find_spec("nnunet_diffusion.trainers").submodule_search_locations[0]
    os.environ.setdefault("nnUNet_extTrainer", plug_in)
    args.dataset = maybe_convert_to_dataset_name(args.d)
    with tempfile.TemporaryDirectory() as results:
        os.environ["nnUNet_results"] = results
        rows, memory = (measure_pool if args.pool else measure)(args)
    write_json(
        args.o,
        {
            "dataset": args.dataset,
            "configuration": args.c,
            "plans": args.p,
            "ratios": rows,
            "memory": memory,
            "machine": describe_machine(args.device),
        },
    )
    print(tabulate(rows, memory))


if __name__ == "__main__":
    main()
