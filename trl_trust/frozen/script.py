"""`trl-trust rollouts --config recipe.yaml --output_dir rollouts`: rollouts, written or finished."""

from collections.abc import Callable, Sequence
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from trl import DatasetMixtureConfig, ModelConfig, get_quantization_config

from ..rewards import load_reward_func
from ..script import (
    RecipeParser,
    TrustScriptArguments,
    check_reward_columns,
    column_names,
    init_kwargs,
    load_data,
    prepare_split,
)
from .sampling import RolloutsConfig, write_rollouts


def make_parser(prog: str = "trl-trust rollouts") -> RecipeParser:
    """The parser of `trl-trust rollouts`."""
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
    """[`init_kwargs`], and the quantization that a `ModelConfig` describes."""
    quantization = get_quantization_config(model_args)
    return init_kwargs(model_args) | ({} if quantization is None else {"quantization_config": quantization})
