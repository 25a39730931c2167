"""What pre-training looks like: loss curves, and samples beside real images."""

import matplotlib
import numpy as np

from nnunet_diffusion.image_files import save_figure

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


def loss_curves(path: str, train: list[float], held_out: list[float], rates: list[float]) -> None:
    """Draws losses and learning rate over the epochs."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=[3, 1])
    epochs = np.arange(1, len(train) + 1)
    top.plot(epochs, train, label="training images")
    top.plot(epochs[: len(held_out)], held_out, label="held-out images, averaged weights")
    top.set(ylabel="loss", yscale="log")
    top.legend()
    bottom.plot(epochs[: len(rates)], rates)
    bottom.set(xlabel="epoch", ylabel="learning rate")
    _save(figure, path)


def sample_sheet(path: str, samples: np.ndarray, real: np.ndarray, title: str = "") -> None:
    """Draws generated images under real ones, in the real ones' window (without real ones, in their own).

    Args:
        path: PNG to write.
        samples: (N, C, X, Y[, Z]); of 3-D patches the middle slice of the first axis is shown, of several channels
            the first.
        real: (M, C, X, Y[, Z]); M may be 0.
        title: Above the sheet.
    """
    low, high = np.percentile(real if len(real) else samples, [0.5, 99.5])
    columns = min(8, max(len(samples), len(real)))
    rows = [("real", chunk) for chunk in _chunks(real, columns)][:1]
    rows += [("sampled", chunk) for chunk in _chunks(samples, columns)]
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.6 * columns, 1.7 * len(rows)), squeeze=False)
    for row, (label, images) in zip(axes, rows, strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, image in zip(row, images, strict=False):
            picture = image[0] if image.ndim == 3 else image[0, image.shape[1] // 2]
            axis.imshow(picture, cmap="gray", vmin=low, vmax=high)
            axis.set_title(label, fontsize=7, pad=2)
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def _chunks(images: np.ndarray, size: int) -> list[np.ndarray]:
    return [images[i : i + size] for i in range(0, len(images), size)]


def _save(figure, path: str) -> None:
    save_figure(figure, path, dpi=110, bbox_inches="tight")
    plt.close(figure)
