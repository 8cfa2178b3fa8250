"""Compressing a model in place, measuring it, and leaving it as it was."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_trust.evaluation.compression import compressed, target_layers
from trl_trust.evaluation.compressors import rtn


@pytest.fixture
def model(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


def test_compressed_restores_every_bit_also_when_the_body_raises(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    layer = model.model.layers[0].mlp.up_proj
    with compressed(model, "rtn4"):
        assert torch.equal(layer.weight, rtn(before["model.layers.0.mlp.up_proj.weight"], 4))
        assert torch.equal(model.lm_head.weight, before["lm_head.weight"])
    with pytest.raises(RuntimeError, match="body"), compressed(model, "rtn2"):
        raise RuntimeError("body")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_target_layers_leave_out_head_and_tied_weights(model):
    names = set(target_layers(model))
    assert len(names) == 14 and not any("lm_head" in name or "embed" in name for name in names)
    model.model.layers[1].self_attn.q_proj.weight = model.model.layers[0].self_attn.q_proj.weight
    assert len(target_layers(model)) == 12


def test_unknown_method(model):
    with pytest.raises(ValueError, match="method='int4' is unknown"), compressed(model, "int4"):
        pass
