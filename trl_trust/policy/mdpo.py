"""MDPO: mirror descent instead of clipping (arXiv 2005.09814).

Nearest TRL loss: the clipped `dapo`/`grpo` term. MDPO removes the clip and subtracts KL(new || old) / t from the
importance-weighted objective, with several steps per iteration against a fixed old policy. OPMD, its form with a whole
response as one action and no ratio, is [`trl_trust.policy.opmd`].

Provenance: **adapted**. Objective, direction of the KL, several steps and annealing are the authors'
(`manantomar/Mirror-Descent-Policy-Optimization`, `mdpo_on/mdpo.py`); the paper has no language model, so the use per
token, the `unbiased` estimator and the form per response are a reconstruction.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..anatomy import whole
from ..settings import Positive, PositiveOrInf, setting
from .base import (
    LOG_RATIO_LIMIT,
    GenerationBatch,
    PolicyBatch,
    PolicyLoss,
    TrustGRPOConfig,
    TrustGRPOTrainer,
    extras_of,
    paper,
)
from .config import NO_CLIP, require_whole_responses
from .old_policy import OldDistribution


def annealed_step_size(k: int, iterations: int, step_size: float, step_size_min: float | None = None) -> float:
    """t_k of iteration k (from 0) of `iterations`: `max(step_size_min, step_size (1 - k / iterations))`.

    `step_size_min=None` is 2 / iterations, and never more than `step_size`.
    """
    floor = min(step_size, 2 / iterations) if step_size_min is None else step_size_min
    return max(floor, step_size * (1 - min(k, iterations - 1) / iterations))


def mdpo_loss(
    batch: PolicyBatch, *, level: str = "token", divergence: str = "unbiased", step_size: float = 1.0
) -> PolicyLoss:
    """`-ratio A + D / step_size`, D an estimate of KL(new || old) that vanishes with its gradient where new = old.

    With d the log-ratio of a token, or at `level="sequence"` of the response (the sum over its live tokens):

    - `"unbiased"`: `D = ratio d - ratio + 1`, whose mean under old samples is the KL, and which is >= 0 sample by
      sample. Gradient by d of the whole: `-ratio (A - d / step_size)`, zero at `d = step_size A` without any clip.
    - `"k2"`: `D = d^2 / 2`, right in gradient only near d = 0.
    - `"full"`: the KL over the vocabulary, from `batch.extras["divergence"]` (B, T), with its gradient; 0 where it is
      absent: then no update has been made since generation.

    Args:
        step_size: t_k of this iteration, > 0; `inf` leaves the unclipped importance-weighted term.

    Returns:
        per-token loss (B, T), or (B, 1) at `level="sequence"`; metrics `mdpo/step_size`, `mdpo/divergence` (mean D),
        `mdpo/stationarity` (mean |A - d / step_size| where A != 0; 0 when the step is solved), `mdpo/ratio/max`.
    """
    log_ratio = batch.logps - batch.old_logps  # (B, T)
    if level == "sequence":
        log_ratio = (log_ratio * batch.mask).sum(-1, keepdim=True)  # (B, 1)
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    if divergence == "unbiased":
        # `ratio d - ratio + 1` in a form whose value and gradient cancel exactly, not to rounding, as d goes to 0
        d = log_ratio.clamp(min=-LOG_RATIO_LIMIT)
        proximity = ratio * (d + torch.expm1(-d))
    elif divergence == "k2":
        proximity = log_ratio.square() / 2
    else:
        proximity = batch.extras.get("divergence", torch.zeros_like(batch.mask))

    distance = (batch.advantages - log_ratio.detach() / step_size).abs()
    return PolicyLoss(
        -ratio * batch.advantages + proximity / step_size,
        {
            "mdpo/step_size": torch.full((), step_size, device=ratio.device),
            "mdpo/divergence": proximity,
            "mdpo/stationarity": torch.where(batch.advantages != 0, distance, torch.nan),
            "mdpo/ratio/max": ratio,
        },
    )


@dataclass
class MDPOConfig(TrustGRPOConfig):
    r"""
    Configuration of [`MDPOTrainer`]: every field of [`TrustGRPOConfig`], and the mirror step.

    Raises:
        ValueError: for values outside the above, `loss_type` other than `"grpo"` at `level="sequence"`, a vLLM
            correction per token or `top_entropy_quantile` there, or `epsilon`, `epsilon_high`, `delta` or
            `importance_sampling_level` other than TRL's default.
    """

    unread_fields: ClassVar[dict[str, str]] = {
        **NO_CLIP,
        "importance_sampling_level": "use `level`",
    }

    level: Literal["token", "sequence"] = setting(
        "token", "What an action is: a token, or the response (heavy-tailed; for study)."
    )
    divergence: Literal["unbiased", "k2", "full"] = setting(
        "unbiased",
        "Estimate of KL(new || old): per sampled token, its square, or over the vocabulary. The last, for tokens "
        "only, keeps the old policy's last hidden states, tokens x hidden size numbers a generation batch and "
        "process, and a copy of the output head where the head is trained.",
    )
    step_size: PositiveOrInf = setting(
        1.0, "Step size t of the mirror step, in units of the advantage. `inf` switches the proximity off."
    )
    step_size_schedule: Literal["linear", "constant"] = setting(
        "linear", "How t moves over the run: down to `step_size_min`, or not at all."
    )
    step_size_min: Positive | None = setting(
        None, "Floor of the annealed t, at most `step_size`. Default: 2 / number of generation batches."
    )

    def validate(self) -> None:
        super().validate()
        floor = self.step_size_min
        self.require(
            floor is None or floor <= self.step_size,
            "step_size_min",
            f"must be a finite number > 0 and at most step_size={self.step_size!r}, or None",
        )
        if self.level == "sequence":
            self._require(
                self.divergence != "full", "divergence", "is per token: use level='token', or 'unbiased' or 'k2'"
            )
            self._require(
                self.loss_type == "grpo",
                "loss_type",
                "must be 'grpo' with level='sequence', where a response is one action",
            )
            require_whole_responses(self)


class MDPOTrainer(TrustGRPOTrainer):
    """
    GRPO with the mirror descent term of MDPO (arXiv 2005.09814) in the place of the clip. See [`mdpo_loss`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is an [`MDPOConfig`], or a `GRPOConfig` for the defaults. The
    step size follows from the trainer's global step, so a resumed run needs no further state.

    Raises:
        ValueError: for `divergence="full"` with a trained output head under DeepSpeed ZeRO-3, which shards it.
    """

    config_class = MDPOConfig
    _name = "MDPO"
    _tag_names = ["trl", "trl-trust", "mdpo"]
    _paper = paper(
        "Mirror Descent Policy Optimization",
        "2005.09814",
        "Manan Tomar and Lior Shani and Yonathan Efroni and Mohammad Ghavamzadeh",
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.divergence == "full":
            self._old_policy = OldDistribution(self.model, self.temperature, self.args.cast_lm_head_to_fp32)

    def generation_state(self) -> dict[str, Any]:
        if self.args.divergence != "full" or self._old_policy.old_head is None:
            return {}
        trained = self._old_policy.causal_lm.get_output_embeddings().weight.requires_grad
        return {"old_head": tuple(whole(x) for x in self._old_policy.old_head) if trained else None}

    def load_generation_state(self, state: dict[str, Any]) -> None:
        if "old_head" in state:
            head = self._old_policy.causal_lm.get_output_embeddings()
            self._old_policy.old_head = state["old_head"] or (head.weight, head.bias)

    def step_size(self) -> float:
        """t_k of the current iteration, one iteration being one generation batch."""
        args = self.args
        if args.step_size_schedule == "constant":
            return args.step_size
        micro_batches = args.steps_per_generation * self.num_iterations  # of one iteration
        k = self.state.global_step * args.gradient_accumulation_steps // micro_batches
        iterations = -(-self.state.max_steps * args.gradient_accumulation_steps // micro_batches)
        return annealed_step_size(k, max(iterations, 1), args.step_size, args.step_size_min)

    def extend_rollouts(self, rollouts: GenerationBatch) -> dict[str, Tensor]:
        # Without stored log-probabilities no update separates generation and training: the divergence is 0. So it is
        # in evaluation, which must leave alone the head that was kept for the updates still to come.
        if not self.model.training or self.args.divergence != "full" or "old_per_token_logps" not in rollouts.tensors:
            return {}
        with self._old_policy.recording(rollouts.tensors["completion_ids"].size(1)) as hidden:
            self.rollout_logps(rollouts.tensors)
        return {"old_hidden": torch.cat(hidden)}  # (n, T, d)

    def score_completions(self, model, inputs, batch_size=None):
        old_hidden = extras_of(inputs).get("old_hidden")
        if old_hidden is None:
            return super().score_completions(model, inputs, batch_size)
        with self._old_policy.comparing(old_hidden, inputs["completion_mask"] > 0) as left:
            return *super().score_completions(model, inputs, batch_size), left

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        return mdpo_loss(batch, **{**self.settings(mdpo_loss), "step_size": self.step_size()})


def __getattr__(name: str) -> Any:
    if name in ("OPMDConfig", "OPMDTrainer", "opmd_advantages", "opmd_loss"):  # where they once were
        return getattr(import_module("trl_trust.policy.opmd"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
