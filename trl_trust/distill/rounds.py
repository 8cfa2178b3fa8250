"""`trl-trust erpd --config recipe.yaml`: rounds of ERPD (arXiv 2605.25582, a reconstruction) from end to end.

    output_dir/round-1/rollouts    of the model, and the log-probabilities of teacher and twin for them
    output_dir/round-1/teacher     stage 1
    output_dir/round-1/unlearned   stage 1 towards the opposite, if the signal reads it
    output_dir/round-1/student     stage 2; round 2 starts from it, with fresh rollouts of prompts drawn anew

Run again, it passes over what is finished, goes on from the last checkpoint or part of what is not, and refuses
settings other than those a stage was begun with. Every stage leaves a whole model; adapters are merged.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.utils import FullyShardedDataParallelPlugin, is_peft_model, release_memory, str_to_bool
from huggingface_hub import HfApi
from torch.distributed.fsdp import StateDictType
from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled
from trl import DatasetMixtureConfig, ModelConfig, get_peft_config, get_quantization_config

from ..frozen.logps import score_rollouts
from ..frozen.sampling import RolloutsConfig, write_rollouts
from ..frozen.script import load_sources, model_init_kwargs
from ..frozen.store import claimed, load_rollouts
from ..methods import Method
from ..script import RecipeParser, TrustScriptArguments
from ..settings import as_mapping
from .erpd import ERPDConfig, ERPDTeacherTrainer, ERPDTrainer


# Inherited settings that decide what a stage makes; with ERPDConfig's own, a stage is refused if they have changed.
DECISIVE = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "optim",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)


CHECKPOINTS = "checkpoint-*/trainer_state.json"  # the last file of a checkpoint

# Fields that no stage has for itself, and why.
OF_THE_ROUNDS = {
    "stage": "the rounds run each stage",
    "output_dir": "each stage has a folder in that of the rounds",
    "temperature": "rollouts and both stages have one; set it beside them",
    "unlearn": "the twin is trained where the signal reads `unlearned`",
    "push_to_hub": "the student of the last round is pushed; set it beside them",
}


@dataclass
class ERPDScriptArguments(TrustScriptArguments):
    """
    Arguments of `trl-trust erpd`, beside those of data and reward, [`ERPDConfig`] and the model.

    Parameters:
        rounds (`int`, *optional*, defaults to `1`):
            Rounds; each begins at the student of the last.
        rollouts (`dict`, *optional*):
            Fields of [`~trl_trust.frozen.sampling.RolloutsConfig`], but `output_dir` and `temperature`, which is that
            of the stages. `seed` is that of round 1 and grows by 1 a round.
        teacher, student (`dict`, *optional*):
            Fields of [`ERPDConfig`] for one stage only, such as `num_train_epochs`; but those in [`OF_THE_ROUNDS`].
        policies (`dict`, *optional*):
            Name to model, for further policies that `signal` reads, or a `teacher` in the place of stage 1's.

    Raises:
        ValueError: for fewer rounds than 1, or something else than a mapping where one belongs.
    """

    rounds: int = field(default=1, metadata={"help": "Rounds; each begins at the student of the last."})
    rollouts: dict | str | None = field(
        default=None, metadata={"help": "Settings of the rollouts: num_prompts, num_generations, ..., as a mapping."}
    )
    teacher: dict | str | None = field(
        default=None, metadata={"help": "Fields of the config for stage 1 only, as a mapping."}
    )
    student: dict | str | None = field(
        default=None, metadata={"help": "Fields of the config for stage 2 only, as a mapping."}
    )
    policies: dict | str | None = field(
        default=None, metadata={"help": "Name to model, for further policies that `signal` reads, as a mapping."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds!r} must be at least 1.")
        for name in ("rollouts", "teacher", "student", "policies"):
            setattr(self, name, as_mapping(name, getattr(self, name)) or {})


def make_parser(method: Method | None = None, prog: str = "trl-trust erpd") -> RecipeParser:
    """The parser of `trl-trust erpd`, the one method whose host this script serves."""
    return RecipeParser((ERPDScriptArguments, ERPDConfig, ModelConfig, DatasetMixtureConfig), prog=prog)


def main(argv: Sequence[str]) -> int:
    """Run the rounds that the words of a command line, or the recipe they name, describe. Returns 0."""
    return prepare(argv)()


def prepare(argv: Sequence[str], method: Method | None = None) -> Callable[[], int]:
    """Check everything, so that a slip in stage 2 is not found after stage 1, and return what runs the rounds.

    Raises:
        ValueError: for bad settings; what is returned raises it for a stage that was begun with other ones.
    """
    words = list(argv)
    recipe = Path(words[words.index("--config") + 1]).read_text() if "--config" in words else ""
    if "stage" in (yaml.safe_load(recipe) or {}) or any(word.split("=")[0] == "--stage" for word in words):
        raise ValueError(
            "stage: the rounds run both stages; leave it out (`teacher` and `student` hold what differs)."
        )

    parser = make_parser()
    script_args, args, model_args, dataset_args = parser.parse([*words, "--stage", "student"])
    given = {name: parser.given[name] for name in ERPDConfig.__dataclass_fields__ if name in parser.given}
    temperature, output = args.temperature, Path(args.output_dir)
    _refuse_what_is_of_the_rounds(script_args)

    def config_of(stage: str, folder: Path, **settings) -> ERPDConfig:
        own = script_args.teacher if stage == "teacher" else script_args.student
        settings = {**given, **own, **settings, "stage": stage, "output_dir": str(folder)}
        return RecipeParser((ERPDConfig,), prog="trl-trust erpd").build(settings)[0]

    def rollouts_of(number: int) -> RolloutsConfig:
        settings = {"seed": args.seed, "use_cpu": args.use_cpu, **script_args.rollouts}
        settings |= {"temperature": temperature, "output_dir": str(output / f"round-{number}" / "rollouts")}
        try:
            settings["seed"] += number - 1  # each round draws its own prompts
            return RolloutsConfig(**settings)
        except TypeError as error:
            raise ValueError(f"rollouts={script_args.rollouts!r}: {error}") from error

    data, rewards = load_sources(script_args, rollouts_of(1), model_args, dataset_args)
    if get_quantization_config(model_args) is not None:
        raise ValueError("load_in_8bit, load_in_4bit: every stage leaves a whole model for the next; leave them out.")
    configs = {stage: config_of(stage, output) for stage in ("teacher", "student")}
    for stage, config in configs.items():
        if config.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy={config.eval_strategy.value!r} for the {stage}: the rounds hold nothing out; leave it "
                f"at 'no'."
            )
        for name in ("teacher_model_name_or_path", "teacher_model_init_kwargs"):
            if getattr(config, name) is not None:
                raise ValueError(
                    f"{name}={getattr(config, name)!r} is not read by the rounds, which make a teacher; for another "
                    f"one set `policies: {{teacher: ...}}`."
                )
    reads = configs["student"].policies
    _check_policies(script_args.policies, configs["student"])
    _check_sharding(configs["student"], adapters=model_args.use_peft)

    def play(number: int, policy: str) -> str:
        """One round from `policy`; returns the folder of its student."""
        say, folder = PartialState().print, output / f"round-{number}"
        say(f"Round {number} of {script_args.rounds}: rollouts of {policy}")
        load = model_init_kwargs(model_args)
        rollouts = write_rollouts(policy, data, rewards, rollouts_of(number), model_init_kwargs=load)

        models = {name: script_args.policies[name] for name in reads if name in script_args.policies}
        for name in ("teacher", "unlearned"):
            if name in reads and name not in models:
                say(f"Round {number}: {name}")
                config = config_of("teacher", folder / name, unlearn=name == "unlearned", push_to_hub=False)
                models[name] = train_stage(ERPDTeacherTrainer, policy, rollouts, config, model_args)
        for name, model in models.items():
            score_rollouts(rollouts, name, model, use_cpu=args.use_cpu, model_init_kwargs=load)
        say(f"Round {number}: student")
        push = args.push_to_hub and number == script_args.rounds
        config = config_of("student", folder / "student", push_to_hub=push)
        return train_stage(ERPDTrainer, policy, rollouts, config, model_args)

    def run() -> int:
        policy = model_args.model_name_or_path
        for number in range(1, script_args.rounds + 1):
            policy = play(number, policy)
        PartialState().print(f"Student in {policy}")
        return 0

    return run


def train_stage(trainer_class, model: str, rollouts: Path, config: ERPDConfig, model_args: ModelConfig) -> str:
    """Train one stage, or finish it, unless it is done; returns its folder, which then holds a whole model."""
    folder, state = Path(config.output_dir), PartialState()
    everything = config.to_dict()
    settings = {name: everything[name] for name in (*DECISIVE, *ERPDConfig.__annotations__) if name in everything}
    adapter = {name: getattr(model_args, name) for name in ("use_peft", "lora_r", "lora_alpha", "lora_target_modules")}
    settings = {"model": model, "rollouts": str(rollouts), **settings, **adapter}
    with claimed(folder, "stage", settings, [CHECKPOINTS, "done"]):
        if (folder / "done").exists():
            state.print(f"{folder} is done")
        else:
            _train(trainer_class, model, rollouts, config, model_args)
    return str(folder)


def _train(trainer_class, model: str, rollouts: Path, config: ERPDConfig, model_args: ModelConfig) -> None:
    folder, state = Path(config.output_dir), PartialState()
    config.model_init_kwargs = {**model_init_kwargs(model_args), **(config.model_init_kwargs or {})}
    trainer = trainer_class(
        model,
        args=config,
        train_dataset=load_rollouts(rollouts),
        peft_config=get_peft_config(model_args),
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_state()  # for `trl-trust plot`
    if is_peft_model(trainer.model):
        model = trainer.accelerator.unwrap_model(trainer.model)
        if state.is_main_process:
            # Not `save_model`, which pushes what it saves; and `push_to_hub` would save the adapter a second time
            model.save_pretrained(folder / "adapter")
            model.merge_and_unload().save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
            for path in folder.glob("adapter_*"):  # of a push at a checkpoint; it would be put onto the merged model
                path.unlink()
    else:
        trainer.save_model(str(folder))
    trainer.create_model_card(model_name=folder.name)
    if config.push_to_hub and not is_peft_model(trainer.model):
        trainer.push_to_hub()
    elif config.push_to_hub and state.is_main_process:
        HfApi(token=config.hub_token).upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=str(folder),
            commit_message="End of training",
            revision=config.hub_revision,
            ignore_patterns=["_*", "checkpoint-*"],  # as in `Trainer.push_to_hub` of transformers 5.23
            delete_patterns="adapter_*",
        )
    state.wait_for_everyone()
    if state.is_main_process:
        (folder / "done").touch()
    state.wait_for_everyone()
    release_memory(trainer)


def _refuse_what_is_of_the_rounds(script_args: ERPDScriptArguments) -> None:
    for name, fields in (
        ("rollouts", ("output_dir", "temperature")),
        ("teacher", OF_THE_ROUNDS),
        ("student", OF_THE_ROUNDS),
    ):
        given = getattr(script_args, name)
        for key in fields:
            if key in given:
                raise ValueError(f"{key}={given[key]!r} in `{name}`: {OF_THE_ROUNDS[key]}; leave it out there.")


def _check_policies(given: Mapping[str, Any], config: ERPDConfig) -> None:
    """`ValueError` for a policy that the signal reads and nobody makes, or that is given and cannot be read."""
    own = {"base", "teacher", "unlearned"}
    missing = sorted(set(config.policies) - own - set(given))
    if missing:
        raise ValueError(f"signal={config.signal!r} reads {', '.join(missing)}; name a model in `policies`.")
    for name, model in given.items():
        if name == "base":
            raise ValueError(
                f"policies={{'base': {model!r}}}: base is the model that a round starts from; leave it out."
            )
        if name not in config.policies:
            raise ValueError(
                f"policies={{{name!r}: {model!r}}}: signal={config.signal!r} does not read it; leave it out."
            )
        if not isinstance(model, str):
            raise ValueError(f"policies={{{name!r}: {model!r}}} must name a model, by an id or a folder.")


def _check_sharding(config: ERPDConfig, adapters: bool) -> None:
    """`ValueError` where the launcher spreads a model over processes so that a stage could leave no whole one."""
    zero3 = is_deepspeed_zero3_enabled()
    fsdp = bool(config.fsdp) or str_to_bool(os.environ.get("ACCELERATE_USE_FSDP", "false")) == 1
    if adapters and (zero3 or fsdp):
        raise ValueError(
            f"use_peft=True under {'ZeRO-3' if zero3 else 'FSDP'}: the rounds merge adapters, for which a process "
            f"needs the whole model; use ZeRO-2 (`accelerate_config: zero2`) or leave `use_peft` out."
        )
    if zero3 and not deepspeed_config()["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save"):
        raise ValueError(
            "zero3_save_16bit_model=False: every stage leaves a whole model for the next; set it to True."
        )
    if fsdp:
        kind = FullyShardedDataParallelPlugin(**(config.fsdp_plugin_args or {})).state_dict_type
        if kind != StateDictType.FULL_STATE_DICT:
            raise ValueError(
                f"fsdp_state_dict_type={kind.name}: every stage leaves a whole model for the next; set it to "
                f"FULL_STATE_DICT."
            )


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end, of which the trainer's state is the last file."""
    whole = [path.parent for path in folder.glob(CHECKPOINTS)]
    return str(max(whole, key=lambda path: int(path.name.split("-")[1]))) if whole else None
