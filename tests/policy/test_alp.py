"""ALP against its spec: worked numbers (section 7), invariants (section 6), the noise, then real runs."""

import logging
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import (
    loss_and_grad,
    masked_mean,
    on_two_processes,
    parameter_gap,
    policy_batch,
    random_policy_batch,
    tiny_config,
    tiny_run,
    tiny_trainer,
)
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig, Qwen2Config
from trl import GRPOConfig, GRPOTrainer

from trl_trust.anatomy import decoder_layers
from trl_trust.policy.alp import ALPConfig, ALPTrainer, alp_loss
from trl_trust.policy.base import grpo_loss
from trl_trust.policy.noise import LayerNoise, _AddNoise, noise_seed
from trl_trust.quickstart.task import problems


seeds = st.integers(0, 10_000)
MODES = ["token", "sequence", "geometric", "cumulative"]
modes = st.sampled_from(MODES)


def f64(x):
    return torch.as_tensor(x, dtype=torch.float64)


# -- worked numbers: loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("mode", "ratio", "loss", "grad"),
    [
        ("token", (1.221403, 0.904837, 0.606531), -0.910924, (-0.407134, -0.301612, -0.202177)),
        ("sequence", (0.670320,) * 3, -0.670320, (-0.223440,) * 3),
        ("geometric", (0.875173,) * 3, -0.875173, (-0.291724,) * 3),
        ("cumulative", (1.221403, 1.105171, 0.670320), -0.998965, (-0.407134, -0.368390, -0.223440)),
    ],
)
def test_ratio_modes(mode, ratio, loss, grad, sign):
    batch = policy_batch(logps=[[-1.0, -0.5, -2.0]], old_logps=[[-1.2, -0.4, -1.5]], advantages=[sign])
    got, got_grad, out = loss_and_grad(alp_loss, batch, ratio_mode=mode)
    torch.testing.assert_close(out.metrics["alp/ratio/max"].detach(), f64([ratio]), atol=1e-6, rtol=0)
    assert got.item() == pytest.approx(sign * loss, abs=1e-6)
    torch.testing.assert_close(got_grad, sign * f64([grad]), atol=1e-6, rtol=0)


def test_a_masked_token_is_not_in_the_sequence():
    batch = policy_batch(logps=[[-1.0, -0.5, -2.0]], old_logps=[[-1.2, -0.4, -1.5]], advantages=[1], mask=[[1, 1, 0]])
    loss, grad, _ = loss_and_grad(alp_loss, batch)
    assert loss.item() == pytest.approx(-1.105171, abs=1e-6)
    torch.testing.assert_close(grad, f64([[-0.552585, -0.552585, 0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "loss", "grad"),
    [
        (0.3, 1, 3, -0.3, -0.3),
        (3.5, 1, 3, -3.5, -3.5),
        (5.0, 1, 3, -4.0, 0),
        (0.3, -1, 3, 0.5, 0),
        (3.5, -1, 3, 3.0, 0),
        (5.0, -1, 3, 3.0, 0),
        (0.3, -1, 10, 0.5, 0),
        (3.5, -1, 10, 3.5, 3.5),
        (5.0, -1, 10, 5.0, 5.0),
    ],
)
def test_clip_table(ratio, advantage, dual_clip, loss, grad):
    for mode in MODES:
        batch = policy_batch(logps=[[-1.0]], ratio=[[ratio]], advantages=[advantage])
        got, got_grad, out = loss_and_grad(alp_loss, batch, ratio_mode=mode, dual_clip=dual_clip)
        assert got.item() == pytest.approx(loss) and got_grad.item() == pytest.approx(grad)
        stopped = sum(out.metrics[f"alp/clip_ratio/{x}"].item() for x in ("low", "high", "dual"))
        assert stopped == (1.0 if grad == 0 else 0.0)


# -- invariants of the loss -------------------------------------------------------------------------------------------


@given(seeds, modes)
def test_at_the_anchor_it_is_grpo(seed, mode):  # 1
    batch = random_policy_batch(seed)
    batch = replace(batch, old_logps=batch.logps.detach())
    _, grad, _ = loss_and_grad(alp_loss, batch, ratio_mode=mode)
    torch.testing.assert_close(grad, -batch.advantages * batch.mask / batch.mask.sum())
    torch.testing.assert_close(grad, loss_and_grad(grpo_loss, batch)[1])


@given(seeds, modes)
def test_without_advantage_nothing_is_learned(seed, mode):  # 5
    batch = replace(random_policy_batch(seed), advantages=torch.zeros(4, 1, dtype=torch.float64))
    loss, grad, _ = loss_and_grad(alp_loss, batch, ratio_mode=mode)
    assert loss == 0 and (grad == 0).all()


@given(seeds, st.sampled_from([1.5, 3.0, None]))
def test_one_token_responses_make_the_modes_equal(seed, dual_clip):  # 6
    batch = random_policy_batch(seed, T=1, spread=2.0)
    token, *others = (loss_and_grad(alp_loss, batch, ratio_mode=m, dual_clip=dual_clip) for m in MODES)
    for loss, grad, _ in others:
        torch.testing.assert_close(loss, token[0])
        torch.testing.assert_close(grad, token[1])


@given(seeds, modes)
def test_masked_inputs_change_nothing(seed, mode):  # 7
    batch = random_policy_batch(seed)
    batch = replace(batch, sampling_logps=batch.old_logps - 0.05)
    live = batch.mask > 0
    other = replace(
        batch,
        logps=torch.where(live, batch.logps.detach(), -5.0).requires_grad_(),
        old_logps=torch.where(live, batch.old_logps, -0.1),
        sampling_logps=torch.where(live, batch.sampling_logps, torch.nan),
    )
    one, two = (loss_and_grad(alp_loss, b, ratio_mode=mode) for b in (batch, other))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert one[2].metrics["alp/ratio/p98"] == two[2].metrics["alp/ratio/p98"]


@given(seeds, modes, st.floats(1.01, 5.0))
def test_the_ceiling(seed, mode, dual_clip):  # 8
    batch = random_policy_batch(seed, spread=3.0)
    out = alp_loss(batch, ratio_mode=mode, dual_clip=dual_clip)
    negative = batch.advantages < 0
    ceiling = (-batch.advantages * dual_clip).expand_as(batch.mask)
    assert (out.per_token_loss <= ceiling + 1e-12)[negative.squeeze(1)].all()
    _, grad, _ = loss_and_grad(alp_loss, batch, ratio_mode=mode, dual_clip=dual_clip)
    assert (grad[out.metrics["alp/clip_ratio/dual"] > 0] == 0).all()
    without = alp_loss(batch, ratio_mode=mode, dual_clip=None).per_token_loss
    assert torch.equal(out.per_token_loss[~negative.squeeze(1)], without[~negative.squeeze(1)])


@given(seeds, st.floats(0, 1), st.floats(0, 3), st.floats(0, 3))
def test_a_high_ceiling_is_two_sided_clipping(seed, epsilon, epsilon_high, more):  # 9
    batch = random_policy_batch(seed, spread=2.0)
    widths = dict(epsilon=epsilon, epsilon_high=epsilon_high)
    dual_clip = max(1 + epsilon_high + more, 1.001)
    ours = loss_and_grad(alp_loss, batch, ratio_mode="token", dual_clip=dual_clip, **widths)
    trl = loss_and_grad(grpo_loss, batch, delta=dual_clip, **widths)
    torch.testing.assert_close(ours[0], trl[0])
    torch.testing.assert_close(ours[1], trl[1])


def test_a_low_ceiling_is_not():  # 9
    batch = policy_batch(logps=[[-1.0]], ratio=[[3.5]], advantages=[-1.0])
    ours = loss_and_grad(alp_loss, batch, ratio_mode="token")
    trl = loss_and_grad(grpo_loss, batch, epsilon=0.5, epsilon_high=3.0, delta=3.0)
    assert ours[0] == pytest.approx(3.0) and trl[0] == pytest.approx(3.5)  # TRL caps the unclipped branch alone


def test_unscored_tokens_fall_back_to_the_old_policy():
    batch = random_policy_batch(5, masked=False)
    sampling = batch.old_logps - 0.3
    sampling[0, 1] = torch.nan
    mixed = replace(batch, sampling_logps=sampling)
    expected = replace(batch, old_logps=torch.where(sampling.isnan(), batch.old_logps, sampling))
    for mode in MODES:
        one, two = (loss_and_grad(alp_loss, b, ratio_mode=mode)[1] for b in (mixed, expected))
        assert torch.equal(one, two)


def test_metrics_of_the_tail():
    batch = policy_batch(logps=[[-1.0] * 100], ratio=[[(i + 1) / 50 for i in range(100)]], advantages=[-1.0])
    metrics = alp_loss(batch, ratio_mode="token", epsilon=0.5, dual_clip=1.5).metrics
    assert metrics["alp/ratio/p02"].item() == pytest.approx(3 / 50)
    assert metrics["alp/ratio/p98"].item() == pytest.approx(98 / 50)
    assert masked_mean(metrics["alp/clip_ratio/low"], batch.mask) == pytest.approx(0.24)
    assert masked_mean(metrics["alp/clip_ratio/dual"], batch.mask) == pytest.approx(0.25)


# -- the noise --------------------------------------------------------------------------------------------------------


def test_toy_head(monkeypatch):
    """Worked numbers of section 7: a perturbed hidden state and its gradient by the logarithm of the scale."""
    head, eps = f64([[1, 0], [0, 1], [0.5, -0.5]]), f64([[1.0, -2.0]])
    monkeypatch.setattr(_AddNoise, "draw", staticmethod(lambda like, seed: eps.clone()))
    hidden, rho = f64([[0.2, -0.1]]), f64(0.1).log().requires_grad_()
    clean = torch.log_softmax(hidden @ head.T, -1)[0]
    perturbed = torch.log_softmax(_AddNoise.apply(hidden, rho, 0) @ head.T, -1)[0]
    torch.testing.assert_close(clean, f64([-0.990302, -1.290302, -1.040302]), atol=1e-6, rtol=0)
    torch.testing.assert_close(perturbed.detach(), f64([-0.935627, -1.535627, -0.935627]), atol=1e-6, rtol=0)
    by_rho = [torch.autograd.grad(p, rho, retain_graph=True)[0].item() for p in perturbed]
    assert by_rho == pytest.approx([0.044979, -0.255021, 0.094979], abs=1e-6)


def test_mean_over_the_noise():
    """Section 7: second order, -sigma^2 / 2 trace Cov(W), and quadrature, for every token."""
    head, hidden, sigma = f64([[1, 0], [0, 1], [0.5, -0.5]]), f64([0.2, -0.1]), 0.1
    # Gauss-Hermite for the standard normal, by the eigenvalues of its Jacobi matrix (Golub and Welsch)
    nodes, vectors = torch.linalg.eigh(
        torch.diag(f64(range(1, 20)).sqrt(), 1) + torch.diag(f64(range(1, 20)).sqrt(), -1)
    )
    weights = vectors[0].square()
    eps = torch.cartesian_prod(nodes, nodes)  # (400, 2)
    weight = torch.cartesian_prod(weights, weights).prod(-1)
    noisy = torch.log_softmax((hidden + sigma * eps) @ head.T, -1)
    mean = (weight[:, None] * noisy).sum(0) - torch.log_softmax(hidden @ head.T, -1)
    torch.testing.assert_close(mean, f64([-0.0025628] * 3), atol=1e-7, rtol=0)
    p = torch.softmax(hidden @ head.T, -1)
    spread = (p[:, None] * head.square()).sum() - (p @ head).square().sum()
    assert (-(sigma**2) / 2 * spread).item() == pytest.approx(-0.0025658, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_noise_is_drawn_and_added_in_float32(dtype):
    hidden = torch.randn(2, 3, 8, dtype=dtype)
    noisy = _AddNoise.apply(hidden, torch.tensor(0.3).log(), 7)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(7), dtype=exact)
    torch.testing.assert_close(noisy, (hidden.to(exact) + 0.3 * eps).to(dtype))
    assert noisy.dtype == dtype
    big = _AddNoise.apply(torch.zeros(1, 200, 500), torch.tensor(0.3).log(), 8)
    assert big.mean().item() == pytest.approx(0, abs=0.005) and big.std().item() == pytest.approx(0.3, rel=0.01)


@pytest.mark.parametrize("keeps", [("cpu",), ()], ids=["kept", "drawn again"])
def test_gradient_by_finite_differences(monkeypatch, keeps):
    monkeypatch.setattr(_AddNoise, "keeps", keeps)
    hidden = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    rho = f64(-1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda h, r: _AddNoise.apply(h, r, 3).sin(), (hidden, rho))


def test_seeds_do_not_collide():
    keys = list(product(range(2), range(6), range(4), range(8), range(40)))  # (seed, step, micro-step, rank, layer)
    assert len({noise_seed(*key) for key in keys}) == len(keys)
    assert len({noise_seed(*key) & 0xFFFFFFFF for key in keys}) > 0.9999 * len(keys)  # what a CPU generator keeps
    assert all(0 <= noise_seed(*key) < 2**63 for key in keys[:50])
    assert noise_seed(0, 1, 2, 3, 4) == noise_seed(0, 1, 2, 3, 4)


SMALL = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, vocab_size=40)
TOWERS = {
    "qwen2": Qwen2Config(**SMALL, num_hidden_layers=3),
    "gpt2": GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40),
    "mixtral": MixtralConfig(**SMALL, num_hidden_layers=3, num_local_experts=2),
}


def test_no_layers_no_noise(tiny_model_path, monkeypatch):
    def none(model):
        raise ValueError("Strange has no list of 2 decoder layers")

    monkeypatch.setattr("trl_trust.policy.alp.decoder_layers", none)
    with pytest.raises(ValueError, match="perturbation_sigma=0.01: Strange has no list.*set it to 0"):
        tiny_trainer(ALPTrainer, tiny_model_path, tiny_config(ALPConfig))


def noisy_model(config=TOWERS["qwen2"], sigma=0.1, indices=None, learn=True):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    layers = decoder_layers(model)
    return model, LayerNoise(layers, range(len(layers)) if indices is None else indices, sigma, learn, device="cpu")


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS)
def test_the_key_determines_the_noise(config):  # 3
    model, noise = noisy_model(config)
    ids = torch.randint(0, 40, (2, 5))

    def logits(*key):
        noise.on(*key)
        return model(ids).logits

    first = logits(0, 1, 0, 0)
    assert torch.equal(first, logits(0, 1, 0, 0))
    for other in ((1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1)):
        assert (first - logits(*other)).abs().max() > 1e-4
    noise.off()
    clean = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    clean.load_state_dict(model.state_dict())
    assert torch.equal(model(ids).logits, clean(ids).logits)  # 2


def test_gradient_of_the_scales():  # 4
    """sigma <eps, d loss / d h>, layer by layer, against a finite difference through the whole model."""
    model, noise = noisy_model()
    model.double()
    ids = torch.randint(0, 40, (2, 5))

    def loss():
        noise.on(0, 0, 0, 0)
        return torch.log_softmax(model(ids).logits, -1)[..., 7].sum()

    (grad,) = torch.autograd.grad(loss(), noise.log_sigma)
    for k in range(3):
        values = []
        for step in (1e-3, -1e-3):  # the scales are float32
            noise.log_sigma.data[k] += step
            values.append(loss().item())
            noise.log_sigma.data[k] -= step
        assert grad[k].item() == pytest.approx((values[0] - values[1]) / 2e-3, rel=1e-2, abs=1e-4)
    assert len(set(grad.tolist())) == 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_noise_is_replayed_when_a_checkpointed_layer_is_made_again(use_reentrant):  # 3
    """Hooks inside the checkpoint, as transformers before 5.20 and FSDP's wrapper have it."""
    layers = torch.nn.ModuleList(torch.nn.Linear(6, 6) for _ in range(3))
    noise = LayerNoise(layers, range(3), 0.5, True, device="cpu")
    hidden = torch.randn(2, 6, requires_grad=True)

    def run(make_again):
        noise.on(0, 3, 1, 0)
        h = hidden
        for layer in layers:
            h = checkpoint(layer, h, use_reentrant=use_reentrant) if make_again else layer(h)
        loss = h.square().sum()
        for p in (*layers.parameters(), noise.log_sigma, hidden):
            p.grad = None
        loss.backward()
        noise.off()
        return loss.detach(), [p.grad.clone() for p in (*layers.parameters(), noise.log_sigma, hidden)]

    plain, again = run(False), run(True)
    assert torch.equal(plain[0], again[0])
    for one, two in zip(plain[1], again[1], strict=True):
        assert torch.equal(one, two)


def test_layers_draw_independently():
    layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(2))
    noise = LayerNoise(layers, [0, 1], 1.0, False, device="cpu")
    noise.on(0, 0, 0, 0)
    one, two = (layer(torch.zeros(10, 100, 10)) for layer in layers)
    assert (one * two).mean().abs() < 0.05  # five standard errors


def test_only_the_chosen_layers_are_perturbed():
    model, noise = noisy_model(indices=[2])
    seen = []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    ids = torch.randint(0, 40, (1, 4))
    model(ids)
    noise.on(0, 0, 0, 0)
    model(ids)
    assert torch.equal(seen[0], seen[3]) and torch.equal(seen[1], seen[4]) and not torch.equal(seen[2], seen[5])
    assert len(noise.log_sigma) == 1


def test_hidden_states_by_name():
    class Layer(torch.nn.Module):
        def forward(self, other=None, hidden_states=None):
            return hidden_states

    layer = Layer()
    noise = LayerNoise([layer], [0], 1.0, False, device="cpu")
    noise.on(0, 0, 0, 0)
    hidden = torch.zeros(2, 3)
    assert layer(hidden_states=hidden).abs().min() > 0


# -- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturbation_sigma": -1e-3}, "must be a finite number >= 0"),
        ({"perturbation_sigma": math.inf}, "must be a finite number >= 0"),
        ({"sigma_learning_rate": 0.0}, "must be a finite number > 0"),
        ({"perturbation_layers": [1, 1]}, "must name each layer once"),
        ({"perturbation_layers": []}, "perturbation_sigma=0 is none"),
        ({"sigma_max": 0.0}, "must be a finite number > 0"),
        ({"sigma_max": 1e-3}, "at least perturbation_sigma=0.01"),
        ({"epsilon_high": -0.1}, "must be a number >= 0"),
        ({"dual_clip": 1.0}, "must be a finite number > 1, or None"),
        ({"delta": 4.0}, "use `dual_clip`"),
        ({"importance_sampling_level": "sequence"}, "use `ratio_mode`"),
        ({"loss_type": "cispo"}, "aggregation only"),
    ],
)
def test_bad_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_config(ALPConfig, **settings)
    name, value = list(settings.items())[-1]
    assert name in str(error.value) and str(value) in str(error.value)


def test_bypass_has_nothing_to_learn_and_needs_stale_rollouts():
    bypass = tiny_config(ALPConfig, perturbation_sigma=0)
    assert bypass.learn_sigma is False and bypass.needs_stale_rollouts
    assert not tiny_config(ALPConfig).needs_stale_rollouts


def test_a_grpo_config_takes_the_defaults_of_the_method():
    args = ALPConfig.from_grpo_config(tiny_config(GRPOConfig))
    assert (args.epsilon, args.epsilon_high, args.dual_clip) == (0.5, 3.0, 3.0)
    assert ALPConfig.from_grpo_config(tiny_config(GRPOConfig, epsilon=0.1)).epsilon == 0.1


@pytest.mark.parametrize("layers", [[2], [-3], [0, -2]])
def test_layers_that_the_model_does_not_have(tiny_model_path, tmp_path, layers):
    args = tiny_config(ALPConfig, tmp_path, perturbation_layers=layers)
    with pytest.raises(ValueError, match="must name different layers of 2, from -2 to 1"):
        tiny_trainer(ALPTrainer, tiny_model_path, args)


# -- real runs --------------------------------------------------------------------------------------------------------


def alp_run(path, folder, trainer_class=ALPTrainer, **settings):
    kwargs = {"peft_config": settings.pop("peft_config", None)}
    return tiny_run(trainer_class, path, tiny_config(ALPConfig, folder, **settings), **kwargs)


def entries(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("settings", [{}, {"delta": 4.0, "epsilon_high": 1.0}], ids=["clipped", "two-sided"])
def test_the_bypass_trains_exactly_as_grpo(tiny_model_path, tmp_path, settings):  # 1, 9
    stock = tiny_run(GRPOTrainer, tiny_model_path, tiny_config(GRPOConfig, tmp_path / "a", **settings))
    widths = dict(epsilon=0.2, epsilon_high=settings.get("epsilon_high", 0.2), dual_clip=settings.get("delta"))
    ours = alp_run(tiny_model_path, tmp_path / "b", perturbation_sigma=0, ratio_mode="token", **widths)
    assert parameter_gap(ours.model, stock.model) == 0.0
    assert parameter_gap(ours.model, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 1e-3


def test_the_noise_makes_the_ratio_live_on_fresh_rollouts(tiny_model_path, tmp_path):
    """TRL leaves old log-probabilities out here, and every ratio would be 1."""
    settings = dict(steps_per_generation=1, max_steps=3, perturbation_sigma=0.3, sigma_learning_rate=0.05)
    trainer = alp_run(tiny_model_path, tmp_path, **settings)
    log = entries(trainer)
    assert all(entry["trust/ratio/max"] > 1.001 and entry["alp/kl/perturbed"] > 1e-6 for entry in log)
    assert log[0]["alp/sigma/mean"] == pytest.approx(0.3) and log[2]["alp/sigma/max"] != log[2]["alp/sigma/min"]
    for name in ("clip_ratio/low", "clip_ratio/high", "clip_ratio/dual", "ratio/p02", "ratio/p98", "ratio/max"):
        assert math.isfinite(log[2][f"alp/{name}"])


def test_the_clean_divergence_is_logged_before_the_first_update_only(tiny_model_path, tmp_path):
    log = entries(alp_run(tiny_model_path, tmp_path, max_steps=8, perturbation_sigma=0.1))
    measured = [entry["alp/kl/perturbed"] is not None for entry in log]
    assert measured == [True, False, False, False] * 2


def test_generation_old_logps_evaluation_and_reference_are_clean(tiny_model_path, tmp_path):
    """With updates of size 0, what is stored is what stock TRL stores for the unperturbed model, to the bit."""
    settings = dict(perturbation_sigma=0.5, learning_rate=0.0, beta=0.1, sigma_learning_rate=0.1, max_steps=5)
    args = tiny_config(ALPConfig, tmp_path / "a", per_device_eval_batch_size=4, **settings)
    noisy = tiny_trainer(ALPTrainer, tiny_model_path, args, eval_dataset=problems("test", 4))
    noisy.train()
    stock_args = tiny_config(GRPOConfig, tmp_path / "b", learning_rate=0.0, beta=0.1, max_steps=5)
    stock = tiny_run(GRPOTrainer, tiny_model_path, stock_args)
    assert parameter_gap(noisy.model, stock.model) == 0.0
    for ours, theirs in zip(noisy._buffered_inputs, stock._buffered_inputs, strict=True):
        for name in ("completion_ids", "old_per_token_logps", "ref_per_token_logps"):
            assert torch.equal(ours[name], theirs[name])
    assert noisy.evaluate()["eval_trust/ratio/max"] == pytest.approx(1.0, abs=1e-6)
    assert entries(noisy)[0]["trust/ratio/max"] > 1.01


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_scales_are_trained_but_not_in_what_is_saved_or_pushed(tiny_model_path, tmp_path, lora):  # 2
    peft_config = LoraConfig(r=4, target_modules="all-linear") if lora else None
    trainer = alp_run(tiny_model_path, tmp_path / "a", sigma_learning_rate=0.1, peft_config=peft_config)
    assert (trainer.noise.log_sigma.detach() - math.log(1e-2)).abs().min() > 1e-2
    stock = tiny_trainer(
        GRPOTrainer, tiny_model_path, tiny_config(GRPOConfig, tmp_path / "b"), peft_config=peft_config
    )
    names = lambda t: [name for name, _ in t.model.named_parameters()]  # what is sent to vLLM
    assert names(trainer) == names(stock)
    assert list(trainer.model.state_dict()) == list(stock.model.state_dict())
    trainer.save_model(tmp_path / "c")
    stock.save_model(tmp_path / "d")
    weights = "adapter_model.safetensors" if lora else "model.safetensors"
    assert set(load_file(tmp_path / "c" / weights)) == set(load_file(tmp_path / "d" / weights))


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tiny_model_path, tmp_path, lora, use_reentrant):  # 3
    runs = []
    for on in (False, True):
        settings = dict(perturbation_sigma=0.1, sigma_learning_rate=0.05, gradient_checkpointing=on)
        if on:
            settings["gradient_checkpointing_kwargs"] = {"use_reentrant": use_reentrant}
        if lora:
            settings["peft_config"] = LoraConfig(r=4, target_modules="all-linear")
        runs.append(alp_run(tiny_model_path, tmp_path / str(on), **settings))
    plain, again = runs
    assert parameter_gap(plain.model, again.model) == 0.0
    assert torch.equal(plain.noise.log_sigma, again.noise.log_sigma)
    assert (plain.noise.log_sigma - math.log(0.1)).abs().max() > 1e-3


def test_a_resumed_run_equals_the_uninterrupted_one(tiny_model_path, tmp_path):  # 10
    settings = dict(perturbation_sigma=0.1, sigma_learning_rate=0.05, gradient_accumulation_steps=2)
    settings |= dict(steps_per_generation=4, max_steps=8, save_strategy="steps", save_steps=4)
    whole = alp_run(tiny_model_path, tmp_path, **settings)
    resumed = tiny_trainer(ALPTrainer, tiny_model_path, tiny_config(ALPConfig, tmp_path, **settings))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert parameter_gap(whole.model, resumed.model) == 0.0
    assert torch.equal(whole.noise.log_sigma, resumed.noise.log_sigma)
    assert whole.method_state() == resumed.method_state()
    assert whole.method_state()["adam"]["step"] == 8.0
    columns = ("loss", "alp/sigma/mean", "trust/ratio/max")
    logs = [[[entry[c] for c in columns] for entry in entries(t)] for t in (whole, resumed)]
    assert logs[0] == logs[1]
    fewer = tiny_config(ALPConfig, tmp_path, **settings, perturbation_layers=[0])
    with pytest.raises(ValueError, match="noise scales of 2 layers, but 1 are perturbed"):
        tiny_trainer(ALPTrainer, tiny_model_path, fewer).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_scales_follow_the_schedule_and_the_bound(tiny_model_path, tmp_path):
    settings = dict(sigma_learning_rate=0.2, lr_scheduler_type="constant_with_warmup", warmup_steps=2)
    log = entries(alp_run(tiny_model_path, tmp_path / "a", **settings))
    assert log[1]["alp/sigma/mean"] == log[0]["alp/sigma/mean"]  # the first step has learning rate 0
    moved = abs(math.log(log[2]["alp/sigma/max"] / 1e-2)), abs(math.log(log[2]["alp/sigma/min"] / 1e-2))
    assert max(moved) == pytest.approx(0.1, rel=0.05)  # Adam: half the rate in the second, whatever the gradient
    bounded = alp_run(tiny_model_path, tmp_path / "b", sigma_learning_rate=0.5, sigma_max=0.011, max_steps=6)
    assert bounded.noise.log_sigma.exp().max() <= 0.011 * (1 + 1e-6)


def test_fixed_scales(tiny_model_path, tmp_path):
    trainer = alp_run(tiny_model_path, tmp_path, learn_sigma=False, perturbation_sigma=0.2, perturbation_layers=[-1])
    assert trainer.noise.log_sigma.exp().tolist() == pytest.approx([0.2])
    assert trainer.method_state() == {} and entries(trainer)[0]["alp/kl/perturbed"] > 0


def test_the_scales_learn_through_the_policy_loss_alone(tiny_model_path, tmp_path):  # 4, 5
    """Without advantages and reference their gradient is 0 to the bit."""
    seen = []

    class Watch(ALPTrainer):
        def _update_sigma(self):
            seen.append(self.noise.log_sigma.grad.clone())
            super()._update_sigma()

        def policy_loss(self, batch):
            return super().policy_loss(replace(batch, advantages=batch.advantages * self.advantage))

    for Watch.advantage in (0.0, 1.0):
        alp_run(tiny_model_path, tmp_path / str(Watch.advantage), Watch, max_steps=2, perturbation_sigma=0.1)
    assert (seen[0] == 0).all() and (seen[1] == 0).all()
    assert (seen[2] != 0).all()


def test_noise_without_effect_is_a_warning(tiny_model_path, tmp_path, caplog):
    logging.getLogger("trl_trust.policy.alp").propagate = True
    with caplog.at_level(logging.WARNING, logger="trl_trust.policy.alp"):
        alp_run(tiny_model_path, tmp_path / "a", perturbation_sigma=1e-2, max_steps=2)
        assert "does nothing" not in caplog.text
        alp_run(tiny_model_path, tmp_path / "b", perturbation_sigma=1e-9, max_steps=8)
    assert caplog.text.count("The noise does nothing: KL(clean || perturbed) is") == 1


def test_steps_without_a_live_token_say_nothing_of_the_noise(tiny_model_path, tmp_path, caplog):
    logging.getLogger("trl_trust.policy.alp").propagate = True
    settings = dict(mask_truncated_completions=True, max_completion_length=1, max_steps=2, seed=1)
    with caplog.at_level(logging.WARNING, logger="trl_trust.policy.alp"):
        trainer = alp_run(tiny_model_path, tmp_path, perturbation_sigma=1e-2, **settings)
    assert entries(trainer)[0]["trust/ess"] is None
    assert "does nothing" not in caplog.text and not trainer._warned


def test_bf16_autocast(tiny_model_path, tmp_path):
    trainer = alp_run(tiny_model_path, tmp_path, bf16=True, perturbation_sigma=0.3, max_steps=2)
    assert entries(trainer)[0]["alp/kl/perturbed"] > 0 and trainer.noise.log_sigma.dtype == torch.float32


TWO_PROCESSES = """
import sys, torch
from tiny import leave, tiny_config, tiny_trainer
from trl_trust.policy.alp import ALPConfig, ALPTrainer

class Watch(ALPTrainer):
    def policy_loss(self, batch):
        self.key = self.noise._key
        return super().policy_loss(batch)

    def _update_sigma(self):
        self.grad = self.noise.log_sigma.grad.clone()
        super()._update_sigma()

args = tiny_config(ALPConfig, sys.argv[2], perturbation_sigma=0.1, sigma_learning_rate=0.05, max_steps=1,
                   per_device_train_batch_size=4, gradient_accumulation_steps=1, steps_per_generation=2)
trainer = tiny_trainer(Watch, sys.argv[1], args)
trainer.train()
rank = trainer.accelerator.process_index
found = {"grad": trainer.grad, "key": trainer.key, "state": trainer.method_state()}
torch.save(found, f"{sys.argv[2]}/rank-{rank}.pt")
leave()
"""


def test_two_processes_average_the_gradient_of_the_scales(tiny_model_path, tmp_path):  # 11
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    on_two_processes(script, tiny_model_path, tmp_path)
    one, two = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert one["state"] == two["state"]
    assert not torch.equal(one["grad"], two["grad"]) and one["key"] != two["key"]
    mean = (one["grad"] + two["grad"]) / 2
    torch.testing.assert_close(torch.tensor(one["state"]["adam"]["exp_avg"]), 0.1 * mean)
