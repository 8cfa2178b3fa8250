"""The language of the room: what can be said about points, exactly, and whether a diagram agrees.

A fact is written `kind points`, with `= value` where it has one: `angle A B C = 40`, `cong A B C D`. Points are
capital letters. Values are exact: degrees are rationals, lengths rationals times square roots (`12/5`, `2*sqrt(3)`).
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import permutations


# {kind: (number of points, what it says)}
KINDS = {
    "coll": (3, "A, B, C lie on a line"),
    "para": (4, "AB is parallel to CD"),
    "perp": (4, "AB is perpendicular to CD"),
    "cong": (4, "AB is as long as CD"),
    "mid": (3, "A is the midpoint of BC"),
    "cyclic": (4, "A, B, C, D lie on a circle"),
    "eqangle": (6, "the angles ABC and DEF are equal"),
    "supangle": (6, "the angles ABC and DEF add up to 180 degrees"),
    "eqratio": (8, "AB : CD = EF : GH"),
    "simtri": (6, "the triangles ABC and DEF are similar, A to D, B to E, C to F"),
    "angle": (3, "the angle ABC, undirected, in degrees"),
    "length": (2, "the length of AB"),
    "ratio": (4, "AB over CD"),
    "area": (3, "the area of the triangle ABC"),
}
VALUED = ("angle", "length", "ratio", "area")
TOLERANCE = 1e-5  # of angles in degrees, of lengths and areas relative


# -- exact values ----------------------------------------------------------------------------------------------------


def factors(number: int) -> dict[int, int]:
    """Prime factors of a positive integer and how often each occurs."""
    found, prime = {}, 2
    while prime * prime <= number:
        while number % prime == 0:
            found[prime] = found.get(prime, 0) + 1
            number //= prime
        prime += 1
    if number > 1:
        found[number] = found.get(number, 0) + 1
    return found


@dataclass(frozen=True)
class Root:
    """A positive number as a product of primes to rational powers, `2*sqrt(3)` as `{2: 1, 3: 1/2}`."""

    powers: tuple[tuple[int, Fraction], ...]  # sorted, without zeros

    @classmethod
    def of(cls, value: "int | Fraction | Root | Mapping[int, Fraction]") -> "Root":
        if isinstance(value, Root):
            return value
        if not isinstance(value, Mapping):
            value = Fraction(value)
            if value <= 0:
                raise ValueError(f"{value} is not positive")
            up, down = factors(value.numerator), factors(value.denominator)
            value = {prime: up.get(prime, 0) - down.get(prime, 0) for prime in {*up, *down}}
        return cls(tuple(sorted((prime, Fraction(power)) for prime, power in value.items() if power)))

    def __mul__(self, other: "Root") -> "Root":
        powers = dict(self.powers)
        for prime, power in Root.of(other).powers:
            powers[prime] = powers.get(prime, 0) + power
        return Root.of(powers)

    def __pow__(self, power: "int | Fraction") -> "Root":
        return Root.of({prime: p * power for prime, p in self.powers})

    def __truediv__(self, other: "Root") -> "Root":
        return self * Root.of(other) ** -1

    def __float__(self) -> float:
        return math.exp(sum(float(power) * math.log(prime) for prime, power in self.powers))

    @property
    def square(self) -> Fraction | None:
        """Its square, if that is rational."""
        if any((2 * power).denominator != 1 for _, power in self.powers):
            return None
        return math.prod((Fraction(prime) ** int(2 * power) for prime, power in self.powers), start=Fraction(1))

    def __str__(self) -> str:
        square = self.square
        if square is None:
            raise ValueError(f"{dict(self.powers)} is no rational times a square root")
        outside, inside = Fraction(1), 1
        for prime, power in self.powers:
            outside *= Fraction(prime) ** math.floor(power)
            inside *= prime if power.denominator == 2 else 1
        if inside == 1:
            return str(outside)
        root = f"sqrt({inside})"
        if outside.denominator == 1:
            return root if outside == 1 else f"{outside}*{root}"
        top = root if outside.numerator == 1 else f"{outside.numerator}*{root}"
        return f"{top}/{outside.denominator}"


_VALUE = re.compile(r"(?:(\d{1,12})(?:\*sqrt\((\d{1,12})\))?|sqrt\((\d{1,12})\))(?:/(\d{1,12}))?")


def parse_value(text: str) -> Root | None:
    """What [`Root.__str__`] wrote: a rational times a square root; `None` for anything else."""
    match = _VALUE.fullmatch(text)
    if not match:
        return None
    number, root, alone, below = (int(group or 1) for group in match.groups())
    if not (number and root and alone and below):
        return None
    return Root.of(Fraction(number, below)) * Root.of(root * alone) ** Fraction(1, 2)


# -- facts -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """One statement in its canonical form: two facts that say the same in another order of the points are equal.

    Attributes:
        kind: a key of [`KINDS`].
        points: names, as many as the kind takes.
        value: degrees (`Fraction`) of an angle, [`Root`] of a length, ratio or area; else `None`.
    """

    kind: str
    points: tuple[str, ...]
    value: Fraction | Root | None = None

    @classmethod
    def of(cls, kind: str, points: Iterable[str], value=None) -> "Fact":
        """The canonical form.

        Raises:
            ValueError: for an unknown kind, a wrong number of points, or a value where there should be none.
        """
        points = tuple(points)
        if kind not in KINDS or len(points) != KINDS[kind][0]:
            raise ValueError(f"{kind!r} with {len(points)} points is no fact: the kinds are {', '.join(KINDS)}")
        if value is not None and kind not in VALUED:
            raise ValueError(f"{kind!r} takes no value")
        if value is not None:
            value = Fraction(value) if kind == "angle" else Root.of(value)
        return cls(kind, *_canonical(kind, points, value))

    def __str__(self) -> str:
        text = " ".join((self.kind, *self.points))
        return text if self.value is None else f"{text} = {self.value}"

    @property
    def goal(self) -> str:
        """The fact without its value, as a question names it."""
        return " ".join((self.kind, *self.points))


def _pair(a, b):
    return (a, b) if a <= b else (b, a)


def _canonical(kind, p, value):
    if kind in ("coll", "cyclic", "area"):
        return tuple(sorted(p)), value
    if kind == "mid":
        return (p[0], *_pair(*p[1:])), value
    if kind == "length":
        return _pair(*p), value
    if kind == "angle":
        a, c = _pair(p[0], p[2])
        return (a, p[1], c), value
    if kind in ("para", "perp", "cong"):
        first, second = sorted((_pair(*p[:2]), _pair(*p[2:])))
        return (*first, *second), value
    if kind == "ratio":
        first, second = _pair(*p[:2]), _pair(*p[2:])
        if second < first:
            first, second, value = second, first, value and value**-1
        return (*first, *second), value
    if kind in ("eqangle", "supangle"):
        halves = sorted(((*_pair(h[0], h[2]), h[1]) for h in (p[:3], p[3:])), key=lambda h: (h[0], h[2], h[1]))
        return tuple(name for a, c, b in halves for name in (a, b, c)), value
    if kind == "eqratio":
        a, b, c, d = (_pair(*p[i : i + 2]) for i in (0, 2, 4, 6))
        orders = [(a, b, c, d), (a, c, b, d), (d, b, c, a), (d, c, b, a)]
        orders += [(y, x, w, z) for x, y, z, w in orders]
        return tuple(name for pair in min(orders) for name in pair), value
    triples = [[(p[i], p[3 + i]) for i in order] for order in permutations(range(3))]
    orders = [(*(x for x, _ in t), *(y for _, y in t)) for t in triples]
    return min(orders + [(*o[3:], *o[:3]) for o in orders]), value


def parse_fact(text: str) -> Fact:
    """Read what `str(fact)` wrote.

    Raises:
        ValueError: naming the text, if it is none.
    """
    said, _, value = text.partition(" = ")
    kind, *points = said.split(" ")
    read = None
    if value:
        read = (
            Fraction(value) if kind == "angle" and re.fullmatch(r"\d{1,9}(/\d{1,9})?", value) else parse_value(value)
        )
    if (value and read is None) or not all(re.fullmatch("[A-Z]", name) for name in points):
        raise ValueError(f"{text!r} is no fact")
    return Fact.of(kind, points, read)


# -- in a diagram ----------------------------------------------------------------------------------------------------

Points = Mapping[str, tuple[float, float]]


def distance(points: Points, a: str, b: str) -> float:
    (x, y), (u, v) = points[a], points[b]
    return math.hypot(u - x, v - y)


def turn(points: Points, a: str, b: str, c: str) -> float:
    """Twice the signed area of ABC: positive where A, B, C run counter-clockwise."""
    (x, y), (u, v), (s, t) = points[a], points[b], points[c]
    return (u - x) * (t - y) - (v - y) * (s - x)


def direction(points: Points, a: str, b: str) -> float:
    """Of the line AB, in degrees, in [0, 180)."""
    (x, y), (u, v) = points[a], points[b]
    return math.degrees(math.atan2(v - y, u - x)) % 180.0


def angle(points: Points, a: str, b: str, c: str) -> float:
    """The undirected angle ABC in degrees, in [0, 180]."""
    (x, y), (u, v), (s, t) = points[a], points[b], points[c]
    dot = (x - u) * (s - u) + (y - v) * (t - v)
    return math.degrees(math.atan2(abs(turn(points, a, b, c)), dot))


def _off(angle: float) -> float:
    """Distance of a difference of line directions from 0, modulo 180."""
    return abs((angle + 90) % 180 - 90)


def holds(fact: Fact, points: Points) -> bool:
    """Whether the diagram agrees, within [`TOLERANCE`]."""
    p, kind = fact.points, fact.kind
    far = lambda a, b: distance(points, a, b)
    along = lambda a, b: direction(points, a, b)
    close = lambda x, y: abs(x - y) <= TOLERANCE * max(abs(x), abs(y), 1e-9)
    if kind in ("coll", "mid"):
        on = _off(along(p[0], p[1]) - along(p[0], p[2])) <= TOLERANCE
        return on and (
            kind == "coll" or (close(far(p[0], p[1]), far(p[0], p[2])) and close(2 * far(*p[:2]), far(*p[1:])))
        )
    if kind in ("para", "perp"):
        return _off(along(*p[:2]) - along(*p[2:]) - (90 if kind == "perp" else 0)) <= TOLERANCE
    if kind == "cong":
        return close(far(*p[:2]), far(*p[2:]))
    if kind == "cyclic":
        a, b, c, d = p
        return _off(along(c, a) - along(c, b) - along(d, a) + along(d, b)) <= TOLERANCE
    if kind in ("eqangle", "supangle"):
        one, two = angle(points, *p[:3]), angle(points, *p[3:])
        return abs(one - (two if kind == "eqangle" else 180 - two)) <= TOLERANCE
    if kind == "eqratio":
        return close(far(*p[:2]) * far(*p[6:]), far(*p[2:4]) * far(*p[4:6]))
    if kind == "simtri":
        a, b, c, d, e, f = p
        return close(far(a, b) * far(e, f), far(b, c) * far(d, e)) and close(
            far(b, c) * far(f, d), far(c, a) * far(e, f)
        )
    if kind == "angle":
        return abs(angle(points, *p) - float(fact.value)) <= TOLERANCE
    if kind == "length":
        return close(far(*p), float(fact.value))
    if kind == "ratio":
        return close(far(*p[:2]), float(fact.value) * far(*p[2:]))
    return close(abs(turn(points, *p)) / 2, float(fact.value))
