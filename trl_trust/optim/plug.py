"""How `optim="auon"` reaches a Hugging Face trainer, any of them, after `import trl_trust.optim`.

transformers 5 has no public registration, so two private things of it are touched here and nowhere else:

- `transformers.training_args.OptimizerNames`, an enum: every `TrainingArguments` turns `optim` into a member of it,
  and the argument parsers list its members as choices. Our names become members.
- `transformers.trainer_optimizer._OPTIMIZER_HANDLERS`, a dictionary (5.18 to 5.23 at least): `Trainer` looks the
  builder of an optimizer up in it. Ours are added.

Both are changed once and only by addition; a name that transformers already has is left to it. A pickled member would
make `training_args.bin` unreadable where this package is not imported, so ours pickle as plain strings.

Two public methods are wrapped. `Trainer.train` refuses to begin where DeepSpeed would silently put an optimizer of its
own in the place of ours. After `Trainer.create_optimizer`, an optimizer that has a method `attach` gets the trainer
through it. TRAM needs that, whose two passes happen inside `training_step`, and [`rewound`], which keeps the
second one out of the trainer's books.
"""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial, wraps
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.training_args import OptimizerNames

from ..optimizers import OPTIMIZERS, OptimizerInfo
from .matrix import MatrixOptimizer
from .routing import FLATTENED


try:
    # Private in transformers 5.18 to 5.23: {name: handler}, read by Trainer.get_optimizer_cls_and_kwargs.
    from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
except ImportError as error:
    raise ImportError(
        "trl_trust.optim plugs into transformers.trainer_optimizer._OPTIMIZER_HANDLERS, which this version of "
        "transformers lacks; install transformers 5.18 to 5.23, or use Trainer(optimizers=(AuON(model, lr=...), None))"
    ) from error


def register() -> None:
    """Make the names of [`trl_trust.optimizers.OPTIMIZERS`] known to transformers; a second call changes nothing."""
    for name, wrap in (("create_optimizer", _attaching), ("train", _refusing)):
        method = getattr(Trainer, name)
        if not hasattr(method, "_trl_trust"):
            wrapped = wraps(method)(wrap(method))
            wrapped._trl_trust = True
            setattr(Trainer, name, wrapped)
    for row in OPTIMIZERS:
        if row.name in _OPTIMIZER_HANDLERS:  # the second call, or transformers' own optimizer of that name
            continue
        _add_member(row.name)
        _OPTIMIZER_HANDLERS[row.name] = partial(_handle, row)


def _add_member(value: str) -> None:
    """Add a member to `OptimizerNames`, a `(str, Enum)`, as its metaclass does for one in the class body.

    Relies on `_member_map_`, `_member_names_` and `_value2member_map_`, which Python 3.10 to 3.13 share.
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
    _refuse_zero(row, target, args)
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

    def build(model: nn.Module, **kwargs: Any) -> Optimizer:
        if "no_decay" in options:
            # Trainer's own list; the method reads nothing of the trainer (transformers 5.18 to 5.23).
            decayed = set(Trainer.get_decay_parameter_names(None, model))
            kwargs["no_decay"] = {name for name, _ in model.named_parameters()} - decayed
        return target(model, **kwargs)

    return lambda: build, kwargs


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


def bookkeeping(trainer: Trainer) -> dict[str, Any]:
    """What `trainer` knows of itself now, for [`rewound`]: counters, coefficients, values to be logged.

    TRL 1.16 and our own trainers change in `compute_loss`: what `in_place` lists, `_trust_window` and
    `_trust_gathered`, in place, so they are copied; `_total_train_tokens`, `entropy_coef` and the rest by assignment.
    """
    in_place = ("_metrics", "_stored_metrics", "_diagnostic_counters")  # most of them; ORPO and CPO; SDPO
    return {
        name: _copied(value) if name in in_place or name.startswith("_trust_") else value
        for name, value in vars(trainer).items()
    }


@contextmanager
def rewound(trainer: Trainer, books: dict[str, Any]):
    """Within the block `trainer` is as it was when `books` were taken, so that a loss computed again is the same loss
    and leaves no trace; after it, `trainer` is as before the block."""
    now = dict(vars(trainer))
    vars(trainer).update({name: _copied(v) if v is not now.get(name) else v for name, v in books.items()})
    try:
        yield
    finally:
        vars(trainer).update(now)


def _copied(value: Any) -> Any:
    """Nested lists and dictionaries copied, what they hold shared."""
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps a defaultdict's factory
        copied.update((key, _copied(item)) for key, item in value.items())
        return copied
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _refuse_zero(row: OptimizerInfo, target: Any, args: Any) -> None:
    stage = getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", 0)
    if isinstance(target, type) and issubclass(target, MatrixOptimizer) and stage:
        raise ValueError(f"optim={row.name!r} cannot run under DeepSpeed ZeRO stage {stage}: {FLATTENED}")


# -------------------------------------------------------------------------------------------------------------------
# optim_args


def declared_options(target: Callable) -> dict[str, Any]:
    """Return `{name: annotation}` of the keyword arguments of `target`, and of its bases' where it passes `**` on.

    `lr` counts as one although it may be positional.
    """
    functions = [target]
    if isinstance(target, type):
        functions = [vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls)]
    options: dict[str, Any] = {}
    for function in functions:
        hints, parameters = get_type_hints(function), signature(function).parameters.values()
        for parameter in parameters:
            if parameter.kind is Parameter.KEYWORD_ONLY or parameter.name == "lr":
                options.setdefault(parameter.name, hints.get(parameter.name, str))
        if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return options


def parse_optim_args(optimizer: str, texts: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    """Turn the `key=value` texts of `optim_args` into values of the declared types.

    Args:
        optimizer: Name, for the error messages.
        texts: As transformers splits `optim_args`: at commas, spaces dropped. Write tuples with colons,
            `aux_betas=0.9:0.99`.
        options: Result of [`declared_options`].

    Raises:
        ValueError: If a key is unknown, or a value is not of the declared type.
    """
    options = {name: kind for name, kind in options.items() if _writable(kind)}
    unknown = texts.keys() - options.keys()
    if unknown:
        raise ValueError(
            f"optim_args of optim={optimizer!r} has unknown keys: {', '.join(sorted(unknown))}; "
            f"valid: {', '.join(f'{name} ({_describe(kind)})' for name, kind in sorted(options.items()))}"
        )
    values = {}
    for name, text in texts.items():
        try:
            values[name] = _parse(text, options[name])
        except ValueError:
            kind = _describe(options[name])
            raise ValueError(f"optim_args of optim={optimizer!r}: {name}={text} is not {kind}") from None
    return values


def _branches(kind: Any) -> tuple:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _writable(kind: Any) -> bool:
    """Whether a value of this type can be written in `optim_args`."""
    return any(k in (bool, int, float, str) or get_origin(k) in (Literal, tuple) for k in _branches(kind))


def _parse(text: str, kind: Any) -> Any:
    branches = _branches(kind)
    if NoneType in branches and text.lower() in ("none", "null"):
        return None
    for branch in branches:
        try:
            return _parse_one(text, branch)
        except ValueError:
            continue
    raise ValueError(text)


def _parse_one(text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        matches = [value for value in get_args(kind) if str(value) == text]
        if matches:
            return matches[0]
    elif get_origin(kind) is tuple:
        parts = text.split(":")
        if len(parts) == len(get_args(kind)):
            return tuple(_parse_one(part, k) for part, k in zip(parts, get_args(kind), strict=True))
    elif kind is bool:
        if text.lower() in ("true", "false", "1", "0"):
            return text.lower() in ("true", "1")
    elif kind in (int, float, str):
        return kind(text)
    raise ValueError(text)


def _describe(kind: Any) -> str:
    words = []
    for branch in _branches(kind):
        if get_origin(branch) is Literal:
            words += [str(value) for value in get_args(branch)]
        elif get_origin(branch) is tuple:
            words.append(":".join(k.__name__ for k in get_args(branch)))
        elif branch is NoneType:
            words.append("none")
        elif branch in (bool, int, float, str):
            words.append({bool: "true or false", str: "text"}.get(branch, branch.__name__))
    return " or ".join(words)
