"""Draws partial_labels.png: what a partly annotated case teaches plain nnU-Net, and what it teaches here.

Run it in this folder after a change: python partial_labels.py
"""

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunet_diffusion.demo.phantom import LABELS, phantom

RIGHT, LEFT, LIVER = (LABELS[name] for name in ("right_kidney", "left_kidney", "liver"))
CLASSES = {
    "liver": "#e69f00",
    "left or right kidney": "#0072b2",
    "background": "#404040",
    "background, or an organ nobody looked for": "#c8c8c8",
}
CASES = {"annotated: liver": {LIVER: 0}, "annotated: kidneys, side unknown": {RIGHT: 1, LEFT: 1}}


def main() -> None:
    """Writes the picture."""
    image, labels = phantom(3, (64, 144, 192), (5.0, 2.0, 2.0))
    organs = [(labels == value).sum((1, 2)) for value in (LIVER, RIGHT, LEFT)]
    z = int(np.argmax(np.min([count / count.max() for count in organs], 0)))
    image, labels = image[z], labels[z]
    figure = Figure(figsize=(10.5, 6.1), dpi=110, facecolor="white", layout="constrained")
    for row, (title, annotated) in zip(figure.subplots(2, 3), CASES.items(), strict=True):
        found = np.full(labels.shape, -1)
        for value, color in annotated.items():
            found[labels == value] = color
        missing = (labels > 0) & (found < 0)
        row[0].imshow(image, cmap="gray", vmin=-160, vmax=240)
        row[0].set_title(f"the scan; {title}", fontsize=10)
        row[1].set_title("plain nnU-Net is told", fontsize=10)
        row[2].set_title("PartialLabelTrainer is told", fontsize=10)
        for axis, rest in zip(row[1:], (2, 3), strict=True):
            shown = np.where(found < 0, rest, found)
            axis.imshow(shown, cmap=ListedColormap(list(CLASSES.values())), vmin=0, vmax=3, interpolation="nearest")
        row[1].contour(missing, levels=[0.5], colors="#ff4040", linewidths=1.2)
        for axis in row:
            axis.set_axis_off()
    handles = [Patch(color=color, label=name) for name, color in CLASSES.items()]
    handles.append(Patch(facecolor="none", edgecolor="#ff4040", label="an organ, told to be background"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    figure.savefig("partial_labels.png")


if __name__ == "__main__":
    main()
