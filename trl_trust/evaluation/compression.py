"""What compression does to a trained policy: quantized or pruned in place, measured, restored to the bit."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..anatomy import embeddings
from .compressors import rtn


def target_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that compression means: no head, no embedding, nothing that shares its weight."""
    tables = embeddings(model)
    seen: dict[int, int] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            seen[id(weight)] = seen.get(id(weight), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module not in tables and seen[id(module.weight)] == 1
    }


@contextmanager
@torch.no_grad()
def compressed(model: nn.Module, method: str, *, group_size: int = 128) -> Iterator[nn.Module]:
    """`model` with its linear layers compressed by `method` (`"rtn2"` .. `"rtn8"`); every bit as before on exit.

    Raises:
        ValueError: for an unknown method.
    """
    if not (method.startswith("rtn") and method[3:].isdigit()):
        raise ValueError(f"method={method!r} is unknown; there are rtn2 to rtn8")
    layers = target_layers(model)
    kept = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.weight.data = rtn(layer.weight.data, int(method[3:]), group_size)
        yield model
    finally:
        for name, layer in layers.items():
            layer.weight.data = kept[name]
