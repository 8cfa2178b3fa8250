"""The tiny model, its warm start, and the evaluation of a policy."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import CausalLMOutput

from trl_trust.quickstart.model import build_model, build_start, warm_start
from trl_trust.quickstart.task import build_tokenizer, evaluate, problems


TINY = {"hidden_size": 16, "num_hidden_layers": 1}
TOKENIZER = build_tokenizer()


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_model_is_of_the_size_announced():
    assert 80_000 < sum(p.numel() for p in build_model(TOKENIZER).parameters()) < 100_000


def test_same_seed_same_bits_and_the_global_random_state_is_left_alone():
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(starts))
        before = torch.get_rng_state()
        model = build_model(TOKENIZER, **TINY, seed=seed)
        warm_start(model, TOKENIZER, steps=3, batch_size=4, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        starts.append(model)
    assert same_weights(starts[0], starts[1])
    assert not same_weights(starts[0], starts[2])


def test_warm_start_learns_the_demonstrations_and_reports_its_steps():
    def loss(model):
        inputs = TOKENIZER("47+86=7+6=13,4+8+1=13#133<eos>", return_tensors="pt")
        labels = inputs["input_ids"].clone()
        labels[:, :6] = -100
        with torch.no_grad():
            return model(**inputs, labels=labels).loss.item()

    model, seen = build_model(TOKENIZER, **TINY), []
    before = loss(model)
    warm_start(model, TOKENIZER, steps=60, batch_size=16, on_step=lambda *step: seen.append(step))
    assert seen == [(i + 1, 60) for i in range(60)]
    assert loss(model) < before - 1
    assert not model.training


def test_what_is_written_loads_as_the_same_model_and_tokenizer(tmp_path):
    path = build_start(tmp_path / "start", **TINY, steps=2, batch_size=4, seed=3)
    assert path == tmp_path / "start"
    expected = build_model(TOKENIZER, **TINY, seed=3)
    warm_start(expected, TOKENIZER, steps=2, batch_size=4, seed=3)
    assert same_weights(AutoModelForCausalLM.from_pretrained(path), expected)
    assert AutoTokenizer.from_pretrained(path).get_vocab() == TOKENIZER.get_vocab()


def scripted(text_of, noise=0.0):
    """A model that answers a prompt of six tokens with `text_of(prompt)`; each token is 0 with probability `noise`.

    The end token is certain. What is said after it must not count, so there it is made half end token, half 0.
    """
    model = build_model(TOKENIZER, **TINY)
    zero = TOKENIZER.convert_tokens_to_ids("0")

    def forward(input_ids, **kwargs):
        logits = torch.full((*input_ids.shape, len(TOKENIZER)), -30.0)
        for row, ids in enumerate(input_ids.tolist()):
            text = TOKENIZER(text_of(TOKENIZER.decode(ids[:6])))["input_ids"]
            for i, position in enumerate(range(5, len(ids))):  # the logits here are those of completion token i
                wrong = noise if i < len(text) else 0.0 if i == len(text) else 0.5
                if wrong:
                    logits[row, position, zero] = math.log(wrong)
                logits[row, position, text[i] if i < len(text) else TOKENIZER.eos_token_id] = math.log1p(-wrong)
        return CausalLMOutput(logits=logits)

    model.forward = forward
    model.generation_config.use_cache = False  # every call sees the whole sequence
    return model


def right(prompt):
    a, b = prompt.rstrip("=").split("+")
    return f"#{int(a) + int(b)}"


def test_a_policy_that_is_always_right_or_always_wrong_is_measured_so():
    held_out = problems("test", 4)
    perfect = evaluate(scripted(right), TOKENIZER, held_out, samples=2)
    assert (perfect["pass@1"], perfect["pass@2"], perfect["greedy"]) == (1.0, 1.0, 1.0)
    assert perfect["entropy"] == pytest.approx(0.0, abs=1e-9)
    assert "kl" not in perfect
    wrong = evaluate(scripted(lambda prompt: "#1"), TOKENIZER, held_out, samples=2)
    assert (wrong["pass@1"], wrong["pass@2"], wrong["greedy"]) == (0.0, 0.0, 0.0)


def test_entropy_and_kl_are_those_of_the_whole_distribution_over_live_tokens():
    held_out = problems("test", 4)
    texts = dict(zip(held_out["prompt"], ["#1", "#1", "#123", "#12345"], strict=True))  # some end before others
    p, q = 0.2, 0.1
    metrics = evaluate(
        scripted(texts.__getitem__, p), TOKENIZER, held_out, samples=4, reference=scripted(texts.__getitem__, q)
    )
    noisy = (2 + 2 + 4 + 6) / (3 + 3 + 5 + 7)  # the end token is live, and certain
    assert metrics["entropy"] == pytest.approx(noisy * (-p * math.log(p) - (1 - p) * math.log(1 - p)), rel=1e-5)
    kl = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert metrics["kl"] == pytest.approx(noisy * kl, rel=1e-5)


def test_evaluation_is_repeatable_and_leaves_model_and_random_state_as_they_were():
    model = build_model(TOKENIZER, **TINY).train()
    held_out = problems("test", 4)
    before = torch.get_rng_state()
    first = evaluate(model, TOKENIZER, held_out, samples=2, reference=model)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    torch.manual_seed(7)
    assert evaluate(model, TOKENIZER, held_out, samples=2, reference=model) == first
    assert first["kl"] == 0.0
    assert 0 < first["entropy"] < math.log(len(TOKENIZER))
