"""The generated facts from end to end without a download: a tiny model that knows them by heart."""

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from .data import encode, facts_tokenizer, pad
from .losses import answer_logps, nll_loss


def build_model(tokenizer, *, hidden_size: int = 64, seed: int = 0) -> LlamaForCausalLM:
    """An untrained Llama of two layers; 90 K parameters or so.

    Not a Qwen2: for that type AutoTokenizer of transformers 5.23 puts Qwen's own tokenizer in place of the saved one.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def learn(rows: Dataset, *, seed: int = 0, steps: int = 400, batch_size: int = 64, learning_rate: float = 5e-3):
    """Train a fresh model on `rows` until it knows them by heart; returns (model, tokenizer)."""
    tokenizer = facts_tokenizer()
    model = build_model(tokenizer, seed=seed)
    batch = pad(tokenizer, [encode(tokenizer, row) for row in rows])
    g = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=learning_rate, total_steps=steps + 1)
    model.train()
    for _ in range(steps):
        pick = torch.randperm(len(rows), generator=g)[:batch_size]
        model(**{name: x[pick] for name, x in batch.items()}).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


@torch.no_grad()
def knowledge(model, batch: dict[str, Tensor]) -> tuple[float, float]:
    """Mean NLL of the answer tokens in nats, and the share of rows whose greedy teacher-forced answer is right."""
    training = model.training
    model.eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model.train(training)
    labels = batch["labels"][:, 1:]
    right = (logits[:, :-1].argmax(-1) == labels) | (labels == -100)
    return nll_loss(*answer_logps(logits, batch["labels"])).item(), right.all(1).float().mean().item()


class Trajectory(TrainerCallback):
    """Measures forget and retain split every few steps: `points` of (step, forget NLL, retain NLL, retain match)."""

    def __init__(self, forget: dict[str, Tensor], retain: dict[str, Tensor], every: int = 1):
        self.forget, self.retain, self.every, self.points = forget, retain, every, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.measure(state, model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self.measure(state, model)

    def measure(self, state, model):
        retain = knowledge(model, self.retain)
        self.points.append((state.global_step, knowledge(model, self.forget)[0], *retain))

    def at(self, forget_nll: float) -> tuple[float, float, float] | None:
        """Step, retain NLL and retain match, interpolated where the forget NLL first reaches `forget_nll`; or None."""
        for before, after in zip(self.points, self.points[1:], strict=False):
            if after[1] >= forget_nll:
                w = (forget_nll - before[1]) / (after[1] - before[1])
                return tuple(before[i] + w * (after[i] - before[i]) for i in (0, 2, 3))
        return None
