"""Pictures of reports: a radar with intervals, bars for what is not a proportion. Needs matplotlib (extra `plot`)."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from .report import Score, TrustReport


def draw(reports: Sequence[TrustReport], path: str | os.PathLike, labels: Sequence[str] | None = None) -> Path:
    """Draw one or several reports of the same scores into one picture; see [`TrustReport.plot`]."""
    from matplotlib.figure import Figure

    labels = labels or [report.subject for report in reports]
    proportions = [score.name for score in reports[0].scores if score.kind == "proportion" and score.value is not None]
    proportions = [name for name in proportions if "/" not in name] or proportions  # details below a `/` stay out
    of_rows = bool(reports[0].rows and reports[0].meta.get("plot"))
    if len(proportions) >= 3 and not of_rows:
        figure = Figure(figsize=(7.5, 6.5), layout="constrained")
        axes = figure.add_subplot(projection="polar")
        for report, label in zip(reports, labels, strict=True):
            radar(axes, [report[name] for name in proportions], label)
        figure.suptitle(f"{reports[0].suite}, seed {reports[0].seed}")
        if len(reports) > 1:
            figure.legend(loc="outside lower center", ncols=2)
        else:
            axes.set_title(labels[0], pad=28, fontsize=9)
    else:
        panels = [] if of_rows else list(score_panels(reports[0]))
        panels = panels or list(row_panels(reports[0]))
        if not panels:
            raise ValueError(
                f"the report of {reports[0].subject} has nothing to draw: no score and no row with a number"
            )
        columns = min(3, len(panels))
        lines = math.ceil(len(panels) / columns)
        height = lines * (1.2 + 0.32 * max(len(names) for _, names, _ in panels))
        figure = Figure(figsize=(4.2 * columns, height), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for place, axes in enumerate(grid.flat):
            if place < len(panels):
                bars(axes, *panels[place])
            else:
                axes.set_visible(False)
        figure.suptitle(f"{reports[0].suite}: {labels[0]}", fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def radar(axes, scores: Sequence[Score], label: str) -> None:
    """Proportions on spokes, with their interval as a bar along the spoke and the no-answer share at its name."""
    angles = [2 * math.pi * place / len(scores) for place in range(len(scores))]
    values = [score.value for score in scores]
    (line,) = axes.plot([*angles, angles[0]], [*values, values[0]], marker="o", markersize=3, label=label)
    axes.fill([*angles, angles[0]], [*values, values[0]], alpha=0.12, color=line.get_color())
    for angle, score in zip(angles, scores, strict=True):
        if score.low is not None:
            axes.plot([angle, angle], [score.low, score.high], color=line.get_color(), linewidth=2, alpha=0.7)
    names = [
        score.name.replace("_", " ") + (f"\nno answer {score.no_answer:.0%}" if score.no_answer else "")
        for score in scores
    ]
    axes.set_xticks(angles, names, fontsize=9)
    axes.tick_params(axis="x", pad=8)
    for angle, name in zip(angles, axes.get_xticklabels(), strict=True):  # names grow away from the circle
        side = math.sin(angle)
        name.set_horizontalalignment("left" if side > 0.1 else "right" if side < -0.1 else "center")
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], [".25", ".5", ".75", "1"], fontsize=7)
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)


def bars(axes, title: str, names: Sequence[str], entries: Sequence[tuple]) -> None:
    """Horizontal bars, (value, low, high) each."""
    finite = [isinstance(v, (int, float)) and math.isfinite(v) for v, *_ in entries]
    values = [v if ok else 0.0 for (v, *_), ok in zip(entries, finite, strict=True)]
    axes.barh(range(len(names)), values, height=0.6)
    for place, ((value, low, high), ok) in enumerate(zip(entries, finite, strict=True)):
        if not ok:
            axes.text(0, place, " not measured" if value is None else f" {value}", va="center", fontsize=8)
        elif low is not None and high is not None:
            axes.plot([low, high], [place, place], color="black", linewidth=1.5)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    positive = [v for v in values if v > 0]
    if len(positive) == len(values) and max(positive) / min(positive) > 100:
        axes.set_xscale("log")


def score_panels(report: TrustReport):
    """One panel a unit, since nats and shares have no axis in common."""
    units = dict.fromkeys((score.kind == "proportion", score.unit) for score in report.scores)
    for proportion, unit in units:
        group = [s for s in report.scores if (s.kind == "proportion", s.unit) == (proportion, unit)]
        yield (
            unit or ("share" if proportion else ""),
            [s.name for s in group],
            [(s.value, s.low, s.high) for s in group],
        )


def row_panels(report: TrustReport):
    """One panel a column with numbers, up to nine."""
    if not report.rows:
        return
    first, *keys = report.rows[0]
    names = [str(row[first]) for row in report.rows]
    keys = [
        key
        for key in keys
        if any(isinstance(row.get(key), (int, float)) and not isinstance(row.get(key), bool) for row in report.rows)
        and not any(key.endswith(end) and key.removesuffix(end) in report.rows[0] for end in ("_low", "_high"))
    ]
    for key in report.meta.get("plot", keys[:9]):
        number = lambda value: value if isinstance(value, (int, float)) else None
        yield (
            key,
            names,
            [(number(row.get(key)), row.get(f"{key}_low"), row.get(f"{key}_high")) for row in report.rows],
        )
