"""Where nnU-Net finds this plug-in and its data, and which device there is."""

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnunet_diffusion.errors import UserError

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
EXT_TRAINER = "nnUNet_extTrainer"
WAIT_POLICY = "OMP_WAIT_POLICY"
# nvidia-smi is everywhere where NVIDIA's driver is; the others show GPUs of containers, of Windows' Linux, and AMD's
GPUS = ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg", "/dev/kfd")


def trainers_folder() -> str:
    """Finds the installed folder of our trainers, which nnUNet_extTrainer must name; imports none of them.

    Raises:
        UserError: If the package was copied rather than installed, so that its trainers are not where it looks.
    """
    spec = importlib.util.find_spec("nnunet_diffusion.trainers")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("nnunet_diffusion.trainers is not installed: run pip install in the repository")
    return os.path.abspath(list(spec.submodule_search_locations)[0])


def trainer_names() -> list[str]:
    """Lists our trainers: each file is named as the class in it."""
    return sorted(path.stem for path in Path(trainers_folder()).glob("[!_]*.py"))


def ext_trainer_folders() -> list[str]:
    """Lists the folders that nnUNet_extTrainer names, in the order in which nnU-Net searches them."""
    return [folder for folder in os.environ.get(EXT_TRAINER, "").split(os.pathsep) if folder.strip()]


def with_our_trainers(folders: list[str]) -> str:
    """Returns the nnUNet_extTrainer that keeps `folders` and has ours, once; first unless it has a place already."""
    ours = trainers_folder()
    return os.pathsep.join(folders if any(is_same(folder, ours) for folder in folders) else [ours, *folders])


def is_same(folder: str, other: str) -> bool:
    """Says whether two paths lead to the same place."""
    return os.path.realpath(folder) == os.path.realpath(other)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets environment variables of this process for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def require_folders(names: tuple[str, ...] = FOLDERS) -> None:
    """Raises a UserError that names the nnU-Net folders among `names` that are not set."""
    unset = [name for name in names if not os.environ.get(name)]
    if unset:
        raise UserError(
            f"{', '.join(unset)} not set: nnU-Net keeps its data there. "
            'Set them in this shell, for example with: eval "$(nnunet_diffusion env --root FOLDER)"'
        )


def may_have_gpu() -> bool:
    """Looks for traces of a GPU; takes no time, while torch would take seconds to say."""
    return shutil.which("nvidia-smi") is not None or any(map(os.path.exists, GPUS))


def usable_device(name: str | None = None):
    """Returns the torch device of that name, or the best that this machine has.

    Raises:
        UserError: If it cannot be used here.
    """
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type != "cuda":
            torch.zeros(1, device=device)
        elif not torch.cuda.is_available():
            raise RuntimeError("torch finds no GPU")
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: cannot be used here ({str(error).splitlines()[0]}): try cpu") from error
    return device
