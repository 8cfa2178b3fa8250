"""Sudoku of 4 x 4 cells; the reward is graded.

A prompt is the grid, row by row, with a dot for an empty cell, `1.3.34..2.43.3.1=`; the completion is the full grid,
16 digits. The demonstrator fills the empty cells from the first to the last with a digit that its row and its column
still allow, and mostly forgets to look at the box.
"""

import random
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import permutations, product

from datasets import Dataset

from .base import Task, completion_text


HELD_OUT = 256  # puzzles that are never trained on, the same ones for every seed
EMPTY = 6  # cells to fill in
MAX_COMPLETION_LENGTH = 18  # 16 digits, the end token and one more

ROWS = tuple(tuple(range(4 * r, 4 * r + 4)) for r in range(4))
COLUMNS = tuple(tuple(range(c, 16, 4)) for c in range(4))
BOXES = tuple(tuple(8 * r + 2 * c + i for i in (0, 1, 4, 5)) for r in range(2) for c in range(2))
UNITS = ROWS + COLUMNS + BOXES  # each holds the digits 1 to 4 once in a solved grid
_LINES = [[i for unit in ROWS + COLUMNS if cell in unit for i in unit if i != cell] for cell in range(16)]
_ALL = [sorted({i for unit in UNITS if cell in unit for i in unit if i != cell}) for cell in range(16)]


@cache
def grids() -> list[str]:
    """All 288 full grids, as 16 digits each."""
    rows = ["".join(row) for row in permutations("1234")]
    full = ("".join(four) for four in product(rows, repeat=4))
    return [grid for grid in full if all(len({grid[i] for i in unit}) == 4 for unit in COLUMNS + BOXES)]


def draw(rng: random.Random, split: str = "train") -> tuple[str, str]:
    """A puzzle and a full grid that solves it, perhaps not the only one.

    A puzzle belongs to the test split if the CRC-32 of its text is a multiple of 16.
    """
    while True:
        grid = rng.choice(grids())
        cells = list(grid)
        for cell in rng.sample(range(16), EMPTY):
            cells[cell] = "."
        puzzle = "".join(cells)
        if (zlib.crc32(puzzle.encode()) % 16 == 0) == (split == "test"):
            return puzzle, grid


def _distinct(rng: random.Random, split: str) -> Iterator[str]:
    seen = set()
    while True:
        puzzle, _ = draw(rng, split)
        if puzzle not in seen:
            seen.add(puzzle)
            yield puzzle


def problems(split: str, n: int | None = None, seed: int = 0) -> Dataset:
    """Return `n` distinct puzzles as a dataset with the columns `prompt` ("1.3.34..2.43.3.1=") and `puzzle`.

    Args:
        split: `"train"`, drawn from `seed`, or `"test"`, [`HELD_OUT`] puzzles that `seed` only orders.
        n: How many; by default 8192 to train on, or all held-out ones.

    Raises:
        ValueError: For another split, or more puzzles than are held out.
    """
    if split == "train":
        rows = _distinct(random.Random(f"train {seed}"), split)
        chosen = [next(rows) for _ in range(8192 if n is None else n)]
    elif split == "test":
        if n is not None and not 0 <= n <= HELD_OUT:
            raise ValueError(f"n={n} is out of range; the test split has {HELD_OUT} puzzles")
        rows = _distinct(random.Random("held out"), split)
        chosen = [next(rows) for _ in range(HELD_OUT)]
        random.Random(seed).shuffle(chosen)
        chosen = chosen[:n]
    else:
        raise ValueError(f"split={split!r} does not exist; use 'train' or 'test'")
    return Dataset.from_dict({"prompt": [f"{puzzle}=" for puzzle in chosen], "puzzle": chosen})


def fill(puzzle: str, rng: random.Random, *, drop_box: float = 0.85, slip: float = 0.05) -> str:
    """Fill in `puzzle` from its first empty cell to its last, with mistakes.

    Args:
        puzzle: 16 characters, digits and dots.
        rng: Where the digits come from.
        drop_box: Probability, in each cell, of looking at row and column only.
        slip: Probability, in each cell, of any digit.

    Returns:
        16 digits. Where no digit is left, any is taken. Without mistakes the grid is solved more often than not, but
        not always: filling in from the first cell to the last can end in a corner.
    """
    cells = list(puzzle)
    for cell in range(16):
        if cells[cell] != ".":
            continue
        seen = _LINES[cell] if rng.random() < drop_box else _ALL[cell]
        taken = "" if rng.random() < slip else {cells[i] for i in seen}
        cells[cell] = rng.choice([digit for digit in "1234" if digit not in taken] or "1234")
    return "".join(cells)


def graded_reward(completions: Sequence, puzzle: Sequence[str], **kwargs) -> list[float]:
    """Fraction of the 12 rows, columns and boxes that hold each digit once; 1 is solved.

    0 for what is not 16 digits from 1 to 4, or changes a given one: a solved grid alone is no answer.

    Args:
        completions: Texts, or conversations whose last message is the completion.
        puzzle: The column `puzzle`, one entry a completion.
    """
    rewards = []
    for text, given in zip(map(completion_text, completions), puzzle, strict=True):
        kept = len(text) == 16 and all(a == b or (b == "." and a in "1234") for a, b in zip(text, given, strict=True))
        rewards.append(sum(len({text[i] for i in unit}) == 4 for unit in UNITS) / len(UNITS) if kept else 0.0)
    return rewards


TASK = Task(
    name="sudoku",
    problems=problems,
    reward=graded_reward,
    draw=lambda rng: draw(rng),
    demonstrate=lambda problem, rng, **mistakes: (f"{problem[0]}=", fill(problem[0], rng, **mistakes)),
    max_completion_length=MAX_COMPLETION_LENGTH,
    start={"steps": 300},
    teacher={"steps": 600, "drop_box": 0.0, "slip": 0.0},
)
