"""Runs the commands that a user would type, one after another, each with a log; continues where it was stopped."""

import codecs
import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from time import time
from typing import Any

from tqdm import tqdm

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import naming_full_disk, write_json
from nnunet_diffusion.processes import ENDS_WITH

LOSS = re.compile(r"\b(?:train_loss|train loss)\s+(-?\d+\.\d+)")


@dataclass(frozen=True)
class Step:
    """One command, and how to see that it is done."""

    title: str
    command: Sequence[str]
    output: str  # this file or folder is there afterwards
    counts: str = ""  # a pattern of log lines that each mean one more of `total`
    total: int = 0
    depends_on: Any = None  # what else decides the result, JSON: when it changes, the step is done anew
    resume_with: Sequence[str] = ()  # added to the command when it was started before and not finished
    replaces: str = ""  # this folder is removed when the step starts anew
    is_incremental: bool = False  # the command itself knows what is missing: it is always run
    environment: Mapping[str, str] = field(default_factory=dict)  # for this command alone
    where: Sequence[str] = ()  # arguments that say where it runs and do not decide what comes out
    partly_done_if: str = ""  # a command that fails and ends with a line with this is taken as done, but not forgotten

    @property
    def identity(self) -> list:
        """What must be unchanged for a finished step to be skipped."""
        return json.loads(json.dumps([list(self.command), self.depends_on]))


class Steps:
    """Runs steps in order, in one folder with their logs and a file that says which are finished."""

    def __init__(
        self,
        folder: str,
        environment: Mapping[str, str],
        total: int,
        state: dict | None = None,
        save: Callable[[], None] | None = None,
        inherited: Sequence[int] = (),
    ):
        """Reads what is finished.

        Args:
            folder: Gets `steps.json` and `logs/`.
            environment: Of the commands: added to this process's own.
            total: How many steps there will be, for the headings.
            state: What is finished, if it is kept elsewhere than in `steps.json`; changed in place.
            save: Keeps it there.
            inherited: Open files that the commands get, too.
        """
        self.inherited = tuple(inherited)
        self.folder, self.environment, self.total = folder, os.environ | dict(environment), total
        self.state_file = os.path.join(folder, "steps.json")
        os.makedirs(os.path.join(folder, "logs"), exist_ok=True)
        self.state = {} if state is None else state
        self.save = save or (lambda: write_json(self.state_file, self.state))
        if save is None and os.path.isfile(self.state_file):
            with open(self.state_file, encoding="utf-8") as f:
                self.state = json.load(f)
        self.number = 0
        self.partly_done: list[str] = []
        self.is_fresh = False  # from the first step that had to run, all later ones must

    def run(self, step: Step) -> None:
        """Runs a step unless it is finished.

        Raises:
            UserError: If the command fails, or ends without its output; with the end of its log.
        """
        self.number += 1
        known = self.state.get(step.title, {})
        is_same = known.get("identity") == step.identity and not self.is_fresh
        is_finished = is_same and known["seconds"] is not None and os.path.exists(step.output)
        heading = f"[{self.number}/{self.total}] {step.title}"
        if is_finished and not step.is_incremental:
            print(f"{heading}: done before in {known['seconds']:.0f} s", flush=True)
            return
        command = [*step.command, *step.where, *(step.resume_with if is_same else ())]
        print(f"{heading}\n  $ {shlex.join(command)}", flush=True)
        if step.replaces and not is_same:
            shutil.rmtree(step.replaces, ignore_errors=True)
        self.is_fresh |= not is_finished
        self._remember(step, None)
        log, start = os.path.join(self.folder, "logs", re.sub(r"\W+", "_", step.title).strip("_") + ".txt"), time()
        code, last_lines = self._execute(step, command, log)
        if code and step.partly_done_if and any(step.partly_done_if in line for line in last_lines):
            print("".join(f"  | {line}\n" for line in last_lines), end="", flush=True)
            self.partly_done.append(step.title)
            code = 0
        if code == 0 and not os.path.exists(step.output):
            code, last_lines = 0, [*last_lines, f"it ended without {step.output}"]
        elif code == 0:
            self._remember(step, time() - start)
            print(f"  {time() - start:.0f} s", flush=True)
            return
        ending = "\n".join(f"  | {line}" for line in last_lines)
        raise UserError(f"step {self.number}, {step.title}, failed (exit code {code})\n{ending}\nits log: {log}")

    def keep_finished(self, step: Step) -> None:
        """Never makes anew what is finished: if it was made without these steps, it is taken as it is.

        Raises:
            UserError: If it was made with these steps, by another command or from something else.
        """
        if not os.path.exists(step.output):
            return
        if step.title not in self.state:
            self._remember(step, 0.0)
        elif self.state[step.title]["identity"] != step.identity:
            raise UserError(
                f"{step.output} was made with other settings, labels or options: give those again, or move its folder "
                "away to make it anew"
            )

    def seconds(self) -> dict[str, float]:
        """How long each finished step took."""
        return {title: round(s["seconds"], 1) for title, s in self.state.items() if s["seconds"] is not None}

    def _remember(self, step: Step, seconds: float | None) -> None:
        self.state[step.title] = {"identity": step.identity, "seconds": seconds}
        self.save()

    def _execute(self, step: Step, command: list[str], log: str) -> tuple[int, list[str]]:
        """Runs the command with a progress bar; returns its exit code and the last lines that it wrote."""
        program = find_program(command[0], self.environment)
        last_lines: deque[str] = deque(maxlen=15)
        process = subprocess.Popen(
            [program, *command[1:]],
            env=self.environment | {ENDS_WITH: str(os.getpid())} | dict(step.environment),
            pass_fds=() if os.name == "nt" else self.inherited,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        bar = tqdm(
            total=step.total or None,
            disable=not step.total,
            leave=False,
            mininterval=0.5 if sys.stderr.isatty() else 20,
            bar_format="  {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]",
        )
        try:
            with naming_full_disk(log), open(log, "w", encoding="utf-8") as f, bar:
                for line in printed_lines(process):
                    f.write(line)
                    f.flush()
                    if line.strip():
                        last_lines.append(line.rstrip())
                    if found := LOSS.search(line):
                        bar.set_postfix_str(f"loss {found[1]}", refresh=False)
                    if step.counts and re.search(step.counts, line):
                        bar.update()
            return process.wait(), list(last_lines)
        finally:  # stopped by the user or by a full disk: do not leave the command behind
            if process.poll() is None:
                process.terminate()
                process.wait()
            process.stdout.close()


def printed_lines(process: subprocess.Popen) -> Iterator[str]:
    """What a process prints, until it has ended, though one that it left behind may still hold its output open."""
    output, rest = process.stdout.fileno(), ""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        if select.select([output], [], [], 1)[0]:
            if not (read := os.read(output, 1 << 16)):
                break
            *lines, rest = re.split("\r\n|\r|\n", rest + decoder.decode(read))
            yield from (line + "\n" for line in lines)
        elif process.poll() is not None:
            break
    if rest:
        yield rest + "\n"


def command_environment(root: str | None, device: str) -> dict[str, str]:
    """What the commands need: nnU-Net's folders, our trainers, and on a CPU no more threads and workers than it has.

    What the user has set already stays, but for the folders.

    Args:
        root: Folder for nnU-Net's three folders; None keeps those of the environment.
        device: cpu or cuda.
    """
    from nnunet_diffusion.installation import EXT_TRAINER, FOLDERS, ext_trainer_folders, with_our_trainers

    environment = {EXT_TRAINER: with_our_trainers(ext_trainer_folders()), "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg"}
    environment["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)])
    if root is not None:
        environment |= {name: os.path.join(root, name) for name in FOLDERS}
    if device == "cpu":
        cores = str(number_of_cores())
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "nnUNet_def_n_proc", "nnUNet_n_proc_DA"), cores)
        # threads that spin while they wait make a step several times slower as soon as another program runs
        limits |= {"OMP_WAIT_POLICY": "passive", "nnUNet_compile": "f"}
        environment |= {name: os.environ.get(name, value) for name, value in limits.items()}
    return environment


def number_of_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_program(name: str, environment: Mapping[str, str]) -> str:
    """The path of a command, from this installation before any other.

    Raises:
        UserError: If it is not installed.
    """
    found = shutil.which(name, path=environment["PATH"])
    if found is None:
        raise UserError(f"{name} is not installed beside {sys.executable}: run pip install in the repository")
    return found


def link(source: str, target: str) -> None:
    """Makes `target` a link to a file, or a copy of it where links are not allowed."""
    if os.path.lexists(target):
        os.remove(target)
    try:
        os.symlink(os.path.abspath(source), target)
    except OSError:
        shutil.copyfile(source, target)
