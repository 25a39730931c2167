"""Runs the parts of a long work one after another, commands with logs and functions; continues where it was stopped."""

import codecs
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
from importlib.metadata import version
from time import time
from typing import Any

from tqdm import tqdm
from typing_extensions import TypedDict

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import NO_ROOM_SAID, naming_full_disk, read_json, write_json
from nnunet_diffusion.marks import mark, remove_marked
from nnunet_diffusion.processes import ENDS_WITH, number_of_cores
from nnunet_diffusion.records import differs, made_from, refuse_other

LOSS = re.compile(r"\b(?:train_loss|train loss)\s+(-?\d+\.\d+)")


class MadeFrom(TypedDict):
    """What `records.made_from` returns."""

    values: dict[str, Any]
    cases: dict[str, dict[str, str]]


class StepRecord(TypedDict):
    """What is kept of a step that was begun."""

    made_from: MadeFrom
    seconds: float | None  # None: not finished
    versions: dict[str, str]  # of what it was made with


@dataclass(frozen=True)
class Step:
    """A part of a work, a command or a function: what does it, what it is made from, how to see that it is done."""

    title: str
    command: Sequence[str] = ()
    output: str = ""  # this file or folder is there afterwards
    counts: str = ""  # a pattern of log lines that each mean one more of `total`
    total: int = 0
    depends_on: Mapping[str, Any] = field(default_factory=dict)  # values that decide the result
    cases: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # cases that do; see `records.made_from`
    resume_with: Sequence[str] = ()  # added to the command when it was started before and not finished
    replaces: str = ""  # this folder, which is marked as ours, is removed when the step starts anew
    is_kept: bool = False  # a finished one is not made anew when something has changed: that is refused by name
    is_incremental: bool = False  # the command itself knows what is missing: it is always run
    environment: Mapping[str, str] = field(default_factory=dict)  # for this command alone
    where: Sequence[str] = ()  # arguments that say where it runs and do not decide what comes out
    partly_done_if: str = ""  # a command that fails and ends with a line with this is taken as done, but not forgotten
    do: Callable[[], None] | None = None  # in the place of the command
    is_done: Callable[[], bool] | None = None  # then there is nothing to do, whatever is recorded
    then: Callable[[], None] | None = None  # what is left to do after it, now or when it was finished before
    kind: str = ""  # what `Steps.run_all` can be asked to end after

    @property
    def made_from(self) -> dict[str, Any]:
        """Records what must be unchanged for a finished step to be skipped."""
        return made_from({"command": list(self.command), **self.depends_on}, self.cases)


class Steps:
    """Runs steps in order, in one folder with their logs and a file that says which are finished."""

    def __init__(
        self,
        folder: str,
        environment: Mapping[str, str],
        total: int,
        state: dict[str, StepRecord] | None = None,
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

        Raises:
            UserError: If `steps.json` is damaged.
        """
        self.inherited = tuple(inherited)
        self.folder, self.environment, self.total = folder, os.environ | dict(environment), total
        self.state_file = os.path.join(folder, "steps.json")
        os.makedirs(os.path.join(folder, "logs"), exist_ok=True)
        self.state = {} if state is None else state
        self.save = save or (lambda: write_json(self.state_file, self.state))
        if save is None and os.path.isfile(self.state_file):
            remedy = "remove it, and everything is done anew"
            self.state = read_json(self.state_file, dict[str, StepRecord], remedy)
        self.number = 0
        self.partly_done: list[str] = []
        self.is_fresh = False  # from the first step that had to run, all later ones must

    def run_all(self, steps: Iterator[Step], stop_after: str = "") -> None:
        """Runs steps until the first of a kind that had something to do, if asked to; see `run`."""
        for step in steps:
            if self.run(step) and stop_after and step.kind == stop_after:
                return

    def run(self, step: Step) -> bool:
        """Runs a step unless it is finished; returns whether it did.

        Raises:
            UserError: If the command fails, or ends without its output, with the end of its log; if what it would
                replace was not made by this program; if a step that is kept was made from something else.
        """
        self.number += 1
        heading = f"[{self.number}/{self.total}] {step.title}"
        if step.is_done is not None and step.is_done():
            print(f"{heading}: done before", flush=True)
            return False
        known = self.state.get(step.title)
        is_same = known is not None and not self.is_fresh and not differs(known["made_from"], step.made_from)
        is_finished = step.do is None and self._is_recorded(step, is_same)
        must_run = step.is_incremental or not is_finished
        if must_run:
            print(heading, flush=True)
            self.is_fresh |= not is_finished
            self._do(step, is_same)
        else:
            print(f"{heading}: done before", flush=True)
        if step.then is not None:
            step.then()
        return must_run

    def _is_recorded(self, step: Step, is_same: bool) -> bool:
        """Says whether a step was finished; one that is kept and was made without these steps is taken as it is."""
        known, is_there = self.state.get(step.title), os.path.exists(step.output)
        if step.is_kept and is_there and known is None:
            self._remember(step, 0.0)
            return True
        if step.is_kept and is_there:
            remedy = f"remove the folder {os.path.dirname(step.output)} to make it anew"
            refuse_other(step.output, known["made_from"], step.made_from, remedy)
        return is_same and known["seconds"] is not None and is_there

    def _do(self, step: Step, is_same: bool) -> None:
        if step.replaces and not is_same:
            remove_marked(step.replaces, step=step.title)
            mark(step.replaces, step=step.title)
        self._remember(step, None)
        start = time()
        if step.do is not None:
            step.do()
        else:
            self._run_command(step, step.resume_with if is_same else ())
        self._remember(step, time() - start)
        print(f"  {time() - start:.0f} s", flush=True)

    def seconds(self) -> dict[str, float]:
        """Returns how long each finished step took."""
        return {title: round(s["seconds"], 1) for title, s in self.state.items() if s["seconds"] is not None}

    def _remember(self, step: Step, seconds: float | None) -> None:
        versions = {name: version(name) for name in ("nnunet_diffusion", "nnunetv2", "torch")}
        self.state[step.title] = {"made_from": step.made_from, "seconds": seconds, "versions": versions}
        self.save()

    def _run_command(self, step: Step, resume_with: Sequence[str]) -> None:
        command = [*step.command, *step.where, *resume_with]
        print(f"  $ {shlex.join(command)}", flush=True)
        log = os.path.join(self.folder, "logs", re.sub(r"\W+", "_", step.title).strip("_") + ".txt")
        code, last_lines = self._execute(step, command, log)
        if code and step.partly_done_if and any(step.partly_done_if in line for line in last_lines):
            print("".join(f"  | {line}\n" for line in last_lines), end="", flush=True)
            self.partly_done.append(step.title)
        elif code or not os.path.exists(step.output):
            ending = "".join(f"  | {line}\n" for line in last_lines)
            ending += "" if code else f"  | it ended without {step.output}\n"
            if any(NO_ROOM_SAID.search(line) for line in last_lines):
                ending += f"{room_for(step.output)}\n"
            raise UserError(f"step {self.number}, {step.title}, failed (exit code {code})\n{ending}its log: {log}")

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


def room_for(output: str) -> str:
    """Says how much room a command that found none has where it writes, and what to do."""
    folder = os.path.dirname(output)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    free = shutil.disk_usage(folder).free / 1e6
    return f"its disk is full: {folder} has {free:.0f} MB free: make room, then run the same command again"


def printed_lines(process: subprocess.Popen) -> Iterator[str]:
    """Yields what a process prints until it ends, though one that it left behind may still hold its output open."""
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
    """Returns what commands need: nnU-Net's folders, our trainers, on a CPU no more threads and workers than it has.

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


def find_program(name: str, environment: Mapping[str, str]) -> str:
    """Finds a command, from this installation before any other.

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
