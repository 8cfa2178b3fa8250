"""The grammar of answers: what it accepts, what it refuses, that it never raises and never takes long."""

import logging
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.tasks.geometry.answer import LONGEST, parse_answer
from trl_trust.tasks.geometry.facts import parse_value


ACCEPTED = {
    "45": (
        r"45| 45 |45.|+45|45°|45^\circ|45^{\circ}|45 degrees|45deg|45\degree|45\text{ degrees}|\angle ABC "
        r"= 45^\circ|x = 45|x=45|44.999|45.0|90/2|\frac{90}{2}|\dfrac{90}{2}|(45)|{45}|\left(45\right)|$45"
        r"$|9*5|9\cdot5|9\times 5|--45|45.04|\approx 45|\text{45 degrees}|3^2*5|m\angle B=45|0045"
    ),
    "2*sqrt(3)": (
        r"2*sqrt(3)|\sqrt{12}|2\sqrt3|2\sqrt{3}|2√3|2√(3)|sqrt(12)|3.464|3.465|12^{1/2}|12^{\frac{1}{2}}|"
        r"\frac{6}{\sqrt{3}}|6/sqrt(3)|AB = 2\sqrt{3}|2 \cdot \sqrt{3}|\frac{4\sqrt3}{2}|√12|2\sqrt{3}\text"
        r"{ cm}|2√3 units|\sqrt{3}*2|2\left(\sqrt{3}\right)"
    ),
    "1/3": (r"1/3|\frac13|\tfrac{1}{3}|0.333|.3333|\frac{1}{3}|3^{-1}|2/6"),
    "20*sqrt(3)": (r"34.64|20√3|20\sqrt{3}|\sqrt{1200}"),
    "12/5": (r"12/5|2.4|\frac{12}{5}|\frac{24}{10}|24/10"),
    "1200": (r"1200|1,200|1200.0|1,200.5"),
    "9*sqrt(3)": (r"9\sqrt{3}|9\sqrt{3} \text{ square units}|9\sqrt3"),
}
REFUSED = {
    "45": (
        r"45.1|46|-45|45, 50|40 or 45|{45, 50}|| |45 + 0|about|4 5|45!|\boxed{45}|1e2|x|x = y = 45|45 = x|"
        r"0x2d|45%|[45]|(45|45)|{45|45/|*45|45^|45/0|angle|45e0|lim 45"
    ),
    "2*sqrt(3)": (r"3.46|3.47|\sqrt{-12}|2\sqrt|2 3|\sqrt[3]{12}|2+\sqrt{3}|2sqrt3sqrt|\sqrt12|-2√3"),
    "1/3": (r"0.33|0.34|1/3/0|3|1:3"),
    "20*sqrt(3)": (r"34.6|34.7|20"),
}
ACCEPTED, REFUSED = (
    [(value, text) for value, texts in table.items() for text in texts.split("|")] for table in (ACCEPTED, REFUSED)
)


@pytest.mark.parametrize(("value", "text"), ACCEPTED)
def test_accepted(value, text):
    number = parse_answer(text)
    assert number is not None and number.is_close(parse_value(value))


@pytest.mark.parametrize(("value", "text"), REFUSED)
def test_refused(value, text):
    number = parse_answer(text)
    assert number is None or not number.is_close(parse_value(value))


def test_there_are_enough_spellings():
    assert len(ACCEPTED) >= 40 and len(REFUSED) >= 40


HOSTILE = [
    *("9" * 10**6, "{" * 10**6, "(" * 100 + "1" + ")" * 100, "10**10**10", "10^10^10", "9^{9^{9^9}}"),
    *("((((2^2)^2)^2)^2)^2", "(((((((9^2)^2)^2)^2)^2)^2)^2)^2", r"\frac" * 20, r"\sqrt" * 20, "1/" * 40, "-" * 119),
    *("^" * 50, "999999999^2*999999999^2", "=" * 100, r"\text{" * 20, "1,2,3,4", "٣", "²", "１２", "½"),
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_no_answer(text):
    number = parse_answer(text)
    assert number is None or not number.is_close(parse_value("45"))


@given(st.text(max_size=LONGEST) | st.text("0123456789.,+-*/^(){}=\\ sqrtfac√°", max_size=LONGEST))
def test_nothing_raises(text):
    number = parse_answer(text)
    if number is not None:
        assert number.sign in (-1, 0, 1) and number.is_close(parse_value("45")) in (True, False)


def test_math_verify_agrees(caplog):
    """Where both read a number: spellings of products, quotients and roots."""
    from math_verify import parse, verify

    caplog.set_level(logging.CRITICAL)
    rng, compared = random.Random(0), 0
    for _ in range(150):
        a, b, c = rng.randint(1, 20), rng.randint(2, 12), rng.randint(1, 9)
        root, over = f"{a}\\sqrt{{{b}}}", f"\\frac{{{a}}}{{{b}}}"
        more = f"\\frac{{{root}}}{{{c}}}", f"\\frac{{{a}}}{{\\sqrt{{{b}}}}}", f"\\sqrt{{{a}}}", f"{a}\\cdot{b}"
        text = rng.choice([f"{a}", f"{a}/{b}", f"{a}^2", f"-{a}", root, over, *more])
        other = rng.choice([text, f"{a * a}", f"\\sqrt{{{a * a * b}}}", f"\\frac{{{2 * a}}}{{{2 * b}}}", f"{a * b}"])
        mine, its = parse_answer(text), parse_answer(other)
        same = (mine.sign, mine.size) == (its.sign, its.size)
        box = lambda said: parse(f"\\boxed{{{said}}}", parsing_timeout=None)
        assert verify(box(text), box(other), timeout_seconds=None) == same, (text, other)
        compared += same
    assert compared > 30
