"""The sampler draws from the model's own distribution, and says with which probability."""

import pytest
import torch

from trl_trust.tasks import get_task
from trl_trust.tasks.base import build_tokenizer
from trl_trust.tasks.sampling import sample
from trl_trust.tasks.start import build_model, build_start, cached_start


TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def model():
    return build_model(TOKENIZER, hidden_size=16, num_hidden_layers=2).eval()


def prompts(*texts):
    return TOKENIZER(list(texts), return_tensors="pt", padding=True)


def test_greedy_is_what_generate_decodes(model):
    inputs = prompts("47+86=", "12+3=", "1+1=")  # padded on the left
    drawn = sample(model, **inputs, max_new_tokens=9)
    expected = model.generate(**inputs, max_new_tokens=9, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(drawn.ids, expected)


@pytest.mark.parametrize("texts", [("47+86=", "12+34="), ("47+86=", "1+1=")])
def test_logps_and_entropies_are_those_of_a_forward(model, texts):
    inputs = prompts(*texts)
    drawn = sample(model, **inputs, samples=5, max_new_tokens=12, generator=torch.Generator().manual_seed(0))
    assert drawn.ids.shape[0] == 10
    full = torch.full((*drawn.ids.shape, len(TOKENIZER)), 0.0)
    full[drawn.mask] = drawn.next_token_logps(model).detach()
    logps = full.gather(2, drawn.ids[:, :, None]).squeeze(2)
    torch.testing.assert_close(drawn.logps[drawn.mask], logps[drawn.mask], atol=1e-5, rtol=1e-5)
    entropies = -(full.exp() * full).sum(-1)
    torch.testing.assert_close(drawn.entropies[drawn.mask], entropies[drawn.mask], atol=1e-5, rtol=1e-5)


def test_without_a_cache_the_same_is_drawn(model):
    inputs = prompts("47+86=", "1+1=")
    how = dict(samples=3, max_new_tokens=7)
    drawn = sample(model, **inputs, **how, generator=torch.Generator().manual_seed(0))
    model.generation_config.use_cache = False
    try:
        again = sample(model, **inputs, **how, generator=torch.Generator().manual_seed(0))
    finally:
        model.generation_config.use_cache = True
    assert torch.equal(drawn.ids, again.ids)


def test_tokens_come_as_often_as_the_model_says(model):
    inputs, n = prompts("47+86="), 40_000
    drawn = sample(model, **inputs, samples=n, max_new_tokens=1, generator=torch.Generator().manual_seed(0))
    frequency = torch.bincount(drawn.ids[:, 0], minlength=len(TOKENIZER)) / n
    with torch.no_grad():
        p = model(**inputs).logits[0, -1].softmax(-1)
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_noise_on_the_logits_is_in_the_logps_and_of_the_size_asked(model):
    inputs, n = prompts("47+86="), 20_000
    how = dict(samples=n, max_new_tokens=1)
    clean = sample(model, **inputs, **how, generator=torch.Generator().manual_seed(0))
    noisy = sample(model, **inputs, **how, generator=torch.Generator().manual_seed(0), logit_noise=0.1)
    same = clean.ids == noisy.ids
    assert same.float().mean() > 0.5  # the same numbers are turned into tokens; by chance it would be 1 in 56
    # sd of logit minus log-sum-exp: nearly that of the logit alone, with many tokens
    assert (noisy.logps - clean.logps)[same].std().item() == pytest.approx(0.1, rel=0.1)


def test_what_follows_the_end_is_padding_and_does_not_count(model):
    inputs = prompts("47+86=")
    drawn = sample(model, **inputs, samples=400, max_new_tokens=6, generator=torch.Generator().manual_seed(1))
    ended = (drawn.ids == TOKENIZER.eos_token_id).any(1)
    assert ended.any()
    for ids, mask in zip(drawn.ids[ended], drawn.mask[ended], strict=True):
        end = ids.tolist().index(TOKENIZER.eos_token_id)
        assert mask.tolist() == [i <= end for i in range(len(ids))]
        assert (ids[end + 1 :] == TOKENIZER.pad_token_id).all()


def test_a_start_is_built_once_for_its_seed_and_options(monkeypatch, tmp_path):
    monkeypatch.setenv("TRL_TRUST_CACHE", str(tmp_path))
    tiny = {"hidden_size": 16, "num_hidden_layers": 1, "steps": 2, "batch_size": 4}
    first = cached_start("sudoku", 3, **tiny)
    weights = first / "model.safetensors"
    before = weights.stat().st_mtime_ns
    assert cached_start(get_task("sudoku"), 3, **tiny) == first
    assert weights.stat().st_mtime_ns == before
    others = [cached_start("sudoku", 4, **tiny), cached_start("addition", 3, **tiny)]
    others.append(cached_start("sudoku", 3, **{**tiny, "steps": 3}))
    assert len({first, *others}) == 4
    again = build_start(tmp_path / "again", task="sudoku", seed=3, **tiny)
    assert (again / "model.safetensors").read_bytes() == weights.read_bytes()
    assert sorted(path.name for path in first.parent.iterdir()) == ["3", "4"]  # nothing half-built is left
