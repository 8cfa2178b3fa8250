"""A setting is stated once, over the table of methods: every kind refuses what is outside it, and what is written a
second time, in a loss's signature or on a page, says the same."""

import ast
import inspect
import math
import re
from dataclasses import MISSING, fields
from importlib import import_module
from pathlib import Path

import pytest
from tiny import tiny_config

from trl_trust.methods import METHODS, hosted
from trl_trust.policy.base import TrustGRPOConfig
from trl_trust.policy.config import TrustGRPOConfig as Base
from trl_trust.policy.dhpo import DHPOConfig
from trl_trust.policy.etr import ETRConfig
from trl_trust.policy.opmd import OPMDConfig


DOCS = Path(__file__).parents[1] / "docs"


def config_of(method):
    return getattr(import_module(method.module), method.config)


def outside(known) -> list:
    """Values that a setting must refuse."""
    if known.range is not None:
        bad = [math.nan, "text", True, [1]]
        low, high = known.range.low, known.range.high
        bad += [] if low == -math.inf else [low - 1] + ([low] if known.range.above else [])
        bad += [] if high == math.inf else [high + 1] + ([high] if known.range.below else [])
        bad += [] if known.range.infinite else [math.inf]
        bad += [1.5] if known.range.whole else []
    else:
        bad = ["nonesuch", 7] if known.choices else {bool: ["yes", 1], str: [7]}.get(known.type, [])
    return bad if known.optional or not known.words else [*bad, None]


CASES = [
    (method, known, value)
    for method in hosted("grpo")
    for known in config_of(method).stated.values()
    if known.name not in TrustGRPOConfig.stated and known.name not in config_of(method).old_names
    for value in outside(known)
]


@pytest.mark.parametrize(("method", "known", "value"), CASES, ids=[f"{m.name}-{k.name}-{v!r}" for m, k, v in CASES])
def test_a_value_outside_its_kind_is_one_line(method, known, value):
    with pytest.raises(ValueError) as error:
        tiny_config(config_of(method), **{known.name: value})
    text = str(error.value)
    assert text.startswith(f"{known.name}={value!r}") and "must" in text and "\n" not in text


@pytest.mark.parametrize("method", [m for m in hosted("grpo") if m.loss], ids=lambda method: method.name)
def test_a_loss_has_the_defaults_of_its_config(method):
    config, loss = config_of(method), getattr(import_module(method.module), method.loss)
    known = {f.name: f.default for f in fields(config)}
    shared = {
        name: parameter.default
        for name, parameter in inspect.signature(loss).parameters.items()
        if parameter.default is not inspect.Parameter.empty and name in known
    }
    assert shared, "a loss takes its settings by the names of the config's fields"
    for name, default in shared.items():
        assert known[name] == default, f"{method.loss}({name}={default!r})"


def rows(page: str):
    """(field, default as written) of the tables of a page that list settings."""
    listing = False
    for line in page.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) < 2:
            listing = False
        elif cells[:2] == ["field", "default"]:
            listing = True
        elif listing and not cells[0].startswith("---"):
            names, defaults = re.findall(r"`(\w+)`", cells[0]), re.split(r", (?![^\[]*\])", cells[1])
            defaults = defaults * len(names) if len(defaults) == 1 else defaults  # one for all
            yield from zip(names, (default.strip("`") for default in defaults), strict=True)


@pytest.mark.parametrize("method", hosted("grpo"), ids=lambda method: method.name)
def test_a_page_lists_the_defaults_of_its_config(method):
    config = config_of(method)
    listed = dict(rows((DOCS / f"{method.page}.md").read_text()))
    configs = [config, *(config_of(other) for other in METHODS if other.page == method.page)]
    for name, default in listed.items():
        field = next(found.__dataclass_fields__[name] for found in configs if name in found.__dataclass_fields__)
        value = field.default_factory() if field.default is MISSING else field.default
        if default:  # long texts are left out
            assert ast.literal_eval(default) == value, f"{method.page}.md: {name}"
    own = set(config.stated) - set(Base.stated) - set(config.old_names)
    assert own <= set(listed) | set(re.findall(r"`(\w+)", (DOCS / f"{method.page}.md").read_text()))


def test_every_setting_of_a_method_is_a_setting():
    for method in METHODS:
        if method.host == "grpo":
            own = inspect.get_annotations(config_of(method), eval_str=True)
            assert {f.name for f in fields(config_of(method)) if f.name in own} <= set(config_of(method).stated)


@pytest.mark.parametrize(
    ("config", "given", "name", "value"),
    [
        (DHPOConfig, {"entropy_normaliser": "min_max"}, "entropy_normalizer", "min_max"),
        (OPMDConfig, {"recentre": True}, "recenter", True),
        (ETRConfig, {"phi": "centred"}, "phi", "centered"),
    ],
)
def test_an_older_spelling_is_taken_with_one_warning(config, given, name, value):
    with pytest.warns(FutureWarning, match="older spelling") as warned:
        args = tiny_config(config, **given)
    assert getattr(args, name) == value
    assert len([w for w in warned if "older spelling" in str(w.message)]) == 1
    with pytest.raises(ValueError, match=name):
        tiny_config(config, **{next(iter(given)): "nonesuch"})
