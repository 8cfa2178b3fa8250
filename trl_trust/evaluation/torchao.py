"""A compressed model as a checkpoint of torchao's tensors, which transformers loads. Needs the extra `compression`.

save_torchao(model, tokenizer, "out/policy-int4", bits=4, group_size=128)
AutoModelForCausalLM.from_pretrained("out/policy-int4")      # the logits of compressed(model, "rtn4"), to the bit
"""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from ..lookup import near
from .compression import check_dense, target_layers
from .compressors import check_grid


FORMATS = {"int8": 8, "int4": 4}  # what `--export torchao:FORMAT` takes


def bits_of(export: str) -> int:
    """Bits of `torchao:int8` or `torchao:int4`; ValueError for anything else."""
    known = {f"torchao:{name}": bits for name, bits in FORMATS.items()}
    if export not in known:
        raise ValueError(f"export: {export!r} is unknown; {near(export, known)}")
    return known[export]


def save_torchao(model, tokenizer, folder: str | os.PathLike, *, bits: int = 4, group_size: int = 128) -> Path:
    """Write `model` with its linear layers rounded to nearest, weight-only, in torchao's form; returns the folder.

    The values are those of [`compressors.rtn`], so what `compression_report` measures for `rtn4` is measured for this
    folder. Head and embeddings stay as they are. `model` is left alone. torchao keeps a code of any width in 8 bit,
    so int4 takes the disk space of int8; packed 4 bit is a matter of its GPU kernels, which are not used here.

    Args:
        bits: 2 to 8.
        group_size: weights that share a grid; must divide the inputs of each layer, which torchao demands.

    Raises:
        ValueError: for `bits` or a `group_size` outside, or a model that is quantized.
        ImportError: without torchao.
    """
    import torch
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType
    from transformers import AutoModelForCausalLM, TorchAoConfig

    check_grid(bits, group_size)
    check_dense(model)
    for name, layer in target_layers(model).items():
        if group_size == -1 or layer.in_features % group_size:
            raise ValueError(
                f"group_size={group_size} does not divide the {layer.in_features} inputs of {name}, which torchao "
                f"demands; use a divisor of it, such as {largest_divisor(layer.in_features)}"
            )
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(group_size),
        mapping_type=MappingType.ASYMMETRIC,
    )
    folder = Path(folder)
    with TemporaryDirectory() as dense:  # transformers quantizes what it loads
        model.save_pretrained(dense)
        small = AutoModelForCausalLM.from_pretrained(
            dense, quantization_config=TorchAoConfig(config), dtype=next(model.parameters()).dtype
        )
        small.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def largest_divisor(n: int, most: int = 128) -> int:
    """The largest divisor of `n` that is at most `most`."""
    return next(d for d in range(min(n, most), 0, -1) if n % d == 0)
