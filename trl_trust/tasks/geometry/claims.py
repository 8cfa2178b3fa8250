r"""What a text claims about a figure: equalities, parallels, perpendiculars and the rest, in LaTeX, Unicode or words.

`\angle ABC = 40^\circ`, `AB = CD`, `AB \parallel CD`, `the triangles ABC and DEF are similar`, and every wording of
[`trl_trust.tasks.geometry.text`]. A chain, `angle ABC = angle DEF = 40`, makes a claim of each sign.
"""

import re
from fractions import Fraction
from itertools import pairwise

from .answer import Number, parse_answer
from .facts import Fact


LONGEST = 20_000  # characters that are read, of the end of a text
_P = r"(?<![A-Za-z])[A-Z]"
_TWO, _THREE = r"(?<![A-Za-z])[A-Z]{2}(?![A-Za-z])", r"(?<![A-Za-z])[A-Z]{3}(?![A-Za-z])"
_NUMBER = r"(?:\d|\\frac|\\sqrt|sqrt|√)[\d.,*/(){}\\a-z√]{0,40}"

_SPELLINGS = [
    (r"\\(?:left|right|,|;|!|:)|\\?\$|\\[\[\]()]", " "),
    (r"\\(?:text|mathrm|overline|operatorname|mbox|textrm)\s*\{([^{}]*)\}", r" \1 "),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°|\bdegrees?\b|\\degree(?![a-z])", " "),
    (r"\\(?:measured)?angle(?![a-z])|∠|\bm(?=\s*∠)|\b[Aa]ngles?\b(?=\s+[A-Z]{3}\b)", " angle "),
    (r"\\triangle(?![a-z])|△|\b[Tt]riangles?\b(?=\s+[A-Z]{3}\b)", " triangle "),
    (r"\\parallel(?![a-z])|∥|\bis parallel to\b", " || "),
    (r"\\perp(?![a-z])|[⟂⊥]|\bis perpendicular to\b", " _|_ "),
    (r"\\sim(?![a-z])|∼|\bis similar to\b", " ~ "),
    (r"\\(?:cdot|times)(?![a-z])|[·×]", "*"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\b(?:is equal to|equals|is as long as)\b", "="),
    (r"\bthe length of (?=[A-Z]{2}\b)|\bthe segments? (?=[A-Z]{2}\b)", ""),
    (r"([A-Z]{2}) is (" + _NUMBER + r") long\b", r"\1 = \2"),
    (r"([A-Z]{2}) is (" + _NUMBER + r") times ([A-Z]{2})\b", r"\1/\3 = \2"),
    (r"([A-Z]{2}) is to ([A-Z]{2}) as ([A-Z]{2}) to ([A-Z]{2})\b", r"\1/\2 = \3/\4"),
    (r"([A-Z]{2,3}) (?:is|has the area) (?=" + _NUMBER + ")", r"\1 = "),
    (r"\barea of\s+(?:triangle )?", "area "),
    (r"\btriangle\s+([A-Z]{3})\s+=", r"area \1 ="),
    (r"(?<=[A-Z]{2}) ?: ?(?=[A-Z]{2}\b)", "/"),
    (r"\\frac\s*\{\s*([A-Z]{2})\s*\}\s*\{\s*([A-Z]{2})\s*\}", r"\1/\2"),
]
_SPELLINGS = [(re.compile(pattern), instead) for pattern, instead in _SPELLINGS]

_ANGLE = rf"(?:angle\s+)?{_THREE}"
_TERM = rf"area\s+(?:triangle\s+)?[A-Z]{{3}}|{_ANGLE}(?:\s*\+\s*{_ANGLE})?|{_TWO}(?:\s*/\s*{_TWO})?|{_NUMBER}"
_CHAIN = re.compile(rf"(?:{_TERM})(?:\s*=\s*(?:{_TERM}))+")
_PAIR = rf"({_TWO})"
_LIST = rf"({_P})\b,?\s*(?:and\s+)?({_P})\b,?\s*(?:and\s+)?({_P})\b"
_STATED = [
    ("para", re.compile(rf"{_PAIR}\s*\|\|\s*{_PAIR}")),
    ("para", re.compile(rf"{_PAIR} and {_PAIR} are parallel")),
    ("perp", re.compile(rf"{_PAIR}\s*_\|_\s*{_PAIR}")),
    ("perp", re.compile(rf"{_PAIR} and {_PAIR} are perpendicular")),
    ("cong", re.compile(rf"{_PAIR} and {_PAIR} are (?:equally long|equal)")),
    ("eqangle", re.compile(rf"({_THREE}) and (?:angle )?\s*({_THREE}) are equal")),
    ("supangle", re.compile(rf"({_THREE}) and (?:angle )?\s*({_THREE}) add up to 180")),
    ("simtri", re.compile(rf"({_THREE})\s*~\s*(?:triangle\s+)?({_THREE})")),
    ("simtri", re.compile(rf"({_THREE}) and (?:triangle )?\s*({_THREE}) are similar")),
    ("mid", re.compile(rf"({_P}) (?:is (?:the )?midpoint of|bisects|mid) {_PAIR}")),
    ("mid", re.compile(rf"({_P}) lies halfway between ({_P}) and ({_P})")),
    ("cyclic", re.compile(rf"{_LIST},?\s*(?:and\s+)?({_P})\b (?:lie on (?:a|one) circle|are concyclic)")),
    ("cyclic", re.compile(rf"circle passes through {_LIST},?\s*(?:and\s+)?({_P})\b")),
    ("cyclic", re.compile(r"\bcyc ([A-Z]{4})\b")),
    ("coll", re.compile(rf"{_LIST} (?:lie on (?:a|one) line|are collinear)")),
    ("coll", re.compile(rf"the line {_PAIR} passes through ({_P})\b")),
    ("coll", re.compile(r"\bcol ([A-Z]{3})\b")),
]


def claims(text: str) -> list[Fact | None]:
    """The claims of a text in their order, each once; `None` for one that names impossible points, such as `AA = 3`,
    or a value that is no positive number."""
    text = text[-LONGEST:]
    for pattern, instead in _SPELLINGS:
        text = pattern.sub(instead, text)
    text = re.sub(r"[ \t]+", " ", text)
    found: list[tuple[int, Fact | None]] = []
    for kind, pattern in _STATED:
        for match in pattern.finditer(text):
            found.append((match.start(), _fact(kind, "".join(match.groups()))))
    for match in _CHAIN.finditer(text):
        terms = [term.strip().rstrip(".,") for term in match[0].split("=")]
        for one, two in pairwise(terms):
            said = _equal(one, two)
            if said is not _NOTHING:
                found.append((match.start(), said))
    return list(dict.fromkeys(fact for _, fact in sorted(found, key=lambda pair: pair[0])))


_NOTHING = object()


def _equal(one: str, two: str):
    """The fact that two terms are equal; `_NOTHING` where that is none about the figure."""
    kinds, points = [], []
    for term in (one, two):
        kind = "area" if term.startswith("area") else "sum" if "+" in term else None
        letters = "".join(re.findall(r"[A-Z]", term))
        kind = kind or {2: "length", 3: "angle", 4: "ratio", 0: "number"}[len(letters)]
        kinds.append(kind)
        points.append(letters)
    if kinds[0] == "number":
        kinds, points, one, two = kinds[::-1], points[::-1], two, one
    if kinds[0] == "number":
        return _NOTHING
    if kinds[1] == "number":
        number = parse_answer(two)
        if number is None or number.decimal:  # a rounded value is neither true nor false
            return _NOTHING
        if kinds[0] == "sum":
            return _fact("supangle", points[0]) if number.sign == 1 and number.size.square == 180**2 else _NOTHING
        return _fact(kinds[0], points[0], number)
    if kinds[0] != kinds[1]:
        return _NOTHING
    same = {"length": "cong", "angle": "eqangle", "ratio": "eqratio"}.get(kinds[0])
    return _fact(same, points[0] + points[1]) if same else _NOTHING


def _fact(kind: str, letters: str, number: Number | None = None) -> Fact | None:
    groups = {"angle": (3,), "eqangle": (3, 3), "supangle": (3, 3), "simtri": (3, 3), "area": (3,), "coll": (3,)}
    groups |= {"mid": (3,), "cyclic": (4,), "length": (2,), "cong": (2, 2), "para": (2, 2), "perp": (2, 2)}
    at = 0
    for size in groups.get(kind, (2,) * (len(letters) // 2)):
        if len(set(letters[at : at + size])) < size:
            return None
        at += size
    if number is None:
        return Fact.of(kind, letters)
    if number.sign != 1:
        return None
    value = number.size
    if kind == "angle":
        square = value.square
        if square is None or any(power.denominator != 1 for _, power in value.powers):
            return None
        value = Fraction(1)
        for prime, power in number.size.powers:
            value *= Fraction(prime) ** int(power)
    return Fact.of(kind, letters, value)
