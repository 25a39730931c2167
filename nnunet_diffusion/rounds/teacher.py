"""The networks that predict for a round: a trained model folder in nnU-Net's own predictor, loaded once a worker.

A worker has several cases in its hands at the same time, each in a thread: the network takes one, while the host reads
the next and measures and writes those before. The process that asks for predictions never loads a network, so that its
GPU is free for the training that follows.
"""

import contextlib
import io
import os
import threading
from typing import NamedTuple

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_diffusion import workers
from nnunet_diffusion.model_folder import PLAIN_VALUES_ONLY, find_folds, load_checkpoint, trainers_of
from nnunet_diffusion.rounds.constrained import most_probable

CHECKPOINT = "checkpoint_final.pth"
AT_ONCE = 3  # cases in a worker's hands; the logits of so many are in memory


class Model(NamedTuple):
    """Which weights predict, and where: all that a worker needs to load them."""

    folder: str
    folds: tuple[str, ...]  # several are an ensemble, whose mean logits are taken, as nnU-Net does
    identity: str  # a name for these very weights; predictions of others are made anew
    device: str  # cpu; or cuda, of which a worker takes the GPU that has its number
    mirroring: bool = True  # averaged over mirrored images, along the axes that the model allows


class Teacher:
    """A trained model folder, one or several folds, as nnU-Net's own predictor loads it."""

    def __init__(self, model: Model):
        """Loads it.

        Raises:
            UserError: If a checkpoint is missing, holds more than plain values, or its trainer cannot be found.
        """
        from nnunet_diffusion.installation import environment, ext_trainer_folders, with_our_trainers

        self.identity, self.lock = model.identity, threading.Lock()
        folds = find_folds(model.folder, list(model.folds), CHECKPOINT)
        for fold in folds:
            load_checkpoint(os.path.join(model.folder, f"fold_{fold}", CHECKPOINT))  # says what is wrong with it
        device = own_device(model.device)
        on_cuda = device.type == "cuda"
        with trainers_of(with_our_trainers(ext_trainer_folders())), environment(PLAIN_VALUES_ONLY):
            self.predictor = nnUNetPredictor(
                use_mirroring=model.mirroring, device=device, perform_everything_on_device=on_cuda, allow_tqdm=False
            )
            self.predictor.initialize_from_trained_model_folder(model.folder, tuple(folds), CHECKPOINT)
        self.label_manager = self.predictor.label_manager

    @torch.inference_mode()
    def logits(self, image: torch.Tensor) -> tuple[torch.Tensor, list[np.ndarray]]:
        """Computes mean logits (C, X, Y, Z) of an image, on the CPU, and each model's labels if there are several.

        One image at a time, whichever threads ask.
        """
        total, members, models = None, [], self.predictor.list_of_parameters
        with self.lock:
            for weights in models:
                getattr(self.predictor.network, "_orig_mod", self.predictor.network).load_state_dict(weights)
                with contextlib.redirect_stdout(io.StringIO()):
                    logits = self.predictor.predict_sliding_window_return_logits(image).cpu()
                if len(models) > 1:
                    members.append(most_probable(logits, self.label_manager)[0].numpy())
                total = logits if total is None else total.add_(logits)
        return total.div_(len(models)), members


_loaded: dict[Model, Teacher] = {}
_loading = threading.Lock()


def loaded(model: Model) -> Teacher:
    """Loads a model, if this process has not, in the place of the one that it had; errors as `Teacher`."""
    with _loading:
        if model not in _loaded:
            _loaded.clear()
            _loaded[model] = Teacher(model)
        return _loaded[model]


def own_device(name: str) -> torch.device:
    """Returns the device of this worker: of several GPUs the one that has its number."""
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", workers.worker_number % max(1, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return device
