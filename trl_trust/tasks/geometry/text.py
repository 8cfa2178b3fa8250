r"""Facts, questions and proofs in words, three wordings each, and in a terse form for tiny models.

Every wording of a fact is read back by [`trl_trust.tasks.geometry.claims.claims`].
"""

import random
from collections.abc import Iterable, Sequence

from .facts import Fact
from .problems import Problem, Proof


# {kind: wordings}; {ab} is the first and second point and so on, {v} the value; the last wording is the terse one
WORDINGS = {
    "coll": (
        "{a}, {b} and {c} lie on one line",
        "{a}, {b}, {c} are collinear",
        "the line {ab} passes through {c}",
        "col {abc}",
    ),
    "para": (
        "{ab} is parallel to {cd}",
        "{ab} || {cd}",
        "the lines {ab} and {cd} are parallel",
        "{ab}||{cd}",
    ),
    "perp": (
        "{ab} is perpendicular to {cd}",
        "{ab} ⟂ {cd}",
        "the lines {ab} and {cd} are perpendicular",
        "{ab}_|_{cd}",
    ),
    "cong": (
        "{ab} = {cd}",
        "{ab} is as long as {cd}",
        "the segments {ab} and {cd} are equally long",
        "{ab}={cd}",
    ),
    "mid": (
        "{a} is the midpoint of {bc}",
        "{a} bisects {bc}",
        "{a} lies halfway between {b} and {c}",
        "{a} mid {bc}",
    ),
    "cyclic": (
        "{a}, {b}, {c}, {d} lie on a circle",
        "{a}, {b}, {c}, {d} are concyclic",
        "a circle passes through {a}, {b}, {c}, {d}",
        "cyc {abcd}",
    ),
    "eqangle": (
        "angle {abc} = angle {def}",
        "the angles {abc} and {def} are equal",
        "∠{abc} = ∠{def}",
        "{abc}={def}",
    ),
    "supangle": (
        "angle {abc} + angle {def} = 180",
        "the angles {abc} and {def} add up to 180 degrees",
        "∠{abc} + ∠{def} = 180°",
        "{abc}+{def}=180",
    ),
    "eqratio": (
        "{ab}/{cd} = {ef}/{gh}",
        "{ab} : {cd} = {ef} : {gh}",
        "{ab} is to {cd} as {ef} to {gh}",
        "{ab}/{cd}={ef}/{gh}",
    ),
    "simtri": (
        "triangle {abc} ~ triangle {def}",
        "the triangles {abc} and {def} are similar",
        "△{abc} ∼ △{def}",
        "{abc}~{def}",
    ),
    "angle": (
        "angle {abc} = {v}",
        "the angle {abc} is {v} degrees",
        "∠{abc} = {v}°",
        "{abc}={v}",
    ),
    "length": (
        "{ab} = {v}",
        "the length of {ab} is {v}",
        "{ab} is {v} long",
        "{ab}={v}",
    ),
    "ratio": (
        "{ab}/{cd} = {v}",
        "{ab} : {cd} = {v}",
        "{ab} is {v} times {cd}",
        "{ab}/{cd}={v}",
    ),
    "area": (
        "area {abc} = {v}",
        "the area of triangle {abc} is {v}",
        "the triangle {abc} has the area {v}",
        "area {abc}={v}",
    ),
}
QUESTIONS = {
    "angle": (
        "What is the angle {abc} in degrees?",
        "Find angle {abc}, in degrees.",
        "How many degrees is ∠{abc}?",
        "{abc}?",
    ),
    "length": (
        "How long is {ab}?",
        "Find the length of {ab}.",
        "What is the length of {ab}?",
        "{ab}?",
    ),
    "ratio": (
        "What is {ab}/{cd}?",
        "Find the ratio {ab} : {cd}.",
        "How many times as long as {cd} is {ab}?",
        "{ab}/{cd}?",
    ),
    "area": (
        "What is the area of triangle {abc}?",
        "Find the area of triangle {abc}.",
        "How large is triangle {abc}?",
        "area {abc}?",
    ),
}
STYLES = ("prose", "terse")
TERSE = -1
_RUNS = ("a", "b", "c", "d", "ab", "bc", "cd", "ef", "gh", "abc", "def", "abcd")


def _fill(template: str, fact: Fact) -> str:
    places = dict(zip("abcdefgh", fact.points, strict=False))
    runs = {run: "".join(places[place] for place in run) for run in _RUNS if set(run) <= set(places)}
    return template.format(v=fact.value, **runs)


def say(fact: Fact, wording: int = 0) -> str:
    """The fact in its wording of that number; [`TERSE`] for the terse one."""
    return _fill(WORDINGS[fact.kind][wording], fact)


def ask(goal: Fact, wording: int = 0) -> str:
    """The question for the goal's value."""
    return _fill(QUESTIONS[goal.kind][wording], goal)


def prompt(problem: Problem, rng: random.Random, *, style: str = "prose", coordinates: bool = True) -> str:
    """The question with what is given, distractors among it, and where the points lie.

    Args:
        rng: chooses the wordings and the order of what is given.
        style: `"prose"`; `"terse"`: a line of symbols, `AB=AC ABC=40 BAC?`, without coordinates.
        coordinates: name each point's, to two digits. Which side a point lies on can decide the answer, so without
            them, and without a picture, a few problems have another answer in another configuration.
    """
    given = [*problem.premises, *problem.distractors]
    rng.shuffle(given)
    if style == "terse":
        return " ".join([*(say(fact, TERSE) for fact in given), ask(problem.goal, TERSE)])
    words = "; ".join(say(fact, rng.randrange(3)) for fact in given)
    places = ", ".join(f"{name}({x:.2f}, {y:.2f})" for name, (x, y) in problem.points.items())
    figure = f" The figure is, to two digits: {places}." if coordinates else ""
    lead = rng.choice(("In the figure, ", "Given: ", "Let these hold in a plane figure: "))
    return f"{lead}{words}.{figure} {ask(problem.goal, rng.randrange(3))} Put the answer in \\boxed{{}}."


def solution(problem: Problem, proof: Proof, rng: random.Random, *, style: str = "prose") -> str:
    r"""A proof in words, a line a step, and the answer in `\boxed{}`."""
    box = f"\\boxed{{{problem.goal.value}}}"
    if style == "terse":
        return ";".join([*(say(step.fact, TERSE) for step in proof.steps), box])
    return "\n".join([*_lines(proof.steps, len(problem.premises), rng), f"So the answer is {box}."])


def _lines(steps: Iterable, given: int, rng: random.Random) -> list[str]:
    lines = []
    for number, step in enumerate(steps, 1):
        cited = [f"({source - given + 1})" if source >= given else "what is given" for source in step.sources]
        why = ", ".join(dict.fromkeys(cited)) or "the figure"
        lines.append(f"({number}) {say(step.fact, rng.randrange(3))} [{step.rule}, from {why}]")
    return lines


def trace(problem: Problem, others: Sequence, rng: random.Random, *, kind: str = "none") -> str:
    """A text to imitate.

    Args:
        others: verified steps that do not lead to the goal, for `"backtrack"`.
        kind: `"none"`: the first proof. `"multi"`: each proof in turn. `"backtrack"`: a branch that does not lead to
            the goal is walked, given up, and the first proof follows.
    """
    first = solution(problem, problem.proofs[0], rng)
    if kind == "multi" and len(problem.proofs) > 1:
        parts = [solution(problem, proof, rng) for proof in problem.proofs]
        return "\n\nAnother way:\n".join(parts)
    if kind == "backtrack" and others:
        tried = "\n".join(f"- {say(step.fact, rng.randrange(3))} [{step.rule}]" for step in others)
        return (
            f"Let me try this first:\n{tried}\nThis does not lead to the question. Back to what is given.\n\n{first}"
        )
    return first
