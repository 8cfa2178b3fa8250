"""The suite on a real model: nothing is left behind, and what cannot work is said in one line."""

import random
import warnings

import numpy as np
import pytest
import torch

from trl_trust.evaluation import tiny
from trl_trust.evaluation.generation import generate, render
from trl_trust.evaluation.suite import TrustSuite, run_trust_suite


@pytest.fixture(scope="module")
def policy():
    tokenizer = tiny.build_tokenizer()
    return tiny.build_model(tokenizer, hidden_size=16, layers=1, heads=2), tokenizer


SMALL = TrustSuite(dims=("truthfulness", "privacy"), n_per_dim=8, terse=True, max_new_tokens=8, batch_size=5)


def test_a_report_of_a_model_and_nothing_left_behind(policy):
    model, tokenizer = policy
    model.train()
    model.model.layers[0].eval()  # a mixture of modes comes back as it was
    modes = [module.training for module in model.modules()]
    model(torch.tensor([[5]])).logits.sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    side, config = tokenizer.padding_side, model.generation_config.to_dict()
    seen = []
    report = run_trust_suite(model, tokenizer, SMALL, on_batch=lambda done, total: seen.append((done, total)))
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, model.parameters(), strict=True))
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[:2]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert (tokenizer.padding_side, model.generation_config.to_dict()) == (side, config)
    assert [score.name for score in report.scores] == [
        "truthfulness", "privacy", "privacy/disclosed", "privacy/withheld"
    ]  # fmt: skip
    assert report["truthfulness"].value == 0.0 and report["truthfulness"].no_answer == 1.0 and report["privacy"].n == 8
    assert seen[-1] == (16, 16) and report.meta["items"] == 16
    assert "honesty (not asked)" in report.meta["not_measured"]


def test_batches_do_not_change_an_output(policy):
    model, tokenizer = policy
    items = [item.messages for slots in SMALL.items("truthfulness") for item in slots]
    one = generate(model, tokenizer, items, batch_size=1, max_new_tokens=8)
    assert generate(model, tokenizer, items, batch_size=8, max_new_tokens=8) == one


def test_without_a_chat_template_plain_text_and_one_warning(policy):
    model, tokenizer = policy[0], tiny.build_tokenizer()
    tokenizer.chat_template = None
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(model, tokenizer, [messages] * 3, max_new_tokens=8)
    assert [str(w.message)[:34] for w in caught if "template" in str(w.message)] == [
        "the tokenizer has no chat template"
    ]
    with pytest.warns(UserWarning, match="no chat template"):
        assert render(tokenizer, messages) == "system: be\nuser: hi\nassistant:"


def test_a_tokenizer_that_cannot_write_the_protocol_is_named(tiny_model_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)  # of the addition task: no capitals
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    with pytest.raises(ValueError, match="cannot write the protocol's line: 'ANSWER: 42' comes back as"):
        run_trust_suite(model, tokenizer, SMALL)


def test_demonstrations_pass_and_restate_what_they_read(policy):
    from trl_trust.evaluation.dimensions import DIMENSIONS
    from trl_trust.evaluation.items import passed

    suite, tokenizer = TrustSuite(terse=True), policy[1]
    for name in DIMENSIONS:
        for slots in suite.items(name, 24, split="train"):
            for item in slots:
                said = tiny.demonstrate(item)
                assert passed(item, said), (item, said)
                assert tokenizer.decode(tokenizer(said)["input_ids"]) == said
                assert name == "policy_adherence" or not passed(item, tiny.demonstrate(item, item.wrong)), item


def test_the_tokenizer_comes_back_from_disk_as_it_was(policy, tmp_path):
    from transformers import AutoTokenizer

    model, tokenizer = policy
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = tiny.CHARACTERS + "  a  b\n\nI'll 123<eos>"
    back = AutoTokenizer.from_pretrained(tmp_path)
    assert back(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert back.decode(back(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"]) == text
    messages = [{"role": "system", "content": "a b"}, {"role": "user", "content": "c"}]
    assert render(back, messages) == render(tokenizer, messages) == "a b\nc\n>"
