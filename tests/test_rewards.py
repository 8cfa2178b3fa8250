"""The mathematical reward, and reward functions by name."""

import threading
import time

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


# -- hostile text ----------------------------------------------------------------------------------------------------

MEGABYTE = 10**6
HOSTILE = {
    "tower": r"\boxed{10^{10^{10}}}",
    "tower without braces": "10^10^10",
    "tower of powers": r"\boxed{((2^{9999})^{9999})^{9999}}",
    "python's power": "The answer is 9**9**9",
    "great exponent": r"\boxed{2^{99999999999}}",
    "factorial in an exponent": r"\boxed{2^{999!}}",
    "factorials": r"\boxed{(9!)!}",
    "factorial of a factorial in braces": r"\boxed{{9!} !}",
    "factorial of a sum": r"\boxed{(9!+99)!}",
    "great factorial": r"\boxed{9999999!}",
    "binomial": r"\boxed{\binom{1000000}{500000}}",
    "product": r"\boxed{\prod_{n=1}^{9999} n^n}",
    "expansion": r"\boxed{(a+b+c+d)^{99}}",
    "integral": r"\boxed{\int_0^1 \frac{x^{99}\sin x}{(1+x)^{50}} dx}",
    "braces": r"\boxed{" + "{" * MEGABYTE,
    "closed braces": r"\boxed{" + "{" * (MEGABYTE // 2) + "}" * (MEGABYTE // 2) + "}",
    "few braces": r"\boxed{" + "{" * 400 + "1" + "}" * 401,
    "parentheses": "(" * 400 + "1" + ")" * 400,
    "commands": r"Answer: " + r"\text{" * (MEGABYTE // 6),
    "fractions": r"\boxed{" + r"\frac{1}{2}+" * (MEGABYTE // 12) + "1}",
    "digits": "9" * MEGABYTE,
    "list": "Answer: " + "1," * (MEGABYTE // 2),
    "spaces": "answer" + " " * MEGABYTE,
    "answers": "answer is " * (MEGABYTE // 10),
    "dollars": "final answer is $" * (MEGABYTE // 17),
    "brackets": "answer: " + r"\[" * (MEGABYTE // 2),
    "letters": "a" * MEGABYTE,
}


@pytest.mark.parametrize("where", ["main thread", "another thread"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_no_text_takes_long(text, where):
    took, got = [], []

    def run():
        for completion, reference in ((text, "1"), (r"\boxed{1}", text)):
            began = time.thread_time()  # another process of the machine costs none of it
            got.extend(math_accuracy_reward([completion], solution=[reference]))
            took.append(time.thread_time() - began)

    math_accuracy_reward(["1"], solution=["1"])  # imports
    if where == "main thread":
        run()
    else:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(got) == 2 and not any(got)
    assert max(took) < 1  # two limits of .15 s, and on a slow machine the operation in which one rings


def test_a_limit_ends_work_and_only_that_work():
    def forever():
        while True:
            pass

    began = time.thread_time()
    assert rewards._within(0.05, forever, "ended") == "ended"
    assert time.thread_time() - began < 0.3
    rung = []

    def swallows():
        while True:
            try:
                forever()
            except BaseException as error:
                if len(rung) == 2:
                    raise
                rung.append(type(error))

    assert rewards._within(0.05, swallows, "ended") == "ended" and len(rung) == 2  # as in a destructor, which keeps it
    for _ in range(200):  # a limit that rings as the work ends does not ring afterwards
        assert rewards._within(1e-4, lambda: sum(range(3000)), "ended") in ("ended", 4498500)
        sum(range(1000))


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        (r"\boxed{x^{20}y^{30}+x^{19}y^{40}}", r"x^{19}y^{40}+x^{20}y^{30}"),
        (r"\boxed{e^{-x^2}}", r"e^{-x^{2}}"),
        (r"\boxed{((1+2)^2+3)^2}", "144"),
        (r"\boxed{10^{50}}", "1" + "0" * 50),
        (r"\boxed{7!}", "5040"),
        (r"\boxed{\frac{10!}{(10-3)!}}", "720"),
        ("Let us see. " * 10_000 + "Hence the answer is 12.", "12"),
        (r"\boxed{5} " + "and so on. " * 10_000, "5"),
        (r"\boxed{[0, 1)}", "[0,1)"),
        ("We did it (at last!)!! The answer is 5 (yay)!", "5"),
    ],
)
def test_what_is_long_or_large_but_harmless_is_compared(answer, reference):
    assert math_accuracy_reward([answer], solution=[reference]) == [1.0]


@pytest.mark.parametrize("completion", [None, [], [{"role": "assistant", "content": None}]])
def test_no_text_is_no_answer(completion):
    assert math_accuracy_reward([completion], solution=["1"]) == [0.0]
