"""A setting is stated once: check, document and parser read the same statement."""

import math
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import HfArgumentParser

from trl_trust.settings import (
    BelowOne,
    Count,
    Fraction,
    Integer,
    NonNegative,
    Number,
    OpenFraction,
    Positive,
    PositiveOrInf,
    Range,
    Settings,
    Whole,
    Width,
    check,
    read_kind,
    refuse_unread,
    require,
    setting,
)


@dataclass
class Base:
    rate: float = field(default=0.5, metadata={"help": "of a foreign base"})
    old: int = 3


@dataclass
class Config(Settings, Base):
    """
    A config.

    Raises:
        ValueError: for what is not allowed.
    """

    unread_fields = {"old": "use `width`"}

    width: Width = setting(10.0, "Width of a band.")
    cap: Positive | None = setting(None, "A cap.")
    mode: Literal["tv", "kl"] = setting("tv", "Which divergence.")
    steps: Count = setting(1, "How many.")
    flag: bool = setting(False, "Whether.")
    terms: list[float] = setting([1.0, 2.0], "Some numbers.")

    def __post_init__(self):
        check(self)


@dataclass
class Child(Config):
    """A child."""

    unread_fields = {"cap": "it has none"}

    rate: OpenFraction = setting(0.5, "Narrower than the base's.")
    width: Fraction = setting(1.0, "Narrower.")


@pytest.mark.parametrize(
    "kind, good, bad",
    [
        (Number, [-1, 0, 2.5], [math.inf, math.nan, "1", None, True]),
        (Positive, [1e-9, 3], [0, -1, math.inf, math.nan]),
        (NonNegative, [0, 0.0, 3], [-1e-9, math.inf, math.nan]),
        (PositiveOrInf, [1, math.inf], [0, -math.inf, math.nan]),
        (Width, [0, math.inf], [-1, math.nan, -math.inf]),
        (Fraction, [0, 1, 0.5], [1.1, -0.1, math.nan]),
        (OpenFraction, [0.5], [0, 1, 0.0, 1.0]),
        (BelowOne, [0, 0.99], [1, -0.1]),
        (Count, [1, 7], [0, 1.0, True, "1", math.inf]),
        (Whole, [0, 7], [-1, 0.0, False]),
        (Integer, [-3, 0], [0.5, None]),
        (Positive | None, [None, 1], [0]),
        (Literal["a", "b"], ["a"], ["c", None, 1]),
        (Literal["a", "b"] | None, ["b", None], ["c"]),
        (bool, [True], [1, None, "yes"]),
    ],
)
def test_kinds(kind, good, bad):
    for value in good:
        require("x", value, kind)
    for value in bad:
        with pytest.raises(ValueError, match="^x=.* must be .*\\.$") as raised:
            require("x", value, kind)
        assert "\n" not in str(raised.value)


@given(st.floats(), st.floats(-5, 5), st.floats(-5, 5), st.booleans(), st.booleans())
def test_a_range_agrees_with_its_bounds(x, a, b, above, below):
    low, high = sorted((a, b))
    inside = x in Range(low, high, above, below)
    assert inside == ((low < x if above else low <= x) and (x < high if below else x <= high))


def test_wording():
    assert read_kind("x", Positive | None).words == "a finite number > 0, or None"
    assert read_kind("x", Width).words == "a number >= 0 (`inf` is allowed)"
    assert read_kind("x", Literal["a", "b"]).words == "'a' or 'b'"
    assert read_kind("x", Literal["a", "b", "c"]).words == "one of 'a', 'b', 'c'"
    assert str(Range(0, 1, below=True)) == "a number in [0, 1)"
    assert str(Range(1, whole=True)) == "a whole number >= 1"


@pytest.mark.parametrize(
    "given, message",
    [
        ({"width": -1}, "width=-1 must be a number >= 0 (`inf` is allowed)."),
        ({"cap": 0}, "cap=0 must be a finite number > 0, or None."),
        ({"mode": "js"}, "mode='js' must be 'tv' or 'kl'."),
        ({"steps": 1.5}, "steps=1.5 must be a whole number >= 1."),
        ({"flag": 1}, "flag=1 must be True or False."),
        ({"old": 4}, "old=4: Config does not read `old`; use `width`. Leave it at 3."),
    ],
)
def test_check_names_field_value_and_mend(given, message):
    with pytest.raises(ValueError) as raised:
        Config(**given)
    assert str(raised.value) == message


def test_inheritance():
    assert list(Child.stated) == ["width", "cap", "mode", "steps", "flag", "terms", "rate"]
    assert Child.unread_fields == {"old": "use `width`", "cap": "it has none"}
    assert "rate" not in Config.stated
    with pytest.raises(ValueError, match="width=2"):
        Child(width=2)
    with pytest.raises(ValueError, match="rate=1"):
        Child(rate=1)
    with pytest.raises(ValueError, match="cap=2: Child does not read"):
        Child(cap=2)
    Config(width=2, rate=7, cap=2)


def test_a_restated_field_is_read_again():
    @dataclass
    class Reader(Child):
        """Reads the cap again."""

        cap: Positive | None = setting(None, "A cap.")

    Reader(cap=2.0)
    assert "cap" in Child.unread_fields and "cap" not in Reader.unread_fields


def test_mutable_defaults_are_copied():
    one, other = Config(), Config()
    one.terms.append(3.0)
    assert other.terms == Config.stated["terms"].default == [1.0, 2.0]


def test_the_docstring_is_written_from_the_settings():
    doc = Config.__doc__
    assert "width (`float`, *optional*, defaults to `10.0`):" in doc
    assert "Width of a band. A number >= 0 (`inf` is allowed)." in doc
    assert 'mode (`str`, *optional*, defaults to `"tv"`):' in doc
    assert doc.index("Parameters:") < doc.index("Raises:")
    assert "terms (`list[float]`" in doc
    assert "cap" not in Child.__doc__ and "rate" in Child.__doc__


def test_parsers_see_plain_types():
    parser = HfArgumentParser(Config)
    (config,) = parser.parse_args_into_dataclasses(["--width", "inf", "--cap", "2", "--mode", "kl", "--steps", "4"])
    assert (config.width, config.cap, config.mode, config.steps) == (math.inf, 2.0, "kl", 4)
    assert parser.format_help().count("Which divergence.") == 1
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--mode", "js"])


def test_a_type_without_a_kind_is_not_checked():
    Config(terms=None)
    require("x", None, float)
    require("x", "text", list[int])


def test_unread_under_a_condition():
    config = Config(cap=3.0)
    with pytest.raises(ValueError, match=r"cap=3.0: Config does not read `cap`; set mode='kl'. Leave it at None."):
        refuse_unread(config, {"cap": "set mode='kl'"})


def test_nothing_heavy_is_imported():
    code = "import sys, trl_trust.settings; print([m for m in ('torch', 'trl', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
