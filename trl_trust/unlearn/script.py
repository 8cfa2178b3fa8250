"""`trl-trust gu --config recipe.yaml`: load what is forgotten and what is kept, unlearn, save.

With `model_name_or_path: facts` the model is one that has learnt the generated facts here and now, and after training
a table stands it beside the plain procedure and a model that never saw what was to be forgotten.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial
from importlib import import_module
from pathlib import Path

from trl import ModelConfig, get_peft_config

from ..methods import Method
from ..script import RecipeParser, find_checkpoint, find_model, model_of, run


BILLION = 10**9


@dataclass
class UnlearnScriptArguments:
    """Arguments of the training script, beside those of the config and the model."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "What to forget: tofu, muse-news, muse-books, wmdp-cyber, wmdp-bio, facts."}
    )
    dataset_path: str | None = field(
        default=None, metadata={"help": "A folder with one file a split, in place of the Hub."}
    )
    forget_split: str | None = field(default=None, metadata={"help": "Such as forget10; each set has its default."})
    retain_split: str | None = field(default=None, metadata={"help": "Such as retain90; each set has its default."})
    anchor: str = field(default="forget", metadata={"help": "The split whose length is an epoch: forget or retain."})

    def __post_init__(self):
        if self.anchor not in ("forget", "retain"):
            raise ValueError(f"anchor={self.anchor!r} must be 'forget' or 'retain'.")


@dataclass
class UnlearnModelConfig(ModelConfig):
    """TRL's `ModelConfig`, whose LoRA is on for models above a billion parameters unless it is said."""

    use_peft: bool | None = field(
        default=None, metadata={"help": "Train a LoRA; None: for models above a billion parameters."}
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules that get a LoRA."}
    )


READ = {
    "model_name_or_path",
    "model_revision",
    "attn_implementation",
    "dtype",
    "use_peft",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "lora_task_type",
    "use_rslora",
    "use_dora",
}


def make_parser(method: Method, prog: str | None = None) -> RecipeParser:
    """The parser of `method`: the script's arguments, the method's config, the model's."""
    config = getattr(import_module(method.module), method.config)
    return RecipeParser((UnlearnScriptArguments, config, UnlearnModelConfig), prog=prog)


def prepare(words: list[str], method: Method) -> Callable[[], None]:
    """Read the words of a command line, and return the training that they ask for, ready to start.

    Raises:
        ValueError: for settings that do not fit each other, the data or the model.
    """
    parser = make_parser(method, f"trl-trust {method.name}")
    script_args, training_args, model_args = parser.parse(words)
    trainer, data = build_trainer(method, script_args, training_args, model_args)
    start = partial(run, trainer, script_args.dataset_name, parser.recipe())
    return partial(compare, start, trainer, data) if model_args.model_name_or_path == "facts" else start


def build_trainer(method: Method, script_args, training_args, model_args) -> tuple:
    """The trainer of `method`, ready to train, and its data. Raises as [`prepare`] does."""
    from .data import load_unlearning

    for known in fields(ModelConfig):
        value, default = getattr(model_args, known.name), getattr(UnlearnModelConfig(), known.name)
        if known.name not in READ and value != default:
            raise ValueError(f"{known.name}={value!r} is not read by {method.title}; leave it out.")
    name = model_of(model_args)
    if script_args.dataset_name is None:
        raise ValueError("dataset_name=None: set it to tofu, muse-news, muse-books, wmdp-cyber, wmdp-bio or facts")
    if name == "facts" and script_args.dataset_name != "facts":
        raise ValueError(f"model_name_or_path='facts' knows nothing of dataset_name={script_args.dataset_name!r}")
    data = load_unlearning(
        script_args.dataset_name,
        forget=script_args.forget_split or "",
        retain=script_args.retain_split or "",
        path=script_args.dataset_path,
        anchor=script_args.anchor,
        seed=training_args.seed,
    )
    training_args.resume_from_checkpoint = find_checkpoint(training_args)
    model, tokenizer = load_model(model_args, data, training_args.seed)
    if model_args.use_peft is None:
        model_args.use_peft = sum(p.numel() for p in model.parameters()) > BILLION
    trainer = getattr(import_module(method.module), method.trainer)(
        model, training_args, data.train, tokenizer, peft_config=get_peft_config(model_args)
    )
    trainer.get_optimizer_cls_and_kwargs(training_args, trainer.model)  # raises for a wrong `optim_args`
    return trainer, data


def load_model(model_args, data, seed: int) -> tuple:
    """The model that is to forget, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, revision = model_args.model_name_or_path, model_args.model_revision
    if name == "facts":
        from datasets import concatenate_datasets

        from .offline import learn

        return learn(concatenate_datasets([data.forget, data.retain]), seed=seed)
    find_model(name, revision, False)
    model = AutoModelForCausalLM.from_pretrained(
        name, revision=revision, attn_implementation=model_args.attn_implementation, dtype=model_args.dtype
    )
    return model, AutoTokenizer.from_pretrained(name, revision=revision)


def compare(start: Callable[[], None], trainer, data) -> None:
    """Unlearn the generated facts with and without GU, and print both beside the model before and a retrained one."""
    import copy

    from .offline import Trajectory, knowledge, learn

    def batch(rows):
        from .data import encode, pad

        tokenizer = trainer.processing_class
        rows = pad(tokenizer, [encode(tokenizer, row) for row in rows])
        return {name: x.to(trainer.args.device) for name, x in rows.items()}

    forget, retain = batch(data.forget), batch(data.retain)
    plain_args = copy.copy(trainer.args)
    plain_args.gu_mode, plain_args.gu_stage, plain_args.gu_finite_budget = "off", "grad", None
    plain_args.output_dir, plain_args.save_strategy = str(Path(trainer.args.output_dir, "plain")), "no"
    plain = type(trainer)(copy.deepcopy(trainer.model), plain_args, data.train, trainer.processing_class)
    paths = {}
    for name, one in (("plain", plain), ("GU", trainer)):
        paths[name] = Trajectory(forget, retain)
        one.add_callback(paths[name])
    plain.train()
    start()
    before = paths["GU"].points[0][1:]
    retrained, _ = learn(data.retain, seed=trainer.args.seed)
    retrained.to(trainer.args.device)
    if not trainer.is_world_process_zero():
        return
    loss = trainer.args.forget_loss
    rows = {"before": before, "retrained without it": (knowledge(retrained, forget)[0], *knowledge(retrained, retain))}
    level = min(4.0, *(max(point[1] for point in path.points) for path in paths.values()))
    rows[f"{loss}, forget NLL {level:.2f}"] = (level, *paths["plain"].at(level)[1:])
    rows[f"{loss} with GU, forget NLL {level:.2f}"] = (level, *paths["GU"].at(level)[1:])
    rows[f"{loss}, last step"] = paths["plain"].points[-1][1:]
    rows[f"{loss} with GU, last step"] = paths["GU"].points[-1][1:]
    lines = ["| model | forget NLL | retain NLL | retain answers right |", "|---|---|---|---|"]
    lines += [f"| {name} | {f:.2f} | {r:.3f} | {right:.2f} |" for name, (f, r, right) in rows.items()]
    text = "\n".join(lines) + "\n"
    Path(trainer.args.output_dir, "comparison.md").write_text(text, "utf-8")
    print(f"\nOne seed; NLL in nats a token, and of all facts.\n\n{text}")
