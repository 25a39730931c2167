"""A real Dask scheduler and real workers as processes: the commands make what they make without, whoever is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_workers
import tiny

from nnunet_diffusion import workers
from nnunet_diffusion.cli import main
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.preprocessing.case_files import load_properties, read_preprocessed
from nnunet_diffusion.records import read_lines
from nnunet_diffusion.rounds.prediction import load_prediction
from nnunet_diffusion.rounds.pseudo_labels import open_pseudo_label, pseudo_cases
from nnunet_diffusion.workers import Workers, work_on

pytest.importorskip("dask_jobqueue")
pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("NNUNET_DIFFUSION_KILLS", "2"))
NUMBER = 4 if KILLS > 2 else 2
LOOPBACK = "127.0.0.1"
OURS = "import sys; from nnunet_diffusion.cli import main; sys.exit(main())"


class Cluster:
    """A scheduler and workers, each a process of its own."""

    def __init__(self, folder: Path, number: int, allowed_failures: str = "3"):
        self.allowed_failures = allowed_failures
        self.folder, self.file = folder, folder / "scheduler.json"
        self.scheduler = self.start("scheduler", "--host", LOOPBACK, "--port", "0", "--scheduler-file", self.file)
        until = time.monotonic() + 60
        while not self.file.exists():
            assert time.monotonic() < until, (folder / "scheduler.log").read_text()
            time.sleep(0.05)
        self.workers = [self.start_worker() for _ in range(number)]

    def start_worker(self, *options: str, nanny: str = "--no-nanny") -> subprocess.Popen:
        """Starts one; without a nanny, so that a kill is a kill."""
        return self.start(
            "worker", "--host", LOOPBACK, "--scheduler-file", self.file, "--nthreads", "1", nanny, *options
        )

    def start(self, kind: str, *arguments: object) -> subprocess.Popen:
        """Starts a command of Dask with its log in the folder, warm."""
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--no-dashboard", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        environment["DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES"] = self.allowed_failures
        with open(self.folder / f"{kind}.log", "a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def kill_worker(self, number: int) -> None:
        """Kills one and starts another in its place."""
        kill(self.workers[number])
        self.workers[number] = self.start_worker()


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    workers.connected.cache_clear()
    (tmp_path / "dask").mkdir()
    started = Cluster(tmp_path / "dask", NUMBER)
    yield started
    for process in (*started.workers, started.scheduler):
        kill(process)


def test_a_cluster_works_on_each_case_once_and_says_what_went_wrong(cluster, tmp_path, capsys, monkeypatch):
    import dask

    monkeypatch.setattr(workers, "SILENCE_S", 1.0)
    dask.config.set({"distributed.comm.timeouts.connect": "2s"})
    there = Workers(1, str(cluster.file))
    assert dict(work_on(test_workers.square, test_workers.TASKS, there, "squaring")) == test_workers.SQUARES
    assert "Dask's dashboard: http" in capsys.readouterr().out
    with pytest.raises(UserError, match="two is no number"):
        list(work_on(test_workers.fail_at_two, test_workers.TASKS, there, "failing"))
    with_gpu = Workers(1, there.scheduler, at_once=3, needs_gpu=True)
    workers.refuse_lost(workers.connected(there.scheduler, 1), with_gpu)
    assert "no worker of the cluster offers a GPU" in capsys.readouterr().out
    cluster.workers.append(cluster.start_worker("--resources", "GPU=1", "--nthreads", "3"))
    tasks = {name: (str(tmp_path / "meeting"), name, 3) for name in "abcdef"}
    (tmp_path / "meeting").mkdir()
    found = dict(work_on(test_workers.meet, tasks, with_gpu, "three at once"))
    assert len({process for process, _ in found.values()}) == 1, "one worker offers one"
    kill(cluster.scheduler)
    with pytest.raises(UserError, match="does not answer any more|was cancelled|no Dask cluster"):
        list(work_on(test_workers.square, test_workers.TASKS, there, "lost"))


def test_a_scan_that_takes_more_memory_than_a_worker_has_is_tried_once_alone_then_listed(tmp_path, capsys):
    """Dask's nanny kills the worker at its limit and starts it again."""
    workers.connected.cache_clear()
    cluster = Cluster(tmp_path, 0, allowed_failures="0")
    nanny, killed = cluster.start_worker("--memory-limit", "1.5GB", nanny="--nanny"), {}
    try:
        tasks = {"a": (1,), "too large": (1600,), "b": (1,)}
        done = dict(work_on(test_workers.eat, tasks, Workers(1, str(cluster.file)), "eating", killed))
    finally:
        for process in (nanny, cluster.scheduler):
            kill(process)
    assert done == {"a": 1, "b": 1} and list(killed) == ["too large"]
    assert "also when it worked on nothing else (1 worker(s) were lost with it)" in killed["too large"]
    assert "too large: its worker died (1 worker(s) were lost with it): tried again alone" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["tcp://127.0.0.1:9", "nonsense"])
def test_a_scheduler_that_is_not_there_is_named(where, monkeypatch):
    import dask

    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        with pytest.raises(
            UserError, match=f"--scheduler {where}: no Dask cluster .*: give it as slurm, lsf, pbs, sge"
        ):
            list(work_on(test_workers.square, test_workers.TASKS, Workers(1, where), "nowhere"))


def test_a_batch_system_that_is_not_configured_is_named():
    with pytest.raises(UserError, match="--scheduler sge: .*cores"):
        list(work_on(test_workers.square, test_workers.TASKS, Workers(1, "sge"), "nowhere"))


def values(folder: Path) -> dict:
    """All preprocessed cases of a folder, as plain values."""
    names = sorted(path.name.removesuffix(".pkl") for path in folder.glob("*.pkl"))
    arrays = {name: read_preprocessed(str(folder / f"{name}.b2nd")).tolist() for name in names}
    return {name: (arrays[name], str(load_properties(str(folder / f"{name}.pkl")))) for name in names}


def outcome(run: Path) -> dict:
    """What a round has predicted, decided and kept, as plain values."""
    predicted, kept = run / "round_1" / "predicted", run / "round_1"
    names = sorted(path.name.removesuffix(".b2nd") for path in predicted.glob("*.b2nd"))
    found = {name: load_prediction(str(predicted), name) for name in names}
    labels = {case: open_pseudo_label(str(kept), case).segmentation[:].tolist() for case in pseudo_cases(str(kept))}
    verdicts = dict(read_lines(str(run / "round_1" / "verdicts.jsonl"))[0][1:])
    return {
        "predicted": {n: (p.labels.tolist(), p[1:]) for n, p in found.items()},
        "verdicts": verdicts,
        "kept": labels,
    }


def run_and_kill(command: list[str], folder: Path, kills: int, cluster: Cluster, seed: int) -> None:
    """Runs a command on a cluster until it ends, with kills of it and of workers; each when some more files are there.

    What was complete when one fell must never be made again.
    """
    client, complete, rng = [sys.executable, "-c", OURS, *command, "--scheduler", cluster.file], {}, random.Random(seed)
    process, log = None, open(cluster.folder / "client.log", "a")
    for number in range(kills):
        if process is None:
            process = subprocess.Popen(list(map(str, client)), stdout=log, stderr=log)
        wanted = len(complete) + rng.randint(1, 8)
        while process.poll() is None and len(list(folder.glob("tiny*.b2nd"))) < wanted:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before the kills did: " + (cluster.folder / "client.log").read_text()
        complete |= {path: path.stat().st_mtime_ns for path in folder.glob("tiny*.b2nd")}
        if (number + seed) % 2:
            kill(process)
            process = None
        else:
            cluster.kill_worker(rng.randrange(NUMBER))
    if process is None:
        process = subprocess.Popen(list(map(str, client)), stdout=log, stderr=log)
    assert process.wait(600) == 0, (cluster.folder / "client.log").read_text()
    assert [path.name for path, written in complete.items() if path.stat().st_mtime_ns != written] == []
    print(f"{command[0]}: {kills} kills, {len(complete)} complete at the last, none made again")


def make_model(base: Path, trainer_name: str) -> Path:
    """Leaves the planned network with random weights in a model folder, as a training of fold all would."""
    from nnunet_diffusion.trainers import our_trainer

    plans = json.loads((base / "nnUNetCompactPlans.json").read_text())
    tiny.write_plans(tiny.shrunk(plans, "PlainConvUNet", "InstanceNorm"))
    trainer = tiny.trainer(our_trainer(trainer_name), fold="all")
    trainer.initialize()
    model = Path(trainer.output_folder_base)
    trainer.save_checkpoint(os.path.join(trainer.output_folder, "checkpoint_final.pth"))
    for name, content in (("plans", trainer.plans_manager.plans), ("dataset", trainer.dataset_json)):
        (model / f"{name}.json").write_text(json.dumps(content))
    return model


def test_workers_and_client_are_killed_at_random_and_the_results_are_the_same(cluster, nnunet_folders, tmp_path):
    """The pool, then a round's prediction and filter; half as many kills in each as NNUNET_DIFFUSION_KILLS says."""
    kills, scans = (KILLS + 1) // 2, 12 * KILLS
    tiny.write_raw(labeled=2, unlabeled=scans)
    preprocess = ["plan_and_preprocess", "-d", str(tiny.ID), "-pl", "CompactPlanner", "-c", "2d", "-np", "1"]
    assert main(preprocess) == 0
    base = nnunet_folders / "nnUNet_preprocessed" / tiny.NAME
    pool = base / "nnUNetCompactPlans_2d_unlabeled"
    expected = values(pool)
    assert len(expected) == scans
    for path in pool.glob("tiny*"):
        path.unlink()
    run_and_kill(preprocess, pool, kills, cluster, seed=0)
    assert values(pool) == expected
    assert [path.name for path in (pool / ".nnunet_diffusion").iterdir()] == ["identity.json"]

    model = make_model(base, "PartialLabelTrainer")
    gate = ["organ_confidence=0.3", "volume_factor=1e9", "position_margin=1", "min_organs=0.3"]
    rounds = ["rounds", "-d", str(tiny.ID), "-c", "2d", "-f", "all", "-p", tiny.PLANS, "-device", "cpu", "-np", "1"]
    rounds += ["--start", "scratch", "--from", str(model), "--rounds", "1", "--stop_after", "gate", "--gate", *gate]
    assert main(rounds) == 0
    run = base / "nnUNetCompactPlans_2d_pseudo" / f"{tiny.PLANS}__2d__fold_all"
    expected = outcome(run)
    run.rename(tmp_path / "uninterrupted")
    run_and_kill(rounds, run / "round_1" / "predicted", kills, cluster, seed=1)
    assert outcome(run) == expected and len(expected["predicted"]) == scans
