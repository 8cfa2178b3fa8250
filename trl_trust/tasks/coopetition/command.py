"""`trl-trust coopetition reproduce|sweep|play|istar|data|start`: what one asks of this room in the terminal."""

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
    play = commands.add_parser("play", help="play against a partner, in this terminal")
    play.add_argument("--partner", default="trust_responsive", help="who plays against you")
    play.add_argument("--rounds", type=int, default=8)
    play.add_argument("--reward", default="reciprocal", help="what you are paid for")
    play.add_argument("--seed", type=int, default=0, help="of a random or mixed partner")
    istar = commands.add_parser("istar", help="dependence, baselines and trust from a model drawn with piStar")
    istar.add_argument("model", type=Path, help="the JSON file that piStar saved")
    istar.add_argument("--dot", type=Path, help="write the graph here, for Graphviz")
    data = commands.add_parser("data", help="write rows for training in the environment")
    data.add_argument("--n", type=int, default=512, help="how many rows")
    data.add_argument("--partners", nargs="+", default=["trust_responsive"], help="each row draws one")
    data.add_argument("--seed", type=int, default=0)
    data.add_argument("--out", type=Path, required=True, help="a .jsonl file")
    begin = commands.add_parser("start", help="build the tiny policy that the offline recipe trains")
    begin.add_argument("--rounds", type=int, default=8)
    begin.add_argument("--seed", type=int, default=0)
    begin.add_argument("--out", type=Path, required=True, help="folder for the model and its data set")
    return parser


def main(words: list[str]) -> int:
    args = make_parser().parse_args(words)
    run = {"reproduce": _reproduce, "sweep": _sweep, "play": _play, "istar": _istar, "data": _data, "start": _start}
    return run[args.command](args)


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


def _play(args) -> int:
    from .environment import CoopetitionEnv, make_game
    from .game import LARGEST

    env = CoopetitionEnv(make_game(partner=args.partner, rounds=args.rounds, reward=args.reward))
    print(env.reset(seed=args.seed))
    while len(env._own) < args.rounds:
        try:
            word = input("You invest: ").strip()
        except (EOFError, KeyboardInterrupt):
            print("\nYou left; the rounds that remain count as amounts of 0.")
            break
        if not (word.isascii() and word.isdigit() and len(word) < 3 and int(word) <= LARGEST):
            print(f"A whole number from 0 to {LARGEST}, please.")
            continue
        print(env.invest(int(word)))
    print(f"Your reward: {env.get_reward():.3f} (0: myopic play, 1: the best plan known).")
    return 0


def _istar(args) -> int:
    from rich.console import Console
    from rich.table import Table

    from .istar import load_istar

    network = load_istar(args.model)
    table = Table("depends on ->", *network.actors, "baseline")
    for actor, row, baseline in zip(network.actors, network.D, network.baselines, strict=True):
        table.add_row(actor, *(f"{value:.3f}" for value in row), f"{baseline:g}")
    Console().print(table)
    print("trust at the start:", network.trust0.tolist())
    for warning in network.warnings:
        print(f"assumed: {warning}")
    if args.dot:
        args.dot.write_text(network.to_dot() + "\n", "utf-8")
        print(f"graph -> {args.dot}")
    return 0


def _data(args) -> int:
    from .environment import coopetition_dataset

    args.out.parent.mkdir(parents=True, exist_ok=True)
    coopetition_dataset(args.n, args.partners, args.seed).to_json(args.out)
    print(f"{args.n} rows -> {args.out}")
    return 0


def _start(args) -> int:
    from .environment import coopetition_dataset, make_game
    from .start import build_start

    folder = build_start(args.out, make_game(rounds=args.rounds), seed=args.seed)
    coopetition_dataset(512, seed=args.seed).to_json(folder / "train.jsonl")
    print(f"model and train.jsonl -> {folder}")
    return 0
