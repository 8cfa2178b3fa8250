"""Exact linear systems that remember where a row came from."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.tasks.geometry.linear import LinearSystem, add, is_constant


ONE = ("1", 180)


def test_a_value_follows_with_the_equations_it_needs():
    system = LinearSystem()
    assert system.insert({"x": 1, "y": -1}, "e1") and system.insert({"z": 1, "w": 2}, "e2")
    assert system.insert({"y": 2, ONE: Fraction(-1, 3)}, "e3")
    left, used = system.reduce({"x": 1})
    assert left == {ONE: Fraction(1, 6)} and used == {"e1": 1, "e3": Fraction(1, 2)}
    assert not system.insert({"x": 3, "y": -3}, "e4")  # nothing new
    with pytest.raises(ValueError, match="e5 contradicts"):
        system.insert({"x": 1, ONE: Fraction(-1, 2)}, "e5")


rows = st.lists(
    st.dictionaries(st.sampled_from("abcde"), st.integers(-3, 3).filter(bool), min_size=1, max_size=4),
    min_size=1,
    max_size=7,
)


@given(rows, st.dictionaries(st.sampled_from("abcde"), st.integers(-3, 3).filter(bool), max_size=4))
def test_the_remainder_and_the_equations_add_up(equations, target):
    system = LinearSystem()
    for i, equation in enumerate(equations):
        system.insert(equation, i)
    left, used = system.reduce(target)
    total = dict(left)
    for i, number in used.items():
        add(total, {key: Fraction(x) for key, x in equations[i].items()}, number)
    assert total == {key: Fraction(x) for key, x in target.items()}
    assert not any(key in system.rows for key in left)
    for i, equation in enumerate(equations):  # each equation follows from the whole
        assert system.reduce(equation)[0] == {}, i


def test_constants_are_never_solved_for():
    assert is_constant(ONE) and not is_constant("x") and not is_constant(("x", 1))
    system = LinearSystem()
    system.insert({ONE: 1, "x": 1}, "e")
    assert list(system.rows) == ["x"]
