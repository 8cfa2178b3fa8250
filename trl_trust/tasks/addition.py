"""Two-digit addition with a scratchpad; the reward is binary.

A prompt is `47+86=`; the completion adds column by column, ones first, and states the answer after a `#`:
`7+6=13,4+8+1=13#133`. The demonstrator writes such scratchpads with mistakes, so a model that imitates it is right now
and then: enough for reinforcement learning to start from, and far from done.
"""

import random
from collections.abc import Sequence
from functools import cache

from datasets import Dataset

from .base import Task, completion_text


HELD_OUT = 256  # pairs that are never trained on, the same ones for every seed
MAX_COMPLETION_LENGTH = 24  # the longest correct completion, "9+9=18,9+9+1=19#198" and the end token, has 20 tokens


def pairs(split: str, n: int | None = None, seed: int = 0) -> list[tuple[int, int]]:
    """Return `n` distinct pairs of two-digit numbers, in an order drawn from `seed`; all of the split if `n` is None.

    Args:
        split: `"train"` (7844 pairs) or `"test"` ([`HELD_OUT`] pairs). They are disjoint and do not depend on `seed`.
        n: How many pairs.
        seed: Seed of the order, and so of the choice when `n` is less than the split.

    Raises:
        ValueError: For another split, or more pairs than the split has.
    """
    every = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random("held out").shuffle(every)
    splits = {"test": every[:HELD_OUT], "train": every[HELD_OUT:]}
    if split not in splits:
        raise ValueError(f"split={split!r} does not exist; use 'train' or 'test'")
    chosen = splits[split]
    if n is not None and not 0 <= n <= len(chosen):
        raise ValueError(f"n={n} is out of range; the {split} split has {len(chosen)} pairs")
    random.Random(seed).shuffle(chosen)
    return chosen[:n]


@cache
def _train_pairs() -> list[tuple[int, int]]:
    return pairs("train")


def problems(split: str, n: int | None = None, seed: int = 0) -> Dataset:
    """Return [`pairs`] as a dataset with the columns `prompt` ("47+86=") and `answer` ("133")."""
    chosen = pairs(split, n, seed)
    return Dataset.from_dict({"prompt": [f"{a}+{b}=" for a, b in chosen], "answer": [str(a + b) for a, b in chosen]})


def demonstrate(a: int, b: int, rng: random.Random, *, drop_carry: float = 0.85, slip: float = 0.25) -> str:
    """Add `a` and `b` column by column and write down how, with mistakes.

    Args:
        a: Two-digit number.
        b: Two-digit number.
        rng: Where the mistakes come from.
        drop_carry: Probability of forgetting a carry.
        slip: Probability, in each column, of being off by one. With both 0 every answer is right.

    Returns:
        The scratchpad without an end token, e.g. `7+6=13,4+8+1=13#133`. The answer follows from the sums as written.
    """
    sums, digits, carry = [], "", 0
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):  # ones first
        if carry and rng.random() < drop_carry:
            carry = 0
        total = int(x) + int(y) + carry
        if rng.random() < slip:
            total = max(0, total + rng.choice((-1, 1)))
        sums.append(f"{x}+{y}+{carry}={total}" if carry else f"{x}+{y}={total}")
        digits = f"{total % 10}{digits}"
        carry = total // 10
    return f"{','.join(sums)}#{carry or ''}{digits}"


def exact_answer_reward(completions: Sequence, answer: Sequence[str], **kwargs) -> list[float]:
    """Reward 1 for a completion whose text after the first `#` is the answer, to the character, else 0.

    Args:
        completions: Texts, or conversations whose last message is the completion.
        answer: The column `answer`, one entry a completion.
    """
    texts = map(completion_text, completions)
    # partition, not a search for the last number: a second `#` must not buy a second guess
    return [float(text.partition("#")[1:] == ("#", right)) for text, right in zip(texts, answer, strict=True)]


def _demonstration(pair: tuple[int, int], rng: random.Random, **mistakes) -> tuple[str, str]:
    a, b = pair
    return f"{a}+{b}=", demonstrate(a, b, rng, **mistakes)


TASK = Task(
    name="addition",
    problems=problems,
    reward=exact_answer_reward,
    draw=lambda rng: rng.choice(_train_pairs()),
    demonstrate=_demonstration,
    max_completion_length=MAX_COMPLETION_LENGTH,
    start={"steps": 300},
    teacher={"steps": 600, "drop_carry": 0.0, "slip": 0.02},
)
