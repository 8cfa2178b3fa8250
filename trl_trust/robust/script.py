"""`trl-trust robust-sft` and `robust-reward --config recipe.yaml`: TRL's SFT and reward scripts with robust terms."""

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module

from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, get_peft_config, get_quantization_config

from ..methods import Method
from ..script import RecipeParser, find_checkpoint, find_model, load_data, run


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
    model = model_args.model_name_or_path
    if model is None or (model.startswith((".", "/")) and not os.path.isdir(model)):
        raise ValueError(f"model_name_or_path={model!r}: set it to a model on the Hub, or to a directory")
    splits = load_data(script_args, dataset_args)
    evaluates = training_args.eval_strategy != "no"
    for split in (script_args.dataset_train_split, *([script_args.dataset_test_split] if evaluates else [])):
        if split not in splits:
            raise ValueError(f"the data set has no split {split!r}; it has {', '.join(splits)}")
    find_model(model, model_args.model_revision, training_args.trust_remote_code)
    training_args.resume_from_checkpoint = find_checkpoint(training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    trainer = getattr(import_module(method.module), method.trainer)(
        model=model,
        args=training_args,
        train_dataset=splits[script_args.dataset_train_split],
        eval_dataset=splits[script_args.dataset_test_split] if evaluates else None,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
    )
    trainer.get_optimizer_cls_and_kwargs(training_args, trainer.model)  # raises for a wrong `optim_args`
    return trainer
