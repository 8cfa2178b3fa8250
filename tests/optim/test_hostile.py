"""Settings that no optimizer can use: one line at construction, naming field, value and what it takes instead."""

import math
import re

import pytest
import torch
from torch import nn

from trl_trust.optim import FISMO, TRAM, AuON, HybridAuON, Muon
from trl_trust.optim.tram import TRAMAdamW
from trl_trust.optimizers import get_optimizer


INF, NAN = math.inf, math.nan

NUMBER = [INF, -INF, NAN, -1.0, None, "fast", [0.1], True]
SHARED = {
    "lr": NUMBER,
    "weight_decay": NUMBER,
    "aux_lr": [INF, NAN, -1.0, "fast", [0.1], True],  # None is a tenth of lr
    "aux_weight_decay": NUMBER,
    "aux_eps": [0.0, *NUMBER],
    "aux_betas": [0.9, None, (0.9,), (0.9, 1.0), (0.9, NAN), ("a", "b"), "0.9:0.99", (0.9, 0.9, 0.9)],
    "matrix_pattern": ["(", 5],
    "adamw_pattern": ["[", 5],
    "split_sizes": [5, {"1.weight": 4}, {"(": (2, 2)}],
    "skip_nonfinite": ["yes", None, 1],
}
MOMENTUM = {"momentum": [1.0, *NUMBER]}
NESTEROV = {"nesterov": ["yes", None, 1], "momentum_dtype": ["float16", None, torch.bfloat16, []]}
NEWTON_SCHULZ = {
    "ns_steps": [-1, 100, 1.5, "five", NAN, True],
    "ns_coefficients": [1.0, None, (1.0, 2.0), (1.0, 2.0, NAN), (1.0, 2.0, INF), "abc", (1.0, 2.0, "x")],
    "ns_dtype": ["float16", None, torch.float32, []],
    "ns_form": ["grams", None, []],
}
BRAKE = {
    "variant": ["papers", None, []],
    "gamma": [0.0, 11.0, NAN, INF, "x", True],
    "rms_form": ["root", None],
    "shape_scale": ["adam", 1.0, {}],
    "brake_scale": ["max", None],
    "eps": [0.0, *NUMBER],
}
OPTIONS = {
    AuON: SHARED | MOMENTUM | NESTEROV | NEWTON_SCHULZ | BRAKE,
    HybridAuON: SHARED | MOMENTUM | NESTEROV | NEWTON_SCHULZ | BRAKE,
    Muon: SHARED | MOMENTUM | NESTEROV | NEWTON_SCHULZ | {"shape_scale": ["adam", 1.0], "eps": [0.0, *NUMBER]},
    FISMO: SHARED
    | MOMENTUM
    | NEWTON_SCHULZ
    | {
        "factor_decay": [1.1, *NUMBER],
        "damping_value": [0.0, *NUMBER],
        "damping": ["papers", None],
        "root": ["svd", None],
        "eig_floor": [0.0, *NUMBER],
        "update_interval": [0, 1.5, NAN, INF, None, "ten", True],
        "graft": ["svd", None],
        "momentum_space": ["flat", None],
        "shape_scale": ["adam", 1.0],
        "max_factor_dim": [0, 1.5, NAN, None, "big"],
        "max_failures": [-1, 1.5, NAN, None, "few"],
    },
    TRAMAdamW: {
        "lr": NUMBER,
        "weight_decay": NUMBER,
        "aux_eps": [0.0, *NUMBER],
        "aux_betas": [0.9, (0.9,), (0.9, 1.0), (0.9, NAN), ("a", "b")],
        "base": ["adam", None, 5],
        "tram_variant": ["previous", None],
        "tram_adaptive": ["yes", None],
        "tram_divergence": ["kl", None],
        "tram_max_distance": [0.0, -1.0, NAN, INF, "far"],
        "tram_anchor_eval": ["yes", None],
        "tram_every": [0, 1.5, NAN, None, "two"],
        "tram_distance_scope": ["world", None],
        "tram_chunk_size": [0, 1.5, NAN, None],
    },
}
# Settings that only some values of another one use
FISHER = {
    "tram_noise_std": [0.0, -1.0, NAN, INF, "loud"],
    "tram_fisher_gamma": [0.0, *NUMBER],
    "tram_fisher_eta": NUMBER,
    "tram_fisher_passes": ["both", None],
}
CASES = [(cls, {name: v}) for cls, options in OPTIONS.items() for name, values in options.items() for v in values]
CASES += [(TRAMAdamW, {name: v, "tram_variant": "fisher"}) for name, values in FISHER.items() for v in values]


def build(cls, **settings):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4))
    return cls(model, **{"lr": 0.1, **settings})


@pytest.mark.parametrize(("cls", "settings"), CASES, ids=lambda x: x.__name__ if isinstance(x, type) else str(x))
def test_one_line_with_field_and_value(cls, settings):
    if cls is HybridAuON and settings.get("ns_steps", 0) is None:
        pytest.skip("None is the variant's own number")
    (name, value) = next(iter(settings.items()))
    with pytest.raises(ValueError) as error:
        build(cls, **settings)
    said = str(error.value)
    assert "\n" not in said and re.search(rf"\b{name}\b", said), said
    shown = value if isinstance(value, dict) and value else [value]  # of a mapping, the pattern
    assert any(str(v) in said or repr(v) in said for v in shown), said


def test_every_setting_of_every_optimizer_is_tried():
    from trl_trust.optim.plug import declared_options

    for cls, options in OPTIONS.items():
        tried = options.keys() | (FISHER.keys() if cls is TRAMAdamW else set())
        declared = declared_options(cls).keys() | (declared_options(TRAM).keys() if cls is TRAMAdamW else set())
        assert declared - tried <= {"no_decay", "matrix_defaults", "params"}, cls.__name__


@pytest.mark.parametrize("lr", [torch.tensor(INF), torch.tensor(NAN), torch.tensor(-0.1), torch.ones(2)])
def test_a_tensor_as_learning_rate_is_looked_at(lr):
    with pytest.raises(ValueError, match="^lr[ =]"):
        build(AuON, lr=lr)


def test_the_auxiliary_learning_rate_is_named_and_a_tenth():
    with pytest.raises(ValueError, match="^aux_lr=-1.0 must be"):
        build(Muon, aux_lr=-1.0)
    for cls in (AuON, HybridAuON, Muon, FISMO):
        optimizer = build(cls, lr=0.5)
        assert [g["lr"] for g in optimizer.param_groups] == [0.5] + [0.05] * (len(optimizer.param_groups) - 1)
        embedding = optimizer.param_groups[1]["params"][0]
        embedding.grad = torch.ones_like(embedding)
        before = embedding.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - embedding.detach(), torch.full_like(before, 0.05))  # AdamW's first step


def test_groups_are_looked_at_as_settings_are():
    p = nn.Parameter(torch.ones(2, 2))
    for group in ({"lr": INF}, {"momentum": NAN}, {"eps": None}, {"rule": "adamw", "betas": 0.9}, {"split_sizes": 2}):
        with pytest.raises(ValueError, match=next(name for name in group if name != "rule")):
            AuON([{"params": [p], **group}], lr=0.1)


@pytest.mark.parametrize(("name", "near"), [("auonn", "auon"), ("mun", "muon"), ("tram_adam", "tram_adamw")])
def test_names_with_a_typo_get_a_near_match(name, near):
    from transformers import TrainingArguments

    said = f"did you mean '{near}'"
    with pytest.raises(KeyError, match=said):
        get_optimizer(name)
    with pytest.raises(ValueError, match=said):
        TrainingArguments(output_dir="unused", optim=name)


def test_a_base_with_a_typo_gets_a_near_match():
    with pytest.raises(ValueError, match="base='hybrid_auonn'.*did you mean 'hybrid_auon'"):
        build(TRAMAdamW, base="hybrid_auonn")
