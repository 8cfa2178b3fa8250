"""The language of facts: exact values, canonical forms, agreement with a diagram."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.tasks.geometry.facts import Fact, Root, angle, holds, parse_fact, parse_value


HALF = Fraction(1, 2)


@pytest.mark.parametrize(
    ("value", "text", "number"),
    [
        (Root.of(12) ** HALF, "2*sqrt(3)", 12**0.5),
        (Root.of(Fraction(12, 5)), "12/5", 2.4),
        (Root.of(6) ** HALF, "sqrt(6)", 6**0.5),
        (Root.of(27) ** HALF, "3*sqrt(3)", 27**0.5),
        (Root.of(Fraction(3, 4)) ** HALF, "sqrt(3)/2", 0.75**0.5),
        (Root.of(Fraction(45, 4)) ** HALF, "3*sqrt(5)/2", (45 / 4) ** 0.5),
        (Root.of(1), "1", 1.0),
        (Root.of(2) * Root.of(3) ** -HALF, "2*sqrt(3)/3", 2 / 3**0.5),
    ],
)
def test_values_are_written_and_read_exactly(value, text, number):
    assert str(value) == text and parse_value(text) == value
    assert math.isclose(float(value), number, rel_tol=1e-12)


@given(st.fractions(min_value=Fraction(1, 50), max_value=50, max_denominator=50), st.integers(1, 60))
def test_every_value_survives_its_text(rational, under):
    value = Root.of(rational) * Root.of(under) ** HALF
    assert parse_value(str(value)) == value
    assert value.square == rational**2 * under


@pytest.mark.parametrize("text", ["", "x", "2*sqrt(3", "-1", "0", "1/0", "sqrt(0)", "9" * 99, "10**10", "1e9", "2*3"])
def test_what_is_no_value_is_none(text):
    assert parse_value(text) is None


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("cong A B C D", "cong D C B A"),
        ("para A B C D", "para C D B A"),
        ("angle A B C = 40", "angle C B A = 40"),
        ("ratio A B C D = 2", "ratio D C A B = 1/2"),
        ("eqangle A B C D E F", "eqangle F E D C B A"),
        ("eqratio A B C D E F G H", "eqratio G H E F C D A B"),
        ("eqratio A B C D E F G H", "eqratio A B E F C D G H"),
        ("simtri A B C D E F", "simtri E F D B C A"),
        ("mid M A B", "mid M B A"),
        ("cyclic A B C D", "cyclic D B A C"),
    ],
)
def test_the_same_in_another_order_is_one_fact(one, two):
    assert parse_fact(one) == parse_fact(two)
    assert parse_fact(str(parse_fact(one))) == parse_fact(one)


def test_what_says_something_else_is_another_fact():
    assert parse_fact("angle A B C = 40") != parse_fact("angle B A C = 40")
    assert parse_fact("simtri A B C D E F") != parse_fact("simtri A B C E D F")
    assert parse_fact("eqratio A B C D E F G H") != parse_fact("eqratio A B C D G H E F")


@pytest.mark.parametrize("text", ["angle A B", "nonesuch A B", "cong A B C D = 2", "cong a b c d", "length A B = x"])
def test_what_is_no_fact_raises(text):
    with pytest.raises(ValueError, match="is no fact|takes no value"):
        parse_fact(text)


# A square of side 2, its center, and the midpoint of a side
SQUARE = {"A": (0, 0), "B": (2, 0), "C": (2, 2), "D": (0, 2), "O": (1, 1), "M": (1, 0)}
TRUE = """coll A O C|para A B C D|perp A B B C|cong A B C D|mid M A B|mid O B D|cyclic A B C D|eqangle A B C B C D
supangle A O B B O C|eqratio A B A C B C B D|simtri A B C B C D|angle A O M = 45|length A C = 2*sqrt(2)
ratio A B A C = sqrt(2)/2|area A B C = 2|area A B O = 1"""
FALSE = """coll A B C|para A B B C|perp A B A C|cong A B A C|mid O A B|cyclic A B C O|eqangle A B C A C B
supangle A B C B A C|eqratio A B A C B C A B|simtri A B C B A C|angle A O M = 46|length A C = 2*sqrt(3)
ratio A B A C = sqrt(2)|area A B C = 3|mid A M B"""


@pytest.mark.parametrize("text", TRUE.replace("\n", "|").split("|"))
def test_true_in_the_square(text):
    assert holds(parse_fact(text), SQUARE)


@pytest.mark.parametrize("text", FALSE.replace("\n", "|").split("|"))
def test_false_in_the_square(text):
    assert not holds(parse_fact(text), SQUARE)


def test_an_angle_is_undirected():
    assert math.isclose(angle(SQUARE, "A", "B", "C"), 90) and math.isclose(angle(SQUARE, "C", "B", "A"), 90)
    assert Fact.of("angle", "ABC", 90) == Fact.of("angle", "CBA", Fraction(90))
