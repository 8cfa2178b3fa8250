"""The data set and its rewards: by seed, checked, without overlap; and what the rewards pay."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_trust.tasks.geometry import geometry_reward, geometry_step_reward, step_reward
from trl_trust.tasks.geometry.check import verify_row
from trl_trust.tasks.geometry.data import (
    Settings,
    bootstrap,
    canonical,
    digest,
    geometry_dataset,
    longest,
    rows,
    split_of,
)
from trl_trust.tasks.geometry.facts import Fact
from trl_trust.tasks.geometry.problems import Problem


@pytest.fixture(scope="module")
def table():
    return list(rows(24, 0, Settings()))


def columns(rows):
    return {key: [row[key] for row in rows] for key in rows[0]}


def test_every_row_passes_the_checker_and_a_changed_one_does_not(table):
    for row in table:
        verify_row(row)
        with pytest.raises(ValueError, match="does not hold|is no fact"):
            verify_row({**row, "answer": f"{row['answer']}1"})
        with pytest.raises(ValueError, match="proof_length=99 of a proof"):
            verify_row({**row, "proof_length": 99})
        with pytest.raises(ValueError, match=r"is no case of|ends in|cites|no solution"):
            verify_row({**row, "premises": row["premises"][1:]})


def test_a_seed_makes_the_same_rows_for_any_number_of_workers(table):
    assert list(rows(24, 0, Settings(), workers=2)) == table
    assert digest(geometry_dataset(n=24)) == digest(table) != digest(geometry_dataset(n=24, seed=1))


def test_splits_share_no_canonical_form(table):
    other = {split: {row["canonical"] for row in rows(6, 3, Settings(), split=split)} for split in ("eval", "test")}
    forms = {row["canonical"] for row in table}
    assert len(forms) == 24 and not other["eval"] & other["test"] and not forms & (other["eval"] | other["test"])
    assert all(split_of(form) == split for split, found in other.items() for form in found)


def renamed(problem, names):
    to = dict(zip(sorted(problem.points), names, strict=True))
    change = lambda fact: Fact.of(fact.kind, (to[name] for name in fact.points), fact.value)
    points = {to[name]: place for name, place in problem.points.items()}
    return Problem(points, tuple(change(p) for p in problem.premises), change(problem.goal), problem.proofs)


def test_a_canonical_form_does_not_know_names():
    from trl_trust.tasks.geometry.problems import pose
    from trl_trust.tasks.geometry.scene import draw

    rng, found = random.Random(0), 0
    for seed in range(30):
        problem = pose(draw(seed), random.Random(seed), steps=(2, 16))
        if problem:
            names = rng.sample("PQRSTUVWXYZ", len(problem.points))
            assert canonical(renamed(problem, names)) == canonical(problem)
            fewer = Problem(problem.points, problem.premises[1:], problem.goal, problem.proofs)
            assert canonical(fewer) != canonical(problem)
            found += 1
    assert found > 10


def test_tiers_and_what_cannot_be_found():
    found = list(rows(0, 0, Settings(min_steps=1, max_steps=12), tiers=(2, 2)))
    assert sorted(row["tier"] for row in found) == [1, 1, 2, 2]
    with pytest.raises(RuntimeError, match="1 rows of 1 not found in 3 scenes: 3 fell to min_steps, max_steps"):
        list(rows(1, 0, Settings(clauses=(0, 0), min_steps=40, max_steps=40, max_attempts=3)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("clauses", (3, 1)),
        ("min_steps", 0),
        ("max_steps", 2),
        ("min_premise_ratio", 1.5),
        ("kinds", ("volume",)),
        ("kinds", ()),
        ("distractors", 6),
        ("trace", "long"),
        ("solutions", 0),
        ("tier_edges", (3, 3)),
        ("bootstrap_rounds", 11),
        ("pool", 1),
        ("style", "verse"),
        ("max_attempts", 0),
    ],
)
def test_bad_settings_raise(field, value):
    with pytest.raises(ValueError, match="min_steps=" if field == "max_steps" else f"{field}="):
        Settings(**{field: value})


def test_two_rounds_of_bootstrapping_double_the_longest_proof():
    mean = lambda scenes: sum(map(longest, scenes)) / len(scenes)
    start, grown = bootstrap("seed", 12, 0, (1, 1)), bootstrap("seed", 12, 2, (1, 1))
    assert mean(grown) >= 2 * mean(start)
    row = next(rows(1, 0, Settings(bootstrap_rounds=2, pool=4, clauses=(1, 1), max_steps=30)))
    verify_row(row)


# -- rewards ---------------------------------------------------------------------------------------------------------

# AB = AC, angle ABC = 40: four steps to a goal, by hand
POINTS = {"A": (1.0, 0.8390996311772799), "B": (0.0, 0.0), "C": (2.0, 0.0), "M": (1.0, 0.0)}
STEPS = [
    {"rule": "isosceles", "fact": "eqangle A B C A C B", "from": [0]},
    {"rule": "angle chase", "fact": "angle A C B = 40", "from": [1, 3]},
    {"rule": "angle chase", "fact": "angle B A C = 100", "from": [3, 1]},
    {"rule": "SAS", "fact": "simtri A B M A C M", "from": [0, 2, 3]},
]
ROW = {
    "goal": "angle B A C",
    "answer": "100",
    "points": json.dumps(POINTS),
    "premises": ["cong A B A C", "angle A B C = 40", "mid M B C"],
    "solutions": json.dumps([STEPS]),
}
OWN = "angle ABC = angle ACB, so angle ACB = 40 and angle BAC = 100; triangle ABM ~ triangle ACM."


def paid(text, reward=geometry_step_reward):
    return reward([text], **{key: [value] for key, value in ROW.items()})[0]


@pytest.mark.parametrize(
    ("text", "strict"),
    [
        (OWN, 1.0),
        (OWN + OWN, 1.0),  # repetition pays nothing
        ("angle ACB = 40, angle BAC = 100", 0.5),
        ("angle ABC = angle ACB, angle ACB = 40, angle BAC = 100, angle BAC = 101", -0.25),
        ("AB = AC, angle ABC = 40, M is the midpoint of BC", 0.0),  # what is given
        ("AM is perpendicular to BC, BM = CM", 0.0),  # true, and no step of the proof
        ("angle AXB = 40", -1.0),
        ("AA = 3 and angle BAC = 100", -0.5),
        ("AB = 1.3054", 0.0),  # rounded: neither true nor false
        ("no claim", 0.0),
    ],
)
def test_what_steps_are_paid(text, strict):
    assert paid(text) == strict


def test_graded_and_bounded():
    graded = step_reward("graded", w_false=0.5)
    assert paid("angle ACB = 40, angle BAC = 101", graded) == 0.25 - 0.5 * 0.5
    assert paid("angle BAC = 100", step_reward(step_bound=1)) == 0.0  # two steps at once
    assert paid("angle BAC = 100", step_reward(step_bound=2)) == 0.25
    assert paid(OWN, step_reward(step_bound=1)) == 1.0
    for bad in ({"mode": "kind"}, {"w_false": 0}, {"w_false": True}, {"step_bound": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            step_reward(**bad)


def test_the_engines_own_proof_scores_1_and_a_changed_number_at_most_0(table):
    texts = [row["trace"] for row in table]
    assert geometry_step_reward(texts, **columns(table)) == [1.0] * len(table)
    assert geometry_reward(texts, **columns(table)) == [1.0] * len(table)
    given = ["; ".join(row["prompt"][0]["content"].split(" Put the")[:1]) for row in table]
    assert not any(geometry_step_reward(given, **columns(table)))  # the question said again
    numbers = [row for row in table if row["goal"].startswith("angle")]
    changed = [f"angle {''.join(row['goal'].split()[1:])} = {row['answer']}1" for row in numbers]
    assert max(geometry_step_reward(changed, **columns(numbers))) <= 0


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"so \boxed{100}", 1.0),
        (r"\boxed{100^\circ}", 1.0),
        (r"first \boxed{90}, no: \boxed{100}", 1.0),
        (r"\boxed{100} or \boxed{90}", 0.0),
        ("100", 0.0),
        (r"\boxed{100, 90}", 0.0),
        (r"\boxed{90+10}", 0.0),
        (r"\boxed{10**2}", 0.0),
    ],
)
def test_what_an_answer_is_paid(text, reward):
    for completion in (text, [{"role": "assistant", "content": text}]):
        assert geometry_reward([completion], answer=["100"], goal=["angle B A C"]) == [reward]


def test_rows_of_another_data_set_are_none():
    assert geometry_reward(["x", "y"]) == [None, None] == geometry_step_reward(["x", "y"])
    mixed = {key: [value, None] for key, value in ROW.items()}
    assert geometry_reward([r"\boxed{100}", "5"], answer=["100", "5"], goal=["angle B A C", None]) == [1.0, None]
    assert geometry_step_reward([OWN, OWN], **mixed) == [1.0, None]


@settings(deadline=None)
@given(st.text(max_size=400))
def test_no_text_raises(text):
    assert geometry_reward([text], answer=["100"], goal=["angle B A C"])[0] in (0.0, 1.0)
    assert -1 <= paid(text) <= 1


HOSTILE = ["\\boxed{" + "{" * 10**6, "AB = " * 10**5, "\\boxed{" + "9" * 10**6 + "}", "AB = 9^{9^{9}}"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_earns_nothing(text):
    assert geometry_reward([text], answer=["100"], goal=["angle B A C"]) == [0.0] and paid(text) <= 0


def test_traces():
    walked = list(rows(8, 0, Settings(trace="backtrack")))
    assert sum("does not lead to the question" in row["trace"] for row in walked) >= 4
    several = list(rows(4, 0, Settings(trace="multi", min_steps=2)))
    assert any("Another way:" in row["trace"] for row in several)
