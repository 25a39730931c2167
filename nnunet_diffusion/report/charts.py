"""Charts as inline SVG: sharp on every screen and on paper, with text that can be read, searched and enlarged."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from nnunet_diffusion.report.html import Html, element

WIDTH = 440  # in units of which text is 12 high: legible where the chart is as wide as a phone
COLORS = ("#0072b2", "#c04e00", "#007a5a", "#9c4f86", "#5c5c5c", "#8a6d00")  # Okabe and Ito's, dark enough for text
DASHES = (None, "7 3", "2 3", "9 3 2 3", "5 5", "1 2")

Points = Sequence[tuple[float, float]]


def line_chart(title: str, curves: Mapping[str, Sequence[Points]], x_label: str, y_label: str) -> Html:
    """Lines of several kinds; the lines of one kind (for instance the folds) share a colour.

    Args:
        title: Above it, and its name for those who cannot see it.
        curves: Kind -> lines of (x, y).
        x_label: Of the axis.
        y_label: Of the axis.
    """
    height, left, right, top, bottom = 250, 52, 16, 10, 40
    curves, is_log = _logarithms(curves)
    points = [point for lines in curves.values() for line in lines for point in line]
    xs, ys = zip(*points, strict=True)
    x_ticks, y_ticks = _ticks(min(xs), max(xs), 6), (_log_ticks if is_log else _ticks)(min(ys), max(ys), 5)
    scale_x = _scale(min(xs), max(xs), left, WIDTH - right)
    scale_y = _scale(min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)), height - bottom, top)
    parts = _frame(x_ticks, y_ticks, scale_x, scale_y, left, WIDTH - right, height - bottom, top, is_log)
    parts.append(_text((left + WIDTH - right) / 2, height - 6, x_label, "middle"))
    parts.append(_text(13, (top + height - bottom) / 2, y_label, "middle", rotate=True))
    for i, lines in enumerate(curves.values()):
        for line in lines:
            path = " ".join(f"{scale_x(x):.1f},{scale_y(y):.1f}" for x, y in _thinned(line))
            style = {"stroke": COLORS[i % 6], "stroke_dasharray": DASHES[i % 6], "fill": "none", "stroke_width": 1.8}
            parts.append(element("polyline", points=path, stroke_linejoin="round", **style))
            if len(line) == 1:
                x, y = line[0]
                parts.append(element("circle", cx=f"{scale_x(x):.1f}", cy=f"{scale_y(y):.1f}", r=3, fill=COLORS[i % 6]))
    ends = {name: [10 ** line[-1][1] if is_log else line[-1][1] for line in lines] for name, lines in curves.items()}
    last = ", ".join(f"{name} ends at {' and '.join(f'{end:.3g}' for end in found)}" for name, found in ends.items())
    return _figure(title, _svg(height, f"{title}: {last}", parts), _legend(list(curves)))


def strip_chart(title: str, rows: Mapping[str, Sequence[float]], x_label: str, limits=(0.0, 1.0)) -> Html:
    """A dot for each value, a bar for the mean, a line for the standard deviation; a row for each name.

    Args:
        title: Above it.
        rows: Name -> values; a row may be empty.
        x_label: Of the values' axis.
        limits: Of that axis.
    """
    step, left, right, top = 26, _label_width(rows), 14, 4
    bottom = top + step * len(rows)
    scale = _scale(*limits, left, WIDTH - right)
    parts = _frame(_ticks(*limits, 6), [], scale, None, left, WIDTH - right, bottom, top)
    for number, (name, values) in enumerate(rows.items()):
        y = top + step * (number + 0.5)
        parts.append(_text(left - 7, y + 4, _shortened(name), "end"))
        for i, value in enumerate(values):
            shift = ((i * 0.618034) % 1 - 0.5) * 12  # spread evenly, the same at each run
            parts.append(element("circle", cx=f"{scale(value):.1f}", cy=f"{y + shift:.1f}", r=2.2, class_="dot"))
        if values:
            mean, sd = float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            low, high = (min(max(v, limits[0]), limits[1]) for v in (mean - sd, mean + sd))
            parts.append(element("path", d=f"M{scale(low):.1f} {y}H{scale(high):.1f}", class_="spread"))
            parts.append(element("path", d=f"M{scale(mean):.1f} {y - 9}V{y + 9}", class_="mean"))
    parts.append(_text((left + WIDTH - right) / 2, bottom + 34, x_label, "middle"))
    means = ", ".join(f"{name} {np.mean(values):.3f}" for name, values in rows.items() if len(values))
    return _figure(title, _svg(bottom + 40, f"{title}. Means: {means}", parts), Html(""))


def budget_chart(title: str, groups: Sequence[Mapping], runs: Sequence[Mapping], x_label: str, y_label: str) -> Html:
    """Mean and standard deviation of each arm at each budget, joined to a curve, with a dot for each run.

    Args:
        title: Above it.
        groups: {"arm", "budget", "mean", "sd"} each.
        runs: {"arm", "budget", "dice"} each.
        x_label: Of the budgets.
        y_label: Of the values.
    """
    budgets, arms = (list(dict.fromkeys(group[key] for group in groups)) for key in ("budget", "arm"))
    height, left, right, top, bottom = 270, 52, 10, 10, 56
    values = [run["dice"] for run in runs] + [g["mean"] + s * (g["sd"] or 0) for g in groups for s in (-1, 1)]
    y_ticks = _ticks(min(values), max(values), 5)
    scale_y = _scale(min(y_ticks[0], min(values)), max(y_ticks[-1], max(values)), height - bottom, top)
    width = (WIDTH - left - right) / len(budgets)
    parts = _frame([], y_ticks, None, scale_y, left, WIDTH - right, height - bottom, top)
    centre = {budget: left + width * (i + 0.5) for i, budget in enumerate(budgets)}
    for budget in budgets:
        parts.append(_text(centre[budget], height - bottom + 17, budget, "middle"))
    for i, arm in enumerate(arms):
        color, shift = COLORS[i % 6], (i - (len(arms) - 1) / 2) * 0.6 * width / len(arms)
        for run in (run for run in runs if run["arm"] == arm):
            x, y = centre[run["budget"]] + shift + 6, scale_y(run["dice"])
            parts.append(element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.2, fill="none", stroke=color))
        own = [group for group in groups if group["arm"] == arm]
        curve = "M" + "L".join(f"{centre[g['budget']] + shift:.1f} {scale_y(g['mean']):.1f}" for g in own)
        parts.append(element("path", d=curve, fill="none", stroke=color, stroke_dasharray=DASHES[i % 6]))
        for group in own:
            x, mean, sd = centre[group["budget"]] + shift, group["mean"], group["sd"] or 0
            bar = f"M{x:.1f} {scale_y(mean - sd):.1f}V{scale_y(mean + sd):.1f}"
            parts.append(element("path", d=bar, stroke=color, stroke_width=1.6))
            parts.append(_marker(i, x, scale_y(mean), color))
    parts.append(_text((left + WIDTH - right) / 2, height - 20, x_label, "middle"))
    parts.append(_text(13, (top + height - bottom) / 2, y_label, "middle", rotate=True))
    said = ", ".join(f"{g['arm']} with {g['budget']}: {g['mean']:.3f}" for g in groups)
    return _figure(title, _svg(height, f"{title}: {said}", parts), _legend(arms, markers=True))


def share_bar(parts: Mapping[str, tuple[int, str]], total: int) -> Html:
    """A bar of shares of a total; the numbers stand beside it in the table that it is part of.

    Args:
        parts: What -> (how many, class of its colour).
        total: The whole length.
    """
    x, rectangles = 0.0, []
    for count, kind in parts.values():
        width = 100 * count / max(total, 1)
        rectangles.append(element("rect", x=f"{x:.2f}", y=0, width=f"{width:.2f}", height=10, class_=kind))
        x += width
    said = ", ".join(f"{what} {count}" for what, (count, _) in parts.items())
    return element("svg", element("title", said), *rectangles, viewBox="0 0 100 10", preserveAspectRatio="none",
                   role="img", aria_label=said, class_="share")  # fmt: skip


def _svg(height: float, description: str, parts: list[Html]) -> Html:
    box = f"0 0 {WIDTH} {height:.0f}"
    return element("svg", element("title", description), *parts, viewBox=box, role="img", aria_label=description)


def _figure(title: str, drawing: Html, legend: Html) -> Html:
    return element("figure", element("figcaption", title), legend, drawing, class_="chart")


def _legend(names: Sequence[str], markers: bool = False) -> Html:
    if len(names) < 2:
        return Html("")
    items = []
    for i, name in enumerate(names):
        style = {"stroke": COLORS[i % 6], "stroke_dasharray": DASHES[i % 6], "stroke_width": 2.4}
        sign = _marker(i, 13, 6, COLORS[i % 6]) if markers else element("path", d="M1 6H25", **style)
        items.append(element("li", element("svg", sign, viewBox="0 0 26 12", aria_hidden="true"), name))
    return element("ul", *items, class_="legend")


def _marker(number: int, x: float, y: float, color: str) -> Html:
    """Arms differ in shape, not in colour alone."""
    shapes = ("M-4 -4H4V4H-4Z", "M0 -5L5 4H-5Z", "M0 -5.5L5.5 0L0 5.5L-5.5 0Z", "M0 5L5 -4H-5Z", "M-5 -2H5V2H-5Z")
    if number % 6 == 0:
        return element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=4.5, fill=color)
    return element("path", d=shapes[number % 6 - 1], transform=f"translate({x:.1f} {y:.1f})", fill=color)


def _logarithms(curves: Mapping[str, Sequence[Points]]) -> tuple[dict[str, list[Points]], bool]:
    """Decimal logarithms of the values, where they are positive and span more than a factor of 20."""
    values = [y for lines in curves.values() for line in lines for _, y in line]
    if min(values) <= 0 or max(values) / min(values) < 20:
        return dict(curves), False
    return {name: [[(x, math.log10(y)) for x, y in line] for line in lines] for name, lines in curves.items()}, True


def _frame(x_ticks, y_ticks, scale_x, scale_y, left, right, bottom, top, is_log=False) -> list[Html]:
    parts = []
    for tick in x_ticks:
        parts.append(element("path", d=f"M{scale_x(tick):.1f} {top}V{bottom}", class_="grid"))
        parts.append(_text(scale_x(tick), bottom + 16, f"{tick:.6g}", "middle"))
    for tick in y_ticks:
        parts.append(element("path", d=f"M{left} {scale_y(tick):.1f}H{right}", class_="grid"))
        parts.append(_text(left - 6, scale_y(tick) + 4, f"{10**tick:.2g}" if is_log else f"{tick:.6g}", "end"))
    return parts


def _text(x: float, y: float, text: str, anchor: str, rotate: bool = False) -> Html:
    turn = f"rotate(-90 {x:.1f} {y:.1f})" if rotate else None
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, transform=turn)


def _scale(low: float, high: float, start: float, end: float):
    span = high - low or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers within [low, high], about `most` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Logarithms of round numbers within [low, high]; at least one."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [decade + math.log10(factor) for decade in decades for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= most:
            break
    return ticks or [high]


def _thinned(line: Points, most: int = 400) -> Points:
    """Means over neighbours where there are more points than a screen shows."""
    if len(line) <= most:
        return line
    return [tuple(np.mean(part, 0)) for part in np.array_split(np.array(line), most)]


def _label_width(names) -> float:
    return min(160.0, 16 + 6.4 * max((len(_shortened(name)) for name in names), default=0))


def _shortened(name: str, most: int = 22) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
