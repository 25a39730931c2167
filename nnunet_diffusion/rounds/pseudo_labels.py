"""Pseudo labels: what a model says of preprocessed images, kept so that nnU-Net's data loader takes them for labels.

`<data_identifier>_pseudo/<round>/<case>_seg.b2nd` holds one case: its label map in the network's space, on the voxels
of the preprocessed image, and in the file's metadata the `class_locations` that nnU-Net draws foreground patches from
and what the label map says something about, as `annotated_labels` and `union_labels` do for annotated cases. It is one
file, so it is there whole or not at all. Images are not stored again: they stay in the pool or with the annotated
cases. Nothing is ever written where annotated cases lie.

**Voxels that are too uncertain to teach anything** have the data set's ignore label. Where it declares none they have
the value that nnU-Net would ask for, the highest label plus one, and the trainer's label manager is replaced by
`ignoring(label_manager)`. nnU-Net builds the loss, and for regions the target's last channel, from
`label_manager.ignore_label`; outputs, prediction, evaluation and the checkpoint come from dataset.json, so the model
folder stays what it would be. The value -1 would not do: it marks padding and the outside of the body, and nnU-Net's
transforms turn it to background before the loss sees it. `has_ignore_label` stays False, because with it the data
loader would draw patches by locations that the annotated cases of such a data set do not have.
"""

import json
import os
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import blosc2
import numpy as np
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetBaseDataset
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from typing_extensions import TypedDict

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.files import atomic, check_shape, not_written
from nnunet_diffusion.names import safe_name
from nnunet_diffusion.partial.annotations import Annotation
from nnunet_diffusion.preprocessing.case_files import open_array

ENDING = "_seg.b2nd"
METADATA = "nnunet_diffusion"
REMEDY = "remove it and run the command that made it again, nnunet_diffusion rounds or mutual"


class AnnotationContent(TypedDict):
    """An `Annotation` as JSON has it."""

    labels: list[str]
    unions: list[list[str]]


class PseudoLabelContent(TypedDict):
    """The metadata of a pseudo label."""

    annotation: AnnotationContent
    completes: AnnotationContent | None
    info: dict[str, Any]
    classes: list[int | list[int]]


class PseudoLabel(NamedTuple):
    """One case's pseudo label."""

    segmentation: blosc2.NDArray  # (1, X, Y, Z) int16, read when it is indexed
    class_locations: dict  # as in nnU-Net's properties: label, region or tuple of labels -> (N, 4) voxels
    annotation: Annotation  # what the label map says something about
    completes: Annotation | None  # what of it was annotated, if the case is a partly annotated one
    info: dict[str, Any]  # plain values, whatever who saved it wants to remember


def pseudo_folder(preprocessed_dataset_folder_base: str, data_identifier: str, *names: str) -> str:
    """Finds the folder of all pseudo labels of one configuration, or one below it.

    Raises:
        UserError: If a name would lead out of it.
    """
    safe = [safe_name(name, "pseudo labels", "take letters, digits, '_', '-'") for name in names]
    return os.path.join(preprocessed_dataset_folder_base, data_identifier + "_pseudo", *safe)


def pseudo_cases(folder: str) -> list[str]:
    """Lists the cases that have a pseudo label in a folder, sorted; none if there is no such folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return sorted(name.removesuffix(ENDING) for name in names if name.endswith(ENDING) and not name.startswith("."))


def save_pseudo_label(
    folder: str,
    case: str,
    segmentation: np.ndarray,
    annotation: Annotation,
    label_manager: LabelManager,
    patch_size,
    completes: Annotation | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Saves one case, whole or not at all; a former one is replaced.

    Args:
        folder: Is created if need be.
        case: Its name.
        segmentation: (X, Y, Z) or (1, X, Y, Z) label values on the voxels of the preprocessed image.
        annotation: What it says something about: only its labels may occur, and of a union only the first.
        label_manager: nnU-Net's, or `ignoring` it.
        patch_size: Of the configuration: files are cut into blocks that suit it.
        completes: What was annotated in the case, if the pseudo label completes true labels.
        info: Anything that JSON holds.

    Raises:
        UserError: If the case's name cannot be a file's.
        ValueError: If the segmentation has other dimensions.
        OSError: If the file cannot be written; a former one is then what it was.
    """
    safe_name(case, "case")
    segmentation = np.asarray(segmentation, np.int16)
    segmentation = segmentation[None] if segmentation.ndim == 3 else segmentation
    if segmentation.ndim != 4 or len(segmentation) != 1:
        raise ValueError(f"the segmentation must be (X, Y, Z) or (1, X, Y, Z), not {segmentation.shape}")
    locations = class_locations(segmentation, label_manager)
    about = {"annotation": _to_json(annotation), "completes": completes and _to_json(completes)}
    about |= {"info": dict(info or {}), "classes": [np.asarray(key).tolist() for key in locations]}
    metadata = [json.dumps(about), *(np.asarray(voxels, np.int32).tobytes() for voxels in locations.values())]
    write_array(os.path.join(folder, case + ENDING), segmentation, patch_size, metadata)


def write_array(path: str, array: np.ndarray, patch_size, metadata: Any) -> None:
    """Writes an array as nnU-Net stores label maps, and metadata of plain values, into one file, whole or not at all.

    Raises:
        OSError: If it cannot be written; a former file is then what it was.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder, exist_ok=True)
    blocks, chunks = comp_blosc2_params(array.shape, tuple(patch_size), array.itemsize)
    cparams = {"codec": blosc2.Codec.LZ4HC, "clevel": 5, "nthreads": 1, "filters": [blosc2.Filter.SHUFFLE]}
    try:
        with atomic(path) as temporary:
            stored = blosc2.asarray(
                np.ascontiguousarray(array), urlpath=temporary, mode="w", chunks=chunks, blocks=blocks, cparams=cparams
            )
            stored.schunk.vlmeta[METADATA] = metadata
    except (RuntimeError, OSError) as error:
        raise not_written(name, folder, error) from error


def open_with_metadata(path: str) -> tuple[blosc2.NDArray, Any]:
    """Opens an array of `write_array`, read when it is indexed, and its metadata.

    Raises:
        UserError: If the file is damaged or not one of ours.
    """
    array = open_array(path, REMEDY)
    try:
        return array, array.schunk.vlmeta[METADATA]
    except Exception as error:  # blosc2 raises many kinds for a damaged file
        raise UserError(f"{path} is damaged, or no file of nnunet_diffusion ({error!r}): {REMEDY}") from error


def open_pseudo_label(folder: str, case: str) -> PseudoLabel:
    """Opens one case's pseudo label.

    Raises:
        UserError: If the file is damaged or not a pseudo label.
    """
    path = os.path.join(folder, case + ENDING)
    segmentation, metadata = open_with_metadata(path)
    try:
        text, *locations = metadata
        about = json.loads(text)
        values = [np.frombuffer(content, np.int32).reshape(-1, 4) for content in locations]
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: is no pseudo label ({error}): {REMEDY}") from error
    check_shape(about, PseudoLabelContent, path, REMEDY)
    if len(about["classes"]) != len(values):
        raise UserError(f"{path}: classes: has {len(about['classes'])} for {len(values)} lists of voxels: {REMEDY}")
    keys = [key if isinstance(key, int) else tuple(key) for key in about["classes"]]
    annotation, completes = (about[key] and _from_json(about[key]) for key in ("annotation", "completes"))
    return PseudoLabel(segmentation, dict(zip(keys, values, strict=True)), annotation, completes, about["info"])


def remove_pseudo_labels(folder: str, cases: Collection[str]) -> None:
    """Removes pseudo labels that `nnunet_diffusion rounds` or `mutual` made: those say which teacher predicted them.

    Raises:
        UserError: If one was made by somebody else; nothing is removed then.
    """
    paths = [os.path.join(folder, case + ENDING) for case in cases]
    for case, path in zip(cases, paths, strict=True):
        if "teacher" not in open_pseudo_label(folder, case).info:
            raise UserError(f"{path}: was not made by nnunet_diffusion, which does not remove it: move it away")
    for path in paths:
        os.remove(path)


def usable_pseudo_labels(folder: str, annotations: Mapping[str, Annotation]) -> dict[str, Annotation]:
    """Finds what the pseudo labels of a folder say something about; true labels always win.

    A pseudo label is not usable once somebody annotated the case: unless it completes just those annotations.

    Args:
        folder: Of the pseudo labels.
        annotations: What was annotated in each annotated case.

    Returns:
        {case: what its pseudo label says something about}.
    """
    usable = {}
    for case in pseudo_cases(folder):
        label = open_pseudo_label(folder, case)  # and closed again: there may be more than files can be open
        if label.completes == annotations.get(case):
            usable[case] = label.annotation
    return usable


def with_annotated_share(cases: list[str], annotated: set[str], share: float) -> list[str]:
    """Repeats cases so that at least this share of them is annotated; nnU-Net draws each with the same probability.

    Raises:
        UserError: If the share is not from 0 to below 1.
    """
    if not 0 <= share < 1:
        raise UserError(f"setting annotated_share is {share}: it must be from 0 to below 1")
    true = sum(case in annotated for case in cases)
    if not true or true >= share * len(cases):
        return list(cases)
    repeats = round(10 * share / (1 - share) * (len(cases) - true) / true)
    return [case for case in cases for _ in range(repeats if case in annotated else 10)]


def class_locations(segmentation: np.ndarray, label_manager: LabelManager) -> dict:
    """Draws voxels of each class of a (1, X, Y, Z) label map, as nnU-Net's preprocessing does."""
    # nnU-Net 2.8.1 DefaultPreprocessor.run_case_npy; changed: nothing, it cannot be called for a label map alone
    collect = list(label_manager.foreground_regions if label_manager.has_regions else label_manager.foreground_labels)
    if label_manager.has_ignore_label:
        collect.append([-1, *label_manager.all_labels])
    return DefaultPreprocessor._sample_foreground_locations(segmentation, collect)


def _to_json(annotation: Annotation) -> dict[str, list]:
    return {"labels": sorted(annotation.labels), "unions": [list(union) for union in annotation.unions]}


def _from_json(content: Mapping[str, list]) -> Annotation:
    return Annotation(frozenset(content["labels"]), tuple(map(tuple, content["unions"])))


class PseudoLabelDataset(nnUNetBaseDataset):
    """Annotated cases and cases with pseudo labels in one nnU-Net data set, to train on; validate on annotated ones."""

    def __init__(self, annotated: nnUNetBaseDataset, images: Mapping[str, str], folder: str):
        """Puts them together.

        Args:
            annotated: nnU-Net's data set of the annotated training cases.
            images: {case with a pseudo label: folder of its preprocessed image}. That of a partly annotated case lies
                with the annotated ones; its pseudo label is the completed one and takes the place of its own.
            folder: Of the pseudo labels.
        """
        super().__init__("", sorted({*annotated.identifiers, *images}))
        self.annotated, self.images, self.folder = annotated, dict(images), folder

    def load_case(self, identifier: str) -> tuple:
        """Loads as nnU-Net does: image (C, X, Y, Z), labels (1, X, Y, Z), no previous stage, properties."""
        if identifier not in self.images:
            return self.annotated.load_case(identifier)
        image = open_array(os.path.join(self.images[identifier], identifier + ".b2nd"))
        label = open_pseudo_label(self.folder, identifier)
        return image, label.segmentation, None, {"class_locations": label.class_locations}

    @staticmethod
    def save_case(data, seg, properties, output_filename_truncated):
        """Refuses: this is not for writing."""
        raise NotImplementedError("images are written by preprocessing, pseudo labels by save_pseudo_label")

    @staticmethod
    def get_identifiers(folder: str) -> list[str]:
        """Lists the cases with pseudo labels in a folder."""
        return pseudo_cases(folder)


class IgnoringLabelManager(LabelManager):
    """Ignores the value after the highest label; outputs and the drawing of patches stay as dataset.json has them."""

    has_ignore_label = False

    def __init__(self, label_manager: LabelManager):
        super().__init__(label_manager.label_dict, label_manager.regions_class_order)
        self._ignore_label = max(self.all_labels) + 1


def ignoring(label_manager: LabelManager) -> LabelManager:
    """Returns a label manager with an ignore label: the same, if it has one, else one that ignores the next value."""
    return label_manager if label_manager.has_ignore_label else IgnoringLabelManager(label_manager)
