"""What the files must hold that a conversion is given."""

from typing import Annotated, Any

from pydantic import BeforeValidator, Field
from typing_extensions import NotRequired

from nnunet_diffusion.schemas import Dataset, FilePath, Strict, StrictAndClosed


class ConvertedFrom(Strict):
    """dataset.json of a conversion: the folders that its cases came from."""

    converted_from: list[str]


class SourceDataset(Dataset):
    """dataset.json of a data set that is joined with others; `partial` says more about labels than a shape can."""

    channel_names: Annotated[dict[Annotated[str, Field(pattern=r"^\d+$")], str], Field(min_length=1)]
    labels: dict[str, Any]
    annotated_labels: NotRequired[dict[str, list[str]]]


class JoinedSource(StrictAndClosed):
    """A source of a mapping of `convert partial`; what its mapping means is checked where it is applied."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=60)]
    about: NotRequired[Any]
    dataset: NotRequired[FilePath]
    images: NotRequired[FilePath]
    labels: NotRequired[FilePath]
    label_names: NotRequired[dict[str, Any]]
    channel_names: NotRequired[Annotated[list[str], Field(min_length=1)]]
    unlabeled: NotRequired[Annotated[list[FilePath], BeforeValidator(lambda n: [n] if isinstance(n, str) else n)]]
    mapping: NotRequired[dict[str, Any]]
    inside: NotRequired[dict[str, str]]
    excludes: NotRequired[list[str]]


class LabelMappingFile(StrictAndClosed):
    """The mapping of `convert partial`."""

    labels: Annotated[list[str], Field(min_length=1)]
    sources: Annotated[list[JoinedSource], Field(min_length=1)]
    about: NotRequired[Any]


AnnotatedLabels = dict[str, list[str]]  # of `convert folder --annotated`


class LabelFile(Strict):
    """The JSON file of `convert folder --labels` that has regions; `label_values` says more than a shape can."""

    labels: dict[str, Any]
    regions_class_order: NotRequired[list[int]]
