"""Trained model folders and their checkpoints: where they are, what may be loaded from them, and how."""

import contextlib
import io
import os
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunet_diffusion import installation
from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import check_shape
from nnunet_diffusion.plans import REMEDY
from nnunet_diffusion.schemas import Checkpoint

HEADS = ".seg_layers."
# The numbers in nnU-Net's training log are numpy scalars; otherwise its checkpoints hold tensors and plain values.
PLAIN_NUMPY = [np.dtype, np.ndarray]
PLAIN_NUMPY += [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)]
for makes in (np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]):  # numpy 1 and 2 call their module otherwise
    PLAIN_NUMPY += [(makes, f"numpy.{core}.multiarray.{makes.__name__}") for core in ("core", "_core")]
torch.serialization.add_safe_globals(PLAIN_NUMPY)  # for good: the end of a context would forget them altogether


# nnU-Net reads checkpoints and `-pretrained_weights` with `weights_only=False`, where a file could run any code; this
# overrules it. Commands of nnU-Net's own must not inherit it: they do not know PLAIN_NUMPY.
PLAIN_VALUES_ONLY = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1"}


def load_nothing_but_plain_values() -> None:
    """Lets `torch.load` in this process, a training, and in those that it starts read tensors and plain values only."""
    os.environ.update(PLAIN_VALUES_ONLY)


def load_plain(path: str, remedy: str) -> Any:
    """Loads a PyTorch file of tensors and plain values without running any code that it may carry.

    Args:
        path: The file.
        remedy: What the user can do if it is none.

    Returns:
        Its content, tensors on the CPU.

    Raises:
        OSError: If it cannot be read.
        UserError: If it is damaged, or holds anything else; names that.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file, also OSErrors of its own
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} holds more than tensors and plain values: it asks for {code[1]}, and could run any code; "
                f"nothing in it was run: {remedy}"
            ) from None
        raise UserError(f"{path} cannot be read, it is truncated or no PyTorch file: {remedy}") from error


def load_checkpoint(path: str) -> dict[str, Any]:
    """Loads a checkpoint of nnU-Net without running any code that it may carry; for the errors see `load_plain`."""
    checkpoint = load_plain(path, "give a checkpoint that nnU-Net wrote")
    check_shape(checkpoint, Checkpoint, path, "give a checkpoint that nnU-Net wrote")
    return checkpoint


def refuse_unbuildable(plans: PlansManager, configuration: str, channels: int) -> None:
    """Builds the planned network without its weights, which takes no time, to refuse a plan that does not describe one.

    Args:
        plans: Of the training.
        configuration: Its name.
        channels: Of the images.

    Raises:
        UserError: Naming the key of plans.json.
    """
    try:
        with torch.device("meta"):
            nnUNetTrainer.build_network_architecture(plans, plans.get_configuration(configuration), channels, 2, True)
    except Exception as error:  # whatever the keywords of a network provoke
        where = f"{plans.plans_name}.json: configurations.{configuration}.architecture"
        raise UserError(f"{where}: no network can be built from it ({error!r}): {REMEDY}") from error


def unwrap(network: nn.Module) -> nn.Module:
    """Returns the network itself, without DDP and torch.compile around it."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    return network._orig_mod if isinstance(network, OptimizedModule) else network


def find_folds(folder: str, folds: list[str] | None, checkpoint_name: str) -> list[str]:
    """Returns the folds to export, all with their checkpoint; raises UserError for what the folder lacks."""
    for file in ("plans.json", "dataset.json"):
        if not os.path.isfile(os.path.join(folder, file)):
            raise UserError(f"{folder} is not a model folder, it has no {file}: check -d, -tr, -p and -c")
    if folds is None:
        folds = sorted(name[5:] for name in os.listdir(folder) if name.startswith("fold_"))
        folds = [fold for fold in folds if os.path.isfile(os.path.join(folder, f"fold_{fold}", checkpoint_name))]
    missing = [f for f in folds if not os.path.isfile(os.path.join(folder, f"fold_{f}", checkpoint_name))]
    if missing or not folds:
        what = f"fold {', '.join(missing)}" if missing else "any fold"
        raise UserError(f"{folder} has no {checkpoint_name} of {what}: finish that training, or choose by -f and -chk")
    return folds


def load_predictor(folder: str, folds: list[str], checkpoint_name: str) -> nnUNetPredictor:
    """Loads a model folder as `nnUNetv2_predict` does, on the CPU, where results do not depend on chosen kernels."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    with installation.environment(PLAIN_VALUES_ONLY):
        predictor.initialize_from_trained_model_folder(folder, tuple(folds), checkpoint_name)
    return predictor


@contextlib.contextmanager
def trainers_of(folders: str) -> Iterator[None]:
    """Lets nnU-Net search `folders` beside its own for trainers, silently: it names every file that it reads.

    Raises:
        UserError: If it finds no such trainer.
    """
    try:
        with installation.environment({installation.EXT_TRAINER: folders}), contextlib.redirect_stdout(io.StringIO()):
            yield
    except (RuntimeError, ImportError) as error:
        raise UserError(f"nnU-Net cannot load the trainer: {error}: see nnunet_diffusion env --check") from error
