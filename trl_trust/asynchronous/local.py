"""Asynchronous GRPO in one process on a CPU: for tests, benchmarks and a first look, not for training a real model.

TRL's queue, staleness, packing and accounting are its own; replaced is what needs a GPU or a server: the rollouts come
from [`LocalRolloutWorker`], a copy of the policy as it was some versions ago; the weights reach it through
[`LocalWeightTransfer`], which is handed what a vLLM server would be sent; and [`on_a_cpu`] puts an attention in plain
torch in the place of FlashAttention 3, and nothing in the place of the vLLM client and of the table of peak FLOPs.
"""

import queue
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.async_grpo import async_grpo_trainer, packing
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from ..tasks.sampling import sample


class LocalRolloutWorker:
    """TRL's `RolloutWorkerProtocol` in the trainer's own process: one update's rows at each new weight version.

    Nothing runs in the background, so a run repeats to the bit. At version v the rows come from version v - lag, or
    from the oldest there is. The queue holds one micro-batch more than an update trains on, since accelerate fetches
    one ahead.

    Args:
        path: folder of the model, for its architecture and tokenizer.
        problems: with the column `prompt`, and those that `reward` reads.
        rewards: reward functions as TRL calls them; their sum counts, `None` is 0.
        rows: rows of an update.
        ahead: rows of a micro-batch.
        lag: versions between the policy that samples and the newest.
        num_generations: responses a prompt.
        max_completion_length: tokens of a response at most.
        seed: of the sampling and of the order of prompts.
    """

    def __init__(
        self,
        path: str,
        problems: Dataset,
        rewards: list[Callable[..., list[float]]],
        *,
        rows: int,
        ahead: int,
        lag: int = 0,
        num_generations: int = 8,
        max_completion_length: int = 24,
        seed: int = 0,
    ):
        self.rollout_buffer: queue.Queue = queue.Queue()
        self.metrics_queue: queue.Queue = queue.Queue()
        self.policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.problems, self.rewards = problems, rewards
        self.rows, self.ahead, self.lag, self.num_generations = rows, ahead, lag, num_generations
        self.max_completion_length = max_completion_length
        self.generator = torch.Generator().manual_seed(seed)
        self.versions: dict[int, dict[str, Tensor]] = {}  # weights by version, as old as may still sample
        self._incoming: dict[str, Tensor] = {}
        self._version, self._groups, self._started = 0, 0, False

    # -- what the trainer calls --------------------------------------------------------------------------------------

    def start(self) -> None:
        self._started = True
        self._produce(self.rows + self.ahead)

    def stop(self) -> None:
        self._started = False

    def update_model_version(self, model_version: int) -> None:
        self._version = model_version
        self.versions[model_version] = self._incoming
        for old in [v for v in self.versions if v < model_version - self.lag]:
            del self.versions[old]
        if self._started:
            self._produce(self.rows)

    def check_health(self, stale_after_s: float) -> None:
        # the trainer found the queue empty: rows were left out, and no new version comes before they are replaced
        if self._started:
            self._produce(self.ahead)

    # -- sampling ----------------------------------------------------------------------------------------------------

    def take_weights(self, named: Iterator[tuple[str, Tensor]]) -> None:
        self._incoming = {name: tensor.detach().clone() for name, tensor in named}

    def _produce(self, rows: int) -> None:
        version = min(self.versions)
        self.policy.load_state_dict(self.versions[version], strict=False)
        n = self.num_generations
        first, self._groups = self._groups, self._groups + rows // n
        problems = [self.problems[group % len(self.problems)] for group in range(first, self._groups)]
        prompts = [problem["prompt"] for problem in problems]
        if not isinstance(prompts[0], str):
            prompts = [
                self.tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts
            ]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        drawn = sample(
            self.policy, **inputs, samples=n, max_new_tokens=self.max_completion_length, generator=self.generator
        )
        texts = self.tokenizer.batch_decode(drawn.ids, skip_special_tokens=True)
        for i, problem in enumerate(problems):
            of_group = range(i * n, (i + 1) * n)
            scores = self._score(problem, [texts[row] for row in of_group])
            advantages = (scores - scores.mean()) / (scores.std() + 1e-8)  # as TRL's worker has it
            for row, score, advantage in zip(of_group, scores, advantages, strict=True):
                live = drawn.mask[row]
                prompt, said = drawn.prompt_ids[row][drawn.prompt_mask[row] > 0].numpy(), drawn.ids[row][live].numpy()
                logps = drawn.logps[row][live].numpy()
                self.rollout_buffer.put_nowait(
                    RolloutSample(
                        prompt=problem["prompt"],
                        completion=texts[row],
                        input_ids=np.concatenate([prompt, said]),
                        completion_mask=np.repeat([0, 1], [len(prompt), len(said)]),
                        old_log_probs=np.concatenate([np.zeros(len(prompt), dtype=np.float32), logps]),
                        advantage=float(advantage),
                        model_version=version,
                        group_id=first + i,
                        metrics={"reward": float(score), "reward_std": float(scores.std())},
                        enqueued_at=time.time(),
                    )
                )

    def _score(self, problem: dict[str, Any], texts: list[str]) -> np.ndarray:
        """(n,) summed rewards of the completions of one problem, text or messages as its prompt is."""
        is_text = isinstance(problem["prompt"], str)
        columns = {name: [value] * len(texts) for name, value in problem.items() if name != "prompt"}
        given = {
            "prompts": [problem["prompt"]] * len(texts),
            "completions": texts if is_text else [[{"role": "assistant", "content": text}] for text in texts],
            "completion_ids": [self.tokenizer(text)["input_ids"] for text in texts],
        }
        found = [[x or 0.0 for x in reward(**given, **columns)] for reward in self.rewards]
        return np.array(found, dtype=float).sum(0)


class LocalWeightTransfer:
    """TRL's `WeightTransferProtocol`: hands the trainer's weights to a [`LocalRolloutWorker`], or to nobody."""

    def __init__(self, worker: LocalRolloutWorker | None = None):
        self.worker = worker

    def init_weight_transfer(self) -> None: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def destroy(self) -> None: ...

    def send_weights(self, iterator: Iterator[tuple[str, Tensor]]) -> None:
        if self.worker is not None:
            self.worker.take_weights(iterator)
            return
        for _ in iterator:  # sharded weights are gathered on every process
            pass


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """Within it, `AsyncGRPOTrainer` of TRL 1.16 is built and trains without a GPU and a vLLM server.

    Besides, `token_budget`, `rollout_worker` and `weight_transfer` must be given, and `bf16=False`.
    """
    held = async_grpo_trainer.get_peak_flops_per_device, async_grpo_trainer.VLLMClient, packing._flash_attn
    async_grpo_trainer.get_peak_flops_per_device = lambda *args: None  # asks CUDA for the name of the device
    async_grpo_trainer.VLLMClient = lambda *args: None
    packing._flash_attn = lambda: SimpleNamespace(flash_attn_varlen_func=varlen_attention)
    try:
        yield
    finally:
        async_grpo_trainer.get_peak_flops_per_device, async_grpo_trainer.VLLMClient, packing._flash_attn = held


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    **unread: Any,
) -> Tensor:
    """FlashAttention's `flash_attn_varlen_func` in plain torch: S segments, each causal to the *end* of its keys.

    Args:
        query: (Q, heads, d); key, value: (K, key heads, d).
        cu_seqlens_q, cu_seqlens_k: (S + 1,) boundaries of the segments.
        window_size: keys to the left that a query sees besides its own; -1 for all.
    """
    starts_q, starts_k = cu_seqlens_q[:-1].long(), cu_seqlens_k[:-1].long()  # (S,)
    lengths_q, lengths_k = cu_seqlens_q.diff().long(), cu_seqlens_k.diff().long()
    i, j = torch.arange(max_seqlen_q, device=query.device), torch.arange(max_seqlen_k, device=query.device)
    live = i < lengths_q[:, None]  # (S, max_q)
    at_q = (starts_q[:, None] + i).clamp(max=len(query) - 1)
    at_k = (starts_k[:, None] + j).clamp(max=len(key) - 1)  # (S, max_k)
    last = (lengths_k - lengths_q)[:, None] + i  # (S, max_q), the key that is the query's own position
    seen = j <= last[:, :, None] if causal else j < lengths_k[:, None, None]  # (S, max_q, max_k)
    if window_size[0] >= 0:
        seen = seen & (j >= last[:, :, None] - window_size[0])
    per_segment = lambda x, at: x[at].transpose(1, 2)  # (S, heads, max, d)
    out = F.scaled_dot_product_attention(
        per_segment(query, at_q),
        per_segment(key, at_k),
        per_segment(value, at_k),
        # a query that is padding sees one key: a row of nothing would be NaN
        attn_mask=(seen | ((j == 0) & ~live[:, :, None]))[:, None],
        scale=softmax_scale,
        enable_gqa=True,
    )
    return out.transpose(1, 2)[live]  # (Q, heads, d), the segments side by side
