"""Asking a model: conversations to text, batches through `generate`, and nothing left behind."""

import copy
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


def render(tokenizer, messages: Sequence[Mapping]) -> str:
    """A conversation as the text that the model continues: by the chat template, or as plain text without one."""
    if getattr(tokenizer, "chat_template", None):
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    warnings.warn(
        "the tokenizer has no chat template: items are rendered as plain text, `role: content` a line", stacklevel=2
    )
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant:"


def render_all(tokenizer, conversations: Sequence[Sequence[Mapping]]) -> list[str]:
    """[`render`] of each, with one warning where there is no chat template, not one an item."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts = [render(tokenizer, messages) for messages in conversations]
    for warning in caught[:1]:
        warnings.warn(str(warning.message), stacklevel=2)
    return texts


@contextmanager
def untouched(model: nn.Module):
    """Evaluation mode, no gradient, and on exit every module's mode and every random state as they were."""
    training = [module for module in model.modules() if module.training]
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        random.setstate(states[0])
        np.random.set_state(states[1])


def decoding_config(model, tokenizer, max_new_tokens: int, generate_kwargs: Mapping | None = None):
    """The model's own generation config made greedy and bounded, as a copy."""
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, temperature=None, top_p=None, top_k=None, max_length=None, use_cache=True)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config.update(max_new_tokens=max_new_tokens, pad_token_id=config.pad_token_id if pad is None else pad)
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    config.update(**dict(generate_kwargs or {}))
    return config


def check_protocol(tokenizer) -> None:
    """ValueError unless the tokenizer can write the answer line."""
    line = "ANSWER: 42"
    back = tokenizer.decode(tokenizer(line, add_special_tokens=False)["input_ids"], skip_special_tokens=True)
    if back.strip() != line:
        raise ValueError(
            f"the tokenizer cannot write the protocol's line: {line!r} comes back as {back!r}; "
            "its vocabulary needs capitals, digits, the colon and the blank"
        )


def generate(
    model,
    tokenizer,
    conversations: Sequence[Sequence[Mapping]],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    generate_kwargs: Mapping | None = None,
    accelerator=None,
    on_batch: Callable[[int, int], None] | None = None,
) -> list[str]:
    """What the model says to each conversation, greedily unless `generate_kwargs` says otherwise.

    With an accelerator each process takes its share and gets the outputs of all.
    """
    check_protocol(tokenizer)
    texts = render_all(tokenizer, conversations)
    processes = accelerator.num_processes if accelerator is not None else 1
    rank = accelerator.process_index if accelerator is not None else 0
    # long with long, so that little is padded; the same order on every process. A process with one item fewer asks its
    # last again, so that all make the same calls.
    order = sorted(range(len(texts)), key=lambda i: (-len(texts[i]), i))
    mine = order[rank::processes]
    if order and len(mine) < -(-len(order) // processes):
        mine = [*mine, order[-1]]
    said: dict[int, str] = {}
    with unwrapped(model, accelerator) as policy, untouched(policy):
        config = decoding_config(policy, tokenizer, max_new_tokens, generate_kwargs)
        for start in range(0, len(mine), batch_size):
            batch = mine[start : start + batch_size]
            inputs = tokenizer(
                [texts[i] for i in batch],
                return_tensors="pt",
                padding=True,
                padding_side="left",
                add_special_tokens=not getattr(tokenizer, "chat_template", None),
            ).to(policy.device)
            inputs.pop("token_type_ids", None)
            out = policy.generate(**inputs, generation_config=config, synced_gpus=processes > 1)
            new = out[:, inputs["input_ids"].shape[1] :]
            said |= dict(zip(batch, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True))
            if on_batch is not None:
                on_batch(len(said), len(mine))
    if processes > 1:
        from accelerate.utils import gather_object

        said = dict(gather_object(list(said.items())))
    return [said[i] for i in range(len(texts))]


@contextmanager
def unwrapped(model, accelerator=None):
    """The model itself under DDP, FSDP or DeepSpeed, its parameters gathered; as it is without an accelerator."""
    if accelerator is None:
        yield model
        return
    from trl.models.utils import unwrap_model_for_generation

    with unwrap_model_for_generation(model, accelerator) as policy:
        yield policy
