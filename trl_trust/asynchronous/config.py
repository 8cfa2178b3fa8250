"""Configs of the asynchronous trainers: TRL's fields, and those of a method as its synchronous config states them."""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, make_dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal, get_type_hints

from trl.experimental.async_grpo import AsyncGRPOConfig

from ..methods import get_method
from ..policy.config import TrustGRPOConfig
from ..settings import Count, Positive, Settings, Whole, check, refuse_unread, require, setting


# method -> (field, whether its value cannot work, why): what the asynchronous trainer does not have
REFUSED: dict[str, tuple[tuple[str, Callable[[Any], bool], str], ...]] = {
    "dispo": (("select", lambda x: x == "correct", "rewards do not reach the loss there; use 'advantage'"),),
    "dppo": (("anchor", lambda x: x == "old", "old log-probabilities are the sampler's and no others; use 'auto'"),),
    "etr": (("lambda_macro", lambda x: x != 0, "rewards of a group do not reach the loss there; leave it at 0"),),
    "dhpo": (
        (
            "entropy_normalizer",
            lambda x: x in ("batch_max", "min_max"),
            "a micro-batch is whatever rows were packed together; use 'response_max' or 'log_vocab'",
        ),
    ),
    "mdpo": (
        ("level", lambda x: x != "token", "the loss there is a sum over tokens; use 'token'"),
        ("divergence", lambda x: x == "full", "the old policy is the server's; use 'unbiased' or 'k2'"),
    ),
}

# What fields of AsyncGRPOConfig may be that TRL 1.16 takes as they come, or refuses late and obscurely.
_RANGES = {
    "max_staleness": Whole,
    "weight_sync_steps": Count,
    "heartbeat_stale_after_s": Positive,
    "max_completion_length": Count,
}

# setting of the step control -> modes that read it
_CONTROL_READS = {
    "target_kl": ("kl", "backtrack"),
    "step_scale_init": ("kl",),
    "step_scale_min": ("kl", "ess"),
    "step_scale_max": ("kl", "ess"),
}


@dataclass
class AsyncTrustGRPOConfig(Settings, AsyncGRPOConfig):
    r"""
    Configuration of [`AsyncTrustGRPOTrainer`]: every field of [`trl.experimental.async_grpo.AsyncGRPOConfig`], and the
    step control, whose KL is that of one update, before against after.

    The config of a method, such as `AsyncDPPOConfig`, has the fields of the synchronous one too, with the same
    defaults and ranges, save for values that need what the asynchronous trainer does not have.

    Raises:
        ValueError: at construction, for a value outside its range, a field that the method does not read, a value of
            [`REFUSED`], evaluation, which `AsyncGRPOTrainer` does not do, or a schedule without `max_steps`.
    """

    step_control: Literal["none", "kl", "ess", "backtrack"] = setting(
        "none",
        "What keeps an update to its region: the learning rate follows the KL(before || after) of the last update "
        "(kl) or the effective sample size (ess), or a step is taken back (backtrack). kl and backtrack cost a "
        "forward pass an update.",
    )
    target_kl: Positive = setting(0.0013, "KL(before || after) that an update may have. For kl and backtrack.")
    step_scale_init: Positive = setting(
        0.1, "Factor on the learning rate until the first measurement. For `step_control='kl'`."
    )
    step_scale_min: Positive = setting(1e-3, "Least factor on the learning rate. For kl and ess.")
    step_scale_max: Positive = setting(
        1.0, "Largest factor. 1: control only brakes; above, it raises a rate that is too low. For kl and ess."
    )

    method: ClassVar[str] = ""  # name in the table of methods
    synchronous: ClassVar[type[TrustGRPOConfig]] = TrustGRPOConfig
    max_kl: ClassVar[float] = math.inf  # there is no generation that several updates share

    def __post_init__(self):
        if self.step_control == "stop":
            self.require(
                False,
                "step_control",
                "leaves out what remains of a generation, of which there is none here; use 'kl', 'ess' or 'backtrack'",
            )
        super().__post_init__()
        self.validate()

    def validate(self) -> None:
        """Check the fields that this class and the method add, and those of TRL that it reinterprets."""
        check(self)
        for name, kind in _RANGES.items():
            require(name, getattr(self, name), kind)
        self.require(
            str(getattr(self.eval_strategy, "value", self.eval_strategy)) == "no",
            "eval_strategy",
            "does nothing in AsyncGRPOTrainer, which has no evaluation: leave it at 'no', and evaluate checkpoints",
        )
        mode = self.step_control
        unread = {name: modes for name, modes in _CONTROL_READS.items() if mode not in modes}
        refuse_unread(self, {name: f"set step_control={' or '.join(map(repr, m))}" for name, m in unread.items()})
        low, high = self.step_scale_min, self.step_scale_max
        self.require(low <= high, "step_scale_min", f"must be at most step_scale_max={high!r}")
        if mode == "kl":
            ok = low <= self.step_scale_init <= high
            self.require(ok, "step_scale_init", f"must lie in [step_scale_min, step_scale_max] = [{low!r}, {high!r}]")
        for name, cannot, why in REFUSED.get(self.method, ()):
            self.require(not cannot(getattr(self, name)), name, f"is for the synchronous trainer: {why}")
        if self.method == "mdpo" and self.step_size_schedule == "linear":
            self.require(
                self.max_steps > 0,
                "max_steps",
                "must be set for step_size_schedule='linear', which anneals over the weight versions of the run: what "
                "TRL puts in its place is a ceiling that a run does not come near",
            )
        self._check_as_synchronous()

    def _check_as_synchronous(self) -> None:
        """The method's own checks, made on its synchronous config with the fields that both have."""
        checked = object.__new__(type(type(self).__name__, (self.synchronous,), {}))
        shared = {f.name for f in fields(self)} - AsyncTrustGRPOConfig.stated.keys()
        for f in fields(self.synchronous):
            if f.name in shared:
                setattr(checked, f.name, getattr(self, f.name))
            elif f.default is MISSING:
                setattr(checked, f.name, f.default_factory())
        checked.use_vllm = True  # there is a sampler, and it says what it sampled
        checked.validate()

    @classmethod
    def from_async_grpo_config(cls, args: AsyncGRPOConfig) -> "AsyncTrustGRPOConfig":
        """Turn a plain `AsyncGRPOConfig` into this class, so that swapping the trainer class alone is enough.

        Raises:
            ValueError: for the config of another method, whose settings would be lost.
        """
        if not isinstance(args, AsyncGRPOConfig) or isinstance(args, AsyncTrustGRPOConfig):
            raise ValueError(
                f"args is a {type(args).__name__}: use {cls.__name__}, or AsyncGRPOConfig for the defaults of the "
                f"method."
            )
        config = copy.copy(args)
        config.__class__ = cls
        for f in fields(cls):
            if f.name not in AsyncGRPOConfig.__dataclass_fields__:
                setattr(config, f.name, f.default_factory() if f.default is MISSING else f.default)
        config.validate()
        return config


def asynchronous_config(name: str) -> type[AsyncTrustGRPOConfig]:
    """The config of method `name`, made of its row in the table: the fields that its synchronous config adds."""
    method = get_method(name)
    synchronous = getattr(import_module(method.module), method.config)
    hints = get_type_hints(synchronous, include_extras=True)
    own = [f for f in fields(synchronous) if f.name not in TrustGRPOConfig.__dataclass_fields__]
    namespace = {
        "__doc__": f"Configuration of [`Async{method.trainer}`]: the fields of [`AsyncTrustGRPOConfig`] and those "
        f"that [`{method.config}`] adds, as they are described there.",
        "__module__": f"{__package__}.trainers",
        "__annotations__": {},
        "method": name,
        "synchronous": synchronous,
    }
    return make_dataclass(
        f"Async{method.config}",
        [(f.name, hints[f.name], _again(f.default, f.default_factory, f.metadata)) for f in own],
        bases=(AsyncTrustGRPOConfig,),
        namespace=namespace,
    )


def _again(default: Any, factory: Any, metadata: Mapping[str, Any]) -> Any:
    if default is MISSING:
        return field(default_factory=factory, metadata=dict(metadata))
    return field(default=default, metadata=dict(metadata))
