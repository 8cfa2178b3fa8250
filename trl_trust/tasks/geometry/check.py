"""An independent checker of rows: from premises and steps alone, each step an instance of its rule, to the answer.

It shares the language (`facts.py`) with the engine and nothing else: it has its own equations, its own elimination and
its own statement of each rule, so that a mistake in the engine would have to be made twice. Diagrams enter as they do
there: they say on which side a point lies, and the multiple of 180 degrees in an equation of directions.
"""

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from .facts import Fact, Root, angle, direction, distance, holds, parse_fact, turn


SINE_SQUARED = {Fraction(30): Fraction(1, 4), Fraction(45): Fraction(1, 2), Fraction(60): Fraction(3, 4)}
SINE_SQUARED[Fraction(90)] = Fraction(1)
SINE_SQUARED.update({180 - degrees: square for degrees, square in list(SINE_SQUARED.items())})
ANGULAR = ("coll", "para", "perp", "mid", "angle", "eqangle", "supangle", "cyclic", "simtri")
METRIC = ("cong", "mid", "length", "ratio", "eqratio", "simtri")


def verify_row(row: Mapping[str, Any]) -> None:
    """Check a row of the data set: its premises in the diagram, every step of every proof, and the answer.

    Args:
        row: with the columns `points`, `premises`, `goal`, `answer` and `solutions`, see
            [`trl_trust.tasks.geometry.data`].

    Raises:
        ValueError: naming the first thing that is wrong.
    """
    row = {**row, **{key: json.loads(row[key]) for key in ("points", "solutions") if isinstance(row[key], str)}}
    points = {name: (float(x), float(y)) for name, (x, y) in row["points"].items()}
    premises = [parse_fact(text) for text in row["premises"]]
    goal = parse_fact(f"{row['goal']} = {row['answer']}")
    for fact in (*premises, goal):
        if not set(fact.points) <= set(points) or not holds(fact, points):
            raise ValueError(f"{fact} does not hold in the diagram")
    if not row["solutions"]:
        raise ValueError("no solution")
    for solution in row["solutions"]:
        verify_proof(points, premises, goal, solution)
    if row["proof_length"] != len(row["solutions"][0]):
        raise ValueError(f"proof_length={row['proof_length']} of a proof of {len(row['solutions'][0])} steps")


def verify_proof(points: Mapping, premises: Sequence[Fact], goal: Fact, steps: Sequence[Mapping[str, Any]]) -> None:
    """Check one proof: `steps` of `rule`, `fact` and `from`, indices that count the premises first.

    Raises:
        ValueError: naming the first step that is wrong.
    """
    known = list(premises)
    for number, step in enumerate(steps, 1):
        fact, rule = parse_fact(step["fact"]), step["rule"]
        if rule not in RULES:
            raise ValueError(f"step {number}: {rule!r} is no rule")
        if not all(0 <= source < len(known) for source in step["from"]) or len(set(step["from"])) < len(step["from"]):
            raise ValueError(f"step {number}: it cites what does not stand before it")
        if not set(fact.points) <= set(points) or not holds(fact, points):
            raise ValueError(f"step {number}: {fact} does not hold in the diagram")
        if not RULES[rule](fact, [known[source] for source in step["from"]], points):
            cited = ", ".join(str(known[source]) for source in step["from"])
            raise ValueError(f"step {number}: {fact} is no case of {rule!r} from {cited or 'nothing'}")
        known.append(fact)
    if not steps or known[-1] != goal:
        raise ValueError(f"the proof ends in {known[-1]}, not in {goal}")


# -- chases: does the equation of the conclusion lie in the span of those cited? --------------------------------------


def _line(points, terms, value=0):
    """Coefficients of directions, and the constant, of `sum of terms = value` modulo 180, as the diagram has it."""
    row: dict = {}
    for number, a, b in terms:
        row[min(a, b), max(a, b)] = row.get((min(a, b), max(a, b)), 0) + Fraction(number)
    seen = sum(float(number) * direction(points, *pair) for pair, number in row.items())
    row["degrees"] = Fraction(value) + 180 * round((seen - float(value)) / 180)
    return row


def _corner(points, a, b, c):
    """Terms of the undirected angle ABC: from BA to BC counter-clockwise, or back."""
    return [(1, b, c), (-1, b, a)] if turn(points, a, b, c) < 0 else [(1, b, a), (-1, b, c)]


def _minus(terms):
    return [(-number, a, b) for number, a, b in terms]


def _angular(fact: Fact, points) -> list[dict]:
    p = fact.points
    line = lambda terms, value=0: _line(points, terms, value)
    corner = lambda *names: _corner(points, *names)
    if fact.kind in ("coll", "mid"):
        return [line([(1, p[0], p[1]), (-1, p[1], p[2])]), line([(1, p[0], p[2]), (-1, p[1], p[2])])]
    if fact.kind == "para":
        return [line([(1, p[0], p[1]), (-1, p[2], p[3])])]
    if fact.kind == "perp":
        return [line([(1, p[0], p[1]), (-1, p[2], p[3])], 90)]
    if fact.kind == "angle":
        return [line(corner(*p), fact.value)]
    if fact.kind == "eqangle":
        return [line(corner(*p[:3]) + _minus(corner(*p[3:])))]
    if fact.kind == "supangle":
        return [line(corner(*p[:3]) + corner(*p[3:]))]
    if fact.kind == "cyclic":
        return [
            line([(1, x, u), (-1, x, v), (-1, y, u), (1, y, v)])
            for u, v, x, y in ((p[0], p[1], p[2], p[3]), (p[0], p[2], p[1], p[3]), (p[1], p[2], p[0], p[3]))
        ]
    one, two = p[:3], p[3:]
    return [
        line(corner(one[i], one[j], one[k]) + _minus(corner(two[i], two[j], two[k])))
        for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    ]


def _metric(fact: Fact, points) -> list[dict]:
    """Coefficients of logarithms of lengths and of primes: powers whose product is 1."""
    p = fact.points

    def product(pairs, value: Root | None = None):
        row: dict = {}
        for number, (a, b) in pairs:
            row[min(a, b), max(a, b)] = row.get((min(a, b), max(a, b)), 0) + Fraction(number)
        for prime, power in value.powers if value else ():
            row[prime] = row.get(prime, 0) - power
        return row

    if fact.kind == "cong":
        return [product([(1, p[:2]), (-1, p[2:])])]
    if fact.kind == "mid":
        return [product([(1, p[:2]), (-1, (p[0], p[2]))]), product([(1, p[1:]), (-1, p[:2])], Root.of(2))]
    if fact.kind == "length":
        return [product([(1, p)], fact.value)]
    if fact.kind == "ratio":
        return [product([(1, p[:2]), (-1, p[2:])], fact.value)]
    if fact.kind == "eqratio":
        return [product([(1, p[:2]), (-1, p[2:4]), (-1, p[4:6]), (1, p[6:])])]
    sides = [((p[i], p[j]), (p[3 + i], p[3 + j])) for i, j in ((0, 1), (1, 2), (2, 0))]
    (ab, de), (bc, ef), (ca, fd) = sides
    return [product([(1, ab), (-1, de), (-1, bc), (1, ef)]), product([(1, bc), (-1, ef), (-1, ca), (1, fd)])]


def _spans(rows: list[dict], target: dict) -> bool:
    """Whether the target is a sum of multiples of the rows: elimination from the left, column by column."""
    rows, target = [dict(row) for row in rows], dict(target)
    for column in sorted({key for row in (*rows, target) for key in row}, key=str):
        pivot = next((row for row in rows if row.get(column)), None)
        if pivot is None:
            if target.get(column):
                return False
            continue
        rows = [row for row in rows if row is not pivot]
        for row in (*rows, target):
            if row.get(column):
                factor = row[column] / pivot[column]
                for key, number in pivot.items():
                    row[key] = row.get(key, 0) - factor * number
    return not any(target.values())


def _chase(kinds, equations):
    def check(fact: Fact, cited: list[Fact], points) -> bool:
        rows = [row for other in cited if other.kind in kinds for row in equations(other, points)]
        return fact.kind in kinds and all(_spans(rows, row) for row in equations(fact, points))

    return check


# -- the other rules: what is cited, exactly -------------------------------------------------------------------------


def _same(cited: list[Fact], wanted: list[Fact]) -> bool:
    return set(cited) == set(wanted)


def _triangle(points, a, b, c) -> bool:
    longest = max(distance(points, a, b), distance(points, b, c), distance(points, c, a))
    return abs(turn(points, a, b, c)) > 1e-7 * longest**2


def _sides(fact: Fact):
    """Of an equality of two sides that share a point: that point and the two others, or `None`."""
    a, b, c, d = fact.points
    shared = {a, b} & {c, d}
    if len(shared) != 1:
        return None
    apex = shared.pop()
    return apex, (a if b == apex else b), (c if d == apex else d)


def _isosceles(fact: Fact, cited: list[Fact], points, back: bool = False) -> bool:
    sides = fact if back else (cited[0] if len(cited) == 1 else None)
    if sides is None or sides.kind != "cong" or _sides(sides) is None:
        return False
    apex, b, c = _sides(sides)
    angles = Fact.of("eqangle", (apex, b, c, apex, c, b))
    return _triangle(points, apex, b, c) and (_same(cited, [angles]) if back else fact == angles)


def _similar(fact: Fact, cited: list[Fact], points, angles: int, ratios: int) -> bool:
    """Enough equal angles and ratios of the two triangles, of which an angle that both share needs no citation."""
    if fact.kind != "simtri":
        return False
    one, two = fact.points[:3], fact.points[3:]
    if not (_triangle(points, *one) and _triangle(points, *two)):
        return False
    found_angles, found_ratios, used = set(), set(), set()
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        equal = Fact.of("eqangle", (one[i], one[j], one[k], two[i], two[j], two[k]))
        if equal in cited or equal.points[:3] == equal.points[3:]:
            found_angles.add(j)
            used.add(equal)
        ratio = Fact.of("eqratio", (one[i], one[j], two[i], two[j], one[j], one[k], two[j], two[k]))
        shared = all({one[x], one[j]} == {two[x], two[j]} for x in (i, k))
        if ratio in cited or shared:
            found_ratios.add(j)
            used.add(ratio)
    if not set(cited) <= used:
        return False
    if angles == 1:
        return bool(found_angles & found_ratios)  # the angle between the sides
    return len(found_angles) >= angles and len(found_ratios) >= ratios


def _inscribed(fact: Fact, cited: list[Fact], points) -> bool:
    if fact.kind != "cyclic" or len(cited) != 1 or cited[0].kind not in ("eqangle", "supangle"):
        return False
    u, x, v, s, y, t = cited[0].points
    if {u, v} != {s, t} or {u, v, x, y} != set(fact.points) or not _triangle(points, u, v, x):
        return False
    beside = (turn(points, u, v, x) > 0) == (turn(points, u, v, y) > 0)
    right = angle(points, u, x, v)  # equal angles on both sides only where both are right
    return beside == (cited[0].kind == "eqangle") or abs(right - 90) < 1e-6


def _radii(fact: Fact, cited: list[Fact], points) -> bool:
    if fact.kind != "cyclic" or any(other.kind != "cong" or _sides(other) is None for other in cited):
        return False
    apexes = {_sides(other)[0] for other in cited}
    ends = {name for other in cited for name in _sides(other)[1:]}
    return len(apexes) == 1 and len(cited) == 3 and ends == set(fact.points)


def _sine(fact: Fact, cited: list[Fact], points) -> bool:
    """BC : AC = sin A : sin B in the triangle ABC."""
    if fact.kind != "ratio" or len(cited) != 2 or any(other.kind != "angle" for other in cited):
        return False
    one, two = set(fact.points[:2]), set(fact.points[2:])
    names = one | two
    if len(names) != 3 or not _triangle(points, *names) or any(set(other.points) != names for other in cited):
        return False
    at = {other.points[1]: other.value for other in cited}
    first, second = (names - one).pop(), (names - two).pop()  # the corners that the two sides face
    if not {first, second} <= set(at) or not {at[first], at[second]} <= set(SINE_SQUARED):
        return False
    return fact.value.square == SINE_SQUARED[at[first]] / SINE_SQUARED[at[second]]


def _pythagoras(fact: Fact, cited: list[Fact], points) -> bool:
    right = [other for other in cited if other.kind == "perp"]
    given = [other for other in cited if other.kind == "length"]
    if fact.kind != "length" or len(right) != 1 or len(given) != 2 or len(cited) != 3 or _sides(right[0]) is None:
        return False
    corner, a, b = _sides(right[0])
    square = {frozenset(other.points): other.value.square for other in (fact, *given)}
    legs, long = [frozenset((corner, a)), frozenset((corner, b))], frozenset((a, b))
    return set(square) == {*legs, long} and square[legs[0]] + square[legs[1]] == square[long]


def _area(fact: Fact, cited: list[Fact], points) -> bool:
    corner = [other for other in cited if other.kind == "angle"]
    given = [other for other in cited if other.kind == "length"]
    if fact.kind != "area" or len(corner) != 1 or not 1 <= len(given) <= 2 or len(cited) != 1 + len(given):
        return False
    a, b, c = corner[0].points
    lengths = {frozenset(other.points): other.value for other in given}
    if set(fact.points) != {a, b, c} or set(lengths) != {frozenset((a, b)), frozenset((b, c))}:
        return False
    sine = SINE_SQUARED.get(corner[0].value)
    squares = lengths[frozenset((a, b))].square * lengths[frozenset((b, c))].square
    return sine is not None and fact.value.square == squares * sine / 4


RULES = {
    "angle chase": _chase(ANGULAR, _angular),
    "ratio chase": _chase(METRIC, _metric),
    "isosceles": _isosceles,
    "isosceles converse": lambda fact, cited, points: _isosceles(fact, cited, points, back=True),
    "AA": lambda fact, cited, points: _similar(fact, cited, points, 2, 0),
    "SAS": lambda fact, cited, points: _similar(fact, cited, points, 1, 1),
    "SSS": lambda fact, cited, points: _similar(fact, cited, points, 0, 2),
    "inscribed angles": _inscribed,
    "equal radii": _radii,
    "sine rule": _sine,
    "Pythagoras": _pythagoras,
    "area": _area,
}
