"""The policy that a task starts from: a tiny Qwen2, warm-started by imitating the task's demonstrator.

Error rates and steps are arguments, so that one function makes the start of a run (the defaults), a weak start (fewer
steps, more mistakes) and a strong teacher of the same family, e.g. `build_start(path, **TASK.teacher)`.
[`build_start`] writes where you say; [`cached_start`] builds each start once on a machine.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from . import get_task
from .base import Task


def build_model(
    tokenizer: PreTrainedTokenizerBase,
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 2,
    seed: int = 0,
) -> Qwen2ForCausalLM:
    """Return an untrained float32 Qwen2 over the tokenizer's vocabulary (0.09M parameters with the defaults).

    Two heads of 32 rather than four of 16, since vLLM on a CPU does not take 16. Leaves the global random state as it
    was.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config)


def warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int = 300,
    batch_size: int = 64,
    learning_rate: float = 5e-3,
    seed: int = 0,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    task: Task | str = "addition",
    **mistakes,
) -> None:
    """Train `model` in place to imitate the task's demonstrations: AdamW, one cycle, completions only.

    Args:
        model: Any causal language model.
        tokenizer: As built by [`build_tokenizer`].
        steps: Optimiser steps.
        batch_size: Demonstrations a step, each drawn anew.
        learning_rate: Peak of the cycle.
        seed: Seed of problems and mistakes.
        on_step: Called after each step with steps done and steps in all.
        task: What to imitate, or its name.
        mistakes: Passed to the task's demonstrator in place of its defaults.
    """
    task = get_task(task) if isinstance(task, str) else task
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps + 1)
    model.train()
    for step in range(steps):
        batch = [task.draw(rng) for _ in range(batch_size)]
        prompts, completions = zip(*(task.demonstrate(problem, rng, **mistakes) for problem in batch), strict=True)
        texts = [f"{prompt}{said}{tokenizer.eos_token}" for prompt, said in zip(prompts, completions, strict=True)]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right").to(model.device)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)  # (B, P+T)
        labels[:, : len(prompts[0])] = -100  # every prompt has the same length
        model(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        on_step(step + 1, steps)
    model.eval()


def build_start(
    output_dir: str | PathLike,
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 2,
    seed: int = 0,
    task: Task | str = "addition",
    device: str = "cpu",
    **warm_start_options,
) -> Path:
    """Build, warm-start and write model and tokenizer to `output_dir`, and return it: a model id for any TRL trainer.

    Args:
        output_dir: Folder to write to; what it holds of the same names is overwritten.
        hidden_size: See [`build_model`], like the two that follow.
        seed: Seed of the parameters and of the demonstrations.
        task: The task, or its name; what it states as its start holds unless an option says otherwise.
        device: Where the warm start is computed.
        warm_start_options: See [`warm_start`].
    """
    task = get_task(task) if isinstance(task, str) else task
    tokenizer = task.build_tokenizer()
    model = build_model(
        tokenizer,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        seed=seed,
    ).to(device)
    warm_start(model, tokenizer, seed=seed, task=task, **{**task.start, **warm_start_options})
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return Path(output_dir)


def cache_folder() -> Path:
    """Where [`cached_start`] keeps what it built: `$TRL_TRUST_CACHE`, by default `~/.cache/trl-trust`."""
    return Path(os.environ.get("TRL_TRUST_CACHE") or Path.home() / ".cache" / "trl-trust")


def cached_start(task: Task | str, seed: int, **options) -> Path:
    """Return the folder of a start of `task`, built on the first call for this seed, these options and versions.

    Processes may ask for the same one at the same time: each builds in a folder of its own, and the first to end wins.

    Args:
        task: The task, or its name.
        seed: See [`build_start`].
        options: See [`build_start`].
    """
    task = get_task(task) if isinstance(task, str) else task
    tokenizer = task.build_tokenizer().backend_tokenizer.to_str()  # what is saved with the model, so part of the key
    parts = {"task": task.name, "tokenizer": tokenizer, **task.start, **options}
    versions = {name: version(name) for name in ("torch", "transformers")}
    key = hashlib.blake2b(json.dumps([parts, versions], sort_keys=True).encode(), digest_size=6).hexdigest()
    folder = cache_folder() / "starts" / f"{task.name}-{key}" / str(seed)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as temporary:
            built = build_start(Path(temporary) / "start", task=task, seed=seed, **options)
            with suppress(OSError):  # another process was quicker: same seed, same bits
                built.rename(folder)
    return folder
