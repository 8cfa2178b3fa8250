"""Feedback in words: the prompt in which a teacher reads it, and what a response says. No tensors."""

import re
from collections.abc import Callable, Sequence
from typing import Any


def insert_feedback(prompt: str | list[dict], feedback: str, template: str) -> str | list[dict]:
    """The teacher's prompt: `template` in the place of the text or of the last message, which must be the user's."""
    if isinstance(prompt, str):
        return template.format(prompt=prompt, feedback=feedback)
    *before, last = prompt
    if last["role"] != "user":
        raise ValueError(
            f"a prompt ends with a message of role {last['role']!r}: VPD writes feedback into the last message, which "
            f"must be the user's."
        )
    return [*before, {**last, "content": template.format(prompt=as_text([last]), feedback=feedback)}]


def as_text(completion: str | list[dict]) -> str:
    """Text, or what messages say, tool calls and results left out."""
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") or "" for message in completion if message["role"] != "tool"]
    parts = [
        content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        for content in contents
    ]
    return "\n".join(filter(None, parts))


def without_thoughts(text: str) -> str:
    """`text` without `<think>` blocks: also one that the chat template has opened, or that was never closed."""
    text = re.sub(r"(?s)\A(?:(?!<think>).)*?</think>\s*", "", text)
    return re.sub(r"(?s)<think>.*?(?:</think>\s*|\Z)", "", text)


def comments(found: Any, n: int, source: str) -> list[str | None]:
    """What was said about each of `n` completions, blank texts as `None`.

    Raises:
        ValueError: unless `found` is a list with a text or `None` for each; `source` says where it is from.
    """
    if not isinstance(found, (list, tuple)):
        raise ValueError(f"{source} {found!r}; it must return a list, a text or None for each completion.")
    if len(found) != n:
        raise ValueError(f"feedback_func returned {len(found)} texts for {n} completions; it must return one each.")
    for text in found:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{source} {text!r} about a completion; it must be a text or None.")
    return [text if text and text.strip() else None for text in found]


def another_success(row: int, size: int, solved: Sequence[bool], text_of: Callable[[int], str]) -> str | None:
    """The first other response of the row's group, of `size` rows, that is `solved` and says something."""
    group = range(row // size * size, row // size * size + size)
    others = (text_of(i) for i in group if i != row and solved[i])
    return next((text for text in others if text.strip()), None)
