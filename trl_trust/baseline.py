"""`trl-trust grpo`: the baseline of a method, from the method's own recipe; or GRPO with a loss of the user's own.

It trains `TrustGRPOTrainer`, whose term and aggregation are stock TRL's to the bit, so that `trust/*` is logged; and
`trl.GRPOTrainer` itself for a `loss_type` that is another policy term. Rewards, data and fields are those of every
method's script. Fields in a recipe that another method adds are left out, and named in one line.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from importlib import import_module

import yaml
from trl import DatasetMixtureConfig, ModelConfig

from .lookup import load_function
from .methods import Method, hosted
from .script import RecipeParser, TrustScriptArguments, build_trainer, run


GRPO = Method(
    name="grpo",
    title="GRPO",
    module="trl_trust.policy.base",
    trainer="TrustGRPOTrainer",
    config="TrustGRPOConfig",
    paper="2402.03300",
    grade="exact",
    summary="stock GRPO, with the metrics that every method logs",
)
STOCK = replace(GRPO, module="trl", trainer="GRPOTrainer", config="GRPOConfig")
STOCK_LOSSES = ("cispo", "sapo", "vespo", "luspo")  # `loss_type` of TRL 1.16 that are policy terms of their own


@dataclass
class BaselineScriptArguments(TrustScriptArguments):
    """[`TrustScriptArguments`], and `policy_loss`: dotted path of a loss, `(PolicyBatch, *, ...) -> PolicyLoss`."""

    policy_loss: str | None = field(
        default=None,
        metadata={
            "help": "A policy term of your own in place of GRPO's, `package.module.function`: it takes a PolicyBatch, "
            "and by keyword any fields of the config, and returns a PolicyLoss."
        },
    )


class BaselineParser(RecipeParser):
    """Leaves out of a recipe, not of the command line, what only other methods know. `left_out` has the names."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.left_out: list[str] = []

    def set_defaults_with_config(self, **config) -> list[str]:
        others = {
            f.name
            for method in hosted("grpo")
            for f in fields(getattr(import_module(method.module), method.config))
            if f.name not in self.field_names
        }
        self.left_out = [name for name in config if name in others]
        return super().set_defaults_with_config(**{k: v for k, v in config.items() if k not in others})


def make_parser(method: Method = GRPO, prog: str | None = None) -> BaselineParser:
    """Return the parser of the script's arguments, the config of `method`, the model's, a mixture of data."""
    config = getattr(import_module(method.module), method.config)
    return BaselineParser((BaselineScriptArguments, config, ModelConfig, DatasetMixtureConfig), prog=prog)


def prepare(words: list[str]) -> Callable[[], None]:
    """Read the words of a command line, and return the training that they ask for, ready to start.

    Raises:
        ValueError, OSError: see [`trl_trust.script.build_trainer`].
    """
    loss_type = stated(words, "loss_type")
    method = STOCK if loss_type in STOCK_LOSSES else GRPO
    parser = make_parser(method, "trl-trust grpo")
    script_args, *configs = parser.parse(words)
    if parser.left_out and int(os.environ.get("RANK", 0)) == 0:
        print("trl-trust: left out, since GRPO does not know them:", ", ".join(parser.left_out))
    trainer_class = None
    if script_args.policy_loss:
        if method is STOCK:
            raise ValueError(
                f"policy_loss={script_args.policy_loss!r} and loss_type={loss_type!r} are two policy terms: with your "
                f"own, `loss_type` is the aggregation, grpo, bnpo, dr_grpo or dapo"
            )
        trainer_class = with_loss(load_function(script_args.policy_loss, "policy_loss"))
    return partial(
        run, build_trainer(method, script_args, *configs, trainer_class), script_args.dataset_name, parser.recipe()
    )


def with_loss(loss: Callable) -> type:
    """A `TrustGRPOTrainer` whose policy term is `loss`.

    Raises:
        ValueError: for a keyword of `loss` without a default that is no field of the config.
    """
    from .policy.base import TrustGRPOConfig, TrustGRPOTrainer

    known = {f.name for f in fields(TrustGRPOConfig)}
    keywords = [p for p in inspect.signature(loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for keyword in keywords:
        if keyword.name not in known and keyword.default is keyword.empty:
            raise ValueError(
                f"policy_loss={loss.__module__}.{loss.__name__}: its keyword {keyword.name!r} is no field of "
                f"TrustGRPOConfig; give it a default"
            )
    read = [keyword.name for keyword in keywords if keyword.name in known]

    class OwnLossTrainer(TrustGRPOTrainer):
        def policy_loss(self, batch):
            return loss(batch, **{name: getattr(self.args, name) for name in read})

    return OwnLossTrainer


def stated(words: list[str], name: str) -> str | None:
    """The value of a field on the command line, or else in the recipe after `--config`; None where it is not given."""
    found = {}
    for word, following in zip(words, [*words[1:], ""], strict=True):
        key, equals, value = word.partition("=")
        found[key] = value if equals else following
    if f"--{name}" in found:
        return found[f"--{name}"]
    if "--config" not in found:
        return None
    with open(found["--config"], encoding="utf-8") as recipe:
        settings = yaml.safe_load(recipe)
    return settings.get(name) if isinstance(settings, dict) else None
