"""`trl-trust coopetition reproduce|sweep|...`: what a person or a script asks of this room in the terminal."""

import argparse
import csv
import time
from pathlib import Path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-trust coopetition", description="Trust and reputation between agents that cooperate and compete."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("reproduce", help="the published figures beside ours; exit status 1 if one differs")
    sweep = commands.add_parser("sweep", help="the metrics in every cell of a grid, as CSV and picture")
    sweep.add_argument("--grid", default="standard", help="standard (78,125 cells) or coarse")
    sweep.add_argument("--building", default="gap", choices=("gap", "product"), help="how trust grows")
    sweep.add_argument("--decay", default="regime", choices=("regime", "always"), help="when damage fades")
    sweep.add_argument("--out", type=Path, required=True, help="folder for sweep.csv and sweep.png")
    return parser


def main(words: list[str]) -> int:
    args = make_parser().parse_args(words)
    return {"reproduce": _reproduce, "sweep": _sweep}[args.command](args)


def _reproduce(args) -> int:
    from rich.console import Console
    from rich.table import Table

    from .study import reproduce

    start = time.perf_counter()
    figures = reproduce()
    table = Table("figure", "published", "ours", "same")
    for figure in figures:
        table.add_row(figure.name, figure.published, figure.ours, "yes" if figure.ok else "NO")
    Console().print(table)
    wrong = sum(not figure.ok for figure in figures)
    print(f"{len(figures)} figures, {wrong} differ; {time.perf_counter() - start:.1f} s.")
    return int(wrong > 0)


def _sweep(args) -> int:
    from .study import sweep

    cells = sweep(args.grid, building=args.building, decay=args.decay)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "sweep.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(cells)
        writer.writerows(zip(*(values.tolist() for values in cells.values()), strict=True))
    print(f"{len(cells['mu']):,} cells -> {path}")
    try:
        from .plots import plot_sweep

        print(f"picture -> {plot_sweep(cells, args.out / 'sweep.png')}")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        print("no picture: it needs matplotlib (pip install 'trl-trust[plot]').")
    return 0
