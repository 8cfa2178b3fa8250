"""`trl-trust plot RUN_DIR...`: what one or several runs did, in one picture, PNG and SVG.

It reads what a training run leaves in its `output_dir`: the log in `trainer_state.json` (there or in the last
checkpoint) and, to tell runs apart and to find those that differ by their seed alone, `trl_trust_recipe.yaml`. Runs
that differ by their seed are one line, their mean, with a band from the least to the largest.
"""

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from .lookup import near


STATE_FILE = "trainer_state.json"  # transformers' name
RECIPE_FILE = "trl_trust_recipe.yaml"

# What may differ between two runs that are one line: what names a run, and its randomness.
OF_ONE_RUN = ("seed", "data_seed", "output_dir", "logging_dir", "run_name", "hub_model_id", "resume_from_checkpoint")

# A panel is the first of its choices of which a run logs something: title, and metrics, solid and dashed.
PANELS = (
    (("reward", ("reward",)), ("loss", ("loss",))),
    (("entropy, nats a token", ("entropy",)), ("mean token accuracy", ("mean_token_accuracy",))),
    (("KL(old || new), nats a token", ("trust/kl",)), ("KL to the reference, nats a token", ("kl",))),
    (
        ("tokens without gradient; dashed: cut by the region", ("trust/zero_grad", "trust/cut")),
        ("tokens clipped", ("clip_ratio/region_mean",)),
    ),
    (("ratio, 99th percentile; dashed: largest", ("trust/ratio/p99", "trust/ratio/max")),),
    (("factor of the step control on the rate", ("trust/step_scale",)), ("learning rate", ("learning_rate",))),
)
ON_LOG_AXIS = ("trust/kl", "kl", "trust/ratio/p99")  # panels that begin with these, where they span a factor of `WIDE`
WIDE = 20


@dataclass(frozen=True)
class Run:
    """One run: its folder as given, the records of its log, and its settings, empty where no recipe was kept."""

    folder: Path
    history: list[dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)


def read_run(folder: str | Path) -> Run:
    """Read the log of a run and its recipe.

    Args:
        folder: `output_dir` of the run, or one of its checkpoints.

    Raises:
        ValueError: if it holds no log.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r}: no such folder; give the output_dir of a run")
    found = [json.loads(path.read_text("utf-8")) for path in folder.glob(f"checkpoint-*/{STATE_FILE}")]
    if (own := folder / STATE_FILE).exists():
        found.append(json.loads(own.read_text("utf-8")))
    state = max(found, key=lambda state: state["global_step"], default=None)
    if state is None:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{STATE_FILE}"))
        mend = f"give its runs, {', '.join(inside)}" if inside else "give the output_dir of a run"
        raise ValueError(f"{str(folder)!r} has no {STATE_FILE}, nor has a checkpoint in it; {mend}")
    history = [record for record in state["log_history"] if "loss" in record]
    if not history:
        raise ValueError(f"{str(folder)!r}: nothing was logged in training yet, see `logging_steps`")
    recipe = folder / RECIPE_FILE
    if not recipe.exists():
        return Run(folder, history)
    text = recipe.read_text("utf-8")
    command = re.match(r"# trl-trust ([\w-]+)", text)
    return Run(folder, history, {"command": command[1] if command else ""} | (yaml.safe_load(text) or {}))


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by label; those of one label differ by their seed alone.

    The label is what is different about the settings, or the folder where no recipe tells.
    """
    groups = defaultdict(list)
    for run in runs:
        own = {name: value for name, value in run.settings.items() if name not in OF_ONE_RUN}
        name = re.sub(r"seed[-_=]?\d+", "seed", str(run.folder))
        groups[json.dumps(own, sort_keys=True, default=str) if run.settings else name].append(run)
    settings = [group[0].settings for group in groups.values()]
    differ = [
        name
        for name in sorted({name for given in settings for name in given} - set(OF_ONE_RUN))
        if len({json.dumps(given.get(name), default=str) for given in settings}) > 1
    ]
    labels = {}
    for group in groups.values():
        first = group[0]
        stated = [
            str(first.settings[name]) if name == "command" else f"{name}={first.settings[name]}"
            for name in sorted(differ, key=lambda name: name != "command")
            if name in first.settings
        ]
        label = ", ".join(stated) if all(settings) and stated and len(differ) <= 4 else first.folder.name
        labels[label if label not in labels else str(first.folder)] = group
    return labels


def series(histories: Sequence[list[dict[str, Any]]], metric: str) -> tuple[list[int], list[list[float]]]:
    """Steps at which every history has a number for `metric`, and for each of them the numbers."""
    values = [
        {
            record["step"]: record[metric]
            for record in history
            if record.get(metric) is not None and math.isfinite(record[metric])  # NaN is saved as null
        }
        for history in histories
    ]
    steps = sorted(set.intersection(*map(set, values)))
    return steps, [[own[step] for own in values] for step in steps]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Centered moving mean over `window` values, fewer at the ends."""
    reach = window // 2
    parts = [values[max(i - reach, 0) : i + reach + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def choose(groups: Mapping[str, Sequence[list[dict]]], panels=PANELS) -> list[tuple[str, tuple[str, ...]]]:
    """The panels to draw: of each the first choice of which something is logged."""
    logged = {name for histories in groups.values() for history in histories for record in history for name in record}
    chosen = (next((choice for choice in panel if logged & set(choice[1])), None) for panel in panels)
    return [choice for choice in chosen if choice is not None]


def draw(groups: Mapping[str, Sequence[list[dict[str, Any]]]], paths: Sequence[Path], panels=PANELS) -> None:
    """Draw the histories of each label, one line with a band a label, to each of `paths`.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install trl-trust[plot]") from error

    chosen = choose(groups, panels)
    columns = min(3, len(chosen))
    rows = -(-len(chosen) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.4 + 0.2 * len(groups)), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
    handles = {}
    for axes, (title, metrics) in zip(all_axes, chosen, strict=False):
        lines, bands = [], []
        for i, (label, histories) in enumerate(groups.items()):
            for metric, style in zip(metrics, ("-", "--"), strict=False):
                steps, values = series(histories, metric)
                if not steps:
                    continue
                means = [sum(row) / len(row) for row in values]
                window = max(1, len(steps) // 40)
                look = {"color": f"C{i}", "linestyle": style}
                if len(histories) > 1:
                    edges = [smooth([edge(row) for row in values], window) for edge in (min, max)]
                    bands.append((steps, *edges, look["color"]))
                elif window > 1 and style == "-":
                    axes.plot(steps, means, color=look["color"], alpha=0.2, lw=0.8)
                (line,) = axes.plot(steps, smooth(means, window), lw=1.5, **look)
                handles.setdefault(label, line)
                lines += smooth(means, window)
        floor = min((value for value in lines if value > 0), default=math.inf)
        on_log = metrics[0] in ON_LOG_AXIS and max(lines) > WIDE * floor
        if on_log:
            axes.set_yscale("log", nonpositive="mask")
        for steps, low, high, color in bands:
            low = [max(value, floor) for value in low] if on_log else low  # an edge at 0 has no place on a log axis
            axes.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in all_axes[len(chosen) :]:
        axes.set_visible(False)
    for axes in all_axes[max(0, len(chosen) - columns) : len(chosen)]:
        axes.set_xlabel("optimizer step")
    names = [label if len(groups[label]) == 1 else f"{label} ({len(groups[label])} seeds)" for label in handles]
    figure.legend(handles.values(), names, loc="outside lower center", ncols=1 if max(map(len, names)) > 40 else 3)
    for path in paths:
        figure.savefig(path, dpi=150)


def table(groups: Mapping[str, Sequence[list[dict[str, Any]]]], panels=PANELS) -> Table:
    """The mean over the last tenth of the log of what is drawn, a column a label."""
    result = Table(box=None, pad_edge=False, caption="mean over the last tenth of the run")
    result.add_column("", no_wrap=True)
    for label in groups:
        result.add_column(label, justify="right")
    rows = {"seeds": [str(len(histories)) for histories in groups.values()]}
    rows["steps"] = [str(min(history[-1]["step"] for history in histories)) for histories in groups.values()]
    for metric in (name for _, names in choose(groups, panels) for name in names):
        rows[metric] = []
        for histories in groups.values():
            _, values = series(histories, metric)
            last = [x for row in values[-max(1, len(values) // 10) :] for x in row]
            rows[metric].append(f"{sum(last) / len(last):.4g}" if last else "-")
    for name, cells in rows.items():
        result.add_row(name, *cells)
    return result


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the words of the command line."""
    parser = argparse.ArgumentParser(
        prog="trl-trust plot",
        description="Draw what one or several runs did: reward, entropy, KL, share of tokens without gradient, tail "
        "of the ratio, step control. Runs that differ by their seed alone are one line with a band.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="output_dir of a run, or one of its checkpoints")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="STEM",
        help="writes STEM.png and STEM.svg (default: RUN_DIR/plot for one run, plot here for several)",
    )
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="draw these in the place of the usual ones")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """Draw the runs that the words of a command line name, and return the exit status.

    Raises:
        ValueError: for a folder without a log, or a metric that no run logs.
        ImportError: if matplotlib is not installed.
    """
    args = parse(words)
    runs = [read_run(folder) for folder in args.runs]
    groups = {label: [run.history for run in group] for label, group in group_runs(runs).items()}
    panels = PANELS
    if args.metrics:
        logged = sorted({name for run in runs for record in run.history for name in record} - {"step", "epoch"})
        for name in args.metrics:
            if name not in logged:
                raise ValueError(f"metrics={name!r} is not logged by these runs; {near(name, logged, n=3)}")
        panels = tuple((((name, (name,))),) for name in args.metrics)
    stem = args.output or (runs[0].folder / "plot" if len(runs) == 1 else Path("plot"))
    stem = stem.with_suffix("") if stem.suffix in (".png", ".svg") else stem
    paths = [stem.with_name(stem.name + suffix) for suffix in (".png", ".svg")]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    draw(groups, paths, panels)
    console = Console()
    console.print(table(groups, panels))
    console.print(f"Drawn to {paths[0]} and {paths[1].name}", soft_wrap=True, markup=False, highlight=False)
    return 0
