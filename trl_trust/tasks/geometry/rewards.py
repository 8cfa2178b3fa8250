r"""Rewards of geometry: the exact answer, and the share of a proof that was found, without a judge model.

Both read the columns of [`geometry_dataset`] and give `None`, which the trainer skips, for rows of another data set.
No text makes them raise or takes them long.
"""

import json
from collections.abc import Callable
from functools import lru_cache

from ...rewards import completion_text, last_box
from .answer import parse_answer
from .claims import claims
from .facts import Fact, holds, parse_fact, parse_value


MODES = ("strict", "graded")


def geometry_reward(
    completions, answer=None, goal=None, log_extra: Callable | None = None, **kwargs
) -> list[float | None]:
    r"""1.0 where the last `\boxed{}` holds the answer, else 0.0.

    The answer may be written in any way that [`parse_answer`] reads, or as a decimal within 1e-3, relative, absolute
    below 1. No box, two values in it, or a sum: 0.

    Args:
        completions: text, or lists of messages whose last one holds the answer.
        answer, goal: columns of the data set.
        log_extra: given by the trainer: adds a column to the table of completions.

    Returns:
        One reward a completion; `None` for a row without a goal.
    """
    goal = [None] * len(completions) if goal is None else goal
    answer = [None] * len(completions) if answer is None else answer
    boxes = [last_box(completion_text(completion)) for completion in completions]
    if log_extra is not None:
        log_extra("answer", [str(box) for box in boxes])
    return [_score(box, a) if g is not None else None for box, a, g in zip(boxes, answer, goal, strict=True)]


def _score(box: str | None, answer: str) -> float:
    number = None if box is None else parse_answer(box)
    return float(number is not None and number.is_close(parse_value(answer)))


def step_reward(mode: str = "strict", w_false: float = 1.0, step_bound: int | None = None) -> Callable:
    """A reward function for the steps of a proof; [`geometry_step_reward`] is the one with these defaults.

    A claim that is false in the diagram is false. One that a proof of the row derives is good, once; a premise, a
    repetition or another truth is neutral. With n_need the steps of a proof, the one that scores best,

        strict   -w_false n_false / n_claims if there is a false claim, else n_good / n_need
        graded   clip(n_good / n_need - w_false n_false / n_claims, -1, 1)

    and 0 without a claim.

    Args:
        mode: one of [`MODES`].
        w_false: in (0, 1].
        step_bound: a claim is good only if at most that many steps of the proof, itself included, lead to it from what
            was given or said before.

    Raises:
        ValueError: for a value outside of these.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose from {', '.join(MODES)}")
    if isinstance(w_false, bool) or not (isinstance(w_false, int | float) and 0 < w_false <= 1):
        raise ValueError(f"w_false={w_false!r}: a number in (0, 1]")
    if step_bound is not None and (isinstance(step_bound, bool) or not isinstance(step_bound, int) or step_bound < 1):
        raise ValueError(f"step_bound={step_bound!r}: None, or a whole number of at least 1")

    def geometry_step_reward(completions, goal=None, points=None, premises=None, solutions=None, **kwargs):
        """Rewards of the steps; `None` for a row without a goal."""
        if goal is None or points is None or premises is None or solutions is None:
            return [None] * len(completions)
        rows = zip(completions, goal, points, premises, solutions, strict=True)
        return [
            None if g is None else _steps(completion_text(completion), _figure(p), given, s, mode, w_false, step_bound)
            for completion, g, p, given, s in rows
        ]

    return geometry_step_reward


geometry_step_reward = step_reward()


def _figure(points) -> dict[str, tuple[float, float]]:
    points = json.loads(points) if isinstance(points, str) else points
    return {name: (place[0], place[1]) for name, place in points.items() if place is not None}


@lru_cache(maxsize=4096)
def _read(text: str) -> Fact:
    return parse_fact(text)


def _steps(text: str, figure: dict, premises, solutions, mode: str, w_false: float, step_bound: int | None) -> float:
    solutions = json.loads(solutions) if isinstance(solutions, str) else solutions
    said = claims(text)
    if not said:
        return 0.0
    false = sum(not _is_true(fact, figure) for fact in said)
    given = {_read(premise) for premise in premises}
    best = 0.0
    for steps in solutions:
        facts = [_read(step["fact"]) for step in steps]
        best = max(best, _good(said, facts, steps, given, step_bound) / len(facts))
    penalty = w_false * false / len(said)
    if mode == "strict":
        return -penalty if false else best
    return min(1.0, max(-1.0, best - penalty))


def _is_true(fact: Fact | None, figure: dict) -> bool:
    if fact is None or not set(fact.points) <= set(figure):
        return False
    try:
        return holds(fact, figure)
    except OverflowError:  # of a value like 9^9^9
        return False


def _good(said, facts: list[Fact], steps, given: set[Fact], step_bound: int | None) -> int:
    """Facts of a proof that were claimed, each once, and near enough to what was known."""
    place = {fact: i for i, fact in enumerate(facts)}
    known, good = set(), 0
    for fact in said:
        if fact in given or fact not in place:
            continue
        missing, waiting = set(), [place[fact]]
        while waiting:
            i = waiting.pop()
            if i not in missing and i not in known:
                missing.add(i)
                waiting += [source - len(given) for source in steps[i]["from"] if source >= len(given)]
        known.add(place[fact])
        good += step_bound is None or len(missing) <= step_bound
    return good
