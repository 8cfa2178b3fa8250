"""What a trainer on GRPO keeps in a checkpoint beside TRL's: its method's state and, if asked, the generation at hand.

TRL 1.16 does not save the rollouts that are being trained on, so a run resumed inside a generation generates anew and
goes another way. With `save_generation_state` they are saved, and a resume anywhere is equal to the bit.

Names of TRL 1.16 and transformers 5.23 touched here: `_save_checkpoint`, `_load_optimizer_and_scheduler` and
`_get_output_dir` of the trainer, and `_step` and `_buffered_inputs`, the schedule of a generation batch.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import send_to_device
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = get_logger(__name__)

METHOD_STATE_FILE = "trl_trust_state.json"  # in a checkpoint's folder
GENERATION_FILE = "trl_trust_generation-{rank}.pt"
METHOD, CONTROL = "method", "step_control"  # keys of the state file beside the method's own


class KeptState:
    """Mixin before a `GRPOTrainer` with a step control: saves and loads the state that is its own.

    Every file is written whole or not at all. What is missing or damaged is one line that names the file.
    """

    def method_state(self) -> dict[str, Any]:
        """What the method carries from step to step, for JSON: written with each checkpoint."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take up what [`method_state`] returned when the checkpoint was written."""

    def generation_state(self) -> dict[str, Any]:
        """What the method keeps from generation to generation besides the rollouts: tensors and plain values."""
        return {}

    def load_generation_state(self, state: dict[str, Any]) -> None:
        """Take up what [`generation_state`] returned, with tensors on the trainer's device."""

    @property
    def _updates_per_generation(self) -> float:
        args = self.args
        return args.steps_per_generation * self.num_iterations / args.gradient_accumulation_steps

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        state = self.method_state()
        if self.step_control is not None:
            state = state | {CONTROL: self.step_control.state()}
        if state and self.args.should_save:
            text = json.dumps(state | {METHOD: self._name})
            write_whole(folder / METHOD_STATE_FILE, lambda path: path.write_text(text))
        if self.args.save_generation_state and self.rollout_step > 0:
            self._save_generation(folder)

    def _save_generation(self, folder: Path) -> None:
        kept = {
            "step": self._step,
            "processes": self.accelerator.num_processes,
            "rollouts": self._buffered_inputs,
            "method": self.generation_state(),
        }
        path = folder / GENERATION_FILE.format(rank=self.accelerator.process_index)
        folder.mkdir(parents=True, exist_ok=True)  # a rank on another machine may be here first
        write_whole(path, lambda part: torch.save(kept, part))
        size = path.stat().st_size / 2**20
        logger.info(f"{path}: the generation at hand, {size:.1f} MiB a process (save_generation_state=True)")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        self._load_method_state(folder / METHOD_STATE_FILE)
        update = json.loads((folder / "trainer_state.json").read_text())["global_step"]
        if update % self._updates_per_generation != 0:
            self._load_generation(folder, update)

    def _load_method_state(self, path: Path) -> None:
        wanted = self.method_state_is_kept
        if not path.exists():
            if wanted:
                raise ValueError(
                    f"{path} is missing, which {self._name} keeps with each checkpoint: resume from a whole "
                    f"checkpoint of this method, or start anew from its weights with model_name_or_path."
                )
            return
        state = damaged(path, lambda: dict(json.loads(path.read_text())))
        method, control = state.pop(METHOD, self._name), state.pop(CONTROL, None)
        if method != self._name:
            raise ValueError(
                f"{path} was written by {method}, and this is {self._name}: resume with {method}, or start anew from "
                f"its weights with model_name_or_path."
            )
        if self.step_control is not None and control is not None:
            damaged(path, lambda: self.step_control.load_state(control))
        if state:
            damaged(path, lambda: self.load_method_state(state))

    @property
    def method_state_is_kept(self) -> bool:
        """Whether each checkpoint of this run has a state file."""
        return self.step_control is not None or bool(self.method_state())

    def _load_generation(self, folder: Path, update: int) -> None:
        path = folder / GENERATION_FILE.format(rank=self.accelerator.process_index)
        if not path.exists():
            logger.warning(
                f"{folder} was saved inside a generation (update {update}, {self._updates_per_generation:g} a "
                f"generation) without its rollouts, so the run goes on with fresh ones and not as it would have. Set "
                f"save_generation_state=True, or save_steps to a multiple of {self._updates_per_generation:g}."
            )
            return
        kept = damaged(path, lambda: torch.load(path, map_location="cpu", weights_only=True))
        kept = send_to_device(kept, self.accelerator.device)  # torch.load does not know a device called cpu:0
        processes = self.accelerator.num_processes
        if kept["processes"] != processes:
            raise ValueError(
                f"{path} holds the rollouts of one of {kept['processes']} processes, and this run has {processes}: "
                f"resume with as many, or delete the files {GENERATION_FILE.format(rank='*')} to generate anew."
            )
        self._step, self._buffered_inputs = kept["step"], kept["rollouts"]
        self.load_generation_state(kept["method"])


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file that is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    write(part)
    os.replace(part, path)


def damaged(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` returns; its failure becomes one line that names the file.

    Raises:
        ValueError: if the file does not hold what it should.
    """
    try:
        return read()
    except Exception as error:
        if isinstance(error, ValueError) and not isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
            raise  # says already what is wrong
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {' '.join(str(error).split())[:120]}): resume from another "
            f"checkpoint."
        ) from error
