"""What can be wrong with an installation: what `nnunet_diffusion env --check` says."""

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from nnunet_diffusion.installation import (
    EXT_TRAINER,
    FOLDERS,
    WAIT_POLICY,
    ext_trainer_folders,
    is_same,
    trainer_names,
    trainers_folder,
    with_our_trainers,
)

SAME_PLACE = (
    "torch and torchvision must come from the same place. For the default pair: "
    "pip install --force-reinstall torch torchvision. For a CPU-only or older-driver pair: "
    "install both from PyTorch's own index in one command"
)


class Finding(NamedTuple):
    """One line of `env --check`."""

    is_ok: bool
    text: str


def check() -> Iterator[Finding]:
    """Looks at everything that a training needs; takes seconds, as one process imports torch and nnU-Net."""
    yield from check_versions()
    for name in FOLDERS:
        yield check_folder(name)
    yield from check_ext_trainer()
    yield from check_probe(probe())


def check_versions() -> Iterator[Finding]:
    """Compares Python and the installed packages with what this package and nnU-Net ask for."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    for package in ("nnunet_diffusion", "nnunetv2"):
        try:
            metadata = importlib.metadata.metadata(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(False, f"{package} is not installed: run pip install in the repository of nnunet_diffusion")
            continue
        problems = []
        if not SpecifierSet(metadata["Requires-Python"] or "").contains(platform.python_version(), prereleases=True):
            problems.append(f"Python {platform.python_version()}: {package} needs {metadata['Requires-Python']}")
        for text in importlib.metadata.requires(package) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                problems += _version_problem(requirement, package)
        for problem in problems:
            yield Finding(False, problem)
        if not problems:
            yield Finding(True, f"{package} {metadata['Version']}: Python {platform.python_version()} and packages fit")


def _version_problem(requirement: Any, needed_by: str) -> list[str]:
    wanted = f'pip install "{requirement.name}{requirement.specifier}"'
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return [f"{requirement.name} is missing, {needed_by} needs it: {wanted}"]
    if requirement.specifier.contains(version, prereleases=True):
        return []
    return [f"{requirement.name} {version}: {needed_by} needs {requirement.specifier}: {wanted}"]


def check_folder(name: str) -> Finding:
    """Looks whether one of nnU-Net's three folders is set, exists and can be written to."""
    folder = os.environ.get(name)
    if not folder:
        return Finding(False, f'{name} is not set: eval "$(nnunet_diffusion env --root FOLDER)"')
    if not os.path.isdir(folder):
        return Finding(False, f"{name}={folder} is not a folder: create it, or correct the variable")
    if not os.access(folder, os.W_OK | os.X_OK):
        return Finding(False, f"{name}={folder} cannot be written to: change its permissions, or the variable")
    return Finding(True, f"{name}={folder}")


def check_ext_trainer() -> Iterator[Finding]:
    """Looks whether nnUNet_extTrainer names our trainers' folder, and none above it."""
    ours, folders = trainers_folder(), ext_trainer_folders()
    for folder in folders:
        if not os.path.isdir(folder):
            yield Finding(False, f"{EXT_TRAINER} names {folder}, which is not a folder: take it out")
        elif _is_above_trainers(folder, ours):
            # nnU-Net would import every module below: the tests, the build files, each trainer under a second name.
            yield Finding(False, f"{EXT_TRAINER} names {folder}, which only contains a folder of trainers: name {ours}")
    if any(is_same(folder, ours) for folder in folders):
        yield Finding(True, f"{EXT_TRAINER} has {ours}")
    else:
        yield Finding(False, f'{EXT_TRAINER} lacks {ours}: eval "$(nnunet_diffusion env)"')


def _is_above_trainers(folder: str, ours: str) -> bool:
    is_clone = all(os.path.exists(os.path.join(folder, name)) for name in ("setup.py", "nnunet_diffusion", "trainers"))
    return is_clone or Path(folder).resolve() in Path(ours).resolve().parents


def check_probe(found: dict[str, Any]) -> Iterator[Finding]:
    """Reads what the fresh process found."""
    for name, error in found["errors"].items():
        remedy = SAME_PLACE if name.startswith("torch") else "reinstall it, or see the message"
        yield Finding(False, f"import {name} fails ({error}), so nnU-Net finds no trainer outside its own: {remedy}")
    if found["cuda"]:
        yield Finding(True, f"GPU: {found['cuda']}")
    elif "torch" not in found["errors"]:
        yield Finding(True, "no CUDA GPU: everything runs on the CPU (-device cpu), slowly")
        yield check_waiting()
    failed = False
    for name, place in found["trainers"].items():
        if not is_same(place, trainers_folder()):
            failed = True
            yield Finding(False, f"nnU-Net does not find our {name}: {place}")
    if found["trainers"] and not failed:
        yield Finding(True, f"nnU-Net finds {', '.join(found['trainers'])}")


def check_waiting() -> Finding:
    """Looks how threads on a CPU wait for each other."""
    policy = os.environ.get(WAIT_POLICY)
    if policy is None:
        return Finding(
            False,
            f"{WAIT_POLICY} is not set: threads spin while they wait, so that training is many times slower as soon as "
            'another program runs: eval "$(nnunet_diffusion env)"',
        )
    if policy.lower() == "passive":
        return Finding(True, f"{WAIT_POLICY}={policy}: threads sleep while they wait, other programs may run beside")
    return Finding(True, f"{WAIT_POLICY}={policy}, as you set it: training is slow while other programs run")


def probe() -> dict[str, Any]:
    """Runs `look` in a fresh process, since only that shows what `nnUNetv2_train` will meet.

    Returns:
        What `look` returns. A process that dies without an answer is an error of torch.
    """
    code = "from nnunet_diffusion.checkup import look; look()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"errors": {"torch": f"exit code {done.returncode}, {said}"}, "cuda": "", "trainers": {}}


def look() -> None:
    """Prints what `probe` returns, as JSON: import errors, the GPU's name, and where nnU-Net finds each trainer."""
    found: dict[str, Any] = {"errors": {}, "cuda": "", "trainers": {}}
    with contextlib.redirect_stdout(sys.stderr):  # nnU-Net tells what it searches
        for name in ("torch", "torchvision", "nnunetv2"):
            try:
                importlib.import_module(name)
            except Exception as error:  # a broken pair of libraries raises anything
                found["errors"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
                break
        else:
            import torch

            found["cuda"] = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
            found["trainers"] = {name: find_trainer(name) for name in trainer_names()}
    print(json.dumps(found))


def find_trainer(name: str) -> str:
    """Returns the folder in which nnU-Net's own search finds a trainer, or what it says when it does not."""
    from nnunetv2.utilities import find_objects

    os.environ[EXT_TRAINER] = with_our_trainers(ext_trainer_folders())
    search, places = find_objects.recursive_find_python_class, []

    def remember(folder: str, *args: Any, **kwargs: Any) -> type | None:
        found = search(folder, *args, **kwargs)
        if found is not None:
            places.append(folder)
        return found

    find_objects.recursive_find_python_class = remember  # the class alone does not tell which folder it came from
    try:
        find_objects.recursive_find_trainer_class_by_name(name)
        return places[-1]
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        find_objects.recursive_find_python_class = search
