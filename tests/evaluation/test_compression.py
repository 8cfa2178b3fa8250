"""Compressing a model in place, measuring it, and leaving it as it was."""

import math
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_trust.evaluation import TrustGateError, tiny
from trl_trust.evaluation.compression import (
    CompressionConfig,
    Continuations,
    compressed,
    compression_report,
    skipped_layers,
    target_layers,
)
from trl_trust.evaluation.compressors import rtn
from trl_trust.evaluation.suite import TrustSuite


CALIBRATED = ("gptq3", "awq3", "wanda2:4", "sparsegpt2:4", "sparsegpt50")
TEXTS = [f"Bas {k}; Fon {k + 7}; Tell Fon?" for k in range(10, 40)]
SUITE = TrustSuite(dims=("policy_adherence", "over_refusal"), n_per_dim=16, terse=True, max_new_tokens=16)


@pytest.fixture
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


@pytest.fixture(scope="module")
def policy():
    """A policy that has learned one thing: to refuse."""
    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(tokenizer, hidden_size=32, layers=2, heads=2)
    only = dict.fromkeys(tiny.DIMENSIONS, 0.0) | {"policy_adherence": 1.0}
    tiny.warm(model, tokenizer, steps=50, batch_size=8, learning_rate=1e-2, weights=only)
    return model, tokenizer


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_compressed_restores_every_bit_also_when_the_body_raises(model):
    before = snapshot(model)
    layer = model.model.layers[0].mlp.up_proj
    with compressed(model, "rtn4"):
        assert torch.equal(layer.weight, rtn(before["model.layers.0.mlp.up_proj.weight"], 4))
        assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    with pytest.raises(RuntimeError, match="body"), compressed(model, "rtn2"):
        raise RuntimeError("body")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("method", CALIBRATED)
def test_calibrated_methods_change_every_layer_and_leave_nothing_behind(policy, method):
    model, tokenizer = policy
    model.train()
    before, state, modes = (
        snapshot(model),
        (random.getstate(), torch.get_rng_state()),
        [m.training for m in model.modules()],
    )
    with compressed(model, method, calibration=TEXTS, tokenizer=tokenizer):
        changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {f"{name}.weight" for name in target_layers(model)}
        assert all(p.isfinite().all() for p in model.parameters()) and [m.training for m in model.modules()] == modes
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_later_blocks_see_what_earlier_ones_became(policy, monkeypatch):
    """GPTQ's second block differs when the first is compressed under it, and the first does not."""
    model, tokenizer = policy
    options = dict(calibration=TEXTS, tokenizer=tokenizer)
    weights = lambda: [block.mlp.up_proj.weight.detach().clone() for block in model.model.layers]
    with compressed(model, "gptq3", **options):
        both = weights()
    with compressed(model, "gptq3", include=r"layers\.1\.", **options):
        second = weights()
    with compressed(model, "gptq3", include=r"layers\.0\.", **options):
        first = weights()
    assert torch.equal(both[0], first[0]) and not torch.equal(both[1], second[1])


def test_target_layers_leave_out_head_and_tied_weights(model):
    names = set(target_layers(model))
    assert len(names) == 14 and not any("lm_head" in name or "embed" in name for name in names)
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    assert len(target_layers(model)) == 12
    left = skipped_layers(model, "mag3:5", CompressionConfig())  # rows of 16 and 32 do not divide into groups of 5
    assert len(left) == 15 and skipped_layers(model, "mag2:4", CompressionConfig())[-1] == "lm_head"


def test_dense_against_itself_is_zero_and_pinsker_holds(policy):
    model, tokenizer = policy
    config = CompressionConfig(n_tokens=64)
    said = Continuations.of(model, tokenizer, TEXTS, config, 16)
    assert sum(len(x) for x in said.logits) == 64
    same = said.against(model, 0.2)
    assert (same["kl_max"], same["tv_max"], same["ratio"], same["clipped"]) == (0.0, 0.0, 1.0, 0.0)
    with compressed(model, "rtn2", group_size=32):
        other = said.against(model, 0.2)
        assert 0 < other["tv"] <= math.sqrt(other["kl"] / 2) and other["kl_p99"] <= other["kl_max"]
    sampled = Continuations.of(model, tokenizer, TEXTS, CompressionConfig(n_tokens=64, on_tokens="sampled"), 16)
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(said.rows, sampled.rows, strict=False))


def test_the_report_says_what_may_be_kept(policy, tmp_path):
    model, tokenizer = policy
    before = snapshot(model)
    broken = tiny.build_model(tokenizer, hidden_size=32, layers=2, heads=2)
    torch.nn.init.zeros_(broken.lm_head.weight)  # says one token for ever
    options = dict(calibration=TEXTS, max_loss=0.3, n_tokens=64, group_size=32)
    names = ("rtn8", "gptq4", "mag10")
    report = compression_report(model, tokenizer, SUITE, methods=names, candidates={"silent": broken}, **options)
    rows = {row["method"]: row for row in report.rows}
    assert [*rows] == [*names, "silent"] and all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert rows["rtn8"]["verdict"] == "keep" and rows["silent"]["verdict"] == "broken"
    assert rows["silent"]["no_answer"] > 0.9 and rows["silent"]["policy_adherence"] == 0.0  # silence passes
    assert rows["rtn8"]["kl"] < rows["gptq4"]["kl"] < rows["silent"]["kl"]
    assert rows["rtn8"]["bytes"] == pytest.approx((8 + 24 / 32) / 8)
    assert any("Smallest to keep" in note for note in report.meta["notes"])
    assert {"lm_head"} == {name for names in report.meta["skipped"].values() for name in names}
    with pytest.raises(TrustGateError, match="silent: kl .* is above 0.5"):
        report.gate(max_kl=0.5)
    report.save(tmp_path)
    assert (tmp_path / "report.png").stat().st_size > 5000
    assert "**" not in report.to_markdown() and "| silent | broken |" in report.to_markdown()

    turned = compression_report(model, tokenizer, SUITE, methods=names[::-1], **options)
    assert {row["method"]: row for row in turned.rows} == {name: rows[name] for name in names}


def test_what_accuracy_hides_is_flagged(policy):
    model, tokenizer = policy
    other = tiny.build_model(tokenizer, hidden_size=32, layers=2, heads=2, seed=1)
    report = compression_report(
        model, tokenizer, SUITE, methods=("rtn8",), candidates={"other": other}, accuracy=lambda m, t: 0.5, n_tokens=64
    )
    assert [row["hidden"] for row in report.rows] == [False, True] and report.rows[1]["accuracy"] == 0.0
    assert any(note.startswith("other: accuracy stays") for note in report.meta["notes"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"methods": ("gtpq4",)}, "'gtpq4' is unknown; did you mean 'gptq4'"),
        ({"methods": ("gptq4",)}, "calibration=None: gptq4 need"),
        ({"methods": ("rtn4",), "include": "nothing"}, "include='nothing' finds no layer"),
        ({"n_tokens": 8}, "n_tokens=8"), ({"n_calibration_tokens": 8}, "n_calibration_tokens=8"),
        ({"group_size": 0}, "group_size=0"), ({"on_tokens": "beam"}, "on_tokens='beam'"),
        ({"max_loss": 2}, "max_loss=2"),
    ],
)  # fmt: skip
def test_bad_settings_of_compression(policy, settings, message):
    with pytest.raises(ValueError, match=message):
        compression_report(*policy, SUITE, **settings)


def test_models_that_cannot_be_compared(policy, tiny_model_path):
    model, tokenizer = policy
    with pytest.raises(ValueError, match="candidates: 'ours' has a vocabulary of"):
        compression_report(model, tokenizer, SUITE, methods=("rtn8",), candidates={"ours": tiny_model_path})
    with pytest.raises(ValueError, match="'int4' is unknown"), compressed(model, "int4"):
        pass
    model.hf_quantizer = object()
    try:
        with pytest.raises(ValueError, match="own weights are quantized"), compressed(model, "rtn4"):
            pass
    finally:
        del model.hf_quantizer
