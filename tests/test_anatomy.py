"""What is found inside a model is what the model computes with, in every family, below PEFT and beside images."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    GPT2Config,
    GraniteConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2VLConfig,
)

from trl_trust.anatomy import backbone, causal_lm, decoder_layers, embeddings, logit_transform, output_head, whole


TEXT = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=40,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CONFIGS = {
    "qwen2": Qwen2Config(**TEXT),
    "tied": Qwen2Config(**TEXT, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40),
    "mixtral": MixtralConfig(**TEXT, num_local_experts=2),
    "gemma2": Gemma2Config(**TEXT, head_dim=8, final_logit_softcapping=0.05),
    "cohere": CohereConfig(**TEXT, logit_scale=0.25),
    "granite": GraniteConfig(**TEXT, logits_scaling=4.0),
}
VISION = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2)  # as deep, and larger
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
MULTIMODAL = {
    "qwen2_vl": Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config=dict(depth=3, embed_dim=64, hidden_size=16, num_heads=2, patch_size=4),
    ),
    "gemma3": Gemma3Config(text_config={**TEXT, "head_dim": 8}, vision_config=VISION),
}


def build(name, peft=False):
    torch.manual_seed(0)
    if name in MULTIMODAL:
        model = AutoModelForImageTextToText.from_config(MULTIMODAL[name], dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32)
    return get_peft_model(model, LoraConfig(target_modules="all-linear")).eval() if peft else model.eval()


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", [*CONFIGS, *MULTIMODAL])
@torch.no_grad()
def test_backbone_head_and_transform_make_the_logits(name, peft):
    model = build(name, peft)
    ids = torch.randint(3, 40, (2, 6))
    hidden = backbone(model)(ids).last_hidden_state  # (B, T, d)
    scale, softcap = logit_transform(causal_lm(model).config.get_text_config())
    logits = output_head(model)(hidden) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    torch.testing.assert_close(logits, model(ids).logits)
    assert embeddings(model) == [causal_lm(model).get_input_embeddings(), output_head(model)]
    assert isinstance(causal_lm(model), PreTrainedModel)


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("name", [*CONFIGS, *MULTIMODAL])
def test_the_layers_are_the_ones_that_the_hidden_states_pass(name, peft):
    model = build(name, peft)
    layers, order = decoder_layers(model), []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: order.append(module))
    model(torch.randint(3, 40, (1, 4)))
    assert len(layers) == 3 and order == layers


def test_a_smaller_list_of_that_length_is_not_taken_for_the_layers():
    model = build("qwen2")
    layers = list(model.model.layers)
    model.model.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    layers[0].experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    assert decoder_layers(model) == layers


def test_no_layers():
    model = build("qwen2")
    model.config.num_hidden_layers = 5
    with pytest.raises(ValueError, match="Qwen2ForCausalLM has no list of 5 decoder layers"):
        decoder_layers(model)


def test_a_module_of_ones_own_has_none_of_it():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert causal_lm(model) is model
    assert backbone(model) is None and output_head(model) is None and embeddings(model) == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, (1.0, None)),
        ({"logit_scale": None, "final_logit_softcapping": 30.0}, (1.0, 30.0)),
        ({"logit_scale": 0.5}, (0.5, None)),
        ({"logits_scaling": 4.0}, (0.25, None)),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, (4.0, None)),
    ],
)
def test_the_transform_of_logits(config, expected):
    assert logit_transform(SimpleNamespace(**{"model_type": "other", **config})) == expected


def test_what_is_not_sharded_stays_itself():
    x = torch.ones(2)
    assert whole(x) is x and whole(None) is None
