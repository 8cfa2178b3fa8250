"""`trl-trust geometry build|verify|show|eval`: what one asks of this room in the terminal."""

import argparse
import json
from pathlib import Path


SHARD = 1000  # rows of a file
MANIFEST = "MANIFEST"  # JSON; with the ending .json `load_dataset(folder)` would take it for data


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trl-trust geometry", description="Plane geometry whose answers and proofs are verified by construction."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="write a data set, in shards; goes on where it was stopped")
    build.add_argument("--n", type=int, default=1000, help="how many rows")
    build.add_argument("--tiers", type=int, nargs="+", help="instead of --n: how many rows of each tier")
    build.add_argument("--split", default="train", help="train, eval or test")
    build.add_argument("--seed", type=int, default=0)
    build.add_argument("--workers", type=int, default=1, help="processes; the rows are the same for any number")
    build.add_argument("--out", type=Path, required=True, help="folder for the shards, a manifest and a card")
    build.add_argument("--images", action="store_true", help="draw each problem: short for --set images=true")
    build.add_argument("--set", dest="settings", nargs="+", default=[], metavar="NAME=VALUE", help="e.g. max_steps=24")
    verify = commands.add_parser(
        "verify", help="the independent checker over every row; exit status 1 at the first bad one"
    )
    verify.add_argument("data", type=Path, help="a folder that build wrote")
    show = commands.add_parser("show", help="one problem with its proof")
    show.add_argument("seed", type=int)
    show.add_argument("--picture", type=Path, metavar="FILE", help="draw it too, for instance to figure.png")
    show.add_argument("--set", dest="settings", nargs="+", default=[], metavar="NAME=VALUE")
    evaluate = commands.add_parser("eval", help="accuracy of a model by tier, as a report")
    evaluate.add_argument("--model", required=True, help="a model id or folder")
    evaluate.add_argument("--data", type=Path, required=True, help="a folder that build wrote")
    evaluate.add_argument("--max-new-tokens", type=int, default=512)
    evaluate.add_argument("--batch-size", type=int, default=16)
    evaluate.add_argument("--out", type=Path, help="write the report here, as JSON")
    return parser


def main(words: list[str]) -> int:
    args = make_parser().parse_args(words)
    return {"build": _build, "verify": _verify, "show": _show, "eval": _eval}[args.command](args)


def settings_of(words: list[str]):
    """The settings from `name=value` words; values are read as JSON where they are, else as text.

    Raises:
        ValueError: for an unknown name, or a value out of its range.
    """
    from dataclasses import fields

    from ...lookup import near
    from .data import Settings

    names, given = [field.name for field in fields(Settings)], {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in names:
            raise ValueError(f"--set {word}: {near(name, names, 'the settings are {}')}")
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            given[name] = value.split(",") if name == "kinds" else value
    return Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def read(folder: Path) -> list[dict]:
    """The rows of a folder that `build` wrote, in their order."""
    import pyarrow.parquet

    shards = sorted(folder.glob("part-*.parquet"))
    if not shards:
        raise FileNotFoundError(f"{folder} holds no part-*.parquet: trl-trust geometry build --out {folder}")
    return [row for shard in shards for row in pyarrow.parquet.read_table(shard).to_pylist()]


def _build(args) -> int:
    """Rows come in a fixed order, so that a build which was stopped makes them again and skips the shards it has."""
    import os
    from dataclasses import asdict

    from rich.progress import Progress

    from .data import SPLITS, as_dataset, digest, rows

    settings = settings_of([*args.settings, *(["images=true"] if args.images else [])])
    if args.split not in SPLITS:
        raise ValueError(f"--split {args.split}: choose from {', '.join(SPLITS)}")
    total = sum(args.tiers) if args.tiers else args.n
    if total < 1:
        raise ValueError(f"--n {args.n}: at least 1")
    recipe = {"n": args.n, "tiers": args.tiers, "split": args.split, "seed": args.seed, **asdict(settings)}
    recipe = json.loads(json.dumps(recipe))  # tuples as lists
    args.out.mkdir(parents=True, exist_ok=True)
    manifest = args.out / MANIFEST
    if manifest.exists():
        before = json.loads(manifest.read_text())
        if before["recipe"] != recipe:
            differ = next(key for key in recipe if before["recipe"].get(key) != recipe[key])
            raise ValueError(
                f"{args.out} was begun with {differ}={before['recipe'].get(differ)!r}: give another --out"
            )
    manifest.write_text(json.dumps({"recipe": recipe, "rows": None, "digest": None}, indent=1) + "\n")

    waiting, made, shard = [], [], 0

    def write():
        path = args.out / f"part-{shard:05d}.parquet"
        if not path.exists():
            scratch = path.with_suffix(".part")
            as_dataset(waiting).to_parquet(scratch)
            os.replace(scratch, path)

    with Progress() as progress:
        bar = progress.add_task("verified problems", total=total)
        source = rows(args.n, args.seed, settings, split=args.split, tiers=args.tiers, workers=args.workers)
        for row in source:
            waiting.append(row)
            made.append(row)
            progress.advance(bar)
            if len(waiting) == SHARD:
                write()
                waiting, shard = [], shard + 1
        if waiting:
            write()
    done = {"recipe": recipe, "rows": len(made), "digest": digest(made)}
    manifest.write_text(json.dumps(done, indent=1) + "\n")
    (args.out / "README.md").write_text(_card(done))
    print(f"{len(made)} rows, digest {done['digest']} -> {args.out}")
    return 0


def _card(done: dict) -> str:
    recipe = json.dumps(done["recipe"], indent=1)
    return (
        "# Verified problems of plane geometry\n\n"
        "Made by `trl-trust geometry build`, after TrustGeoGen (arXiv 2504.15780); every answer is proved, and every\n"
        "proof has passed an independent checker. Columns and rewards: docs/geometry.md of trl-trust.\n\n"
        f"{done['rows']} rows, digest `{done['digest']}`, from\n\n```json\n{recipe}\n```\n"
    )


def _verify(args) -> int:
    from rich.progress import track

    from .check import verify_row

    found = read(args.data)
    for number, row in enumerate(track(found, description="checking")):
        try:
            verify_row(row)
        except ValueError as error:
            print(f"row {number} ({row['scene_id']}): {error}")
            return 1
    print(f"{len(found)} rows, all verified")
    return 0


def _show(args) -> int:
    import random

    from .data import astray, canonical, split_of
    from .picture import draw_picture
    from .problems import pose
    from .scene import draw
    from .text import prompt, trace

    settings, key = settings_of(args.settings), f"show {args.seed}"
    rng = random.Random(key)
    for attempt in range(settings.max_attempts):
        problem = pose(
            draw(f"{key} {attempt}", tuple(settings.clauses)),
            rng,
            steps=(settings.min_steps, settings.max_steps),
            kinds=settings.kinds,
            min_premise_ratio=settings.min_premise_ratio,
            solutions=settings.solutions,
        )
        if problem is not None:
            form = canonical(problem)
            print(prompt(problem, rng, style=settings.style, coordinates=settings.coordinates))
            print(f"\n{trace(problem, astray(problem, rng), rng, kind=settings.trace)}")
            if args.picture:
                drawn = draw_picture(problem.points, [*problem.premises, *problem.distractors], problem.goal)
                drawn.save(args.picture)
            print(f"\n{len(problem.proofs[0].steps)} steps, canonical form {form} ({split_of(form)})")
            return 0
    raise ValueError(f"seed {args.seed}: no problem in {settings.max_attempts} scenes with these settings")


def _eval(args) -> int:
    import torch
    from rich.progress import Progress
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ...evaluation.generation import generate
    from ...evaluation.report import Score, TrustReport
    from .rewards import geometry_reward

    found = read(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = "auto" if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    asked = [row["prompt"] for row in found]
    if isinstance(asked[0], str):
        asked = [[{"role": "user", "content": text}] for text in asked]
    with Progress() as progress:
        bar = progress.add_task("answering", total=len(asked))
        said = generate(
            model,
            tokenizer,
            asked,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            on_batch=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    right = geometry_reward(said, answer=[row["answer"] for row in found], goal=[row["goal"] for row in found])
    by_tier: dict[str, dict[str, float]] = {"accuracy": {}}
    for number, (row, score) in enumerate(zip(found, right, strict=True)):
        key = f"{number} {row['scene_id']}"
        by_tier["accuracy"][key] = score
        by_tier.setdefault(f"accuracy/tier_{row['tier']}", {})[key] = score
    scores = [Score.from_outcomes(name, outcomes) for name, outcomes in sorted(by_tier.items())]
    report = TrustReport(subject=args.model, suite="geometry", scores=tuple(scores), meta={"data": str(args.data)})
    print(report.to_markdown())
    if args.out:
        print(report.save(args.out))
    return 0
