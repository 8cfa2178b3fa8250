"""The training script behind every method: read the settings, load data and rewards, build the trainer, train, save.

What `trl grpo` is to `GRPOTrainer`, for any row of the table of methods. Importing this module does not import torch.
"""

import copy
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cache, partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from trl import ScriptArguments, TrlParser

from .lookup import load_function, near
from .methods import METHODS, Method
from .plot import RECIPE_FILE
from .rewards import load_reward_func, math_accuracy_reward


# file name suffix -> the loader of `datasets` that reads it
FILE_LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}

# what `GRPOTrainer` passes to a reward function by itself; everything else is a column of the data set
TRAINER_PROVIDES = (
    "prompts",
    "completions",
    "completion_ids",
    "trainer_state",
    "log_extra",
    "log_metric",
    "environments",
)
# and what TRPA and VPD pass to their functions, which read the rewards
READER_PROVIDES = ("prompts", "completions", "completion_ids", "rewards")


@dataclass
class TrustScriptArguments(ScriptArguments):
    """
    Arguments of the training script, beside those of the config and the model.

    Parameters:
        reward_funcs (`list[str]`, *optional*):
            Names, see [`~trl_trust.rewards.load_reward_func`]. Their sum, weighted by `reward_weights`, is the reward.
        reward_model_name_or_path (`str`, *optional*):
            A reward model, beside or instead of the functions.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Column of the data set that holds the prompt: text, or a list of messages.
        system_prompt (`str`, *optional*):
            Puts the prompt into a chat that this system message opens, in place of any other; an empty string makes a
            chat without one. Unset, the prompt is left as it is: text is then continued without a chat template.
        environment (`str`, *optional*):
            Dotted path of what makes TRL's `environment_factory`, such as
            `trl_trust.tasks.coopetition.coopetition_env_factory`. The environment may bring its own reward.
        environment_options (`dict` or JSON, *optional*):
            Its keyword arguments.
    """

    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: `math_accuracy_reward`, TRL's `accuracy_reward`, `reasoning_accuracy_reward`, "
            "`think_format_reward`, `get_soft_overlong_punishment`, or dotted import paths."
        },
    )
    reward_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Reward model, on the Hub or in a directory, beside or instead of functions."}
    )
    prompt_column: str = field(
        default="prompt", metadata={"help": "Column that holds the prompt, as text or as a list of messages."}
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "Makes the prompt a chat opened by this system message; empty: a chat without one."},
    )
    environment: str | None = field(
        default=None,
        metadata={"help": "Dotted path of what makes the environment that the model plays in, by its tools."},
    )
    environment_options: dict | str | None = field(
        default=None, metadata={"help": "Keyword arguments of `environment`, in a recipe as a mapping, here as JSON."}
    )

    def __post_init__(self):
        if isinstance(self.environment_options, str):
            try:
                self.environment_options = json.loads(self.environment_options)
            except ValueError as error:
                raise ValueError(f"environment_options={self.environment_options!r} is no JSON: {error}.") from error
        if not isinstance(self.environment_options, dict | None):
            raise ValueError(f"environment_options={self.environment_options!r} must map names to values.")
        if self.environment_options and self.environment is None:
            raise ValueError(
                f"environment_options={self.environment_options!r} are for `environment`, which is not set."
            )
        if isinstance(self.reward_funcs, str):  # `reward_funcs: name` in a recipe, without the dash of a list
            self.reward_funcs = [self.reward_funcs]


# --------------------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------------------


class RecipeParser(TrlParser):
    """`TrlParser` that refuses unknown names and values of the wrong type, and says so in one line (`ValueError`)."""

    def __init__(self, dataclass_types: Iterable[type], **kwargs):
        # without abbreviations a mistyped name is an error on the command line as it is in a recipe
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.field_names = [f.name for dtype in self.dataclass_types for f in fields(dtype) if f.init]
        hints = {name: hint for dtype in self.dataclass_types for name, hint in get_type_hints(dtype).items()}
        self.number_names = {
            k for k, hint in hints.items() if get_origin(hint) is not list and {hint, *get_args(hint)} & {int, float}
        }
        # of two options of one name, `--x` and `--no_x`, argparse takes the default of the first
        self.defaults = {action.dest: copy.deepcopy(action.default) for action in reversed(self._actions)}
        self.given: dict[str, Any] = {}  # after `parse`: what is not at its default, from recipe and command line

    def error(self, message: str):
        if choice := re.search(r"^argument --(\w+): invalid choice: '(.*?)' \(choose from (.*)\)$", message):
            refuse_choice(choice[1], choice[2], choice[3].replace("'", "").split(", "))
        raise ValueError(message)

    def parse_known_args(self, *args, **kwargs):
        namespace, rest = super().parse_known_args(*args, **kwargs)
        given = {name: value for name, value in vars(namespace).items() if value != self.defaults.get(name)}
        self.given = copy.deepcopy(given)  # configs work on their values
        return namespace, rest

    def set_defaults_with_config(self, **config) -> list[str]:
        choices = {action.dest: action.choices for action in self._actions if action.choices}
        for name, value in config.items():
            if isinstance(value, str) and value not in choices.get(name, [value]):
                refuse_choice(name, value, choices[name])
            if value is False and name.endswith("_strategy"):
                config[name] = "no"  # YAML 1.1 reads a bare `no` as False
            elif value is not None and name in self.number_names:
                config[name] = str(value)  # argparse checks the type of text only
        remaining = super().set_defaults_with_config(**config)
        self.refuse_unknown(
            remaining, "in the recipe", launcher_options()
        )  # before a config complains of this machine
        return remaining

    def split(self, words: list[str]) -> tuple[list[str], list[str]]:
        """Return the words that are no setting of the script: those from the recipe, and those of the command line.

        No config is constructed: only the training processes know how many they are and what device they have.
        """
        self.dataclass_types = []
        *_, from_recipe, from_words = self.parse_args_and_config(
            words, return_remaining_strings=True, separate_remaining_strings=True
        )
        return from_recipe, from_words

    def parse(self, words: list[str]) -> tuple:
        """Return one instance of each dataclass; a recipe may hold options of the launcher too, which are passed over.

        Raises:
            ValueError: for an unknown name, or a value that its config refuses.
        """
        try:
            *configs, from_recipe, from_words = self.parse_args_and_config(
                words, return_remaining_strings=True, separate_remaining_strings=True
            )
        except TypeError as error:  # such as a wrong key under `datasets:`
            raise ValueError(f"a setting has the wrong form: {error}") from error
        except ValueError as error:
            if "support bf16/gpu" in str(error):  # transformers 5.23; TRL switches bf16 on by itself
                mend = "set use_cpu: true, bf16: false, and use_vllm: false if it is on"
                raise ValueError(f"bf16 asks for a GPU, and there is none here; to train on a CPU {mend}") from error
            raise
        for word in from_words:
            if word in launcher_options():
                raise ValueError(f"{word} is for the launcher: pass it to `accelerate launch`, or run `trl-trust`")
        self.refuse_unknown(from_words, "on the command line")
        launched = {
            name.lstrip("-"): yaml.safe_load(value) for name, value in zip(*[iter(from_recipe)] * 2, strict=True)
        }
        self.given |= launched
        return tuple(configs)

    def build(self, settings: Mapping[str, Any]) -> tuple:
        """Return one instance of each dataclass from settings by name, whose values are read as a recipe's are."""
        self.set_defaults_with_config(**settings)
        return self.parse_args_into_dataclasses(args=[])

    def recipe(self) -> str:
        """What was parsed, as a recipe: every setting that is not at its default.

        Not in it: options of the launcher on the command line, what the recipe put into the environment, and tokens.
        """
        versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch"))
        given = {
            name: value.value if isinstance(value, Enum) else value
            for name, value in self.given.items()
            if not name.endswith("_token")
        }
        return f"# {self.prog}, as it was run with {versions}\n{yaml.safe_dump(given, sort_keys=False)}"

    def refuse_unknown(self, words: list[str], where: str, also_known: Iterable[str] = ()) -> None:
        """Raise `ValueError` for the first word that starts like an option and is none, naming the nearest one."""
        if words and not words[0].startswith("-"):
            raise ValueError(f"unexpected {words[0]!r} {where}; a setting is `--name value`")
        for word in words:
            name = word.split("=")[0]
            if word.startswith("--") and name not in also_known:
                known = [*self.field_names, *(option.lstrip("-") for option in also_known)]
                mend = owner(name.lstrip("-")) or near(name.lstrip("-"), known, "--help-all lists the known ones")
                raise ValueError(f"unknown field {name.lstrip('-')!r} {where}; {mend}")


def owner(name: str) -> str | None:
    """What to say of a field that is known to other methods, else `None`. Called for an error: it imports them all."""
    found = []
    for method in METHODS:
        try:
            config = getattr(import_module(method.module), method.config)
        except ImportError:  # of an extra that is not installed
            continue
        if name in {f.name for f in fields(config)}:
            found.append(method)
    if not found:
        return None
    titles, names = ([getattr(method, key) for method in found] for key in ("title", "name"))
    return f"it is a field of {' and '.join(titles)}: {', '.join(f'`trl-trust {name}`' for name in names)}"


def refuse_choice(name: str, value: str, choices: Iterable) -> None:
    """Raise `ValueError` for a value that is none of the `choices` of the field `name`."""
    raise ValueError(f"{name}={value!r} is not known; {near(value, map(str, choices))}")


@cache
def launcher_options() -> dict[str, bool]:
    """The options of `accelerate launch`, and whether each is a flag, i.e. takes no value."""
    from accelerate.commands.launch import launch_command_parser

    options = {option: action.nargs == 0 for option, action in launch_command_parser()._option_string_actions.items()}
    # TRL's addition: a file, or one of the configs that TRL ships, by name
    return {**options, "--accelerate_config": False}


def make_parser(method: Method, prog: str | None = None) -> RecipeParser:
    """Return the parser of `method`: the script's arguments, the method's config, the model's, a mixture of data."""
    from trl import DatasetMixtureConfig, ModelConfig

    config = getattr(import_module(method.module), method.config)
    return RecipeParser((TrustScriptArguments, config, ModelConfig, DatasetMixtureConfig), prog=prog)


def prepare(words: list[str], method: Method) -> Callable[[], None]:
    """Read the words of a command line, and return the training that they ask for, ready to start.

    Raises:
        ValueError, OSError: see [`build_trainer`].
    """
    parser = make_parser(method, f"trl-trust {method.name}")
    script_args, *configs = parser.parse(words)
    return partial(run, build_trainer(method, script_args, *configs), script_args.dataset_name, parser.recipe())


# --------------------------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------------------------


def load_data(script_args: TrustScriptArguments, dataset_args):
    """Load what the arguments name: a mixture, a local file or directory, or a data set on the Hub.

    Returns:
        The splits, by name. A file has one split, `train`.

    Raises:
        ValueError: if nothing is named, or it cannot be loaded.
    """
    from datasets import load_dataset
    from trl import get_dataset

    name = script_args.dataset_name
    if (name is None) == (not dataset_args.datasets):
        raise ValueError(
            f"dataset_name={name!r}: set either `dataset_name` (on the Hub, or a file or directory) or `datasets`"
        )
    loader = FILE_LOADERS.get(os.path.splitext(name or "")[1].lower())
    if loader and not os.path.isfile(name):
        raise ValueError(f"dataset_name={name!r}: no such file")
    if loader and os.path.getsize(name) == 0:
        raise ValueError(f"dataset_name={name!r}: the file is empty")
    where = {"path": loader, "data_files": name} if loader else {"path": name, "name": script_args.dataset_config}
    try:
        if name is None:
            return get_dataset(dataset_args)
        return load_dataset(**where, streaming=script_args.dataset_streaming)
    except Exception as error:  # from the Hub, the network, a broken file: all the same to the user
        raise ValueError(f"cannot load the data set {name or ''}: {error.__cause__ or error}") from error


def take_split(splits, split: str):
    """One split of a data set. Raises ValueError, naming those there are, where it is not among them."""
    if split not in splits:
        raise ValueError(f"the data set has no split {split!r}; it has {', '.join(splits)}")
    return splits[split]


def prepare_split(splits, split: str, script_args: TrustScriptArguments):
    """Return one split with a `prompt` column, in the form that `prompt_column` and `system_prompt` ask for."""
    data, column, system = take_split(splits, split), script_args.prompt_column, script_args.system_prompt
    columns = column_names(data)
    if column not in columns:
        raise ValueError(
            f"the data set has no column {column!r} for the prompt; it has {', '.join(columns)} (set `prompt_column`)"
        )
    refuse_nulls(data, column)
    if column != "prompt":
        data = (data.remove_columns("prompt") if "prompt" in columns else data).rename_column(column, "prompt")
    if system is None:
        return data

    def as_chat(row):
        prompt = row["prompt"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        opening = [{"role": "system", "content": system}] if system else []
        return {"chat": opening + [message for message in messages if message["role"] != "system"]}

    # a new column, since a column cannot change its type from text to messages
    return data.map(as_chat, remove_columns="prompt").rename_column("chat", "prompt")


def refuse_nulls(data, column: str) -> None:
    """Raise `ValueError` if a row has nothing in the column of the prompt. Streamed data are not looked through."""
    if not hasattr(data, "__len__"):
        return
    first, number, seen = None, 0, 0
    for table in data.select_columns([column]).with_format("arrow").iter(10_000):
        values = table[column]
        if values.null_count and first is None:
            first = seen + values.is_null().to_pylist().index(True)
        number, seen = number + values.null_count, seen + len(values)
    if number:
        raise ValueError(
            f"the column {column!r} is empty in {number} of {seen} rows, the first is row {first}; leave them out"
        )


def column_names(data) -> list[str]:
    """Names of the columns of a data set; a streamed file tells them only by its first row."""
    return data.column_names or list(next(iter(data)))


def check_reward_columns(
    rewards: Iterable[Callable | str], columns: list[str], provided: tuple[str, ...] = TRAINER_PROVIDES
) -> None:
    """Raise `ValueError` for a reward function with a parameter that neither the trainer nor the data set provides."""
    for reward in filter(callable, rewards):
        missing = [
            f"`{name}`"
            for name, parameter in inspect.signature(reward).parameters.items()
            if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
            if name not in columns and name not in provided
        ]
        if reward is math_accuracy_reward and not {"solution", "answer"} & set(columns):
            missing = ["`solution` or `answer`"]
        if missing:
            name = getattr(reward, "__name__", reward)
            raise ValueError(f"{name} needs the column {', '.join(missing)}; the data set has {', '.join(columns)}")


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


def build_trainer(
    method: Method, script_args: TrustScriptArguments, training_args, model_args, dataset_args, trainer_class=None
):
    """Return the trainer of `method`, or of `trainer_class` in its place, ready to train.

    Raises:
        ValueError: for settings that do not fit each other, the data or the rewards, each said in one line.
        OSError: if the model cannot be found.
    """
    from trl import get_peft_config, get_quantization_config

    model = model_of(model_args)
    rewards = [load_reward_func(name, training_args.max_completion_length) for name in script_args.reward_funcs or ()]
    if script_args.reward_model_name_or_path:
        rewards.append(script_args.reward_model_name_or_path)
    environment = {}
    if script_args.environment:
        make = load_function(script_args.environment, "environment")
        environment["environment_factory"] = make(**script_args.environment_options or {})
    if not rewards and not environment:
        raise ValueError("no reward: set `reward_funcs`, for instance to math_accuracy_reward")

    splits = load_data(script_args, dataset_args)
    train = prepare_split(splits, script_args.dataset_train_split, script_args)
    check_reward_columns(rewards, column_names(train))
    evaluates = training_args.eval_strategy != "no"
    find_model(model, model_args.model_revision, training_args.trust_remote_code)
    if teacher := getattr(training_args, method.teacher or " ", None):
        own = getattr(training_args, "teacher_model_init_kwargs", None) or {}
        find_model(teacher, own.get("revision"), training_args.trust_remote_code, method.teacher)
    if script_args.reward_model_name_or_path:
        find_model(
            script_args.reward_model_name_or_path, None, training_args.trust_remote_code, "reward_model_name_or_path"
        )
    training_args.resume_from_checkpoint = find_checkpoint(training_args)

    training_args.model_init_kwargs = {**init_kwargs(model_args), **(training_args.model_init_kwargs or {})}
    trainer = (trainer_class or getattr(import_module(method.module), method.trainer))(
        model=model,
        reward_funcs=rewards,
        args=training_args,
        train_dataset=train,
        eval_dataset=prepare_split(splits, script_args.dataset_test_split, script_args) if evaluates else None,
        peft_config=get_peft_config(model_args),
        quantization_config=get_quantization_config(model_args),
        **environment,
    )
    readers = [getattr(trainer, name) for name in method.reads]
    check_reward_columns(readers, column_names(train), READER_PROVIDES)
    trainer.get_optimizer_cls_and_kwargs(training_args, trainer.model)  # raises for a wrong `optim_args`
    return trainer


def model_of(model_args) -> str:
    """The model that is named. Raises ValueError where none is, or a directory that is not there."""
    model = model_args.model_name_or_path
    if model is None or (model.startswith((".", "/")) and not os.path.isdir(model)):
        raise ValueError(f"model_name_or_path={model!r}: set it to a model on the Hub, or to a directory")
    return model


def init_kwargs(model_args) -> dict[str, Any]:
    """How TRL's scripts load the model that a `ModelConfig` describes."""
    return {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }


def find_model(model: str, revision: str | None, trust_remote_code: bool, field: str = "model_name_or_path") -> None:
    """Raise `ValueError` unless the config of `model` can be had: the error of loading does not name the `field`."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model, revision=revision or "main", trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{field}={model!r} is no directory with a model, and cannot be had from the Hub: {error}"
        ) from error


def find_checkpoint(args) -> str | None:
    """What `resume_from_checkpoint` names: a folder, or with `true` the last checkpoint in `output_dir`.

    Raises:
        ValueError: if there is no such folder.
    """
    from transformers.trainer_utils import get_last_checkpoint

    name = args.resume_from_checkpoint
    if name is None or str(name).lower() == "false":
        return None
    if str(name).lower() == "true":
        found = get_last_checkpoint(args.output_dir) if os.path.isdir(args.output_dir) else None
        if found is None:
            raise ValueError(
                f"resume_from_checkpoint={name!r}: there is no checkpoint in output_dir={args.output_dir!r}"
            )
        return found
    if not os.path.isdir(name):
        raise ValueError(
            f"resume_from_checkpoint={name!r}: no such folder; or `true`, for the last one in `output_dir`"
        )
    return name


def run(trainer, dataset_name: str | None = None, recipe: str = "") -> None:
    """Train, save to `output_dir`, push to the Hub if `push_to_hub` asks for it, and close what the trainer opened.

    The log and `recipe`, a text, are kept in `output_dir` too, for `trl-trust plot`, however the training ends.
    """
    from .keep import KeepLog

    args, log = trainer.args, KeepLog()
    trainer.add_callback(log)
    if recipe and trainer.is_world_process_zero():
        os.makedirs(args.output_dir, exist_ok=True)
        Path(args.output_dir, RECIPE_FILE).write_text(recipe, "utf-8")
    try:
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    finally:
        if trainer.state.log_history:  # else it is not the run's own yet
            log.write(args, trainer.state)
    trainer.save_model(args.output_dir)
    trainer.accelerator.print(f"Saved to {args.output_dir}")
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
        trainer.accelerator.print(f"Pushed to {trainer.hub_model_id}")
    if hasattr(trainer, "end"):  # transformers 5.18; it finishes the trackers and leaves the process group
        trainer.end()
