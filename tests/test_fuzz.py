"""Every command on files that were cut, edited, swapped or made to do harm, and with arguments that make no sense.

The cases are drawn from a fixed seed, each from its number alone. NNUNET_DIFFUSION_FUZZ=1000 draws as many.
"""

import fnmatch
import os
import random
import resource
import shutil
import signal
import traceback
from pathlib import Path

import fuzz_mutations
import fuzz_world
import pytest
from fuzz_commands import COMMANDS

from nnunet_diffusion.marks import MARK

pytestmark = pytest.mark.slow  # what the cases need is made in half a minute, they themselves take as long

SEED = 2026
CASES = int(os.environ.get("NNUNET_DIFFUSION_FUZZ", "150"))
ERROR = "nnunet_diffusion: error: "
CPU_SECONDS, MEMORY = 30, 6 << 30  # of one case, more than this process has: nothing malformed may take more

# What a command may leave or change though it fails: who holds a lock, how far it has come, nnU-Net's own notes.
NOTES = ("*/lock", "*.lock", "*/steps.json", "*/state.json", "*/logs/*", "*/training_log_*", "*/debug.json")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The world, and a copy of it that stays as it was."""
    folder = tmp_path_factory.mktemp("fuzz")
    world = fuzz_world.build(folder / "box")
    shutil.copytree(world.box, folder / "kept", symlinks=True)
    yield world


@pytest.fixture
def limited():
    """Limits memory, and time of this process rather than of the clock, for the machine may be busy."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, too_long)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, handler)


class TooLong(BaseException):
    """A case that does not end."""


def too_long(*_):
    raise TooLong(f"more than {CPU_SECONDS} s of computing")


@pytest.mark.parametrize("number", range(CASES))
def test_malformed_input_is_refused_by_name_and_nothing_else_changes(world, limited, number):
    before = files_below(world.box)
    case = Case(world, number)
    spoiled = files_below(world.box)
    try:
        with fuzz_world.played(world):
            problems = case.problems(spoiled)
    finally:
        restore(world, before)
    if problems:
        what = f"{SEED}:{number} | {case.name} | {case.file} | {case.damage} | "
        pytest.fail(what + "; ".join(problems), pytrace=False)


class Case:
    """One malformed input, drawn from its number alone."""

    def __init__(self, world: fuzz_world.World, number: int):
        """Draws it and spoils the file."""
        self.world, self.rng = world, random.Random(f"{SEED}:{number}")
        self.name = list(COMMANDS)[number % len(COMMANDS)]
        self.command = COMMANDS[self.name]
        self.argv = self.command.arguments(str(world.box))
        groups = [found for pattern in self.command.reads if (found := self.found(pattern))]
        if not groups or self.rng.random() < 0.15:
            self.file = "arguments"
            self.damage, self.argv, self.culprits = fuzz_mutations.spoiled_arguments(self.argv, self.rng)
            return
        path = self.rng.choice(self.rng.choice(groups))
        if path.suffix == ".json" and path.stat().st_size > 2:
            absolute = world.box / "absolute"
            self.damage, content, words = fuzz_mutations.spoiled_json(path.read_text(), self.rng, absolute)
        else:
            self.damage, content, words = fuzz_mutations.spoiled_binary(path, self.rng, world.evil)
        path.write_bytes(content)
        self.file, stem = str(path.relative_to(world.box)), path.name.split(".")[0]
        folder = path.parent.parent if path.parent.name.startswith(".") else path.parent
        self.culprits = [path.name, stem, stem.removesuffix("_seg").removesuffix("_0000"), f"{folder}:"]
        self.culprits += filter(is_telling, words)
        self.culprits += ["Dataset600_Joined"] * (path.name == "mapping.json")  # was made from something else

    def found(self, pattern: str) -> list[Path]:
        """Files of the world, in one order on every machine."""
        return sorted(path for path in self.world.box.glob(pattern) if path.is_file())

    def problems(self, before: dict) -> list[str]:
        """Runs the command; says what must not be."""
        try:
            code, printed = fuzz_world.run(self.argv)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            said = f"{where(error)}: {type(error).__name__}: {error}".splitlines()[0][:200]
            return [said, *self.changes(before, has_failed=True)]
        said = printed[max(printed.rfind(ERROR), len(printed) - 300, 0) :].strip()
        found = [f"exit code {code}: {said}"] if code not in (0, 1, 2) else []
        if "Traceback" in printed:
            found.append(f"prints a traceback: {said}")
        is_named = os.path.basename(self.file) in printed  # what only a part of the work needs may be left out
        is_useless = self.damage in fuzz_mutations.WHOLE and self.file.endswith((".json", ".pth"))
        is_useless &= not self.file.endswith(MARK)  # a damaged mark still says that the folder is ours
        if code == 0 and is_useless and not is_named:
            found.append(f"is not noticed: {said}")
        if code and not any(culprit and culprit in printed for culprit in self.culprits):
            found.append(f"does not name the culprit: {said}")
        return found + self.changes(before, ERROR in printed)

    def changes(self, before: dict, has_failed: bool) -> list[str]:
        """What was written where it should not be; a command that fails leaves what was there as it was."""
        after = files_below(self.world.box)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        changed = [path for path in changed if path == self.file or not is_as_kept(self.world, path)]
        allowed = [*self.command.writes, *["here", "here/*"] * (self.file == "arguments")]
        found = [f"changes {path}" for path in changed if not matches(path, allowed)]
        if has_failed:
            found += [f"fails and changes {path}" for path in changed
                      if path in before and matches(path, allowed) and not matches(path, NOTES)]  # fmt: skip
        if self.world.evil.exists():
            found.insert(0, "CODE RAN")
        return found[:4]


def is_telling(word: str) -> bool:
    """Whether a key is found in a message only if it is meant."""
    return len(word) > 2


def where(error: BaseException) -> str:
    """The innermost line of ours."""
    frames, root = traceback.extract_tb(error.__traceback__), Path(__file__).parent.parent
    parts = [(Path(f.filename).relative_to(root), f.lineno) for f in frames if Path(f.filename).is_relative_to(root)]
    ours = [f"{path}:{line}" for path, line in parts if path.parts[0] not in (".venv", "tests")]
    return ours[-1] if ours else "no line of ours"


def is_as_kept(world: fuzz_world.World, path: str) -> bool:
    """Whether a file was written anew with what it held."""
    here, kept = world.box / path, world.box.parent / "kept" / path
    return here.is_file() and kept.is_file() and here.read_bytes() == kept.read_bytes()


def matches(path: str, patterns: list[str]) -> bool:
    """Whether a path is one of those meant."""
    return any(fnmatch.fnmatch(path, pattern) for pattern in patterns)


def files_below(box: Path) -> dict[str, tuple]:
    """Size, time and number of every file; of a link where it leads."""
    found = {}
    for folder, folders, files in os.walk(box):
        for name in files + [name for name in folders if not os.listdir(os.path.join(folder, name))]:
            path = os.path.join(folder, name)
            stat = os.lstat(path)
            found[os.path.relpath(path, box)] = (stat.st_size, stat.st_mtime_ns, stat.st_ino) if name in files else ()
    return found


def restore(world: fuzz_world.World, before: dict) -> None:
    """Brings back what was changed, removes what is new."""
    after = files_below(world.box)
    for path in after.keys() - before.keys():
        full = world.box / path
        full.rmdir() if full.is_dir() and not full.is_symlink() else full.unlink()
    for folder, _, _ in os.walk(world.box, topdown=False):
        if not (world.box.parent / "kept" / os.path.relpath(folder, world.box)).is_dir():
            shutil.rmtree(folder)
    for path in before:
        if before[path] != after.get(path):
            (world.box / path).parent.mkdir(parents=True, exist_ok=True)
            if before[path] == ():
                (world.box / path).mkdir(exist_ok=True)
            else:
                (world.box / path).unlink(missing_ok=True)  # a link is replaced, not followed
                shutil.copy2(world.box.parent / "kept" / path, world.box / path, follow_symlinks=False)
