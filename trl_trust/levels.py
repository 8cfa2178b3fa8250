r"""Preference levels: 1 is best, larger is worse. What TRPA compares responses by.

A level rule is called like a reward function and returns one level a completion:

    rule(prompts=..., completions=..., completion_ids=..., rewards=..., **columns) -> list[int | None]

`columns` are those of the data set; `None` leaves a response out of every comparison. The two rules below are the
authors' (`XueruiSu/Trust-Region-Preference-Approximation`, `verl/utils/reward_score`), for completions without their
prompt.
"""

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .lookup import load_function
from .rewards import completion_text, last_box, math_accuracy_reward


def load_level_rule(name: str) -> Callable[..., list[int | None]]:
    """Return the level rule called `name`: a key of [`LEVEL_RULES`], or a dotted import path.

    Raises:
        ValueError: for a path that holds no such function; the working directory is searched too.
    """
    return LEVEL_RULES[name] if name in LEVEL_RULES else load_function(name, "level_rule")


def reward_levels(rewards: Tensor, level_one_reward: float, thresholds: Sequence[float] | None = None) -> Tensor:
    """(N,) rewards to (N,) levels: 1 from `level_one_reward` on; below it, distinct rewards are distinct levels.

    These begin at 2 with the highest reward. With `thresholds`, strictly descending, a reward below k of them is on
    level 2 + k instead. NaN, an unscored response, is 0: no level.
    """
    if thresholds is None:
        edges = rewards[rewards < level_one_reward].unique()  # (K,)
    else:
        edges = rewards.new_tensor(thresholds)
    above = (rewards[:, None] < edges[None, :]).sum(1)  # (N,) how many of them are above each reward
    levels = torch.where(rewards >= level_one_reward, 1, 2 + above)
    return levels.masked_fill(rewards.isnan(), 0)


def math_levels(
    completions: list, solution: list | None = None, answer: list | None = None, **kwargs
) -> list[int | None]:
    r"""Levels of answers to mathematical problems, for models that think between `<think>` and `</think>`.

    1: the last `\boxed{...}` after the thinking is right. 2: it is wrong. 3: it is empty, or there is no reference to
    compare it with. 4: no `</think>` (the opening tag may be the prompt's), or no box after it.

    Args:
        completions: texts, or lists of messages whose last one holds the answer.
        solution, answer: the reference, as for [`~trl_trust.rewards.math_accuracy_reward`], which compares.
    """
    answers = [last_box(completion_text(c).partition("</think>")[2]) for c in completions]
    right = math_accuracy_reward([f"\\boxed{{{a or ''}}}" for a in answers], solution=solution, answer=answer)
    return [
        4 if a is None else 3 if not a or r is None else 1 if r == 1.0 else 2
        for a, r in zip(answers, right, strict=True)
    ]


def knights_and_knaves_levels(
    prompts: list, completions: list, solution_text_format: list[str], **kwargs
) -> list[int | None]:
    """Levels of answers to puzzles of the kind "who is a knight, who a knave".

    1: the format is valid and every identity right. 2: valid and complete, but wrong. 3: valid, but somebody's
    identity is missing or cannot be read. 4: the format is invalid, or the answer empty.

    The format is `<think>...</think><answer>...</answer>`, each tag once and in this order. The answer says "NAME is a
    knight" or "knave" for each person, and names no other roles. A prompt that ends in `<think>` has opened it.

    Args:
        solution_text_format: column of the data set (`K-and-K/knights-and-knaves`, and the copies made from it) that
            states the solution in such sentences. A puzzle without a solution has no level.
    """
    return [
        _puzzle_level("<think>" * completion_text(p).rstrip().endswith("<think>") + completion_text(c), truth)
        for p, c, truth in zip(prompts, completions, solution_text_format, strict=True)
    ]


def knights_and_knaves_reward(
    prompts: list, completions: list, solution_text_format: list[str], **kwargs
) -> list[float]:
    """Reward 1.0 for a puzzle solved, level 1 of [`knights_and_knaves_levels`], else 0.0: what to watch in the log."""
    return [float(x == 1) for x in knights_and_knaves_levels(prompts, completions, solution_text_format)]


def _puzzle_level(text: str, solution: str | None) -> int | None:
    if solution is None:
        return None
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    places = [text.find(tag) for tag in tags]
    stated = text[places[2] + len("<answer>") : places[3]].strip()
    if any(text.count(tag) != 1 for tag in tags) or places != sorted(places) or not stated:
        return 4
    # a word is tried from its beginning only: from each letter, 100,000 letters would take minutes
    truth = dict(re.findall(r"(?<![A-Za-z])([A-Za-z]+) is a (knight|knave)", solution))
    if len(re.findall("knight|knave", stated, re.IGNORECASE)) != len(truth):
        return 3
    said = {}
    for name, role in re.findall(r"\b([A-Za-z]+)\s+is\s+a\s+(knight|knave)\b", stated, re.IGNORECASE):
        said.setdefault(name.lower(), role.lower())
    if not all(name.lower() in said for name in truth):
        return 3
    return 1 if all(said[name.lower()] == role for name, role in truth.items()) else 2


# by the name that `level_rule` takes
LEVEL_RULES = {"math": math_levels, "knights_and_knaves": knights_and_knaves_levels}
