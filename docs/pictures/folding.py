"""Draws folding.png: a conditional norm of the denoiser, and the plain norm that it becomes at one timestep.

Run it in this folder after a change: python folding.py
"""

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

BLUE, ORANGE, GRAY = "#0072b2", "#c04e00", "#52626b"
STEPS = ("convolution", "normalize:  z", "scale and shift", "nonlinearity")


def box(axis, x: float, y: float, text: str, color: str = GRAY, width: float = 2.6, filled: bool = False) -> None:
    """Draws a box around its center."""
    face = color if filled else "white"
    axis.add_patch(FancyBboxPatch((x - width / 2, y - 0.3), width, 0.6, "round,pad=0.04", fc=face, ec=color, lw=1.6))
    axis.text(x, y, text, ha="center", va="center", fontsize=10, color="white" if filled else "#16232b")


def arrow(axis, start: tuple[float, float], end: tuple[float, float], color: str = GRAY) -> None:
    """Draws an arrow from one box to another."""
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=color, lw=1.4))


def column(axis, x: float, title: str, formula: str, color: str) -> None:
    """Draws one block of the U-Net, from input to output."""
    axis.text(x, 5.35, title, ha="center", fontsize=11.5, weight="bold", color="#16232b")
    for number, step in enumerate(STEPS):
        y = 4.5 - 1.15 * number
        is_affine = number == 2
        text, edge, width = (formula, color, 3.9) if is_affine else (step, GRAY, 2.6)
        box(axis, x, y, text, edge, width, is_affine)
        if number < 3:
            arrow(axis, (x, y - 0.36), (x, y - 0.79))


def main() -> None:
    """Writes the picture."""
    figure = Figure(figsize=(10.5, 5.2), dpi=110, facecolor="white", layout="constrained")
    axis = figure.subplots()
    axis.set(xlim=(-0.3, 12.6), ylim=(-0.9, 5.8))
    axis.set_axis_off()
    column(axis, 5.0, "denoiser: every norm is told t", "(γ z + β) (1 + a(t)) + b(t)", ORANGE)
    column(axis, 10.3, "folded at t*: a stock network", "γ' z + β'", BLUE)
    box(axis, 1.0, 4.5, "timestep t", ORANGE, 2.0)
    box(axis, 1.0, 3.35, "embedding", ORANGE, 2.0)
    box(axis, 1.0, 2.2, "a(t),  b(t)", ORANGE, 2.0)
    arrow(axis, (1.0, 4.14), (1.0, 3.71), ORANGE)
    arrow(axis, (1.0, 2.99), (1.0, 2.56), ORANGE)
    arrow(axis, (2.1, 2.2), (2.95, 2.2), ORANGE)
    arrow(axis, (7.05, 2.2), (8.2, 2.2), BLUE)
    axis.text(7.6, 2.4, "t = t*", ha="center", fontsize=10, color=BLUE)
    text = "γ' = γ (1 + a(t*))        β' = β (1 + a(t*)) + b(t*)"
    axis.text(6.3, 0.05, text, ha="center", fontsize=12, color=BLUE)
    note = "constants for each channel: the same output, the same parameter names as nnU-Net's, no embedding left"
    axis.text(6.3, -0.5, note, ha="center", fontsize=10, color=GRAY)
    figure.savefig("folding.png")


if __name__ == "__main__":
    main()
