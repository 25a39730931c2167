"""Works on many cases: in processes of this machine, or on a Dask cluster. What asks for it need not know which.

A worker that dies, most likely for want of memory, costs no more than the cases in its hands. Each of them is tried
once more when all others are done, alone, and then named.
"""

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.installation import FOLDERS
from nnunet_diffusion.processes import end_with_parent, number_of_cores

BATCH_SYSTEMS = {"slurm": "SLURMCluster", "lsf": "LSFCluster", "pbs": "PBSCluster", "sge": "SGECluster"}
RETRIES = 1  # of a case that raised an error on a cluster, as of a network drive
SILENCE_S = 30.0  # without a result, after which a cluster is looked at
AGAIN = "what is done stays: run the same command again"
worker_number = 0  # of this process among those of its machine


@dataclass(frozen=True)
class Workers:
    """Where cases are worked on."""

    number: int = 1  # processes of this machine; or jobs, at most, that a batch system is asked for
    scheduler: str = ""  # empty: this machine; else a Dask scheduler's address or file, or one of BATCH_SYSTEMS
    at_once: int = 1  # cases in each process, in threads; with more than one it is never the process that asks
    needs_gpu: bool = False  # one a process

    @property
    def number_here(self) -> int:
        """Returns how many processes nnU-Net may start by itself, which it does on this machine."""
        return min(self.number, number_of_cores()) if self.scheduler else self.number


HERE = Workers()  # this process


@dataclass(frozen=True)
class Died:
    """What comes of a case whose worker died."""

    how: str


def work_on(
    work: Callable, tasks: Mapping[str, tuple], workers: Workers, description: str, killed: dict[str, str] | None = None
) -> Iterator[tuple[str, Any]]:
    """Calls `work(*arguments)` for each case.

    Args:
        work: Can be pickled; it is sent to each worker once, however much it carries.
        tasks: {case: arguments}.
        workers: Where.
        description: For the progress bar.
        killed: Gets the cases that ended their worker when they were tried alone, too, with what is said of them.
            Without it that is an error, when all others are done.

    Yields:
        The case and what `work` returned for it, in the order in which they end.

    Raises:
        UserError: As said; or if there is no such cluster, or it is gone. What is finished stays.
        Exception: The first that `work` raises.
    """
    if not tasks:
        return
    run, died = _on_cluster if workers.scheduler else _here, {}
    found = {} if killed is None else killed
    for case, result in tqdm(run(work, tasks, workers), description, total=len(tasks)):
        if isinstance(result, Died):
            died[case] = result.how
        else:
            yield case, result
    for case, how in died.items():
        tqdm.write(f"{case}: its worker died ({how}): tried again alone")
        for _, result in run(work, {case: tasks[case]}, workers):
            if isinstance(result, Died):
                found[case] = (
                    f"its worker died, also when it worked on nothing else ({result.how}): most likely it "
                    "needs more memory than there is"
                )
            else:
                yield case, result
    if killed is None and found:
        listed = "".join(f"\n  {case}: {what}" for case, what in found.items())
        raise UserError(f"{description}: everything else is done, but not{listed}")


# ---------------------------------------------------------------- this machine


def _here(work: Callable, tasks: Mapping[str, tuple], workers: Workers) -> Iterator[tuple[str, Any]]:
    """Works in processes of this machine, or in this one if one is enough."""
    if workers.number <= 1 and workers.at_once == 1:
        yield from ((case, work(*arguments)) for case, arguments in tasks.items())
        return
    todo = deque(tasks.items())
    crew = [_Process(work, number, workers.at_once) for number in range(max(1, min(workers.number, len(tasks))))]
    try:
        while todo or any(process.cases for process in crew):
            for process in crew:
                process.fill(todo)
            ready = wait([process.connection for process in crew])
            for process in [process for process in crew if process.connection in ready]:
                try:
                    case, result, error = process.connection.recv()
                except (EOFError, OSError):
                    how = process.end()
                    crew.remove(process)
                    crew += [_Process(work, process.number, workers.at_once)] if todo else []
                    yield from ((case, Died(how)) for case in process.cases)
                    continue
                if case is None:
                    process.is_up = True
                    continue
                process.cases.remove(case)
                if error is not None:
                    raise error[0] from RuntimeError(error[1])
                yield case, result
    finally:
        for process in crew:
            process.connection.close()
        for process in crew:
            process.process.join()


class _Process:
    """A process that works, and the cases in its hands."""

    def __init__(self, work: Callable, number: int, at_once: int):
        context = multiprocessing.get_context("spawn")
        self.number, self.at_once, self.cases, self.is_up = number, at_once, set(), False
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, number, at_once), daemon=True)
        self.process.start()
        theirs.close()

    def fill(self, todo: deque) -> None:
        """Sends cases until it has as many as it works on at once; what it is not there to take stays with it."""
        while todo and len(self.cases) < self.at_once:
            case, arguments = todo.popleft()
            self.cases.add(case)
            with contextlib.suppress(OSError):  # it died: that is seen next
                self.connection.send((case, arguments))

    def end(self) -> str:
        """Says how a process that died did; raises UserError if it never began to work, as the next one would not."""
        self.connection.close()
        self.process.join()
        code = self.process.exitcode
        how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
        if not self.is_up:
            raise UserError(f"a worker process could not start ({how}): see above, or free memory")
        return how


def _serve(connection: Connection, work: Callable, number: int, at_once: int) -> None:
    """Works on what comes, in threads, until the process that asks closes the connection or ends."""
    global worker_number
    worker_number = number
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a keyboard that is the other process's
    end_with_parent()
    lock = threading.Lock()

    def answer(case: str, arguments: tuple) -> None:
        result = error = None
        try:
            result = work(*arguments)
        except BaseException as raised:
            error = raised, traceback.format_exc()
        with lock, contextlib.suppress(OSError):  # nobody asks any more
            try:
                connection.send((case, result, error))
            except OSError:
                raise
            except Exception:  # an error that cannot be pickled: pickle raises many kinds
                connection.send((case, None, (RuntimeError(repr(error or result)), traceback.format_exc())))

    with ThreadPoolExecutor(at_once) as threads, contextlib.suppress(EOFError, OSError):
        connection.send((None, None, None))
        while True:
            threads.submit(answer, *connection.recv())


# ---------------------------------------------------------------- Dask


@dataclass(frozen=True)
class _Work:
    """What each worker of a cluster needs once: the work, and where nnU-Net's folders are."""

    work: Callable
    environment: dict[str, str]


def _brought(work: bytes) -> _Work:
    """Unpickles the work on a worker: the scheduler, which unpickles what it is given, need not import PyTorch."""
    return pickle.loads(work)


def _call(work: _Work, arguments: bytes) -> Any:
    os.environ.update(work.environment)
    return work.work(*pickle.loads(arguments))


def _on_cluster(work: Callable, tasks: Mapping[str, tuple], workers: Workers) -> Iterator[tuple[str, Any]]:
    """Works on a cluster: Dask gives each case to a free worker, and again if that is lost."""
    client, name = connected(workers.scheduler, workers.number), uuid.uuid4().hex
    if client.status != "running":  # lost meanwhile, as during a training
        connected.cache_clear()
        client = connected(workers.scheduler, workers.number)
    from distributed import CancelledError, KilledWorker

    environment = {key: os.path.abspath(os.environ[key]) for key in FOLDERS if key in os.environ}
    resources = {"GPU": 1 / workers.at_once} if workers.needs_gpu else None
    options = {"pure": False, "retries": RETRIES, "resources": resources}
    shared = client.submit(_brought, pickle.dumps(_Work(work, environment)), key=f"work-{name}", pure=False)
    done: queue.SimpleQueue[str] = queue.SimpleQueue()
    futures = {}
    try:
        for case, arguments in tasks.items():
            future = client.submit(_call, shared, pickle.dumps(arguments), key=(f"case-{name}", case), **options)
            future.add_done_callback(partial(_ended, done, case))
            futures[case] = future
        while futures:
            try:
                case = done.get(timeout=SILENCE_S)
            except queue.Empty:
                refuse_lost(client, workers)
                continue
            try:
                result = futures[case].result()
            except KilledWorker as error:
                result = Died(f"{error.allowed_failures + 1} worker(s) were lost with it")
            except CancelledError as error:
                refuse_lost(client, workers)
                raise UserError(f"--scheduler {workers.scheduler}: {case} was cancelled there: {AGAIN}") from error
            del futures[case]
            yield case, result
    finally:
        with contextlib.suppress(Exception):  # the scheduler is gone, and with it what would be cancelled
            client.cancel([shared, *futures.values()])


def _ended(done: queue.SimpleQueue, case: str, future) -> None:
    done.put(case)


def refuse_lost(client, workers: Workers) -> None:
    """Raises UserError if a cluster's scheduler does not answer; says so if none of its workers can be given work."""
    try:
        found = client.run_on_scheduler(_offers)
    except Exception as error:  # of Dask's connections: many kinds
        connected.cache_clear()
        raise UserError(f"--scheduler {workers.scheduler}: does not answer any more: {AGAIN}") from error
    if not found or (workers.needs_gpu and not any("GPU" in offer for offer in found)):
        what = "offers a GPU (dask worker --resources GPU=1)" if found else "is there"
        tqdm.write(f"waiting: no worker of the cluster {what}")


def _offers(dask_scheduler) -> list[dict[str, float]]:
    return [dict(worker.resources) for worker in dask_scheduler.workers.values()]


@cache
def connected(scheduler: str, number: int):
    """Connects with a Dask cluster, or has a batch system start one, by dask-jobqueue's own configuration file.

    Raises:
        UserError: If Dask is not installed, or nothing answers there.
    """
    try:
        import dask_jobqueue
        import distributed
    except ImportError as error:
        raise UserError(f"--scheduler needs Dask ({error}): pip install 'nnunet_diffusion[cluster]'") from error
    try:
        if scheduler in BATCH_SYSTEMS:
            cluster = getattr(dask_jobqueue, BATCH_SYSTEMS[scheduler])()
            cluster.adapt(minimum=0, maximum=number, interval="2s", wait_count=15, target_duration="1s")
            client = distributed.Client(cluster)
        elif os.path.isfile(scheduler):
            client = distributed.Client(scheduler_file=scheduler)
        else:
            client = distributed.Client(scheduler)
    except (OSError, ValueError, TypeError) as error:
        hint = f"as {', '.join(BATCH_SYSTEMS)}, or the address or the scheduler file of a running cluster"
        raise UserError(f"--scheduler {scheduler}: no Dask cluster ({error}): give it {hint}") from error
    tqdm.write(f"Dask's dashboard: {client.dashboard_link}")
    return client
