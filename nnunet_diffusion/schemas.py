"""What files must hold that people may edit and kills may cut; other keys are free.

One `TypedDict` a file, checked by pydantic in its strict mode: no text for a number, no NaN, no infinity. So are the
PyTorch files that people share.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

STRICT = ConfigDict(strict=True, allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Spacing = Annotated[list[Positive], Field(min_length=2, max_length=3)]  # mm
Size = Annotated[list[Count], Field(min_length=2, max_length=3)]  # voxels
LabelValue = Index | list[Index]


@with_config(STRICT)
class LabeledFiles(TypedDict):
    """A case of dataset.json's table `dataset`."""

    images: Annotated[list[str], Field(min_length=1)]
    label: str


@with_config(STRICT)
class UnlabeledFiles(TypedDict):
    """A case of dataset.json's table `unlabeled`."""

    images: Annotated[list[str], Field(min_length=1)]


@with_config(STRICT)
class Dataset(TypedDict):
    """dataset.json; the tables of annotations and of unlabeled scans have readers of their own."""

    channel_names: Annotated[dict[str, str], Field(min_length=1)]
    labels: Annotated[dict[str, LabelValue], Field(min_length=2)]
    file_ending: Annotated[str, Field(pattern=r"^\.[A-Za-z0-9.]+$")]
    regions_class_order: NotRequired[list[int]]
    dataset: NotRequired[dict[str, LabeledFiles]]
    overwrite_image_reader_writer: NotRequired[str]


@with_config(STRICT)
class PlannableDataset(Dataset):
    """dataset.json with what nnU-Net's planning needs beside."""

    numTraining: Count


@with_config(STRICT)
class Configuration(TypedDict):
    """A configuration of plans.json; one that inherits gives what differs."""

    inherits_from: NotRequired[str]
    data_identifier: NotRequired[str]
    preprocessor_name: NotRequired[str]
    spacing: NotRequired[Spacing]
    patch_size: NotRequired[Size]
    batch_size: NotRequired[Count]
    normalization_schemes: NotRequired[list[str]]
    use_mask_for_norm: NotRequired[list[bool]]
    architecture: NotRequired[dict[str, Any]]
    previous_stage: NotRequired[str | None]


@with_config(STRICT)
class ResolvedConfiguration(TypedDict):
    """A configuration with all that it inherits."""

    data_identifier: str
    preprocessor_name: str
    spacing: Spacing
    patch_size: Size
    batch_size: Count
    normalization_schemes: list[str]
    use_mask_for_norm: list[bool]
    previous_stage: NotRequired[str | None]


@with_config(STRICT)
class PreprocessedConfiguration(TypedDict):
    """What of a configuration decides the values of a preprocessed scan."""

    preprocessor_name: str
    spacing: Spacing
    normalization_schemes: list[str]
    use_mask_for_norm: list[bool]
    resampling_fn_data: str
    resampling_fn_data_kwargs: dict[str, Any]
    resampling_fn_seg: str
    resampling_fn_seg_kwargs: dict[str, Any]


@with_config(STRICT)
class Plans(TypedDict):
    """plans.json."""

    dataset_name: str
    plans_name: str
    configurations: Annotated[dict[str, Configuration], Field(min_length=1)]
    image_reader_writer: str
    transpose_forward: Annotated[list[Index], Field(min_length=3, max_length=3)]
    transpose_backward: Annotated[list[Index], Field(min_length=3, max_length=3)]
    foreground_intensity_properties_per_channel: dict[str, dict[str, float]]
    nnunet_diffusion: NotRequired[dict[str, dict[str, Any]]]


@with_config(STRICT)
class Split(TypedDict):
    """A fold of splits_final.json."""

    train: list[str]
    val: list[str]


Splits = Annotated[list[Split], Field(min_length=1)]


@with_config(STRICT)
class Fingerprint(TypedDict):
    """dataset_fingerprint.json; intensities of a data set without any labeled voxel are NaN."""

    spacings: list[list[Positive]]
    shapes_after_crop: list[list[Count]]
    foreground_intensity_properties_per_channel: dict[str, dict[str, Annotated[float, Field(allow_inf_nan=True)]]]
    median_relative_size_after_cropping: float


@with_config(STRICT)
class LabeledStamps(TypedDict):
    """labeled_files.json: what dataset_fingerprint.json was measured from."""

    cases: dict[str, list[list[str | int | None]]]


@with_config(STRICT)
class Measures(TypedDict):
    """A scan of unlabeled_fingerprint.json: its measures, or why there are none."""

    files: NotRequired[list[list[str | int | None]]]
    spacing: NotRequired[Annotated[list[Positive], Field(min_length=3, max_length=3)]]
    shape_after_crop: NotRequired[Annotated[list[Count], Field(min_length=3, max_length=3)]]
    problem: NotRequired[str]


def _is_weight(value: Any) -> Any:
    import torch  # heavy, and here for PyTorch's files alone

    if not isinstance(value, torch.Tensor):
        raise ValueError("must be a tensor")
    if value.isnan().any():
        raise ValueError("must not be NaN")
    return value


Weights = dict[str, Annotated[Any, AfterValidator(_is_weight)]]


@with_config(STRICT)
class PlanIdentity(TypedDict):
    """The plan that a denoiser or a teacher was made for; see `denoiser_file.plan_identity`."""

    dataset_name: str
    plans_name: str
    configuration: str
    spacing: Spacing
    patch_size: Size
    transpose_forward: Annotated[list[Index], Field(min_length=3, max_length=3)]
    normalization_schemes: list[str]
    intensities: dict[str, dict[str, float]]
    channel_names: Annotated[dict[str, str], Field(min_length=1)]
    network_class: str
    network_kwargs: dict[str, Any]
    network_kwargs_requiring_import: list[str]


@with_config(STRICT)
class Process(TypedDict):
    """A diffusion process; see `diffusion.Diffusion.description`."""

    schedule: Literal["linear", "cosine", "sigmoid"]
    timesteps: Count
    prediction: Literal["epsilon", "v"]
    prior: NotRequired[Annotated[list[list[float]], Field(min_length=2, max_length=2)]]


@with_config(STRICT)
class Training(TypedDict):
    """What is said of a pre-training, as far as it is used."""

    body_share: NotRequired[Annotated[float, Field(ge=0, le=1)]]
    batch_size: NotRequired[Count]
    health: NotRequired[str]


@with_config(STRICT)
class Denoiser(TypedDict):
    """denoiser.pth."""

    network_weights: Weights
    timestep: Index
    denoiser_weights: Weights
    process: Process
    plan: PlanIdentity
    training: Training


@with_config(STRICT)
class Teacher(TypedDict):
    """teacher.pth."""

    teacher_weights: Weights
    process: Process
    plan: PlanIdentity
    training: Training


@with_config(STRICT)
class InitArgs(TypedDict):
    """What a trainer was built from."""

    configuration: str
    dataset_json: dict[str, Any]


@with_config(STRICT)
class Checkpoint(TypedDict):
    """A checkpoint of nnU-Net, as far as it is used; weights that have become NaN are the training's own matter."""

    network_weights: dict[str, Any]
    trainer_name: str
    init_args: InitArgs


def first_problem(content: Any, schema: Any) -> str:
    """Says where content has not the shape of a schema, what is there, and what is expected; empty if it has.

    Args:
        content: What a JSON file held.
        schema: A type of this module, or any that pydantic knows.
    """
    try:
        TypeAdapter(schema).validate_python(content)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        came = "nothing" if first["type"] == "missing" else _shortened(repr(first["input"]))
        more = f" (and {len(others)} more)" if others else ""
        return f"{key or 'the whole file'}: {first['msg']}, not {came}{more}"
    return ""


def _shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
