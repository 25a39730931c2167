"""What every test relies on: seeds, one thread, nnU-Net folders of its own, the shared real data."""

import multiprocessing
import os
import random
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
from running import PYTHON
from warm_server import draw_progress_once, measure_few_voxels, warm_commands

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")

# Read when torch or nnU-Net is imported, so set before any test module is. Two processes with more threads than
# cores are several times slower than with one thread each.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", MPLBACKEND="agg")
# nnU-Net's commands take all cores on a CPU whatever OMP_NUM_THREADS says; then threads must not spin while they wait.
os.environ["OMP_WAIT_POLICY"] = "passive"
os.environ.update(nnUNet_n_proc_DA="0", nnUNet_def_n_proc="1", nnUNet_compile="f", nnUNet_wandb_enabled="0")
# nnU-Net looks its folders up at each use: a test that forgets to set them must fail, not touch the user's data.
for variable in (*FOLDERS, "nnUNet_extTrainer"):
    os.environ.pop(variable, None)


# What takes longest, as files or groups of tests: begun first, so that no process waits for another at the end.
LONGEST = ("openkbp", "flare22", "test_benchmarks_run", "test_train", "test_rounds", "test_mutual", "test_end_to_end")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keeps the tests of a file, or of a group of its own, together in one process."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
    groups = {item: item.get_closest_marker("xdist_group").args[0] for item in items}
    items.sort(key=lambda item: LONGEST.index(groups[item]) if groups[item] in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Seeds the generators of the libraries that are already imported."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(autouse=True)
def torch_loads_as_it_comes() -> Iterator[None]:
    """Our trainers let torch load plain values only, for as long as their process lives: here for one test."""
    yield
    os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)


@pytest.fixture(scope="session", autouse=True)
def session_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Sets nnU-Net's three folders for the whole session, so that expensive fixtures can share what they made."""
    with pytest.MonkeyPatch.context() as patch:
        yield set_folders(tmp_path_factory.mktemp("nnunet"), patch)


@pytest.fixture(scope="session", autouse=True)
def without_forks() -> Iterator[None]:
    """nnU-Net lists a folder in twelve forks; forks of a process with threads, as the tests' is, can wait for ever."""
    from nnunetv2.utilities import utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "Pool", ThreadPool)
        yield


@pytest.fixture(scope="session")
def warm() -> Iterator[Path]:
    """A folder with `python`, nnU-Net's commands and ours, none of which imports torch and nnU-Net again."""
    if not hasattr(os, "pidfd_open"):  # only on Linux
        yield Path(PYTHON).parent
        return
    with tempfile.TemporaryDirectory(prefix="warm") as folder, warm_commands(Path(folder)):  # a socket's path is short
        yield Path(folder)


@pytest.fixture(scope="session", autouse=True)
def without_waiting(request: pytest.FixtureRequest) -> Iterator[None]:
    """Takes three waits out of slow tests: imports of torch and nnU-Net, pictures of progress, 1e8 voxels measured.

    What a test, nnU-Net or a command of ours starts with `sys.executable`, or from the folder that has it, is warm.
    """
    if not any(item.get_closest_marker("slow") for item in request.session.items):
        yield
        return
    draw_progress_once()
    measure_few_voxels()
    python = str(request.getfixturevalue("warm") / "python")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", python)
        multiprocessing.set_executable(python)
        yield
    multiprocessing.set_executable(PYTHON)


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives one test three empty nnU-Net folders of its own; returns the folder that holds them."""
    return set_folders(tmp_path / "nnunet", monkeypatch)


def set_folders(root: Path, patch: pytest.MonkeyPatch) -> Path:
    """Creates nnU-Net's three folders under `root` and points the environment at them."""
    for name in FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
        patch.setenv(name, str(root / name))
    return root


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real scans beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real scans in {folder}")
    return folder


@pytest.fixture(scope="session")
def probe() -> dict:
    """What one fresh process found that imported torch, torchvision and, by nnU-Net's own search, all our trainers."""
    from nnunet_diffusion import checkup

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", PYTHON)
        return checkup.probe()
