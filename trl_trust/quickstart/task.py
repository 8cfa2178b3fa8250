"""The task of the quickstart, by the names it has had here: [`trl_trust.tasks.addition`]."""

from trl_trust.tasks.addition import (
    HELD_OUT,
    MAX_COMPLETION_LENGTH,
    TASK,
    demonstrate,
    exact_answer_reward,
    pairs,
    problems,
)
from trl_trust.tasks.base import ALPHABET, EOS, PAD, UNK, build_tokenizer


__all__ = [
    "ALPHABET",
    "EOS",
    "HELD_OUT",
    "MAX_COMPLETION_LENGTH",
    "PAD",
    "UNK",
    "build_tokenizer",
    "demonstrate",
    "evaluate",
    "exact_answer_reward",
    "pairs",
    "problems",
]

evaluate = TASK.evaluate
