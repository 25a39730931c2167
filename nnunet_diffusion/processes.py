"""Work on many cases, in other processes if there is to be more than one."""

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from nnunet_diffusion.errors import UserError

ENDS_WITH = "nnunet_diffusion_ends_with"  # environment variable: the process that a command must not outlive


def run_in_processes(work, tasks: dict[str, tuple], num_processes: int, description: str) -> Iterator[tuple]:
    """Calls `work(*arguments)` for each case of `tasks`, in other processes if there is to be more than one.

    Yields:
        The case and what `work` returned for it, in the order in which they end.

    Raises:
        UserError: If a process died; what is finished stays.
    """
    if not tasks:
        return
    if num_processes <= 1:
        yield from ((case, work(*arguments)) for case, arguments in tqdm(tasks.items(), description))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_processes, len(tasks)), context, initializer=_end_with_parent) as pool:
        futures = {pool.submit(work, *arguments): case for case, arguments in tasks.items()}
        try:
            for future in tqdm(as_completed(futures), description, total=len(tasks)):
                yield futures[future], future.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{description}: a worker process died. If it said nothing above, it was killed, most likely for want "
                "of memory: run the same command again with fewer processes (-np)"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Ends a worker with its parent: it would hold memory and write under the next command."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def end_with_starter() -> None:
    """Ends this process, and its workers, when the one that the environment names and that started it has ended.

    However that ended: a training must not go on beside the one that continues it.
    """
    starter = os.environ.pop(ENDS_WITH, "")
    if not starter:
        return

    def watch():
        while os.getppid() == int(starter):
            time.sleep(0.1)
        for worker in multiprocessing.active_children():
            worker.kill()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
