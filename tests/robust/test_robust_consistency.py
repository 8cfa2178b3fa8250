"""Sibling consistency: worked numbers, bounds, the order of rows, and the state through JSON."""

import json
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.robust.consistency import SiblingAnswers, final_answer, flip_rate


ROWS = st.lists(
    st.tuples(st.sampled_from("pq"), st.sampled_from("012"), st.sampled_from(["7", "8", "9", None])), max_size=20
)


def history(rate=0.1, **variants):
    """Answers of pair "p": `a="7778"` visits variant a once, with these four answers."""
    answers = SiblingAnswers(rate)
    answers.update([("p", variant, x) for variant, row in variants.items() for x in row])
    return answers


def test_worked_reward():
    answers = history(a="7778888778"[:10], b="7" * 7 + "8" * 3, c="7" * 5 + "8" * 5)
    assert answers.reward(("p", "a", "7")) == pytest.approx(0.6)  # of b and c, .7 and .5; its own share stays out
    assert answers.reward(("p", "a", "9")) == 0
    assert answers.reward(("p", "a", None)) == 0


def test_worked_update():
    answers = history(rate=0.2, a="7" * 7 + "8" * 3)
    assert answers.share("p", "a", "7") == 0.7
    answers.update([("p", "a", "7")] * 4)
    assert answers.share("p", "a", "7") == pytest.approx(0.76)
    assert answers.share("p", "a", "8") == pytest.approx(0.24)


def test_no_history_is_no_reward():
    answers = history(a="77")
    assert answers.rewards([("p", "a", "7"), ("q", "a", "7"), ("p", "a", None)]) == [None, None, None]
    assert answers.reward(("p", "b", "7")) == 1.0
    assert answers.share("p", "b", "7") is None


def test_what_cannot_be_read_agrees_with_nothing():
    answers = history(a=["7", None])
    assert answers.reward(("p", "b", "7")) == 0.5
    assert answers.reward(("p", "b", None)) == 0


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, float("nan")])
def test_a_rate_outside_its_range_is_a_line(rate):
    with pytest.raises(ValueError, match=r"rate must be in \(0, 1\], got"):
        SiblingAnswers(rate)


@given(st.lists(ROWS, max_size=4), ROWS, st.randoms(use_true_random=False))
def test_rewards_are_shares_and_rows_have_no_order(batches, rows, random):
    one, other = SiblingAnswers(), SiblingAnswers()
    for batch in batches:
        one.update(batch)
        other.update(random.sample(batch, len(batch)))
    assert json.dumps(one.state_dict(), sort_keys=True) == json.dumps(other.state_dict(), sort_keys=True)
    rewards = one.rewards(rows)
    assert all(reward is None or 0 <= reward <= 1 + 1e-12 for reward in rewards)
    assert rewards == [one.reward(row) for row in rows]


@given(st.lists(ROWS, max_size=3), ROWS)
def test_a_state_that_went_through_json_goes_on_the_same(batches, rows):
    answers = SiblingAnswers()
    for batch in batches:
        answers.update(batch)
    resumed = SiblingAnswers()
    resumed.load_state_dict(json.loads(json.dumps(answers.state_dict())))
    for state in (answers, resumed):
        state.update(rows)
    assert answers.rewards(rows) == resumed.rewards(rows)
    assert answers.state_dict() == resumed.state_dict()


def test_three_of_twenty_pairs_differ():
    rows = [(str(i), v, "8" if v == "1" and i < 3 else "7") for i in range(20) for v in "01"]
    assert flip_rate(rows) == pytest.approx(0.15)
    assert flip_rate([("p", "0", "7"), ("p", "0", "8")]) is None
    assert flip_rate([("p", "0", None), ("p", "1", None)]) == 1


@given(ROWS)
def test_the_flip_rate_is_the_count_over_couples(rows):
    rates = []
    for name in "pq":
        couples = [(a, b) for a, b in combinations([r for r in rows if r[0] == name], 2) if a[1] != b[1]]
        if couples:
            rates.append(sum(a[2] is None or a[2] != b[2] for a, b in couples) / len(couples))
    assert flip_rate(rows) == (pytest.approx(sum(rates) / len(rates)) if rates else None)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{12} then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("first\n 42 \n\n", "42"),
        (" \n", None),
        ("", None),
    ],
)
def test_final_answer(text, answer):
    assert final_answer(text) == answer
