"""How a setting is stated once: its kind, its default, its help.

    class DISPOConfig(TrustGRPOConfig):
        epsilon_pos_high: Width = setting(10.0, "Up-clip width of the weight where A > 0. `inf`: no cap.")
        select: Literal["advantage", "correct"] = setting("advantage", "What chooses the band of a response.")

The kind carries the range in the type, `Literal` carries the choices. From this one statement come the check at
construction ([`check`]), the "Parameters" section of the class's docstring ([`document`]), the argument parser's entry
and the help page. Imports neither torch nor TRL.

The range stands in the annotation and not in the field's `metadata`, every key of which transformers 5.23 hands to
argparse; its parser strips `Annotated` and sees the plain type.
"""

import inspect
import json
import math
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import MISSING, Field, dataclass, field
from textwrap import fill
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may take: from `low` to `high`, the bounds included unless `above` or `below` is set.

    Attributes:
        low, high: bounds.
        above, below: whether `low`, `high` itself is left out.
        infinite: whether `inf` is allowed.
        whole: integers only.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    infinite: bool = False
    whole: bool = False

    def __contains__(self, x: Any) -> bool:
        if isinstance(x, bool) or not isinstance(x, int if self.whole else (int, float)) or math.isnan(x):
            return False
        if math.isinf(x) and not self.infinite:
            return False
        return (x > self.low if self.above else x >= self.low) and (x < self.high if self.below else x <= self.high)

    def __str__(self) -> str:
        noun = "whole number" if self.whole else "number"
        if self.low > -math.inf and self.high < math.inf:
            return f"a {noun} in {'(' if self.above else '['}{self.low:g}, {self.high:g}{')' if self.below else ']'}"
        noun = f"a {noun}" if self.whole or self.infinite else f"a finite {noun}"
        if self.low > -math.inf:
            noun += f" {'>' if self.above else '>='} {self.low:g}"
        if self.high < math.inf:
            noun += f" {'<' if self.below else '<='} {self.high:g}"
        return f"{noun} (`inf` is allowed)" if self.infinite else noun


Number = Annotated[float, Range()]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
PositiveOrInf = Annotated[float, Range(0, above=True, infinite=True)]
Width = Annotated[float, Range(0, infinite=True)]
Fraction = Annotated[float, Range(0, 1)]
OpenFraction = Annotated[float, Range(0, 1, above=True, below=True)]
BelowOne = Annotated[float, Range(0, 1, below=True)]
Count = Annotated[int, Range(1, whole=True)]
Whole = Annotated[int, Range(0, whole=True)]
Integer = Annotated[int, Range(whole=True)]


def setting(default: Any, help: str) -> Any:
    """A dataclass field with a default and one sentence of help. A list or a dict is copied for each config."""
    if isinstance(default, list | dict | set):
        return field(default_factory=lambda: deepcopy(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Setting:
    """One setting of a config class, as read from its statement.

    Attributes:
        name, default, help: as stated.
        type: the annotation without `Annotated` and `None`, such as `float`.
        range: what a number may be, or `None`.
        choices: what a `Literal` allows, or ().
        optional: whether `None` is allowed.
    """

    name: str
    default: Any
    help: str
    type: Any
    range: Range | None = None
    choices: tuple = ()
    optional: bool = False

    def allows(self, value: Any) -> bool:
        if not self.words:
            return True
        if value is None:
            return self.optional
        if self.range is not None:
            return value in self.range
        if self.choices:
            return value in self.choices
        return isinstance(value, self.type)

    @property
    def words(self) -> str:
        """What is allowed, as in "must be ..."; empty for a type whose values are not checked."""
        if self.range is not None:
            words = str(self.range)
        elif self.choices:
            named = [repr(choice) for choice in self.choices]
            words = " or ".join(named) if len(named) < 3 else f"one of {', '.join(named)}"
        else:
            words = {bool: "True or False", str: "a text"}.get(self.type, "")
        return f"{words}, or None" if words and self.optional else words


def read_kind(name: str, annotation: Any, default: Any = None, help: str = "") -> Setting:
    """The [`Setting`] that an annotation such as `Positive | None` or `Literal["tv", "kl"]` describes."""
    found, optional = annotation, False
    if get_origin(found) in (Union, UnionType):
        members = [member for member in get_args(found) if member is not NoneType]
        optional = len(members) < len(get_args(found))
        found = members[0] if len(members) == 1 else Any
    if get_origin(found) is Literal:
        return Setting(name, default, help, type(get_args(found)[0]), None, get_args(found), optional)
    if get_origin(found) is Annotated:
        base, *notes = get_args(found)
        return Setting(name, default, help, base, next(n for n in notes if isinstance(n, Range)), (), optional)
    return Setting(name, default, help, found, None, (), optional)


def require(name: str, value: Any, kind: Any) -> None:
    """Raise `ValueError` naming `name`, `value` and the mend unless `value` is of `kind`, such as `Positive`."""
    known = read_kind(name, kind)
    if not known.allows(value):
        raise ValueError(f"{name}={value!r} must be {known.words}.")


class Settings:
    """Base of config dataclasses that state their fields with [`setting`].

    A subclass inherits and extends the settings and `unread_fields`; a name that it states itself is read again. Its
    docstring gains the section "Parameters", before "Raises".

    Attributes:
        unread_fields: inherited field -> what to do instead. [`check`] raises where one differs from its default.
        old_names: a field's older spelling, which is a field too and `None` by default -> its name.
        old_values: field -> older spelling of a value -> the value.
    """

    unread_fields: ClassVar[dict[str, str]] = {}
    old_names: ClassVar[dict[str, str]] = {}
    old_values: ClassVar[dict[str, dict[str, str]]] = {}
    stated: ClassVar[dict[str, Setting]] = {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        notes, own = inspect.get_annotations(cls, eval_str=True), {}
        for name, value in vars(cls).items():
            if isinstance(value, Field) and name in notes and "help" in value.metadata:
                default = value.default if value.default_factory is MISSING else value.default_factory()
                own[name] = read_kind(name, notes[name], default, value.metadata["help"])
        inherited = [base for base in cls.__mro__[1:] if issubclass(base, Settings)]
        stated, unread = {}, {}
        for base in reversed(inherited):
            stated |= base.stated
            unread |= vars(base).get("unread_fields", {})
        cls.stated = stated | own
        cls.unread_fields = {k: why for k, why in unread.items() if k not in own} | vars(cls).get("unread_fields", {})
        if own and cls.__doc__:
            cls.__doc__ = document(cls.__doc__, own)

    def take_older_spellings(self) -> None:
        """Put values given under an older spelling where they belong, with one warning each."""
        for old, new in self.old_names.items():
            if (value := getattr(self, old)) is not None:
                warnings.warn(
                    f"{old}={value!r} is an older spelling: use {new}={value!r}.", FutureWarning, stacklevel=4
                )
                setattr(self, new, value)
                setattr(self, old, None)
        for name, values in self.old_values.items():
            if (value := getattr(self, name)) in values:
                new = values[value]
                warnings.warn(f"{name}={value!r} is an older spelling: use {new!r}.", FutureWarning, stacklevel=4)
                setattr(self, name, new)

    def require(self, ok: bool, name: str, mend: str) -> None:
        """Raise `ValueError` naming the field and its value unless `ok`."""
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r} {mend}.")


def check(config: Settings) -> None:
    """Raise `ValueError`, one line, for the first setting outside its kind, or the first unread field that is set."""
    cls = type(config)
    for known in cls.stated.values():
        value = getattr(config, known.name)
        if not known.allows(value):
            raise ValueError(f"{known.name}={value!r} must be {known.words}.")
    refuse_unread(config, cls.unread_fields)


def refuse_unread(config: Any, unread: Mapping[str, str]) -> None:
    """Raise `ValueError` for a field that is set though nothing reads it; `unread` says what to do instead.

    The default that counts is the one of the class that introduced the field.
    """
    cls = type(config)
    for name, mend in unread.items():
        value, default = getattr(config, name), first_default(cls, name)
        if value != default:
            raise ValueError(
                f"{name}={value!r}: {cls.__name__} does not read `{name}`; {mend}. Leave it at {default!r}."
            )


def as_mapping(name: str, value: Any) -> dict[str, Any] | None:
    """The mapping in the field `name`, which on a command line is JSON; `None` stays `None`.

    Raises:
        ValueError: if it is none, naming the field.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}={value!r} is no mapping: {error}; write it as JSON.") from error
    if found is not None and not isinstance(found, Mapping):
        raise ValueError(f"{name}={value!r} must be a mapping of names to values.")
    return None if found is None else dict(found)


def first_default(cls: type, name: str) -> Any:
    """The default of a field in the most basic dataclass that has it."""
    fields = [
        base.__dataclass_fields__[name] for base in cls.__mro__ if name in vars(base).get("__dataclass_fields__", {})
    ]
    last = fields[-1]
    return last.default if last.default_factory is MISSING else last.default_factory()


def document(doc: str, settings: Mapping[str, Setting]) -> str:
    """A class docstring with the section "Parameters", written from its settings, before "Raises" or at the end."""
    doc = inspect.cleandoc(doc)
    rows = []
    for known in settings.values():
        text = f"{known.help} {known.words[:1].upper()}{known.words[1:]}." if known.words else known.help
        type_name = getattr(known.type, "__name__", str(known.type)) if known.type is not Any else "object"
        type_name = str(known.type) if get_origin(known.type) else type_name
        default = f'"{known.default}"' if isinstance(known.default, str) else repr(known.default)
        rows.append(f"    {known.name} (`{type_name}`, *optional*, defaults to `{default}`):")
        rows.append(fill(text, 110, initial_indent=" " * 8, subsequent_indent=" " * 8))
    section = "Parameters:\n" + "\n".join(rows)
    before, mark, after = doc.partition("\nRaises:")
    return f"{before.rstrip()}\n\n{section}\n{mark}{after}" if mark else f"{doc.rstrip()}\n\n{section}\n"
