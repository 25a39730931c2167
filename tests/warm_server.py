"""A process that has imported torch and nnU-Net and forks for every command that warm_python.py asks for.

A fresh process needs five seconds of a core for these imports. A forked one goes on as Python does from its start, with
the command's own arguments, environment, folder and open files, and imports our package itself. Where the imports would
come out otherwise in the command's environment, the command is told to start Python after all.
"""

import atexit
import faulthandler
import fcntl
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import dropwhile
from pathlib import Path

READ_BY_IMPORTS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "MPLBACKEND", "PYTHONPATH")
READ_BY_IMPORTS += ("nnUNet_def_n_proc", "nnUNet_n_proc_DA", "CUDA_VISIBLE_DEVICES")
HIGH = 500  # above any file that a command inherits
SCRIPTS = Path(sys.executable).parent


@contextmanager
def warm_commands(folder: Path) -> Iterator[Path]:
    """Fills a folder with stand-ins for `python` and for nnU-Net's and our commands, while a server runs for them."""
    client = f"#!{sys.executable} -SI\n" + Path(__file__).with_name("warm_python.py").read_text()
    for name in ["python", *(path.name for path in SCRIPTS.glob("nn[Uu][Nn]et*"))]:
        (folder / name).write_text(client)
        (folder / name).chmod(0o755)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, __file__, folder], start_new_session=True, **pipes) as server:
        assert server.stdout.readline() == b"ready\n"
        yield folder
        server.stdin.close()  # it ends


def import_all() -> None:
    """Imports what commands use and is not ours."""
    import numexpr
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    os.environ.pop("nnUNet_extTrainer", None)  # that would import ours
    with suppress(RuntimeError):
        recursive_find_trainer_class_by_name("a name that nnU-Net looks for in each of its modules")
    names = ("run.run_training", "inference.predict_from_raw_data", "experiment_planning.plan_and_preprocess_api")
    for name in (*(f"nnunetv2.{name}" for name in names), "matplotlib.pyplot", "pydantic", "skimage.measure"):
        importlib.import_module(name)
    draw_progress_once()
    measure_few_voxels()
    numexpr.set_num_threads(1)  # ends the threads that its import started: a fork would lack them


def draw_progress_once() -> None:
    """Lets nnU-Net draw progress.png, which costs more than a short epoch, once a folder, not after every epoch."""
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    draw = LocalLogger.plot_progress_png
    LocalLogger.plot_progress_png = lambda logger, folder: (
        None if Path(folder, "progress.png").exists() else draw(logger, folder)
    )


def measure_few_voxels() -> None:
    """Lets nnU-Net measure intensities on 1e5 voxels drawn with replacement, not on 1e8 whatever the scans' size."""
    from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor

    begin = DatasetFingerprintExtractor.__init__

    def begin_with_few(self, *args, **kwargs) -> None:
        begin(self, *args, **kwargs)
        self.num_foreground_voxels_for_intensitystats = 1e5

    DatasetFingerprintExtractor.__init__ = begin_with_few


def serve(folder: str) -> tuple[dict, list[int]] | None:
    """Forks for commands until the input ends, then returns None; in each fork, returns what was asked for."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.join(folder, "socket"))
        listener.listen(100)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nothing waits for the forks that attend to clients
        os.write(1, b"ready\n")
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            with listener.accept()[0] as client:
                if os.fork() == 0:
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    return attend(client)


def attend(client: socket.socket) -> tuple[dict, list[int]]:
    """Forks the client's command, which alone returns; tells the client its process and, at its end, its exit code."""
    files = socket.recv_fds(client, 1, HIGH // 2)[1]
    with client.makefile("r") as stream:
        request = json.loads(stream.readline() or "{}")
    child = os.fork() if request and is_as_imported(request) else None
    if child == 0:
        return request, files
    if child:
        os.setpgid(child, child)
    for number in files:
        os.close(number)
    with suppress(BrokenPipeError):  # the client was killed
        client.sendall(f"{child or 0}\n".encode())
        if child and client not in select.select([client, os.pidfd_open(child)], [], [])[0]:
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            client.sendall(f"{code}\n".encode())
            os._exit(0)
    if child:
        os.killpg(child, signal.SIGKILL)
    os._exit(0)


def is_as_imported(request: dict) -> bool:
    """Whether a fresh process would have imported the same, and is started in a way that `run` knows."""
    here, there = ([e.get(name, "").lower() for name in READ_BY_IMPORTS] for e in (os.environ, request["environment"]))
    first = without_flags(request["command"])[:1]
    return here == there and (first in (["-c"], ["-m"]) or bool(first) and not first[0].startswith("-"))


def without_flags(command: list[str]) -> list[str]:
    """The command without the flags that multiprocessing and torchrun hand down."""
    return list(dropwhile(lambda word: word in ("-B", "-u"), command))


def become(request: dict, files: list[int]) -> None:
    """Takes on the client's open files, folder, environment and parent."""
    copies = [fcntl.fcntl(number, fcntl.F_DUPFD, HIGH) for number in files]
    for number in files:
        os.close(number)
    for copy, target in zip(copies, request["files"], strict=True):
        os.dup2(copy, target)
        os.close(copy)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdout.reconfigure(write_through=True)  # as -u and PYTHONUNBUFFERED ask
    status = Path(f"/proc/{request['pid']}/stat")
    os.getppid = lambda: int(status.read_text().rpartition(")")[2].split()[1])
    random.seed()
    sys.modules["numpy"].random.seed()


def run(first: str, *arguments: str) -> None:
    """Runs code, a module or a script as Python's command line does, and ends."""
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    code = 0
    try:
        if first == "-c":
            sys.argv, sys.path[:0] = [first, *arguments[1:]], [""]
            exec(compile(arguments[0], "<string>", "exec"), vars(main))
        elif first == "-m":
            sys.argv, sys.path[:0] = list(arguments), [os.getcwd()]
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = [first, *arguments], [os.path.dirname(os.path.realpath(first))]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(ValueError):  # it is closed
            stream.flush()
    os._exit(code)  # to take a thousand modules down costs more than all else here


if __name__ == "__main__":
    del sys.path[0]  # this file's folder
    sys.executable = os.path.join(sys.argv[1], "python")
    faulthandler.enable()
    import_all()
    gc.freeze()
    if asked := serve(sys.argv[1]):
        become(*asked)
        run(*without_flags(asked[0]["command"]))
    os._exit(0)
