"""Reward functions by name, and one of our own: is the final answer mathematically right?

Names are TRL's own, `math_accuracy_reward`, or a dotted import path such as `my_package.rewards.brevity`.
"""

import os
import re
import sys
import threading
from collections.abc import Callable
from difflib import get_close_matches
from functools import lru_cache, partial
from importlib import import_module


TRL_REWARDS = ("accuracy_reward", "reasoning_accuracy_reward", "think_format_reward", "get_soft_overlong_punishment")


def load_reward_func(name: str, max_completion_length: int) -> Callable:
    """Return the reward function called `name`.

    Args:
        name: `math_accuracy_reward`, a name in [`TRL_REWARDS`], or a dotted import path; the working directory is
            searched too.
        max_completion_length: in tokens; the length from which `get_soft_overlong_punishment` gives the full penalty.
            It begins at four fifths of that, the proportion of DAPO (arXiv 2503.14476, eq. 13: 16,384 of 20,480).

    Raises:
        ValueError: for a name that is none of these, or a path that holds no such function.
    """
    if name == "math_accuracy_reward":
        return math_accuracy_reward
    if name in TRL_REWARDS:
        import trl.rewards

        found = getattr(trl.rewards, name)
        return found(max_completion_length, max_completion_length // 5) if name.startswith("get_") else found
    module, dot, attribute = name.rpartition(".")
    if not dot:
        known = ("math_accuracy_reward", *TRL_REWARDS)
        near = get_close_matches(name, known, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"known names are {', '.join(known)}"
        raise ValueError(f"unknown reward function {name!r}; {mend} (or give a dotted import path)")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot import reward function {name!r}: {error}") from error
    if not callable(found):
        raise ValueError(f"reward function {name!r} is a {type(found).__name__}, which cannot be called")
    return found


def math_accuracy_reward(
    completions: list[str] | list[list[dict[str, str]]],
    solution: list | None = None,
    answer: list | None = None,
    log_extra: Callable[[str, list], None] | None = None,
    **kwargs,
) -> list[float | None]:
    r"""1.0 where math-verify finds the final answer equal to the reference, else 0.0; `None` without a reference.

    The final answer is the last `\boxed{...}`; without one, what follows words like "the answer is"; or the whole
    completion when that is nothing but mathematics. A number that merely occurs somewhere does not count, so a
    completion that was cut off earns nothing by luck.

    Args:
        completions: text, or lists of messages whose last one holds the answer.
        solution, answer: columns of the data set with the reference: a number, plain text, LaTeX with or without
            delimiters, or a worked solution. Where a row has both, `answer` is tried first.
        log_extra: given by the trainer: adds columns to the table of completions.

    Returns:
        One reward a completion; `None`, which the trainer skips, where the reference cannot be parsed.

    Raises:
        ValueError: if the data set has neither a `solution` nor an `answer` column.
    """
    if solution is None and answer is None:
        raise ValueError("math_accuracy_reward needs a column `solution` or `answer` in the data set")
    columns = [column for column in (answer, solution) if column is not None]
    references = [[str(cell) for cell in row if cell is not None] for row in zip(*columns, strict=True)]
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    # math-verify's time limit is a signal, which only the main thread may set; elsewhere it has to do without
    limit = 5 if threading.current_thread() is threading.main_thread() else None

    golds = [next(filter(None, map(partial(_parse_gold, limit=limit), row)), None) for row in references]
    answers = [_parse_answer(text, limit) if gold else None for text, gold in zip(texts, golds, strict=True)]
    if log_extra is not None:
        log_extra("gold", [str(gold) for gold in golds])
        log_extra("answer", [str(answer) for answer in answers])
    return [_agree(gold, answer, limit) if gold else None for gold, answer in zip(golds, answers, strict=True)]


# A group shares its reference, and parsing is the expensive half.
@lru_cache(maxsize=1024)
def _parse_gold(text: str, limit: int | None) -> list:
    from math_verify import parse

    return parse(_boxed(text), parsing_timeout=limit)


def _parse_answer(text: str, limit: int | None) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    anchored = [
        LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),
        ExprExtractionConfig(try_extract_without_anchor=False),
    ]
    return parse(_boxed(text), anchored, extraction_mode="first_match", parsing_timeout=limit)


def _agree(gold: list, answer: list, limit: int | None) -> float:
    from math_verify import verify

    return float(verify(gold, answer, timeout_seconds=limit))


def _boxed(text: str) -> str:
    r"""Reduce `text` to its last box; put one around bare mathematics, since math-verify reads "2\sqrt{3}" as 2."""
    if "\\boxed" in text:
        return text[text.rindex("\\boxed") :]
    stated = re.findall(r"(?i)\banswer(?:\s+is|:)+\s*(.+)", text)
    bare = (stated[-1] if stated else text).lstrip(" \n*").rstrip(" \n*.")
    # prose: several lines, or a word of three letters (in any script) that is no LaTeX command and not in \text{...}
    words = re.sub(r"\\(text|mathrm|mbox)\s*\{[^}]*\}|\\[A-Za-z]+", " ", bare)
    is_prose = not bare or "\n" in bare or re.search(r"[^\W\d_]{3,}", words)
    return text if is_prose else f"\\boxed{{{bare}}}"
