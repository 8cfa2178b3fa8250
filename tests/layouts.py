"""One small run whose outcome must not depend on how its rows are spread over processes and micro-batches.

`python layouts.py OUTPUT_DIR MODEL_PATH NAME...` under torchrun, or [`run`] in a test. Completions are a function of
the step and of the global row, so every layout trains on the same rollouts; `num_iterations=2` makes the ratio live.
"""

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import torch
from peft import LoraConfig
from tiny import leave, tiny_config, tiny_trainer

from trl_trust.methods import get_method, hosted
from trl_trust.quickstart.model import build_model
from trl_trust.quickstart.task import build_tokenizer


def feedback(prompts, completions, **columns):
    return [f"it has {len(text)} characters" for text in completions]


ROWS = 16  # rows of a generation batch over all processes: 4 prompts x 4 responses

# What a method needs beyond its defaults to be the same in every layout. Keyed by method name; `config` and `trainer`
# are keyword arguments; a callable returns them.
SETTINGS: dict[str, dict | Callable[[], dict]] = {
    "opmd": {"config": {"loss_type": "grpo"}},
    "alp": {"config": {"perturbation_sigma": 0.0}},  # processes and micro-batches draw different noise
    "rlad": lambda: {"trainer": {"teacher_model": build_model(build_tokenizer(), hidden_size=16, seed=1)}},
    "vpd": {"config": {"e_step_every": 1}, "trainer": {"feedback_func": feedback}},
}


# A bound that two of the four steps here meet as they are; the others are taken back
CONTROLS = {"backtrack": {"target_kl": 0.03, "max_kl": 0.03}}


def everything() -> list[str]:
    """What is run in every layout."""
    return [*(m.name for m in hosted("grpo")), "dispo+kl", "dispo+ess", "dispo+stop", "dispo+backtrack"]


def scripted(trainer_class):
    """Subclass whose completions are drawn from (step, global row) instead of from the model."""

    class Scripted(trainer_class):
        def _generate(self, prompts):
            # TRL 1.16: prompt ids, completion ids, tool masks, completions, sampler's log-probabilities, extra fields,
            # images of the prompts and of tools
            tokenizer = self.processing_class
            first = self.accelerator.process_index * len(prompts)
            completion_ids = []
            for row in range(first, first + len(prompts)):
                g = torch.Generator().manual_seed(1000 * self.state.global_step + row)
                length = int(torch.randint(2, 9, (1,), generator=g))
                completion_ids.append(torch.randint(3, len(tokenizer), (length,), generator=g).tolist())
            prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
            return prompt_ids, completion_ids, None, tokenizer.batch_decode(completion_ids), None, {}, None, [[]]

    return Scripted


def settings_of(name: str) -> dict:
    """What `name` needs beside the settings of all: `config` and `trainer`, made anew where models are among it."""
    extra = SETTINGS.get(name, {})
    return extra() if callable(extra) else extra


def run(
    name: str, model_path: str, output_dir: Path, processes: int, loss_type: str = "dapo"
) -> dict[str, torch.Tensor]:
    """Train method `name` for two generations of two updates each; return the trained parameters, on every process.

    `name+mode` trains it under `step_control=mode`, `name@lora` a LoRA.
    """
    return whole_parameters(train(name, model_path, output_dir, processes, loss_type))


def train(name: str, model_path: str, output_dir: Path, processes: int, loss_type: str = "dapo"):
    """The trainer after [`run`]'s training."""
    name, _, lora = name.partition("@")
    name, _, control = name.partition("+")
    method = get_method(name)
    module = import_module(method.module)
    extra = settings_of(name)
    accumulation = ROWS // 4 // processes
    config = dict(
        optim="sgd",
        learning_rate=0.5,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        loss_type=loss_type,
        num_iterations=2,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        max_steps=4,
        step_control=control or "none",
        **CONTROLS.get(control, {}),
    )
    args = tiny_config(getattr(module, method.config), output_dir, **{**config, **extra.get("config", {})})
    arguments = extra.get("trainer", {})
    if lora:
        arguments = {
            **arguments,
            "peft_config": LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, init_lora_weights=False),
        }
    torch.manual_seed(0)  # of the adapter, on every process
    trainer = tiny_trainer(scripted(getattr(module, method.trainer)), model_path, args, **arguments)
    trainer.train()
    return trainer


def whole_parameters(trainer) -> dict[str, torch.Tensor]:
    """Trained parameters, gathered where they are sharded; to be called on every process."""
    named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
    named = {key: p for key, p in named if p.requires_grad}
    if trainer.is_deepspeed_enabled:
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(named.values())):
            return {key: p.detach().float().clone() for key, p in named.items()}
    whole = lambda p: p.full_tensor() if hasattr(p, "full_tensor") else p
    return {key: whole(p.detach()).clone() for key, p in named.items()}


if __name__ == "__main__":
    output_dir, model_path, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
    torch.set_num_threads(1)
    for name in names or everything():
        parameters = run(name, model_path, output_dir / name, processes=int(os.environ["WORLD_SIZE"]))
        torch.save(parameters, output_dir / f"{name}-{os.environ['RANK']}.pt")
    leave()
