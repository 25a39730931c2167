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
from multiprocessing.pool import ThreadPool
from pathlib import Path

import fuzz_mutations
import fuzz_world
import pytest
import tiny

SEED = 2026
CASES = int(os.environ.get("NNUNET_DIFFUSION_FUZZ", "150"))
ERROR = "nnunet_diffusion: error: "
CPU_SECONDS, MEMORY = 30, 6 << 30  # of one case, more than this process has: nothing malformed may take more

RAW, PREPROCESSED, RESULTS = (f"a/b/nnunet/nnUNet_{kind}" for kind in ("raw", "preprocessed", "results"))
MODEL = f"{RESULTS}/{tiny.NAME}/{fuzz_world.MODEL}__{tiny.PLANS}__2d"
DATA, PLAN = f"{RAW}/{tiny.NAME}/dataset.json", f"{PREPROCESSED}/{tiny.NAME}/{tiny.PLANS}.json"
SPLITS, HERE = f"{PREPROCESSED}/{tiny.NAME}/splits_final.json", f"{PREPROCESSED}/{tiny.NAME}"
CASE_FILES = [f"{HERE}/nnUNetCompactPlans_2d/tiny_00[0-4]{end}" for end in (".b2nd", "_seg.b2nd", ".pkl")]
POOL_FILES = [f"{HERE}/*/tiny_10[01].*"]
TRAINING = [f"{HERE}/dataset.json", SPLITS, f"{HERE}/dataset_fingerprint.json", PLAN, *CASE_FILES]
ROUNDS = [PLAN, SPLITS, f"{HERE}/dataset.json", f"{HERE}/**/state.json", f"{HERE}/**/identity.json", *CASE_FILES,
          f"{MODEL}/plans.json", f"{MODEL}/dataset.json", f"{MODEL}/fold_0/checkpoint_final.pth",
          f"{MODEL}/fold_0/validation/summary.json", f"{MODEL}/fold_0/transfer_report.json"]  # fmt: skip

READ = {  # by each command: one line a file, or a group of files, that is as likely to be spoiled as the others
    "convert folder": ["a/b/given/labels.json", "a/b/given/annotated.json", "a/b/given/ct/*", "a/b/given/labels/*"],
    "convert flare22": ["a/b/given/flare22/*"],
    "convert partial": ["a/b/given/mapping.json", "a/b/given/mapping.json", DATA, f"{RAW}/{tiny.NAME}/labelsTr/*"],
    "plan_and_preprocess": [
        DATA, DATA, f"{HERE}/dataset_fingerprint.json", f"{HERE}/nnUNetCompactPlans.json", f"{HERE}/**/identity.json",
        f"{HERE}/**/labeled_files.json", f"{HERE}/**/unlabeled*.json", f"{HERE}/nnUNetCompactPlans_2d/*", *POOL_FILES,
        f"{RAW}/{tiny.NAME}/images??/*", f"{RAW}/{tiny.NAME}/labelsTr/*",
    ],
    "plan_and_preprocess part": [DATA, f"{HERE}/nnUNetCompactPlans.json", f"{HERE}/**/identity.json"],
    "train": TRAINING,
    "train from denoiser": ["a/b/given/denoiser.pth", f"{HERE}/FromDenoiser.json"],
    "train from weights": [f"{MODEL}/fold_0/checkpoint_final.pth"],
    "train denoiser": [PLAN, f"{HERE}/dataset.json", *POOL_FILES],
    "train pseudo": [f"{HERE}/{tiny.PLANS}_round1.json", f"{HERE}/**/round_1/*"],
    "train continued": [f"{MODEL}/fold_0/checkpoint_final.pth", PLAN],
    "rounds": ROUNDS,
    "rounds status": ROUNDS[:5],
    "rounds dry_run": ROUNDS[:5],
    "mutual": [PLAN, SPLITS, f"{HERE}/dataset.json", f"{RESULTS}/**/mutual__*/fold_0/state.json",
               f"{RESULTS}/**/MutualDifferenceTrainer__*/plans.json", f"{HERE}/**/completed.json",
               f"{RESULTS}/**/MutualDifferenceTrainer__*/fold_0/checkpoint_final.pth", *CASE_FILES],
    "sample": [f"{RESULTS}/*/DenoisingDiffusionTrainer__*/fold_0/denoiser.pth",
               f"{RESULTS}/*/DenoisingDiffusionTrainer__*/fold_0/samples/samples.json", PLAN],
    "sample file": ["a/b/given/denoiser.pth", "a/b/made/samples/samples.json", "a/b/made/samples/*.nii.gz"],
    "evaluate_samples": ["a/b/made/samples/samples.json", "a/b/made/samples/*.nii.gz", PLAN, "a/b/given/denoiser.pth"],
    "evaluate": [DATA, DATA, "a/b/given/references/tiny_004.nii.gz", f"{MODEL}/fold_0/validation/*.nii.gz"],
    "report": [
        DATA, SPLITS, f"{MODEL}/plans.json", f"{MODEL}/fold_0/validation/summary.json", "a/b/given/evaluation_nnunet.json",
        f"{MODEL}/fold_0/transfer_report.json", f"{RESULTS}/*/DenoisingDiffusionTrainer__*/fold_0/denoiser.pth",
        f"{HERE}/**/state.json", f"{RESULTS}/**/samples/samples.json", f"{RAW}/{tiny.NAME}/images??/*",
        f"{MODEL}/fold_0/validation/*.nii.gz", f"{MODEL}/fold_0/training_log*",
    ],
    "export": [f"{MODEL}/plans.json", f"{MODEL}/dataset.json", f"{MODEL}/fold_0/checkpoint_final.pth"],
    "demo": [DATA, SPLITS, f"{HERE}/nnUNetCompactPlans.json", "a/b/made/demo/steps.json", f"{RAW}/{tiny.NAME}/labelsTr/*",
             "a/b/made/demo/predictions/*/*.nii.gz"],
    "env": [],
    "env --check": [],
}  # fmt: skip

WRITTEN = {  # where each command may write
    "convert folder": [f"{RAW}/Dataset501_Own/*"],
    "convert flare22": [f"{RAW}/Dataset022_FLARE22/*"],
    "convert partial": [f"{RAW}/Dataset600_Joined/*"],
    "plan_and_preprocess": [f"{HERE}/*"],
    "plan_and_preprocess part": [f"{HERE}/*"],
    "train": [f"{RESULTS}/{tiny.NAME}/PartialLabelTrainer__{tiny.PLANS}__2d/*"],
    "train from denoiser": [f"{RESULTS}/{tiny.NAME}/{fuzz_world.MODEL}__FromDenoiser__2d/*"],
    "train from weights": [f"{RESULTS}/{tiny.NAME}/ConfiguredTrainer__{tiny.PLANS}__2d/*"],
    "train denoiser": [f"{RESULTS}/{tiny.NAME}/{fuzz_world.DENOISER}__{tiny.PLANS}__2d/fold_all/*",
                       f"{RESULTS}/{tiny.NAME}/{fuzz_world.DENOISER}__{tiny.PLANS}__2d/*.json"],
    "train pseudo": [f"{RESULTS}/{tiny.NAME}/PseudoLabelTrainer__{tiny.PLANS}_round1__2d/*"],
    "train continued": [f"{MODEL}/fold_0/*", f"{MODEL}/*.json"],
    "rounds": [f"{HERE}/*pseudo*", f"{HERE}/{tiny.PLANS}_round1.json", f"{RESULTS}/{tiny.NAME}/rounds__*",
               f"{RESULTS}/{tiny.NAME}/PseudoLabelTrainer__{tiny.PLANS}*"],
    "mutual": [f"{HERE}/*completed*", f"{RESULTS}/{tiny.NAME}/mutual__*",
               f"{RESULTS}/{tiny.NAME}/Mutual*Trainer__{tiny.PLANS}__2d/*"],
    "sample": [f"{RESULTS}/{tiny.NAME}/{fuzz_world.DENOISER}__{tiny.PLANS}__2d/fold_0/samples/*"],
    "sample file": ["a/b/made/samples/*"],
    "evaluate_samples": ["a/b/made/samples/quality_*"],
    "evaluate": [f"{MODEL}/fold_0/validation/evaluation_*"],
    "report": [f"{RESULTS}/{tiny.NAME}/report.html"],
    "export": ["a/b/made/exported/*"],
    "demo": ["a/b/made/demo/*", f"{HERE}/nnUNetCompactPlans_demo*.json", f"{RESULTS}/{tiny.NAME}/*CompactPlans_demo*"],
}  # fmt: skip
# What a command may leave or change though it fails: who holds a lock, how far it has come, nnU-Net's own notes.
NOTES = ["*/lock", "*.lock", "*/steps.json", "*/state.json", "*/logs/*", "*/training_log_*", "*/debug.json", "*/progress.png"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The world, and a copy of it that stays as it was."""
    from nnunetv2.utilities import utils

    utils.Pool = ThreadPool
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
        pytest.fail(f"{SEED}:{number} | {case.command} | {case.file} | {case.damage} | " + "; ".join(problems), pytrace=False)


class Case:
    """One malformed input, drawn from its number alone."""

    def __init__(self, world: fuzz_world.World, number: int):
        self.world, self.rng = world, random.Random(f"{SEED}:{number}")
        every = world.commands()
        self.command = list(every)[number % len(every)]
        self.argv = every[self.command]
        groups = [found for pattern in READ[self.command] if (found := self.found(pattern))]
        if not groups or self.rng.random() < 0.15:
            self.file = "arguments"
            self.damage, self.argv, self.culprits = fuzz_mutations.spoiled_arguments(self.argv, self.rng)
            return
        path = self.path = self.rng.choice(self.rng.choice(groups))
        if path.suffix == ".json" and path.stat().st_size > 2:
            self.damage, content, words = fuzz_mutations.spoiled_json(path.read_text(), self.rng, world.box / "absolute")
        else:
            self.damage, content, words = fuzz_mutations.spoiled_binary(path, self.rng, world.evil)
        path.write_bytes(content)
        self.file, stem = str(path.relative_to(world.box)), path.name.split(".")[0]
        folder = path.parent.parent if path.parent.name.startswith(".") else path.parent
        self.culprits = [path.name, stem, stem.removesuffix("_seg").removesuffix("_0000"), f"{folder}:", *words]
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
        if code and not any(culprit and culprit in printed for culprit in self.culprits):
            found.append(f"does not name the culprit: {said}")
        return found + self.changes(before, ERROR in printed)

    def changes(self, before: dict, has_failed: bool) -> list[str]:
        """What was written where it should not be; a command that fails leaves what was there as it was."""
        after = files_below(self.world.box)
        changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
        changed = [path for path in changed if path == self.file or not is_as_kept(self.world, path)]
        allowed = [*WRITTEN.get(self.command, []), *["here", "here/*"] * (self.file == "arguments")]
        found = [f"changes {path}" for path in changed if not matches(path, allowed)]
        if has_failed:
            found += [f"fails and changes {path}" for path in changed
                      if path in before and matches(path, allowed) and not matches(path, NOTES)]  # fmt: skip
        if self.world.evil.exists():
            found.insert(0, "CODE RAN")
        return found[:4]


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
                shutil.copy2(world.box.parent / "kept" / path, world.box / path, follow_symlinks=False)
