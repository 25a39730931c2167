"""What files must hold that people may edit and kills may cut; other keys are free.

One `TypedDict` a file, checked by pydantic in its strict mode: no text for a number, no NaN, no infinity. So are the
PyTorch files that people share.
"""

from functools import cache
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

STRICT = ConfigDict(strict=True, allow_inf_nan=False)

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Spacing = Annotated[list[Positive], Field(min_length=2, max_length=3)]  # mm
Size = Annotated[list[Count], Field(min_length=2, max_length=3)]  # voxels
LabelValue = Index | Annotated[list[Index], Field(min_length=1)]
FilePath = Annotated[str, Field(pattern=r"^[^\x00]+$")]  # which no text with half a character passes, either
Score = Annotated[float, Field(ge=0, le=1)]  # DSC, NSD
# nnU-Net writes NaN where a score is not defined
NnUNetScore = Annotated[Score | None, BeforeValidator(lambda score: None if score != score else score)]


@with_config(STRICT)
class Strict(TypedDict):
    """A shape of which other keys are free; what derives from it is as strict."""


@with_config(ConfigDict(**STRICT, extra="forbid"))
class StrictAndClosed(TypedDict):
    """A shape without other keys."""


class LabeledFiles(Strict):
    """A case of dataset.json's table `dataset`."""

    images: Annotated[list[FilePath], Field(min_length=1)]
    label: FilePath


class UnlabeledFiles(Strict):
    """A case of dataset.json's table `unlabeled`."""

    images: Annotated[list[FilePath], Field(min_length=1)]


class EvaluatedDataset(Strict):
    """dataset.json, as far as evaluation needs it."""

    labels: Annotated[dict[str, LabelValue], Field(min_length=2)]
    file_ending: Annotated[str, Field(pattern=r"^\.[A-Za-z0-9.]+$")]
    regions_class_order: NotRequired[list[int]]


class Dataset(EvaluatedDataset):
    """dataset.json; the tables of annotations and of unlabeled scans have readers of their own."""

    channel_names: Annotated[dict[str, str], Field(min_length=1)]
    dataset: NotRequired[dict[str, LabeledFiles]]
    overwrite_image_reader_writer: NotRequired[str]
    sources: NotRequired[dict[str, str]]


class PlannableDataset(Dataset):
    """dataset.json with what nnU-Net's planning needs beside."""

    numTraining: Count


class Configuration(Strict):
    """A configuration of plans.json as it stands there: one that inherits gives what differs."""

    inherits_from: NotRequired[str]


class ResolvedConfiguration(Strict):
    """A configuration with all that it inherits."""

    data_identifier: str
    preprocessor_name: str
    spacing: Spacing
    patch_size: Size
    batch_size: Count
    normalization_schemes: list[str]
    use_mask_for_norm: list[bool]
    architecture: NotRequired[dict[str, Any]]
    previous_stage: NotRequired[str | None]


class PreprocessedConfiguration(Strict):
    """What of a configuration decides the values of a preprocessed scan."""

    preprocessor_name: str
    spacing: Spacing
    normalization_schemes: list[str]
    use_mask_for_norm: list[bool]
    resampling_fn_data: str
    resampling_fn_data_kwargs: dict[str, Any]
    resampling_fn_seg: str
    resampling_fn_seg_kwargs: dict[str, Any]


class Plans(Strict):
    """plans.json."""

    dataset_name: str
    plans_name: str
    configurations: Annotated[dict[str, Configuration], Field(min_length=1)]
    image_reader_writer: str
    transpose_forward: Annotated[list[Index], Field(min_length=3, max_length=3)]
    transpose_backward: Annotated[list[Index], Field(min_length=3, max_length=3)]
    foreground_intensity_properties_per_channel: dict[str, dict[str, float]]
    nnunet_diffusion: NotRequired[dict[str, dict[str, Any]]]


class Split(Strict):
    """A fold of splits_final.json."""

    train: list[str]
    val: list[str]


Splits = Annotated[list[Split], Field(min_length=1)]


class Fingerprint(Strict):
    """dataset_fingerprint.json; intensities of a data set without any labeled voxel are NaN."""

    spacings: list[Annotated[list[Positive], Field(min_length=3, max_length=3)]]
    shapes_after_crop: list[Annotated[list[Count], Field(min_length=3, max_length=3)]]
    foreground_intensity_properties_per_channel: dict[str, dict[str, Annotated[float, Field(allow_inf_nan=True)]]]
    median_relative_size_after_cropping: float


class LabeledStamps(Strict):
    """labeled_files.json: what dataset_fingerprint.json was measured from."""

    cases: dict[str, list[list[str | int | None]]]


class Measures(Strict):
    """A scan of unlabeled_fingerprint.json: its measures, or why there are none."""

    files: NotRequired[list[list[str | int | None]]]
    spacing: NotRequired[Annotated[list[Positive], Field(min_length=3, max_length=3)]]
    shape_after_crop: NotRequired[Annotated[list[Count], Field(min_length=3, max_length=3)]]
    problem: NotRequired[str]


@cache
def adapter(schema: Any) -> TypeAdapter:
    """Builds the validator of a schema, once: it takes milliseconds."""
    return TypeAdapter(schema)


class InitArgs(Strict):
    """What a trainer was built from."""

    configuration: str
    dataset_json: dict[str, Any]


class Checkpoint(Strict):
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
        adapter(schema).validate_python(content)
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        came = "nothing" if first["type"] == "missing" else _shortened(repr(first["input"]))
        more = f" (and {len(others)} more)" if others else ""
        return f"{key or 'the whole file'}: {first['msg']}, not {came}{more}"
    return ""


def _shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


# Of evaluations and the report.


class MeanFigures(Strict):
    """Means over labels and cases; NaN and None where there is nothing to measure."""

    Dice: NnUNetScore


class MeanSummary(Strict):
    """nnU-Net's summary.json, as far as rounds need it."""

    foreground_mean: MeanFigures


class TransferSource(Strict):
    """transfer_report.json, as far as rounds need it."""

    source: str


# Of conversions.
