"""Reward functions by name, and one of our own: is the final answer mathematically right?

Names are TRL's own, `math_accuracy_reward`, or a dotted import path such as `my_package.rewards.brevity`.
"""

import ctypes
import math
import re
import threading
import time
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any

from .lookup import load_function, near


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
    if "." not in name:
        mend = near(name, ("math_accuracy_reward", *TRL_REWARDS), "known names are {}")
        raise ValueError(f"unknown reward function {name!r}; {mend} (or give a dotted import path)")
    return load_function(name, "reward_funcs")


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

    What an answer may cost is limited, in any thread: beyond [`LONGEST`] characters, [`DEEPEST`] brackets or exponents
    of [`LARGEST`] it is refused unread, and an answer that takes longer than [`LIMIT`] to parse or to compare is not
    equal. A reference so refused is one that cannot be parsed.

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
    texts = [completion_text(completion) for completion in completions]
    _warm_up()

    golds = [next(filter(None, map(_parse_gold, row)), None) for row in references]
    answers = [_parse_answer(text) if gold else None for text, gold in zip(texts, golds, strict=True)]
    if log_extra is not None:
        log_extra("gold", [str(gold) for gold in golds])
        log_extra("answer", [str(answer) for answer in answers])
    return [_agree(gold, answer) if gold else None for gold, answer in zip(golds, answers, strict=True)]


def completion_text(completion: str | list[dict] | None) -> str:
    """The text of a completion, which may be a list of messages: that of the last. Nothing, such as where a message
    only calls a tool, is an empty text."""
    text = completion[-1]["content"] if completion and not isinstance(completion, str) else completion
    return text or ""


# A group shares its reference, and parsing is the expensive half.
@lru_cache(maxsize=1024)
def _parse_gold(text: str) -> list:
    return _parse(text)


def _parse_answer(text: str) -> list:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    anchored = [
        LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False),
        ExprExtractionConfig(try_extract_without_anchor=False),
    ]
    return _parse(text, anchored, extraction_mode="first_match")


def _parse(text: str, *args, **kwargs) -> list:
    """What math-verify reads in `text`, as it reads it; nothing where the text is refused, or takes too long."""
    from math_verify import parse

    text = _boxed(text)
    return [] if _is_hostile(text) else _within(LIMIT, partial(parse, text, *args, parsing_timeout=None, **kwargs), [])


def _agree(gold: list, answer: list) -> float:
    from math_verify import verify

    return float(_within(LIMIT, partial(verify, gold, answer, timeout_seconds=None), False))


@cache
def _warm_up() -> None:
    """Import math-verify and let it build its tables, which takes longer than any limit here."""
    import math_verify.grader
    import math_verify.parser

    # or each warns that its own limit, a signal that only the main thread may set, is off (math-verify 0.8, 0.9)
    math_verify.parser.TIMEOUT_WARNING_SHOWN = math_verify.grader.TIMEOUT_WARNING_SHOWN = True
    gold, answer = (math_verify.parse(text, parsing_timeout=None) for text in (r"\boxed{\sqrt{12}+x}", r"\boxed{x+1}"))
    math_verify.verify(gold, answer, timeout_seconds=None)


# --------------------------------------------------------------------------------------------------------------------
# What hostile text may cost
# --------------------------------------------------------------------------------------------------------------------

LIMIT = 0.15  # seconds of this thread's processor time for parsing a text, and again for comparing two
LONGEST = 1000  # characters of a final answer; of text without one, as many at its end are read
DEEPEST = 20  # brackets within brackets
LARGEST = 10_000  # exponents, and all exponents of brackets multiplied
_NUMBER = re.compile(r"\d+")
_MIRROR = str.maketrans("()[]{}", ")(][}{")


def _is_hostile(text: str) -> bool:
    """Whether to refuse `text` unread: no limit of time ends the one big multiplication that `9^{9^9}` asks for."""
    depth, text = 0, text.replace("**", "^")
    for character in text:
        depth += (character in "{[(") - (character in ")]}")
        if depth > DEEPEST:
            return True
    for match in re.finditer(r"\d{5}\s*!|[)}\]]\s*!", text):  # a factorial is one multiplication too
        of = _group(text[match.start() :: -1].translate(_MIRROR), 0)[::-1] if match[0][0] in ")}]" else match[0]
        size = math.prod(max(int(number[:9]), 1) for number in _NUMBER.findall(of))
        if size > LARGEST or re.search(r"\d\s*[!^].", of):
            return True
    product = 1
    for match in re.finditer(r"(.?)\s*\^", text):
        exponent = _group(text, match.end())
        size = math.prod(max(int(number[:9]), 1) for number in _NUMBER.findall(exponent))
        if re.search(r"[\d)}\]]\s*\^|!", exponent):  # a tower of numbers
            return True
        product *= size if match[1] in tuple(")}]") else 1
        if max(size, product) > LARGEST:
            return True
    return False


def _group(text: str, start: int) -> str:
    """What a `^` that ends at `start` raises to: a bracketed group, or what runs on without a space."""
    while start < len(text) and text[start] in " -+":
        start += 1
    if text[start : start + 1] not in tuple("{[("):
        return re.match(r"\\?[\w.^!]*", text[start:])[0]
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] in "{[(") - (text[end] in ")]}")
        if depth == 0:
            break
    return text[start : end + 1]


def _within(seconds: float, call: Callable, otherwise: Any) -> Any:
    """What `call()` returns, or `otherwise` once this thread has worked on it for `seconds`. In any thread.

    A watching thread has CPython raise in this one, which it does between two bytecodes. What is raised in a
    destructor or in a callback of the garbage collector is lost there, so it raises again until the call ends.
    """
    from math_verify.errors import TimeoutException  # a BaseException, so that no `except Exception` keeps it

    thread, lock, done = threading.get_ident(), threading.Lock(), threading.Event()
    raise_in_thread = ctypes.pythonapi.PyThreadState_SetAsyncExc
    clock = time.monotonic
    if hasattr(time, "pthread_getcpuclockid"):  # not on macOS and Windows; elsewhere a busy machine changes no reward
        clock = partial(time.clock_gettime, time.pthread_getcpuclockid(thread))
    start = clock()

    def watch():
        end = start + seconds
        while not done.wait(max(end - clock(), 1e-3)):
            with lock:
                if clock() >= end and not done.is_set():
                    raise_in_thread(ctypes.c_ulong(thread), ctypes.py_object(TimeoutException))
                    end = clock() + seconds

    def finish():
        with lock:
            done.set()
            raise_in_thread(ctypes.c_ulong(thread), None)  # one that was asked for and has not come

    result, watcher = otherwise, threading.Thread(target=watch, daemon=True)
    try:
        try:
            watcher.start()
            result = call()
        finally:
            finish()
    except TimeoutException:
        finish()  # the first was cut short where a second one rang in it; a third cannot ring before this ends
    return result


def last_box(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}`, stripped; `None` without one, or if it does not end, or not within
    [`LONGEST`] characters."""
    start = text.rfind("\\boxed{") + len("\\boxed{")
    depth = 1
    if start >= len("\\boxed{"):
        for end in range(start, min(len(text), start + LONGEST + 1)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end].strip()
    return None


def _boxed(text: str) -> str:
    r"""Reduce `text` to its last box; put one around bare mathematics, since math-verify reads "2\sqrt{3}" as 2."""
    if "\\boxed" in text:
        found = last_box(text)
        return "" if found is None else f"\\boxed{{{found}}}"
    stated = re.findall(r"(?i)\banswer(?:\s+is|:)+\s*(.+)", text)
    bare = (stated[-1] if stated else text).lstrip(" \n*").rstrip(" \n*.")
    if len(bare) <= LONGEST:
        # prose: several lines, or a word of three letters (any script), no LaTeX command and not in \text{...}
        words = re.sub(r"\\(text|mathrm|mbox)\s*\{[^}]*\}|\\[A-Za-z]+", " ", bare)
        if bare and "\n" not in bare and not re.search(r"[^\W\d_]{3,}", words):
            return f"\\boxed{{{bare}}}"
    return text[-LONGEST:]
