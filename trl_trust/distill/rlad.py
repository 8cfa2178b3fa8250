"""RLAD: a clipped ratio anchored on the old policy and a teacher (arXiv 2602.22495).

Nearest TRL loss: `loss_type="grpo"`. One thing changes: the importance ratio is taken to a geometric mixture of the
old policy and a frozen teacher, so the teacher decides whether and how far a token moves, and the reward in which
direction. There is no distillation term.

Provenance: **exact** for ratio, objective, clamp of the log-ratio and clip widths (the paper's equations and appendix,
v2). The gradient of a saturated clamp and the form of the KL in the KDRL baseline are not stated: the first is an
option here, the second is the k3 estimator that TRL uses for the reference.
"""

import time
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import PreTrainedModel

from ..policy.base import (
    GenerationBatch,
    PolicyBatch,
    PolicyLoss,
    TrustGRPOConfig,
    TrustGRPOTrainer,
    clip_ratios,
    clipped_surrogate,
    paper,
)
from ..settings import BelowOne, Fraction, NonNegative, Positive, as_mapping, require, setting
from ..tokens import check_token_ids, text_tokenizer


logger = get_logger(__name__)


def rlad_loss(
    batch: PolicyBatch,
    *,
    alpha: float = 0.5,
    teacher_log_ratio_clip: float | None = 1.0,
    clamp_grad: str = "literal",
    teacher_kl_coef: float = 0.0,
    epsilon: float = 0.2,
    epsilon_high: float | None = 0.28,
) -> PolicyLoss:
    """The clipped surrogate of `exp(alpha d_old + (1 - alpha) clamp(d_T, -c, c))`.

    `d_old = logps - old_logps`, `d_T = logps - teacher_logps`: GRPO with `old^alpha teacher^(1 - alpha)`, one number a
    token and no distribution, in the place of the old policy.

    `batch.extras["teacher_logps"]`, (B, T), is read when `alpha < 1` or `teacher_kl_coef > 0`, and not otherwise.

    Args:
        alpha: weight of the old policy; 1 is GRPO.
        teacher_log_ratio_clip: c; `None` for no clamp.
        clamp_grad: `"literal"`: a token whose clamp is saturated keeps `alpha` of its gradient, as the formula has it.
            `"straight_through"`: it keeps all of it.
        teacher_kl_coef: weight of KL(policy || teacher), by the k3 estimator; with `alpha=1` the KDRL baseline.
        epsilon, epsilon_high: clip widths; `None` for `epsilon_high` means `epsilon`.

    Returns:
        per-token loss (B, T); metrics `clip_ratio/*` as of GRPO, on RLAD's ratio, and `rlad/ratio/{mean,min,max}`,
        `rlad/dead/{pos,neg}` (clipped, hence without gradient); with a teacher, `rlad/clamped` (saturated clamps),
        `rlad/student_minus_teacher` (mean of d_T, in nats) and `rlad/teacher_kl`.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    log_ratio = batch.logps - batch.old_logps  # (B, T)
    metrics, kl = {}, None
    if alpha < 1 or teacher_kl_coef > 0:
        to_teacher = batch.logps - batch.extras["teacher_logps"]  # (B, T), d_T
        kl = torch.expm1(-to_teacher) + to_teacher
        metrics = {"rlad/student_minus_teacher": to_teacher, "rlad/teacher_kl": kl}
    if alpha < 1:
        clamped = to_teacher
        if teacher_log_ratio_clip is not None:
            c = teacher_log_ratio_clip
            clamped = to_teacher.clamp(-c, c)
            if clamp_grad == "straight_through":
                clamped = clamped.detach() + (batch.logps - batch.logps.detach())
            metrics["rlad/clamped"] = (to_teacher.abs() > c).float()
        log_ratio = alpha * log_ratio + (1 - alpha) * clamped
    ratio = torch.exp(log_ratio)

    per_token_loss = clipped_surrogate(ratio, batch.advantages, epsilon, epsilon_high)
    if teacher_kl_coef > 0:
        per_token_loss = per_token_loss + teacher_kl_coef * kl
    clip = clip_ratios(ratio, batch, epsilon, epsilon_high)
    return PolicyLoss(
        per_token_loss,
        {
            **clip,
            "rlad/ratio/mean": ratio,
            "rlad/ratio/min": ratio,
            "rlad/ratio/max": ratio,
            "rlad/dead/pos": clip["clip_ratio/high_mean"],
            "rlad/dead/neg": clip["clip_ratio/low_mean"],
            **metrics,
        },
    )


@dataclass
class RLADConfig(TrustGRPOConfig):
    r"""
    Configuration of [`RLADTrainer`]: every field of [`TrustGRPOConfig`], the teacher, and how it enters the ratio.

    `epsilon_high` (`0.28`) and `loss_type` (`"grpo"`) have the paper's defaults.

    Raises:
        ValueError: for values outside the above, `teacher_model_init_kwargs` that are no mapping, or `delta` or
            `importance_sampling_level` other than TRL's default.
    """

    unread_fields: ClassVar[dict[str, str]] = {
        "delta": "two-sided clipping has no meaning for a ratio to a mixture",
        "importance_sampling_level": "RLAD's ratio is one per token",
    }

    teacher_model_name_or_path: str | None = setting(
        None, "Frozen teacher, on the Hub or in a directory. It must share the token ids. Required with `alpha < 1`."
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = setting(
        None,
        "Keyword arguments for loading the teacher, as JSON on the command line: dtype (default: that of the "
        "checkpoint), quantization_config, attn_implementation, revision, ...",
    )
    alpha: Fraction = setting(0.5, "Weight of the old policy in the anchor; 1 is GRPO, 0 the teacher alone.")
    teacher_log_ratio_clip: Positive | None = setting(1.0, "Bound of the log-ratio to the teacher. None: no bound.")
    clamp_grad: Literal["literal", "straight_through"] = setting(
        "literal", "Gradient of a token whose log-ratio to the teacher is out of bounds: alpha of it, or all of it."
    )
    teacher_temperature: Positive | None = setting(
        None, "Temperature of the teacher's log-probabilities. Default: `temperature`, as for the policy's own."
    )
    teacher_kl_coef: NonNegative = setting(
        0.0, "Weight of KL(policy || teacher); with alpha=1 this is the KDRL baseline."
    )
    epsilon_high: NonNegative | None = setting(0.28, "Upper clip width. None: `epsilon`.")
    loss_type: str = setting("grpo", "Aggregation of the per-token loss: grpo, bnpo, dr_grpo or dapo.")

    def __post_init__(self):
        self.teacher_model_init_kwargs = as_mapping("teacher_model_init_kwargs", self.teacher_model_init_kwargs)
        super().__post_init__()

    @property
    def needs_teacher(self) -> bool:
        """Whether anything depends on the teacher."""
        return self.alpha < 1 or self.teacher_kl_coef > 0

    @property
    def needs_stale_rollouts(self) -> bool:
        # the ratio to the teacher is no constant, so with alpha < 1 clipping acts on a fresh rollout too
        return self.alpha == 1 and super().needs_stale_rollouts

    def validate(self) -> None:
        super().validate()
        require("epsilon", self.epsilon, BelowOne)


class RLADTrainer(TrustGRPOTrainer):
    """
    GRPO with RLAD's ratio to a mixture of old policy and teacher (arXiv 2602.22495). See [`rlad_loss`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is an [`RLADConfig`], or a `GRPOConfig` for the defaults. The
    teacher scores the sampled tokens once a generation batch, without gradient, one micro-batch at a time and through
    the fused head, so that its logits are never held. It is spread over processes as TRL spreads a reference model.
    Beside the metrics of [`rlad_loss`] it logs `rlad/teacher_time`, seconds a generation batch.

    Args:
        teacher_model (`str` or [`~transformers.PreTrainedModel`], *optional*):
            The teacher, instead of `args.teacher_model_name_or_path`. A model is frozen and put into evaluation mode.

    Raises:
        ValueError: without a teacher where one is needed, with two of them, with `teacher_model_init_kwargs` for a
            model that is already loaded, or if the teacher's token ids are not the policy's.
    """

    config_class = RLADConfig
    _name = "RLAD"
    _tag_names = ["trl", "trl-trust", "rlad"]
    _paper = paper(
        "Reinforcement-aware Knowledge Distillation for LLM Reasoning",
        "2602.22495",
        "Zhaoyang Zhang and Shuli Jiang and Yantao Shen and Yuting Zhang and Dhananjay Ram and Shuo"
        " Yang and Zhuowen Tu and Wei Xia and Stefano Soatto",
    )

    def __init__(self, *args, teacher_model: str | PreTrainedModel | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.args
        if teacher_model is not None and config.teacher_model_name_or_path is not None:
            raise ValueError(
                f"teacher_model_name_or_path={config.teacher_model_name_or_path!r}: the trainer was given a "
                f"`teacher_model` as well; keep one of the two."
            )
        teacher = config.teacher_model_name_or_path if teacher_model is None else teacher_model
        self.teacher_model = None
        if not config.needs_teacher:
            if teacher is not None:
                logger.warning(f"alpha={config.alpha}: {self._name} is GRPO, and the teacher is not loaded.")
            return
        if teacher is None:
            raise ValueError(
                f"alpha={config.alpha}, teacher_kl_coef={config.teacher_kl_coef}: {self._name} needs a teacher. Set "
                f"`teacher_model_name_or_path`, or give the trainer a `teacher_model`."
            )
        if not isinstance(teacher, str) and config.teacher_model_init_kwargs is not None:
            raise ValueError(
                f"teacher_model_init_kwargs={config.teacher_model_init_kwargs!r}: `teacher_model` is already loaded; "
                f"give its name instead, or leave them out."
            )
        init_kwargs = {"dtype": "auto", **(config.teacher_model_init_kwargs or {})}
        self.teacher_model = self.add_frozen_model(teacher, init_kwargs, temperature=config.teacher_temperature)
        # its tokenizer is found where the teacher is, and under the same terms
        names = ("revision", "trust_remote_code")
        terms = {"trust_remote_code": config.trust_remote_code, **init_kwargs}
        self._check_token_ids(**{name: terms[name] for name in names if name in terms})

    def _check_token_ids(self, **options) -> None:
        """Raise `ValueError` unless every token of the policy is the same one to the teacher."""
        teacher = self.accelerator.unwrap_model(self.teacher_model).config
        self._teacher_vocab_size = teacher.get_text_config().vocab_size
        reachable = self.accelerator.unwrap_model(self.model).config.get_text_config().vocab_size
        ids = text_tokenizer(self.processing_class).get_vocab().values()
        highest = max(id_ for id_ in ids if id_ < reachable)
        check_token_ids("teacher_model", teacher, self.processing_class, highest, **options)

    def extend_rollouts(self, rollouts: GenerationBatch) -> dict[str, Tensor]:
        if self.teacher_model is None:
            return {}
        # An id that no tokenizer knows, from the padding of the policy's embedding, can be sampled all the same
        highest = int(rollouts.tensors["completion_ids"].max())
        if highest >= self._teacher_vocab_size:
            raise ValueError(
                f"token id {highest} was sampled, but the teacher knows {self._teacher_vocab_size}: suppress it with "
                f"`generation_kwargs`, or choose a teacher whose embedding is as large as the policy's."
            )
        began = synchronized_time()
        teacher_logps = self.rollout_logps(rollouts.tensors, self.teacher_model)  # (n, T)
        self.log_value("rlad/teacher_time", synchronized_time() - began)
        return {"teacher_logps": teacher_logps}

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        return rlad_loss(batch, **self.settings(rlad_loss))


def synchronized_time() -> float:
    """Seconds; the device has done what it was told to before."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
