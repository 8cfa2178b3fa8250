"""The log of a run, kept in its `output_dir` while it runs."""

import os
import time
from pathlib import Path

from transformers import TrainerCallback

from .plot import STATE_FILE


SECONDS = 60  # between two writes: a long log is some megabytes


class KeepLog(TrainerCallback):
    """Keeps the log of a run in its `output_dir` while it runs, at most once in `SECONDS`.

    Who adds it calls `write` when training has ended, however it did.
    """

    def __init__(self):
        self.written = -float("inf")

    def write(self, args, state) -> None:
        """Write `trainer_state.json`, whole or not at all; on the main process alone."""
        if state.is_world_process_zero:
            path = Path(args.output_dir, STATE_FILE)
            path.parent.mkdir(parents=True, exist_ok=True)
            state.save_to_json(path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
            self.written = time.monotonic()

    def on_log(self, args, state, control, **kwargs):
        if time.monotonic() - self.written > SECONDS:
            self.write(args, state)
