"""The data set: rows of verified problems, by seed, the same for any number of workers."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from io import BytesIO
from itertools import count, product
from multiprocessing import get_context
from typing import Any

from .check import verify_row
from .closure import Closure, Derived, Diagram
from .problems import GOALS, Problem, ancestry, goals, pose, tier_of
from .scene import Scene, draw, extend
from .text import STYLES, prompt, solution, trace


SPLITS = {"train": range(20, 100), "eval": range(10, 20), "test": range(10)}  # of 100 canonical forms
TRACES = ("none", "multi", "backtrack")


@dataclass(frozen=True)
class Settings:
    """What rows to make.

    Args:
        clauses: least and most constructions on the base triangle, in 0..12.
        min_steps, max_steps: steps of a proof.
        min_premise_ratio: of the premises of a scene, the share that a problem needs at least, in [0, 1].
        kinds: of goals.
        distractors: at most that many true premises that are not needed, 0..5.
        trace: what the column `trace` holds.
        solutions: at most that many proofs of a problem, 1..10.
        tier_edges: proof lengths at which the tiers begin.
        bootstrap_rounds: rounds in which the half of `pool` scenes with the longest proofs is extended, 0..10.
        style: `"prose"` or `"terse"`; a terse prompt is a line of text, the other a conversation.
        coordinates: say in the prompt where the points lie.
        images: a column `image` with the picture, a PNG; VLM trainers of TRL read it. A conversation's words stay as
            they are: TRL puts the image before them.
        image_size: of a side in pixels, 64 to 2048.
        max_attempts: scenes a row, on average, before it gives up.

    Raises:
        ValueError: for a value outside of these, naming the field.
    """

    clauses: tuple[int, int] = (2, 6)
    min_steps: int = 3
    max_steps: int = 12
    min_premise_ratio: float = 0.5
    kinds: Sequence[str] = ("angle", "length")
    distractors: int = 0
    trace: str = "none"
    solutions: int = 1
    tier_edges: Sequence[int] = (3, 6, 12, 24)
    bootstrap_rounds: int = 0
    pool: int = 16
    style: str = "prose"
    coordinates: bool = True
    images: bool = False
    image_size: int = 336
    max_attempts: int = 50

    def __post_init__(self):
        low, high = self.clauses
        edges = list(self.tier_edges)
        rules = [
            ("clauses", 0 <= low <= high <= 12, "two whole numbers in 0..12, the smaller first"),
            ("min_steps", 1 <= self.min_steps <= self.max_steps, "at least 1, and at most max_steps"),
            ("min_premise_ratio", 0 <= self.min_premise_ratio <= 1, "a number in [0, 1]"),
            ("kinds", bool(self.kinds) and set(self.kinds) <= set(GOALS), f"some of {', '.join(GOALS)}"),
            ("distractors", 0 <= self.distractors <= 5, "a whole number in 0..5"),
            ("trace", self.trace in TRACES, f"one of {', '.join(TRACES)}"),
            ("solutions", 1 <= self.solutions <= 10, "a whole number in 1..10"),
            ("tier_edges", bool(edges) and edges == sorted(set(edges)), "increasing whole numbers"),
            ("bootstrap_rounds", 0 <= self.bootstrap_rounds <= 10, "a whole number in 0..10"),
            ("pool", self.pool >= 2, "a whole number of at least 2"),
            ("style", self.style in STYLES, f"one of {', '.join(STYLES)}"),
            ("images", not self.images or self.style == "prose", "with style='prose' only: TRL wants a conversation"),
            ("image_size", 64 <= self.image_size <= 2048, "a whole number in 64..2048"),
            ("max_attempts", self.max_attempts >= 1, "a whole number of at least 1"),
        ]
        for name, fits, mend in rules:
            if not fits:
                raise ValueError(f"{name}={getattr(self, name)!r}: {mend}")


def canonical(problem: Problem) -> str:
    """A hash of premises and goal that no renaming of the points changes.

    Points are told apart by what is said of them, and of the points that they are named with, and so on.
    """
    said = [(fact.kind, fact.points, str(fact.value)) for fact in problem.premises]
    said.append((f"?{problem.goal.kind}", problem.goal.points, ""))
    color = dict.fromkeys(problem.points, "")
    digest = lambda thing: hashlib.blake2b(repr(thing).encode(), digest_size=8).hexdigest()
    for _ in range(len(color)):
        seen: dict[str, list] = {name: [] for name in color}
        for kind, names, value in said:
            for name in set(names):
                seen[name].append((kind, value, names.count(name), sorted(color[other] for other in names)))
        color = {name: digest((color[name], sorted(facts))) for name, facts in seen.items()}
    return digest(sorted((kind, value, sorted(color[name] for name in names)) for kind, names, value in said))


def split_of(form: str) -> str:
    """The split that a canonical form belongs to: no two share one, whatever the seeds."""
    bucket = int(form, 16) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


@lru_cache(maxsize=4)
def bootstrap(seed: str, pool: int, rounds: int, clauses: tuple[int, int]) -> list[Scene]:
    """Scenes grown from a pool: each round keeps the half with the longest proofs and extends each, twice."""
    scenes = [draw(f"{seed} {member}", clauses) for member in range(pool)]
    for turn in range(rounds):
        ranked = sorted(scenes, key=longest, reverse=True)[: (pool + 1) // 2]
        children = product(enumerate(ranked), (0, 1))
        grown = [extend(scene, random.Random(f"{seed} {turn} {i} {child}")) for (i, scene), child in children]
        scenes = grown[:pool]
    return scenes


def longest(scene: Scene) -> int:
    """Steps of the longest proof in the scene."""
    return max((steps for _, steps, _ in goals(Closure(scene.points, scene.premises), ("angle", "length"))), default=0)


def astray(problem: Problem, rng: random.Random) -> list[Derived]:
    """Up to four verified steps that follow from the premises and do not lead to the goal."""
    closure = Closure(Diagram(problem.points), problem.premises)
    on_the_way = ancestry(closure, [closure.prove(problem.goal)])
    ends = [i for i, d in enumerate(closure.derived) if d.rule and i not in on_the_way]
    if not ends:
        return []
    chain = sorted(p for p in ancestry(closure, [rng.choice(ends)]) if closure.derived[p].rule and p not in on_the_way)
    return [closure.derived[place] for place in chain][-4:]


def _attempt(number: int, seed: int, settings: Settings) -> tuple[dict[str, Any] | None, list[str]]:
    """The row of one scene, checked, or the filters that it fell to."""
    key, why = f"{seed} {number}", []
    rng = random.Random(f"row {key}")
    if settings.bootstrap_rounds:
        block, member = divmod(number, settings.pool)
        scene = bootstrap(f"{seed} block {block}", settings.pool, settings.bootstrap_rounds, tuple(settings.clauses))[
            member
        ]
    else:
        scene = draw(key, tuple(settings.clauses))
    problem = pose(
        scene,
        rng,
        steps=(settings.min_steps, settings.max_steps),
        kinds=settings.kinds,
        min_premise_ratio=settings.min_premise_ratio,
        solutions=max(settings.solutions, 2 if settings.trace == "multi" else 1),
        distractors=settings.distractors,
        tier_edges=settings.tier_edges,
        count=why.append,
    )
    if problem is None:
        return None, why
    row = as_row(problem, key, rng, settings)
    verify_row(row)
    return row, []


def as_row(problem: Problem, scene_id: str, rng: random.Random, settings: Settings) -> dict[str, Any]:
    """The row of a problem; points and solutions as JSON, since a data set's columns have one type."""
    asked = prompt(problem, rng, style=settings.style, coordinates=settings.coordinates)
    written = [
        [{"rule": step.rule, "fact": str(step.fact), "from": list(step.sources)} for step in proof.steps]
        for proof in problem.proofs
    ]
    if settings.style == "terse":
        text = solution(problem, problem.proofs[0], rng, style="terse")
    else:
        text = trace(problem, astray(problem, rng) if settings.trace == "backtrack" else [], rng, kind=settings.trace)
    length = len(written[0])
    return {
        "prompt": asked if settings.style == "terse" else [{"role": "user", "content": asked}],
        "answer": str(problem.goal.value),
        "goal": problem.goal.goal,
        "premises": [str(fact) for fact in problem.premises],
        "points": json.dumps({name: [round(x, 9), round(y, 9)] for name, (x, y) in problem.points.items()}),
        "solutions": json.dumps(written),
        "proof_length": length,
        "premise_ratio": problem.premise_ratio,
        "tier": tier_of(length, settings.tier_edges),
        "canonical": canonical(problem),
        "scene_id": scene_id,
        "trace": text,
        "completion": text if settings.style == "terse" else [{"role": "assistant", "content": text}],
        **({"image": png(problem, settings.image_size)} if settings.images else {}),
    }


def png(problem: Problem, size: int) -> dict[str, Any]:
    """The picture as `datasets` stores an image."""
    from .picture import draw_picture

    kept = BytesIO()
    draw_picture(problem.points, [*problem.premises, *problem.distractors], problem.goal, size).save(kept, "png")
    return {"bytes": kept.getvalue(), "path": None}


def rows(
    n: int, seed: int, settings: Settings, *, split: str = "train", tiers=None, workers: int = 1
) -> Iterator[dict]:
    """`n` rows of a split, or as many of each tier as `tiers` says, no canonical form twice.

    Raises:
        RuntimeError: after `max_attempts` scenes a row, naming the filter that most fell to.
    """
    wanted = dict(enumerate(tiers, 1)) if tiers else {0: n}
    total, fell, seen = sum(wanted.values()), Counter(), set()
    attempt = partial(_attempt, seed=seed, settings=settings)
    pool = get_context("spawn").Pool(workers) if workers > 1 else None
    try:
        source = map(attempt, count()) if pool is None else pool.imap(attempt, count(), chunksize=8)
        for tried, (row, why) in enumerate(source):
            if not any(wanted.values()):
                return
            if tried >= settings.max_attempts * total:
                name, times = (fell.most_common(1) or [("", 0)])[0]
                raise RuntimeError(
                    f"{sum(wanted.values())} rows of {total} not found in {tried} scenes: {times} fell to {name}"
                )
            fell.update(set(why))
            if row is None:
                continue
            place = row["tier"] if tiers else 0
            if row["canonical"] in seen or split_of(row["canonical"]) != split:
                fell["canonical"] += 1
            elif not wanted.get(place):
                fell["tiers"] += 1
            else:
                seen.add(row["canonical"])
                wanted[place] -= 1
                yield row
    finally:
        if pool is not None:
            pool.terminate()


def geometry_dataset(n: int = 1000, seed: int = 0, *, split: str = "train", tiers=None, workers: int = 1, **settings):
    """Verified problems of plane geometry as a data set for TRL.

    Args:
        n: rows.
        seed: any whole number; the same seed and settings make the same rows, for any number of workers.
        split: `"train"`, `"eval"` or `"test"`, which share no canonical form whatever the seeds.
        tiers: instead of `n`, how many rows of each tier, such as `(60, 60, 60, 60)`.
        workers: processes.
        settings: fields of [`Settings`].

    Returns:
        `datasets.Dataset` with the columns `prompt`, `answer` (`"45"`, `"2*sqrt(3)"`), `goal`, `premises`, `points`
        and `solutions` (JSON), `proof_length`, `premise_ratio`, `tier`, `canonical`, `scene_id`, and a text to
        imitate as `trace` and as `completion`, which SFT reads; with `images`, `image`. Every row has passed the
        independent checker.

    Raises:
        ValueError: for a setting out of its range.
        RuntimeError: where a filter leaves too few.
    """
    if n < 1 or split not in SPLITS:
        raise ValueError(f"n={n!r}, split={split!r}: n is at least 1 and split one of {', '.join(SPLITS)}")
    made = Settings(**settings)
    return as_dataset(list(rows(n, seed, made, split=split, tiers=tiers, workers=workers)))


def as_dataset(table: list[dict[str, Any]]):
    """`datasets.Dataset` of the rows, whose `image`, if they have one, is decoded when it is read."""
    from datasets import Dataset, Image

    made = Dataset.from_list(table)
    return made.cast_column("image", Image()) if "image" in made.column_names else made


def digest(table) -> str:
    """A hash of the rows, in their order: what names a test set that is not committed. Pictures are left out."""
    total = hashlib.blake2b(digest_size=8)
    for row in table:
        total.update(json.dumps({key: row[key] for key in sorted(row) if key != "image"}, sort_keys=True).encode())
    return total.hexdigest()
