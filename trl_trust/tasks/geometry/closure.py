"""What follows from premises: rules over two exact linear systems, one of directions, one of logarithms of lengths.

Whether a rule is worth trying is seen in the diagram; whether it applies is decided by the algebra alone. Directions
live modulo 180 degrees, where halving is unsound: the multiple of 180 of an equation is read off the diagram as it is
put in, and from then on the arithmetic is that of the rationals. The side on which a point lies is read off too: what
is derived is true of the configuration that is drawn.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, permutations

from .facts import Fact, Points, Root, angle, direction, distance, turn
from .linear import LinearSystem, Row, add, is_constant, neat


DEGREE = ("1", "degree")
ANGLES, LENGTHS = "angle chase", "ratio chase"
RULES = (
    "isosceles",
    "isosceles converse",
    "AA",
    "SAS",
    "SSS",
    "inscribed angles",
    "equal radii",
    "sine rule",
    "Pythagoras",
    "area",
)
# squares of sines, by degrees
SINES = {30: Fraction(1, 4), 45: Fraction(1, 2), 60: Fraction(3, 4), 90: Fraction(1)}
SINES |= {180 - degrees: square for degrees, square in SINES.items()}
GATE = 1e-6  # what an equation may miss in the diagram, in degrees / 10 and in logarithms of lengths
LARGEST_SQUARE = 10**9  # of numerator and denominator of the square of a length that Pythagoras gives
FLAT = 1e-6  # a triangle whose doubled area is below this part of its longest side squared is none


@dataclass(frozen=True)
class Derived:
    """A fact and where it comes from.

    Attributes:
        fact: the fact.
        rule: a name in [`RULES`], [`ANGLES`] or [`LENGTHS`]; empty for a premise.
        sources: places of the facts that it follows from, in [`Closure.derived`].
    """

    fact: Fact
    rule: str = ""
    sources: tuple[int, ...] = ()


class Diagram:
    """What is read off the coordinates once: numbers, the equations that facts stand for, and what is worth trying.

    Args:
        points: coordinates by name.
    """

    def __init__(self, points: Points):
        self.points = dict(points)
        names = sorted(points)
        self._along = {pair: direction(points, *pair) for pair in combinations(names, 2)}
        self._far = {pair: distance(points, *pair) for pair in combinations(names, 2)}
        self._rows: dict[Fact, tuple[list[Row], list[Row]]] = {}
        self.triples = [t for t in combinations(names, 3) if not self._flat(*t)]
        corners = {corner: angle(points, corner[1], corner[0], corner[2]) for t in self.triples for corner in turns(t)}
        self.special = {c for c, found in corners.items() if any(abs(found - special) < 1e-6 for special in SINES)}
        self.right = {c for c, found in corners.items() if abs(found - 90) < 1e-6}
        self.candidates = list(self._candidates())

    def _flat(self, a: str, b: str, c: str) -> bool:
        longest = max(self._far[_key(a, b)], self._far[_key(b, c)], self._far[_key(c, a)])
        return abs(turn(self.points, a, b, c)) < FLAT * longest**2

    # -- equations ---------------------------------------------------------------------------------------------------

    def _direction_row(self, terms: Iterable[tuple[int, str, str]], value: Fraction | int = 0) -> Row:
        """`sum of number * direction = value`, modulo 180 degrees, as a row over the reals."""
        row: Row = {}
        off = -float(value)
        for number, a, b in terms:
            add(row, {_key(a, b): 1}, number)
            off += number * self._along[_key(a, b)]
        turns = round(off / 180)
        if abs(off - 180 * turns) > 10 * GATE:
            raise ArithmeticError(f"directions miss by {off - 180 * turns} degrees: {row} = {value}")
        add(row, {DEGREE: -1}, neat(value + 180 * turns))
        return row

    def _length_row(self, terms: Iterable[tuple[int, str, str]], value: Root | int = 1) -> Row:
        """`product of length ** number = value`, in logarithms."""
        row: Row = {}
        powers = Root.of(value).powers
        off = -sum(float(power) * math.log(prime) for prime, power in powers)
        for number, a, b in terms:
            add(row, {_key(a, b): 1}, number)
            off += number * math.log(self._far[_key(a, b)])
        if abs(off) > GATE:
            raise ArithmeticError(f"logarithms of lengths miss by {off}: {row} = {value}")
        add(row, {("1", prime): neat(power) for prime, power in powers}, -1)
        return row

    def turned(self, a: str, b: str, c: str, sign: int = 1) -> list[tuple[int, str, str]]:
        """The undirected angle ABC as a difference of directions, modulo 180."""
        sign *= 1 if turn(self.points, a, b, c) < 0 else -1
        return [(sign, b, c), (-sign, b, a)]

    def equations(self, fact: Fact) -> tuple[list[Row], list[Row]]:
        """Rows of directions and rows of lengths that the fact stands for.

        Raises:
            ArithmeticError: if one disagrees with the diagram.
        """
        if fact not in self._rows:
            self._rows[fact] = self._equations(fact)
        return self._rows[fact]

    def _equations(self, fact: Fact) -> tuple[list[Row], list[Row]]:
        p, kind, value = fact.points, fact.kind, fact.value
        line, far = self._direction_row, self._length_row
        if kind == "coll":
            return [line([(1, p[0], p[1]), (-1, p[0], p[2])]), line([(1, p[0], p[1]), (-1, p[1], p[2])])], []
        if kind == "mid":
            on = [line([(1, p[0], p[1]), (-1, p[0], p[2])]), line([(1, p[0], p[1]), (-1, p[1], p[2])])]
            return on, [far([(1, p[0], p[1]), (-1, p[0], p[2])]), far([(1, p[1], p[2]), (-1, p[0], p[1])], 2)]
        if kind in ("para", "perp"):
            return [line([(1, *p[:2]), (-1, *p[2:])], 90 if kind == "perp" else 0)], []
        if kind == "angle":
            return [line(self.turned(*p), value)], []
        if kind in ("eqangle", "supangle"):
            return [line(self.turned(*p[:3]) + self.turned(*p[3:], -1 if kind == "eqangle" else 1))], []
        if kind == "cyclic":
            a, b, c, d = p
            chords = ((a, b, c, d), (a, c, b, d), (a, d, b, c))
            return [line([(1, x, u), (-1, x, v), (-1, y, u), (1, y, v)]) for u, v, x, y in chords], []
        if kind == "simtri":
            sides = (
                [(p[i], p[j]) for i, j in ((0, 1), (1, 2), (2, 0))],
                [(p[3 + i], p[3 + j]) for i, j in ((0, 1), (1, 2), (2, 0))],
            )
            rows = [
                far([(1, *sides[0][i]), (-1, *sides[1][i]), (-1, *sides[0][i + 1]), (1, *sides[1][i + 1])])
                for i in (0, 1)
            ]
            corners = [(0, 1, 2), (1, 2, 0)]
            return [
                line(self.turned(*(p[i] for i in c)) + self.turned(*(p[3 + i] for i in c), -1)) for c in corners
            ], rows
        if kind == "cong":
            return [], [far([(1, *p[:2]), (-1, *p[2:])])]
        if kind == "eqratio":
            return [], [far([(1, *p[:2]), (-1, *p[2:4]), (-1, *p[4:6]), (1, *p[6:])])]
        if kind == "length":
            return [], [far([(1, *p)], value)]
        if kind == "ratio":
            return [], [far([(1, *p[:2]), (-1, *p[2:])], value)]
        return [], []  # an area is no equation of these

    # -- what to try -------------------------------------------------------------------------------------------------

    def _candidates(self) -> Iterator[tuple[Fact, list[tuple[str, list[Fact]]]]]:
        """Conclusions that the diagram allows, with the ways to each."""
        near = lambda x, y: abs(x - y) < 1e-7 * max(x, y)
        for triple in self.triples:
            for a, b, c in turns(triple):
                if near(self._far[_key(a, b)], self._far[_key(a, c)]):
                    sides, angles = Fact.of("cong", (a, b, a, c)), Fact.of("eqangle", (a, b, c, a, c, b))
                    yield angles, [("isosceles", [sides])]
                    yield sides, [("isosceles converse", [angles])]
        for one, two in self._similar():
            conclusion = Fact.of("simtri", (*one, *two))
            angles, ratios = [], []
            for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
                angles.append(Fact.of("eqangle", (one[i], one[j], one[k], two[i], two[j], two[k])))  # at j
                ratios.append(Fact.of("eqratio", (one[i], one[j], two[i], two[j], one[j], one[k], two[j], two[k])))
            ways = [("AA", [angles[i], angles[(i + 1) % 3]]) for i in range(3)]
            ways += [("SAS", [angles[i], ratios[i]]) for i in range(3)]
            yield conclusion, [*ways, ("SSS", ratios[:2])]
        known = set(self.triples)
        for four in combinations(sorted(self.points), 4):
            if not all(t in known for t in combinations(four, 3)):
                continue
            a, b, c, d = four
            off = self._along[_key(c, a)] - self._along[_key(c, b)] - self._along[_key(d, a)] + self._along[_key(d, b)]
            if abs((off + 90) % 180 - 90) > 1e-6:
                continue
            ways = []
            for u, v in combinations(four, 2):
                x, y = (name for name in four if name not in (u, v))
                same = abs(angle(self.points, u, x, v) - angle(self.points, u, y, v)) < 1e-6
                ways.append(("inscribed angles", [Fact.of("eqangle" if same else "supangle", (u, x, v, u, y, v))]))
            for o in sorted(set(self.points) - set(four)):
                if all(near(self._far[_key(o, a)], self._far[_key(o, other)]) for other in four[1:]):
                    ways.append(("equal radii", [Fact.of("cong", (o, a, o, other)) for other in four[1:]]))
            yield Fact.of("cyclic", four), ways

    def _similar(self) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
        """Pairs of triangles that look similar, corner by corner."""
        alike: dict[tuple, list] = {}
        for triple in self.triples:
            orders = []
            for a, b, c in permutations(triple):
                ab, bc, ca = self._far[_key(a, b)], self._far[_key(b, c)], self._far[_key(c, a)]
                if ab <= bc * (1 + 1e-7) and bc <= ca * (1 + 1e-7):
                    orders.append(((a, b, c), (round(ab / ca, 6), round(bc / ca, 6))))
            alike.setdefault(orders[0][1], []).append([order for order, _ in orders])
        for group in alike.values():
            for one, two in combinations(group, 2):
                for order in two:
                    yield one[0], order


class Closure:
    """All that the rules give from some premises in a diagram.

    Args:
        diagram: the diagram, or its points.
        premises: facts that hold in it.
        rules: those to use, of [`RULES`]; chases are always made.
        names: the points to reason about; all by default.
        until: stop as soon as this goal, a fact with or without a value, is determined.
        sweeps: at most that many rounds of all rules.

    Raises:
        ArithmeticError: if an equation disagrees with the diagram: a premise that does not hold, or a rule that is
            wrong.
    """

    def __init__(
        self,
        diagram: Diagram | Points,
        premises: Iterable[Fact],
        rules: Iterable[str] = RULES,
        *,
        names: Iterable[str] | None = None,
        until: Fact | None = None,
        sweeps: int = 30,
    ):
        self.diagram = diagram if isinstance(diagram, Diagram) else Diagram(diagram)
        self.names = set(self.diagram.points if names is None else names)
        self.derived: list[Derived] = []
        self.place: dict[Fact, int] = {}
        self._values: dict[str, tuple[int, Fact | None]] = {}
        self._followed: dict[Fact, int | bool] = {}
        self.directions, self.lengths = LinearSystem(), LinearSystem()
        for fact in premises:
            self._enter(Derived(fact))
        self.rules, waiting = set(rules), []
        for conclusion, ways in self.diagram.candidates:
            ways = [(rule, needs) for rule, needs in ways if rule in self.rules and self._named(*needs)]
            if ways and self._named(conclusion):
                waiting.append((conclusion, ways))
        for _ in range(sweeps):
            if until is not None and self.value(until) is not None:
                return
            size = len(waiting)
            waiting = [candidate for candidate in waiting if not self._try(*candidate)]
            new = [self._try(*candidate) for candidate in self._computed()]
            if len(waiting) == size and not any(new):
                return

    def _named(self, *facts: Fact) -> bool:
        return all(self.names.issuperset(fact.points) for fact in facts)

    # -- deriving ----------------------------------------------------------------------------------------------------

    def _enter(self, derived: Derived) -> int:
        """Put a fact and its equations in; its place."""
        place = len(self.derived)
        for system, rows in zip((self.directions, self.lengths), self.diagram.equations(derived.fact), strict=True):
            for i, row in enumerate(rows):
                system.insert(row, (place, i))
        self.derived.append(derived)
        self.place.setdefault(derived.fact, place)
        return place

    def sources(self, fact: Fact) -> set[int] | None:
        """Places of the facts whose equations give this one's; `None` if they do not. Empty if it says nothing."""
        found: set[int] = set()
        for system, rows in zip((self.directions, self.lengths), self.diagram.equations(fact), strict=True):
            for row in rows:
                left, used = system.reduce(row)
                if left:
                    return None
                found |= {place for place, _ in used}
        return found

    @property
    def _size(self) -> int:
        """How many equations are known; they only become more."""
        return len(self.directions.rows) + len(self.lengths.rows)

    def follows(self, fact: Fact) -> bool:
        """Whether the equations give the fact's; what followed once stays, what did not is asked again when they are
        more."""
        size = self._size
        when = self._followed.get(fact, -1)
        if when is not True and when < size:
            systems = zip((self.directions, self.lengths), self.diagram.equations(fact), strict=True)
            when = size if any(system.rest(row) for system, rows in systems for row in rows) else True
            self._followed[fact] = when
        return when is True

    def prove(self, fact: Fact) -> int | None:
        """The place of the fact, chased from the others and written down if need be; -1 if it says nothing, `None` if
        it does not follow."""
        if fact in self.place:
            return self.place[fact]
        if fact.kind == "area":
            return None
        sources = self.sources(fact)
        if not sources:
            return sources if sources is None else -1
        rule = ANGLES if self.diagram.equations(fact)[0] else LENGTHS
        self.place[fact] = len(self.derived)
        self.derived.append(Derived(fact, rule, tuple(sorted(sources))))
        return self.place[fact]

    def _try(self, conclusion: Fact, ways: list[tuple[str, list[Fact]]]) -> bool:
        """Draw the conclusion by the first of the ways, each a rule and what it needs, of which all follows; whether
        there is nothing left to try, since it was drawn or is known."""
        if conclusion in self.place or (conclusion.kind != "area" and self.follows(conclusion)):
            return True
        for rule, needs in ways:
            if all(need in self.place or self.follows(need) for need in needs):
                sources = {self.prove(need) for need in needs} - {-1}
                self._enter(Derived(conclusion, rule, tuple(sorted(sources))))
                return True
        return False

    def value(self, goal: Fact) -> Fact | None:
        """The goal with its value, if that is determined."""
        size = self._size
        when, known = self._values.get(goal.goal, (-1, None))
        if known is None and when < size:  # a value that is known stays
            known = self._value(goal)
            self._values[goal.goal] = size, known
        return known

    def _value(self, goal: Fact) -> Fact | None:
        p = goal.points
        if goal.kind == "area":
            return self._area(*p)
        if goal.kind == "angle":
            row: Row = {}
            for number, a, b in self.diagram.turned(*p):
                add(row, {_key(a, b): 1}, number)
            left = self.directions.rest(row)
            if any(not is_constant(key) for key in left):
                return None
            return Fact.of("angle", p, left.get(DEGREE, 0) % 180)
        row = {_key(*p[:2]): 1}
        if goal.kind == "ratio":
            add(row, {_key(*p[2:]): 1}, -1)
        left = self.lengths.rest(row)
        if any(not is_constant(key) for key in left):
            return None
        root = Root.of({prime: power for (_, prime), power in left.items()})
        return Fact.of(goal.kind, p, root) if root.square is not None else None

    def _computed(self) -> Iterator[tuple[Fact, list[tuple[str, list[Fact]]]]]:
        """Conclusions whose numbers are computed from determined ones: the sine rule and Pythagoras'."""
        for triple in self.diagram.triples if "sine rule" in self.rules else ():
            for a, b, c in turns(triple) if self.names.issuperset(triple) else ():
                if (a, b, c) in self.diagram.special and (b, c, a) in self.diagram.special:
                    at_a, at_b = self.value(Fact.of("angle", (b, a, c))), self.value(Fact.of("angle", (a, b, c)))
                    if at_a and at_b and SINES[at_a.value] != SINES[at_b.value]:
                        ratio = Root.of(SINES[at_a.value] / SINES[at_b.value]) ** Fraction(1, 2)
                        yield Fact.of("ratio", (b, c, a, c), ratio), [("sine rule", [at_a, at_b])]
        for c, a, b in sorted(self.diagram.right) if "Pythagoras" in self.rules else ():
            if not self.names.issuperset((a, b, c)):
                continue
            pairs = ((a, c), (b, c), (a, b))
            sides = [self.value(Fact.of("length", pair)) for pair in pairs]
            if sum(side is None for side in sides) == 1:
                one, two, long = (side and side.value.square for side in sides)
                square = one + two if long is None else long - (one or two)
                if square > 0 and max(square.numerator, square.denominator) <= LARGEST_SQUARE:
                    length = Fact.of("length", pairs[sides.index(None)], Root.of(square) ** Fraction(1, 2))
                    needs = [Fact.of("perp", (c, a, c, b)), *(side for side in sides if side)]
                    yield length, [("Pythagoras", needs)]

    def _area(self, *corners: str) -> Fact | None:
        """The area of a triangle of which two sides and the angle between them, of known sine, are determined."""
        for b, c, a in turns(tuple(sorted(corners))):
            sides = Fact.of("length", (a, b)), Fact.of("length", (b, c)), Fact.of("angle", (a, b, c))
            parts = [self.value(part) for part in sides] if (b, c, a) in self.diagram.special else [None]
            if all(parts):
                product = parts[0].value * parts[1].value * Root.of(SINES[parts[2].value]) ** Fraction(1, 2)
                area = Fact.of("area", corners, product / Root.of(2))
                if area.value.square is not None:
                    self._try(area, [("area", parts)])
                    return area
        return None


def turns(triple: tuple[str, str, str]) -> list[tuple[str, str, str]]:
    """A triangle from each of its corners, which stands first."""
    a, b, c = triple
    return [(a, b, c), (b, c, a), (c, a, b)]


def _key(a: str, b: str) -> tuple[str, str]:
    return (a, b) if a < b else (b, a)
