"""Distributions compared through hidden states: the same values and gradients as with the logits held whole."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_trust.policy import hidden as module
from trl_trust.policy.hidden import HiddenStates


def kl(student, teacher):
    student, teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    return (student.exp() * (student - teacher)).sum(-1)


def float64_model(path, bias=False):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    if bias:
        model.lm_head = torch.nn.Linear(16, model.config.vocab_size, bias=True, dtype=torch.float64)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_value_and_gradient_whatever_the_block(rows, bias, tiny_model_path, monkeypatch):
    model = float64_model(tiny_model_path, bias)
    monkeypatch.setattr(module, "BLOCK", rows * model.config.vocab_size)
    model.config.logit_scale, model.config.final_logit_softcapping = 3.0, 2.0
    reader, head = HiddenStates(model, temperature=0.7), model.lm_head
    g = torch.Generator().manual_seed(0)
    one, two = (torch.randn(10, 16, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    weights = torch.randn(10, generator=g, dtype=torch.float64)
    seen = []

    def watched(student, teacher):
        seen.append(student.shape)
        return kl(student, teacher)

    got = reader.compare(one, two, watched)
    parameters = [one, *head.parameters()]
    grads = torch.autograd.grad((got * weights).sum(), parameters)
    assert max(shape[0] for shape in seen) == min(rows, 10)
    assert sum(shape[0] for shape in seen) == 20  # forward and backward

    logits = lambda h, w, b: 2.0 * torch.tanh(3.0 * torch.nn.functional.linear(h, w, b) / 2.0) / 0.7
    constant = logits(two.detach(), head.weight.detach(), None if head.bias is None else head.bias.detach())
    expected = kl(logits(one, head.weight, head.bias), constant)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grads, torch.autograd.grad((expected * weights).sum(), parameters))


def test_nothing_to_compare_keeps_the_graph(tiny_model_path):
    model = float64_model(tiny_model_path)
    hidden = torch.randn(0, 16, dtype=torch.float64, requires_grad=True)
    out = HiddenStates(model).compare(hidden, hidden, kl)
    out.sum().backward()
    assert out.shape == (0,) and (model.lm_head.weight.grad == 0).all()


def test_a_frozen_head_gets_no_gradient(tiny_model_path):
    model = float64_model(tiny_model_path)
    model.lm_head.requires_grad_(False)
    hidden = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    HiddenStates(model).compare(hidden, torch.zeros_like(hidden), kl).sum().backward()
    assert model.lm_head.weight.grad is None and (hidden.grad != 0).any()


def test_half_precision_projects_to_float32(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.bfloat16)
    hidden = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    out = HiddenStates(model).compare(hidden, torch.zeros_like(hidden), kl)
    out.sum().backward()
    assert out.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    assert model.lm_head.weight.grad.dtype == torch.bfloat16
    full = HiddenStates(model, fp32_head=True).compare(hidden, torch.zeros_like(hidden), kl)
    expected = kl(hidden.float() @ model.lm_head.weight.float().t(), torch.zeros(4, model.config.vocab_size))
    torch.testing.assert_close(full, expected)


def test_reading_meets_the_states_that_predict_the_last_tokens(tiny_model_path):
    model, seen = AutoModelForCausalLM.from_pretrained(tiny_model_path), []
    reader = HiddenStates(model)
    ids = torch.randint(3, 50, (2, 9))
    with reader.reading(seen.append, 4):
        logits = model(ids).logits
    model(ids)  # read by nobody
    (hidden,) = seen
    torch.testing.assert_close(model.lm_head(hidden), logits[:, 4:8])
