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
from running import run_command

from nnunet_diffusion import workers
from nnunet_diffusion.cli import main
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.preprocessing.case_files import load_properties, read_preprocessed
from nnunet_diffusion.workers import Workers, work_on

pytest.importorskip("dask_jobqueue")
pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("NNUNET_DIFFUSION_KILLS", "2"))
NUMBER = 4 if KILLS > 2 else 2
OURS = "import sys; from nnunet_diffusion.cli import main; sys.exit(main())"


class Cluster:
    """A scheduler and workers, each a process of its own."""

    def __init__(self, folder: Path, number: int):
        self.folder, self.file = folder, folder / "scheduler.json"
        self.scheduler = self.start("scheduler", "--port", "0", "--scheduler-file", self.file)
        until = time.monotonic() + 60
        while not self.file.exists():
            assert time.monotonic() < until, (folder / "scheduler.log").read_text()
            time.sleep(0.05)
        self.workers = [self.start_worker() for _ in range(number)]

    def start_worker(self, *options: str) -> subprocess.Popen:
        """Starts one; without a nanny, so that a kill is a kill."""
        return self.start("worker", "--scheduler-file", self.file, "--nthreads", "1", "--no-nanny", *options)

    def start(self, kind: str, *arguments: object) -> subprocess.Popen:
        """Starts a command of Dask with its log in the folder, warm."""
        command = [sys.executable, "-m", f"distributed.cli.dask_{kind}", "--no-dashboard", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
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


def test_a_cluster_works_on_each_case_once_and_says_what_went_wrong(cluster, tmp_path, capsys):
    there = Workers(1, str(cluster.file))
    assert dict(work_on(test_workers.square, test_workers.TASKS, there, "squaring")) == test_workers.SQUARES
    assert "Dask's dashboard: http" in capsys.readouterr().out
    with pytest.raises(UserError, match="two is no number"):
        list(work_on(test_workers.fail_at_two, test_workers.TASKS, there, "failing"))
    cluster.workers.append(cluster.start_worker("--resources", "GPU=1"))
    found = dict(work_on(test_workers.where, test_workers.TASKS, Workers(1, there.scheduler, 2, True), "with a GPU"))
    assert len(set(found.values())) == 1, "one worker offers one"
    kill(cluster.scheduler)
    with pytest.raises(UserError, match="does not answer any more: what is done stays: run the same command again"):
        list(work_on(test_workers.square, test_workers.TASKS, there, "lost"))


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
    return {
        name: (
            read_preprocessed(str(folder / f"{name}.b2nd")).tolist(),
            str(load_properties(str(folder / f"{name}.pkl"))),
        )
        for name in names
    }


def test_workers_and_client_are_killed_at_random_and_the_pool_is_the_same(cluster, nnunet_folders, monkeypatch):
    """As many kills as NNUNET_DIFFUSION_KILLS says; what was complete when one fell is never made again."""
    tiny.write_raw(labeled=2, unlabeled=30 * KILLS)
    command = ["plan_and_preprocess", "-d", str(tiny.ID), "-pl", "CompactPlanner", "-c", "2d", "-np", "1"]
    assert main(command) == 0
    pool = nnunet_folders / "nnUNet_preprocessed" / tiny.NAME / "nnUNetCompactPlans_2d_unlabeled"
    expected = values(pool)
    assert len(expected) == 30 * KILLS
    for path in pool.iterdir():
        if path.is_file():
            path.unlink()
    client, rng, complete = (
        [sys.executable, "-c", OURS, *command, "--scheduler", str(cluster.file)],
        random.Random(0),
        {},
    )
    process = None
    for number in range(KILLS):
        if process is None:
            process = subprocess.Popen(client, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wanted = len(complete) + rng.randint(1, 15)
        while process.poll() is None and len(list(pool.glob("*.b2nd"))) < wanted:
            time.sleep(0.002)
        assert process.poll() is None, "it ended before the kills did"
        complete |= {path: path.stat().st_mtime_ns for path in pool.glob("*.b2nd")}
        if number % 3:  # of the first two kills one is of each
            kill(process)
            process = None
        else:
            cluster.kill_worker(rng.randrange(NUMBER))
    if process is not None:
        assert process.wait(300) == 0
    done = run_command(client)
    assert done.returncode == 0, done.stderr[-3000:]
    assert values(pool) == expected
    again = [path.name for path, written in complete.items() if path.stat().st_mtime_ns != written]
    print(json.dumps({"kills": KILLS, "scans": len(expected), "complete at the last kill": len(complete)}))
    assert again == []
    left = [path for path in (pool / ".nnunet_diffusion").iterdir() if path.name != "identity.json"]
    assert left == []
