"""TRL's asynchronous trainer with an exchangeable term: GRPO's is stock's, and a method's is its synchronous one."""

import math
from pathlib import Path

import pytest
import torch
from given_rows import GivenRows, async_config, async_run, async_trainer, history, rows
from tiny import on_two_processes, parameter_gap, tiny_config, tiny_trainer
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl.experimental.async_grpo import AsyncGRPOTrainer
from trl.experimental.async_grpo.async_grpo_trainer import DataCollatorForRollout
from trl.experimental.async_grpo.packing import TreeRow

import trl_trust
from trl_trust.asynchronous import trainers
from trl_trust.asynchronous.base import AsyncTrustGRPOTrainer, places, regroup
from trl_trust.asynchronous.intake import ROW
from trl_trust.asynchronous.local import on_a_cpu
from trl_trust.methods import ASYNCHRONOUS, get_method
from trl_trust.policy.terms import PolicyBatch, PolicyLoss


NAMES = [row.name.removeprefix("async-") for row in ASYNCHRONOUS]


def of_method(name):
    row = get_method(f"async-{name}")
    return getattr(trainers, row.config), getattr(trainers, row.trainer)


def packed(given) -> TreeRow:
    """Rows in one trie, as TRL's batchers put them there."""
    tree = TreeRow()
    for sample in given:
        tree.add({name: getattr(sample, name) for name in (*ROW, "advantage", "group_id", "metrics")})
    return tree


# -- the flat terms as rows ------------------------------------------------------------------------------------------


def test_terms_find_their_rows_and_come_back():
    segment_id = torch.tensor([0, 0, 0, 1, 3, 3])  # row 2 has no trained token
    columns, shape = places(segment_id)
    assert columns.tolist() == [0, 1, 2, 0, 0, 1] and shape == (4, 3)
    x = torch.arange(1.0, 7.0, requires_grad=True)
    batch = regroup(x, segment_id, columns, shape, -1.0)
    assert batch.tolist() == [[1, 2, 3], [4, -1, -1], [-1, -1, -1], [5, 6, -1]]
    weights = torch.arange(12.0).view(4, 3)
    (batch * weights)[segment_id, columns].sum().backward()
    assert x.grad.tolist() == [0, 1, 2, 3, 9, 10]


# -- GRPO's term equals stock's --------------------------------------------------------------------------------------

LAYOUTS = {
    "fixed count": {},
    "token budget": {"token_budget": 40},
    "accumulation": {"gradient_accumulation_steps": 3},
    "one row": {"per_device_train_batch_size": 1},
    "widths": {"epsilon": 0.1, "epsilon_high": 0.28},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_grpos_term_is_stocks(layout, tiny_model_path, tmp_path):
    runs = []
    for trainer_class in (AsyncGRPOTrainer, AsyncTrustGRPOTrainer):
        args = async_config(output_dir=tmp_path, **LAYOUTS[layout])
        runs.append(async_run(trainer_class, tiny_model_path, args, GivenRows(rows(60))))
    stock, ours = runs
    assert parameter_gap(stock.model, ours.model) == 0.0
    theirs, mine = history(stock), history(ours)
    assert len(theirs) == 3 and all(math.isfinite(record["loss"]) for record in theirs)
    for before, after in zip(theirs, mine, strict=True):
        assert before["loss"] == after["loss"] and before["grad_norm"] == after["grad_norm"]
        assert {name: after[name] for name in before} == pytest.approx(before, rel=1e-5, abs=1e-6, nan_ok=True)
        assert after["clip_ratio/region_mean"] == pytest.approx(after["trust/cut"], abs=1e-6)
        assert after["trust/kl"] == pytest.approx(after["kl"], rel=1e-4)
    assert any(record["clip_ratio/region_mean"] > 0 for record in mine), "nothing was clipped: the test shows nothing"


def test_the_auxiliary_loss_of_experts_is_stocks(tiny_model_path, tmp_path):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, head_dim=8)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    special = dict(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **special)).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    runs = []
    for trainer_class in (AsyncGRPOTrainer, AsyncTrustGRPOTrainer):
        args = async_config(output_dir=tmp_path, router_aux_loss_coef=0.5, gradient_accumulation_steps=2)
        runs.append(async_run(trainer_class, str(tmp_path / "moe"), args, GivenRows(rows(60))))
    stock, ours = runs
    assert parameter_gap(stock.model, ours.model) == 0.0 and history(ours)[0]["aux_loss"] > 0
    assert [r["loss"] for r in history(stock)] == [r["loss"] for r in history(ours)]


def test_the_rows_share_prefixes_fork_and_have_gaps():
    """What the rows above are made to contain, as TRL packs them."""
    flat = packed(rows(12)).pack()
    assert len(flat["token_index"].unique()) < len(flat["token_index"]), "no position serves two rows"
    gaps = [sample.completion_mask[sample.completion_mask.argmax() :].min() == 0 for sample in rows(12)]
    assert any(gaps) and len(flat["input_ids"]) < sum(len(sample.input_ids) for sample in rows(12))


# -- a method's term is its synchronous trainer's --------------------------------------------------------------------

SETTINGS = {
    "dispo": [{}, {"epsilon_pos_low": 0.1, "epsilon_pos_high": 0.1, "epsilon_neg_high": 0.1}],
    "dppo": [
        {"delta_low": 0.001, "delta_high": 0.001},
        {"divergence": "kl", "delta_low": 1e-4},
        {"surrogate": "ratio"},
    ],
    "etr": [{}, {"phi": "tanh", "epsilon": 0.1}],
    "dhpo": [{}, {"mixing": "entropy"}, {"mixing": "entropy", "entropy_normalizer": "log_vocab"}],
    "mdpo": [{"step_size": 0.5}, {"divergence": "k2", "step_size_schedule": "constant"}],
}


@pytest.mark.parametrize("name, settings", [(name, each) for name in NAMES for each in SETTINGS[name]])
def test_a_methods_tokens_are_its_synchronous_trainers(name, settings, tiny_model_path, tmp_path, monkeypatch):
    """Per-token loss and gradient of the parameters on the same tokens; only the normalization differs."""
    given = [sample for sample in rows(4, seed=3) if sample.completion_mask.min() == 0][:4]
    config, trainer_class = of_method(name)
    trainer = async_trainer(
        trainer_class, tiny_model_path, async_config(config, tmp_path, **settings), GivenRows(given)
    )
    seen = []
    term = trainer.policy_loss
    monkeypatch.setattr(trainer, "policy_loss", lambda batch: seen.append((batch, term(batch))) or seen[-1][1])
    inputs = DataCollatorForRollout(0)([[packed(given)]])
    trainer.current_gradient_accumulation_steps = 1
    trainer.state.max_steps = 3
    with on_a_cpu():
        loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    (batch, policy), tokens = seen[0], float(inputs["global_n_tokens"][0])
    # the gradient of a plain sum, for the comparison
    ours = {k: p.grad.double() * tokens for k, p in trainer.model.named_parameters()}

    method = get_method(name)
    sync_args = tiny_config(getattr(trl_trust, method.config), tmp_path, max_steps=3, **settings)
    sync = tiny_trainer(getattr(trl_trust, method.trainer), tiny_model_path, sync_args)
    sync.state.max_steps = 3
    if name == "mdpo":  # an iteration is a weight version there, a generation here
        monkeypatch.setattr(sync, "step_size", lambda: settings.get("step_size", 1.0))
    T = max(len(sample.input_ids) for sample in given) - 1
    pad = lambda x, value=0: torch.tensor([*x, *[value] * (T - len(x))])
    of_rows = lambda get, value=0: torch.stack([pad(get(sample), value) for sample in given])
    ids = of_rows(lambda s: s.input_ids[1:].tolist())
    tensors = {
        "prompt_ids": torch.tensor([[int(s.input_ids[0])] for s in given]),
        "prompt_mask": torch.ones(len(given), 1, dtype=torch.long),
        "completion_ids": ids,
        "completion_mask": of_rows(lambda s: [1] * (len(s.input_ids) - 1)),
    }
    mask = of_rows(lambda s: s.completion_mask[1:].tolist()).float()  # a tool's tokens are 0
    logps, entropies, *_ = sync.score_completions(sync.model, tensors)
    sync_batch = PolicyBatch(
        logps=logps.view_as(logps),
        old_logps=of_rows(lambda s: s.old_log_probs[1:].tolist(), -4.0),
        mask=mask,
        advantages=torch.tensor([[s.advantage] for s in given]),
        entropies=entropies,
    )
    expected = sync.policy_loss(sync_batch)
    (expected.per_token_loss * mask).sum().backward()
    live, sync_live = batch.mask > 0, mask > 0
    torch.testing.assert_close(policy.per_token_loss[live], expected.per_token_loss[sync_live], rtol=1e-4, atol=1e-5)
    for key, p in sync.model.named_parameters():
        torch.testing.assert_close(ours[key].float(), p.grad, rtol=1e-3, atol=1e-4)
    assert ours["model.embed_tokens.weight"].abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_and_says_what_its_region_did(name, tiny_model_path, tmp_path):
    config, trainer_class = of_method(name)
    args = async_config(config, tmp_path, gradient_accumulation_steps=2)
    trainer = async_run(trainer_class, tiny_model_path, args, GivenRows(rows(60)))
    log = history(trainer)
    assert len(log) == 3 and all(record["grad_norm"] > 0 for record in log)
    stock = [name for name in log[0] if name.startswith("clip_ratio/")]
    assert stock == [], "PPO's band says nothing of another term"
    assert any(key.startswith(f"{name}/") for key in log[0]) and log[0]["trust/ess"] < 1
    assert trainer.lags == {0: 8 + 4, 1: 8, 2: 8} and log[1]["trust/lag/mean"] == 1.0


def test_the_step_size_is_annealed_over_weight_versions(tiny_model_path, tmp_path):
    config, trainer_class = of_method("mdpo")
    args = async_config(config, tmp_path, max_steps=4, weight_sync_steps=2)
    trainer = async_run(trainer_class, tiny_model_path, args, GivenRows(rows(24)))
    assert [record["mdpo/step_size"] for record in history(trainer)] == [1.0, 1.0, 1.0, 1.0]  # 2 / 2 is the floor
    args = async_config(config, tmp_path, max_steps=4, step_size_min=0.1)
    trainer = async_run(trainer_class, tiny_model_path, args, GivenRows(rows(24)))
    assert [record["mdpo/step_size"] for record in history(trainer)] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_a_loss_of_a_response_is_refused(tiny_model_path, tmp_path):
    class OneLossAResponse(AsyncTrustGRPOTrainer):
        def policy_loss(self, batch):
            return PolicyLoss(-batch.advantages * batch.logps.sum(1, keepdim=True))

    with pytest.raises(ValueError, match=r"one loss a response or a batch, shape \(4, 1\).*synchronous trainer"):
        async_run(OneLossAResponse, tiny_model_path, async_config(output_dir=tmp_path), GivenRows(rows(24)))


def test_what_biases_the_ratio_is_warned_of(tiny_model_path, tmp_path, caplog):
    for changes, said in ({}, None), ({"top_p": 0.9, "min_p": 0.1}, "top_p=0.9, min_p=0.1: the sampler renormalizes"):
        caplog.clear()
        args = async_config(output_dir=tmp_path, **changes)
        async_trainer(AsyncTrustGRPOTrainer, tiny_model_path, args, GivenRows([]))
        found = [record.message for record in caplog.records if "asynchronous" in record.name]
        assert [message for message in found if said and said in message] == found and bool(found) == bool(said)


def test_a_term_that_is_not_finite_leaves_the_update_out(tiny_model_path, tmp_path):
    class Broken(AsyncTrustGRPOTrainer):
        def policy_loss(self, batch):
            loss = super().policy_loss(batch).per_token_loss
            return PolicyLoss(loss * (math.nan if self.state.global_step == 1 else 1.0))

    trainer = async_run(Broken, tiny_model_path, async_config(output_dir=tmp_path), GivenRows(rows(24)))
    assert [record["trust/skipped_nonfinite"] for record in history(trainer)] == [0, 1, 1]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


# -- several processes -----------------------------------------------------------------------------------------------


def launch(path, folder, kind):
    """What async_processes.py found on two processes, by rank."""
    folder.mkdir()
    on_two_processes(Path(__file__).with_name("async_processes.py"), path, folder, kind, timeout=400)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def same(one, other):
    return all(map(torch.equal, one["parameters"], other["parameters"]))


def check_two_processes(found):
    for layout in ("fixed count", "token budget"):
        (stock, ours), (_, ours_there) = found[0][layout], found[1][layout]
        assert same(stock, ours) and same(ours, ours_there)
        for before, after in zip(stock["history"], ours["history"], strict=True):
            assert {name: after[name] for name in before} == pytest.approx(before, rel=1e-5, abs=1e-6, nan_ok=True)
    for mode in ("ess", "kl", "backtrack"):
        assert same(found[0][mode], found[1][mode])
        assert all(0 < record["trust/step_scale"] < 1 for record in found[0][mode]["history"]), mode
    assert found[0]["died"] == ["the worker is dead"] * 2
    assert all("Process 0 can get no more rollouts" in said for said in found[1]["died"])


def test_two_processes(tiny_model_path, tmp_path):
    """Stock and ours agree to the bit; a worker that dies ends both processes, each with one line."""
    check_two_processes(launch(tiny_model_path, tmp_path / "ddp", "ddp"))


@pytest.mark.slow
def test_sharded_by_fsdp2(tiny_model_path, tmp_path):
    """As two processes that each hold the whole model, step control included."""
    sharded, whole = (launch(tiny_model_path, tmp_path / kind, kind) for kind in ("fsdp2", "ddp"))
    check_two_processes(sharded)
    for mode in ("ess", "kl", "backtrack"):
        for one, other in zip(sharded[0][mode]["parameters"], whole[0][mode]["parameters"], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
