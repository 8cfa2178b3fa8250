"""From an i* model of who depends on whom to the constants of the game.

Reads the JSON that the editor piStar writes: `actors[]` with `id`, `text` and `nodes`, and `dependencies[]` with `id`,
`text`, `type`, `source` (the depender: an actor, or a node inside one), `target` (the dependee) and
`customProperties`. Custom properties, all optional: `importance` (weight w >= 0, default 1), `criticality` in [0, 1]
or `providers` n (criticality 1/n), `baseline` and `trust`.

    D_ij = sum_d w_d crit(i, j, d) / sum_d w_d

over i's dependums d; those that i does not get from j enter the denominator only, and so do the goals that i meets
itself (its nodes with an `importance`). Provenance: **exact** (arXiv 2510.18802, section on translation). The graph
needs networkx, which torch brings (`pip install trl-trust[coopetition]` without it).
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Dependum(NamedTuple):
    """What one actor needs: `dependee` is `None` where it meets the need itself."""

    depender: str
    dependee: str | None
    name: str
    weight: float
    criticality: float


@dataclass(frozen=True)
class IStarNetwork:
    """Actors, what they need of each other, and what follows for the game.

    Attributes:
        actors: names, in the order of the model; the axes of the arrays.
        dependums: all that is needed.
        baselines: (N,), what is expected of each actor; [`DEFAULT_BASELINE`] where the model says nothing.
        trust0: (N, N), trust of i in j at the start; .5 where the model says nothing.
        warnings: what was assumed, in words.
    """

    actors: tuple[str, ...]
    dependums: tuple[Dependum, ...]
    baselines: np.ndarray
    trust0: np.ndarray
    warnings: tuple[str, ...] = field(default=())

    @property
    def D(self) -> np.ndarray:
        """Dependence of i on j, (N, N) in [0, 1]."""
        return self._dependence({})

    def _dependence(self, factors: Mapping[int, float]) -> np.ndarray:
        index = {actor: i for i, actor in enumerate(self.actors)}
        D, total = np.zeros((len(index),) * 2), np.zeros(len(index))
        for d, dependum in enumerate(self.dependums):
            weight = dependum.weight * factors.get(d, 1.0)
            total[index[dependum.depender]] += weight
            if dependum.dependee is not None:
                D[index[dependum.depender], index[dependum.dependee]] += weight * dependum.criticality
        return np.divide(D, total[:, None], out=np.zeros_like(D), where=total[:, None] > 0)

    @property
    def graph(self):
        """A `networkx.MultiDiGraph`: an edge from depender to dependee for each dependum, with its numbers."""
        import networkx

        graph = networkx.MultiDiGraph()
        for actor, baseline in zip(self.actors, self.baselines, strict=True):
            graph.add_node(actor, baseline=float(baseline))
        for dependum in self.dependums:
            if dependum.dependee is not None:
                numbers = {"weight": dependum.weight, "criticality": dependum.criticality}
                graph.add_edge(dependum.depender, dependum.dependee, key=dependum.name, **numbers)
        return graph

    def sensitivity(self, delta: float = 0.1) -> list[tuple[Dependum, np.ndarray]]:
        """How D changes, (N, N), when the weight of one dependum grows by the share `delta`, for each of them."""
        return [(dependum, self._dependence({d: 1.0 + delta}) - self.D) for d, dependum in enumerate(self.dependums)]

    def to_dot(self) -> str:
        """The graph in the language of Graphviz."""

        def quoted(text: str) -> str:
            return json.dumps(text, ensure_ascii=False)

        lines = [f"  {quoted(actor)};" for actor in self.actors]
        for d in self.dependums:
            if d.dependee is not None:
                label = quoted(f"{d.name} ({d.weight:g} x {d.criticality:g})")
                lines.append(f"  {quoted(d.depender)} -> {quoted(d.dependee)} [label={label}];")
        return "\n".join(["digraph istar {", *lines, "}"])

    @classmethod
    def from_edges(cls, edges: Iterable[tuple[str, str | None, str, float, float]]) -> "IStarNetwork":
        """A network from `(depender, dependee or None, dependum, weight, criticality)`.

        Raises:
            ValueError: naming the dependum, as [`load_istar`] does.
        """
        dependums, actors = [], {}
        for depender, dependee, name, weight, criticality in edges:
            where = f"dependum {name!r}"
            if depender == dependee:
                raise ValueError(f"{where}: {depender!r} depends on itself; leave the dependee out.")
            actors |= dict.fromkeys(actor for actor in (depender, dependee) if actor is not None)
            number = _number(where, "weight", weight), _number(where, "criticality", criticality, 1.0)
            dependums.append(Dependum(depender, dependee, name, *number))
        _require_dependency(dependums)
        n = len(actors)
        return cls(tuple(actors), tuple(dependums), np.full(n, DEFAULT_BASELINE), np.full((n, n), DEFAULT_TRUST))


DEFAULT_BASELINE, DEFAULT_TRUST = 5.0, 0.5


def load_istar(source: str | Path | Mapping[str, Any]) -> IStarNetwork:
    """Read a piStar model, a file or what `json` made of it.

    Raises:
        ValueError: naming the element that is wrong: a source or target that there is not, a dependency of an actor on
            itself, a criticality outside [0, 1], a negative weight, an id used twice, a model without a dependency.
        OSError: for a file that cannot be read.
    """
    if not isinstance(source, Mapping):
        try:
            source = json.loads(Path(source).read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{source} is no JSON: {error}.") from error
    if not isinstance(source, Mapping) or not isinstance(source.get("actors"), list):
        raise ValueError("no piStar model: it must be an object with the lists `actors` and `dependencies`.")

    owner, actors, dependums, warnings = {}, {}, [], []  # id -> name of the actor that it is or lies in

    def add(element: Any, kind: str, actor: str) -> None:
        if not isinstance(element, Mapping) or not isinstance(element.get("id"), str):
            raise ValueError(f"{kind} {element!r:.60} has no `id`.")
        if element["id"] in owner:
            raise ValueError(f"id {element['id']!r} of {kind} {_text(element)!r} is used twice.")
        owner[element["id"]] = actor

    for actor in source["actors"]:
        name = _text(actor)
        if name in actors:
            raise ValueError(f"two actors are called {name!r}; the game tells them apart by name.")
        add(actor, "actor", name)
        actors[name] = actor
        for node in _list(actor, "nodes"):
            add(node, "node", name)
            if "importance" in _properties(node):
                where = f"node {_text(node)!r} of {name!r}"
                weight = _number(where, "importance", _properties(node)["importance"])
                dependums.append(Dependum(name, None, _text(node), weight, 0.0))

    trusts: dict[tuple[str, str], list[float]] = {}
    for dependency in _list(source, "dependencies"):
        where = f"dependency {_text(dependency)!r}"
        add(dependency, "dependency", "")
        ends = []
        for end in ("source", "target"):
            at = dependency.get(end)
            if not isinstance(at, str) or not owner.get(at):
                raise ValueError(f"{where}: its {end} {at!r} is no actor and no node of one.")
            ends.append(owner[at])
        if ends[0] == ends[1]:
            raise ValueError(f"{where}: {ends[0]!r} depends on itself.")
        known = _properties(dependency)
        weight = _number(where, "importance", known.get("importance", 1.0))
        if "criticality" in known:
            criticality = _number(where, "criticality", known["criticality"], 1.0)
        elif "providers" in known:
            providers = _number(where, "providers", known["providers"])
            if providers < 1 or providers != int(providers):
                raise ValueError(f"{where}: providers={known['providers']!r} must be a whole number >= 1.")
            criticality = 1 / providers
        else:
            criticality = 1.0
            warnings.append(f"{where}: no criticality and no providers; taken as the only provider, criticality 1.")
        if "importance" not in known:
            warnings.append(f"{where}: no importance; taken as 1.")
        dependums.append(Dependum(*ends, _text(dependency), weight, criticality))
        if "trust" in known:
            trusts.setdefault((ends[0], ends[1]), []).append(_number(where, "trust", known["trust"], 1.0))
    _require_dependency(dependums)

    names, n = list(actors), len(actors)
    baselines, trust0 = np.full(n, DEFAULT_BASELINE), np.full((n, n), DEFAULT_TRUST)
    for i, (name, actor) in enumerate(actors.items()):
        known = _properties(actor)
        if "baseline" in known:
            baselines[i] = _number(f"actor {name!r}", "baseline", known["baseline"])
    for (i, j), values in trusts.items():
        trust0[names.index(i), names.index(j)] = np.mean(values)
        if len(set(values)) > 1:
            warnings.append(f"trust of {i!r} in {j!r}: {len(values)} different values; their mean is taken.")
    return IStarNetwork(tuple(names), tuple(dependums), baselines, trust0, tuple(warnings))


def _require_dependency(dependums) -> None:
    if not any(dependum.dependee is not None for dependum in dependums):
        raise ValueError("the model has no dependency: there is nothing to translate.")
    for depender in dict.fromkeys(dependum.depender for dependum in dependums):
        if not sum(dependum.weight for dependum in dependums if dependum.depender == depender):
            raise ValueError(f"actor {depender!r}: the weights of all its dependums are 0.")


def _text(element: Any) -> str:
    text = element.get("text") or element.get("id") if isinstance(element, Mapping) else None
    return text if isinstance(text, str) else "?"


def _list(element: Mapping, name: str) -> list:
    found = element.get(name) or []
    if not isinstance(found, list):
        raise ValueError(f"{name} of {_text(element)!r} must be a list.")
    return found


def _properties(element: Mapping) -> Mapping:
    found = element.get("customProperties") or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"customProperties of {_text(element)!r} must be an object.")
    return found


def _number(where: str, name: str, value: Any, high: float = math.inf) -> float:
    """`value`, a number or the text of one (piStar's editor writes texts), in [0, high]."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (0 <= number <= high and math.isfinite(number)):
        raise ValueError(f"{where}: {name}={value!r} must be a number {'>= 0' if high == math.inf else 'in [0, 1]'}.")
    return number
