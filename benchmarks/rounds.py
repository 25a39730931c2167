"""Benchmark of pseudo-label rounds: few annotated cases, the rest of an annotated data set as pool.

The contours of the pool are hidden from training, and score its pseudo labels. For each number of annotated cases and
seed:

  supervised  the first model, on the annotated cases alone
  gated       rounds as they are
  ungated     rounds with an open gate, from the same first model

Validation Dice is on fold 0's validation cases, which choose nothing here (the early stop is off). Dice of pseudo
labels is in the network's space: of all that was predicted, and of what the gate let through. With --by_hand, the
seconds of a round outside its training are compared with nnU-Net's own prediction of the same raw scans and
nnUNetv2_preprocess of what one would train on then, annotated cases and pseudo labels.
What is finished is kept, so the same command continues after a crash; seeds can run side by side into the same folder,
and one command with all of them then makes the table and the figure.

example, on a preprocessed, completely annotated data set with a pool and a splits_final.json:
  python benchmarks/rounds.py -d 501 -c 2d -p nnUNetCompactPlans --annotated 4 8 --seeds 0 1 2 -o results --device cpu
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import blosc2
import numpy as np
from report import rounded
from runs import VALIDATION_ITERATIONS, data_identifier
from train_and_test import describe_machine, link_cases

from nnunet_diffusion.cli import main as run_command
from nnunet_diffusion.commands import command_environment
from nnunet_diffusion.files import atomic, write_json
from nnunet_diffusion.marks import WORK
from nnunet_diffusion.preprocessing.cases import labeled_files
from nnunet_diffusion.rounds.prediction import load_prediction
from nnunet_diffusion.rounds.pseudo_labels import open_pseudo_label, pseudo_cases
from nnunet_diffusion.rounds.state import Round, load_state
from nnunet_diffusion.tables import Scores, deviation, figure, mean, mean_over_organs, organ_means, text_table

TRAINERS = ("DiffusionPretrainedTrainer", "PseudoLabelTrainer")
ARMS = {"gated": [], "ungated": ["is_open=true"]}


def prepare(args: argparse.Namespace, base: Path, work: Path, number: int, seed: int) -> list[str]:
    """Links a data set with few annotated cases into a folder of its own; returns those whose contours are hidden."""
    split = json.loads((base / "splits_final.json").read_text())[0]
    plans = json.loads((base / f"{args.p}.json").read_text())
    rng = np.random.default_rng(seed)
    train, validation = sorted(split["train"]), sorted(split["val"])[: args.validation]
    annotated = sorted(rng.choice(train, number, replace=False).tolist())
    hidden = [case for case in train if case not in annotated][: args.pool]
    target = work / "preprocessed" / base.name
    if target.exists():
        return hidden
    identifier = data_identifier(args, base)
    temporary = target.with_name("new")
    shutil.rmtree(temporary, ignore_errors=True)
    link_cases(base / identifier, temporary / identifier, annotated + validation, (".b2nd", "_seg.b2nd", ".pkl"))
    link_cases(base / identifier, temporary / f"{identifier}_unlabeled", hidden, (".b2nd", ".pkl"))
    shutil.copytree(base / f"{identifier}_unlabeled" / WORK, temporary / f"{identifier}_unlabeled" / WORK)
    dataset_json = json.loads((base / "dataset.json").read_text())
    ending = dataset_json["file_ending"]
    (temporary / "gt_segmentations").mkdir()
    for case in annotated + validation:
        (temporary / "gt_segmentations" / (case + ending)).symlink_to(base / "gt_segmentations" / (case + ending))
    write_json(temporary / "dataset.json", dataset_json)
    write_json(temporary / "splits_final.json", [{"train": annotated, "val": validation}])
    shutil.copyfile(base / "dataset_fingerprint.json", temporary / "dataset_fingerprint.json")
    block = plans.setdefault("nnunet_diffusion", {})
    for trainer in TRAINERS:
        given = {"num_epochs": args.num_epochs, "num_iterations_per_epoch": args.num_iterations_per_epoch}
        given["num_val_iterations_per_epoch"] = VALIDATION_ITERATIONS
        start = {"start": str(Path(args.denoiser).resolve())} if args.denoiser else {"start": "scratch"}
        block[trainer] = {**block.get(trainer, {}), **given, **start, "seed": seed}
    for arm in ARMS:
        write_json(temporary / f"{arm}.json", {**plans, "plans_name": arm})
    temporary.rename(target)
    return hidden


def run_arm(args: argparse.Namespace, dataset: str, work: Path, arm: str) -> tuple[list[Round], dict[str, float]]:
    """Runs the rounds of one arm; returns its rounds, and the seconds of its steps."""
    results = work / "results" / dataset
    arguments = ["rounds", "-d", dataset, "-c", args.c, "-f", "0", "-p", arm, "--rounds", str(args.rounds)]
    arguments += ["-device", args.device, "--tolerance", "1", "--start", "denoiser" if args.denoiser else "scratch"]
    arguments += ["--disable_tta"] if args.disable_tta else []
    if arm == "ungated":
        arguments += ["--from", str(results / f"{TRAINERS[0]}__gated__{args.c}")]
    if gate := [*ARMS[arm], *args.gate]:
        arguments += ["--gate", *gate]
    if run_command(arguments) != 0:
        raise RuntimeError(f"{arm}: rounds failed in {work}")
    state = load_state(str(next(work.glob(f"preprocessed/*/*_pseudo/{arm}__*/state.json"))))
    return state.rounds, {title: step["seconds"] for title, step in state.steps.items()}


def dice(labels: np.ndarray, true: np.ndarray, values: list[int], is_counted: np.ndarray) -> list[float | None]:
    """Computes the Dice of each value over the voxels that count; None where neither has it."""
    scores = []
    for value in values:
        a, b = (labels == value) & is_counted, (true == value) & is_counted
        total = a.sum() + b.sum()
        scores.append(float(2 * (a & b).sum() / total) if total else None)
    return scores


def score_pseudo_labels(base: Path, work: Path, arm: str, number: int, hidden: list[str]) -> dict:
    """Computes the mean Dice of a round's predictions of the hidden cases, of all and of what the gate let through."""
    folder = next(work.glob(f"preprocessed/*/*_pseudo/{arm}__*/round_{number}"))
    identifier = folder.parent.parent.name.removesuffix("_pseudo")
    labels = json.loads((base / "dataset.json").read_text())["labels"]
    names = {name: value for name, value in labels.items() if value and name != "ignore"}
    everything, kept, ignored = {}, {}, []
    let_through = set(pseudo_cases(str(folder)))
    for case in hidden:
        true = blosc2.open(str(base / identifier / f"{case}_seg.b2nd"))[:][0]
        if not (folder / "predicted" / f"{case}.b2nd").exists():
            continue  # dropped in a round before
        predicted = load_prediction(str(folder / "predicted"), case).labels
        scores = dice(predicted, true, list(names.values()), np.ones(true.shape, bool))
        everything[case] = dict(zip(names, scores, strict=True))
        if case in let_through:
            label = open_pseudo_label(str(folder), case)
            segmentation = label.segmentation[:][0]
            is_counted = segmentation <= max(names.values())
            ignored.append(1 - is_counted.mean())
            scores = dice(segmentation, true, list(names.values()), is_counted)
            kept[case] = {n: s if n in label.annotation.labels else None for n, s in zip(names, scores, strict=True)}
    return {
        "predicted": summary(everything),
        "kept": summary(kept),
        "kept_cases": len(let_through),
        "of": len(hidden),
        "ignored": rounded(mean(ignored)),
    }


def summary(scores: Scores) -> dict[str, float | None]:
    """Computes the mean of each organ, and the mean of those."""
    means = organ_means(scores) | {"mean": mean_over_organs(scores)}
    return {name: rounded(value) for name, value in means.items()}


def by_hand(args: argparse.Namespace, raw: Path, work: Path, hidden: list[str]) -> dict[str, float]:
    """Seconds of what a person does: predict the raw scans, make a data set with the annotated ones, preprocess it."""
    ours = os.environ | command_environment(None, args.device)
    ours.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)  # set by the rounds in this process
    hand = {f"nnUNet_{kind}": str(work / "hand" / kind) for kind in ("raw", "preprocessed")}
    description = json.loads((raw / "dataset.json").read_text())
    files = labeled_files(str(raw), description)
    ending, inputs, outputs = description["file_ending"], work / "hand" / "images", work / "hand" / "labels"
    shutil.rmtree(work / "hand", ignore_errors=True)
    inputs.mkdir(parents=True)
    for case in hidden:
        for channel, image in enumerate(files[case]["images"]):
            (inputs / f"{case}_{channel:04d}{ending}").symlink_to(Path(image).resolve())
    model = work / "results" / raw.name / f"{TRAINERS[0]}__gated__{args.c}"
    start = time.time()
    command = ["nnUNetv2_predict_from_modelfolder", "-i", inputs, "-o", outputs, "-m", model, "-f", "0"]
    command += ["-device", args.device, *(["--disable_tta"] if args.disable_tta else [])]
    subprocess.run(command, check=True, env=ours, stdout=subprocess.DEVNULL)
    predicted = time.time()
    annotated = json.loads((work / "preprocessed" / raw.name / "splits_final.json").read_text())[0]["train"]
    labels = {case: files[case]["label"] for case in annotated} | {case: outputs / (case + ending) for case in hidden}
    table = {
        case: {"images": [os.path.abspath(i) for i in files[case]["images"]], "label": os.path.abspath(label)}
        for case, label in labels.items()
    }
    for folder in ("raw", "preprocessed"):
        (work / "hand" / folder / raw.name).mkdir(parents=True)
    description = {**description, "dataset": table, "numTraining": len(table), "unlabeled": {}}
    for folder in ("raw", "preprocessed"):
        write_json(work / "hand" / folder / raw.name / "dataset.json", description)
    source = work / "preprocessed" / raw.name
    for name in ("gated.json", "dataset_fingerprint.json"):
        shutil.copyfile(source / name, work / "hand" / "preprocessed" / raw.name / name)
    command = ["nnUNetv2_preprocess", "-d", str(int(raw.name[7:10])), "-plans_name", "gated", "-c", args.c]
    command += ["-np", str(args.processes)]
    subprocess.run(command, check=True, env=ours | hand, stdout=subprocess.DEVNULL)
    return {"predict": predicted - start, "preprocess": time.time() - predicted}


def run(args: argparse.Namespace, base: Path, raw: Path, number: int, seed: int) -> dict:
    """Runs all arms of one number of annotated cases and seed."""
    work = (Path(args.o) / f"{number}_annotated_seed_{seed}").resolve()
    protocol = {key: value for key, value in vars(args).items() if key not in ("o", "annotated", "seeds")}
    if (work / "result.json").is_file():
        result = json.loads((work / "result.json").read_text())
        if result["protocol"] != protocol:
            raise RuntimeError(f"{work} was made with other arguments: remove it, or choose another folder with -o")
        return result
    hidden = prepare(args, base, work, number, seed)
    (work / "results").mkdir(exist_ok=True)
    os.environ |= {"nnUNet_preprocessed": str(work / "preprocessed"), "nnUNet_results": str(work / "results")}
    result = {"annotated": number, "seed": seed, "pool": len(hidden), "protocol": protocol}
    result["machine"] = describe_machine(args.device)
    for arm in ARMS:
        rounds, seconds = run_arm(args, base.name, work, arm)
        result[arm] = [describe_round(base, work, arm, entry, seconds, hidden) for entry in rounds]
    if args.by_hand:
        ours = result["gated"][1]["seconds"]
        hand = by_hand(args, raw, work, hidden)
        result["seconds_outside_training"] = {
            "rounds": ours["predict"] + ours["gate"],
            "by_hand": sum(hand.values()),
            "by_hand_parts": hand,
        }
    write_json(work / "result.json", result)
    return result


def describe_round(base: Path, work: Path, arm: str, entry: Round, seconds: dict, hidden: list[str]) -> dict:
    """Says what a round cost, and how good its model and its pseudo labels are."""
    title = f"round {entry.number}: "
    kinds = {"predict": "predicting", "gate": "filtering", "train": "training"}
    described = {
        "round": entry.number,
        "validation_dice": entry.validation_dice,
        "seconds": {kind: seconds[title + step] for kind, step in kinds.items() if title + step in seconds},
    }
    if entry.number:
        described["pseudo_labels"] = score_pseudo_labels(base, work, arm, entry.number, hidden)
    return described


def write_figure(results: list[dict], path: Path) -> None:
    """Draws Dice over the rounds, mean and spread and a dot a seed: of validation cases, and of the pool's labels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    def draw(axes, curves: list[list[float | None]], arm: str, kind: str = "", first: int = 0) -> None:
        values = np.ma.masked_invalid(np.array(curves, float))
        rounds = np.arange(first, first + values.shape[1])
        spread = values.std(0, ddof=1) if len(values) > 1 else None
        style, color = "s--" if kind == "kept" else "o-", f"C{list(ARMS).index(arm)}"
        axes.errorbar(rounds, values.mean(0), spread, fmt=style, capsize=3, color=color, label=f"{arm} {kind}".strip())
        for seed in values:
            axes.plot(rounds, seed, ".", color=color, alpha=0.4)
        axes.set_xticks(range(first + values.shape[1]))

    numbers = sorted({result["annotated"] for result in results})
    figure, grid = plt.subplots(2, len(numbers), figsize=(4.5 * len(numbers), 7), squeeze=False, layout="constrained",
                                sharex=True, sharey="row")  # fmt: skip
    for column, number in enumerate(numbers):
        runs = [result for result in results if result["annotated"] == number]
        for arm in ARMS:
            draw(grid[0, column], [[entry["validation_dice"] for entry in run[arm]] for run in runs], arm)
            for kind in ("predicted", "kept") if arm == "gated" else ("predicted",):
                means = [[entry["pseudo_labels"][kind]["mean"] for entry in run[arm][1:]] for run in runs]
                draw(grid[1, column], means, arm, kind, 1)
        grid[0, column].set(title=f"{number} annotated, {runs[0]['pool']} in the pool")
        grid[1, column].set(xlabel="round (0: annotated cases alone)")
    grid[0, 0].set(ylabel="Dice of the held-out cases")
    grid[1, 0].set(ylabel="Dice of pseudo labels")
    for axes in grid.flat:
        axes.grid(axis="y", alpha=0.3)
    for row in grid:
        row[-1].legend(fontsize="small")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def table(results: list[dict]) -> str:
    """Writes validation Dice by arm and round, mean and standard deviation over the seeds."""
    lines = []
    for number in sorted({r["annotated"] for r in results}):
        for arm, index in product(ARMS, range(len(results[0]["gated"]))):
            rounds = [r[arm][index] for r in results if r["annotated"] == number and len(r[arm]) > index]
            values = [r["validation_dice"] for r in rounds]
            pool = [r["pseudo_labels"] for r in rounds if "pseudo_labels" in r]
            cells = [figure(mean(p[kind]["mean"] for p in pool)) for kind in ("predicted", "kept")]
            cells.append(figure(mean(p["kept_cases"] for p in pool), digits=1))
            name, dice = arm if index else "supervised", figure(mean(values), deviation(values))
            lines.append([number, name, index, dice, *cells])
    heads = ("annotated", "arm", "round", "validation Dice", "pool predicted", "pool kept", "kept cases")
    return text_table(dict(zip(heads, zip(*lines, strict=True), strict=True)), has_footer=False)


def main() -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, type=int, help="data set id")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans name (default: %(default)s)")
    parser.add_argument("-o", required=True, help="output folder")
    parser.add_argument("--annotated", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool", type=int, help="scans of the pool (default: all)")
    parser.add_argument("--validation", type=int, help="validation cases (default: all of fold 0)")
    parser.add_argument("--denoiser", help="denoiser.pth to start from (default: random weights)")
    parser.add_argument("--gate", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--disable_tta", action="store_true", help="predict the pool without mirroring")
    parser.add_argument("--num_epochs", type=int, default=60)
    parser.add_argument("--num_iterations_per_epoch", type=int, default=50)
    parser.add_argument("--by_hand", action="store_true", help="time a round by hand as well")
    parser.add_argument("--processes", type=int, default=1, help="of nnUNetv2_preprocess (default: %(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    base, raw = (
        next(Path(os.environ[root]).glob(f"Dataset{args.d:03d}_*")) for root in ("nnUNet_preprocessed", "nnUNet_raw")
    )
    results = []
    for number, seed in product(args.annotated, args.seeds):
        results.append(run(args, base.resolve(), raw.resolve(), number, seed))
        print(table(results), flush=True)
    write_json(Path(args.o) / "rounds.json", results)
    write_figure(results, Path(args.o) / "rounds.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
