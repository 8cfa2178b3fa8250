"""The training script behind `trl-trust async-NAME`: data, rewards and fields as in every method's, and no evaluation.

Rollouts come from a vLLM server that runs beside it (`vllm_server_base_url`), or, for a first look on a CPU, from this
very process (`local_lag`).
"""

import pickle
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, make_dataclass
from importlib import import_module

from trl import DatasetMixtureConfig, ModelConfig

from ..methods import Method
from ..rewards import load_reward_func
from ..script import (
    TRAINER_PROVIDES,
    RecipeParser,
    TrustScriptArguments,
    check_reward_columns,
    column_names,
    find_checkpoint,
    find_model,
    load_data,
    model_of,
    prepare_split,
    run,
)


@dataclass
class AsyncScriptArguments(TrustScriptArguments):
    """[`TrustScriptArguments`], and `local_lag`: no server, rollouts from a copy of the policy so many updates old."""

    local_lag: int | None = field(
        default=None,
        metadata={
            "help": "For a first look on a CPU: sample in this process, from a copy of the policy this many weight "
            "versions old, instead of on a vLLM server."
        },
    )


# `dtype` is the config's own here, attention is TRL's tree attention, and quantized weights cannot be sent to a server
_NOT_HERE = ("dtype", "attn_implementation", "load_in_8bit", "load_in_4bit", "bnb_4bit_quant_type")
_NOT_HERE += ("use_bnb_nested_quant", "bnb_4bit_quant_storage")
AsyncModelConfig = make_dataclass(
    "AsyncModelConfig",
    [
        (f.name, f.type, field(default=f.default, metadata=f.metadata))
        for f in fields(ModelConfig)
        if f.name not in _NOT_HERE
    ],
    namespace={
        "__doc__": "The fields of [`trl.ModelConfig`] that the asynchronous trainer reads.",
        "__post_init__": ModelConfig.__post_init__,
        "load_in_8bit": False,
        "load_in_4bit": False,
    },
)


def make_parser(method: Method, prog: str | None = None) -> RecipeParser:
    """Return the parser of `method`: the script's arguments, the method's config, the model's, a mixture of data."""
    config = getattr(import_module(method.module), method.config)
    return RecipeParser((AsyncScriptArguments, config, AsyncModelConfig, DatasetMixtureConfig), prog=prog)


def prepare(words: list[str], method: Method) -> Callable[[], None]:
    """Read the words of a command line, and return the training that they ask for, ready to start.

    Raises:
        ValueError, OSError, ImportError: see [`build_trainer`].
    """
    from .local import on_a_cpu

    parser = make_parser(method, prog=f"trl-trust {method.name}")
    script_args, *configs = parser.parse(words)
    here = nullcontext if script_args.local_lag is None else on_a_cpu

    def start() -> None:
        with here():
            run(trainer, script_args.dataset_name, parser.recipe())

    with here():
        trainer = build_trainer(method, script_args, *configs)
    return start


def build_trainer(method: Method, script_args: AsyncScriptArguments, training_args, model_args, dataset_args):
    """Return the asynchronous trainer of `method`, ready to train.

    Raises:
        ValueError: for settings that do not fit each other, the data or the rewards, each said in one line.
        ImportError: without vLLM, unless `local_lag` is set (from TRL).
        OSError: if the model cannot be found.
    """
    from trl import get_peft_config

    model = model_of(model_args)
    if script_args.reward_model_name_or_path:
        raise ValueError(
            f"reward_model_name_or_path={script_args.reward_model_name_or_path!r}: the asynchronous trainer scores "
            f"in a process without a GPU; use functions, `reward_funcs`, or the synchronous trainer"
        )
    rewards = [load_reward_func(name, training_args.max_completion_length) for name in script_args.reward_funcs or ()]
    if not rewards:
        raise ValueError("no reward: set `reward_funcs`, for instance to math_accuracy_reward")
    for name, reward in zip(script_args.reward_funcs, rewards, strict=True):
        try:
            pickle.dumps(reward)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"reward_funcs={name!r} cannot be sent to the process that scores: {error}; use a function of a module"
            ) from error
    if script_args.local_lag is None and training_args.device.type == "cpu":
        raise ValueError(
            "use_cpu, or no GPU: TRL's asynchronous trainer packs rows for FlashAttention 3, and samples on a vLLM "
            "server; for a first look on a CPU set `local_lag`"
        )
    train = prepare_split(load_data(script_args, dataset_args), script_args.dataset_train_split, script_args)
    check_reward_columns(rewards, column_names(train), TRAINER_PROVIDES)
    if script_args.local_lag is None and isinstance(next(iter(train))["prompt"], str):
        raise ValueError(
            f"prompt_column={script_args.prompt_column!r} holds text: the rollout worker renders conversations; set "
            f"`system_prompt`, to an empty string for a chat without one"
        )
    find_model(model, model_args.model_revision, training_args.trust_remote_code)
    training_args.resume_from_checkpoint = find_checkpoint(training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = getattr(import_module(method.module), method.trainer)(
        model=model,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train,
        peft_config=get_peft_config(model_args),
        **local_rollouts(model, train, rewards, training_args, script_args.local_lag),
    )
    trainer.get_optimizer_cls_and_kwargs(training_args, trainer.model)  # raises for a wrong `optim_args`
    return trainer


def local_rollouts(model: str, train, rewards: list[Callable], args, lag: int | None) -> dict:
    """The trainer's arguments with which rollouts come from its own process; none for `lag=None`.

    Raises:
        ValueError: for a lag that is none, or above `max_staleness`.
    """
    from .local import LocalRolloutWorker, LocalWeightTransfer

    if lag is None:
        return {}
    if not 0 <= lag <= args.max_staleness:
        raise ValueError(
            f"local_lag={lag!r} must be a whole number from 0 to max_staleness={args.max_staleness}, above which TRL "
            f"drops every row"
        )
    if args.token_budget is None:
        args.token_budget = 0  # there is no server to ask
    ahead = args.per_device_train_batch_size * args.world_size
    if ahead % args.num_generations:
        raise ValueError(
            f"per_device_train_batch_size={args.per_device_train_batch_size}: with local_lag a micro-batch of "
            f"{ahead} rows over all processes must hold whole groups of num_generations={args.num_generations}"
        )
    worker = LocalRolloutWorker(
        model,
        train,
        rewards,
        rows=ahead * args.gradient_accumulation_steps,
        ahead=ahead,
        lag=lag,
        num_generations=args.num_generations,
        max_completion_length=args.max_completion_length,
        seed=args.seed,
    )
    return {"rollout_worker": worker, "weight_transfer": LocalWeightTransfer(worker)}
