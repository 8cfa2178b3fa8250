"""What follows: each rule in a case worked by hand, and nothing that is false."""

import math
import random
from fractions import Fraction
from itertools import combinations

import pytest

from trl_trust.tasks.geometry.closure import DEGREE, RULES, Closure
from trl_trust.tasks.geometry.facts import Fact, holds, parse_fact
from trl_trust.tasks.geometry.problems import goals
from trl_trust.tasks.geometry.scene import draw


def triangle(a, b, side):
    """A, B, C with these angles in degrees at A and B, and AB = side."""
    far = side * math.sin(math.radians(b)) / math.sin(math.radians(a + b))
    return {"A": (0.0, 0.0), "B": (side, 0.0), "C": (far * math.cos(math.radians(a)), far * math.sin(math.radians(a)))}


def middle(points, one, two):
    return tuple((x + y) / 2 for x, y in zip(points[one], points[two], strict=True))


def closed(points, premises, rules=RULES):
    return Closure(points, [parse_fact(text) for text in premises.split("; ")], rules)


def value(closure, goal):
    found = closure.value(parse_fact(goal))
    return found and str(found.value)


ISOSCELES = triangle(40, 40, 4.0)  # CA = CB; the apex is C here


def test_base_angles_and_the_median():
    points = {**ISOSCELES, "M": middle(ISOSCELES, "A", "B")}
    closure = closed(points, "cong C A C B; angle A B C = 40; mid M A B")
    assert value(closure, "angle A C B") == "100" and value(closure, "angle C M A") == "90"
    assert value(closure, "angle M C A") == "50" and value(closure, "length A B") is None


@pytest.mark.parametrize("base", [25, 40, 60, 80])
def test_an_equation_of_directions_is_lifted_off_the_diagram(base):
    """Of AB = AC the base angles give 2 d(BC) - d(AB) - d(AC) = -180 where these are 0, 40 and 140."""
    points = {"B": (0.0, 0.0), "C": (2.0, 0.0), "A": (1.0, math.tan(math.radians(base)))}
    closure = closed(points, "cong A B A C")
    row = closure.diagram.equations(parse_fact("eqangle A B C A C B"))[0][0]
    assert {key: abs(number) for key, number in row.items()} == {
        ("B", "C"): 2,
        ("A", "B"): 1,
        ("A", "C"): 1,
        DEGREE: 180,
    }
    assert row[DEGREE] * row["B", "C"] > 0  # 2 d(BC) ... + 180 = 0


def test_halving_is_done_over_the_reals():
    """2 d = 0 modulo 180 degrees does not say d = 0: here it is 90."""
    points = {**ISOSCELES, "D": (2.0, -3.0)}
    closure = closed(points, "eqangle A D C C D B; cong D A D B; cong C A C B")
    with pytest.raises(ArithmeticError, match="miss by -?90"):
        closure.follows(parse_fact("para C D A B"))
    assert value(closure, "angle A B C") is None
    assert closure.prove(parse_fact("perp C D A B")) is not None


EQUILATERAL = triangle(60, 60, 6.0) | {"D": (3.0, 0.0)}
RIGHT = {"A": (3.0, 0.0), "B": (0.0, 6.0), "C": (0.0, 0.0)}
SINE = triangle(45, 60, 2 * math.sin(math.radians(75)) / math.sin(math.radians(45)))
WORKED = {
    "altitude": (EQUILATERAL, "cong A B B C; cong B C C A; length A B = 6; mid D A B", "length C D", "3*sqrt(3)"),
    "area": (EQUILATERAL, "cong A B B C; cong B C C A; length A B = 6", "area A B C", "9*sqrt(3)"),
    "Pythagoras": (RIGHT, "perp C A C B; length A C = 3; length B C = 6", "length A B", "3*sqrt(5)"),
    "30-60-90": (
        triangle(30, 60, 4.0),
        "perp C A C B; angle B A C = 30; length A B = 4",
        "length A C",
        "2*sqrt(3)",
    ),
    "sines": (SINE, "angle B A C = 45; angle A B C = 60; length B C = 2", "length A C", "sqrt(6)"),
}


@pytest.mark.parametrize("name", WORKED)
def test_worked_lengths(name):
    points, premises, goal, expected = WORKED[name]
    assert value(closed(points, premises), goal) == expected


def test_the_altitude_of_a_right_triangle():
    points = {"A": (3.0, 0.0), "B": (0.0, 4.0), "C": (0.0, 0.0), "H": (48 / 25, 36 / 25)}
    closure = closed(points, "perp C A C B; length A C = 3; length B C = 4; coll A H B; perp C H A B")
    assert value(closure, "length C H") == "12/5" and value(closure, "length A H") == "9/5"
    assert value(closure, "area A B C") == "6"


def test_central_and_inscribed_angle():
    at = lambda degrees: (math.cos(math.radians(degrees)), math.sin(math.radians(degrees)))
    points = {"O": (0.0, 0.0), "A": at(200), "B": at(-60), "C": at(70)}  # the arc AB is 100
    closure = closed(points, "cong O A O B; cong O B O C; angle A C B = 50")
    assert value(closure, "angle A O B") == "100" and value(closure, "angle O B A") == "40"


# -- one worked case a rule: it follows with that rule alone, and not by chasing alone -------------------------------

SQUARE = {"A": (0.0, 0.0), "B": (2.0, 0.0), "C": (2.0, 2.0), "D": (0.0, 2.0)}
CIRCLE = {name: (math.cos(t), math.sin(t)) for name, t in zip("ABCD", (0.1, 1.3, 2.4, 4.6), strict=True)}
SLANTED = {"A": (0.0, 0.0), "B": (4.0, 0.3), "C": (1.0, 3.0), "D": (5.0, 3.3)}  # a parallelogram ABDC
CASES = {
    "isosceles": (ISOSCELES, "cong C A C B", "eqangle C A B C B A"),
    "isosceles converse": (ISOSCELES, "eqangle C A B C B A", "cong C A C B"),
    "AA": (SLANTED, "para A B C D; para A C B D", "cong A B C D"),
    "SAS": (
        {**SLANTED, "M": middle(SLANTED, "A", "B"), "N": middle(SLANTED, "A", "C")},
        "mid M A B; mid N A C",
        "para M N B C",
    ),
    "SSS": (SLANTED, "cong A B C D; cong A C B D", "para A B C D"),
    "inscribed angles": (CIRCLE, "supangle A B C A D C", "cyclic A B C D"),
    "equal radii": ({**CIRCLE, "O": (0.0, 0.0)}, "cong O A O B; cong O A O C; cong O A O D", "cyclic A B C D"),
    "sine rule": (triangle(30, 45, 2.0), "angle B A C = 30; angle A B C = 45", "ratio B C A C = sqrt(2)/2"),
    "Pythagoras": (SQUARE, "perp B A B C; length A B = 2; length B C = 2", "length A C = 2*sqrt(2)"),
}


@pytest.mark.parametrize("rule", CASES)
def test_a_rule(rule):
    points, premises, conclusion = CASES[rule]
    closure = closed(points, premises, [rule])
    assert closure.prove(parse_fact(conclusion)) is not None
    assert any(derived.rule == rule for derived in closure.derived)
    assert closed(points, premises, []).prove(parse_fact(conclusion)) is None


def test_every_rule_has_a_case():
    assert {*CASES, "area"} == set(RULES)


@pytest.mark.parametrize("kind", ["eqangle", "cong", "simtri", "cyclic", "perp", "ratio"])
def test_a_wrong_rule_is_caught_by_the_diagram(kind):
    """Conclusions without their premises go in where they are true, and raise where they are false."""
    taken = refused = 0
    for seed in range(12):
        scene = draw(seed, (2, 3))
        closure = Closure(scene.points, scene.premises)
        rng = random.Random(seed)
        for _ in range(20):
            a, b, c, d = rng.sample(sorted(scene.points), 4)
            said = {
                "eqangle": (a, b, c, a, c, b),
                "cong": (a, b, a, c),
                "simtri": (a, b, c, b, a, c),
                "cyclic": (a, b, c, d),
                "perp": (a, b, a, c),
                "ratio": (a, b, a, c),
            }[kind]
            if any(tuple(sorted(t)) not in closure.diagram.triples for t in combinations((a, b, c, d), 3)):
                continue
            fact = Fact.of(kind, said, Fraction(3, 2) if kind == "ratio" else None)
            try:
                closure.diagram.equations(fact)
                taken += 1
                assert holds(fact, scene.points)
            except ArithmeticError:
                refused += 1
                assert not holds(fact, scene.points)
    assert refused > 20, (taken, refused)


def test_nothing_false_follows():
    """All goals of 40 scenes against the diagram, and every step of them; benchmarks/geometry.py does a thousand."""
    checked = 0
    for seed in range(40):
        scene = draw(seed, (2, 4))
        closure = Closure(scene.points, scene.premises)
        for fact, _, _ in goals(closure):
            assert holds(fact, scene.points), (seed, str(fact))
            checked += 1
        for derived in closure.derived:
            assert holds(derived.fact, scene.points), (seed, str(derived.fact))
    assert checked > 1000


def test_a_premise_that_does_not_hold_is_refused():
    with pytest.raises(ArithmeticError, match="miss by"):
        closed(ISOSCELES, "cong A B A C")


def test_sums_of_lengths_stay_undetermined():
    """By design: prime exponents cannot say a + b."""
    points = {"A": (0.0, 0.0), "B": (2.0, 0.0), "C": (5.0, 0.0), "D": (0.0, 1.0)}
    assert value(closed(points, "coll A B C; length A B = 2; length B C = 3"), "length A C") is None
