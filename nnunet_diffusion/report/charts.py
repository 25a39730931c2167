"""Charts: drawn by matplotlib, embedded as SVG pictures, which can neither load nor run anything."""

import base64
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from nnunet_diffusion.tables import deviation, mean

WIDTH = 4.4  # inches; a chart is about 370 pixels wide on a phone and 500 on a desk, its text then 11 to 15 high
COLORS = ("#0072b2", "#c04e00", "#007a5a", "#9c4f86", "#5c5c5c", "#8a6d00")  # Okabe and Ito's, dark enough for text
INK, SOFT, GRID, DOT, MEAN = "#16232b", "#52626b", "#d5dde1", "#4c9ccb", "#b32400"
DASHES, MARKERS = ("-", "--", ":", "-.", (0, (5, 5)), (0, (1, 2))), "os^Dv"  # not told apart by color alone
STYLE = {
    "text.parse_math": False,  # names come from files: a $ is a $
    "svg.fonttype": "none",  # the browser's own fonts, which have more letters than matplotlib's
    "svg.hashsalt": "report",  # the same page at each run
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
Lines = Mapping[str, Sequence[Sequence[tuple[float, float]]]]  # kind, for instance training -> lines of (x, y)


@dataclass
class Chart:
    """A picture and what it shows, in words."""

    title: str
    description: str
    address: str  # a data URI
    width: float
    height: float


def chart(title: str, height: float, draw: Callable[..., str], *arguments) -> Chart:
    """Draws a chart without a display.

    Args:
        title: Above it.
        height: Inches.
        draw: One of the functions below: fills the axes and returns what they show, in words.
        *arguments: Of `draw`, behind the axes.
    """
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that matplotlib's font lacks: the browser has others
        sheet, buffer = Figure((WIDTH, height), layout="constrained"), io.BytesIO()
        axes = sheet.subplots()
        description = draw(axes, *arguments)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            sheet.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=2.4)
        sheet.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    address = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return Chart(title, f"{title}: {description}", address, round(100 * WIDTH), round(100 * height))


def draw_lines(axes: Axes, curves: Lines, x_label: str, y_label: str, limits=None) -> str:
    """Draws lines of several kinds; those of one kind, for instance the folds, share a color.

    Args:
        axes: Gets the lines.
        curves: Kind -> lines of (x, y).
        x_label: Of the axis.
        y_label: Of the axis.
        limits: Of the y axis; by default those of the values, on a logarithmic axis if they are positive and span more
            than a factor of 20.
    """
    for i, (name, lines) in enumerate(curves.items()):
        for number, line in enumerate(lines):
            how = {"color": COLORS[i % 6], "linestyle": DASHES[i % 6], "marker": "o" if len(line) == 1 else None}
            axes.plot(*zip(*line, strict=True), label="_" if number else label(name), linewidth=1.5, **how)
    axes.set(xlabel=x_label, ylabel=y_label, ylim=limits)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    values = [y for lines in curves.values() for line in lines for _, y in line]
    if limits is None and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:.2g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    ends = {name: " and ".join(f"{line[-1][1]:.3g}" for line in lines) for name, lines in curves.items()}
    return ", ".join(f"{name} ends at {found}" for name, found in ends.items())


def draw_strips(axes: Axes, rows: Mapping[str, Sequence[float]], x_label: str) -> str:
    """Draws a dot for each value from 0 to 1, a bar for the mean, a line for the standard deviation; a row a name."""
    for row, values in enumerate(rows.values()):
        shifts = (np.arange(len(values)) * 0.618034 % 1 - 0.5) * 0.5  # spread evenly, the same at each run
        axes.plot(values, row + shifts, ".", color=DOT, markersize=6.5, clip_on=False)
        if len(values):
            middle, spread = mean(values), np.nan_to_num(deviation(values))
            axes.plot(np.clip([middle - spread, middle + spread], 0, 1), [row, row], color=INK, linewidth=1.2)
            axes.plot([middle] * 2, [row - 0.35, row + 0.35], color=MEAN, linewidth=2.4)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel=x_label)
    axes.set_yticks(range(len(rows)), [label(name) for name in rows])
    axes.grid(False, axis="y")
    return "means " + ", ".join(f"{name} {mean(values):.3f}" for name, values in rows.items() if len(values))


def draw_budgets(axes: Axes, groups: Sequence[Mapping], runs: Sequence[Mapping], x_label: str, y_label: str) -> str:
    """Draws mean and standard deviation of each arm at each budget, joined to a curve, with a dot for each run.

    Args:
        axes: Gets the curves.
        groups: {"arm", "budget", "mean", "sd"} each; means from 0 to 1.
        runs: {"arm", "budget", "dice"} each.
        x_label: Of the budgets.
        y_label: Of the values.
    """
    budgets, arms = (list(dict.fromkeys(group[key] for group in groups)) for key in ("budget", "arm"))
    step = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        shift, how = (i - (len(arms) - 1) / 2) * step, {"color": COLORS[i % 6], "clip_on": False}
        own = [group for group in groups if group["arm"] == arm]
        x, y = [budgets.index(group["budget"]) + shift for group in own], [group["mean"] for group in own]
        spread = [[min(group["sd"] or 0, room(group["mean"])) for group in own] for room in (float, lambda m: 1 - m)]
        axes.errorbar(x, y, spread, label=label(arm), marker=MARKERS[i % 5], linestyle=DASHES[i % 6], **how)
        dots = [(budgets.index(r["budget"]), r["dice"]) for r in runs if r["arm"] == arm and r["budget"] in budgets]
        x, y = [x + shift + 0.3 * step for x, _ in dots], [y for _, y in dots]
        axes.plot(x, y, "o", markersize=3.5, fillstyle="none", **how)
    axes.set(ylim=(0, 1), xlim=(-0.5, len(budgets) - 0.5), xlabel=x_label, ylabel=y_label)
    axes.set_xticks(range(len(budgets)), [label(budget) for budget in budgets])
    axes.grid(False, axis="x")
    return ", ".join(f"{group['arm']} with {group['budget']}: {group['mean']:.3f}" for group in groups)


def label(name: str, most: int = 24) -> str:
    """Shortens a name; what cannot be printed, which XML may not hold, becomes a question mark."""
    name = "".join(letter if letter.isprintable() else "\ufffd" for letter in name)
    return name if len(name) <= most else name[: most - 1] + "…"
