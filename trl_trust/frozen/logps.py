"""Log-probabilities of frozen rollouts: of given tokens, under models that each process holds whole."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import deepspeed
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_config_model_id

from ..anatomy import causal_lm
from ..tokens import check_token_ids, load_tokenizer
from .store import claimed, finished_parts, max_id, write_parts


def collate_rollouts(rows: Sequence[Mapping[str, Any]], pad_to_multiple_of: int | None = None) -> dict[str, Tensor]:
    """Turn rows of rollouts into right-padded tensors, aligned as TRL's fused head returns log-probabilities.

    Args:
        rows: each with `prompt_ids` and `completion_ids`, lists of token ids.
        pad_to_multiple_of: what T+1 has to be a multiple of; `None` for anything.

    Returns:
        `input_ids`, `attention_mask`, `labels` (-100 outside the completion), each (B, T+1); for every column
        `NAME_logps`, a tensor `logps/NAME` (B, T), 0 outside the completion; `advantages` (B, 1) and `rewards` (B,)
        where the rows have them. Position t of a (B, T) tensor belongs to token t+1.
    """
    starts = [len(row["prompt_ids"]) for row in rows]
    lengths = [start + len(row["completion_ids"]) for start, row in zip(starts, rows, strict=True)]
    multiple = pad_to_multiple_of or 1
    shape = (len(rows), -(-max(lengths) // multiple) * multiple)
    # Padding lies behind what is scored and is never attended to, so any token id will do.
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, -100),
    }
    names = [column for column in rows[0] if column.endswith("_logps")]
    logps = {name: torch.zeros(shape[0], shape[1] - 1) for name in names}
    for i, (row, start, end) in enumerate(zip(rows, starts, lengths, strict=True)):
        batch["input_ids"][i, :end] = torch.as_tensor([*row["prompt_ids"], *row["completion_ids"]])
        batch["attention_mask"][i, :end] = 1
        batch["labels"][i, start:end] = batch["input_ids"][i, start:end]
        for name in names:
            logps[name][i, start - 1 : end - 1] = torch.as_tensor(row[name], dtype=torch.float32)
    batch |= {f"logps/{name.removesuffix('_logps')}": x for name, x in logps.items()}
    if "advantage" in rows[0]:
        batch["advantages"] = torch.tensor([[row["advantage"]] for row in rows], dtype=torch.float32)  # (B, 1)
    if "reward" in rows[0]:
        batch["rewards"] = torch.tensor([row["reward"] for row in rows], dtype=torch.float32)  # (B,)
    return batch


@contextmanager
def fused_head(model: PreTrainedModel, temperature: float) -> Iterator[None]:
    """Within it, `model(..., labels=..., fused_lm_head=True)` gives log-probabilities and never holds the logits."""
    inner = causal_lm(model)
    before = inner.__dict__.get("forward")  # another fused head, or autocast
    add_fused_lm_head(inner, temperature=temperature)
    try:
        yield
    finally:
        if before is None:
            del inner.forward
        else:
            inner.forward = before


@torch.no_grad()
def completion_logps(
    model: PreTrainedModel, rows: Sequence[Mapping[str, Any]], *, temperature: float = 1.0, batch_size: int = 8
) -> list[np.ndarray]:
    """Log-probabilities of the completion tokens of `rows` under `model`, which is left as it was.

    Args:
        model: a causal language model, on the device where it should run; not sharded.
        rows: each with `prompt_ids` and `completion_ids`, lists of token ids.
        temperature: what logits are divided by.
        batch_size: rows in one forward pass.

    Returns:
        One float32 array (length of the completion,) a row.

    Raises:
        ValueError: if a value is not finite.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    # Rows of like length share a batch, the longest first: less padding, and what does not fit is known at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["prompt_ids"]) - len(rows[i]["completion_ids"]))
    logps: list = [None] * len(rows)
    with fused_head(model, temperature):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids = [{name: rows[i][name] for name in ("prompt_ids", "completion_ids")} for i in chosen]
            inputs = {name: x.to(device) for name, x in collate_rollouts(ids).items()}
            scores = model(**inputs, fused_lm_head=True, use_cache=False).log_probs.float().cpu().numpy()  # (B, T)
            for i, row, score in zip(chosen, ids, scores, strict=True):
                first = len(row["prompt_ids"]) - 1
                logps[i] = score[first : first + len(row["completion_ids"])].copy()
    model.train(was_training)
    if not all(np.isfinite(x).all() for x in logps):
        raise ValueError("the model gives a completion token a log-probability that is not finite")
    return logps


def score_rollouts(
    folder: str | os.PathLike,
    name: str,
    model: str | PreTrainedModel,
    *,
    batch_size: int = 8,
    use_cpu: bool = False,
    model_init_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Add the log-probabilities of `model` to rollouts on disk, as the column `NAME_logps`; resumes like writing them.

    Args:
        folder: as [`~trl_trust.frozen.sampling.write_rollouts`] left it.
        name: of the policy in a signal, such as `teacher`.
        model: an id or a folder, or a model in memory. Its tokens have to be those of the model that sampled.
        batch_size, use_cpu, model_init_kwargs: as where they were sampled, [`trl_trust.frozen.sampling`].

    Raises:
        ValueError: for a name that is taken, unfinished rollouts, log-probabilities of another model there (by its
            weights, where they are at hand), or other token ids.
    """
    if not name.isidentifier() or name in ("base", "old", "part", "settings"):
        raise ValueError(f"name={name!r} must be an identifier, and not one of base, old, part, settings.")
    files, settings = finished_parts(folder, "part")

    def build() -> Callable[[int], dict[str, list]]:
        policy = load_policy(model, use_cpu, model_init_kwargs)
        ids = pa.concat_tables([pq.read_table(file, columns=["prompt_ids", "completion_ids"]) for file in files])
        tokenizer = load_tokenizer(settings["model"], revision=settings.get("model_init_kwargs", {}).get("revision"))
        revision = (model_init_kwargs or {}).get("revision")
        check_token_ids(name, policy.config, tokenizer, max_id(ids), revision=revision)

        def make(part: int) -> dict[str, list]:
            rows = pq.read_table(files[part], columns=["prompt_ids", "completion_ids"]).to_pylist()
            logps = completion_logps(policy, rows, temperature=settings["temperature"], batch_size=batch_size)
            return {f"{name}_logps": logps}

        return make

    with claimed(folder, name, identity(model), [f"{name}-*.parquet"]) as folder, whole_models():
        write_parts(folder, name, len(files), build)


@contextmanager
def whole_models() -> Iterator[None]:
    """Within it each process loads whole models and runs them alone, though a launcher shards those of trainers.

    transformers 5.23 reads two globals: with the one it shards every model under ZeRO-3, with the other it leaves, for
    FSDP, the weights of all processes but the first empty.
    """
    sharding, ram = deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = sharding
        if ram is not None:
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = ram


def load_policy(model: str | PreTrainedModel, use_cpu: bool, model_init_kwargs: Mapping[str, Any] | None = None):
    """`model`, loaded if it is an id or a folder, on this process's device."""
    device, options = torch.device("cpu") if use_cpu else PartialState().device, model_init_kwargs or {}
    if "quantization_config" in options:  # such a model is put in its place while it is loaded, and not moved
        return create_model_from_path(model, **{"device_map": {"": device}, **options})
    if isinstance(model, str):
        model = create_model_from_path(model, **{"device_map": None, **options})
    return model.to(device)


def identity(model: str | PreTrainedModel) -> dict[str, str]:
    """Name of a model and, for one in memory or in a folder, a hash of a piece of each weight and of their shapes.

    Cheap, and not the date of a file, which a copy changes. A model that was trained on, or anew in the same folder,
    has another.
    """
    if not isinstance(model, str):
        return {"model": get_config_model_id(model.config), "weights": _fingerprint(model.named_parameters())}
    if not os.path.isdir(model):
        return {"model": model}
    return {"model": model, "weights": _fingerprint(_stored_weights(Path(model)))}


def _stored_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield f"{path.name}/{name}", file.get_tensor(name)  # mapped: only what is looked at is read
    for path in sorted(folder.glob("pytorch_model*.bin")):  # a pickle is not read in part
        yield path.name, torch.frombuffer(bytearray(hashlib.sha256(path.read_bytes()).digest()), dtype=torch.uint8)


def _fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, x in weights:
        piece = x.detach().flatten()[:256].contiguous().view(torch.uint8).cpu()
        digest.update(f"{name} {tuple(x.shape)} {x.dtype} ".encode() + piece.numpy().tobytes())
    return digest.hexdigest()
