"""Frozen rollouts: prompts, completions, rewards and log-probabilities on disk, written once and read by many runs.

    rollouts/settings.json         what they were made with; a second run with other settings is refused
    rollouts/part-00000.parquet    the responses to a few prompts, one row a response
    rollouts/teacher-00000.parquet log-probabilities of part 0 under a policy called `teacher`

A part is written whole or not at all. It depends on its number, and on the settings, the prompts and the model, which
settings.json tells apart: an interrupted run goes on where it stopped, and several processes, which take the parts in
turns, write what one would. Nothing is communicated, so each process holds the whole model, and all of them see one
file system.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from datasets import Dataset, concatenate_datasets
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.integrations import deepspeed
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, get_callable_name, get_config_model_id

from ..anatomy import causal_lm
from .common import as_mapping, check_token_ids, finished, load_tokenizer


# What `prepare_rollouts` needs of a data set; `write_rollouts` also stores `prompt`, `completion` and `base_logps`.
COLUMNS = ("group", "prompt_ids", "completion_ids", "reward")


@dataclass
class RolloutsConfig:
    r"""
    How frozen rollouts are made.

    Parameters:
        output_dir (`str`):
            Folder of the rollouts. What it holds already is kept, and completed.
        num_prompts (`int`, *optional*, defaults to `1000`):
            Prompts, drawn from the data set without replacement (ERPD's released models: 1,000).
        num_generations (`int`, *optional*, defaults to `16`):
            Responses a prompt (ERPD's released models: 16).
        max_completion_length (`int`, *optional*, defaults to `1024`):
            Longest response, in tokens.
        temperature, top_p, top_k:
            Of the sampling. Log-probabilities are taken at the same temperature, over the whole vocabulary.
        prompts_per_part (`int`, *optional*, defaults to `4`):
            Prompts answered together: `prompts_per_part * num_generations` sequences in one call of `generate`, one
            file. An interruption loses one part at most.
        logps_batch_size (`int`, *optional*, defaults to `8`):
            Responses in one forward pass for log-probabilities.
        reward_weights (`list[float]`, *optional*):
            One weight a reward function; `None` for all 1.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            For the chat template, where prompts are conversations, e.g. `{"enable_thinking": false}`.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Sample with vLLM, an engine in each process, beside the model that computes log-probabilities.
        vllm_gpu_memory_utilization (`float`, *optional*, defaults to `0.5`):
            Share of the device that the engine takes.
        vllm_max_model_length (`int`, *optional*):
            Longest prompt and response that the engine has to hold; `None` for the model's own.
        seed (`int`, *optional*, defaults to `42`):
            Of the choice of prompts and of the sampling.
        use_cpu (`bool`, *optional*, defaults to `False`):
            Stay on the CPU although there is an accelerator.

    Raises:
        ValueError: at construction, naming the field.
    """

    output_dir: str = field(default=None, metadata={"help": "Folder of the rollouts; completed if it holds some."})
    num_prompts: int = field(default=1000, metadata={"help": "Prompts, drawn without replacement."})
    num_generations: int = field(default=16, metadata={"help": "Responses a prompt, at least 2."})
    max_completion_length: int = field(default=1024, metadata={"help": "Longest response, in tokens."})
    temperature: float = field(default=1.0, metadata={"help": "Of the sampling and of the log-probabilities."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the smallest set of this probability."})
    top_k: int = field(default=0, metadata={"help": "Sample from the k likeliest tokens; 0 for all."})
    prompts_per_part: int = field(
        default=4, metadata={"help": "Prompts answered together, one file; an interruption loses one at most."}
    )
    logps_batch_size: int = field(default=8, metadata={"help": "Responses in a forward pass for log-probabilities."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight a reward function; unset: all 1."}
    )
    chat_template_kwargs: dict | str | None = field(
        default=None, metadata={"help": "For the chat template, as a mapping, such as enable_thinking: false."}
    )
    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM, an engine in each process."})
    vllm_gpu_memory_utilization: float = field(
        default=0.5,
        metadata={"help": "Share of the device that vLLM takes; the model for log-probabilities has the rest."},
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Longest prompt and response that vLLM has to hold; unset: the model's own."}
    )
    seed: int = field(default=42, metadata={"help": "Seed of the choice of prompts and of the sampling."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU although there is an accelerator."})

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError(f"output_dir={self.output_dir!r} must name a folder.")
        smallest = dict(
            num_prompts=1, num_generations=2, max_completion_length=1, prompts_per_part=1, logps_batch_size=1, top_k=0
        )
        for name, low in smallest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value!r} must be a whole number >= {low}.")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r} must be a finite number > 0.")
        for name in ("top_p", "vllm_gpu_memory_utilization"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be in (0, 1].")
        self.chat_template_kwargs = as_mapping("chat_template_kwargs", self.chat_template_kwargs)

    def check_size(self, dataset: Dataset) -> None:
        """Raise `ValueError` unless `dataset` has `num_prompts` rows."""
        if len(dataset) < self.num_prompts:
            raise ValueError(f"num_prompts={self.num_prompts} is more than the {len(dataset)} rows of the data set.")


# --------------------------------------------------------------------------------------------------------------------
# Log-probabilities of given tokens
# --------------------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------------


def write_rollouts(
    model: str | PreTrainedModel,
    dataset: Dataset,
    reward_funcs: Callable | Sequence[Callable],
    config: RolloutsConfig,
    processing_class=None,
    model_init_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Sample responses, score them, and write them with their log-probabilities; what is there already is kept.

    Args:
        model: the policy, an id or a folder, or a model in memory; the former is loaded only if something is missing.
        dataset: a column `prompt`, text or messages, and whatever the rewards read.
        reward_funcs: called as `GRPOTrainer` calls them, but one after the other where they are async; a response's
            reward is their weighted sum.
        config: see [`RolloutsConfig`].
        processing_class: the tokenizer; that of `model` by default.
        model_init_kwargs: how `model` is loaded, as in `GRPOConfig`.

    Returns:
        The folder, for [`load_rollouts`].

    Raises:
        ValueError: if the data set is too small, the weights do not match, the folder holds other rollouts (other
            settings, prompts or model), or a reward function does not return a number a response.
    """
    rewards = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
    weights = [1.0] * len(rewards) if config.reward_weights is None else config.reward_weights
    if config.use_vllm and not isinstance(model, str):
        raise ValueError("use_vllm=True: vLLM loads the model itself; give an id or a folder instead of a model.")
    if len(weights) != len(rewards):
        raise ValueError(
            f"reward_weights={weights!r} must have one number for each of {len(rewards)} reward functions."
        )
    config.check_size(dataset)
    prompts = dataset.shuffle(seed=config.seed).select(range(config.num_prompts))
    model_id = model if isinstance(model, str) else get_config_model_id(model.config)
    # What the content depends on; the batch size of the log-probabilities, say, is not part of it.
    apart = ("output_dir", "logps_batch_size", "use_cpu", "vllm_gpu_memory_utilization", "vllm_max_model_length")
    settings = {k: v for k, v in asdict(config).items() if k not in apart}
    options = {name: str(value) for name, value in (model_init_kwargs or {}).items()}
    tokenizer = processing_class
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model_id, revision=options.get("revision"))
    # as the model reads them, which tells another data set, system prompt, chat template and tokenizer apart
    ids = prompt_ids(tokenizer, prompts["prompt"], config.chat_template_kwargs)
    made_with = {
        **identity(model),
        "model_init_kwargs": options,
        "reward_funcs": [get_callable_name(f) for f in rewards],
        "prompts_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "eos_token_id": tokenizer.eos_token_id,
    }
    folder = claim(config.output_dir, "settings", {**made_with, **settings}, ["part-*.parquet"])

    def build() -> Callable[[int], dict[str, list]]:
        policy = load_policy(model, config.use_cpu, model_init_kwargs)
        # as in TRL: every end that the model declares, such as that of a turn, and the tokenizer's
        ends = policy.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        ends = [end for end in dict.fromkeys([tokenizer.eos_token_id, *ends]) if end is not None]
        if config.use_vllm:
            generate = _vllm_generate(model_id, config, ends, policy.dtype)
        else:
            generate = _generate(policy, tokenizer, config, ends)

        def make(part: int) -> dict[str, list]:
            first = part * config.prompts_per_part
            chosen = range(first, min(first + config.prompts_per_part, config.num_prompts))
            rows, here = prompts.select(chosen).to_list(), [ids[i] for i in chosen]
            seed = int(np.random.SeedSequence([config.seed, part]).generate_state(1)[0])
            table = _sample(generate, tokenizer, rows, here, config.num_generations, ends, seed)
            table["group"] = [first + i for i in range(len(rows)) for _ in range(config.num_generations)]
            table["reward"] = _rewards(rewards, weights, rows, table, config.num_generations)
            table["base_logps"] = completion_logps(
                policy, as_rows(table), temperature=config.temperature, batch_size=config.logps_batch_size
            )
            return table

        return make

    _write_parts(folder, "part", _number_of_parts(settings), build)
    return folder


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
        folder: as [`write_rollouts`] left it.
        name: of the policy in a signal, such as `teacher`.
        model: an id or a folder, or a model in memory. Its tokens have to be those of the model that sampled.
        batch_size, use_cpu, model_init_kwargs: as in [`RolloutsConfig`] and [`write_rollouts`].

    Raises:
        ValueError: for a name that is taken, unfinished rollouts, log-probabilities of another model there (by its
            weights, where they are at hand), or other token ids.
    """
    if not name.isidentifier() or name in ("base", "old", "part", "settings"):
        raise ValueError(f"name={name!r} must be an identifier, and not one of base, old, part, settings.")
    files, settings = _finished(folder, "part")
    claim(folder, name, identity(model), [f"{name}-*.parquet"])

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

    _write_parts(Path(folder), name, len(files), build)


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


def claim(folder: str | os.PathLike, name: str, settings: Mapping[str, Any], made: Sequence[str]) -> Path:
    """Write `settings` to `folder/NAME.json`, or check that they are the ones that stand there. Returns the folder.

    Args:
        made: patterns of what is made with them. Until there is such a file, other settings take their place: a slip
            that is found when the work begins must not stand in the way of the mended run.

    Raises:
        ValueError: on every process, if what the folder holds was made with other settings.
    """
    state, folder = PartialState(), Path(folder)
    path = folder / f"{name}.json"
    if state.is_main_process and not (path.exists() and any(any(folder.glob(x)) for x in made)):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(settings, indent=1))
        os.replace(scratch, path)
    state.wait_for_everyone()
    found, wanted = json.loads(path.read_text()), json.loads(json.dumps(settings))
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{key}={wanted.get(key)!r}, but {path} was written with {key}={found.get(key)!r}; "
                f"go on with those settings, or choose another folder."
            )
    return folder


def _number_of_parts(settings: Mapping[str, Any]) -> int:
    return -(-settings["num_prompts"] // settings["prompts_per_part"])


def _write_parts(folder: Path, name: str, count: int, build: Callable[[], Callable[[int], dict[str, list]]]) -> None:
    """Write the missing ones of `count` parts, this process every n-th; `build` is called only if one is missing."""
    state = PartialState()
    files = [folder / f"{name}-{part:05d}.parquet" for part in range(count)]
    missing = [part for part in range(state.process_index, count, state.num_processes) if not files[part].exists()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not state.is_main_process)
    with whole_models(), bars as progress:
        done = lambda: sum(file.exists() for file in files)  # of all processes
        bar = progress.add_task(f"{folder.name}/{name}", total=count, completed=done(), note="")
        make = build() if missing else None
        for part in missing:
            table = make(part)
            scratch = files[part].with_suffix(".tmp")
            pq.write_table(pa.table(table), scratch)
            os.replace(scratch, files[part])  # atomic: a part is there as a whole or not at all
            scored = [reward for reward in table.get("reward", ()) if not np.isnan(reward)]
            progress.update(bar, completed=done(), note=f"reward {np.mean(scored):.2f}" if scored else "")
        while done() < count:  # not in a collective, which would time out where a part takes long
            time.sleep(0.2)
            progress.update(bar, completed=done())
        progress.update(bar, completed=count)


def as_rows(table: Mapping[str, Sequence]) -> list[dict[str, Any]]:
    """Columns to rows."""
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def _generate(
    policy: PreTrainedModel, tokenizer, config: RolloutsConfig, ends: list[int]
) -> Callable[[list[list[int]], int], list[list[int]]]:
    """What answers prompts, token ids, with `num_generations` responses each, by the model's own `generate`."""
    settings = GenerationConfig(
        do_sample=True,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        num_return_sequences=config.num_generations,
        max_new_tokens=config.max_completion_length,
        eos_token_id=ends or None,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )

    @torch.no_grad()
    def generate(prompt_ids: list[list[int]], seed: int) -> list[list[int]]:
        width = max(map(len, prompt_ids))
        input_ids = torch.zeros(len(prompt_ids), width, dtype=torch.long)
        attention_mask = torch.zeros_like(input_ids)
        for i, row in enumerate(prompt_ids):
            input_ids[i, width - len(row) :], attention_mask[i, width - len(row) :] = torch.as_tensor(row), 1
        device, was_training, models_own = policy.device, policy.training, policy.generation_config
        policy.eval()
        # Set, not passed: `generate` fills the gaps of a passed one from the model's own (repetition_penalty)
        policy.generation_config = settings
        try:
            with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
                torch.manual_seed(seed)
                sequences = policy.generate(input_ids.to(device), attention_mask=attention_mask.to(device))
        finally:
            policy.generation_config = models_own
            policy.train(was_training)
        return sequences[:, width:].tolist()  # (n*G, T)

    return generate


def _vllm_generate(
    model_id: str, config: RolloutsConfig, ends: list[int], dtype: torch.dtype
) -> Callable[[list[list[int]], int], list[list[int]]]:
    """The same by vLLM, whose batches may round differently from run to run: equal seeds, nearly equal samples."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=model_id,
        dtype=dtype,
        seed=config.seed,
        gpu_memory_utilization=config.vllm_gpu_memory_utilization,
        max_model_len=config.vllm_max_model_length,
        # an engine of its own in each process that a launcher has started
        distributed_executor_backend="external_launcher" if PartialState().num_processes > 1 else None,
        generation_config="vllm",  # not the sampling settings that come with the model
    )

    def generate(prompt_ids: list[list[int]], seed: int) -> list[list[int]]:
        seeds = np.random.SeedSequence(seed).generate_state(len(prompt_ids)).tolist()  # one a prompt
        settings = [
            SamplingParams(
                n=config.num_generations,
                temperature=config.temperature,
                top_p=config.top_p,
                top_k=config.top_k,
                max_tokens=config.max_completion_length,
                stop_token_ids=ends,
                seed=seed,
            )
            for seed in seeds
        ]
        requests = [{"prompt_token_ids": row} for row in prompt_ids]
        answers = engine.generate(requests, settings, use_tqdm=False)
        return [list(output.token_ids) for answer in answers for output in answer.outputs]

    return generate


def prompt_ids(tokenizer, prompts: Sequence, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[list[int]]:
    """Token ids of prompts, text or conversations; these go through the chat template."""
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    options = {"add_generation_prompt": True, "tokenize": False, **(chat_template_kwargs or {})}
    texts = [tokenizer.apply_chat_template(prompt, **options) for prompt in prompts]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has written them


def max_id(table: pa.Table) -> int:
    """The largest token id in `prompt_ids` and `completion_ids`."""
    return max(pc.max(pc.list_flatten(table[name])).as_py() or 0 for name in ("prompt_ids", "completion_ids"))


def _sample(
    generate, tokenizer, rows: list[dict], ids: list[list[int]], G: int, ends: list[int], seed: int
) -> dict[str, list]:
    """`G` responses to each prompt, as columns."""
    prompts = [row["prompt"] for row in rows]
    completion_ids, truncated = [], []
    for row in generate(ids, seed):
        end = next((t + 1 for t, token in enumerate(row) if token in ends), None)
        completion_ids.append(np.asarray(row[:end], dtype=np.int32))
        truncated.append(end is None)
    return {
        "prompt": [prompt for prompt in prompts for _ in range(G)],
        "completion": tokenizer.batch_decode(completion_ids, skip_special_tokens=True),
        "prompt_ids": [np.asarray(row, dtype=np.int32) for row in ids for _ in range(G)],
        "completion_ids": completion_ids,
        "truncated": truncated,
    }


def _rewards(functions, weights, rows: list[dict], table: Mapping[str, list], G: int) -> np.ndarray:
    """(n*G,) weighted sums of the rewards, NaN where no function scored the response."""
    columns = {key: [row[key] for row in rows for _ in range(G)] for key in rows[0] if key != "prompt"}
    completions = table["completion"]
    if not isinstance(table["prompt"][0], str):
        completions = [[{"role": "assistant", "content": text}] for text in completions]
    scores = []
    for function in functions:
        output = finished(
            function(
                prompts=table["prompt"],
                completions=completions,
                completion_ids=[ids.tolist() for ids in table["completion_ids"]],
                trainer_state=None,  # these three stand in for what a trainer would pass
                log_extra=lambda name, values: None,
                log_metric=lambda name, value: None,
                **columns,
            )
        )
        name = get_callable_name(function)
        try:
            score = [np.nan if value is None else float(value) for value in output]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the reward function {name} must return a number or None a response: {error}."
            ) from error
        if len(score) != len(completions):
            raise ValueError(
                f"the reward function {name} returned {len(score)} rewards for {len(completions)} responses; it must "
                f"return one each."
            )
        scores.append(score)
    scores = np.asarray(scores, dtype=np.float64)  # (functions, n*G)
    total = np.nansum(scores * np.asarray(weights)[:, None], axis=0)
    return np.where(np.isnan(scores).all(axis=0), np.nan, total)


# --------------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------------


def _finished(folder: str | os.PathLike, name: str) -> tuple[list[Path], dict[str, Any]]:
    """The files of `name` and the settings of the rollouts; `ValueError` unless every part is there."""
    folder = Path(folder)
    if not (folder / "settings.json").is_file():
        raise ValueError(f"{folder} holds no rollouts; write them with `trl-trust rollouts`.")
    settings = json.loads((folder / "settings.json").read_text())
    files = [folder / f"{name}-{part:05d}.parquet" for part in range(_number_of_parts(settings))]
    missing = sum(not file.exists() for file in files)
    if missing:
        raise ValueError(
            f"{folder}: {missing} of {len(files)} files {name}-*.parquet are missing; run again to finish."
        )
    return files, settings


def load_rollouts(folder: str | os.PathLike) -> Dataset:
    """The rollouts in `folder` as one data set, a row a response, with the log-probabilities of every policy scored.

    Columns: `group` (number of the prompt), `prompt`, `completion`, `prompt_ids`, `completion_ids`, `reward` (NaN
    where unscored), `truncated`, `temperature` of sampling and log-probabilities, `base_logps`, and `NAME_logps` for
    each [`score_rollouts`]; one that has not written a part yet is passed over.

    Raises:
        ValueError: if there are none, or they are unfinished.
    """
    files, settings = _finished(folder, "part")
    names = sorted(path.stem for path in Path(folder).glob("*.json") if path.stem != "settings")
    names = [name for name in names if any(Path(folder).glob(f"{name}-*.parquet"))]
    tables = [files, *(_finished(folder, name)[0] for name in names)]
    data = concatenate_datasets([Dataset.from_parquet([str(file) for file in files]) for files in tables], axis=1)
    return data.add_column("temperature", [settings["temperature"]] * len(data))


def prepare_rollouts(dataset: Dataset) -> Dataset:
    """Drop what carries no signal and add the column `advantage`, the reward normalised within its group.

    Dropped are unscored and empty responses, and groups whose rewards are all equal. An advantage is
    `(R - mean) / (std + 1e-4)` with the unbiased standard deviation, as in `GRPOTrainer`.

    Args:
        dataset: the columns in [`COLUMNS`], and any number of `NAME_logps`.

    Raises:
        ValueError: if a column is missing, a prompt is empty, or nothing remains.
    """
    missing = [column for column in COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the rollouts have no column {', '.join(missing)}, only {', '.join(dataset.column_names)}; write them "
            f"with `trl-trust rollouts` and read them with `load_rollouts`."
        )
    logps = [column for column in dataset.column_names if column.endswith("_logps")]
    dataset = dataset.select_columns([*COLUMNS, *logps])
    lengths = lambda column: pc.list_value_length(dataset.with_format("arrow")[column][:]).to_numpy()
    if (lengths("prompt_ids") == 0).any():
        raise ValueError("a row has empty `prompt_ids`; a completion needs a token to follow.")
    for column in logps:
        values = pc.list_flatten(dataset.with_format("arrow")[column][:])
        if (lengths(column) != lengths("completion_ids")).any():
            raise ValueError(
                f"`{column}` and `completion_ids` differ in length in a row; one number a token is needed."
            )
        if not pc.all(pc.is_finite(values)).as_py():
            raise ValueError(f"`{column}` has a value that is not finite; the policy cannot have sampled that token.")
    rewards = np.asarray(dataset["reward"], dtype=np.float64)
    rewards[lengths("completion_ids") == 0] = np.nan
    _, group = np.unique(np.asarray(dataset["group"]), return_inverse=True)

    advantages = np.full_like(rewards, np.nan)
    for rows in np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1]):
        rows = rows[~np.isnan(rewards[rows])]
        if len(rows) > 1 and np.ptp(rewards[rows]) > 0:
            advantages[rows] = (rewards[rows] - rewards[rows].mean()) / (rewards[rows].std(ddof=1) + 1e-4)
    kept = np.flatnonzero(~np.isnan(advantages))
    if len(kept) == 0:
        raise ValueError("no group of the rollouts has two different rewards, so there is nothing to learn from.")
    return dataset.select(kept).remove_columns("group").add_column("advantage", advantages[kept])


# --------------------------------------------------------------------------------------------------------------------
# Command line
# --------------------------------------------------------------------------------------------------------------------


def make_parser(prog: str = "trl-trust rollouts"):
    """The parser of `trl-trust rollouts`."""
    from trl import DatasetMixtureConfig, ModelConfig

    from ..script import RecipeParser, TrustScriptArguments

    return RecipeParser((TrustScriptArguments, RolloutsConfig, ModelConfig, DatasetMixtureConfig), prog=prog)


def main(argv: Sequence[str]) -> int:
    """`trl-trust rollouts --config recipe.yaml --output_dir rollouts`: write rollouts, or finish them. Returns 0."""
    return prepare(argv)()


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Read and check the words of a command line, and return what writes the rollouts.

    Raises:
        ValueError: for bad settings.
    """
    script_args, config, model_args, dataset_args = make_parser().parse(list(argv))
    data, rewards = load_sources(script_args, config, model_args, dataset_args)

    def run() -> int:
        model = model_args.model_name_or_path
        folder = write_rollouts(model, data, rewards, config, model_init_kwargs=model_init_kwargs(model_args))
        PartialState().print(f"Rollouts in {folder}")
        return 0

    return run


def load_sources(script_args, config: RolloutsConfig, model_args, dataset_args) -> tuple[Dataset, list[Callable]]:
    """The data set, with a `prompt` column, and the reward functions that the arguments of a script name.

    Raises:
        ValueError: if one of them, or the model, is missing, or they do not fit each other.
    """
    from ..rewards import load_reward_func
    from ..script import check_reward_columns, column_names, load_data, prepare_split

    if model_args.model_name_or_path is None:
        raise ValueError("no model: set `model_name_or_path` (on the Hub, or a directory)")
    if script_args.reward_model_name_or_path:
        raise ValueError(
            f"reward_model_name_or_path={script_args.reward_model_name_or_path!r}: rollouts are scored by functions; "
            f"use `reward_funcs`."
        )
    if not script_args.reward_funcs:
        raise ValueError("no reward: set `reward_funcs`, for instance to math_accuracy_reward")
    rewards = [load_reward_func(name, config.max_completion_length) for name in script_args.reward_funcs]
    data = prepare_split(load_data(script_args, dataset_args), script_args.dataset_train_split, script_args)
    check_reward_columns(rewards, column_names(data))
    config.check_size(data)
    return data, rewards


def model_init_kwargs(model_args) -> dict[str, Any]:
    """How TRL's scripts load the model that a `ModelConfig` describes."""
    from trl import get_quantization_config

    quantization = get_quantization_config(model_args)
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **({} if quantization is None else {"quantization_config": quantization}),
    }
