"""Problems and their independent checker: every proof passes, every mutant fails, every premise is needed."""

import random
from fractions import Fraction

import pytest

from trl_trust.tasks.geometry.check import RULES, verify_proof
from trl_trust.tasks.geometry.closure import RULES as ENGINE
from trl_trust.tasks.geometry.closure import Diagram
from trl_trust.tasks.geometry.facts import VALUED, Fact, Root, parse_fact
from trl_trust.tasks.geometry.problems import closes, pose, tier_of
from trl_trust.tasks.geometry.scene import draw


def written(proof):
    return [{"rule": s.rule, "fact": str(s.fact), "from": list(s.sources)} for s in proof.steps]


@pytest.fixture(scope="module")
def problems():
    found = [pose(draw(seed), random.Random(seed), steps=(2, 16), solutions=3) for seed in range(60)]
    found = [problem for problem in found if problem]
    assert len(found) > 30
    return found


def test_every_proof_passes(problems):
    used = set()
    for problem in problems:
        for proof in problem.proofs:
            verify_proof(problem.points, problem.premises, problem.goal, written(proof))
            used |= proof.rules
    assert used >= {"angle chase", "ratio chase", "isosceles", "AA", "SAS", "SSS", "sine rule", "inscribed angles"}
    assert {*ENGINE, "angle chase", "ratio chase"} == set(RULES)


def test_several_proofs_differ_in_their_rules(problems):
    several = [problem for problem in problems if len(problem.proofs) > 1]
    assert len(several) > 5
    for problem in several:
        assert len({proof.rules for proof in problem.proofs}) == len(problem.proofs)


def test_every_premise_is_needed(problems):
    for problem in problems[:20]:
        diagram = Diagram(problem.points)
        assert closes(diagram, problem.premises, problem.goal)
        for premise in problem.premises:
            assert not closes(diagram, [p for p in problem.premises if p != premise], problem.goal)


def other(fact, rng, names):
    """A fact of the kind with another value, or on other points."""
    if fact.kind in VALUED:
        return Fact.of(fact.kind, fact.points, fact.value + 5 if fact.kind == "angle" else fact.value * Root.of(2))
    points = list(fact.points)
    points[rng.randrange(len(points))] = rng.choice(names)
    return Fact.of(fact.kind, points)


def mutants(problem, rng, n):
    """Proofs with one fact, one rule name or one citation changed, or one step dropped."""
    steps, names = written(problem.proofs[0]), sorted(problem.points)
    for _ in range(n):
        at, kind = rng.randrange(len(steps)), rng.choice(("fact", "rule", "from", "fewer", "drop"))
        step = dict(steps[at])
        if kind == "fact":
            step["fact"] = str(other(parse_fact(step["fact"]), rng, names))
        elif kind == "rule":
            step["rule"] = rng.choice(sorted(set(RULES) - {step["rule"]}))
        elif kind == "from" and step["from"]:
            step["from"] = [*step["from"]]
            step["from"][rng.randrange(len(step["from"]))] = rng.randrange(len(problem.premises) + at + 2)
        elif kind == "fewer" and step["from"]:
            step["from"] = step["from"][1:]
        changed = [*steps[:at], *([] if kind == "drop" else [step]), *steps[at + 1 :]]
        if changed != steps:
            yield changed


def is_sound(problem, steps):
    try:
        verify_proof(problem.points, problem.premises, problem.goal, steps)
    except (ValueError, ZeroDivisionError):
        return False
    return True


def test_mutants_fail(problems):
    """A thousand and more. What passes is a proof: it cites another fact, or one fewer, that does as well."""
    rng, passed, total = random.Random(0), 0, 0
    for problem in problems:
        steps = written(problem.proofs[0])
        for changed in mutants(problem, rng, 30):
            total += 1
            if is_sound(problem, changed):
                passed += 1
                assert [(s["rule"], s["fact"]) for s in changed] == [(s["rule"], s["fact"]) for s in steps]
    assert total >= 1000 and passed < 0.01 * total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "nonesuch"}, "step 1: 'nonesuch' is no rule"),
        ({"from": [99]}, "step 1: it cites what does not stand before it"),
        ({"from": [0, 0]}, "step 1: it cites what does not stand before it"),
        ({"fact": "angle A B C = 41"}, "step 1: angle A B C = 41 does not hold in the diagram"),
        ({"fact": "cong A B A C", "rule": "isosceles converse"}, "step 1: cong A B A C is no case of"),
        ({"fact": "angle A B Z = 40"}, "step 1: .* does not hold"),
        ({"fact": "prose"}, "is no fact"),
    ],
)
def test_what_is_wrong_is_named(change, message):
    points = {"A": (1.0, 1.0), "B": (0.0, 0.0), "C": (2.0, 0.0)}
    premises = [parse_fact("cong A B A C"), parse_fact("angle A B C = 45")]
    goal = Fact.of("angle", "ACB", Fraction(45))
    steps = [
        {"rule": "isosceles", "fact": "eqangle A B C A C B", "from": [0]},
        {"rule": "angle chase", "fact": "angle A C B = 45", "from": [1, 2]},
    ]
    verify_proof(points, premises, goal, steps)
    with pytest.raises(ValueError, match=message):
        verify_proof(points, premises, goal, [{**steps[0], **change}, *steps[1:]])
    with pytest.raises(ValueError, match="the proof ends in"):
        verify_proof(points, premises, goal, steps[:1])


def test_tiers():
    assert [tier_of(n, (3, 6, 12, 24)) for n in (2, 3, 5, 6, 11, 12, 23, 24, 99)] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
