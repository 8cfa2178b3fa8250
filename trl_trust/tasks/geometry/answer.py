r"""Answers as models write them: a bounded exact grammar of rationals times square roots.

`45`, `45^\circ`, `\frac{12}{5}`, `2\sqrt{3}`, `3.464`, `x = 7`: anything that is one number. Characters, digits,
brackets and exponents are bounded before there is any arithmetic, so that no text takes long.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from .facts import Root


LONGEST = 120  # characters of an answer
DEEPEST = 12  # brackets within brackets
DIGITS = 9  # of a number, before and after its point together
EXPONENTS = {Root.of(power): power for power in (1, 2, Fraction(1, 2))}  # and their negatives
LARGEST = 32  # power of a prime
CLOSE = 1e-3  # what a decimal may be off by, relative, and absolute below 1


@dataclass(frozen=True)
class Number:
    """A number that was read.

    Attributes:
        sign: -1, 0 or 1.
        size: its absolute value, 1 where it is 0.
        decimal: whether it was written with a decimal point.
    """

    sign: int
    size: Root
    decimal: bool = False

    def __float__(self) -> float:
        return self.sign * float(self.size)

    def is_close(self, value: Root) -> bool:
        """Whether it is this value: exactly, or as a decimal within [`CLOSE`]."""
        if self.sign == 1 and self.size == value:
            return True
        return self.decimal and abs(float(self) - float(value)) <= CLOSE * max(1.0, float(value))


_SPELLINGS = [
    (re.compile(r"\\(?:left|right|displaystyle|,|;|!|:| )|\\?\$|~|\u202f|\u00a0"), " "),
    (re.compile(r"\\(?:text|mathrm|textrm|mbox)\s*\{\s*([^{}]*?)\s*\}"), r" \1 "),
    (
        re.compile(
            r"\^\s*(?:\\circ|\{\s*\\circ\s*\}|\u2218)|\u00b0|\u00ba|\\degree(?![a-z])|(?<![A-Za-z])deg(?:ree)?s?\b"
        ),
        " ",
    ),
    (re.compile(r"(?<![A-Za-z])(?:(?:square\s+)?units?\b|cm\b)"), " "),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\u221a"), r"\\root"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])|[\u00b7\u00d7\u2217\u22c5]"), "*"),
    (re.compile(r"\\div(?![A-Za-z])|\u00f7"), "/"),
    (re.compile(r"[\u2212\u2013]"), "-"),
    (re.compile(r"\\(?:approx|simeq)(?![A-Za-z])|\u2248"), "="),
]
_TOKEN = re.compile(r"\s*(\d+(?:,\d{3})*(?:\.\d+)?|\.\d+|\\frac|\\sqrt|\\root|sqrt|[-+*/^(){}\[\]])")


class _Unreadable(Exception):
    pass


def parse_answer(text: str) -> Number | None:
    """The one number that `text` is, or `None`: nothing, two numbers, a sum, something too long, prose.

    Of `x = 7` it is what stands on the right.
    """
    if len(text) > LONGEST:
        return None
    for pattern, instead in _SPELLINGS:
        text = pattern.sub(instead, text)
    left, equals, right = text.partition("=")
    if equals:
        if not re.fullmatch(r"[\\A-Za-z\s/{}_\u2220\u25b3]*", left):
            return None
        text = right
    text = text.strip().rstrip(".").strip()
    tokens, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            return None
        tokens.append(match[1])
        at = match.end()
    try:
        number, rest = _product(tokens, 0)
    except (_Unreadable, RecursionError):
        return None
    return None if rest else number


def _product(tokens: list[str], depth: int) -> tuple[Number, list[str]]:
    """`-a b * c / d`, where a factor may follow without a sign only if it is a root or in parentheses."""
    if depth > DEEPEST:
        raise _Unreadable
    sign = 1
    while tokens and tokens[0] in "+-":
        sign, tokens = (-sign if tokens[0] == "-" else sign), tokens[1:]
    result, tokens = _power(tokens, depth)
    while tokens:
        operator = tokens[0]
        if operator in "*/":
            tokens = tokens[1:]
        elif operator not in ("\\sqrt", "\\root", "sqrt", "("):
            break
        factor, tokens = _power(tokens, depth)
        result = _times(result, factor, -1 if operator == "/" else 1)
    return Number(sign * result.sign, result.size, result.decimal), tokens


def _times(one: Number, two: Number, power: int = 1) -> Number:
    if power < 0 and not two.sign:
        raise _Unreadable
    sign = one.sign * two.sign
    return Number(sign, one.size * two.size**power if sign else Root(()), one.decimal or two.decimal)


def _power(tokens: list[str], depth: int) -> tuple[Number, list[str]]:
    base, tokens = _factor(tokens, depth)
    if not tokens or tokens[0] != "^":
        return base, tokens
    exponent, tokens = _factor(tokens[1:], depth + 1)
    power = EXPONENTS.get(exponent.size)
    if power is None or not exponent.sign or not base.sign or (base.sign < 0 and power != 2):
        raise _Unreadable
    size = base.size ** (power * exponent.sign)
    if any(abs(of_prime) > LARGEST for _, of_prime in size.powers):
        raise _Unreadable
    return Number(1, size, base.decimal), tokens


def _factor(tokens: list[str], depth: int) -> tuple[Number, list[str]]:
    if not tokens:
        raise _Unreadable
    first, tokens = tokens[0], tokens[1:]
    if first in "({":
        inside, tokens = _product(tokens, depth + 1)
        if not tokens or tokens[0] != {"(": ")", "{": "}"}[first]:
            raise _Unreadable
        return inside, tokens[1:]
    if first == "\\frac":
        top, tokens = _argument(tokens, depth)
        bottom, tokens = _argument(tokens, depth)
        return _times(top, bottom, -1), tokens
    if first in ("\\sqrt", "\\root", "sqrt"):
        if first == "\\sqrt":
            under, tokens = _argument(tokens, depth)
        else:
            under, tokens = _factor(tokens, depth + 1)
        if under.sign < 0:
            raise _Unreadable
        return Number(under.sign, under.size ** Fraction(1, 2), under.decimal), tokens
    return _number(first), tokens


def _argument(tokens: list[str], depth: int) -> tuple[Number, list[str]]:
    """Of a LaTeX command: a group, or one digit."""
    if tokens and tokens[0] in "({":
        return _factor(tokens, depth)
    if not tokens or not tokens[0].isdigit():
        raise _Unreadable
    digit, rest = tokens[0][0], tokens[0][1:]
    return _number(digit), [rest, *tokens[1:]] if rest else tokens[1:]


def _number(token: str) -> Number:
    token = token.replace(",", "")
    if (
        not re.fullmatch(r"\d*\.?\d+", token)
        or len(token.replace(".", "").lstrip("0")) > DIGITS
        or len(token) > 2 * DIGITS
    ):
        raise _Unreadable
    value = Fraction(token)
    return Number(int(value > 0), Root.of(value) if value else Root(()), "." in token)
