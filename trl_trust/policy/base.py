"""The seam: GRPO with an exchangeable policy term.

`GRPOTrainer` computes its loss in one method in which some thirty lines are the policy term and the rest is plumbing:
fused log-probabilities, tool masks, importance correction, reference KL, entropy bonus, aggregation, metrics. Here the
plumbing is written once, and a method is what remains: a pure function of tensors

    dispo_loss(batch: PolicyBatch, *, epsilon_pos_low, ...) -> PolicyLoss

and a trainer whose `policy_loss` calls it. This is the only module that knows the insides of `GRPOTrainer`. Each
private name it touches was read in TRL 1.16; tests/test_trl_contract.py fails when the installed TRL differs.
"""

import copy
import inspect
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import profiling_decorator
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import (  # module-level helpers of TRL 1.16: how it loads, scores and splits
    add_fused_lm_head,
    create_model_from_path,
    get_config_model_id,
    pad,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from ..settings import Count, Fraction, NonNegative, Positive, Range, Whole, Width, require


logger = get_logger(__name__)

METHOD_STATE_FILE = "trl_trust_state.json"  # in a checkpoint's folder

AGGREGATIONS = ("grpo", "bnpo", "dr_grpo", "dapo")

# |log ratio| beyond which exp() is capped in telemetry and in methods whose spec allows it: e^20 is 5e8.
LOG_RATIO_LIMIT = 20.0

# Inputs that a multimodal model reads besides token ids; the names `GRPOTrainer` gives them.
MULTIMODAL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def paper(title: str, arxiv: str) -> dict[str, str]:
    """The `_paper` of a trainer, from which TRL writes the model card."""
    key, year = "".join(c for c in title.split(":")[0].lower() if c.isalnum()), f"20{arxiv[:2]}"
    entries = {"title": f"{{{title}}}", "year": year, "eprint": f"arXiv:{arxiv}"}
    body = "".join(f"    {name:6} = {{{value}}},\n" for name, value in entries.items())
    citation = f"@misc{{{key},\n{body}}}"
    return {"title": title, "id": arxiv, "citation": citation}


# --------------------------------------------------------------------------------------------------------------------
# What a policy term sees and returns
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyBatch:
    """What a policy term may read. B responses, T completion tokens; only `logps` (and `entropies`) carry gradient.

    Attributes:
        logps: (B, T) log-probabilities of the sampled tokens under the policy being trained.
        old_logps: (B, T) the same under the policy at generation time, as the trainer computed it.
        mask: (B, T) 1 where a token counts: inside the completion, and written by the model rather than by a tool.
        advantages: (B, 1), or (B, T) from subclasses that give one per token.
        entropies: (B, T) entropy of the next-token distribution at each position, in nats.
        ref_logps: (B, T) under the reference model; `None` when `beta` is 0 and the method does not need it.
        sampling_logps: (B, T) as reported by the sampler (vLLM), NaN where it could not score a token; `None` without.
        rewards: (B,) weighted sum of the rewards, NaN where no reward function scored the response.
        group: (B,) index of the prompt a response answers, within the generation batch and over all processes.
        extras: row tensors that the method added in [`TrustGRPOTrainer.extend_rollouts`], by name.
    """

    logps: Tensor
    old_logps: Tensor
    mask: Tensor
    advantages: Tensor
    entropies: Tensor | None = None
    ref_logps: Tensor | None = None
    sampling_logps: Tensor | None = None
    rewards: Tensor | None = None
    group: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def sampler_logps(self) -> Tensor:
        """(B, T) log-probabilities under the policy that generated: the sampler's where known, else `old_logps`."""
        if self.sampling_logps is None:
            return self.old_logps
        return torch.where(self.sampling_logps.isnan(), self.old_logps, self.sampling_logps)


@dataclass(frozen=True)
class PolicyLoss:
    """What a policy term returns.

    Attributes:
        per_token_loss: (B, T), or (B, 1) when a response is one action. Positions outside the mask may hold anything
            finite.
        metrics: name to tensor. A (B, T) tensor is averaged over the live tokens, a (B, 1) tensor over the responses,
            a 0-d tensor over processes; where the name ends in `min` or `max`, the extremum is taken instead. NaN
            entries do not count. Names must not depend on the data: every process has to report the same ones.
        batch_loss: 0-d term for losses that are no sum over rows (pairwise ones). It is added after aggregation and
            divided by the number of accumulated micro-batches; masks and corrections do not touch it.
    """

    per_token_loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    batch_loss: Tensor | None = None


@dataclass(frozen=True)
class Rollouts:
    """One generation batch before it is shuffled and split. n rows here, N over all processes.

    Attributes:
        examples: n rows of the data set, one a response.
        prompts: n prompts, text or messages.
        completions: n completions, text or messages.
        completion_ids: n lists of token ids.
        rewards: (N,) weighted sum of the rewards over *all* processes, whole groups in order; NaN where unscored.
        num_generations: responses a prompt; `rewards.view(-1, num_generations)` has one group a row.
        rows: the slice of the N rows that this process holds.
        tensors: what `GRPOTrainer` made of them: padded ids and masks, `advantages` (n,), log-probabilities.
    """

    examples: list[dict[str, Any]]
    prompts: list
    completions: list
    completion_ids: list[list[int]]
    rewards: Tensor
    num_generations: int
    rows: slice
    tensors: dict[str, Any]


# --------------------------------------------------------------------------------------------------------------------
# The clipped term that GRPO, GSPO and several methods share
# --------------------------------------------------------------------------------------------------------------------


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float | Tensor, high: float | Tensor, delta: float | None = None
) -> Tensor:
    """PPO's pessimistic surrogate, as a loss: `-min(min(ratio, delta) A, clip(ratio, 1 - low, 1 + high) A)`.

    Args:
        ratio: (B, T) or (B, 1).
        advantages: broadcastable to `ratio`.
        low, high: widths below and above 1, a number or a tensor broadcastable to `ratio`.
        delta: cap of the unclipped branch (two-sided clipping, INTELLECT-2); `None` for none.
    """
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    if delta is not None:
        ratio = torch.clamp(ratio, max=delta)
    return -torch.min(ratio * advantages, clipped * advantages)


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T) to (B, 1): mean of `x` over each response's live tokens, 0 for a response without any."""
    return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)


def clip_ratios(ratio: Tensor, batch: PolicyBatch, low: float | Tensor, high: float | Tensor) -> dict[str, Tensor]:
    """The metrics `clip_ratio/*` as TRL logs them, for [`clipped_surrogate`] of `ratio`, (B, T) or (B, 1)."""
    too_low = ((ratio < 1 - low) & (batch.advantages < 0)).float()
    too_high = ((ratio > 1 + high) & (batch.advantages > 0)).float()
    # NaN, not 0, for an empty response: it has no clip ratio that could be the smallest
    by_sequence = lambda x: x if x.shape[1] == 1 else (x * batch.mask).sum(-1, keepdim=True) / batch.mask.sum(-1, True)
    return {
        "clip_ratio/low_mean": too_low,
        "clip_ratio/high_mean": too_high,
        "clip_ratio/region_mean": too_low + too_high,
        "clip_ratio/low_min": by_sequence(too_low),
        "clip_ratio/high_max": by_sequence(too_high),
    }


def grpo_loss(
    batch: PolicyBatch,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str = "token",
) -> PolicyLoss:
    """GRPO's clipped term (arXiv 2402.03300, eq. 3), or GSPO's (2507.18071) at `importance_sampling_level="sequence"`.

    It is TRL's own term in the shape of this package: the proof that the base loses nothing, and what other methods
    reduce to. Metrics: `clip_ratio/{low_mean,low_min,high_mean,high_max,region_mean}`, as TRL logs them.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    log_ratio = batch.logps - batch.old_logps  # (B, T)
    if importance_sampling_level == "sequence":
        log_ratio = sequence_mean(log_ratio, batch.mask)  # (B, 1)
    ratio = torch.exp(log_ratio)

    capped = ratio if delta is None else torch.clamp(ratio, max=delta)
    return PolicyLoss(
        clipped_surrogate(ratio, batch.advantages, epsilon, epsilon_high, delta),
        clip_ratios(capped, batch, epsilon, epsilon_high),
    )


# --------------------------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------------------------

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

# Fields of TRL 1.16 that shape the vLLM correction.
_VLLM_WEIGHTS = (
    "vllm_importance_sampling_mode",
    "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min",
)


@dataclass
class TrustGRPOConfig(GRPOConfig):
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
                near = get_close_matches(name, known, n=1)
                mend = f"did you mean {near[0]!r}?" if near else "see `transformers.GenerationConfig`"
                if name not in known:
                    raise ValueError(
                        f"generation_kwargs={self.generation_kwargs!r}: generation knows no {name!r}; {mend}"
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
        unread = dict(self.unread_fields)
        if self.use_vllm and self.anchors_on_sampler:
            unread |= dict.fromkeys(
                _VLLM_WEIGHTS, "the ratio is already to the sampler, so there is nothing to correct"
            )
        for name, mend in unread.items():
            value, default = getattr(self, name), GRPOConfig.__dataclass_fields__[name].default
            if value != default:
                raise ValueError(
                    f"{name}={value!r}: {type(self).__name__} does not read `{name}`; {mend}. Leave it at {default!r}."
                )
        if self.needs_whole_groups:
            self._check_whole_groups("per_device_train_batch_size", "num_generations")
            if self.eval_strategy != "no":
                generations = "num_generations" if self.num_generations_eval is None else "num_generations_eval"
                self._check_whole_groups("per_device_eval_batch_size", generations)

    def _check_whole_groups(self, batch: str, generations: str) -> None:
        size, group = getattr(self, batch), getattr(self, generations)
        if size % group != 0:
            raise ValueError(
                f"{batch}={size}: {type(self).__name__} compares the responses to one prompt, so a micro-batch must "
                f"hold whole groups. Make it a multiple of {generations}={group}; accumulation leaves the number of "
                f"prompts an update free."
            )

    def _require(self, ok: bool, name: str, mend: str) -> None:
        """Raise `ValueError` naming the field and its value unless `ok`."""
        if not ok:
            raise ValueError(f"{name}={getattr(self, name)!r} {mend}.")

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


def is_number(x: Any, *, low: float = -math.inf, finite: bool = True) -> bool:
    """Whether `x` is a number of at least `low`, not NaN, and finite unless `finite=False`."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and x >= low and (math.isfinite(x) or not finite)


# --------------------------------------------------------------------------------------------------------------------
# Trainer
# --------------------------------------------------------------------------------------------------------------------


class TrustGRPOTrainer(GRPOTrainer):
    """
    [`trl.GRPOTrainer`] with an exchangeable policy term; on its own, GRPO or GSPO with the `trust/` telemetry.

    It takes the arguments of `GRPOTrainer`. `args` may be a plain [`trl.GRPOConfig`]: it is converted with
    [`TrustGRPOConfig.from_grpo_config`]. A method subclasses it, sets `config_class`, and overrides `policy_loss`; see
    CONTRIBUTING.md.

    Beside the metrics of `GRPOTrainer` it logs, over the live tokens of each micro-batch:

    - `trust/ratio/{min,p01,mean,p99,max}`: the importance ratio of the sampled tokens, to the anchor of the method.
      Every `min` and `max`, of methods too, is over all micro-batches and processes since the last log;
    - `trust/ess`: effective sample size of the ratios, `(sum w)^2 / (n sum w^2)`;
    - `trust/kl`: KL(old || new) by the k3 estimator; `trust/tv`: mean of |new - old| over the sampled tokens'
      probabilities;
    - `trust/zero_grad`: fraction of tokens whose policy gradient is exactly zero; `trust/cut`: the part of it that has
      a non-zero advantage, i.e. what the trust region cut (without any policy gradient it is not logged);
    - `trust/rewards/infinite`: rewards of a generation batch that were infinite, and so count as not given.

    Raises:
        ValueError: for settings the method cannot honour (see [`TrustGRPOConfig`]).
    """

    config_class: ClassVar[type[TrustGRPOConfig]] = TrustGRPOConfig

    def __init__(self, model, reward_funcs=None, args=None, *rest, **kwargs):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{model_id.split('/')[-1]}-{self._name}")
        elif not isinstance(args, self.config_class):
            args = self.config_class.from_grpo_config(args)
        # (names, (K, 2) statistics) of the micro-batches since the last optimizer step, evaluation's apart
        self._trust_window = {"train": [], "eval": []}
        self._trust_gathered = {"train": [], "eval": []}  # (names, (processes, K, 2)) of the steps since the last log
        self._trust_rollouts = None  # arguments and result of the last `_calculate_rewards`
        self._warned_of_rewards = False
        beta = args.beta
        if args.needs_reference and beta == 0.0:
            # TRL 1.16 loads, spreads and scores a reference (a copy, or the model without its adapter) unless `beta`
            # is 0. With the least positive number in its place the KL is logged; `compute_loss` does not add it.
            args.beta = math.ulp(0.0)
        try:
            super().__init__(model, reward_funcs, args, *rest, **kwargs)
        finally:
            args.beta = beta  # the caller's, who may try again with the same `args`
        for warning in self._warnings():
            logger.warning(warning)

    def _updates_are_on_policy(self) -> bool:
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0

    def _warnings(self) -> Iterator[str]:
        """What is legal and makes the trust region do nothing, or act on noise."""
        args = self.args
        if args.needs_stale_rollouts and self._updates_are_on_policy():
            yield (
                f"With gradient_accumulation_steps={args.gradient_accumulation_steps}, "
                f"steps_per_generation={args.steps_per_generation} and num_iterations={args.num_iterations}, every "
                f"update uses fresh rollouts: the importance ratio is identically 1 and the trust region of "
                f"{self._name} does nothing. Set steps_per_generation to a multiple of gradient_accumulation_steps "
                f"(2 or more times it), or num_iterations above 1."
            )
        if (found := active_dropout(self.model)) is not None:
            name, rate = found
            yield (
                f"{name}={rate}: the policy is trained with dropout and scored without, so the importance ratio of "
                f"fresh rollouts is not 1 but noise, and the trust region acts on it. Set {name} to 0, or "
                f"disable_dropout=True."
            )
        # TRL 1.16 asks vLLM for the log-probabilities of what it samples from
        sampling = {name: getattr(args, name) for name in ("top_p", "top_k", "min_p")} | (args.generation_kwargs or {})
        cuts = {
            "top_p": (sampling["top_p"] or 1) < 1,
            "top_k": (sampling["top_k"] or 0) > 0,
            "min_p": (sampling["min_p"] or 0) > 0,
        }
        if args.use_vllm and args.anchors_on_sampler and any(cuts.values()):
            given = ", ".join(f"{name}={sampling[name]}" for name, cut in cuts.items() if cut)
            yield (
                f"{given}: the sampler renormalises its log-probabilities over the tokens that it keeps, so the ratio "
                f"of {self._name}, which is to the sampler, is biased below 1. Leave top_p at 1, top_k at 0 and min_p "
                f"unset."
            )

    # -- what a method overrides -------------------------------------------------------------------------------------

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        """The policy term. Called once a micro-batch, in training and evaluation, on every process."""
        return grpo_loss(batch, **self.settings(grpo_loss))

    def extend_rollouts(self, rollouts: Rollouts) -> dict[str, Tensor]:
        """Row tensors, (n, ...), to attach to a generation batch; they reach `PolicyBatch.extras` through the shuffle.

        Called once a generation batch, on every process: the place for teacher log-probabilities and group statistics.
        """
        return {}

    def begin_step(self, micro_batches: list[dict[str, Any]]) -> None:
        """Called in training before an optimizer step, with its micro-batches as far as they are generated.

        They are all there when `steps_per_generation` is a multiple of `gradient_accumulation_steps`. Only then is
        this reliable: otherwise the last, shorter accumulation of an epoch shifts the count.
        """

    @property
    def rollout_batch(self) -> list[dict[str, Any]]:
        """The micro-batches of the last generation, as this process trains on them."""
        return self._buffered_inputs  # TRL 1.16

    @property
    def rollout_step(self) -> int:
        """How many micro-batches the last generation has served; 0 before the first and again after the last."""
        # TRL 1.16: `_step` counts micro-batches from the start of the process
        return self._step % (self.args.steps_per_generation * self.num_iterations)

    def method_state(self) -> dict[str, Any]:
        """What the method carries from step to step, for JSON: written with each checkpoint unless it is empty."""
        return {}

    def load_method_state(self, state: dict[str, Any]) -> None:
        """Take up what [`method_state`] returned when the checkpoint was written."""

    def settings(self, loss: Callable[..., PolicyLoss]) -> dict[str, Any]:
        """The keyword arguments of a pure loss, read from the config's fields of the same names."""
        parameters = inspect.signature(loss).parameters.values()
        return {p.name: getattr(self.args, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}

    # -- rollouts: carry rewards, groups and extras along ------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # TRL 1.16: called once by `_generate_and_score_completions`; returns (N, functions), gathered over processes
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        # An infinite reward counts as none: TRL would make its advantage NaN, or the largest number there is. NaN is
        # what TRL makes of `None` itself.
        infinite = rewards_per_func.isinf()
        count = int(infinite.sum())
        self.log_value("trust/rewards/infinite", count)
        if count and not self._warned_of_rewards:
            self._warned_of_rewards = True
            names = [name for name, bad in zip(self.reward_func_names, infinite.any(0).tolist(), strict=True) if bad]
            logger.warning(
                f"{count} rewards of {', '.join(names)} are infinite and count as not given, as `None` does; "
                f"trust/rewards/infinite goes on counting them. Let the function return finite numbers or `None`."
            )
        rewards_per_func = rewards_per_func.masked_fill(infinite, torch.nan)
        self._trust_rollouts = (inputs, prompts, completions, completion_ids_list, rewards_per_func)
        return rewards_per_func

    def _generate_and_score_completions(self, inputs):
        # TRL 1.16: returns the dict of row tensors that `_prepare_inputs` shuffles and splits; keys added here survive
        output = super()._generate_and_score_completions(inputs)
        examples, prompts, completions, completion_ids, rewards_per_func = self._trust_rollouts
        self._trust_rollouts = None
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)  # (N,)
        rewards = rewards.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)
        num_generations = self.num_generations if self.model.training else self.num_generations_eval
        n, start = len(prompts), self.accelerator.process_index * len(prompts)
        rows = slice(start, start + n)

        output["rewards"] = rewards[rows]  # (n,)
        output["group"] = torch.arange(start, start + n, device=rewards.device) // num_generations  # (n,)
        extras = self.extend_rollouts(
            Rollouts(examples, prompts, completions, completion_ids, rewards, num_generations, rows, output)
        )
        for name, tensor in extras.items():
            if len(tensor) != n:
                raise ValueError(f"extend_rollouts: {name!r} has {len(tensor)} rows, but the batch has {n}.")
            output[f"extras/{name}"] = tensor
        return output

    def _prepare_inputs(self, generation_batch):
        # TRL 1.16 shuffles single rows here. Where a method compares responses to one prompt, whole groups are
        # shuffled instead; the rest of the schedule (`_step`, `_buffered_inputs`) is TRL's own.
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        inputs = self._next_micro_batch(generation_batch)
        first, accumulation = self._step % self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if self._step % accumulation == 0:
            self.begin_step(self._buffered_inputs[first : first + accumulation])
        return inputs

    def _next_micro_batch(self, generation_batch) -> dict[str, Any]:
        if not self.args.needs_whole_groups:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._buffered_inputs is None or self._step % (steps * self.num_iterations) == 0:
            rollouts = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            parts = split_tensor_dict(_shuffle_groups(rollouts, self.num_generations), steps)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(part) for part in parts]
        return self._buffered_inputs[self._step % steps]

    # -- the loss ----------------------------------------------------------------------------------------------------

    @profiling_decorator
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError(f"return_outputs=True: {type(self).__name__} returns the loss only; leave it False.")
        logps, entropies, aux_loss = self.score_completions(model, inputs)
        batch = self._policy_batch(inputs, apart(logps), entropies)
        anchor_logps = batch.sampler_logps if self.args.anchors_on_sampler else batch.old_logps
        with torch.enable_grad():
            policy = self.policy_loss(batch)

        metrics = dict(policy.metrics)
        metrics.update(telemetry(batch, policy, anchor_logps))
        metrics["entropy"] = entropies

        entropy_mask = self._entropy_mask(entropies, batch.mask)
        per_token_loss = self._reweight(policy.per_token_loss, batch, entropy_mask, inputs)
        if self.beta != 0.0:
            kl = self._reference_kl(batch, anchor_logps)
            metrics["kl"] = kl
            if self.args.beta != 0.0:  # else it is only looked at: times 0 it could still be NaN
                per_token_loss = per_token_loss + self.beta * kl

        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        loss, policy_loss = self._aggregate(per_token_loss, batch.mask, inputs["num_items_in_batch"], accumulation)
        if policy.batch_loss is not None:
            loss = loss + policy.batch_loss / accumulation
            policy_loss = policy_loss + policy.batch_loss.detach()
        if self._entropy_bonus_enabled:
            bonus_mask = batch.mask if entropy_mask is None else batch.mask * entropy_mask
            loss = loss - self._entropy_bonus(entropies, bonus_mask) / accumulation
            metrics["policy_loss"] = policy_loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            metrics["aux_loss"] = aux_loss
        self._record(metrics, batch.mask)
        return loss

    def score_completions(self, model, inputs, batch_size: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities (B, T) and entropies (B, T) of the completion tokens, and the MoE auxiliary loss (0-d).

        One forward, or one for every `batch_size` rows.
        """
        return self._score(model, inputs, batch_size, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled)

    def _score(self, model, inputs, batch_size: int | None, **compute):
        # TRL 1.16: goes through the fused head, so logits are never held
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            batch_size,
            **compute,
            **{name: inputs.get(name) for name in MULTIMODAL_INPUTS},
        )

    def score_rollouts(self, tensors: dict[str, Any], model: PreTrainedModel | None = None) -> Tensor:
        """(n, T) log-probabilities of a generation batch under `model`, or the policy as it is, without gradient.

        For [`extend_rollouts`]: one micro-batch at a time, as TRL computes `old_per_token_logps`. `model` comes from
        [`add_frozen_model`].
        """
        args = self.args
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            return self._score(self.model if model is None else model, tensors, size)[0]

    def add_frozen_model(
        self,
        model: str | PreTrainedModel,
        init_kwargs: dict[str, Any] | None = None,
        temperature: float | None = None,
    ) -> PreTrainedModel:
        """Make `model`, loaded where it is an id, one that [`score_rollouts`] can score completions with.

        It is frozen, in evaluation mode, and spread over processes as TRL 1.16 spreads its reference model.

        Args:
            init_kwargs: for loading; `dtype` defaults to float32, as TRL's do.
            temperature: divides the logits; `None` for the sampling temperature.
        """
        if isinstance(model, str):
            init_kwargs = {"trust_remote_code": self.args.trust_remote_code, **(init_kwargs or {})}
            if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                init_kwargs["device_map"] = None  # "auto" would spread it over devices that belong to others
            model = create_model_from_path(model, **init_kwargs)
        model.requires_grad_(False).eval()
        add_fused_lm_head(
            model.get_base_model() if is_peft_model(model) else model,
            temperature=self.temperature if temperature is None else temperature,
            cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32,
        )
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def prompt_tensors(self, prompts: list) -> tuple[Tensor, Tensor]:
        """Ids and mask (n, P), padded on the left, of prompts (text or messages), tokenized as TRL does the data's."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        ids = [torch.tensor(row) for row in self._tokenize_prompts(prompts)[0]]  # TRL 1.16: ids, images, their fields
        pad_rows = partial(pad, padding_side="left", pad_to_multiple_of=self.pad_to_multiple_of)
        padded = pad_rows(ids, padding_value=tokenizer.pad_token_id), pad_rows([torch.ones_like(row) for row in ids])
        return tuple(x.to(self.accelerator.device) for x in padded)

    @contextmanager
    def update_of_its_own(self, model) -> Iterator[None]:
        """Within it, any backward of `model`, as the trainer wrapped it, is reduced, and the optimizer steps.

        For an update between two micro-batches of an optimizer step, where accelerate 1.15 and DDP hold both back. Not
        for DeepSpeed and FSDP1, which keep that to themselves.
        """
        state, synced = self.accelerator.gradient_state, self.accelerator.sync_gradients
        is_ddp, is_fsdp2 = hasattr(model, "require_backward_grad_sync"), hasattr(model, "set_requires_gradient_sync")
        reduced = model.require_backward_grad_sync if is_ddp else None
        state._set_sync_gradients(True)
        if is_ddp:
            model.require_backward_grad_sync = True
        if is_fsdp2:
            model.set_requires_gradient_sync(True)
        try:
            yield
        finally:
            state._set_sync_gradients(synced)
            if is_ddp:
                model.require_backward_grad_sync = reduced
            if is_fsdp2:
                model.set_requires_gradient_sync(synced)

    def log_value(self, name: str, value: float) -> None:
        """Log a number that the host knows, such as seconds; for tensors there are [`PolicyLoss.metrics`]."""
        # TRL 1.16: `_metrics` maps a name to the values since the last log, of which the main process logs the mean
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _policy_batch(self, inputs, logps: Tensor, entropies: Tensor) -> PolicyBatch:
        mask, advantages = inputs["completion_mask"], inputs["advantages"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        old_logps = inputs.get("old_per_token_logps")  # TRL leaves it out when updates and generations are aligned
        return PolicyBatch(
            logps=logps,
            old_logps=logps.detach() if old_logps is None else old_logps,
            mask=mask.float(),
            advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
            entropies=entropies,
            ref_logps=inputs.get("ref_per_token_logps"),
            sampling_logps=inputs.get("sampling_per_token_logps"),
            rewards=inputs.get("rewards"),
            group=inputs.get("group"),
            extras={key.removeprefix("extras/"): inputs[key] for key in inputs if key.startswith("extras/")},
        )

    def _entropy_mask(self, entropies: Tensor, mask: Tensor) -> Tensor | None:
        if self.top_entropy_quantile >= 1.0:
            return None
        return self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)  # (B, T), bool

    def _reweight(self, per_token_loss: Tensor, batch: PolicyBatch, entropy_mask: Tensor | None, inputs) -> Tensor:
        """Apply what drops or reweights tokens whatever the policy term is."""
        if self.off_policy_mask_threshold is not None:
            sampling = batch.old_logps if batch.sampling_logps is None else batch.sampling_logps
            per_token_loss = per_token_loss * self.get_off_policy_mask(
                batch.advantages, batch.logps, sampling, batch.mask, self.off_policy_mask_threshold
            )
        if entropy_mask is not None:
            per_token_loss = per_token_loss * entropy_mask
        if self.use_vllm and self.vllm_importance_sampling_correction and not self.args.anchors_on_sampler:
            per_token_loss = per_token_loss * inputs["importance_sampling_ratio"]  # (B, T) or (B, 1)
        return per_token_loss

    def _reference_kl(self, batch: PolicyBatch, anchor_logps: Tensor) -> Tensor:
        """(B, T) KL(policy || reference) by the k3 estimator, importance-weighted with `use_bias_correction_kl`."""
        log_ratio = batch.ref_logps - batch.logps
        kl = torch.exp(log_ratio) - log_ratio - 1  # (B, T)
        if self.args.use_bias_correction_kl:
            log_weight = batch.logps - anchor_logps
            if self.args.importance_sampling_level == "sequence":
                log_weight = sequence_mean(log_weight, batch.mask)
            kl = kl * torch.exp(log_weight)
        return kl

    def _aggregate(self, per_token_loss: Tensor, mask: Tensor, num_items: Tensor, accumulation: int):
        """Reduce (B, T) or (B, 1) to the loss of this micro-batch, and its detached value before accumulation."""
        masked = per_token_loss * mask
        loss_type = self.args.loss_type
        if loss_type == "dapo":
            # `num_items` counts the live tokens of the whole generation batch over all processes: scale it to one
            # accumulation window of this process. It holds the division by `accumulation` already.
            normalizer = num_items.clamp(min=1.0) / self.accelerator.num_processes
            if self.model.training:
                normalizer = normalizer * accumulation / self.args.steps_per_generation
            loss = masked.sum() / normalizer
            return loss, loss.detach()
        if loss_type == "grpo":
            loss = (masked.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
        elif loss_type == "bnpo":
            loss = masked.sum() / mask.sum().clamp(min=1.0)
        else:  # dr_grpo
            loss = masked.sum() / (masked.size(0) * self.max_completion_length)
        return loss / accumulation, loss.detach()

    def _entropy_bonus(self, entropies: Tensor, mask: Tensor) -> Tensor:
        """Coefficient times the mean entropy over `mask`; moves the coefficient at the end of an adaptive step."""
        total, count = (entropies * mask).sum(), mask.sum()
        coef = self.entropy_coef
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            coef = 0.0  # the gate of the previous step, so that every micro-batch of a step applies the same one
        if self.model.training:
            if self.use_adaptive_entropy:
                self._adapt_entropy_coef(torch.stack([total, count]).detach())
            if self.accelerator.sync_gradients:
                self._metrics["train"]["entropy_coef"].append(self.entropy_coef)
        return coef * (total / count.clamp(min=1.0))

    def _adapt_entropy_coef(self, stats: Tensor) -> None:
        # TRL 1.16 saves and restores `entropy_coef` and `_last_world_entropy` with the checkpoint: its names are kept
        window = stats if self._entropy_window_stats is None else self._entropy_window_stats + stats
        self._entropy_window_stats = window
        if not self.accelerator.sync_gradients:
            return
        total, count = self.accelerator.reduce(window, reduction="sum")
        entropy = (total / count.clamp(min=1.0)).item()
        if entropy <= self.args.entropy_target:
            self.entropy_coef = min(self.entropy_coef + self.args.entropy_coef_delta, self.args.entropy_coef_max)
        else:
            self.entropy_coef = max(self.entropy_coef - self.args.entropy_coef_delta, self.args.entropy_coef_min)
        self._last_world_entropy = entropy
        self._entropy_window_stats = None

    # -- what a method carries from step to step ---------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        # transformers 5.23 and TRL 1.16, which keeps its entropy controller so; `trial` is of a hyperparameter search
        super()._save_checkpoint(model, trial)
        state = self.method_state()
        if state and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (folder / METHOD_STATE_FILE).write_text(json.dumps(state))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint, METHOD_STATE_FILE)).exists():
            self.load_method_state(json.loads(path.read_text()))

    # -- metrics: one gather a step, one host synchronisation a log --------------------------------------------------

    @torch.no_grad()
    def _record(self, metrics: Mapping[str, Tensor], mask: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        window = self._trust_window[mode]
        window.append(local_statistics(metrics, mask))
        if self.model.training and not self.accelerator.sync_gradients:
            return
        names = [name for names, _ in window for name in names]
        stats = torch.cat([stats for _, stats in window])  # (K, 2), of all micro-batches of the step
        self._trust_window[mode] = []
        self._trust_gathered[mode].append((names, self.accelerator.gather(stats[None])))  # (processes, K, 2)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        # TRL 1.16: `_metrics` maps a name to the values since the last log, which it averages, NaN left out
        for name, values in read_gathered(self._trust_gathered[mode]).items():
            self._metrics[mode][name] += values
        self._trust_gathered[mode] = []
        super().log(logs, start_time)


def active_dropout(model: torch.nn.Module) -> tuple[str, float] | None:
    """Name and rate of the first dropout module that drops something, a LoRA adapter's under `lora_dropout`."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            # PEFT keeps an adapter's at `...lora_dropout.ADAPTER`
            return "lora_dropout" if "lora_dropout" in path else path.rpartition(".")[2], module.p
    return None


def _shuffle_groups(rollouts: dict[str, Any], group_size: int) -> dict[str, Any]:
    """Permute the groups of a generation batch, in unison over all row-like values."""
    n = len(rollouts["prompt_ids"])
    order = (torch.randperm(n // group_size)[:, None] * group_size + torch.arange(group_size)).flatten()

    def permute(value):
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        return value[order] if isinstance(value, Tensor) else [value[i] for i in order.tolist()]

    return {name: permute(value) for name, value in rollouts.items()}


def apart(logps: Tensor) -> Tensor:
    """`logps` as a tensor of its own, at which the gradient of [`telemetry`] ends.

    Never the tensor that the model returned: DeepSpeed 0.19 hooks the gradient of what its engine returns, and starts
    its own backward where one arrives. Without a graph a leaf, so that the policy gradient is seen in evaluation too.
    """
    return logps.view_as(logps) if torch.is_grad_enabled() else logps.detach().requires_grad_()


def telemetry(batch: PolicyBatch, policy: PolicyLoss, anchor_logps: Tensor) -> dict[str, Tensor]:
    """The `trust/` metrics that every method logs; see [`TrustGRPOTrainer`]."""
    gradient = None
    if policy.per_token_loss.requires_grad or (policy.batch_loss is not None and policy.batch_loss.requires_grad):
        # The graph between `logps` and the term is elementwise: this never reaches the model
        with torch.enable_grad():
            total = (policy.per_token_loss * batch.mask).sum()
            total = total if policy.batch_loss is None else total + policy.batch_loss
            (gradient,) = torch.autograd.grad(total, batch.logps, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        live = batch.mask > 0
        logps = batch.logps.detach()
        log_ratio = (logps - anchor_logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).masked_fill(~live, 0.0)  # (B, T)
        ratio = torch.exp(log_ratio)
        p01, p99 = masked_quantiles(ratio, live, (0.01, 0.99))
        weight = ratio * batch.mask
        ess = weight.sum().square() / (weight.square().sum() * batch.mask.sum())  # NaN without live tokens
        zero = torch.ones_like(ratio) if gradient is None else (gradient == 0).float()
        cut = torch.full_like(ratio, torch.nan) if gradient is None else zero * (batch.advantages != 0)
        return {
            "trust/ratio/min": ratio,
            "trust/ratio/p01": p01,
            "trust/ratio/mean": ratio,
            "trust/ratio/p99": p99,
            "trust/ratio/max": ratio,
            "trust/ess": ess,
            "trust/kl": ratio - 1 - log_ratio,
            "trust/tv": (logps.exp() - anchor_logps.exp()).abs(),
            "trust/zero_grad": zero,
            "trust/cut": cut,
        }


def masked_quantiles(x: Tensor, live: Tensor, qs: tuple[float, ...]) -> list[Tensor]:
    """Nearest-rank quantiles of `x` over `live`, or NaN. No boolean indexing, which would wait for the device."""
    ordered = x.masked_fill(~live, torch.nan).flatten().sort().values  # NaN comes last
    last = (live.sum() - 1).clamp(min=0)
    return [ordered[(last * q).round().long()] for q in qs]


def local_statistics(metrics: Mapping[str, Tensor], mask: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """Names of K metrics, and (K, 2): their values and weights on this process. NaN entries do not count.

    Nor do rows without a live token; a micro-batch of such rows alone has no value, NaN. Only where TRL 1.16 logs the
    same metric it is kept as TRL has it: the mean of no token is 0, and a sequence counts with or without live tokens.
    """
    groups = defaultdict(list)  # what has one shape and one reduction is reduced at once: a few kernels for them all
    for name, x in metrics.items():
        if x.shape not in (mask.shape, (len(mask), 1), ()):
            expected = f"(), ({len(mask)}, 1) or {tuple(mask.shape)}"
            raise ValueError(f"metric {name!r} has shape {tuple(x.shape)}, expected {expected}.")
        groups[x.shape, _extremum(name), _is_stock(name)].append(name)
    stats = []
    rows = (mask > 0).any(1)  # (B,)
    for (shape, extremum, stock), names in groups.items():
        x = torch.stack([metrics[name].detach().float().flatten() for name in names])  # (k, numel)
        if shape == mask.shape:
            live = (mask > 0).flatten()
        else:
            live = rows if shape and not stock else torch.ones_like(x[0], dtype=torch.bool)
        keep = live & ~x.isnan()
        weight = keep.sum(1)
        if extremum is None:
            nothing = (weight == 0) & live.any() if stock else weight == 0
            value = x.masked_fill(~keep, 0.0).sum(1).masked_fill(nothing, torch.nan)
        elif extremum is min:
            value = x.masked_fill(~keep, math.inf).amin(1)
        else:
            value = x.masked_fill(~keep, -math.inf).amax(1)
        stats.append(torch.stack([value, weight.float()], dim=1))
    return tuple(name for names in groups.values() for name in names), torch.cat(stats)


def read_gathered(gathered: list[tuple[list[str], Tensor]]) -> dict[str, list[float]]:
    """Metrics by name of (names, (processes, K, 2) statistics): a value for each micro-batch, to be averaged.

    Extrema have one value, over all there is. Only those that TRL 1.16 logs too are, as TRL has it, one a micro-batch.
    """
    found = defaultdict(list)
    if gathered:
        names = [name for names, _ in gathered for name in names]
        stats = torch.cat([stats for _, stats in gathered], dim=1).tolist()  # the one wait for the device
        for name, *by_process in zip(names, *stats, strict=True):
            found[name].append(_join_processes(name, by_process))
    for name, values in found.items():
        if (extremum := _extremum(name)) is not None and not _is_stock(name):
            found[name] = [extremum((x for x in values if not math.isnan(x)), default=math.nan)]
    return found


def _is_stock(name: str) -> bool:
    """Whether TRL 1.16 logs a metric of this name."""
    return name in ("entropy", "kl") or name.startswith("clip_ratio/")


def _extremum(name: str):
    """`min`, `max`, or `None` for a mean, by how the name of a metric ends."""
    return min if name.endswith("min") else max if name.endswith("max") else None


def _join_processes(name: str, stats: list[list[float]]) -> float:
    """Join the (value, weight) of each process: weighted mean, or the extremum if the name says so."""
    values, weights = zip(*stats, strict=True)
    if (extremum := _extremum(name)) is not None:
        return extremum(values) if any(weights) else math.nan
    if not any(weights):
        return sum(values)
    return sum(value for value, weight in zip(values, weights, strict=True) if weight) / sum(weights)
