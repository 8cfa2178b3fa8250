"""What an optimizer can be told: the settings that its signature declares, their check, the text of `optim_args`.

A setting is stated once, as a keyword of `__init__` with a kind of [`trl_trust.settings`] as its annotation. From it
come the check at construction, the types that `optim_args` are parsed by, and the list that an unknown key gets.
"""

from collections.abc import Callable, Mapping
from functools import cache
from inspect import Parameter, signature
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ..lookup import near
from ..settings import read_kind


@cache
def declared_options(target: Callable) -> dict[str, Any]:
    """Return `{name: annotation}` of the keyword arguments of `target`, and of its bases' where it passes `**` on.

    `lr` counts as one although it may be positional.
    """
    functions = [target]
    if isinstance(target, type):
        functions = [vars(cls)["__init__"] for cls in target.__mro__ if "__init__" in vars(cls)]
    options: dict[str, Any] = {}
    for function in functions:
        hints = get_type_hints(function, include_extras=True)
        parameters = signature(function).parameters.values()
        for parameter in parameters:
            if parameter.kind is Parameter.KEYWORD_ONLY or parameter.name == "lr":
                options.setdefault(parameter.name, hints.get(parameter.name, str))
        if not any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return options


def require_option(name: str, value: Any, kind: Any) -> None:
    """Raise `ValueError`, one line with name, value and what is allowed, unless `value` is of the declared `kind`.

    A tuple of kinds takes a list too. `None` is a value only where the annotation says so.
    """
    branches = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    tuples = [branch for branch in branches if get_origin(branch) is tuple]
    if tuples and not (value is None and NoneType in branches):
        parts = get_args(tuples[0])
        words = f"{len(parts)} values, each {read_kind(name, parts[0]).words}"
        ok = isinstance(value, (tuple, list)) and len(value) == len(parts)
        ok = ok and all(read_kind(name, part).allows(v) for part, v in zip(parts, value, strict=True))
    else:
        known = read_kind(name, kind)
        words, ok = known.words, known.allows(value)
    if not ok:
        raise ValueError(f"{name}={value!r} must be {words}")


def require_options(function: Callable, values: Mapping[str, Any]) -> None:
    """[`require_option`] for each declared option of `function` that `values` has."""
    for name, kind in declared_options(function).items():
        if name in values:
            require_option(name, values[name], kind)


# -------------------------------------------------------------------------------------------------------------------
# optim_args


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
    unknown = sorted(texts.keys() - options.keys())
    if unknown:
        valid = ", ".join(f"{name} ({_describe(kind)})" for name, kind in sorted(options.items()))
        meant = near(unknown[0], options, say="")
        raise ValueError(
            f"optim_args of optim={optimizer!r} has unknown keys: {', '.join(unknown)}; {meant and meant + ' '}"
            f"valid: {valid}"
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
    """The members of a union, without their ranges: `Positive | None` is float and None."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(get_args(k)[0] if get_origin(k) is Annotated else k for k in members)


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
            return tuple(_parse(part, k) for part, k in zip(parts, get_args(kind), strict=True))
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
            words.append(":".join(_describe(k) for k in get_args(branch)))
        elif branch is NoneType:
            words.append("none")
        elif branch in (bool, int, float, str):
            words.append({bool: "true or false", str: "text"}.get(branch, branch.__name__))
    return " or ".join(words)
