"""A Hugging Face trainer's step computed again: how TRAM climbs inside `training_step` without leaving a trace.

A trainer calls `compute_loss` once per micro-batch, on inputs that it has prepared however it likes (generated,
buffered, scored), and counts and logs while it does. [`rewound`] lets the same loss be computed once more as if it
were the first time.
"""

import copy
import functools
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import Trainer


if TYPE_CHECKING:
    from .tram import TRAM

# Refused where a trainer's settings say so, and at the first ascent of a loop.
HIDDEN = (
    "TRAM cannot run under {}, which hides parameters and gradients; use one process a device with "
    "DistributedDataParallel, or FSDP2"
)
COMPILED = (
    "TRAM cannot run on the result of torch.compile(model), which leaves out the hooks that read predictions; set "
    "torch_compile=False, or compile in place with model.compile()"
)


def bookkeeping(trainer: Trainer) -> dict[str, Any]:
    """What `trainer` knows of itself now, for [`rewound`]: counters, coefficients, values to be logged.

    TRL 1.16 and our own trainers change in `compute_loss`: what `in_place` lists, `_trust_window` and
    `_trust_gathered`, in place, so they are copied; `_total_train_tokens`, `entropy_coef` and the rest by assignment.
    """
    in_place = ("_metrics", "_stored_metrics", "_diagnostic_counters")  # most of them; ORPO and CPO; SDPO
    return {
        name: _copied(value) if name in in_place or name.startswith("_trust_") else value
        for name, value in vars(trainer).items()
    }


@contextmanager
def rewound(trainer: Trainer, books: dict[str, Any]):
    """Within the block `trainer` is as it was when `books` were taken, so that a loss computed again is the same loss
    and leaves no trace; after it, `trainer` is as before the block."""
    now = dict(vars(trainer))
    vars(trainer).update({name: _copied(v) if v is not now.get(name) else v for name, v in books.items()})
    try:
        yield
    finally:
        vars(trainer).update(now)


def _copied(value: Any) -> Any:
    """Nested lists and dictionaries copied, what they hold shared."""
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps a defaultdict's factory
        copied.update((key, _copied(item)) for key, item in value.items())
        return copied
    return [_copied(item) for item in value] if isinstance(value, list) else value


def attach(tram: "TRAM", trainer: Trainer) -> None:
    """Make `trainer` climb: wraps `training_step`, `compute_loss` and `log`, all public, of this one object.

    A trainer calls `compute_loss` once per micro-batch and takes the backward of what it gets. So TRAM's passes 1 and
    2 happen when it is called, what it gets is the loss of pass 3, and at the end of `training_step` the parameters
    are put back. What a trainer does once per micro-batch, it still does once.

    A trainer that trains tensors outside of model and optimizer lists them in an attribute `tensors_aside`: of the two
    gradients they get pass 3's.

    Raises:
        ValueError: With fp16, whose gradient scaler hides the gradients, with `torch_compile`, and under DeepSpeed,
            `DataParallel` and FSDP1.
    """
    args, accelerator = trainer.args, trainer.accelerator
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "TRAM cannot run under DeepSpeed, which keeps parameters and gradients in flat partitions of its own; "
            "use DistributedDataParallel or FSDP2"
        )
    if args.fp16 or accelerator.scaler is not None:  # `accelerate launch --mixed_precision fp16` sets the latter
        raise ValueError("TRAM cannot run with fp16, whose scaler hides the gradients; use bf16=True")
    if args.torch_compile:
        raise ValueError(f"torch_compile={args.torch_compile}: {COMPILED}")
    quantised = any(getattr(trainer.model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if args.n_gpu > 1 and not quantised:  # then Trainer uses DataParallel (transformers 5.23)
        raise ValueError(f"n_gpu={args.n_gpu} in one process: {HIDDEN.format('DataParallel')}")
    if trainer.is_fsdp_enabled and accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(f"fsdp_version=1: {HIDDEN.format('FSDP1')}")
    training_step, compute_loss, log = (_bare(trainer, name) for name in ("training_step", "compute_loss", "log"))
    computed = None  # losses computed in this training step; None outside of one

    def tram_compute_loss(model, inputs, *args, **kwargs):
        nonlocal computed
        if computed is None:  # evaluation
            return compute_loss(model, inputs, *args, **kwargs)
        computed += 1
        if not tram.climbs:
            return compute_loss(model, inputs, *args, **kwargs)

        def first():  # on a copy, because some losses pop the labels
            return compute_loss(model, copy.copy(inputs), *args, **kwargs)

        def replay():
            with rewound(trainer, books):
                return first()

        books = bookkeeping(trainer)
        last = trainer.accelerator.sync_gradients
        loss = tram.ascend(model, first, replay, labels=inputs.get("labels"), last=last)
        with rewound(trainer, books):
            perturbed = compute_loss(model, inputs, *args, **kwargs)
        # Its value is the loss at theta, which belongs in the log; its gradient is that at theta + eps.
        loss = perturbed + (loss - perturbed).detach()
        # The trainer may divide by the accumulation steps or not; backward brings the factor.
        loss.register_hook(lambda factor: tram.record(last, loss_perturbed=perturbed * factor))
        return loss

    def tram_training_step(*args, **kwargs):
        nonlocal computed
        computed = 0
        try:
            output = training_step(*args, **kwargs)
            if computed != 1:
                raise RuntimeError(
                    f"TRAM needs a training_step that calls compute_loss once; that of {type(trainer).__name__} "
                    f"called it {computed} times. Use another optimizer, or TRAM.backward in a loop of your own"
                )
            return output
        finally:
            computed = None
            tram.restore()

    def tram_log(logs, *args, **kwargs):
        return log({**logs, **tram.metrics()} if "loss" in logs else logs, *args, **kwargs)

    for method, wrapper in (
        (training_step, tram_training_step),
        (compute_loss, tram_compute_loss),
        (log, tram_log),
    ):
        wrapper = functools.wraps(method)(wrapper)
        wrapper.tram_wraps = method
        setattr(trainer, method.__name__, wrapper)


def _bare(trainer, name: str) -> Callable:
    """The method itself, also where another optimizer was attached before."""
    method = getattr(trainer, name)
    return getattr(method, "tram_wraps", method)
