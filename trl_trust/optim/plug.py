"""How `optim="auon"` reaches a Hugging Face trainer, any of them, after `import trl_trust.optim`.

transformers 5 has no public registration, so two private things of it are touched here and nowhere else:

- `transformers.training_args.OptimizerNames`, an enum: every `TrainingArguments` turns `optim` into a member of it,
  and the argument parsers list its members as choices. Our names become members.
- `transformers.trainer_optimizer._OPTIMIZER_HANDLERS`, a dictionary (5.10 to 5.24 at least): `Trainer` looks the
  builder of an optimizer up in it. Ours are added.

Both are changed once and only by addition; a name that transformers already has is left to it. A pickled member would
make `training_args.bin` unreadable where this package is not imported, so ours pickle as plain strings.

Two public methods are wrapped. `Trainer.train` refuses to begin where DeepSpeed would silently put an optimizer of its
own in the place of ours. After `Trainer.create_optimizer`, an optimizer that has a method `attach` gets the trainer
through it. TRAM needs that, whose two passes happen inside `training_step`; and the matrix optimizers under DeepSpeed,
whose engine knows how matrices were taken apart.
"""

import logging
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.training_args import OptimizerNames

from ..lookup import near
from ..optimizers import OPTIMIZERS, OptimizerInfo
from .matrix import NOT_ALL_AT_ONCE, MatrixOptimizer
from .options import declared_options, parse_optim_args
from .zero import OFFLOADED


try:
    # Private in transformers 5.10 to 5.24: {name: handler}, read by Trainer.get_optimizer_cls_and_kwargs.
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
except ImportError as error:
    raise ImportError(
        "trl_trust.optim plugs into transformers.trainer_optimizer._OPTIMIZER_HANDLERS, which this version of "
        "transformers lacks; install transformers 5.10 to 5.24, or use Trainer(optimizers=(AuON(model, lr=...), None))"
    ) from error


logger = logging.getLogger(__name__)

ADAMW_SIZED, MATRIX_SIZED = 1e-3, 1e-2  # below the first no update of fixed norm is run, above the second no AdamW


def register() -> None:
    """Make the names of [`trl_trust.optimizers.OPTIMIZERS`] known to transformers; a second call changes nothing."""
    for name, wrap in (("create_optimizer", _attaching), ("train", _refusing)):
        method = getattr(Trainer, name)
        if not hasattr(method, "_trl_trust"):
            wrapped = wraps(method)(wrap(method))
            wrapped._trl_trust = True
            setattr(Trainer, name, wrapped)
    # Said by the enum where a name is no member (transformers' ExplicitEnum has a `_missing_` of this kind).
    type.__setattr__(OptimizerNames, "_missing_", classmethod(_unknown_name))
    for row in OPTIMIZERS:
        if row.name in _OPTIMIZER_HANDLERS:  # the second call, or transformers' own optimizer of that name
            continue
        _add_member(row.name)
        _OPTIMIZER_HANDLERS[row.name] = partial(_handle, row)


def _add_member(value: str) -> None:
    """Add a member to `OptimizerNames`, a `(str, Enum)`, as its metaclass does for one in the class body.

    Relies on `_member_map_`, `_member_names_` and `_value2member_map_`, which Python 3.11 to 3.13 share.
    """
    if value in OptimizerNames._value2member_map_:
        return
    name = value.upper()
    member = str.__new__(OptimizerNames, value)
    member._name_, member._value_ = name, value
    member.__objclass__, member._sort_order_ = OptimizerNames, len(OptimizerNames._member_names_)
    # Pickled and copied as a string, which equals the member and hashes like it: readable without this package.
    member.__reduce_ex__ = lambda protocol: (str, (value,))
    type.__setattr__(OptimizerNames, name, member)
    OptimizerNames._member_names_.append(name)
    OptimizerNames._member_map_[name] = member
    OptimizerNames._value2member_map_[value] = member
    if hasattr(OptimizerNames, "_hashable_values_"):  # Python 3.13 asks it for `value in OptimizerNames`
        OptimizerNames._hashable_values_.append(value)


def _unknown_name(cls: type, value: Any) -> None:
    raise ValueError(f"optim={value!r} is not a valid {cls.__name__}; {near(str(value), cls._value2member_map_)}")


def _handle(row: OptimizerInfo, context: Any) -> tuple[Callable, dict[str, Any]]:
    """What `Trainer` asks for: a factory and its keyword arguments. It then calls `factory()(model, **kwargs)`.

    Of the training arguments, the target gets those that its signature declares: `lr`, `weight_decay`,
    `aux_weight_decay`, `no_decay`, and `aux_betas` and `aux_eps` where `adam_beta1`, `adam_beta2` or `adam_epsilon`
    were changed. `optim_args` go before them.
    """
    target, args = row.load(), context.args
    options = declared_options(target)
    if "base" in options:  # a wrapper, which hands the options of what it wraps on
        bases = [other for other in OPTIMIZERS if other.name == context.optim_args.get("base")]
        options = {k: kind for base in bases for k, kind in declared_options(base.load()).items()} | options
    given: dict[str, Any] = {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay,
        "aux_weight_decay": args.weight_decay,
    }
    fields = type(args).__dataclass_fields__
    if any(getattr(args, name) != fields[name].default for name in ("adam_beta1", "adam_beta2")):
        given["aux_betas"] = (args.adam_beta1, args.adam_beta2)
    if args.adam_epsilon != fields["adam_epsilon"].default:
        given["aux_eps"] = args.adam_epsilon
    kwargs = {name: value for name, value in given.items() if name in options}
    kwargs |= parse_optim_args(row.name, context.optim_args, options)
    if isinstance(target, type) and issubclass(target, MatrixOptimizer):
        _refuse_zero(row, kwargs, args)

    def build(model: nn.Module, **kwargs: Any) -> Optimizer:
        if "no_decay" in options:
            # Trainer's own list; the method reads nothing of the trainer (transformers 5.10 to 5.24).
            decayed = set(Trainer.get_decay_parameter_names(None, model))
            kwargs["no_decay"] = {name for name, _ in model.named_parameters()} - decayed
        optimizer = target(model, **kwargs)
        if said := _rate_warning(row, optimizer, args.learning_rate):
            logger.warning(said)
        return optimizer

    return lambda: build, kwargs


def _rate_warning(row: OptimizerInfo, optimizer: Optimizer, lr: float) -> str | None:
    """What to say where a rate of AdamW's size meets updates of a fixed norm, or the reverse."""
    base = getattr(optimizer, "base", optimizer)  # of a wrapper
    scaled = any(group.get("shape_scale") == "match_rms_adamw" for group in base.param_groups)
    if isinstance(base, MatrixOptimizer) and not scaled:
        if 0 < lr < ADAMW_SIZED:
            rates = next(other.rates for other in OPTIMIZERS if other.load() is type(base))
            return (
                f"optim={row.name!r} at learning_rate={lr:g}, a rate of AdamW's size: the matrices will hardly move. "
                f"Set optim_args='shape_scale=match_rms_adamw,aux_lr={lr:g}', with which AdamW's rates fit, or a rate "
                f"of {rates}."
            )
    elif lr > MATRIX_SIZED:
        mend = ", or leave shape_scale=match_rms_adamw out of optim_args" if scaled else ""
        return (
            f"optim={row.name!r} at learning_rate={lr:g}: its updates are of AdamW's size here, and this is the rate "
            f"of an optimizer whose updates have a fixed norm. Lower it to 1e-6 to 1e-3{mend}."
        )
    return None


def _attaching(create_optimizer: Callable) -> Callable:
    def wrapper(trainer: Trainer, *args, **kwargs) -> Optimizer:
        optimizer = create_optimizer(trainer, *args, **kwargs)
        if hasattr(optimizer, "attach"):
            optimizer.attach(trainer)
        return optimizer

    return wrapper


def _refusing(train: Callable) -> Callable:
    def wrapper(trainer: Trainer, *args, **kwargs) -> Any:
        plugin = getattr(trainer.args, "deepspeed_plugin", None)
        ours = [row.name for row in OPTIMIZERS if row.name == trainer.args.optim]
        if ours and "optimizer" in getattr(plugin, "deepspeed_config", ()):
            raise ValueError(
                f"optim={ours[0]!r} would be ignored: DeepSpeed's config has an 'optimizer' section, and that one "
                "is built. Remove the section"
            )
        return train(trainer, *args, **kwargs)

    return wrapper


def _refuse_zero(row: OptimizerInfo, kwargs: dict[str, Any], args: Any) -> None:
    """Say before training what `MatrixOptimizer.bind` would say at the first step."""
    plugin = getattr(args, "deepspeed_plugin", None)
    if not getattr(plugin, "zero_stage", 0):
        return
    offload = plugin.deepspeed_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none")
    for asked, why in ((offload not in ("none", None), OFFLOADED), (kwargs.get("skip_nonfinite"), NOT_ALL_AT_ONCE)):
        if asked:
            raise ValueError(f"optim={row.name!r}: {why}")
