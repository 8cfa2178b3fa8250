"""Preference levels: from rewards, of answers to mathematical problems, of Knights-and-Knaves puzzles."""

import math
import sys
import time
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.levels import (
    knights_and_knaves_levels,
    knights_and_knaves_reward,
    load_level_rule,
    math_levels,
    reward_levels,
)


# -- from rewards -----------------------------------------------------------------------------------------------------


def levels(rewards, level_one_reward=1.0, thresholds=None):
    return reward_levels(torch.tensor(rewards), level_one_reward, thresholds).tolist()


def test_distinct_rewards_are_distinct_levels():
    assert levels([1.0, 0.0, 0.5, 2.0, 0.5, -1.0]) == [1, 3, 2, 1, 2, 4]
    assert levels([1.0, 0.0]) == [1, 2]
    assert levels([1.0, 1.0]) == [1, 1]


def test_the_best_wrong_answer_is_not_on_level_one():
    assert levels([0.9, 0.2]) == [2, 3]
    assert levels([0.9, 0.2], level_one_reward=0.9) == [1, 2]


def test_thresholds_part_what_is_below_level_one():
    assert levels([1.0, 0.9, 0.5, 0.49, 0.2, -3.0], thresholds=[0.5, 0.2]) == [1, 2, 2, 3, 3, 4]


def test_unscored_responses_have_no_level():
    assert levels([1.0, math.nan, 0.0]) == [1, 0, 2]
    assert levels([math.nan], thresholds=[0.5]) == [0]


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=12), st.floats(-1, 1.5))
def test_levels_order_as_rewards_do(rewards, level_one_reward):
    got = levels(rewards, level_one_reward)
    for reward, level in zip(rewards, got, strict=True):
        assert (level == 1) == (torch.tensor(reward) >= level_one_reward)
        for other, other_level in zip(rewards, got, strict=True):
            if level > 1 and other_level > 1:
                assert (reward > other) == (level < other_level)
    assert set(got) - {1} == set(range(2, 2 + len(set(got) - {1})))  # no level is left out


# -- mathematics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "level"),
    [
        ("<think>6 * 7</think>It is \\boxed{42}.", 1),
        ("6 * 7</think>It is \\boxed{42}.", 1),  # the chat template opened the tag
        ("<think>a</think>\\boxed{41}, no, \\boxed{\\frac{84}{2}}", 1),
        ("<think>a</think>\\boxed{42}, no, \\boxed{41}", 2),
        ("<think>\\boxed{42}</think>It is \\boxed{43}.", 2),
        ("<think>a</think>\\boxed{}", 3),
        ("<think>a</think>\\boxed{ }", 3),
        ("<think>\\boxed{42}</think>It is 42.", 4),  # nothing in a box after the thinking
        ("<think>a</think>It is \\boxed{42", 4),  # cut off
        ("It is \\boxed{42}.", 4),  # no thinking
        ("", 4),
    ],
)
def test_math_levels(completion, level):
    assert math_levels([completion], solution=["42"]) == [level]
    assert math_levels([[{"role": "assistant", "content": completion}]], answer=["42"]) == [level]


def test_without_a_reference_an_answer_is_on_level_three():
    completions = ["<think></think>\\boxed{42}", "\\boxed{42}"]
    assert math_levels(completions, answer=[None, None], solution=[None, None]) == [3, 4]


# -- puzzles ----------------------------------------------------------------------------------------------------------

SOLUTION = "(1) Zoey is a knave\n(2) Oliver is a knight"
RIGHT = "(1) Zoey is a knave (2) Oliver is a knight"


def puzzle(completion, prompt="Who is who?"):
    return knights_and_knaves_levels([prompt], [completion], solution_text_format=[SOLUTION])[0]


@pytest.mark.parametrize(
    ("answer", "level"),
    [
        (RIGHT, 1),
        ("oliver is a Knight,\nZOEY is  a KNAVE", 1),
        ("Zoey is a knight (2) Oliver is a knight", 2),
        ("Zoey is a knave", 3),  # one person is missing
        ("Zoey is a knave, Oliver is a knight, Emma is a knight", 3),  # one too many
        ("Zoey: knave, Oliver: knight", 3),  # unreadable
        ("Zoey is a knave, Olivera is a knight", 3),
        ("", 4),
        ("  \n", 4),
    ],
)
def test_puzzle_answers(answer, level):
    assert puzzle(f"<think>a knight, perhaps</think>\n<answer>{answer}</answer>") == level


@pytest.mark.parametrize(
    "completion",
    [
        f"<answer>{RIGHT}</answer>",
        f"</think><answer>{RIGHT}</answer>",
        f"<think></think><answer>{RIGHT}",
        f"<think></think>{RIGHT}",
        f"<answer>{RIGHT}</answer><think></think>",
        f"<think><answer>{RIGHT}</answer></think>",
        f"<think></think><answer>{RIGHT}</answer><answer>{RIGHT}</answer>",
        f"<think><think></think><answer>{RIGHT}</answer>",
        "",
    ],
)
def test_invalid_formats(completion):
    assert puzzle(completion) == 4


def test_the_prompt_may_open_the_thinking():
    completion = f"let me see</think><answer>{RIGHT}</answer>"
    assert puzzle(completion, "Who is who?\n<think>\n") == 1
    assert puzzle(completion, [{"role": "assistant", "content": "<think>"}]) == 1
    assert puzzle(f"<think>{completion}", "Who is who?\n<think>") == 4


def test_names_are_whole_words():
    solution = "(1) Ann is a knight\n(2) Joann is a knave"
    completion = "<think></think><answer>Joann is a knave, Ann is a knight</answer>"
    assert knights_and_knaves_levels([""], [completion], [solution]) == [1]


def test_puzzle_reward():
    completions = [f"<think></think><answer>{answer}</answer>" for answer in (RIGHT, "Zoey is a knave")]
    assert knights_and_knaves_reward(["", ""], completions, [SOLUTION] * 2) == [1.0, 0.0]


# -- rules by name ----------------------------------------------------------------------------------------------------


def test_rules_by_name(tmp_path, monkeypatch):
    assert load_level_rule("math") is math_levels
    assert load_level_rule("knights_and_knaves") is knights_and_knaves_levels
    (tmp_path / "my_levels.py").write_text(
        "def brevity(completions, **kwargs):\n    return [1 for _ in completions]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_level_rule("my_levels.brevity")(completions=["a", "b"]) == [1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module.rule", "level_rule='no_such_module.rule' cannot be imported"),
        ("math.no_such_rule", "level_rule='math.no_such_rule' cannot be imported"),
        (".rule", "level_rule='.rule' cannot be imported"),
        ("math.pi", "level_rule='math.pi' is a float"),
    ],
)
def test_unknown_rules_raise(name, message):
    with pytest.raises(ValueError, match=message):
        load_level_rule(name)


# -- hostile text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a" * 10**6, "a " * 500_000, "Zoey is a knight, " * 50_000, "Zoey" + " " * 10**6])
def test_puzzles_of_a_megabyte_take_no_time(text):
    began = time.thread_time()
    for answer, solution in ((text, SOLUTION), (RIGHT, text), (text, text)):
        knights_and_knaves_levels([""], [f"<think></think><answer>{answer}</answer>"], [solution])
    assert time.thread_time() - began < 0.5 * 3


def test_many_names_take_no_time():
    names = ["".join(letters) for letters in product("abcdefghijklmnop", repeat=4)][:50_000]
    text = ", ".join(f"{name} is a knight" for name in names)
    began = time.thread_time()
    assert knights_and_knaves_levels([""], [f"<think></think><answer>{text}</answer>"], [text]) == [1]
    assert time.thread_time() - began < 0.5


def test_nothing_has_no_level():
    assert knights_and_knaves_levels([None], [None], [None]) == [None]
    assert knights_and_knaves_levels([None], [[{"role": "assistant", "content": None}]], [SOLUTION]) == [4]
    assert knights_and_knaves_reward([None], [None], [None]) == [0.0]
    assert math_levels([None], answer=["1"]) == [4]
