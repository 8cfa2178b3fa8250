"""What a text claims: every wording of every fact is read back, in LaTeX, Unicode and words."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.tasks.geometry.claims import claims
from trl_trust.tasks.geometry.facts import KINDS, VALUED, Fact, parse_fact
from trl_trust.tasks.geometry.text import QUESTIONS, TERSE, WORDINGS, ask, say


def example(kind, rng):
    points = rng.sample("ABCDEFGH", KINDS[kind][0])
    value = {"angle": 40, "length": 7, "ratio": 3, "area": 12}.get(kind)
    return Fact.of(kind, points, value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wording", [0, 1, 2, TERSE])
def test_every_wording_is_read_back(kind, wording):
    rng = random.Random(kind)
    for _ in range(5):
        fact = example(kind, rng)
        assert claims(f"(1) {say(fact, wording)} [AA, from (3)]\n") == [fact]
    assert (len(WORDINGS[kind]) == 4 and kind in VALUED) or kind not in QUESTIONS


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (r"$\angle ABC = 40^\circ$", "angle A B C = 40"),
        (r"m∠ABC = 40°.", "angle A B C = 40"),
        (r"\[\angle ABC = \angle DEF = 40\]", "eqangle A B C D E F; angle D E F = 40"),
        (r"Since AB \parallel CD and AB \perp EF,", "para A B C D; perp A B E F"),
        (r"AB = CD = 2\sqrt{3}", "cong A B C D; length C D = 2*sqrt(3)"),
        (r"\frac{AB}{CD} = \frac{EF}{GH}", "eqratio A B C D E F G H"),
        (r"\frac{AB}{CD} = \frac{3}{2}", "ratio A B C D = 3/2"),
        (r"\triangle ABC \sim \triangle DEF", "simtri A B C D E F"),
        ("40 = angle ABC", "angle A B C = 40"),
        (r"so AB = 5\text{ units}", "length A B = 5"),
        ("angle ABC = 40; angle CBA = 40", "angle A B C = 40"),  # once
        ("Therefore AB=5, CD=6", "length A B = 5; length C D = 6"),
        ("AB is parallel to CD", "para A B C D"),
        ("no claim at all: 3 = 3, x = 4, ABC", ""),
    ],
)
def test_spellings(text, facts):
    assert claims(text) == [parse_fact(fact) for fact in facts.split("; ") if fact]


def test_impossible_points_are_a_claim_all_the_same():
    assert (claims("AA = 3") == [None] and claims("AB = -3") == []) or claims("AB = 0") == [None]


@given(st.text(max_size=300) | st.text("ABC=|+_/~\\ {}0159.°∠angle", max_size=300))
def test_nothing_raises(text):
    assert isinstance(claims(text), list)


@pytest.mark.parametrize("text", ["AB=" * 40_000, "angle " * 40_000, "ABC+" * 40_000, "{" * 200_000, "A, " * 60_000])
def test_long_text_is_cut(text):
    assert len(claims(text)) < 5


def test_questions_have_three_wordings():
    for kind in QUESTIONS:
        asked = {ask(example(kind, random.Random(0)), i) for i in (0, 1, 2, TERSE)}
        assert len(asked) == 4 and not any(claims(question) for question in asked)
