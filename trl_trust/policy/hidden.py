"""Next-token distributions as the least they can be computed from: hidden states and an output head.

d numbers a token instead of the vocabulary's V. A method that compares two distributions over the whole vocabulary
meets the hidden states by a hook on the backbone, inside the model's forward, where heads that FSDP or DeepSpeed shard
are at hand and the gradient finds its way back. Logits exist a block of tokens at a time, forward and backward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from trl.trainer.utils import maybe_gather_lm_head_ctx

from ..anatomy import backbone, causal_lm, logit_transform, whole


BLOCK = 2**25  # logits held at once: 128 MB in float32

Compare = Callable[[Tensor, Tensor], Tensor]  # two (n, V) logits to (n,)


class HiddenStates:
    """The last hidden states of a causal language model, PEFT or not, and its head.

    Args:
        model: the model before it is wrapped for several processes.
        temperature: divides the logits.
        fp32_head: project in float32, as `cast_lm_head_to_fp32` has it.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0, fp32_head: bool = False):
        self.causal_lm = causal_lm(model)
        self.temperature, self.fp32_head = temperature, fp32_head
        self.scale, self.softcap = logit_transform(self.causal_lm.config.get_text_config())
        self._read: Callable[[Tensor], None] | None = None
        (backbone(model) or self.causal_lm).register_forward_hook(self._hook)

    def _hook(self, module, args, output) -> None:
        if self._read is not None:
            self._read(output.last_hidden_state)

    @contextmanager
    def reading(self, read: Callable[[Tensor], None], length: int) -> Iterator[None]:
        """Within it, each forward hands `read` the (B, length, d) states that predict its last `length` tokens."""
        self._read = lambda hidden: read(hidden[:, -length - 1 : -1])
        try:
            yield
        finally:
            self._read = None

    def compare(self, hidden: Tensor, other: Tensor, divergence: Compare) -> Tensor:
        """(N,) `divergence` of the logits of `hidden` and of `other`, (N, d) both, with this head. Called by a `read`.

        Gradient flows to `hidden` and to the head by way of `hidden`; none by way of `other`.
        """
        head, dtype = self.causal_lm.get_output_embeddings(), self.compute_dtype(hidden)
        weight, bias = whole(head.weight), whole(head.bias)
        hidden, other = hidden.to(dtype), other.detach().to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):  # the dtypes are as autocast would make them
            return _BlockwiseDivergence.apply(hidden, other, weight, bias, divergence, self.logits)

    def compute_dtype(self, hidden: Tensor) -> torch.dtype:
        """The dtype that the head projects `hidden` in."""
        device = hidden.device.type
        if self.fp32_head:
            return torch.float32
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

    def logits(self, projection: Tensor) -> Tensor:
        """(n, V) what the model makes of the output of its head, at the temperature."""
        logits = projection * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits / self.temperature


class _BlockwiseDivergence(torch.autograd.Function):
    """The backward makes the logits of a block again and differentiates `divergence` through autograd."""

    @staticmethod
    def forward(ctx, hidden, other, weight, bias, divergence, logits):
        ctx.save_for_backward(hidden, other, weight, bias)
        ctx.divergence, ctx.logits = divergence, logits
        blocks = []
        with maybe_gather_lm_head_ctx(weight, bias):
            project = _projection(weight, bias, hidden.dtype)
            for h, o in _blocks(hidden, other, weight=weight):
                blocks.append(divergence(logits(project(h)), logits(project(o))))
        return torch.cat(blocks) if blocks else hidden.new_zeros(0, dtype=_precise(hidden.dtype))

    @staticmethod
    def backward(ctx, grad_output):
        hidden, other, weight, bias = ctx.saved_tensors
        needs_hidden, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        precise = _precise(hidden.dtype)
        grad_hidden = torch.zeros_like(hidden, dtype=precise) if needs_hidden else None
        with maybe_gather_lm_head_ctx(weight, bias):
            grad_weight = torch.zeros_like(weight, dtype=precise) if needs_weight else None
            grad_bias = torch.zeros_like(bias, dtype=precise) if needs_bias else None
            project, w = _projection(weight, bias, hidden.dtype), weight.to(hidden.dtype)
            parts = () if grad_hidden is None else (grad_hidden,)
            for h, o, g, *grad_h in _blocks(hidden, other, grad_output, *parts, weight=weight):
                projection = project(h).requires_grad_()
                with torch.enable_grad():
                    value = ctx.divergence(ctx.logits(projection), ctx.logits(project(o)))
                (grad,) = torch.autograd.grad(value, projection, g)  # (n, V)
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(hidden.dtype)
                for out in grad_h:
                    _add_product(out, grad, w)
                if grad_weight is not None:
                    _add_product(grad_weight, grad.t(), h)
        cast = lambda grad, like: None if grad is None else grad.to(like.dtype)
        return cast(grad_hidden, hidden), None, cast(grad_weight, weight), cast(grad_bias, bias), None, None


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _blocks(*rows: Tensor, weight: Tensor):
    """Split tensors with N rows in unison, so that the logits of a block stay within [`BLOCK`]."""
    size = max(1, BLOCK // weight.size(0))
    return zip(*(x.split(size) for x in rows if len(x)), strict=True)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, in the dtype of `total` where the device can: blocks rounded to bfloat16 add up to a bias."""
    if total.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # torch 2.8, CUDA only
    else:
        total += a @ b


def _projection(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """(n, d) to (n, V) in at least float32: logits rounded to bfloat16 would be off by more than small divergences."""
    w = weight.to(dtype).t()

    def project(hidden: Tensor) -> Tensor:
        if hidden.is_cuda and dtype in (torch.float16, torch.bfloat16):
            out = torch.mm(hidden, w, out_dtype=torch.float32)  # torch 2.8, CUDA only
        else:
            out = (hidden @ w).to(_precise(dtype))
        return out if bias is None else out + bias

    return project
