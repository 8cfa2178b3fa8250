"""Diagrams: a base triangle and constructions on it, drawn by a seed, with the premises that they obey exactly."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_uppercase

from .facts import Fact, Points, distance, turn


NEAREST, FURTHEST = 0.05, 8.0  # of a new point to the others and to the first, in lengths of the base
FLATTEST = 0.02  # sine of the smallest angle of a triangle that a clause builds on
MOST_POINTS = 12


@dataclass(frozen=True)
class Scene:
    """Points of a diagram and what is given about them.

    Attributes:
        points: coordinates by name, A, B, C, ... in the order of construction.
        premises: facts that hold in it by construction.
    """

    points: dict[str, tuple[float, float]]
    premises: tuple[Fact, ...]


# -- base triangles --------------------------------------------------------------------------------------------------


def _triangle(at_a: float, at_b: float, side: float) -> dict[str, tuple[float, float]]:
    """A at the origin, AB = side along the x axis, C above, with these angles in degrees."""
    a, b = math.radians(at_a), math.radians(at_b)
    far = side * math.sin(b) / math.sin(a + b)
    return {"A": (0.0, 0.0), "B": (side, 0.0), "C": (far * math.cos(a), far * math.sin(a))}


def isosceles(rng: random.Random) -> Scene:
    """CA = CB, a base angle, and the base AB or nothing of length."""
    base, side = rng.randrange(20, 85, 5), rng.randint(2, 12)
    angle = Fact.of("angle", "ABC", base) if rng.random() < 0.6 else Fact.of("angle", "ACB", 180 - 2 * base)
    given = (Fact.of("cong", "CACB"), angle, Fact.of("length", "AB", side))
    return Scene(_triangle(base, base, side), given)


def right(rng: random.Random) -> Scene:
    """A right angle at C, with two legs, or the hypotenuse and an angle of 30, 45 or 60 degrees."""
    square = Fact.of("perp", "CACB")
    if rng.random() < 0.5:
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        points = {"A": (float(b), 0.0), "B": (0.0, float(a)), "C": (0.0, 0.0)}
        return Scene(points, (square, Fact.of("length", "BC", a), Fact.of("length", "CA", b)))
    angle, side = rng.choice((30, 45, 60)), rng.randint(2, 12)
    given = (square, Fact.of("angle", "BAC", angle), Fact.of("length", "AB", side))
    return Scene(_triangle(angle, 90 - angle, side), given)


def equilateral(rng: random.Random) -> Scene:
    side = rng.randint(2, 12)
    given = (Fact.of("cong", "ABBC"), Fact.of("cong", "BCCA"), Fact.of("length", "AB", side))
    return Scene(_triangle(60, 60, side), given)


def scalene(rng: random.Random) -> Scene:
    """Two angles and the side between them."""
    while True:
        a, b = rng.randrange(25, 115, 5), rng.randrange(25, 115, 5)
        if a != b and 180 - a - b >= 20 and 90 not in (a, b, 180 - a - b):
            break
    side = rng.randint(2, 12)
    given = (Fact.of("angle", "BAC", a), Fact.of("angle", "ABC", b), Fact.of("length", "AB", side))
    return Scene(_triangle(a, b, side), given)


BASES: dict[str, Callable[[random.Random], Scene]] = {f.__name__: f for f in (isosceles, right, equilateral, scalene)}


# -- clauses ---------------------------------------------------------------------------------------------------------
# Each takes points it may use, in random order, and returns the new point and what is given about it (`X` its name);
# it raises ZeroDivisionError where lines are parallel. The names of parents stand for their coordinates here.


def _meet(p, u, q, v):
    """Where the line through p along u meets the line through q along v."""
    det = u[0] * v[1] - u[1] * v[0]
    if abs(det) < 1e-9 * math.hypot(*u) * math.hypot(*v):
        raise ZeroDivisionError("parallel")
    t = ((q[0] - p[0]) * v[1] - (q[1] - p[1]) * v[0]) / det
    return p[0] + t * u[0], p[1] + t * u[1]


def _to(p, q):
    return q[0] - p[0], q[1] - p[1]


def _left(u):
    return -u[1], u[0]


def midpoint(a, b):
    return ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2), ("mid X 0 1",)


def foot(a, b, c):
    """Of the perpendicular from a on bc."""
    along = _to(b, c)
    return _meet(a, _left(along), b, along), ("coll X 1 2", "perp 0 X 1 2")


def parallelogram(a, b, c):
    """a, b, c and the new point, in this order around it."""
    return (a[0] + c[0] - b[0], a[1] + c[1] - b[1]), ("para 0 1 2 X", "para 1 2 0 X")


def reflection(a, b, c):
    """Of a in the line bc."""
    (x, y), _ = foot(a, b, c)
    return (2 * x - a[0], 2 * y - a[1]), ("cong 1 0 1 X", "cong 2 0 2 X")


def circumcenter(a, b, c):
    (m, _), (n, _) = midpoint(a, b), midpoint(b, c)
    return _meet(m, _left(_to(a, b)), n, _left(_to(b, c))), ("cong X 0 X 1", "cong X 1 X 2")


def bisector(a, b, c):
    """Where the bisector of the angle bac meets bc."""
    u, v = _to(a, b), _to(a, c)
    one, two = math.hypot(*u), math.hypot(*v)
    along = (u[0] / one + v[0] / two, u[1] / one + v[1] / two)
    return _meet(a, along, b, _to(b, c)), ("coll X 1 2", "eqangle 1 0 X X 0 2")


def chord(a, b, c, d):
    """The second point in which the line ad meets the circle abc."""
    center, _ = circumcenter(a, b, c)
    along = _to(a, d)
    t = 2 * ((center[0] - a[0]) * along[0] + (center[1] - a[1]) * along[1]) / (along[0] ** 2 + along[1] ** 2)
    return (a[0] + t * along[0], a[1] + t * along[1]), ("coll X 0 3", "cyclic X 0 1 2")


def crossing(a, b, c, d):
    """Where the parallel to bc through a meets the perpendicular to bc through d."""
    along = _to(b, c)
    return _meet(a, along, d, _left(along)), ("para 0 X 1 2", "perp 3 X 1 2")


def erected(a, b):
    """At the end of a perpendicular at a, as long as ab."""
    along = _left(_to(a, b))
    return (a[0] + along[0], a[1] + along[1]), ("perp 0 X 0 1", "cong 0 X 0 1")


CLAUSES: dict[str, tuple[int, Callable]] = {
    f.__name__: (f.__code__.co_argcount, f)
    for f in (midpoint, foot, parallelogram, reflection, circumcenter, bisector, chord, crossing, erected)
}


def extend(scene: Scene, rng: random.Random, tries: int = 50) -> Scene:
    """The scene with one more point, by a random clause on random points.

    Left out are points nearer to another than [`NEAREST`], further away than [`FURTHEST`], and clauses on collinear
    parents; after `tries` of these the scene stays as it is.
    """
    points, (a, b) = scene.points, list(scene.points)[:2]
    base, name = distance(points, a, b), ascii_uppercase[len(points)]
    if len(points) >= MOST_POINTS:
        return scene
    for _ in range(tries):
        count, build = CLAUSES[rng.choice(sorted(CLAUSES))]
        if count > len(points):
            continue
        parents = rng.sample(sorted(points), count)
        if count > 2 and _flat(points, *parents[:3]):
            continue
        try:
            (x, y), said = build(*(points[parent] for parent in parents))
        except ZeroDivisionError:
            continue
        if not all(NEAREST * base <= math.dist((x, y), other) for other in points.values()):
            continue
        if math.dist((x, y), points[a]) > FURTHEST * base:
            continue
        names = {**{str(i): parent for i, parent in enumerate(parents)}, "X": name}
        facts = (Fact.of(kind, (names[place] for place in places)) for kind, *places in map(str.split, said))
        return Scene({**points, name: (x, y)}, (*scene.premises, *facts))
    return scene


def _flat(points: Points, a: str, b: str, c: str) -> bool:
    longest = max(distance(points, a, b), distance(points, b, c), distance(points, c, a))
    return abs(turn(points, a, b, c)) < FLATTEST * longest**2


def draw(seed: int, clauses: tuple[int, int] = (2, 6)) -> Scene:
    """The scene of a seed: a base triangle and as many clauses as the seed says, between `clauses[0]` and `[1]`."""
    rng = random.Random(f"trl-trust geometry {seed}")
    scene = BASES[rng.choice(sorted(BASES))](rng)
    for _ in range(rng.randint(*clauses)):
        scene = extend(scene, rng)
    return scene
