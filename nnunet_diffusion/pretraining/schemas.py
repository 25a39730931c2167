"""What denoiser.pth and teacher.pth must hold."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from typing_extensions import NotRequired

from nnunet_diffusion.schemas import Checkpoint, Count, Index, Size, Spacing, Strict


def _is_weight(value: Any) -> Any:
    import torch  # heavy, and here for PyTorch's files alone

    if not isinstance(value, torch.Tensor):
        raise ValueError("must be a tensor")
    if value.isnan().any():
        raise ValueError("must not be NaN")
    return value


Weights = dict[str, Annotated[Any, AfterValidator(_is_weight)]]


class FirstWeights(Checkpoint):
    """A checkpoint of nnU-Net that a training starts from."""

    network_weights: Weights


class SampledPlan(Strict):
    """The plan of a denoiser, as far as its samples tell it."""

    dataset_name: str
    plans_name: str
    configuration: str
    spacing: Spacing
    patch_size: Size
    transpose_forward: Annotated[list[Index], Field(min_length=3, max_length=3)]
    normalization_schemes: list[str]
    intensities: dict[str, dict[str, float]]
    channel_names: Annotated[dict[str, str], Field(min_length=1)]


class PlanIdentity(SampledPlan):
    """The plan that a denoiser or a teacher was made for; see `denoiser_file.plan_identity`."""

    network_class: str
    network_kwargs: dict[str, Any]
    network_kwargs_requiring_import: list[str]


class Process(Strict):
    """A diffusion process; see `diffusion.Diffusion.description`."""

    schedule: Literal["linear", "cosine", "sigmoid"]
    timesteps: Count
    prediction: Literal["epsilon", "v"]
    prior: NotRequired[Annotated[list[list[float]], Field(min_length=2, max_length=2)]]


class Training(Strict):
    """What is said of a pre-training, as far as it is used."""

    body_share: NotRequired[Annotated[float, Field(ge=0, le=1)]]
    batch_size: NotRequired[Count]
    health: NotRequired[str]


class Denoiser(Strict):
    """denoiser.pth."""

    network_weights: Weights
    timestep: Index
    denoiser_weights: Weights
    process: Process
    plan: PlanIdentity
    training: Training


class Teacher(Strict):
    """teacher.pth."""

    teacher_weights: Weights
    process: Process
    plan: PlanIdentity
    training: Training
