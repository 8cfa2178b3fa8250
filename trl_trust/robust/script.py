"""`trl-trust robust-sft` and `robust-reward --config recipe.yaml`: TRL's SFT and reward scripts with robust terms."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..methods import Method
from ..script import (
    RecipeParser,
    find_checkpoint,
    find_model,
    init_kwargs,
    load_data,
    model_of,
    run,
    take_split,
)


def make_parser(method: Method, prog: str | None = None) -> RecipeParser:
    """The parser of `method`: TRL's script arguments, the method's config, the model's, the data mixture."""
    config = getattr(import_module(method.module), method.config)
    return RecipeParser((ScriptArguments, config, ModelConfig, DatasetMixtureConfig), prog=prog)


def prepare(words: list[str], method: Method) -> Callable[[], None]:
    """Read the words of a command line, and return the training that they ask for, ready to start.

    Raises:
        ValueError: for settings that do not fit each other, the data or the model.
    """
    parser = make_parser(method, f"trl-trust {method.name}")
    script_args, training_args, model_args, dataset_args = parser.parse(words)
    trainer = build_trainer(method, script_args, training_args, model_args, dataset_args)
    return partial(run, trainer, script_args.dataset_name, parser.recipe())


def build_trainer(method: Method, script_args, training_args, model_args, dataset_args):
    """The trainer of `method`, ready to train. Raises as [`prepare`] does."""
    model = model_of(model_args)
    splits = load_data(script_args, dataset_args)
    evaluates = training_args.eval_strategy != "no"
    train = take_split(splits, script_args.dataset_train_split)
    evaluation = take_split(splits, script_args.dataset_test_split) if evaluates else None
    find_model(model, model_args.model_revision, training_args.trust_remote_code)
    training_args.resume_from_checkpoint = find_checkpoint(training_args)
    training_args.model_init_kwargs = {**init_kwargs(model_args), **(training_args.model_init_kwargs or {})}
    trainer = getattr(import_module(method.module), method.trainer)(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=evaluation,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.get_optimizer_cls_and_kwargs(training_args, trainer.model)  # raises for a wrong `optim_args`
    return trainer
