"""teacher.pth: a pair of mask and image pathway that learned without labels; plain tensors and plain values only."""

from typing import Any

from nnunet_diffusion.co_training.mask_diffusion import MaskDiffusion
from nnunet_diffusion.pretraining.denoiser_file import check_own, load_own, refuse_other_topology, save_own
from nnunet_diffusion.pretraining.schemas import Teacher

FORMAT = "nnunet_diffusion teacher"
FORMAT_VERSION = 1


def save_teacher(path: str, pair: MaskDiffusion, process: dict, plan: dict, training: dict) -> None:
    """Writes a teacher whole or not at all.

    Args:
        path: Usually `teacher.pth` in the fold's folder.
        pair: Its averaged (EMA) weights.
        process: Schedule, number of timesteps, prediction.
        plan: From `plan_identity`.
        training: What it was trained on, for how long, and what its masks were found to be.
    """
    weights = {name: tensor.cpu() for name, tensor in pair.state_dict().items()}
    content = {"teacher_weights": weights, "process": process, "plan": plan, "training": training}
    save_own(path, FORMAT, FORMAT_VERSION, content)


def load_teacher(path: str) -> dict[str, Any]:
    """Loads the content of a teacher file as `save_teacher` wrote it; for the errors see `load_denoiser`."""
    content = load_own(path, "teacher", "DiffusionTeacherTrainer")
    check_own(content, path, FORMAT, FORMAT_VERSION, "DiffusionTeacherTrainer", Teacher)
    return content


def restore_teacher(content: dict[str, Any], pair: MaskDiffusion) -> None:
    """Loads the weights of a file into a pair that was built for this plan.

    Raises:
        UserError: If topology, channels or number of classes differ; the message lists what does not match.
    """
    refuse_other_topology("teacher", content["teacher_weights"], pair.state_dict(), content["plan"])
    pair.load_state_dict(content["teacher_weights"])
