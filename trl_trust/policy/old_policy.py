"""The policy as it was at generation: its last hidden states and, where it is trained, its output head."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from ..anatomy import whole
from .hidden import HiddenStates


class OldDistribution(HiddenStates):
    """The old policy's next-token distributions over the vocabulary: its last hidden states, and its output head.

    The head is the one in use where that is frozen (LoRA), else one copy. The policy's own states are met inside its
    forward, and the logits of both exist only in tiles (`trl.kernels`).
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0, fp32_head: bool = False):
        super().__init__(model, temperature, fp32_head)
        if is_deepspeed_zero3_enabled() and self.causal_lm.get_output_embeddings().weight.requires_grad:
            raise ValueError(
                "divergence='full' keeps a copy of the trained output head, which DeepSpeed ZeRO-3 shards: use LoRA, "
                "ZeRO-2 or divergence='unbiased'."
            )
        self.old_head: tuple[Tensor, Tensor | None] | None = None

    @contextmanager
    def recording(self, length: int) -> Iterator[list[Tensor]]:
        """Collect the hidden states that predict the last `length` tokens, forward by forward, and keep the head."""
        chunks: list[Tensor] = []
        self.old_head = None
        with self.reading(partial(self._record, chunks), length):
            yield chunks

    def _record(self, chunks: list[Tensor], hidden: Tensor) -> None:
        if self.old_head is None:
            head = self.causal_lm.get_output_embeddings()
            copy = lambda x: x.detach().clone() if x is not None and x.requires_grad else x
            self.old_head = copy(head.weight), copy(head.bias)
        # in the dtype of the projection: what that would round is not worth keeping
        chunks.append(hidden.to(self.compute_dtype(hidden), copy=True))

    @contextmanager
    def comparing(self, old_hidden: Tensor, live: Tensor) -> Iterator[dict[str, Tensor]]:
        """Within it, a forward leaves `divergence` in the mapping, (B, T): KL(new || old) at the `live` tokens.

        Args:
            old_hidden: (B, T, d), as they were recorded.
            live: (B, T), bool.
        """
        left: dict[str, Tensor] = {}
        with self.reading(partial(self._compare, left, old_hidden, live), live.size(1)):
            yield left

    def _compare(self, left: dict[str, Tensor], old_hidden: Tensor, live: Tensor, hidden: Tensor) -> None:
        head = self.causal_lm.get_output_embeddings()
        hidden = hidden.to(self.compute_dtype(hidden))  # (B, T, d)
        with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are as autocast would make them
            kl, _ = ChunkedDivergenceFunction.apply(
                hidden[live],
                whole(head.weight),
                whole(head.bias),
                old_hidden[live],
                whole(self.old_head[0]),
                whole(self.old_head[1]),
                1.0,  # KL(student || teacher)
                self.temperature,
                *(self.scale, self.softcap) * 2,  # of student and teacher
            )
        # `masked_scatter` keeps the graph when nothing is live: no process may skip a backward
        left["divergence"] = kl.new_zeros(live.shape).masked_scatter(live, kl)  # (B, T)
