"""How frozen rollouts are made: responses are sampled, scored, and written with their log-probabilities.

Each process holds the whole model, and answers the prompts of its share of the parts; see [`trl_trust.frozen.store`].
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from trl.trainer.utils import get_callable_name, get_config_model_id

from ..lookup import finished
from ..settings import Count, Positive, Range, Settings, Whole, as_mapping, check, setting
from .logps import completion_logps, identity, load_policy, whole_models
from .store import as_rows, claimed, number_of_parts, write_parts


Share = Annotated[float, Range(0, 1, above=True)]


@dataclass
class RolloutsConfig(Settings):
    r"""
    How frozen rollouts are made.

    Raises:
        ValueError: at construction, naming the field.
    """

    output_dir: str = setting(None, "Folder of the rollouts. What it holds already is kept, and completed.")
    num_prompts: Count = setting(
        1000, "Prompts, drawn from the data set without replacement (ERPD's released models: 1,000)."
    )
    num_generations: Annotated[int, Range(2, whole=True)] = setting(
        16, "Responses a prompt (ERPD's released models: 16)."
    )
    max_completion_length: Count = setting(1024, "Longest response, in tokens.")
    temperature: Positive = setting(
        1.0, "Of the sampling, and of the log-probabilities, which are over the whole vocabulary."
    )
    top_p: Share = setting(1.0, "Sample from the smallest set of this probability.")
    top_k: Whole = setting(0, "Sample from the k likeliest tokens; 0 for all.")
    prompts_per_part: Count = setting(
        4, "Prompts answered together in one call of `generate`, one file; an interruption loses one at most."
    )
    logps_batch_size: Count = setting(8, "Responses in a forward pass for log-probabilities.")
    reward_weights: list[float] | None = setting(None, "One weight a reward function; unset: all 1.")
    chat_template_kwargs: dict | str | None = setting(
        None, "For the chat template, where prompts are conversations, as a mapping, such as enable_thinking: false."
    )
    use_vllm: bool = setting(
        False, "Sample with vLLM, an engine in each process, beside the model that computes log-probabilities."
    )
    vllm_gpu_memory_utilization: Share = setting(
        0.5, "Share of the device that vLLM takes; the model for log-probabilities has the rest."
    )
    vllm_max_model_length: Count | None = setting(
        None, "Longest prompt and response that vLLM has to hold; unset: the model's own."
    )
    seed: int = setting(42, "Seed of the choice of prompts and of the sampling.")
    use_cpu: bool = setting(False, "Stay on the CPU although there is an accelerator.")

    def __post_init__(self):
        self.require(bool(self.output_dir), "output_dir", "must name a folder")
        check(self)
        self.chat_template_kwargs = as_mapping("chat_template_kwargs", self.chat_template_kwargs)

    def check_size(self, dataset: Dataset) -> None:
        """Raise `ValueError` unless `dataset` has `num_prompts` rows."""
        if len(dataset) < self.num_prompts:
            raise ValueError(f"num_prompts={self.num_prompts} is more than the {len(dataset)} rows of the data set.")


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

    with (
        claimed(config.output_dir, "settings", {**made_with, **settings}, ["part-*.parquet"]) as folder,
        whole_models(),
    ):
        write_parts(folder, "part", number_of_parts(settings), build)
    return folder


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
