"""Gaussian noise with learnable scales on what enters decoder layers, made again in the backward. For ALP.

From the authors' code (arXiv 2603.19470, `patch_qwen2.py`); addition in float32, hashed seeds and scales outside the
model are ours.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def noise_seed(*key: int) -> int:
    """A 63-bit seed of (base seed, step, micro-step, rank, layer); hashed, since sums of them would collide."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little") >> 1


class _AddNoise(torch.autograd.Function):
    """`hidden + exp(log_sigma) eps`, eps drawn from `seed` with the shape of `hidden`, added in float32 or better.

    The backward draws eps again: kept, it would take as much memory as the hidden states in float32, at every layer. A
    CPU keeps it, which has the memory, and draws slowly.
    """

    keeps = ("cpu",)

    @staticmethod
    def draw(like: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(like.device).manual_seed(seed)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=dtype)

    @staticmethod
    def forward(ctx, hidden: Tensor, log_sigma: Tensor, seed: int) -> Tensor:
        noise = _AddNoise.draw(hidden, seed)
        ctx.save_for_backward(log_sigma, noise if hidden.device.type in _AddNoise.keeps else None)
        ctx.seed = seed
        return (log_sigma.exp() * noise).add_(hidden).to(hidden.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_log_sigma = None
        if ctx.needs_input_grad[1]:
            log_sigma, noise = ctx.saved_tensors
            noise = _AddNoise.draw(grad, ctx.seed) if noise is None else noise
            grad_log_sigma = (log_sigma.exp() * torch.sum(noise * grad)).to(log_sigma.dtype)
        return grad, grad_log_sigma, None


class LayerNoise:
    """Noise on what enters decoder layers, hence on the residual stream; off unless [`on`] was called last.

    The scales are one tensor outside the model. Inside, they would be among the weights that are saved and sent to
    vLLM, in the norm that gradients are clipped by, and in the way of optimizers that tell parameters apart by their
    modules and of all that shards, casts or flattens parameters. In exchange the trainer averages their gradient over
    processes, and saves them.

    Args:
        layers: the decoder layers of the model.
        indices: those to perturb; their order is that of the scales.
        sigma: initial scale of each.
        learn: whether the scales require gradient.
    """

    def __init__(self, layers: Sequence[nn.Module], indices: Sequence[int], sigma: float, learn: bool, device):
        self.log_sigma = torch.full((len(indices),), math.log(sigma), device=device).requires_grad_(learn)  # (K,)
        self._key: tuple[int, ...] | None = None
        for k, index in enumerate(indices):
            layers[index].register_forward_pre_hook(partial(self._perturb, k, index), with_kwargs=True)

    def on(self, *key: int) -> None:
        """Perturb the forwards that follow. The same key gives the same noise, in a forward that is checkpointed and
        made again in the backward too."""
        self._key = key

    def off(self) -> None:
        self._key = None

    def _perturb(self, k: int, index: int, layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
        if self._key is None:
            return None
        # transformers passes the hidden states first, by position or by name
        hidden = args[0] if args else kwargs["hidden_states"]
        log_sigma = self.log_sigma[k].to(hidden.device)  # a model may be spread over devices
        noisy = _AddNoise.apply(hidden, log_sigma, noise_seed(*self._key, index))
        return ((noisy, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": noisy})
