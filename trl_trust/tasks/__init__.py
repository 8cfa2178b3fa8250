"""Worlds with exact rewards that need no download. No module here imports a trainer.

What a world offers is a [`~trl_trust.tasks.base.Task`]: problems, reward, demonstrations, tokenizer, evaluation.
`get_task("addition")` returns one by its name in [`TASKS`]; [`~trl_trust.tasks.start.build_start`] makes a policy that
half knows it.
"""

from importlib import import_module


# name -> module that defines `TASK`
TASKS = {"addition": "trl_trust.tasks.addition", "sudoku": "trl_trust.tasks.sudoku"}


def get_task(name: str):
    """Return the [`~trl_trust.tasks.base.Task`] called `name`, or raise `KeyError` naming the known ones."""
    if name not in TASKS:
        raise KeyError(f"unknown task {name!r}; known tasks: {', '.join(TASKS)}")
    return import_module(TASKS[name]).TASK
