"""Processes that end with the one that started them, however that ended; how many the machine has room for."""

import multiprocessing
import os
import threading
import time

ENDS_WITH = "nnunet_diffusion_ends_with"  # environment variable: the process that a command must not outlive


def end_with_parent() -> None:
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


def number_of_cores() -> int:
    """Counts the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
