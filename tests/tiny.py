"""Small things that many tests build: a model, a trainer, a batch in float64, a loss with its gradient."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig

from trl_trust.policy.base import PolicyBatch, PolicyLoss
from trl_trust.quickstart.model import build_model
from trl_trust.quickstart.task import build_tokenizer, problems


def save_tiny_model(path, *, hidden_size=16, seed=0):
    """Write an untrained Qwen2 and its tokenizer to `path` and return it as a string."""
    tokenizer = build_tokenizer()
    build_model(tokenizer, hidden_size=hidden_size, seed=seed).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def leave():
    """End a test's worker process that has done its work, with all others and without destructors.

    With torch 2.13, gloo's threads and those of autograd now and then abort or hold up an orderly end.
    """
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def digits_reward(completions, **kwargs):
    """Share of digits in a completion: an untrained model earns different rewards within a group."""
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]


def on_two_processes(script, *words, timeout=300):
    """Run `script` on two gloo processes, which can import what stands beside it, in the tests' folder and above."""
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command += [str(script), *map(str, words)]
    path = os.pathsep.join([str(tests), str(tests.parent), *sys.path])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-4000:]


class ZeRO3:
    """Stands in for the DeepSpeed config of which transformers holds a weak reference."""

    def __init__(self, **zero):
        self.config = {"zero_optimization": {"stage": 3, **zero}}

    def is_zero3(self):
        return True


def tiny_config(config_class=GRPOConfig, output_dir="unused", **overrides):
    """A config that trains on a CPU, with live ratios: 4 mini-batches a generation of 4 prompts x 4 responses."""
    defaults = dict(
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_steps=1,
        max_steps=4,
        per_device_train_batch_size=4,
        num_generations=4,
        steps_per_generation=4,
        max_completion_length=8,
        learning_rate=1e-2,
    )
    return config_class(output_dir=str(output_dir), **{**defaults, **overrides})


def tiny_trainer(trainer_class, model_path, args, **kwargs):
    """A trainer on the addition task, with a reward that an untrained model can earn."""
    kwargs.setdefault("reward_funcs", digits_reward)
    kwargs.setdefault("train_dataset", problems("train", 32))
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    trainer = trainer_class(model=model, args=args, processing_class=tokenizer, **kwargs)
    trainer.remove_callback(PrinterCallback)
    return trainer


def tiny_run(trainer_class, model_path, args, **kwargs):
    """Build a trainer and train it. Two runs are comparable only if each is built right before it is trained: the
    constructor sets the seed."""
    trainer = tiny_trainer(trainer_class, model_path, args, **kwargs)
    trainer.train()
    return trainer


def parameter_gap(one, other) -> float:
    """Largest absolute difference between the parameters of two models; 0.0 means equal to the bit."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def policy_batch(*, logps, old_logps=None, ratio=None, mask=None, advantages, **fields) -> PolicyBatch:
    """A [`PolicyBatch`] in float64 from nested lists; `ratio` sets `old_logps = logps - log(ratio)`.

    `advantages` is a list of B numbers, or a nested list for one a token. Tensors in `fields` pass through.
    """
    as_tensor = lambda x: torch.as_tensor(x, dtype=torch.float64)
    logps = as_tensor(logps).clone().requires_grad_()
    if ratio is not None:
        old_logps = logps.detach() - as_tensor(ratio).log()
    old_logps = logps.detach().clone() if old_logps is None else as_tensor(old_logps)
    advantages = as_tensor(advantages)
    return PolicyBatch(
        logps=logps,
        old_logps=old_logps,
        mask=torch.ones_like(old_logps) if mask is None else as_tensor(mask),
        advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
        **fields,
    )


def aggregate(per_token_loss: Tensor, mask: Tensor, how: str) -> Tensor:
    """0-d: `"token"` mean over all live tokens (dapo), or `"sequence"` mean of each response's token mean (grpo)."""
    masked = per_token_loss * mask
    if how == "token":
        return masked.sum() / mask.sum().clamp(min=1.0)
    return (masked.sum(1) / mask.sum(1).clamp(min=1.0)).mean()


def loss_and_grad(loss, batch: PolicyBatch, how: str = "token", **settings) -> tuple[Tensor, Tensor, PolicyLoss]:
    """Aggregated loss (0-d), its gradient by `batch.logps` (B, T), and what the policy term returned."""
    out = loss(batch, **settings)
    total = aggregate(out.per_token_loss, batch.mask, how)
    if out.batch_loss is not None:
        total = total + out.batch_loss
    (grad,) = torch.autograd.grad(total, batch.logps)
    return total.detach(), grad, out


def masked_mean(x: Tensor, mask: Tensor) -> float:
    """Mean over live tokens of a (B, T) metric."""
    return ((x * mask).sum() / mask.sum()).item()


def random_policy_batch(seed=0, B=4, T=6, spread=0.5, masked=True, dtype=torch.float64, **fields) -> PolicyBatch:
    """Random log-probabilities, ratios with log-spread `spread`, advantages of both signs, ragged masks."""
    g = torch.Generator().manual_seed(seed)
    logps = -torch.rand(B, T, generator=g, dtype=dtype) * 3 - 0.01
    old_logps = (logps + spread * torch.randn(B, T, generator=g, dtype=dtype)).clamp(max=-1e-3)
    lengths = torch.randint(1, T + 1, (B,), generator=g) if masked else torch.full((B,), T)
    mask = (torch.arange(T)[None] < lengths[:, None]).to(dtype)
    advantages = torch.randn(B, 1, generator=g, dtype=dtype)
    return PolicyBatch(logps.requires_grad_(), old_logps, mask, advantages, **fields)
