"""`trl-trust sage --config recipe.yaml`: the training script of methods for flow models.

A diffusers pipeline is loaded by name, trained on prompts with rewards, and saved as a LoRA or a transformer.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config

from ..methods import Method
from ..script import RecipeParser, check_reward_columns, column_names, find_checkpoint, load_data, prepare_split, run


@dataclass
class FlowScriptArguments(ScriptArguments):
    """
    Arguments of the training script, beside those of the config and the model.

    Parameters:
        prompts (`list[str]`, *optional*):
            Prompts to train on, in place of a data set.
        eval_prompts (`list[str]`, *optional*):
            Prompts of an evaluation, in place of the data set's test split. Each gives one sample.
        reward_funcs (`list[str]`, *optional*):
            Names of rewards, see [`~trl_trust.flow.rewards.load_reward`]. Their sum, weighted by `reward_weights`, is
            the reward.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the data set that holds the prompt.
    """

    prompts: list[str] | None = field(default=None, metadata={"help": "Prompts to train on, in place of a data set."})
    eval_prompts: list[str] | None = field(
        default=None, metadata={"help": "Prompts of an evaluation, in place of the test split; one sample each."}
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards: `clip_score_reward`, `pick_score_reward`, `videoalign_reward:PATH`, "
            "`brightness_reward`, or dotted import paths. What follows a colon is a model or path."
        },
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column that holds the prompt."})

    # read by `script.prepare_split`
    system_prompt = None

    def __post_init__(self):
        for name in ("prompts", "eval_prompts", "reward_funcs"):
            if isinstance(getattr(self, name), str):  # without the dash of a list
                setattr(self, name, [getattr(self, name)])


@dataclass
class FlowModelConfig(ModelConfig):
    """TRL's `ModelConfig` with a LoRA that fits: without dropout, on the projections of attention."""

    lora_dropout: float = field(default=0.0, metadata={"help": "Must be 0, or fresh roll-outs have a ratio."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"], metadata={"help": "Modules that get a LoRA."}
    )


READ = {
    "model_name_or_path",
    "model_revision",
    "dtype",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_task_type",
    "use_rslora",
    "use_dora",
}


def make_parser(method: Method, prog: str | None = None) -> RecipeParser:
    """The parser of `method`: the script's arguments, the method's config, the model's, a mixture of data."""
    config = getattr(import_module(method.module), method.config)
    return RecipeParser((FlowScriptArguments, config, FlowModelConfig, DatasetMixtureConfig), prog=prog)


def prepare(words: list[str], method: Method) -> Callable[[], None]:
    """Read the words of a command line, and return the training that they ask for, ready to start.

    Raises:
        ValueError: for settings that do not fit each other, the data or the rewards.
        OSError: if the pipeline cannot be found.
        ImportError: without diffusers, naming the extra.
    """
    parser = make_parser(method, f"trl-trust {method.name}")
    script_args, *configs = parser.parse(words)
    return partial(run, build_trainer(method, script_args, *configs), script_args.dataset_name, parser.recipe())


def build_trainer(method: Method, script_args, training_args, model_args, dataset_args):
    """The trainer of `method`, ready to train. Raises as [`prepare`] does."""
    for known in fields(ModelConfig):
        value = getattr(model_args, known.name)
        if known.name not in READ and value != known.default:
            raise ValueError(f"{known.name}={value!r} is not read for flow models; leave it out.")
    if not script_args.reward_funcs:
        raise ValueError("no reward: set `reward_funcs`, for instance to clip_score_reward")
    train, evaluation = load_prompts(script_args, training_args, dataset_args)
    training_args.resume_from_checkpoint = find_checkpoint(training_args)
    from .rewards import load_reward

    rewards = [load_reward(name) for name in script_args.reward_funcs]
    check_reward_columns(rewards, column_names(train), ("samples", "prompts"))
    trainer = getattr(import_module(method.module), method.trainer)(
        load_pipeline(model_args, training_args.seed),
        training_args,
        rewards,
        train,
        peft_config=get_peft_config(model_args),
        eval_dataset=evaluation,
    )
    trainer.get_optimizer_cls_and_kwargs(training_args, trainer.model)  # raises for a wrong `optim_args`
    return trainer


def load_prompts(script_args: FlowScriptArguments, training_args, dataset_args) -> tuple:
    """Rows to train on, and rows of an evaluation or `None`."""
    from datasets import Dataset

    from_list = lambda prompts: Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    if script_args.dataset_streaming:
        raise ValueError("dataset_streaming=True: the prompts are encoded once before training; leave it out.")
    splits = None
    if script_args.prompts is None:
        splits = load_data(script_args, dataset_args)
        train = prepare_split(splits, script_args.dataset_train_split, script_args)
    elif script_args.dataset_name or dataset_args.datasets:
        raise ValueError(f"prompts: set either them or dataset_name={script_args.dataset_name!r}")
    else:
        train = from_list(script_args.prompts)
    if script_args.eval_prompts is not None:
        return train, from_list(script_args.eval_prompts)
    if training_args.eval_strategy == "no":
        return train, None
    if splits is None:
        raise ValueError(f"eval_strategy={training_args.eval_strategy.value!r} needs `eval_prompts`.")
    return train, prepare_split(splits, script_args.dataset_test_split, script_args)


def load_pipeline(model_args: ModelConfig, seed: int):
    """The diffusers pipeline that `model_name_or_path` names; `tiny-sd3` and `tiny-wan` are built here at random."""
    import torch

    from .adapters import import_diffusers
    from .adapters.tiny import TINY

    name = model_args.model_name_or_path
    if name is None or (name.startswith((".", "/")) and not os.path.isdir(name)):
        raise ValueError(
            f"model_name_or_path={name!r}: set it to a diffusers pipeline, on the Hub or in a directory, or to "
            f"{' or '.join(TINY)}"
        )
    dtype = None if model_args.dtype in (None, "auto") else getattr(torch, model_args.dtype)
    if name in TINY:
        return TINY[name](seed).to(dtype=dtype or torch.float32)
    # a VAE in 16 bits costs quality, and is a small part
    types = {} if dtype is None else {"dtype": {"default": dtype, "vae": torch.float32}}
    try:
        return import_diffusers().DiffusionPipeline.from_pretrained(name, revision=model_args.model_revision, **types)
    except OSError as error:
        raise ValueError(
            f"model_name_or_path={name!r} is no pipeline, and cannot be had from the Hub: {error}"
        ) from error
