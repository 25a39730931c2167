"""Few-label benchmark: stock nnU-Net, ours from scratch and the diffusion-pretrained strategies on the same few labels.

Patients are split before anything else: the test patients choose nothing (the final weights are tested), and a default
denoiser has not seen their images either. Every arm gets the same plan, training budget, labels and seeds. One JSON a
run; finished runs are skipped, so the same command continues after a crash.

example, from a preprocessed data set:
  python benchmarks/label_efficiency.py -d 501 -c 2d -p nnUNetCompactPlans --test_cases 20 --make_split
  nnUNetv2_train 501 2d 0 -tr DenoisingDiffusionTrainer -p nnUNetCompactPlans
  python benchmarks/label_efficiency.py -d 501 -c 2d -p nnUNetCompactPlans --budgets 2 8 10% 4slices --jobs 2
An arm takes settings of its own after commas: --arms scratch full full,timestep=150 decoder,scratch=true
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import product
from pathlib import Path

from regimes import draw, group_by_patient, hold_out
from report import summarize, write_figure

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import write_json

ARMS = {
    "stock": ("nnUNetTrainer", {}),
    "scratch": ("DiffusionPretrainedTrainer", {"scratch": True}),
    "full": ("DiffusionPretrainedTrainer", {}),
    "decoder": ("DiffusionPretrainedDecoderTrainer", {}),
    "linear": ("DiffusionPretrainedLinearTrainer", {}),
}
CONTROL = "scratch"  # the arm that the others are paired with
VALIDATION_ITERATIONS = 2  # nothing is selected on them


def read_value(text: str):
    """Reads a setting's value as JSON, or as plain text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def read_arm(text: str, settings: list[str], arms: dict[str, tuple[str, dict]] = ARMS) -> tuple[str, dict]:
    """Reads `full,timestep=150` and adds the `TRAINER.key=value` settings: the trainer's name and its settings.

    Raises:
        UserError: If there is no such arm, or a setting is not written as above.
    """
    name, *own = text.split(",")
    if name not in arms:
        raise UserError(f"there is no arm {name!r}: choose from {', '.join(arms)}")
    trainer, fixed = arms[name]
    pairs = [s.removeprefix(f"{trainer}.") for s in settings if s.startswith(f"{trainer}.")] + own
    if not all("=" in pair for pair in pairs):
        raise UserError(f"the settings {pairs} of arm {text!r} must be written as key=value")
    return trainer, fixed | {key: read_value(value) for key, value in (pair.split("=", 1) for pair in pairs)}


def dataset_folder(args: argparse.Namespace, root: str) -> Path:
    """The folder of the data set below one of nnU-Net's three folders."""
    if root not in os.environ:
        raise UserError(f"{root} is not set: set nnU-Net's three folders first")
    found = sorted(Path(os.environ[root]).glob(f"Dataset{int(args.d):03d}_*"))
    if not found:
        raise UserError(f"{os.environ[root]} has no data set with id {args.d}: plan and preprocess it first")
    return found[0]


def preprocessed_cases(args: argparse.Namespace, base: Path) -> list[str]:
    """The cases that are preprocessed for the configuration."""
    file = base / f"{args.p}.json"
    if not file.is_file():
        raise UserError(f"there is no {file}: plan the data set first, or correct -p")
    configurations = json.loads(file.read_text())["configurations"]
    if "data_identifier" not in configurations.get(args.c, {}):
        raise UserError(f"{file} has no configuration {args.c!r}: choose from {', '.join(configurations)}")
    folder = base / configurations[args.c]["data_identifier"]
    cases = sorted(f.name.removesuffix("_seg.b2nd") for f in folder.glob("*_seg.b2nd"))
    if not cases:
        raise UserError(f"{folder} has no preprocessed cases: run nnUNetv2_preprocess first")
    return cases


def choose_test_cases(args: argparse.Namespace, patients: dict[str, list[str]], stored: Path, split: Path) -> list[str]:
    """The held-out cases: given, stored by an earlier start, fold 0's validation cases, or drawn; then stored."""
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


def write_split(base: Path, train: list[str], test: list[str]) -> None:
    """Writes fold 0 so that pre-training on it does not see the test patients."""
    file, split = base / "splits_final.json", [{"train": train, "val": test}]
    if file.is_file() and json.loads(file.read_text()) != split:
        raise UserError(f"{file} holds another split: move it away first")
    write_json(file, split)


def find_pretrained(args: argparse.Namespace, base: Path, test: list[str], trainer: str, result: str) -> Path:
    """The result of a pre-training, given with --denoiser or --teacher, or fold 0's, which has not seen the test cases.

    Raises:
        UserError: If there is none, or fold 0 was trained on test cases.
    """
    kind = result.removesuffix(".pth")
    if given := getattr(args, kind):
        if not Path(given).is_file():
            raise UserError(f"--{kind} {given}: there is no such file")
        return Path(given).resolve()
    model = f"{trainer}__{args.p}__{args.c}"
    file = Path(os.environ.get("nnUNet_results", "."), base.name, model, "fold_0", result)
    split = base / "splits_final.json"
    if not file.is_file():
        raise UserError(f"there is no {file}: run label_efficiency.py with --make_split, then nnUNetv2_train {args.d} "
                        f"{args.c} 0 -tr {trainer} -p {args.p}, or name one with --{kind}")
    if not split.is_file() or set(test) - set(json.loads(split.read_text())[0]["val"]):
        raise UserError(f"fold 0 of {split} trains on test cases of this benchmark, so {file} may have seen them: "
                        "pre-train on the split that --make_split writes")
    return file


def split_patients(args: argparse.Namespace, base: Path, out: Path) -> tuple[list[str], dict[str, list[str]]]:
    """The test cases, and the patients that are left to train on with their cases."""
    patient_of = json.loads(Path(args.patients).read_text()) if args.patients else None
    patients = group_by_patient(preprocessed_cases(args, base), patient_of)
    test = choose_test_cases(args, patients, out / "test_cases.json", base / "splits_final.json")
    return test, {patient: cases for patient, cases in patients.items() if not set(cases) & set(test)}


def describe_arm(args: argparse.Namespace, arm: str, base: Path, test: list[str]) -> dict:
    """What all runs of an arm have in common; its `protocol` decides whether an earlier result may be kept."""
    trainer, settings = read_arm(arm, args.setting)
    settings = {
        "num_epochs": args.num_epochs,
        "num_iterations_per_epoch": args.num_iterations_per_epoch,
        "num_val_iterations_per_epoch": VALIDATION_ITERATIONS,
        **settings,
    }
    protocol = {"dataset": base.name, "configuration": args.c, "plans": args.p, "settings": dict(settings)}
    if trainer != "nnUNetTrainer" and not settings.get("scratch"):
        settings["denoiser"] = str(find_pretrained(args, base, test, "DenoisingDiffusionTrainer", "denoiser.pth"))
        protocol["denoiser_sha256"] = hashlib.sha256(Path(settings["denoiser"]).read_bytes()).hexdigest()
    return {"arm": arm, "trainer": trainer, "settings": settings, "protocol": protocol, "test_cases": test,
            "preprocessed": str(base), "configuration": args.c, "plans": args.p, "device": args.device}


def describe_runs(args: argparse.Namespace, base: Path, out: Path) -> list[dict]:
    """One job description per arm, budget and seed, seeds outermost: an interrupted benchmark has whole seeds."""
    test, rest = split_patients(args, base, out)
    unused = [s for s in args.setting if s.split(".")[0] not in {read_arm(arm, [])[0] for arm in args.arms}]
    if unused:
        raise UserError(f"--setting {' '.join(unused)} belongs to no trainer of the chosen arms")
    arms = [describe_arm(args, arm, base, test) for arm in args.arms]
    raw = {budget: str(dataset_folder(args, "nnUNet_raw")) for budget in args.budgets if budget.endswith("slices")}
    jobs = []
    for seed, budget, arm in product(args.seeds, args.budgets, arms):
        name = f"{budget.replace('%', 'percent')}_{arm['arm']}_seed{seed}"
        jobs.append({**arm, "name": name, "budget": budget, "seed": seed, "cases": draw(budget, rest, seed),
                     "raw": raw.get(budget), "result": str(out / "runs" / f"{name}.json")})
    return jobs


def is_finished(job: dict) -> bool:
    """Whether the run's JSON is there.

    Raises:
        UserError: If it was made in another way than this command asks for.
    """
    if not Path(job["result"]).is_file():
        return False
    done = json.loads(Path(job["result"]).read_text())
    wanted = job["protocol"], sorted(job["cases"]), job["test_cases"]
    if (done["protocol"], done["training_cases"], done["test_cases"]) != wanted:
        raise UserError(f"{job['result']} was made with other settings, cases or another denoiser: delete it, or "
                        "choose another folder with -o")
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
            print(f"[{number}/{len(todo)}] {running[future]['name']}: {'done' if future.result() else 'FAILED'}",
                  flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", required=True, type=int, help="data set id")
    parser.add_argument("-c", required=True, help="configuration")
    parser.add_argument("-p", default="nnUNetPlans", help="plans name (default: %(default)s)")
    parser.add_argument("--budgets", nargs="+", default=["2", "8"], help="label budgets: 8, 10%% or 4slices")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--setting", nargs="+", default=[], metavar="TRAINER.KEY=VALUE",
                        help="for every arm of that trainer")
    parser.add_argument("--test_cases", help="how many patients to hold out, or a file with one case a line "
                        "(default: as before, else fold 0's validation cases, else a fifth)")
    parser.add_argument("--split_seed", type=int, default=0, help="draws the test patients (default: %(default)s)")
    parser.add_argument("--patients", help="JSON with case -> patient (default: every case is a patient)")
    parser.add_argument("--make_split", action="store_true", help="only hold out the test patients, and write fold 0")
    parser.add_argument("--denoiser", help="denoiser.pth of the pretrained arms (default: fold 0 of this data set)")
    parser.add_argument("--num_epochs", type=int, default=100)
    parser.add_argument("--num_iterations_per_epoch", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; with 2 or more each has one thread")
    parser.add_argument("--device", choices=("cuda", "cpu", "mps"), default="cuda")
    parser.add_argument("-o", help="output folder (default: in nnUNet_results)")
    return parser.parse_args()


def main() -> int:
    """Runs the benchmark; returns 1 if a run failed."""
    args = parse_arguments()
    base = dataset_folder(args, "nnUNet_preprocessed")
    default = Path(os.environ.get("nnUNet_results", "."), base.name, f"label_efficiency__{args.p}__{args.c}")
    out = Path(args.o or default).resolve()
    (out / "runs").mkdir(parents=True, exist_ok=True)
    if args.make_split:
        test, rest = split_patients(args, base, out)
        write_split(base, sorted(case for cases in rest.values() for case in cases), test)
        print(f"the test patients are the validation cases of fold 0 now; next:\n"
              f"nnUNetv2_train {args.d} {args.c} 0 -tr DenoisingDiffusionTrainer -p {args.p}")
        return 0
    jobs = describe_runs(args, base, out)
    failed = run_all(jobs, out, args.jobs)
    runs = [json.loads(Path(job["result"]).read_text()) for job in jobs if job not in failed]
    if runs:
        table, summary = summarize(runs, CONTROL)
        write_json(out / "label_efficiency.json", summary)
        write_figure(summary, out / "label_efficiency.png")
        print(f"{table}\n{out / 'label_efficiency.json'}, {out / 'label_efficiency.png'}")
    for job in failed:
        print(f"FAILED {job['name']}: see {out / 'logs' / job['name']}.log", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        print(f"label_efficiency: error: {error}", file=sys.stderr)
        sys.exit(1)
