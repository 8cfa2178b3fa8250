"""i* models: three good files, and bad ones refused in words."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from trl_trust.tasks.coopetition import IStarNetwork, TrustDynamics, TrustParams, load_istar
from trl_trust.tasks.coopetition.command import main


FILES = Path(__file__).parent / "istar"


def test_worked_numbers():
    edges = [("i", "j", "a", 0.5, 0.9), ("i", "j", "b", 0.3, 0.85), ("i", "j", "c", 0.2, 0.6)]
    np.testing.assert_allclose(IStarNetwork.from_edges(edges).D, [[0, 0.825], [0, 0]], atol=1e-12)
    edges[2] = ("i", None, "c", 0.2, 0.6)
    network = IStarNetwork.from_edges(edges)
    np.testing.assert_allclose(network.D, [[0, 0.705], [0, 0]], atol=1e-12)
    grown = network._dependence({0: 1.1})[0, 1] - network.D[0, 1]
    assert grown == pytest.approx((0.55 * 0.9 + 0.255) / 1.05 - 0.705)
    assert network.sensitivity(0.1)[0][1][0, 1] == pytest.approx(grown)


@pytest.mark.parametrize(
    ("name", "actors", "D"),
    [
        ("platform", ("Developer", "Platform"), [[0, 0.825], [0.25, 0]]),
        ("renault_nissan", ("Renault", "Nissan"), [[0, 0.65], [0.75, 0]]),
        ("s_lcd", ("Samsung", "Sony"), [[0, 0.6], [0.86, 0]]),
    ],
)
def test_files(name, actors, D):
    network = load_istar(FILES / f"{name}.json")
    assert network.actors == actors
    np.testing.assert_allclose(network.D, D, atol=1e-12)
    edges = [tuple(dependum) for dependum in network.dependums]
    again = IStarNetwork.from_edges(sorted(edges, key=lambda edge: actors.index(edge[0])))
    order = [again.actors.index(actor) for actor in actors]
    np.testing.assert_allclose(again.D[np.ix_(order, order)], network.D)
    assert network.graph.number_of_edges() == sum(edge[1] is not None for edge in edges)
    assert set(network.graph.nodes) == set(actors)


def test_a_network_runs_in_the_dynamics():
    network = load_istar(FILES / "renault_nissan.json")
    np.testing.assert_array_equal(network.trust0, [[0.5, 0.5], [0.55, 0.5]])
    trust, _ = TrustDynamics(TrustParams(), network.D, network.baselines, network.trust0).run(np.full((3, 2), 7.0))
    assert (trust[-1][[0, 1], [1, 0]] > [0.5, 0.55]).all()


def broken(change) -> dict:
    model = copy.deepcopy(json.loads((FILES / "platform.json").read_text()))
    change(model)
    return model


def properties(model, at, **changes):
    model["dependencies"][at]["customProperties"] |= changes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["dependencies"][0].update(source="zz"), "'reach users'.*source 'zz'"),
        (lambda m: m["dependencies"][0].update(target=None), "'reach users'.*target None"),
        (lambda m: m["dependencies"][0].update(target="d2"), "'reach users'.*target 'd2'"),
        (lambda m: m["dependencies"][0].update(target="a1"), "'reach users'.*depends on itself"),
        (lambda m: properties(m, 1, criticality="1.2"), "'payments'.*criticality='1.2'.*\\[0, 1\\]"),
        (lambda m: properties(m, 1, importance="-1"), "'payments'.*importance='-1'.*>= 0"),
        (lambda m: properties(m, 3, providers="0"), "'apps'.*providers='0'"),
        (lambda m: properties(m, 0, importance="much"), "'reach users'.*importance='much'"),
        (lambda m: m["actors"][1].update(id="a1"), "'a1'.*twice"),
        (lambda m: m["actors"][1].update(text="Developer"), "two actors.*'Developer'"),
        (lambda m: m.update(dependencies=[]), "no dependency"),
        (lambda m: m.pop("actors"), "actors"),
        (lambda m: m["actors"].append(3), "no `id`"),
        (lambda m: m["actors"][0].update(nodes=3), "nodes"),
    ],
)
def test_bad_models_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        load_istar(broken(change))


def test_files_that_are_no_model(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        load_istar(tmp_path / "x.json")
    with pytest.raises(OSError):
        load_istar(tmp_path / "y.json")
    with pytest.raises(ValueError, match="piStar"):
        load_istar({"actors": 1})


def test_what_is_assumed_is_said():
    model = broken(lambda m: [m["dependencies"][0]["customProperties"].clear()])
    said = " ".join(load_istar(model).warnings)
    assert "criticality 1" in said and "importance" in said


def test_the_command(tmp_path, capsys):
    assert main(["istar", str(FILES / "platform.json"), "--dot", str(tmp_path / "g.dot")]) == 0
    out = capsys.readouterr().out
    assert "0.825" in out and "Developer" in out
    assert '"Developer" -> "Platform"' in (tmp_path / "g.dot").read_text()


def test_playing_in_the_terminal(monkeypatch, capsys):
    answers = iter(["7", "x", "11", "8", "0"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(answers))
    assert main(["play", "--partner", "grim", "--rounds", "3"]) == 0
    out = capsys.readouterr().out
    assert "The partner invested 7" in out and "reward" in out and out.count("whole number from 0 to 10") >= 2
