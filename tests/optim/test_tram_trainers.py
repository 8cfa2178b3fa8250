"""TRAM inside the trainers of transformers and TRL: `optim="tram_adamw"` and nothing else.

The sharpest test is the dullest run: with the distance held at 0, all three passes are made and the result must be
plain AdamW's to the bit, log included. Whatever a trainer did twice would show.
"""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny import parameter_gap, tiny_config, tiny_run, tiny_trainer
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.models.utils import _ForwardRedirection
from trl.trainer.utils import add_fused_lm_head

import trl_trust.optim  # noqa: F401  (registers the name)
from trl_trust import ALPConfig, ALPTrainer, DISPOConfig, DISPOTrainer
from trl_trust.optim import HybridAuON
from trl_trust.optim.predictions import Probe, kl_rows
from trl_trust.optim.tram import TRAM, TRAMAdamW


TIMES = ("runtime", "per_second", "step_time", "total_flos")


@pytest.fixture
def zero_distance(monkeypatch):
    """Every step makes all passes, and none moves."""

    def distance(self, probe, calls, *args):
        assert calls
        self.record(distance=torch.zeros(()))
        return torch.zeros(())

    monkeypatch.setattr(TRAM, "_distance", distance)
    monkeypatch.setattr(TRAM, "climbs", True)  # the first step too


def sums(number=16):
    """Sums of two digits as prompt and completion, of ragged lengths."""
    rows = [{"prompt": f"{a}+{a * b}=", "completion": str(a + a * b)} for a in range(2, 10) for b in (3, 40)]
    return Dataset.from_list(rows[:number])


def args_for(config, tmp_path, **overrides):
    settings = dict(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        gradient_checkpointing=False,
    )
    return config(**{**settings, **overrides})


def supervised(trainer_class, config, model_path, tmp_path, **overrides):
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    data = sums()
    extra = {}
    if trainer_class in (DPOTrainer, ORPOTrainer, CPOTrainer):
        data = Dataset.from_list([{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "0"} for r in data])
    if trainer_class in (GKDTrainer, DistillationTrainer):
        extra["teacher_model"] = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        with torch.no_grad():  # a teacher that agrees with the student teaches nothing
            for p in extra["teacher_model"].parameters():
                p.mul_(2)
    if trainer_class is GKDTrainer:
        turns = lambda r: [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}]
        data = Dataset.from_list([{"messages": turns(r)} for r in data])
    if trainer_class is DistillationTrainer:
        data = data.select_columns("prompt")
    trainer = trainer_class(
        model=model,
        args=args_for(config, tmp_path, **overrides),
        train_dataset=data,
        eval_dataset=data.select(range(4)) if trainer_class is SFTTrainer else None,
        processing_class=AutoTokenizer.from_pretrained(model_path),
        **extra,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def log_of(trainer):
    """The log without times and without TRAM's own lines."""
    keep = lambda key: not key.startswith("tram/") and not any(time in key for time in TIMES)
    return [{k: v for k, v in row.items() if keep(k)} for row in trainer.state.log_history]


def assert_same_run(one, other):
    assert parameter_gap(one.model, other.model) == 0.0
    for a, b in zip(log_of(one), log_of(other), strict=True):
        assert a.keys() == b.keys()
        different = {k: (a[k], b[k]) for k in a if a[k] != b[k] and not (math.isnan(a[k]) and math.isnan(b[k]))}
        assert not different


def tram_log(trainer, key):
    return [row[f"tram/{key}"] for row in trainer.state.log_history if f"tram/{key}" in row]


# ------------------------------------------------------------------------------------- nothing happens twice, anywhere


@pytest.mark.parametrize(
    ("trainer_class", "config", "overrides"),
    [
        (SFTTrainer, SFTConfig, dict(gradient_accumulation_steps=2)),
        (SFTTrainer, SFTConfig, dict(gradient_accumulation_steps=3, eval_strategy="steps", eval_steps=2)),
        (SFTTrainer, SFTConfig, dict(gradient_checkpointing=True, bf16=True, packing=True, max_length=32)),
        (DPOTrainer, DPOConfig, dict(gradient_accumulation_steps=2)),
        (GKDTrainer, GKDConfig, dict(lmbda=0.5, max_new_tokens=8)),
        (ORPOTrainer, ORPOConfig, dict(gradient_accumulation_steps=2, max_length=32)),
        (CPOTrainer, CPOConfig, dict(gradient_accumulation_steps=2, max_length=32)),
        (DistillationTrainer, DistillationConfig, dict(gradient_accumulation_steps=2, max_completion_length=8)),
    ],
    ids=["sft", "sft_eval", "sft_bf16_checkpointing_packing", "dpo", "gkd", "orpo", "cpo", "distillation"],
)
def test_at_distance_zero_a_supervised_run_is_adamws(
    trainer_class, config, overrides, tiny_model_path, tmp_path, zero_distance
):
    runs = [
        supervised(trainer_class, config, tiny_model_path, tmp_path, optim=optim, **overrides)
        for optim in ("adamw_torch", "tram_adamw")
    ]
    assert_same_run(*runs)
    assert len(tram_log(runs[1], "distance")) == 4


@pytest.mark.parametrize(
    ("trainer_class", "config", "overrides"),
    [
        (GRPOTrainer, GRPOConfig, {}),
        (GRPOTrainer, GRPOConfig, dict(num_iterations=2, gradient_accumulation_steps=2, steps_per_generation=2)),
        (GRPOTrainer, GRPOConfig, dict(beta=0.1, gradient_accumulation_steps=2)),
        (GRPOTrainer, GRPOConfig, dict(use_adaptive_entropy=True, entropy_coef=0.01, entropy_target=0.1)),
        (DISPOTrainer, DISPOConfig, dict(gradient_accumulation_steps=2)),
        (ALPTrainer, ALPConfig, dict(gradient_accumulation_steps=2, learn_sigma=True)),
    ],
    ids=["grpo", "grpo_iterations", "grpo_reference", "grpo_adaptive_entropy", "dispo", "alp"],
)
def test_at_distance_zero_a_reinforcement_run_is_adamws(
    trainer_class, config, overrides, tiny_model_path, tmp_path, zero_distance
):
    runs, generations, noise_grads = [], [], []
    for optim in ("adamw_torch", "tram_adamw"):
        args = tiny_config(config, tmp_path, optim=optim, learning_rate=1e-2, **overrides)
        trainer = tiny_trainer(trainer_class, tiny_model_path, args)
        generate, count = trainer.model.generate, []
        trainer.model.generate = lambda *a, generate=generate, count=count, **k: count.append(1) or generate(*a, **k)
        if trainer_class is ALPTrainer:  # Adam does not see the scale of a gradient, so look at the gradient
            update, seen = trainer._update_sigma, []
            trainer._update_sigma = lambda update=update, seen=seen, noise=trainer.noise: (
                seen.append(noise.log_sigma.grad.clone()) or update()
            )
            noise_grads.append(seen)
        trainer.train()
        runs.append(trainer)
        generations.append(len(count))
    assert_same_run(*runs)
    for one, other in zip(*noise_grads, strict=True) if noise_grads else ():
        assert torch.equal(one, other)
    assert runs[0]._step == runs[1]._step
    assert generations[0] == generations[1] > 0
    assert len(tram_log(runs[1], "distance")) == 4


# --------------------------------------------------------------------------------------------------- something happens


@pytest.mark.parametrize("variant", ["prev", "init", "noise", "fisher"])
@pytest.mark.parametrize("method", ["sft", "grpo"])
def test_a_run_climbs(method, variant, tiny_model_path, tmp_path):
    def run(optim, **extra):
        if method == "sft":
            return supervised(
                SFTTrainer, SFTConfig, tiny_model_path, tmp_path, optim=optim, gradient_accumulation_steps=2, **extra
            )
        return tiny_run(GRPOTrainer, tiny_model_path, tiny_config(GRPOConfig, tmp_path, optim=optim, **extra))

    plain, tram = run("adamw_torch"), run("tram_adamw", optim_args=f"tram_variant={variant}")
    assert parameter_gap(plain.model, tram.model) > 1e-6
    assert all(torch.isfinite(p).all() for p in tram.model.parameters())
    if variant != "fisher":
        distances = tram_log(tram, "distance")
        assert len(distances) == (4 if variant == "noise" else 3)  # prev's and init's first step is plain
        assert min(distances) > 0
        assert tram_log(tram, "skipped") == [0] * len(distances)
    assert min(tram_log(tram, "eps_norm")) > 0
    if method == "sft" and variant in ("prev", "init"):
        # The loss in the log is the one at theta; the perturbed one is higher, which is what ascent means.
        losses = [row["loss"] for row in tram.state.log_history if "tram/loss_perturbed" in row]
        for loss, perturbed in zip(losses, tram_log(tram, "loss_perturbed"), strict=True):
            assert perturbed == pytest.approx(loss, rel=0.5)
            assert perturbed > loss


@pytest.mark.parametrize("variant", ["prev", "noise"])
def test_a_loss_that_runs_in_the_place_of_the_forward(variant, tiny_model_path, tmp_path):
    """DistillationTrainer swaps `model.forward` for its loss, which calls the backbone: that call is repeated."""
    kinds = dict(optim="tram_adamw", optim_args=f"tram_variant={variant}", max_completion_length=8)
    trainer = supervised(DistillationTrainer, DistillationConfig, tiny_model_path, tmp_path, **kinds)
    assert min(tram_log(trainer, "distance")) > 0
    assert len(tram_log(trainer, "distance")) == (4 if variant == "noise" else 3)
    assert "forward" not in vars(trainer.model) or trainer.model.forward.__func__ is type(trainer.model).forward


def test_one_output_is_no_distribution(tiny_model_path, tmp_path):
    data = Dataset.from_list([{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "0"} for r in sums()])

    def train(optim_args):
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model_path, num_labels=1, dtype=torch.float32)
        args = args_for(RewardConfig, tmp_path, optim="tram_adamw", optim_args=optim_args)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        trainer = RewardTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer

    with pytest.raises(ValueError, match="one output.*tram_variant='fisher'"):
        train("tram_variant=prev")
    assert min(tram_log(train("tram_variant=fisher"), "eps_norm")) > 0


def test_the_trainers_steps_are_those_of_a_loop_by_hand(tiny_model_path, tmp_path):
    overrides = dict(gradient_accumulation_steps=2, max_grad_norm=0.0, lr_scheduler_type="constant")
    trainer = supervised(SFTTrainer, SFTConfig, tiny_model_path, tmp_path, optim="tram_adamw", **overrides)

    batches = []
    recorder = supervised(SFTTrainer, SFTConfig, tiny_model_path, tmp_path, optim="sgd", **overrides)
    compute_loss = recorder.compute_loss
    recorder.compute_loss = lambda m, inputs, **k: batches.append((dict(inputs), k)) or compute_loss(m, inputs, **k)
    recorder.model.load_state_dict(AutoModelForCausalLM.from_pretrained(tiny_model_path).state_dict())
    recorder.train()
    model = recorder.model
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(tiny_model_path).state_dict())
    tram = TRAM(torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0))
    for step in range(4):
        for i in range(2):
            inputs, kwargs = batches[2 * step + i]
            tram.backward(model, lambda x=inputs, k=kwargs: compute_loss(model, x, **k), last=i == 1)
        tram.step()
        tram.zero_grad()
    assert parameter_gap(trainer.model, model) < 1e-7


@pytest.mark.parametrize("variant", ["prev", "init", "noise"])
def test_resume_is_exact(variant, tiny_model_path, tmp_path):
    def trainer(folder):
        args = args_for(
            SFTConfig,
            tmp_path / folder,
            optim="tram_adamw",
            optim_args=f"tram_variant={variant}",
            save_strategy="steps",
            save_steps=2,
            gradient_accumulation_steps=2,
        )
        trainer = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32),
            args=args,
            train_dataset=sums(),
            processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    through = trainer("through")
    through.train()
    resumed = trainer("through")
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-2"))
    assert parameter_gap(through.model, resumed.model) == 0.0
    assert tram_log(through, "distance")[-2:] == tram_log(resumed, "distance")[-2:]
    anchor = through.optimizer.optimizer.anchor
    assert bool(anchor) == (variant != "noise")
    saved = torch.load(tmp_path / "through" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert {"exp_avg", "exp_avg_sq"} <= saved["state"][0].keys()  # the inner optimizer's
    assert saved["param_groups"][0]["tram_steps"] == 4


@pytest.mark.parametrize("base", ["adamw", "muon", "auon", "hybrid_auon", "fismo"])
def test_any_base_by_name(base, tiny_model_path, tmp_path):
    trainer = supervised(
        SFTTrainer,
        SFTConfig,
        tiny_model_path,
        tmp_path,
        optim="tram_adamw",
        optim_args=f"base={base}",
        weight_decay=0.1,
    )
    tram = trainer.optimizer.optimizer
    assert isinstance(tram, TRAMAdamW)
    assert type(tram.base).__name__.lower() == base.replace("_", "")
    assert len(tram_log(trainer, "distance")) == 3
    decays = {group["weight_decay"] for group in tram.param_groups}
    assert decays == {0.1, 0.0}  # norms and biases are on the trainer's list
    no_decay = {id(p) for group in tram.param_groups if not group["weight_decay"] for p in group["params"]}
    for name, p in trainer.model.named_parameters():
        assert (id(p) in no_decay) == ("norm" in name or "bias" in name), name


def test_the_bases_options_go_to_the_base(tiny_model_path, tmp_path):
    text = "base=hybrid_auon,variant=repo,aux_lr=1e-4,weight_decay=0.2,tram_variant=noise,tram_every=2"
    args = args_for(TrainingArguments, tmp_path, optim="tram_adamw", optim_args=text)
    data = Dataset.from_list([{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}])
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    tram = Trainer(model, args, train_dataset=data).create_optimizer()
    assert (tram.variant, tram.every) == ("noise", 2)
    matrix, aux = tram.param_groups[0], tram.param_groups[-1]
    assert (matrix["variant"], matrix["ns_steps"], matrix["weight_decay"]) == ("repo", 5, 0.2)
    assert aux["lr"] == 1e-4
    args.optim_args = "base=hybrid_auon,gama=1"
    with pytest.raises(ValueError, match="unknown keys: gama; did you mean 'gamma'. valid: .*gamma.*tram_variant"):
        Trainer(model, args, train_dataset=data).create_optimizer()


def test_any_optimizer_in_a_trainer(tiny_model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    trainer = SFTTrainer(
        model=model,
        args=args_for(SFTConfig, tmp_path),
        train_dataset=sums(),
        processing_class=AutoTokenizer.from_pretrained(tiny_model_path),
        optimizers=(TRAM(HybridAuON(model, lr=0.02, variant="repo")), None),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert len(tram_log(trainer, "distance")) == 3


def test_unknown_base_and_option(tiny_model_path, tmp_path):
    with pytest.raises(ValueError, match="base='adam' is no optimizer; did you mean 'adamw'"):
        supervised(SFTTrainer, SFTConfig, tiny_model_path, tmp_path, optim="tram_adamw", optim_args="base=adam")
    with pytest.raises(ValueError, match="unknown keys: variant; did you mean 'tram_variant'. valid: .*tram_variant"):
        supervised(SFTTrainer, SFTConfig, tiny_model_path, tmp_path, optim="tram_adamw", optim_args="variant=prev")


def test_a_classifier_in_a_plain_trainer(tmp_path):
    """Logits without positions, and a label smoother that pops the labels: `transformers.Trainer`, nothing of TRL."""
    data = Dataset.from_list(
        [{"input_ids": [1 + i % 7, 2, 3 + i % 2], "attention_mask": [1, 1, 1], "labels": i % 2} for i in range(16)]
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=2, pad_token_id=0,
    )  # fmt: skip
    args = args_for(TrainingArguments, tmp_path, optim="tram_adamw", label_smoothing_factor=0.1)
    trainer = Trainer(Qwen2ForSequenceClassification(config), args, train_dataset=data)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert min(tram_log(trainer, "distance")) > 0


# ------------------------------------------------------------------------------------------------------- the distance


def small(config_class, **extra):
    return config_class(
        vocab_size=29, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, pad_token_id=0, **extra,
    )  # fmt: skip


FAMILIES = {
    "qwen2": lambda: Qwen2ForCausalLM(small(Qwen2Config)),
    "gemma2": lambda: Gemma2ForCausalLM(small(Gemma2Config, final_logit_softcapping=0.5)),
    "cohere2": lambda: Cohere2ForCausalLM(small(Cohere2Config, logit_scale=7.0)),
    "granite": lambda: GraniteForCausalLM(small(GraniteConfig, logits_scaling=0.1)),
}


def language_batch(labels=True):
    ids = torch.randint(1, 29, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    targets = ids.masked_fill(mask == 0, -100)
    targets[:, :3] = -100
    batch = {"input_ids": ids, "attention_mask": mask}
    return {**batch, "labels": targets} if labels else batch


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize("variant", ["prev", "init"])
@pytest.mark.parametrize("family", FAMILIES)
def test_distance_through_a_fused_head_is_that_of_the_logits(family, variant, chunk):
    """The head is tied and trained, so the anchor's predictions come from the anchor's head."""
    torch.manual_seed(0)
    model = FAMILIES[family]().double()
    add_fused_lm_head(model)
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=1.0), tram_variant=variant, tram_chunk_size=chunk)
    batch = language_batch()
    tram.backward(model, lambda: -model(**batch, fused_lm_head=True).log_probs.mean())
    then, now = (FAMILIES[family]().double() for _ in range(2))  # without the fused head
    then.load_state_dict(model.state_dict())
    tram.step()
    now.load_state_dict(model.state_dict())
    tram.zero_grad()
    tram.backward(model, lambda: -model(**batch, fused_lm_head=True).log_probs.mean())
    measured = tram.metrics()["tram/distance"]
    with torch.no_grad():
        valid = batch["labels"][:, 1:] != -100
        p, q = (m(**language_batch(labels=False)).logits[:, :-1][valid] for m in (then, now))
    assert measured == pytest.approx(kl_rows(p, q).mean().item(), rel=1e-9)
    assert measured > 1e-4


class Redirected(nn.Module):
    """A loss that runs in the place of `model.forward`, as in TRL's `_ForwardRedirection`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        def loss(batch, scale):
            hidden = self.model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            with torch.no_grad():  # a teacher that is the student: not what is measured
                self.model.model(input_ids=batch["input_ids"].flip(0))
                self.model(input_ids=batch["input_ids"].flip(0))
            return scale * hidden.last_hidden_state.square().mean()

        return _ForwardRedirection()(self.model, self.model, loss, batch, scale=2.0)


@pytest.mark.parametrize("variant", ["prev", "init"])
def test_distance_through_a_redirected_forward_is_that_of_the_logits(variant):
    torch.manual_seed(0)
    model, batch = FAMILIES["qwen2"]().double(), language_batch(labels=False)
    redirected = Redirected(model)
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.1), tram_variant=variant)
    tram.backward(model, lambda: redirected(batch))
    then = copy.deepcopy(model)
    tram.step()
    now = copy.deepcopy(model)
    tram.zero_grad()
    tram.backward(model, lambda: redirected(batch))
    with torch.no_grad():
        valid = batch["attention_mask"][:, 1:] != 0
        p, q = (m(**batch).logits[:, :-1][valid] for m in (then, now))
    measured = tram.metrics()["tram/distance"]
    assert measured == pytest.approx(kl_rows(p, q).mean().item(), rel=1e-9)
    assert measured > 1e-6
    assert model(**batch).logits.shape == (3, 9, 29)  # the forward is back


def test_a_redirected_loss_that_calls_the_model():
    """Its own call of the model is an ordinary one."""
    torch.manual_seed(0)
    model, batch = FAMILIES["qwen2"](), language_batch()
    redirect = lambda: _ForwardRedirection()(model, model, lambda batch: model(**batch).loss, batch)
    calls = []
    with Probe(model).listen(calls):
        redirect()
    assert [call.logits.shape for call in calls] == [(3, 9, 29)]
    assert torch.equal(Probe(model).repeat(calls)[0].logits, calls[0].logits)


def test_logits_that_only_evaluation_builds():
    """Liger's fused loss builds none in training mode, and the anchor runs in evaluation mode."""

    def measured(fused):
        torch.manual_seed(0)
        model, batch = FAMILIES["gemma2"]().double(), language_batch()
        forward = model.forward

        def without_logits(*args, **kwargs):
            output = forward(*args, **kwargs)
            return type(output)(loss=output.loss) if model.training else output

        if fused:
            model.forward = without_logits
        model.train()
        tram = TRAM(torch.optim.SGD(model.parameters(), lr=1.0))
        for _ in range(2):
            tram.zero_grad()
            tram.backward(model, lambda: model(**batch).loss)
            tram.step()
        return tram.metrics()["tram/distance"]

    assert measured(fused=True) == pytest.approx(measured(fused=False), rel=1e-9)


def test_where_a_prediction_counts():
    torch.manual_seed(0)
    model = FAMILIES["qwen2"]()

    def distance(batch, labels=None, fill=0):
        probe, calls = Probe(model), []
        with probe.listen(calls):
            model(**batch)
        again = copy.deepcopy(calls)
        invalid = ~probe.positions(calls[0], labels)
        again[0].logits[invalid] += torch.randn(29) * fill
        again[0].logits[~invalid] += torch.arange(29) / 10
        total, number = probe.divergence(calls, again, {}, labels, "forward", 1024)
        return (total / number).item(), number.item(), invalid

    with_labels = language_batch()
    d, number, invalid = distance(with_labels)
    assert number == (with_labels["labels"][:, 1:] != -100).sum()
    assert d == distance(with_labels, fill=9.0)[0]  # padding and prompt never matter
    assert invalid[:, -1].all()  # nothing follows the last token
    bare = language_batch(labels=False)
    assert distance(bare)[1] == bare["attention_mask"][:, 1:].sum()
    assert distance(bare, labels=with_labels["labels"])[1] == number
    shorter = {**bare, "logits_to_keep": 4}
    assert distance(shorter, labels=with_labels["labels"])[1] == (with_labels["labels"][:, -3:] != -100).sum()


def test_worked_mean_over_valid_positions():
    p, q = torch.tensor([0.5, 0.3, 0.2]).double().log(), torch.tensor([0.2, 0.5, 0.3]).double().log()

    class Fake(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, rows, labels=None):
            return {"logits": rows}

    model, labels = Fake(), torch.tensor([[1, 1, -100]])
    probe, calls, again = Probe(model), [], []
    with probe.listen(calls):
        model(torch.stack([q, q, q])[None], labels=labels)
    with probe.listen(again):
        model(torch.stack([p, q, p])[None], labels=labels)
    total, number = probe.divergence(calls, again, {}, None, "forward", 1024)
    assert (total / number).item() == pytest.approx(0.111902, abs=1e-6)


def test_reference_passes_of_the_loss_are_not_measured():
    model = FAMILIES["qwen2"]()
    calls = []
    with Probe(model).listen(calls):
        model(**language_batch())
        with torch.no_grad():
            model(**language_batch())
    assert len(calls) == 1


def test_hooks_are_gone_after_a_step():
    model = FAMILIES["qwen2"]()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=1.0), tram_variant="noise")
    tram.backward(model, lambda: model(**language_batch()).loss)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_autocast_does_not_keep_low_precision_copies_of_old_values():
    """A loss under one autocast region makes all its passes in it, and autocast caches casted weights."""
    torch.manual_seed(0)
    model = FAMILIES["qwen2"]()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=1.0), tram_variant="noise", tram_noise_std=1.0)
    batch = language_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tram.ascend(model, lambda: model(**batch).loss)
        cached = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh = model(**batch).loss
    assert cached.item() == fresh.item()
    cached.backward()
    tram.restore()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(**batch).loss.item() != fresh.item()


def test_lora():
    """B starts at zero, so A has no gradient and, under the adaptive metric, B cannot move: eps = 0. Only adapters are
    copied, and the plain metric perturbs B."""

    def step(adaptive):
        torch.manual_seed(0)
        model = get_peft_model(FAMILIES["qwen2"](), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
        trained = [p for p in model.parameters() if p.requires_grad]
        tram = TRAM(torch.optim.SGD(trained, lr=0.0), tram_variant="noise", tram_adaptive=adaptive)
        tram.backward(model, lambda: model(**language_batch()).loss)
        return tram.metrics()

    assert step(True)["tram/eps_norm"] == 0
    assert step(False)["tram/eps_norm"] > 0
    model = get_peft_model(FAMILIES["qwen2"](), LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    trained = [p for p in model.parameters() if p.requires_grad]
    tram = TRAM(torch.optim.SGD(trained, lr=1.0))
    for _ in range(3):
        tram.backward(model, lambda: model(**language_batch()).loss)
        tram.step()
        tram.zero_grad()
    assert set(tram.anchor) == set(trained)
    assert tram.metrics()["tram/distance"] > 0


# ----------------------------------------------------------------------------------------------------------- refusals


def engine(**changes):
    """What [`TRAM.attach`] looks at before it wraps anything."""
    args = dict(fp16=False, torch_compile=False, n_gpu=1)
    args |= {name: changes.pop(name) for name in args if name in changes}
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=changes.pop("fsdp_version", 2)))
    accelerator = SimpleNamespace(scaler=changes.pop("scaler", None), state=state)
    trainer = dict(model=None, is_deepspeed_enabled=False, is_fsdp_enabled=False)
    return SimpleNamespace(args=SimpleNamespace(**args), accelerator=accelerator, **{**trainer, **changes})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(fp16=True), "fp16"),
        (dict(scaler=object()), "fp16"),  # `accelerate launch --mixed_precision fp16` leaves args.fp16 False
        (dict(is_deepspeed_enabled=True), "DeepSpeed"),
        (dict(torch_compile=True), "torch_compile=True"),
        (dict(n_gpu=2), "n_gpu=2.*under DataParallel"),
        (dict(is_fsdp_enabled=True, fsdp_version=1), "fsdp_version=1.*under FSDP1.*FSDP2"),
    ],
    ids=["fp16", "scaler", "deepspeed", "torch_compile", "data_parallel", "fsdp1"],
)
def test_refused_engines(changes, match):
    tram = TRAM(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1))
    with pytest.raises(ValueError, match=match):
        tram.attach(engine(**changes))


def test_torch_compile_is_refused_before_the_first_step(tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments changes it, the end puts it back

    class Counting(SFTTrainer):
        def training_step(self, *args, **kwargs):
            raise AssertionError("a step was made")

    with pytest.raises(ValueError, match="torch_compile=True"):
        supervised(
            Counting, SFTConfig, tiny_model_path, tmp_path, optim="tram_adamw", torch_compile=True,
            torch_compile_backend="eager",
        )  # fmt: skip


def test_a_compiled_model_is_refused_unless_compiled_in_place():
    model = FAMILIES["qwen2"]()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=1.0), tram_variant="noise")
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="torch_compile=False"):
        tram.backward(compiled, lambda: compiled(**language_batch()).loss)
    model.compile(backend="eager")
    tram.backward(model, lambda: model(**language_batch()).loss)
    assert tram.metrics()["tram/distance"] > 0


def test_a_model_without_readable_predictions_is_refused():
    model = FAMILIES["qwen2"]().model  # a backbone without a head
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=1.0), tram_variant="noise")
    batch = language_batch(labels=False)
    with pytest.raises(ValueError, match="Qwen2Model: its forward returns no `logits`"):
        tram.backward(model, lambda: model(**batch).last_hidden_state.square().mean())
    fisher = TRAM(torch.optim.SGD(model.parameters(), lr=1.0), tram_variant="fisher")
    fisher.backward(model, lambda: model(**batch).last_hidden_state.square().mean())
    assert fisher.metrics()["tram/eps_norm"] > 0


def test_a_trainer_without_compute_loss_is_refused(tiny_model_path, tmp_path):
    class Own(SFTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**self._prepare_inputs(inputs)).loss
            loss.backward()
            return loss.detach()

    with pytest.raises(RuntimeError, match="Own called it 0 times"):
        supervised(Own, SFTConfig, tiny_model_path, tmp_path, optim="tram_adamw")


def test_training_twice_does_not_wrap_twice(tiny_model_path, tmp_path):
    trainer = supervised(SFTTrainer, SFTConfig, tiny_model_path, tmp_path, optim="tram_adamw")
    bare = trainer.compute_loss.tram_wraps
    trainer.create_optimizer()
    assert trainer.compute_loss.tram_wraps is bare
    trainer.train()
    assert trainer.compute_loss.tram_wraps is bare
