r"""Color pictures that look a little like stained glands, with labels: a 2-D RGB data set for tests and benchmarks.

As a program it writes a data set of folders for `nnunet_diffusion convert folder`:
    python tests/pictures.py FOLDER --labeled 60 --unlabeled 100
    nnunet_diffusion convert folder FOLDER/images FOLDER/labels --unlabeled FOLDER/more -d 502 -n Pictures \
        --labels gland --channel_names red green blue
"""

import argparse
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.io import imsave

STROMA, RIM, LUMEN, NUCLEUS = np.array([[205, 140, 180], [130, 70, 150], [235, 215, 230], [90, 50, 120]], float)


def picture(seed: int, size: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """A picture (size, size, 3) and its labels (size, size), both uint8: 1 in glands, wavy rings with a pale middle.

    Dark blobs without a middle, and pale ones without a ring, are no glands. Nuclei lie everywhere; color and light
    differ from picture to picture.
    """
    rng = np.random.default_rng(seed)
    label = np.zeros((size, size), np.uint8)
    image = np.broadcast_to(STROMA, (size, size, 3)).copy()
    image[gaussian_filter(rng.normal(size=(size, size)), 1) > 0.4] = NUCLEUS
    for kind in rng.permutation(["gland"] * rng.integers(1, 5) + ["dark", "pale"] * rng.integers(1, 4)):
        distance = _wavy_distance(rng, size)
        image[distance < 1] = LUMEN if kind == "pale" else RIM
        label[distance < 1] = kind == "gland"
        if kind == "gland":
            image[distance < rng.uniform(0.4, 0.75)] = LUMEN
    image = gaussian_filter(image, (1.2, 1.2, 0)) * rng.uniform(0.65, 1.25, 3)
    image *= 1 + 1.5 * gaussian_filter(rng.normal(size=(size, size)), size / 8)[..., None]
    return np.clip(image + rng.normal(0, 16, image.shape), 0, 255).astype(np.uint8), label


def _wavy_distance(rng: np.random.Generator, size: int) -> np.ndarray:
    """Distance (size, size) from a random point, 1 on a wavy line around it."""
    y, x = np.mgrid[:size, :size] / size
    (cy, cx), radius = rng.uniform(0.1, 0.9, 2), rng.uniform(0.06, 0.2)
    angle, waves = np.arctan2(y - cy, x - cx), rng.integers(2, 6)
    return np.hypot(y - cy, x - cx) / (radius * (1 + 0.25 * np.sin(waves * angle + rng.uniform(0, 6))))


def write_pictures(folder: Path, labeled: int, unlabeled: int, size: int = 96) -> None:
    """Writes `images`, `labels` and `more`, the pictures without labels, as PNG files."""
    for name in ("images", "labels", "more"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for seed in range(labeled + unlabeled):
        image, label = picture(seed, size)
        place = folder / ("images" if seed < labeled else "more")
        imsave(place / f"glands_{seed:03d}.png", image, check_contrast=False)
        if seed < labeled:
            imsave(folder / "labels" / f"glands_{seed:03d}.png", label, check_contrast=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--labeled", type=int, default=60)
    parser.add_argument("--unlabeled", type=int, default=100)
    parser.add_argument("--size", type=int, default=96, help="edge in pixels (default: %(default)s)")
    arguments = parser.parse_args()
    write_pictures(arguments.folder, arguments.labeled, arguments.unlabeled, arguments.size)
