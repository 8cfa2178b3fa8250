"""Problems: a goal that a scene determines, the fewest premises that do so, and proofs of it."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from .closure import RULES, Closure, Derived, Diagram
from .facts import Fact, Points
from .scene import Scene


GOALS = ("angle", "length", "ratio", "area")


@dataclass(frozen=True)
class Proof:
    """Steps from premises to a goal.

    Attributes:
        steps: in order, the goal last; sources count the premises first, then the steps before.
    """

    steps: tuple[Derived, ...]

    @property
    def rules(self) -> frozenset[str]:
        return frozenset(step.rule for step in self.steps)


@dataclass(frozen=True)
class Problem:
    """A question with one answer.

    Attributes:
        points: coordinates of the points that it names.
        premises: facts, none of which can be left out.
        goal: the fact asked for, with its value.
        proofs: at least one; they differ in the rules they use, the first is the engine's first.
        premise_ratio: premises that are needed over premises of the scene.
        distractors: true premises of the scene that are not needed.
    """

    points: Points
    premises: tuple[Fact, ...]
    goal: Fact
    proofs: tuple[Proof, ...]
    premise_ratio: float = 1.0
    distractors: tuple[Fact, ...] = ()


def ancestry(closure: Closure, sources: Iterable[int]) -> set[int]:
    """Places of the facts that these follow from, themselves included."""
    found, waiting = set(), list(sources)
    while waiting:
        place = waiting.pop()
        if place not in found:
            found.add(place)
            waiting += closure.derived[place].sources
    return found


def proof(closure: Closure, goal: Fact, premises: Sequence[Fact]) -> Proof:
    """The closure's proof of a goal with its value, from premises in the order in which the closure got them."""
    places = sorted(ancestry(closure, [closure.prove(goal)]))
    steps = [place for place in places if place >= len(premises)]
    new = {place: place for place in range(len(premises))} | {p: len(premises) + i for i, p in enumerate(steps)}
    derived = (closure.derived[place] for place in steps)
    return Proof(tuple(Derived(d.fact, d.rule, tuple(new[source] for source in d.sources)) for d in derived))


def goals(closure: Closure, kinds: Iterable[str] = GOALS) -> list[tuple[Fact, int, list[Fact]]]:
    """Determined goals that are no premise, each with the number of steps of its proof and the premises used."""
    names, found = sorted(closure.names), []
    pairs = list(combinations(names, 2))
    asked = {
        "angle": [(t[i - 1], t[i], t[i - 2]) for t in closure.diagram.triples for i in range(3)],
        "length": pairs,
        "ratio": [(*one, *two) for one, two in combinations(pairs, 2) if set(one) & set(two)],
        "area": closure.diagram.triples,
    }
    premises = sum(not derived.rule for derived in closure.derived)
    for kind in kinds:
        for points in asked[kind]:
            fact = closure.value(Fact.of(kind, points))
            if fact is None or str(fact.value) in ("0", "1"):
                continue
            place = closure.place.get(fact)
            sources = closure.sources(fact) if place is None else [place]
            places = sorted(ancestry(closure, sources))
            used = [closure.derived[p].fact for p in places if p < premises]
            steps = len(places) - len(used) + (place is None)
            if steps:
                found.append((fact, steps, used))
    return found


def needed(diagram: Diagram, premises: Sequence[Fact], goal: Fact) -> list[Fact]:
    """The premises less each one, in turn, without which the rules still give the goal."""
    left = list(premises)
    for premise in premises:
        fewer = [fact for fact in left if fact is not premise]
        if closes(diagram, fewer, goal):
            left = fewer
    return left


def closes(diagram: Diagram, premises: Sequence[Fact], goal: Fact, rules: Iterable[str] = RULES) -> Closure | None:
    """The closure of the premises on the points that they and the goal name, if it determines the goal."""
    names = {name for fact in (*premises, goal) for name in fact.points}
    closure = Closure(diagram, premises, rules, names=names, until=goal)
    return closure if closure.value(goal) is not None else None


def proofs(diagram: Diagram, premises: Sequence[Fact], goal: Fact, most: int = 1) -> list[Proof]:
    """Up to `most` proofs, each with other rules: the closure's own, then those without one of the rules so far."""
    found: list[Proof] = []
    waiting: list[frozenset[str]] = [frozenset()]
    tried = set()
    while waiting and len(found) < most:
        without = waiting.pop(0)
        if without in tried:
            continue
        tried.add(without)
        closure = closes(diagram, premises, goal, [rule for rule in RULES if rule not in without])
        if closure is None:
            continue
        new = proof(closure, goal, premises)
        if all(new.rules != other.rules for other in found):
            found.append(new)
        waiting += [without | {rule} for rule in sorted(new.rules & set(RULES))]
    return found


def pose(
    scene: Scene,
    rng: random.Random,
    *,
    steps: tuple[int, int] = (3, 12),
    kinds: Sequence[str] = GOALS,
    min_premise_ratio: float = 0.5,
    solutions: int = 1,
    distractors: int = 0,
    tier_edges: Sequence[int] = (3, 6, 12, 24),
    tries: int = 4,
    count=lambda why: None,
) -> Problem | None:
    """A problem in the scene, or `None`, with `count` told the filter that it fell to.

    A tier among those that the scene has is drawn first, then a goal in it: most goals are shallow.
    """
    diagram = Diagram(scene.points)
    closure = Closure(diagram, scene.premises)
    by_tier: dict[int, list[tuple[Fact, list[Fact]]]] = {}
    for fact, length, used in goals(closure, kinds):
        if not steps[0] <= length <= steps[1]:
            count("min_steps, max_steps")
        elif len(used) < min_premise_ratio * len(scene.premises):
            count("min_premise_ratio")
        else:
            by_tier.setdefault(tier_of(length, tier_edges), []).append((fact, used))
    for _ in range(tries if by_tier else 0):
        fact, used = rng.choice(by_tier[rng.choice(sorted(by_tier))])
        premises = needed(diagram, used, fact)
        ratio = len(premises) / len(scene.premises)
        if ratio < min_premise_ratio:
            count("min_premise_ratio")
            continue
        found = proofs(diagram, premises, fact, solutions)
        if not steps[0] <= len(found[0].steps) <= steps[1]:
            count("min_steps, max_steps")
            continue
        rest = [p for p in scene.premises if p not in premises]
        extra = rng.sample(rest, min(distractors, len(rest)))
        names = {name for p in (*premises, *extra, fact) for name in p.points}
        points = {name: scene.points[name] for name in sorted(names)}
        return Problem(points, tuple(premises), fact, tuple(found), ratio, tuple(extra))
    return None


def tier_of(length: int, edges: Sequence[int]) -> int:
    """The tier, from 1, of a proof of that many steps; 0 below the first edge."""
    return sum(length >= edge for edge in edges)
