"""Which parameter goes to the matrix rule and which to AdamW.

The decision is made by *module type*, because names lie: a tied head is listed under the embedding's name, learned
positions are a 2-D `weight`, and the experts of a mixture are 3-D without `weight` in their name.

| parameter | rule |
|---|---|
| weight of `nn.Linear` (LoRA's factors A and B included, each as a matrix of its own) | matrix |
| weight of GPT-2's `Conv1D`, stored (in, out) | matrix, transposed |
| 3-D weights of a module whose class name has `Experts`, (experts, out, in) | matrix, batched over the experts |
| embeddings, learned positions, tied and untied heads, value heads, whatever is outside the backbone | AdamW |
| routers of a mixture of experts | AdamW |
| convolutions, vectors, scalars, biases, norms, matrices of one row or column, any other module's parameters | AdamW |

Two regular expressions, `matrix_pattern` and `adamw_pattern`, overrule the table in either direction.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..anatomy import backbone, embeddings
from .zero import whole_shape


FLATTENED = (
    "FSDP1 hands flat pieces to the optimizer, from which no matrix can be recovered; use FSDP2, DDP or DeepSpeed. "
    "DeepSpeed's engine outside of a Trainer has to be made known by optimizer.bind(engine)"
)
SPLIT_SIZES = '{"c_attn": (768, 768, 768)}, or "c_attn:768:768:768" in optim_args'


@dataclass(frozen=True)
class Route:
    """Where one trainable parameter goes, and why.

    Attributes:
        name: Name in `model.named_parameters()`.
        parameter: The parameter itself.
        rule: `"matrix"` or `"adamw"`.
        reason: What decided, in a word or two.
        decay: Whether weight decay applies.
        transposed: Stored as (in, out); the matrix rule sees (out, in).
        split_sizes: Sizes of the blocks that share this weight, along the output dimension; empty for one block.
    """

    name: str
    parameter: Tensor
    rule: str
    reason: str
    decay: bool
    transposed: bool = False
    split_sizes: tuple[int, ...] = ()


def parse_split_sizes(value: Mapping[str, Sequence[int]] | str | None) -> dict[str, tuple[int, ...]]:
    """Return `{pattern: sizes}` from a mapping, or from the text form `"c_attn:768:768:768;qkv_proj:64:32:32"`.

    Raises:
        ValueError: If the text has no sizes, or a size is not a positive integer.
    """
    if value is None:
        return {}
    if not isinstance(value, (str, Mapping)):
        raise ValueError(f"split_sizes={value!r} must be {SPLIT_SIZES}")
    if isinstance(value, str):
        # The sizes are the numbers at the end: a pattern may hold colons of its own, as in (?:q|k).
        found = {entry: re.fullmatch(r"(.+?)((?::\d+)*)", entry) for entry in value.split(";") if entry}
        value = {entry[1]: entry[2].split(":")[1:] for entry in found.values()}
    parsed = {}
    for pattern, sizes in value.items():
        try:
            parsed[pattern] = tuple(int(size) for size in sizes)
        except (TypeError, ValueError):
            parsed[pattern] = ()
        if len(parsed[pattern]) < 2 or min(parsed[pattern]) < 1:
            raise ValueError(
                f"split_sizes needs two or more positive sizes a pattern, got {pattern!r}: {sizes!r}; "
                f"write {SPLIT_SIZES}"
            )
    return parsed


def _require_pattern(field: str, pattern: str | None) -> None:
    try:
        re.compile("" if pattern is None else pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{field}={pattern!r} must be a regular expression, as 'q_proj|k_proj' ({error})") from None


def _embedding_ids(model: nn.Module) -> set[int]:
    """Ids of the weights that look tokens up or score them. By identity, so that a tied head is found too."""
    tables = [module for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))]
    return {id(table.weight) for table in tables + embeddings(model) if getattr(table, "weight", None) is not None}


def _is_router(model: nn.Module, name: str, module: nn.Module) -> bool:
    parent, _, last = name.rpartition(".")
    # "gate" alone is also a word of gated units: only beside experts does it name a router.
    beside_experts = last in ("gate", "shared_expert_gate") and hasattr(model.get_submodule(parent), "experts")
    return "Router" in type(module).__name__ or last == "router" or beside_experts


def _default_rule(model: nn.Module, path: str, module: nn.Module, name: str, parameter: Tensor) -> tuple[str, str]:
    """Rule and reason for a parameter that is neither an embedding nor outside the backbone."""
    kind = type(module).__name__
    if _is_router(model, path, module):
        return "adamw", "router"
    shape = whole_shape(parameter)
    if len(shape) < 2 or "bias" in name:
        return "adamw", "vector"
    if min(shape[-2:]) == 1:
        return "adamw", "one row or column"
    if name == "weight" and (isinstance(module, nn.Linear) or kind == "Conv1D"):
        return "matrix", kind
    if len(shape) == 3 and "Experts" in kind:
        return "matrix", kind
    return "adamw", kind


def _is_transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "is_transposed", False))


def route(
    model: nn.Module,
    *,
    matrix_pattern: str | None = None,
    adamw_pattern: str | None = None,
    split_sizes: Mapping[str, Sequence[int]] | str | None = None,
    no_decay: Collection[str] | None = None,
) -> list[Route]:
    """Assign every trainable parameter of `model` to exactly one rule.

    Args:
        model: The model, before or after PEFT. Not yet sharded, or sharded by FSDP2 or ZeRO.
        matrix_pattern: Regular expression, searched in the names: these go to the matrix rule.
        adamw_pattern: The same for AdamW.
        split_sizes: `{pattern: sizes}`: weights that hold several matrices stacked along the output dimension, such as
            a fused QKV projection. Each block is then a matrix of its own.
        no_decay: Names without weight decay. Default: biases and norms. Vectors are never decayed.

    Returns:
        One [`Route`] a trainable parameter, in the model's order.

    Raises:
        ValueError: If a pattern matches nothing, both patterns match one name, a matrix has fewer than two dimensions
            or was flattened by FSDP1, or split sizes do not add up to the output dimension.
    """
    splits = parse_split_sizes(split_sizes)
    for field, pattern in (
        ("matrix_pattern", matrix_pattern),
        ("adamw_pattern", adamw_pattern),
        *(("split_sizes", pattern) for pattern in splits),
    ):
        _require_pattern(field, pattern)
    tables, body = _embedding_ids(model), backbone(model)
    body = None if body is None else {id(module) for module in body.modules()}
    unused = {pattern for pattern in (matrix_pattern, adamw_pattern, *splits) if pattern is not None}
    routes: list[Route] = []
    seen: set[int] = set()

    def matches(pattern: str | None, name: str) -> bool:
        hit = pattern is not None and re.search(pattern, name) is not None
        if hit:
            unused.discard(pattern)
        return hit

    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name, shape = f"{path}.{leaf}" if path else leaf, whole_shape(parameter)

            flattened = "FlatParameter" in type(parameter).__name__
            if flattened or (isinstance(module, nn.Linear) and leaf == "weight" and len(shape) != 2):
                raise ValueError(f"{name} has shape {tuple(shape)}, it was flattened: {FLATTENED}")

            to_matrix, to_adamw = matches(matrix_pattern, name), matches(adamw_pattern, name)
            if to_matrix and to_adamw:
                raise ValueError(
                    f"{name} matches both matrix_pattern={matrix_pattern!r} and adamw_pattern={adamw_pattern!r}; "
                    "make the two exclusive"
                )
            if to_matrix or to_adamw:
                rule, reason = ("matrix", "matrix_pattern") if to_matrix else ("adamw", "adamw_pattern")
            elif id(parameter) in tables:
                rule, reason = "adamw", "embedding or head"
            elif body is not None and id(module) not in body:
                rule, reason = "adamw", "outside the backbone"
            else:
                rule, reason = _default_rule(model, path, module, leaf, parameter)

            if no_decay is None:
                decay = not re.search("bias|norm", name, re.IGNORECASE)
            else:
                decay = name not in no_decay
            options = {}
            if rule == "matrix":
                if len(shape) < 2:
                    raise ValueError(
                        f"matrix_pattern={matrix_pattern!r} matches {name} of shape {tuple(shape)}; "
                        "the matrix rule needs two dimensions or more"
                    )
                options["transposed"] = _is_transposed(module)
                for pattern, sizes in splits.items():
                    if matches(pattern, name):
                        rows = shape[-1 if options["transposed"] else -2]
                        if sum(sizes) != rows:
                            raise ValueError(
                                f"split_sizes {pattern!r}: {sizes} add up to {sum(sizes)}; {name} has {rows} outputs"
                            )
                        options["split_sizes"] = sizes
            routes.append(Route(name, parameter, rule, reason, decay and len(shape) >= 2, **options))

    if unused:
        raise ValueError(f"no parameter matches {sorted(unused)}; see the names in model.named_parameters()")
    return routes


def routing_table(rows: Iterable[tuple[str, ...]]) -> str:
    """Lay `rows`, the first of which is the header, out in columns."""
    rows = [tuple(str(cell) for cell in row) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
