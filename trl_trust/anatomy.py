"""What is inside a causal language model, found by structure, below PEFT and in any family.

Of a model that also reads images it is the text tower that counts.

All of it is of the model before DDP, DeepSpeed or FSDP1 wrap it. Nothing here changes a model.
"""

from typing import Any

from torch import Tensor, nn


def causal_lm(model: nn.Module) -> nn.Module:
    """The model below PEFT, which puts its adapters inside of it, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone(model: nn.Module) -> nn.Module | None:
    """What makes the last hidden states; `None` for a model that is no head on a backbone."""
    inner = causal_lm(model)
    found = getattr(inner, "base_model", None)
    return found if isinstance(found, nn.Module) and found is not inner else None


def output_head(model: nn.Module) -> nn.Module | None:
    """What turns hidden states into logits; `None` for a model without."""
    return _called(causal_lm(model), "get_output_embeddings")


def embeddings(model: nn.Module) -> list[nn.Module]:
    """The input embedding and the output head, as far as there are any."""
    found = (_called(causal_lm(model), "get_input_embeddings"), output_head(model))
    return [module for module in found if module is not None]


def _called(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        return getattr(model, getter)()
    except (AttributeError, NotImplementedError, TypeError):  # not a transformers model, or one without that layer
        return None


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order; of a multimodal model its text tower's.

    Of the lists of modules that are as long as the config's `num_hidden_layers`, the one with the most parameters.

    Raises:
        ValueError: if there is no such list.
    """
    inner = causal_lm(model)
    depth = getattr(inner.config.get_text_config(), "num_hidden_layers", None)
    stacks = [m for m in inner.get_decoder().modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not stacks:
        raise ValueError(f"{type(inner).__name__} has no list of {depth} decoder layers (num_hidden_layers)")
    return list(max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters())))


def logit_transform(config: Any) -> tuple[float, float | None]:
    """(scale, softcap) of a model's logits, `softcap tanh(scale h W^T / softcap)`, from its text config.

    The names are those that TRL 1.16 reads for its fused head: logits are multiplied by the first three, divided by
    `logits_scaling` (save in HyperCLOVA X, which multiplies by it).
    """
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            scale = getattr(config, name)
            break
    else:
        scaling = getattr(config, "logits_scaling", None) or 1.0
        scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    return scale, getattr(config, "final_logit_softcapping", None)


def whole(x: Tensor | None) -> Tensor | None:
    """A DTensor, as FSDP2 shards, gathered, in which every process takes part; anything else as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
