"""Pictures of the sweep and of a case study, with matplotlib (`pip install trl-trust[plot]`)."""

from pathlib import Path

import numpy as np

from .study import METRICS, Case


def plot_sweep(cells: dict[str, np.ndarray], path: str | Path) -> Path:
    """Four histograms, one of each metric of the sweep, with median and the line at 1; returns `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, name in zip(figure.subplots(2, 2).flat, METRICS, strict=True):
        values = cells[name]
        axes.hist(values, bins=40, color="#4c72b0")
        axes.axvline(1, color="black", linewidth=1, label="1")
        axes.axvline(np.median(values), color="#c44e52", linestyle="--", label=f"median {np.median(values):.4f}")
        axes.set(title=name.replace("_", " "), ylabel="cells")
        axes.legend(loc="upper right")
    figure.suptitle(f"{len(values):,} settings of the trust dynamics")
    figure.savefig(path, dpi=120)
    return Path(path)


def plot_case(case: Case, path: str | Path) -> Path:
    """Trust and damage of both pairs of a case study over its steps, with the ends of its phases; returns `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    first, second = case.study.names
    for i, j, reader, color in ((0, 1, first, "#4c72b0"), (1, 0, second, "#dd8452")):
        other = second if reader == first else first
        axes.plot(case.trust[:, i, j], color=color, label=f"trust of {reader} in {other}")
        axes.plot(1 - case.damage[:, i, j], color=color, linestyle=":", label=f"ceiling, 1 - damage of {other}")
    for end in case.ends[:-1]:
        axes.axvline(end, color="gray", linewidth=0.8)
    axes.set(xlabel="step", ylim=(0, 1.02))
    axes.legend(loc="upper right", bbox_to_anchor=(0.63, 0.6))
    figure.savefig(path, dpi=120)
    return Path(path)
