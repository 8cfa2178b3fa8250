"""Feedback in words: the prompt in which a teacher reads it, and what a response says. No tensors."""

import re


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
