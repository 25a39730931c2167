"""Time and memory of the pool and of a round by the number of scans, here and on Dask workers of this machine.

Commands run one after the other in this process, and work in it, or to predict in one beside it. Small scans, and the
planned network, made narrow, with random weights in a real model folder: what is measured is what is done for each scan
beside the work on its voxels, and whether any of it grows faster than the number of scans.

example, on two cores:
  python benchmarks/scale.py FOLDER --scans 200 2000 20000 --dask_scans 200 2000 -o benchmarks/results/scale.json
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import SimpleITK as sitk
import torch

NAME, ID, CONFIGURATION, PLANS, SMALL = "Dataset970_Scale", 970, "3d_fullres", "nnUNetCompactPlans", "Small"
SHAPE = (8, 16, 16)  # voxels along z, y, x
LABELED = 4
GATE = ["is_open=true"]  # of random weights nothing else would be kept


def write_raw(raw: Path, scans: int, shape: tuple[int, ...] = SHAPE, classes: int = 1) -> None:
    """Writes boxes in noise for each scan, one of each class behind the other; a few scans are labeled."""
    labels, images = raw / "labelsTr", raw / "images"
    for folder in (labels, images):
        folder.mkdir(parents=True)
    rng, seg = np.random.default_rng(0), np.zeros(shape, np.uint8)
    depth, margins = shape[0] // (2 * classes), [extent // 4 for extent in shape]
    for label in range(1, classes + 1):
        start = margins[0] + (label - 1) * depth
        seg[start : start + depth, margins[1] : -margins[1], margins[2] : -margins[2]] = label
    names = [f"scan_{number:05d}" for number in range(LABELED + scans)]
    for number, name in enumerate(names):
        image = (rng.normal(0, 20, shape) + 100 * (seg > 0)).astype(np.float32)
        sitk.WriteImage(sitk.GetImageFromArray(image), str(images / f"{name}.nii.gz"))
        if number < LABELED:
            sitk.WriteImage(sitk.GetImageFromArray(seg), str(labels / f"{name}.nii.gz"))
    files = {name: [f"images/{name}.nii.gz"] for name in names}
    names_of = {"background": 0, **{f"box {label}": label for label in range(1, classes + 1)}}
    content = {"channel_names": {"0": "CT"}, "labels": names_of, "file_ending": ".nii.gz"}
    content["numTraining"] = LABELED
    content["dataset"] = {n: {"images": files[n], "label": f"labelsTr/{n}.nii.gz"} for n in names[:LABELED]}
    content["unlabeled"] = {n: {"images": files[n]} for n in names[LABELED:]}
    (raw / "dataset.json").write_text(json.dumps(content))


def measured(command: list[str], log: Path, processes: list[int] = ()) -> dict[str, float]:
    """Runs a command of ours in this process, so that no import is measured.

    Returns:
        Seconds; seconds of computation, of this process, of those that it started and of `processes`; this process's
        largest memory; what this process wrote.

    Raises:
        RuntimeError: If it fails, with the end of its log.
    """
    from nnunet_diffusion.cli import main

    Path("/proc/self/clear_refs").write_text("5")  # the largest memory so far is forgotten
    before, start = (computed(processes), written()), time.monotonic()
    with open(log, "a") as f, redirect_stdout(f), redirect_stderr(f):
        code = main(command)
    if code:
        raise RuntimeError(f"{command}: exit code {code}\n{log.read_text()[-3000:]}")
    peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return {
        "seconds": round(time.monotonic() - start, 2),
        "computed_s": round(computed(processes) - before[0], 2),
        "memory_mb": round(int(peak) / 1000, 1),
        "written_mb": round((written() - before[1]) / 1e6, 2),
    }


def computed(processes: list[int]) -> float:
    """Returns the seconds of computation of this process, of those that it started and that ended, and of others."""
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ticks = [Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13] for process in processes]
    others = sum(int(tick) for pair in ticks for tick in pair) / os.sysconf("SC_CLK_TCK")
    return others + sum(usage.ru_utime + usage.ru_stime for usage in own)


def written() -> int:
    """Returns the bytes that this process wrote, to files and to others."""
    return int(Path("/proc/self/io").read_text().split("wchar:")[1].split()[0])


def make_model(preprocessed: Path) -> str:
    """Leaves the planned network, made narrow, with random weights in a model folder; returns that folder."""
    from nnunet_diffusion.trainers import our_trainer

    plans = json.loads((preprocessed / f"{PLANS}.json").read_text()) | {"plans_name": SMALL}
    kwargs = plans["configurations"][CONFIGURATION]["architecture"]["arch_kwargs"]
    kwargs["features_per_stage"] = [4] * len(kwargs["features_per_stage"])
    (preprocessed / f"{SMALL}.json").write_text(json.dumps(plans))
    dataset = json.loads((preprocessed / "dataset.json").read_text())
    content = {**plans, "continue_training": False}
    trainer = our_trainer("PartialLabelTrainer")(content, CONFIGURATION, "all", dataset, torch.device("cpu"))
    trainer.initialize()
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    for name, value in (("plans", trainer.plans_manager.plans), ("dataset", dataset)):
        Path(trainer.output_folder_base, f"{name}.json").write_text(json.dumps(value))
    return trainer.output_folder_base


class Cluster:
    """A Dask scheduler and workers of this machine, as a user starts them."""

    def __init__(self, folder: Path, workers: int, environment: dict[str, str]):
        self.file, self.processes = folder / "scheduler.json", []
        self.file.unlink(missing_ok=True)
        self.log = open(folder / "dask.log", "a")
        self.start(environment, "scheduler", "--port", "0")
        while not self.file.exists():
            time.sleep(0.1)
        for _ in range(workers):
            self.start(environment, "worker", "--nthreads", "1", "--no-nanny")

    def start(self, environment: dict[str, str], kind: str, *options: str) -> None:
        """Starts one of them."""
        command = [sys.executable, "-m", "dask", kind, "--scheduler-file", str(self.file), "--no-dashboard", *options]
        self.processes.append(subprocess.Popen(command, env=environment, stdout=self.log, stderr=self.log))

    def end(self) -> None:
        """Ends all of them."""
        for process in self.processes:
            process.kill()
            process.wait()


def set_up(folder: Path, scans: int, *how) -> Path:
    """Writes a data set of so many scans below a folder; returns where it is preprocessed."""
    home = folder / "data"
    shutil.rmtree(home, ignore_errors=True)
    os.environ.update({f"nnUNet_{kind}": str(home / kind) for kind in ("raw", "preprocessed", "results")})
    write_raw(home / "raw" / NAME, scans, *how)
    return home / "preprocessed" / NAME


def run(folder: Path, scans: int, where: list[str], processes: list[int] = ()) -> dict[str, dict[str, float]]:
    """Measures each command on so many scans; `where` says where cases are worked on."""
    preprocessed, log = set_up(folder, scans), folder / "log.txt"
    plan = ["plan_and_preprocess", "-d", str(ID), "-c", CONFIGURATION, "-pl", "CompactPlanner", *where]
    found = {"measure, plan, labeled cases": measured([*plan, "--no_pool"], log, processes)}
    found["pool"] = measured(plan, log, processes)
    found["preprocess again, nothing to do"] = measured(plan, log, processes)
    found["preprocess --status"] = measured([*plan, "--status", "--json"], log, processes)
    with open(log, "a") as f, redirect_stdout(f):
        model = make_model(preprocessed)
    rounds = ["rounds", "-d", str(ID), "-c", CONFIGURATION, "-f", "all", "-p", SMALL, "-device", "cpu", *where]
    rounds += ["--from", model, "--start", "scratch", "--rounds", "1", "--disable_tta", "--gate", *GATE]
    told = {"train": "check the model, fix the round's cases", "predict": "predict", "gate": "filter and report"}
    for stage, name in told.items():
        found[name] = measured([*rounds, "--stop_after", stage], log, processes)
    found["rounds --status"] = measured([*rounds, "--status", "--json"], log, processes)
    state, report = (next(folder.rglob(name)) for name in ("state.json", "report.json"))
    decisions = json.loads(report.read_text())["decisions"]
    assert decisions["keep"] == scans, decisions
    found["files"] = {"state_mb": round(state.stat().st_size / 1e6, 2), "most_in_a_folder": most_in_a_folder(folder)}
    shutil.rmtree(folder / "data")
    return found


def overlap(folder: Path, classes: int = 14, shape: tuple[int, ...] = (96, 128, 128), scans: int = 8) -> dict:
    """Measures what it brings that the host works on scans while the network takes the next.

    The network is one of another device, emulated: it takes as long as the host needs for a scan, and nothing of the
    host; its output is that of random weights for a first scan.

    Returns:
        The seconds a scan with one scan in a worker's hands and with as many as rounds give it, twice each, in turn.
    """
    from nnunet_diffusion.preprocessing.case_files import read_preprocessed
    from nnunet_diffusion.rounds.loop import Rounds, predict_name
    from nnunet_diffusion.rounds.places import Request
    from nnunet_diffusion.rounds.teacher import AT_ONCE, Model, loaded

    preprocessed, home = set_up(folder, scans, shape, classes), folder / "data"
    plan = ["plan_and_preprocess", "-d", str(ID), "-c", CONFIGURATION, "-pl", "CompactPlanner", "-np", "1"]
    measured(plan, folder / "log.txt")
    model = Model(make_model(preprocessed), ("all",), "random", "cpu", mirroring=False)
    cases = Rounds(Request(NAME, CONFIGURATION, "all", SMALL, model=model.folder, start="scratch", device="cpu")).cases
    predictor, pause_s = loaded(model).predictor, 0.0
    image = torch.from_numpy(read_preprocessed(cases.case(cases.pool[0]).image))
    with torch.inference_mode():
        logits = predictor.predict_sliding_window_return_logits(image)

    def wait(_: torch.Tensor) -> torch.Tensor:
        time.sleep(pause_s)
        return logits.clone()

    def seconds_a_scan(hands: int) -> float:
        start, target = time.monotonic(), tempfile.mkdtemp(dir=home)
        with ThreadPoolExecutor(hands) as pool:
            list(pool.map(lambda case: predict_name(model, cases, target, "", case), cases.pool))
        return round((time.monotonic() - start) / len(cases.pool), 2)

    predictor.predict_sliding_window_return_logits = wait
    pause_s = host_s = seconds_a_scan(1)
    found = {"host alone": host_s}
    for hands in (1, AT_ONCE) * 2:
        found.setdefault(f"{hands} in hands", []).append(seconds_a_scan(hands))
    shutil.rmtree(home)
    return {"classes": classes, "shape": shape, "scans": scans, "seconds_a_scan": found}


def most_in_a_folder(root: Path) -> int:
    """Counts the files of the fullest folder that the commands made."""
    return max(len(files) for where, _, files in os.walk(root) if "raw" not in Path(where).parts)


def main() -> None:
    """Measures all sizes, and writes what was found after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for data and logs: is created")
    parser.add_argument("--scans", type=int, nargs="*", default=[200, 2000], help="numbers of scans, here")
    parser.add_argument("--dask_scans", type=int, nargs="*", default=[], help="numbers of scans, on Dask workers")
    parser.add_argument("--workers", type=int, default=4, help="of Dask; default: 4")
    parser.add_argument("--overlap", action="store_true", help="measure the host's work beside the network's, too")
    parser.add_argument("-o", dest="output", type=Path, required=True, help="JSON file")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    from train_and_test import describe_machine

    found = json.loads(args.output.read_text()) if args.output.exists() else {"here": {}, "dask": {}}
    found["machine"] = {**describe_machine("cpu"), "cores": len(os.sched_getaffinity(0))}
    found["workers"] = args.workers
    if args.overlap:
        found["overlap"] = overlap(args.folder)
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    for scans in args.scans:
        found["here"][str(scans)] = run(args.folder, scans, ["-np", "1"])
        args.output.write_text(json.dumps(found, indent=2) + "\n")
    if args.dask_scans:
        cluster = Cluster(args.folder, args.workers, dict(os.environ))
        where, processes = ["-np", "1", "--scheduler", str(cluster.file)], [p.pid for p in cluster.processes]
        try:
            for scans in args.dask_scans:
                found["dask"][str(scans)] = run(args.folder, scans, where, processes)
                args.output.write_text(json.dumps(found, indent=2) + "\n")
        finally:
            cluster.end()


if __name__ == "__main__":
    main()
