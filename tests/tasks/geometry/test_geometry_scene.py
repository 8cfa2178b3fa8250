"""Scenes: what is given holds in the diagram, by construction and by seed."""

import random

import pytest

from trl_trust.tasks.geometry.facts import Fact, holds
from trl_trust.tasks.geometry.scene import BASES, CLAUSES, MOST_POINTS, Scene, draw, extend


@pytest.mark.parametrize("name", sorted(BASES))
def test_what_is_given_of_a_base_holds(name):
    for seed in range(20):
        scene = BASES[name](random.Random(seed))
        assert all(holds(fact, scene.points) for fact in scene.premises)
        assert any(fact.kind == "length" for fact in scene.premises)


@pytest.mark.parametrize("name", sorted(CLAUSES))
def test_what_a_clause_says_holds(name, monkeypatch):
    """And is what makes its point: moved by a tenth, at least one statement of it breaks."""
    scenes = [draw(seed, (1, 1)) for seed in range(10)]  # four points
    monkeypatch.setattr("trl_trust.tasks.geometry.scene.CLAUSES", {name: CLAUSES[name]})
    built = 0
    for seed, before in enumerate(scenes):
        scene = extend(before, random.Random(seed))
        if scene is before:
            continue
        built += 1
        assert all(holds(fact, scene.points) for fact in scene.premises)
        last = list(scene.points)[-1]
        x, y = scene.points[last]
        for dx, dy in ((0.1, 0.03), (-0.02, 0.1)):
            moved = {**scene.points, last: (x + dx, y + dy)}
            assert not all(holds(fact, moved) for fact in scene.premises if last in fact.points)
    assert built >= 5


def test_a_seed_says_everything():
    assert draw(7) == draw(7) and draw(7) != draw(8)
    for seed in range(50):
        scene = draw(seed, (0, 12))
        assert 3 <= len(scene.points) <= MOST_POINTS
        assert all(holds(fact, scene.points) for fact in scene.premises)
        assert {name for fact in scene.premises for name in fact.points} == set(scene.points)


def test_a_full_scene_stays():
    points = {chr(65 + i): (float(i), float(i * i)) for i in range(MOST_POINTS)}
    scene = Scene(points, (Fact.of("length", "AB", 1),))
    assert extend(scene, random.Random(0)) is scene
