"""The config of every method on GRPO: TRL's fields, of which nothing is ignored in silence."""

import copy
import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal

from transformers import GenerationConfig
from trl import GRPOConfig

from ..lookup import near
from ..settings import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Range,
    Settings,
    Whole,
    Width,
    check,
    refuse_unread,
    require,
    setting,
)


AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo")

_OTHER_LOSSES = {
    "cispo": "use `DISPOConfig` with equal widths, which is CISPO, or `trl.GRPOTrainer`",
    "sapo": "use `trl.GRPOTrainer`",
    "vespo": "use `trl.GRPOTrainer`",
    "luspo": "use `trl.GRPOTrainer`",
}


# What inherited fields may be that TRL 1.16 and transformers 5.23 take as they come, or refuse late and obscurely.
_INHERITED = {
    "num_generations": Annotated[int, Range(2, whole=True)],
    "num_generations_eval": Count | None,
    "num_iterations": Count,
    "steps_per_generation": Count | None,
    "generation_batch_size": Count | None,
    "gradient_accumulation_steps": Count,
    "per_device_train_batch_size": Count,
    "per_device_eval_batch_size": Count,
    "max_completion_length": Count | None,
    "temperature": Positive,
    "top_p": Annotated[float, Range(0, 1, above=True)],
    "top_k": Annotated[int, Range(-1, whole=True)] | None,  # vLLM's -1 is 0 elsewhere
    "min_p": Fraction | None,
    "repetition_penalty": Positive,
    "learning_rate": NonNegative,
    "weight_decay": NonNegative,
    "max_grad_norm": Width | None,
    "warmup_steps": NonNegative | None,  # below 1 it is a share of the steps
    "logging_steps": NonNegative,
    "save_steps": NonNegative,
    "beta": NonNegative,
    "epsilon": Width,
    "epsilon_high": Width | None,
    "delta": Width | None,
    "top_entropy_quantile": Fraction,
    "entropy_coef": NonNegative,
    "seed": Whole,
}
_MAPPINGS = ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs")

# setting of the step control -> modes that read it
_CONTROL_READS = {
    "target_kl": ("kl", "backtrack"),
    "max_kl": ("kl", "stop", "backtrack"),
    "step_scale_init": ("kl",),
    "step_scale_min": ("kl", "ess"),
    "step_scale_max": ("kl", "ess"),
}

# Fields of TRL 1.16 that shape the vLLM correction.
_VLLM_WEIGHTS = (
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)


@dataclass
class TrustGRPOConfig(Settings, GRPOConfig):
    r"""
    Configuration of [`TrustGRPOTrainer`]: every field of [`trl.GRPOConfig`], with two changes of meaning.

    `loss_type` is the *aggregation* only (`"grpo"`, `"bnpo"`, `"dr_grpo"`, `"dapo"`), since the policy term is the
    method. And nothing is ignored in silence: a field that the method does not read raises when it is set.

    Raises:
        ValueError: at construction, for a `loss_type` that names another policy term, a field in `unread_fields` that
            differs from TRL's default, or a batch that cannot hold whole groups where the method needs them.
    """

    loss_type: str = field(
        default="dapo", metadata={"help": "Aggregation of the per-token loss: grpo, bnpo, dr_grpo or dapo."}
    )

    step_control: Literal["none", "kl", "ess", "stop", "backtrack"] = setting(
        "none",
        "What keeps an update to its region: the learning rate follows the measured KL(old || new) (kl) or the "
        "effective sample size (ess), updates past `max_kl` are left out (stop), or a step is taken back (backtrack).",
    )
    target_kl: Positive = setting(
        0.0013, "KL(old || new) that the policy may have for each update since generation. For kl and backtrack."
    )
    max_kl: Positive = setting(0.02, "KL(old || new) that the policy may have in all. For kl, stop and backtrack.")
    step_scale_init: Positive = setting(
        0.1, "Factor on the learning rate until the first measurement. For `step_control='kl'`."
    )
    step_scale_min: Positive = setting(1e-3, "Least factor on the learning rate. For kl and ess.")
    step_scale_max: Positive = setting(
        1.0, "Largest factor. 1: control only brakes; above, it raises a rate that is too low. For kl and ess."
    )

    save_generation_state: bool = setting(
        False,
        "Save with each checkpoint the rollouts that are being trained on, so that a run resumed inside a generation "
        "goes on as it would have.",
    )

    # field -> what to do instead; subclasses extend it
    unread_fields: ClassVar[dict[str, str]] = {
        "sapo_temperature_neg": "it belongs to `loss_type='sapo'` of `trl.GRPOTrainer`",
        "sapo_temperature_pos": "it belongs to `loss_type='sapo'` of `trl.GRPOTrainer`",
        "vespo_k_pos": "it belongs to `loss_type='vespo'` of `trl.GRPOTrainer`",
        "vespo_lambda_pos": "it belongs to `loss_type='vespo'` of `trl.GRPOTrainer`",
        "vespo_k_neg": "it belongs to `loss_type='vespo'` of `trl.GRPOTrainer`",
        "vespo_lambda_neg": "it belongs to `loss_type='vespo'` of `trl.GRPOTrainer`",
    }

    @property
    def anchors_on_sampler(self) -> bool:
        """Whether the ratio is taken to the sampling policy; then the vLLM correction is not applied a second time."""
        return False

    @property
    def has_clean_logps(self) -> bool:
        """Whether `PolicyBatch.logps` are the policy's own: the step control reads KL(old || new) in them."""
        return True

    @property
    def needs_whole_groups(self) -> bool:
        """Whether a micro-batch must hold all responses to its prompts."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether the method reads `PolicyBatch.ref_logps` even where `beta` is 0."""
        return False

    @property
    def needs_stale_rollouts(self) -> bool:
        """Whether the trust region does nothing as long as every update uses fresh rollouts."""
        return not (self.anchors_on_sampler and self.use_vllm)

    def __post_init__(self):
        self.take_older_spellings()
        self._check_inherited()  # before TRL computes with them
        super().__post_init__()
        self.validate()

    def _check_inherited(self) -> None:
        for name, kind in _INHERITED.items():
            require(name, getattr(self, name), kind)

    def validate(self) -> None:
        """Check the fields this class adds or reinterprets. Subclasses extend it."""
        self._check_inherited()
        for name in _MAPPINGS:
            value = getattr(self, name)
            self._require(
                value is None or isinstance(value, Mapping), name, "must be a mapping of names to values, or None"
            )
        if not self.use_vllm:  # whose names are those of another library, which may not be installed here
            known = [name for name in vars(GenerationConfig()) if not name.startswith("_")]
            for name in self.generation_kwargs or ():
                if name not in known:
                    mend = near(name, known, "see `transformers.GenerationConfig`")
                    raise ValueError(
                        f"generation_kwargs={self.generation_kwargs!r}: generation knows no {name!r}; {mend}."
                    )
        if self.loss_type not in AGGREGATIONS:
            mend = _OTHER_LOSSES.get(self.loss_type, "it is not known")
            raise ValueError(
                f"loss_type={self.loss_type!r}: in {type(self).__name__}, `loss_type` is the aggregation only, one of "
                f"{', '.join(AGGREGATIONS)}; for another policy term {mend}."
            )
        if self.importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level={self.importance_sampling_level!r} must be 'token' or 'sequence'."
            )
        check(self)
        if self.use_vllm and self.anchors_on_sampler:
            why = "the ratio is already to the sampler, so there is nothing to correct"
            refuse_unread(self, dict.fromkeys(_VLLM_WEIGHTS, why))
        self._check_step_control()
        if self.needs_whole_groups:
            self._check_whole_groups("per_device_train_batch_size", "num_generations")
            if self.eval_strategy != "no":
                generations = "num_generations" if self.num_generations_eval is None else "num_generations_eval"
                self._check_whole_groups("per_device_eval_batch_size", generations)

    def _check_step_control(self) -> None:
        mode = self.step_control
        unread = {name: modes for name, modes in _CONTROL_READS.items() if mode not in modes}
        refuse_unread(self, {name: f"set step_control={' or '.join(map(repr, m))}" for name, m in unread.items()})
        if mode == "none":
            return
        low, high = self.step_scale_min, self.step_scale_max
        self.require(low <= high, "step_scale_min", f"must be at most step_scale_max={high!r}")
        if mode == "kl":
            ok = low <= self.step_scale_init <= high
            self.require(ok, "step_scale_init", f"must lie in [step_scale_min, step_scale_max] = [{low!r}, {high!r}]")
        if mode in ("kl", "backtrack"):
            self.require(self.target_kl <= self.max_kl, "target_kl", f"must be at most max_kl={self.max_kl!r}")
        self.require(
            mode == "ess" or self.has_clean_logps,
            "step_control",
            f"reads KL(old || new) in log-probabilities that {type(self).__name__} computes with noise; use 'ess' or "
            f"'none'",
        )

    def _check_whole_groups(self, batch: str, generations: str) -> None:
        size, group = getattr(self, batch), getattr(self, generations)
        if size % group != 0:
            raise ValueError(
                f"{batch}={size}: {type(self).__name__} compares the responses to one prompt, so a micro-batch must "
                f"hold whole groups. Make it a multiple of {generations}={group}; accumulation leaves the number of "
                f"prompts an update free."
            )

    _require = Settings.require  # its older name, which configs outside of this package may call

    @classmethod
    def from_grpo_config(cls, args: GRPOConfig) -> "TrustGRPOConfig":
        """Turn a plain `GRPOConfig` into this class, so that swapping the trainer class alone is enough.

        A field at TRL's default takes this class's default where the two differ.

        Raises:
            ValueError: for the config of another method of this package, whose settings would be lost.
        """
        if isinstance(args, TrustGRPOConfig) and not issubclass(cls, type(args)):
            raise ValueError(
                f"args is a {type(args).__name__}, the config of another method: use a {cls.__name__}, or a "
                f"GRPOConfig for the defaults of the method."
            )
        # `args` is already processed (dtypes, derived batch sizes), so it is copied, not constructed a second time
        config = copy.copy(args)
        config.__class__ = cls
        for f in fields(cls):
            default = f.default_factory() if f.default_factory is not MISSING else f.default
            theirs = GRPOConfig.__dataclass_fields__.get(f.name)
            if theirs is None or (getattr(args, f.name) == theirs.default != default):
                setattr(config, f.name, default)
        config.validate()
        return config


# what a term without a clip does not read
NO_CLIP = {
    "epsilon": "there is no clip; the step size bounds the step",
    "epsilon_high": "there is no clip; the step size bounds the step",
    "delta": "there is no clip; the step size bounds the step",
}


def require_whole_responses(args: TrustGRPOConfig) -> None:
    """Refuse what selects or weights tokens where the action is the response and its loss one number."""
    args.require(
        args.top_entropy_quantile == 1.0,
        "top_entropy_quantile",
        "selects tokens, but here a response is one action: leave it at 1.0",
    )
    if args.use_vllm and args.vllm_importance_sampling_correction:
        args.require(
            args.vllm_importance_sampling_mode.startswith("sequence"),
            "vllm_importance_sampling_mode",
            "weights tokens, but here a response is one action: use 'sequence_mask' or 'sequence_truncate', or "
            "vllm_importance_sampling_correction=False",
        )


# --------------------------------------------------------------------------------------------------------------------
# MDPO
# --------------------------------------------------------------------------------------------------------------------


def is_number(x: Any, *, low: float = -math.inf, finite: bool = True) -> bool:
    """Whether `x` is a number of at least `low`, not NaN, and finite unless `finite=False`."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x >= low and (math.isfinite(x) or not finite)
