"""The policy of the quickstart: a tiny Qwen2, warm-started by imitating the demonstrator of [`task`].

Error rates and steps are arguments, so that one function makes the start of a run (the defaults), a weak start (fewer
steps, more slips) and a strong teacher of the same family:
`build_start(path, drop_carry=0.0, slip=0.02, steps=900)`. Nothing is cached: what is written is written where you say.
"""

import random
from collections.abc import Callable
from os import PathLike
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from .task import build_tokenizer, demonstrate, pairs


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
    drop_carry: float = 0.85,
    slip: float = 0.25,
    seed: int = 0,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Train `model` in place to imitate [`demonstrate`] on the training pairs: AdamW, one cycle, completions only.

    Args:
        model: Any causal language model.
        tokenizer: As built by [`build_tokenizer`].
        steps: Optimiser steps.
        batch_size: Demonstrations a step, each drawn anew.
        learning_rate: Peak of the cycle.
        drop_carry: Probability that the demonstrator forgets a carry.
        slip: Probability that it is off by one in a column.
        seed: Seed of pairs and mistakes.
        on_step: Called after each step with steps done and steps in all.
    """
    rng = random.Random(seed)
    train = pairs("train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps + 1)
    model.train()
    for step in range(steps):
        batch = [rng.choice(train) for _ in range(batch_size)]
        prompts = [f"{a}+{b}=" for a, b in batch]
        texts = [
            prompt + demonstrate(a, b, rng, drop_carry=drop_carry, slip=slip) + tokenizer.eos_token
            for prompt, (a, b) in zip(prompts, batch, strict=True)
        ]
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
    **warm_start_options,
) -> Path:
    """Build, warm-start and write model and tokenizer to `output_dir`, and return it: a model id for any TRL trainer.

    Args:
        output_dir: Folder to write to; what it holds of the same names is overwritten.
        hidden_size: See [`build_model`], like the two that follow.
        seed: Seed of the parameters and of the demonstrations.
        warm_start_options: See [`warm_start`].
    """
    tokenizer = build_tokenizer()
    model = build_model(
        tokenizer,
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        seed=seed,
    )
    warm_start(model, tokenizer, seed=seed, **warm_start_options)
    model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    return Path(output_dir)
