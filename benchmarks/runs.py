"""What the benchmarks that train have in common: arguments, held-out patients, runs side by side, tables."""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from regimes import group_by_patient, hold_out
from report import summarize

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import write_json

VALIDATION_ITERATIONS = 2  # nothing is selected on them


def argument_parser(description: str, num_epochs: int = 100) -> argparse.ArgumentParser:
    """Declares the arguments that all of them take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, type=int, help="data set id")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans name (default: %(default)s)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--test_cases",
        help="how many patients to hold out, or a file with one case a line "
        "(default: as before, else fold 0's validation cases, else a fifth)",
    )
    parser.add_argument("--set_aside", help="file with one case a line: neither trained nor tested on, nor in a pool")
    parser.add_argument("--split_seed", type=int, default=0, help="draws the test patients (default: %(default)s)")
    parser.add_argument("--patients", help="JSON with case -> patient (default: every case is a patient)")
    parser.add_argument("--num_epochs", type=int, default=num_epochs, help="(default: %(default)s)")
    parser.add_argument("--num_iterations_per_epoch", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with 2 or more each has one thread")
    parser.add_argument("--device", choices=("cuda", "cpu", "mps"), default="cuda")
    parser.add_argument("-o", help="output folder (default: in nnUNet_results)")
    return parser


def output_folder(args: argparse.Namespace, base: Path, name: str) -> Path:
    """Returns the folder of a benchmark's results, which is created."""
    default = Path(os.environ.get("nnUNet_results", "."), base.name, f"{name}__{args.p}__{args.c}")
    out = Path(args.o or default).resolve()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    return out


def read_value(text: str):
    """Reads a setting's value as JSON, or as plain text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def dataset_folder(args: argparse.Namespace, root: str) -> Path:
    """Returns the folder of the data set below one of nnU-Net's three folders."""
    if root not in os.environ:
        raise UserError(f"{root} is not set: set nnU-Net's three folders first")
    found = sorted(Path(os.environ[root]).glob(f"Dataset{int(args.d):03d}_*"))
    if not found:
        raise UserError(f"{os.environ[root]} has no data set with id {args.d}: plan and preprocess it first")
    return found[0]


def data_identifier(args: argparse.Namespace, base: Path) -> str:
    """Returns the name of the folder with the configuration's preprocessed cases."""
    file = base / f"{args.p}.json"
    if not file.is_file():
        raise UserError(f"there is no {file}: plan the data set first, or correct -p")
    plans = PlansManager(str(file))
    if args.c not in (known := plans.available_configurations):
        raise UserError(f"{file} has no configuration {args.c!r}: choose from {', '.join(known)}")
    return plans.get_configuration(args.c).data_identifier


def preprocessed_cases(args: argparse.Namespace, base: Path) -> list[str]:
    """Returns the cases that are preprocessed for the configuration."""
    folder = base / data_identifier(args, base)
    cases = sorted(f.name.removesuffix("_seg.b2nd") for f in folder.glob("*_seg.b2nd"))
    if not cases:
        raise UserError(f"{folder} has no preprocessed cases: run nnUNetv2_preprocess first")
    return cases


def choose_test_cases(args: argparse.Namespace, patients: dict[str, list[str]], stored: Path, split: Path) -> list[str]:
    """Chooses the held-out cases: given, kept by an earlier start, fold 0's validation cases, or drawn; keeps them."""
    cases = {case for group in patients.values() for case in group}
    wanted = args.test_cases or str(max(1, len(patients) // 5))
    if Path(wanted).is_file():
        test = sorted(Path(wanted).read_text().split())
    elif not args.test_cases and stored.is_file():
        test = json.loads(stored.read_text())
    elif not args.test_cases and split.is_file():
        test = sorted(json.loads(split.read_text())[0]["val"])
    elif wanted.isdigit():
        test = hold_out(patients, int(wanted), args.split_seed)
    else:
        raise UserError(f"--test_cases {wanted}: neither a number nor a file with one case a line")
    if set(test) - cases:
        raise UserError(f"the test cases {sorted(set(test) - cases)[:5]} are not among the preprocessed cases")
    if stored.is_file() and json.loads(stored.read_text()) != test:
        raise UserError(f"{stored} holds another test set: leave out --test_cases, or choose another folder with -o")
    write_json(stored, test)
    return test


def split_patients(args: argparse.Namespace, base: Path, out: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the test cases, and the patients that are left to train on with their cases."""
    patient_of = json.loads(Path(args.patients).read_text()) if args.patients else None
    patients = group_by_patient(preprocessed_cases(args, base), patient_of)
    test = choose_test_cases(args, patients, out / "test_cases.json", base / "splits_final.json")
    away = set(test) | set(Path(args.set_aside).read_text().split() if args.set_aside else ())
    return test, {patient: cases for patient, cases in patients.items() if not set(cases) & away}


def is_finished(job: dict) -> bool:
    """Returns whether the run's JSON is there.

    Raises:
        UserError: If it was made in another way than this command asks for.
    """
    if not Path(job["result"]).is_file():
        return False
    done = json.loads(Path(job["result"]).read_text())
    wanted = job["protocol"], sorted(job["cases"]), job["test_cases"]
    if (done["protocol"], done["training_cases"], done["test_cases"]) != wanted:
        raise UserError(
            f"{job['result']} was made with other settings, cases or another denoiser: delete it, or "
            "choose another folder with -o"
        )
    return True


def train_and_test(job: dict, out: Path, threads: int | None) -> bool:
    """Runs one job in a process and a work folder of its own; returns whether it succeeded."""
    work, log = out / "work" / job["name"], out / "logs" / f"{job['name']}.log"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    log.parent.mkdir(exist_ok=True)
    write_json(work / "job.json", job)
    plug_in = importlib.util.find_spec("nnunet_diffusion.trainers").submodule_search_locations[0]
    defaults = {"nnUNet_extTrainer": plug_in, "nnUNet_compile": "f"}
    if job["device"] == "cpu":
        defaults |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1"}
    folders = {f"nnUNet_{kind}": str(work / kind) for kind in ("preprocessed", "results")}
    limits = {f"{library}_NUM_THREADS": str(threads) for library in ("OMP", "MKL")} if threads else {}
    environment = defaults | os.environ | folders | limits
    script = Path(__file__).with_name(job.get("script", "train_and_test.py"))
    command = [sys.executable, str(script), str(work / "job.json")]
    with open(log, "w") as stream:
        code = subprocess.run(command, env=environment, stdout=stream, stderr=subprocess.STDOUT).returncode
    if code == 0:
        shutil.rmtree(work)
    return code == 0


def run_all(jobs: list[dict], out: Path, workers: int) -> list[dict]:
    """Runs what is not finished, `workers` at a time; returns the jobs that failed."""
    todo, failed = [job for job in jobs if not is_finished(job)], []
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are there, {len(todo)} to do", flush=True)
    pool = ThreadPoolExecutor(workers)
    running = {pool.submit(train_and_test, job, out, 1 if workers > 1 else None): job for job in todo}
    try:
        for number, future in enumerate(as_completed(running), 1):
            if not future.result():
                failed.append(running[future])
            print(
                f"[{number}/{len(todo)}] {running[future]['name']}: {'done' if future.result() else 'FAILED'}",
                flush=True,
            )
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def results_of(jobs: list[dict], failed: list[dict]) -> list[dict]:
    """Returns the results of the runs that did not fail."""
    return [json.loads(Path(job["result"]).read_text()) for job in jobs if job not in failed]


def run_and_report(jobs: list[dict], out: Path, workers: int, name: str, control: str, draw: Callable) -> int:
    """Runs what is not finished, prints and writes table, JSON and figure; returns 1 if a run failed.

    Args:
        jobs: What to run.
        out: Folder of the results.
        workers: Runs at a time.
        name: Of the JSON and the figure.
        control: The arm that the others are paired with.
        draw: Takes the summary and the figure's path.
    """
    failed = run_all(jobs, out, workers)
    if runs := results_of(jobs, failed):
        table, summary = summarize(runs, control)
        write_json(out / f"{name}.json", summary)
        draw(summary, out / f"{name}.png")
        print(f"{table}\n{out / name}.json, {out / name}.png")
    return tell_failed(failed, out)


def tell_failed(failed: list[dict], out: Path) -> int:
    """Names the runs that failed; returns the exit code."""
    for job in failed:
        print(f"FAILED {job['name']}: see {out / 'logs' / job['name']}.log", file=sys.stderr)
    return 1 if failed else 0


def run_as_command(main: Callable[[], int]) -> None:
    """Ends the process with what `main` returns, or with the message of an error that the user can mend."""
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        print(f"{Path(sys.argv[0]).stem}: error: {error}", file=sys.stderr)
        sys.exit(1)
