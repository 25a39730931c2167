"""Pictures of one case: slices in three planes, with prediction and reference as layers above the scan."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import Image
from scipy import ndimage

from nnunet_diffusion.evaluation.overlays import SOFT_TISSUE, bounding_box, label_colors, read_axial

WIDEST = 1400  # pixels of a picture that is embedded as it is
LONGEST = 300  # pixels of the longest axis of a case; all its planes have the same scale
PLANES = {"axial": ("R", "L", "A", "P"), "coronal": ("R", "L", "S", "I"), "sagittal": ("A", "P", "S", "I")}
FILL, OUTLINE = 110, 255  # opacity of the layers, of 255


@dataclass
class Picture:
    """A picture of the results; its address is a data URI."""

    address: str
    alt: str
    width: int
    height: int


@dataclass
class Plane:
    """The slices of one plane.

    Attributes:
        name: "axial", "coronal" or "sagittal".
        sides: What is at the left, right, top and bottom of the picture.
        size: Width and height in pixels.
        positions: Number of each slice, counted from 1, of `total`.
        total: Slices that the scan has in this plane.
        start: Index into `positions` of the slice that shows most organs.
        layers: "scan", "prediction", "reference" -> a data URI for each slice.
    """

    name: str
    sides: tuple[str, str, str, str]
    size: tuple[int, int]
    positions: list[int]
    total: int
    start: int
    layers: dict[str, list[str]]


def case_planes(
    image_file: str, reference_file: str, prediction_file: str, labels: Mapping, is_ct: bool, most: int
) -> list[Plane]:
    """Cuts three planes of a case as radiologists look at them: the patient's right on the left, front or head on top.

    Args:
        image_file: The scan's first channel, 3-D.
        reference_file: Its labels.
        prediction_file: The predicted labels, on the same voxels.
        labels: Of dataset.json.
        is_ct: Show Hounsfield units in a soft-tissue window; else between the 1st and 99th percentile.
        most: Slices a plane.

    Raises:
        ValueError: If the files do not lie on each other, or are not 3-D.
    """
    (image, spacing), (reference, _), (prediction, _) = map(read_axial, (image_file, reference_file, prediction_file))
    if not image.shape == reference.shape == prediction.shape:
        raise ValueError(f"{prediction_file}: has {prediction.shape} voxels, its scan {image.shape}")
    low, high = SOFT_TISSUE if is_ct else np.percentile(image, (1, 99))
    gray = ((image.astype(np.float32) - low) / max(high - low, 1e-6)).clip(0, 1) * 255
    top, bottom, left, right = bounding_box(image, is_ct)
    box = (slice(None), slice(top, bottom), slice(left, right))
    volumes = {"scan": gray[box].astype(np.uint8), "prediction": prediction[box], "reference": reference[box]}
    scale = LONGEST / max(count * mm for count, mm in zip(volumes["scan"].shape, spacing, strict=True))
    return [_plane(name, i, volumes, spacing, scale, organ_colors(labels), most) for i, name in enumerate(PLANES)]


def organ_colors(labels: Mapping) -> dict[int, tuple[str, tuple[float, ...]]]:
    """Maps label values to name and RGB; with regions the name is that of the smallest one with the value."""
    regions = sorted(((len(v), name, v) for name, v in labels.items() if isinstance(v, list)), reverse=True)
    values = {name: value for name, value in labels.items() if isinstance(value, int) and name != "ignore"}
    if regions:
        smallest = {value: name for _, name, region in regions for value in region}
        values |= {name: value for value, name in smallest.items()}
    return label_colors(values)


def read_picture(path: str, alt: str) -> Picture:
    """Reads a picture of the results and makes it anew in a smaller format."""
    with Image.open(path) as image:
        image = image.convert("RGB")
    image.thumbnail((WIDEST, WIDEST * 4))
    return Picture(data_uri(image, quality=75), alt, *image.size)


def data_uri(picture: Image.Image, **options) -> str:
    """Encodes a picture in the place of its address; WebP unless `format` is given."""
    buffer = io.BytesIO()
    options = {"format": "webp", "method": 4, **options}
    picture.save(buffer, **options)
    return f"data:image/{options['format'].lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _plane(name: str, axis: int, volumes: Mapping, spacing, scale: float, colors, most: int) -> Plane:
    turned = {key: np.moveaxis(volume, axis, 0) for key, volume in volumes.items()}
    if axis > 0:  # the head on top
        turned = {key: volume[:, ::-1] for key, volume in turned.items()}
    rows_mm, columns_mm = (spacing[i] for i in range(3) if i != axis)
    count, rows, columns = turned["scan"].shape
    size = max(1, round(columns * columns_mm * scale)), max(1, round(rows * rows_mm * scale))
    chosen = slices_to_show(turned["reference"] > 0, turned["prediction"] > 0, most)
    organs = [(turned["reference"][i] > 0).sum() for i in chosen]
    return Plane(
        name,
        PLANES[name],
        size,
        [i + 1 for i in chosen],
        count,
        int(np.argmax(organs)),
        {
            "scan": [data_uri(_resized(turned["scan"][i], size, Image.BICUBIC), quality=60) for i in chosen],
            "prediction": [_layer(turned["prediction"][i], size, colors, outline=False) for i in chosen],
            "reference": [_layer(turned["reference"][i], size, colors, outline=True) for i in chosen],
        },
    )


def slices_to_show(reference: np.ndarray, prediction: np.ndarray, most: int) -> list[int]:
    """Spreads slices evenly over what is segmented and one beyond on each side; over everything if nothing is."""
    found, last = np.flatnonzero((reference | prediction).any((1, 2))), len(reference) - 1
    first, last = (max(0, found[0] - 1), min(last, found[-1] + 1)) if found.size else (0, last)
    return sorted(set(np.linspace(first, last, most).round().astype(int).tolist()))


def _layer(labels: np.ndarray, size: tuple[int, int], colors: Mapping, outline: bool) -> str:
    """Draws a transparent picture, a color an organ; organs are enlarged one by one, so that their edges are smooth."""
    picture = np.zeros(size[::-1], np.uint8)
    palette, opacity = [0, 0, 0], [0]
    for index, (value, (_, color)) in enumerate(colors.items(), start=1):
        palette += [round(255 * (0.5 + 0.5 * c if outline else c)) for c in color]
        opacity.append(OUTLINE if outline else FILL)
        if (labels == value).any():
            mask = np.asarray(_resized((labels == value).astype(np.uint8) * 255, size, Image.BILINEAR)) > 127
            picture[mask & ~ndimage.binary_erosion(mask, iterations=2) if outline else mask] = index
    layer = Image.fromarray(picture, "P")
    layer.putpalette(palette)
    return data_uri(layer, format="PNG", transparency=bytes(opacity), optimize=True)


def _resized(picture: np.ndarray, size: tuple[int, int], how: int) -> Image.Image:
    return Image.fromarray(picture).resize(size, how)
