"""The mathematical reward, and reward functions by name."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_trust import rewards
from trl_trust.rewards import load_reward_func, math_accuracy_reward


# reference, equal answers, unequal answers
EQUAL = [
    ("133", ["133", "$133$", r"\boxed{133}", r"so \boxed{133}.", "Answer: 133", "**Answer:** 133"], ["13", "1330"]),
    ("133", ["The answer is **133**.", "Final answer: $133.0$", "the answer is\n133", r"\boxed{x = 133}"], ["-133"]),
    ("-5", [r"\boxed{-5}", "The answer is -5."], [r"\boxed{5}"]),
    ("1,234", [r"\boxed{1234}", "1234"], [r"\boxed{1}", r"\boxed{234}"]),
    ("0.5", [r"\boxed{\frac12}", "1/2", "Answer: .5", r"\boxed{50\%}"], [r"\boxed{5}"]),
    (r"\frac{1}{3}", [r"\boxed{\frac{2}{6}}", "1/3"], [r"\boxed{0.3}"]),
    # LaTeX without delimiters, of which math-verify by itself would read the first number only
    (r"2\sqrt{3}", [r"\boxed{\sqrt{12}}", r"Answer: 2\sqrt{3}"], [r"\boxed{2}"]),
    ("2", ["2"], [r"Answer: 2\sqrt{3}"]),
    ("10^{5}", [r"\boxed{100000}"], [r"\boxed{10}"]),
    (r"x \geq 2", [r"\boxed{x \ge 2}"], [r"\boxed{2}"]),
    ("x^2+1", [r"\boxed{1+x^2}", "Answer: x^2+1"], [r"\boxed{x^2}"]),
    ("(1,2)", [r"\boxed{(1, 2)}"], [r"\boxed{(2, 1)}"]),
    (r"3\text{ cm}", [r"\boxed{3}", r"\boxed{3\text{ cm}}"], [r"\boxed{4}"]),
    # references inside text
    ("The answer is $12$.", [r"\boxed{12}"], [r"\boxed{1}"]),
    ("Adding gives 3+4=7.\n#### 7", [r"\boxed{7}"], [r"\boxed{3}"]),
    (r"First \boxed{1}, hence \boxed{7}", [r"\boxed{7}"], [r"\boxed{1}"]),
    (133, ["133"], ["134"]),
]


@pytest.mark.parametrize(("reference", "equal", "unequal"), EQUAL)
def test_equal_and_unequal(reference, equal, unequal):
    texts = [*equal, *unequal]
    expected = [1.0] * len(equal) + [0.0] * len(unequal)
    assert math_accuracy_reward(texts, solution=[reference] * len(texts)) == expected
    messages = [[{"role": "assistant", "content": text}] for text in texts]
    assert math_accuracy_reward(messages, answer=[reference] * len(texts)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "so far we have 133 apples and",  # cut off
        r"the sum is \boxed{133",
        r"\boxed{133} no, \boxed{134}",  # the last box counts
        r"\boxed{133 \text{ or } 134}",
        "",
    ],
)
def test_a_number_somewhere_does_not_count(text):
    assert math_accuracy_reward([text], solution=["133"]) == [0.0]


@pytest.mark.parametrize("reference", ["", "banana bread", None])
def test_no_usable_reference_is_none(reference):
    assert math_accuracy_reward([r"\boxed{1}", "2"], solution=[reference, "2"]) == [None, 1.0]


def test_answer_before_solution_row_by_row():
    solution = ["Long. So it is $1$.", "Hence $2$.", None]
    assert math_accuracy_reward(["5", "2", "3"], solution=solution, answer=["5", None, 3]) == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="`solution` or `answer`"):
        math_accuracy_reward(["1"])
    with pytest.raises(ValueError):
        math_accuracy_reward(["1", "2"], solution=["1"])


@given(st.integers(-(10**6), 10**6), st.integers(-(10**6), 10**6))
def test_integers(reference, answer):
    assert math_accuracy_reward([f"It is \\boxed{{{answer}}}."], solution=[reference]) == [float(reference == answer)]


def test_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.extend(math_accuracy_reward(["7", "8"], solution=["7", "7"])))
    thread.start()
    thread.join()
    assert results == [1.0, 0.0]


def test_group_parses_its_reference_once(monkeypatch):
    rewards._parse_gold.cache_clear()
    math_accuracy_reward(["1"] * 8, solution=["97"] * 8)
    assert rewards._parse_gold.cache_info().misses == 1


def test_logs_what_it_compared():
    logged = {}
    math_accuracy_reward(["7"], solution=["8"], log_extra=logged.__setitem__)
    assert logged == {"gold": ["[8, '8']"], "answer": ["[7, '7']"]}


def test_by_name():
    import trl.rewards

    assert load_reward_func("math_accuracy_reward", 64) is math_accuracy_reward
    assert load_reward_func("think_format_reward", 64) is trl.rewards.think_format_reward
    assert load_reward_func("trl.rewards.accuracy_reward", 64) is trl.rewards.accuracy_reward
    # full penalty at the length of the run, starting at four fifths of it
    punish = load_reward_func("get_soft_overlong_punishment", 20480)
    assert punish(completion_ids=[[0] * n for n in (16384, 18432, 20480, 20481)]) == [0.0, -0.5, -1.0, -1.0]


def test_by_path_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_brevity.py").write_text("def brevity(completions, **kwargs): return [-len(completions[0])]")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["elsewhere"])
    assert load_reward_func("my_brevity.brevity", 64)(["ab"]) == [-2]
