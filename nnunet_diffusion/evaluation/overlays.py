"""Draws what was segmented: each arm's labels beside the reference, on the slices that show the most organs."""

import math
import os
from collections.abc import Mapping

import numpy as np
import SimpleITK as sitk

from nnunet_diffusion.errors import UserError
from nnunet_diffusion.image_files import save_figure

SOFT_TISSUE = (-160.0, 240.0)  # Hounsfield units: level 40, width 400
LEGEND_COLUMNS = 7


def draw_overlay(
    path: str | os.PathLike,
    image: str | sitk.Image,
    reference: str | sitk.Image,
    predictions: Mapping[str, str],
    labels: Mapping[str, int],
    title: str = "",
    is_ct: bool = True,
    slices: int = 2,
    reference_name: str = "reference",
) -> None:
    """Writes a PNG of one case: the image, the reference, and every arm's prediction with the reference as outline.

    Axial slices as radiologists look at them: the patient's right is on the left of the picture, the front on top.

    Args:
        path: The PNG.
        image: The image, 3-D, or its file.
        reference: Its labels, or their file.
        predictions: Heading of the column (for instance the arm and its Dice) -> file of predicted labels.
        labels: Name -> value in the label maps, for the legend; the background is left out.
        title: Above the picture.
        is_ct: Show Hounsfield units in a soft-tissue window; else between the 1st and 99th percentile.
        slices: Number of rows.
        reference_name: Heading of its column.
    """
    from matplotlib.figure import Figure  # without pyplot: needs no display and leaves no state behind

    image, spacing = read_axial(image)
    reference, _ = read_axial(reference)
    columns = {"image": None, reference_name: reference} | {arm: read_axial(f)[0] for arm, f in predictions.items()}
    colors = label_colors(labels)
    chosen = slices_to_show(reference, slices)
    top, bottom, left, right = bounding_box(image, is_ct)
    window = SOFT_TISSUE if is_ct else tuple(np.percentile(image, (1, 99)))
    legend_inches = 0.12 + 0.2 * math.ceil((len(colors) + bool(predictions)) / LEGEND_COLUMNS)
    height = 3.4 * (bottom - top) * spacing[1] / ((right - left) * spacing[2])
    figure = Figure(
        figsize=(3.4 * len(columns), height * len(chosen) + 0.55 + legend_inches), dpi=110, facecolor="white"
    )
    axes = figure.subplots(len(chosen), len(columns), squeeze=False)
    for number, (row, index) in enumerate(zip(axes, chosen, strict=True)):
        for axis, (heading, segmentation) in zip(row, columns.items(), strict=True):
            crop = (index, slice(top, bottom), slice(left, right))
            axis.imshow(image[crop], cmap="gray", vmin=window[0], vmax=window[1], aspect=spacing[1] / spacing[2])
            if segmentation is not None:
                axis.imshow(color_image(segmentation[crop], colors), aspect=spacing[1] / spacing[2])
            if heading in predictions:
                draw_outlines(axis, reference[crop], colors)
            axis.set_axis_off()
            if number == 0:
                axis.set_title(heading, fontsize=10, parse_math=False)
    add_legend(figure, colors, bool(predictions))
    figure.suptitle(title, fontsize=12, parse_math=False)  # names come from files: a $ is a $
    inches = figure.get_figheight()
    figure.subplots_adjust(0.005, legend_inches / inches, 0.995, 1 - 0.55 / inches, wspace=0.02, hspace=0.02)
    save_figure(figure, path)


def read_axial(scan: str | sitk.Image) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Turns a scan or that of a file to a (z, y, x) array, to the patient's head, back and left, and its spacing in mm.

    Raises:
        UserError: If the image is not 3-D.
    """
    image = sitk.ReadImage(scan) if isinstance(scan, str) else scan
    if image.GetDimension() != 3:
        raise UserError(f"{scan}: has {image.GetDimension()} dimensions, overlays are drawn of 3-D scans only")
    image = sitk.DICOMOrient(image, "LPS")
    return sitk.GetArrayFromImage(image), image.GetSpacing()[::-1]


def slices_to_show(reference: np.ndarray, count: int) -> list[int]:
    """Chooses axial slices with the largest shares of the organs, each organ counting the same, some distance apart."""
    per_slice = np.stack([(reference == value).sum((1, 2)) for value in np.unique(reference) if value > 0] or [[1.0]])
    share = np.broadcast_to((per_slice / per_slice.sum(1, keepdims=True)).mean(0), len(reference)).copy()
    chosen = []
    for _ in range(min(count, len(reference))):
        best = int(share.argmax())
        chosen.append(best)
        apart = max(1, np.count_nonzero(share) // 4)
        share[max(0, best - apart) : best + apart + 1] = -1
    return sorted(set(chosen), reverse=True)


def bounding_box(image: np.ndarray, is_ct: bool) -> tuple[int, int, int, int]:
    """Finds top, bottom, left and right of what is not air, with a small margin."""
    inside = (image > -300 if is_ct else image > np.percentile(image, 50)).mean(0) > 0.1
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not rows.size:
        return 0, image.shape[1], 0, image.shape[2]
    return (
        max(0, int(rows[0]) - 3),
        min(image.shape[1], int(rows[-1]) + 4),
        max(0, int(columns[0]) - 3),
        min(image.shape[2], int(columns[-1]) + 4),
    )


def label_colors(labels: Mapping[str, int]) -> dict[int, tuple[str, tuple[float, ...]]]:
    """Maps label values to name and RGB; the same labels get the same colors in every picture."""
    from matplotlib import colormaps

    names = {value: name for name, value in labels.items() if isinstance(value, int) and value > 0}
    palette = colormaps["tab10" if len(names) <= 10 else "tab20"].colors
    return {value: (names[value], palette[i % len(palette)]) for i, value in enumerate(sorted(names))}


def color_image(segmentation: np.ndarray, colors: Mapping[int, tuple[str, tuple[float, ...]]]) -> np.ndarray:
    """Draws a (y, x) label map as a translucent (y, x, 4) picture."""
    picture = np.zeros((*segmentation.shape, 4))
    for value, (_, color) in colors.items():
        picture[segmentation == value] = (*color, 0.55)
    return picture


def draw_outlines(axis, reference: np.ndarray, colors: Mapping[int, tuple[str, tuple[float, ...]]]) -> None:
    """Draws the outline of each label, light enough to be seen on the prediction of the same color."""
    for value, (_, color) in colors.items():
        if (reference == value).any():
            light = tuple(0.5 + 0.5 * c for c in color)
            axis.contour(reference == value, levels=[0.5], colors=[light], linewidths=1.2)


def add_legend(figure, colors: Mapping[int, tuple[str, tuple[float, ...]]], has_predictions: bool) -> None:
    """Names the organs below the picture."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(color=color, label=name.replace("_", " ")) for name, color in colors.values()]
    if has_predictions:
        handles.append(Line2D([], [], color="0.6", label="reference outline"))
    legend = figure.legend(
        handles=handles, loc="lower center", ncols=min(len(handles), LEGEND_COLUMNS), fontsize=8.5, frameon=False
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
