"""Names and paths that a user writes: what was meant, and the function that a dotted path leads to."""

import inspect
import os
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any


def near(name: str, known: Iterable[str], say: str = "there are: {}", n: int = 1) -> str:
    """What to say after an unknown `name`: the `n` nearest of the known ones, or else all, in the words of `say`."""
    known = list(known)
    matches = get_close_matches(name, known, n=n)
    return f"did you mean {' or '.join(map(repr, matches))}?" if matches else say.format(", ".join(known))


def load_function(path: str, field: str) -> Callable:
    """Import the function at `path`, `package.module.function`; the working directory is searched too.

    Args:
        path: dotted.
        field: the setting that holds the path, for the message.

    Raises:
        ValueError: if there is no such function.
    """
    module, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{field}={path!r} cannot be imported: {error}; give package.module.function") from error
    if not callable(found):
        raise ValueError(f"{field}={path!r} is a {type(found).__name__}, which cannot be called")
    return found


def finished(output: Any) -> Any:
    """What a function returned; if it is async, what it returns in the end."""
    if not inspect.iscoroutine(output):
        return output
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as thread:  # a notebook has a running event loop, into which `run` cannot go
        return thread.submit(asyncio.run, output).result()
