"""Tables, small JSONs and figures of the benchmarks that train."""

from pathlib import Path

import numpy as np

from nnunet_diffusion.files import atomic
from nnunet_diffusion.tables import defined, deviation, figure, mean, mean_over_organs, organ_means


def rounded(value: float) -> float | None:
    """Rounds to four digits, for JSON; None for what is not defined."""
    return round(value, 4) if defined([value]) else None


def compare(seeds: dict[int, float], control: dict[int, float]) -> list[float]:
    """Differences to the control arm, seed by seed."""
    return [seeds[seed] - control[seed] for seed in sorted(seeds) if seed in control]


def short(run: dict) -> dict:
    """Returns what is worth committing of a run."""
    return {
        "arm": run["arm"],
        "budget": run["budget"],
        "seed": run["seed"],
        "training_cases": run["training_cases"],
        "dice": rounded(mean_over_organs(run["dice"])),
        "dice_per_organ": {organ: rounded(value) for organ, value in organ_means(run["dice"]).items()},
        "train_seconds": run["seconds"]["train"],
    }


def summarize(runs: list[dict], control: str) -> tuple[str, dict]:
    """Sums runs up: a Markdown table, and the content of the small JSON; other arms are paired with `control`.

    A run's Dice is the mean over organs of the mean over test cases; `±` is the standard deviation over seeds.
    """
    shorts = [short(run) for run in runs]
    scores: dict[tuple[str, str], dict[int, float]] = {}
    for run in shorts:
        scores.setdefault((run["budget"], run["arm"]), {})[run["seed"]] = run["dice"]
    lines = ["| labels | arm | seeds | Dice | minus " + control + ", paired | better |", "|---|---|---|---|---|---|"]
    groups = []
    for (budget, arm), seeds in scores.items():
        dice = seeds.values()
        group = {
            "budget": budget,
            "arm": arm,
            "seeds": sorted(seeds),
            "mean": rounded(mean(dice)),
            "sd": rounded(deviation(dice)),
        }
        paired = compare(seeds, scores.get((budget, control), {})) if arm != control else []
        gain, better = "", ""
        if paired:
            group["minus_control"] = [round(d, 4) for d in paired]
            gain = figure(mean(paired), deviation(paired), sign="+")
            better = f"{sum(d > 0 for d in paired)} of {len(paired)}"
        groups.append(group)
        lines.append(f"| {budget} | {arm} | {len(seeds)} | {figure(mean(dice), deviation(dice))} | {gain} | {better} |")
    arms = {run["arm"]: run["protocol"] | {"trainer": run["trainer"]} for run in runs}
    content = {
        "arms": arms,
        "test_cases": runs[0]["test_cases"],
        "machine": runs[0]["machine"],
        "summary": groups,
        "runs": shorts,
    }
    return "\n".join(lines), content


def write_figure(content: dict, path: Path) -> None:
    """Draws mean and spread per arm over the label budgets, with every seed as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    budgets = list(dict.fromkeys(group["budget"] for group in content["summary"]))
    arms = list(dict.fromkeys(group["arm"] for group in content["summary"]))
    figure, axes = plt.subplots(figsize=(3.5 + 2.2 * len(budgets), 4.2), layout="constrained")
    for i, arm in enumerate(arms):
        shift = (i - (len(arms) - 1) / 2) * 0.6 / len(arms)
        groups = [group for group in content["summary"] if group["arm"] == arm]
        x = [budgets.index(group["budget"]) + shift for group in groups]
        mean, spread = [group["mean"] for group in groups], [group["sd"] or 0 for group in groups]
        line = axes.errorbar(x, mean, spread, fmt="o-", capsize=3, label=arm)
        dots = [(budgets.index(run["budget"]) + shift, run["dice"]) for run in content["runs"] if run["arm"] == arm]
        axes.plot(*zip(*dots, strict=True), ".", color=line[0].get_color(), alpha=0.4)
    protocol = next(iter(content["arms"].values()))
    axes.set(
        xticks=range(len(budgets)),
        xticklabels=budgets,
        xlabel="labeled cases (or per cent, or slices)",
        ylabel="Dice, mean over organs and test cases",
        title=f"{protocol['dataset']}, {protocol['configuration']}, {len(content['test_cases'])} test cases",
    )
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def write_arms_figure(content: dict, path: Path, control: str, scored: str = "", names: dict | None = None) -> None:
    """Draws each arm's Dice per organ, a dot a seed and a bar for their mean, with 90 % of the control's mean.

    Args:
        content: See `summarize`.
        path: Of the figure.
        control: An arm.
        scored: What was scored, if not the test cases.
        names: Of arms, for the legend.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    arms = list(dict.fromkeys(run["arm"] for run in content["runs"]))
    organs = ["mean", *content["runs"][0]["dice_per_organ"]]
    figure, axes = plt.subplots(figsize=(1.5 + 1.7 * len(organs), 4.2), layout="constrained")
    width = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        name = (names or {}).get(arm, arm)
        runs = [{"mean": run["dice"], **run["dice_per_organ"]} for run in content["runs"] if run["arm"] == arm]
        values = np.array([[run[organ] or 0 for organ in organs] for run in runs])
        x = np.arange(len(organs)) + (i - (len(arms) - 1) / 2) * width
        axes.bar(x, values.mean(0), 0.9 * width, label=name, alpha=0.6)
        axes.plot(np.broadcast_to(x, values.shape).ravel(), values.ravel(), ".", color="black", markersize=4)
        if arm == control:
            axes.plot(x, 0.9 * values.mean(0), "_", color="black", label=f"90 % of {name}")
    protocol = next(iter(content["arms"].values()))
    scored = scored or f"{len(content['test_cases'])} test cases"
    axes.set(
        xticks=range(len(organs)),
        xticklabels=organs,
        ylabel="Dice, mean",
        title=f"{protocol['dataset']}, {protocol['configuration']}, {scored}",
    )
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)
