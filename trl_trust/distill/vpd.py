"""VPD: a policy that learns from itself reading feedback, and learns to read it (arXiv 2605.15113).

Nearest in TRL: not a loss of GRPO but the experimental `SDPOTrainer`. One network, two prompts: the student sees the
prompt, the teacher the prompt with feedback on that very response. The M-step moves the student towards the teacher,
by the reverse KL on the student's own samples. The E-step, on every few rollout batches, fits the teacher to the
outcomes: an unpaired preference loss on its log-ratio to the student, which is the prior and slides along.

Provenance: **exact** for both objectives, the shift, shared weights, the schedule (Section 3, equations 8 to 10,
Algorithm 1) and the set-up (v2 of the paper). Prompt building, top-k and the importance clip, which the paper omits,
are those of SDPO's code (`lasgroup/SDPO`). Open, and so ours: the shift's momentum (the text has a moving average,
Algorithm 1 the batch's own), optimizer and clip of the E-step, and `e_step_mode="replace"`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback

from ..lookup import finished, load_function
from ..policy.base import (
    LOG_RATIO_LIMIT,
    GenerationBatch,
    PolicyBatch,
    PolicyLoss,
    TrustGRPOConfig,
    TrustGRPOTrainer,
    extras_of,
    paper,
)
from ..policy.hidden import HiddenStates
from ..settings import BelowOne, Count, Fraction, Number, Positive, Settings, Whole, check, setting
from .feedback import another_success, as_text, comments, insert_feedback, without_thoughts


# feedback_func(prompts, completions, **columns) -> what there is to say about each completion, or None
FeedbackFunc = Callable[..., list[str | None]]

SATURATED = 5.0  # |reward - shift| beyond which the sigmoid of the E-step is flat: its slope is below 0.7 %


# --------------------------------------------------------------------------------------------------------------------
# M-step: the student follows the teacher
# --------------------------------------------------------------------------------------------------------------------


def token_divergence(
    student_logits: Tensor, teacher_logits: Tensor, *, alpha: float = 1.0, topk: int | None = None, tail: bool = True
) -> Tensor:
    """Divergence of next-token distributions, (..., V) and (..., V) to (...).

    Args:
        alpha: 1 is KL(student || teacher), 0 is KL(teacher || student), between them the generalized Jensen-Shannon
            divergence with the mixture `(1 - alpha) student + alpha teacher`.
        topk: compare on the student's k likeliest tokens; `None` for all.
        tail: gather the other tokens in one bucket; else renormalize over the k. With it the divergence never exceeds
            that over all tokens.
    """
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    if topk is not None and topk < student.size(-1):
        ids = student.detach().topk(topk).indices
        student, teacher = (_keep(logps, ids, tail) for logps in (student, teacher))
    kl = lambda p, q: (p.exp() * (p - q)).sum(-1)
    if alpha == 1:
        return kl(student, teacher)
    if alpha == 0:
        return kl(teacher, student)
    log = lambda x: torch.tensor(x, dtype=student.dtype, device=student.device).log()
    mixture = torch.logaddexp(student + log(1 - alpha), teacher + log(alpha))
    return (1 - alpha) * kl(student, mixture) + alpha * kl(teacher, mixture)


def _keep(logps: Tensor, ids: Tensor, tail: bool) -> Tensor:
    """(..., k + 1) or (..., k) log-probabilities of `ids`, and of all others together."""
    kept = logps.gather(-1, ids)
    if not tail:
        return kept.log_softmax(-1)
    # summed up, not 1 minus the rest: that has no digit left where the k hold nearly everything
    others = logps.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([kept, others], dim=-1)


def vpd_loss(
    batch: PolicyBatch, *, distillation_mode: str = "topk_logits", distillation_is_clip: float | None = None
) -> PolicyLoss:
    """The M-step: divergence of student and teacher per token, times `sg[min(exp(logps - old_logps), is_clip)]`.

    Reads `batch.extras["divergence"]`, (B, T) with gradient; for `distillation_mode="sampled_token"` instead
    `batch.extras["teacher_logps"]`, (B, T), and takes `sg[logps - teacher_logps] logps`, which has the gradient of the
    reverse KL in expectation but not its value. No reward enters.

    Returns:
        per-token loss (B, T); metrics `vpd/m_loss` (its mean), `vpd/kl_student_teacher` (the divergence; for
        `"sampled_token"` the mean log-ratio), `vpd/is_weight/{mean,max}`.
    """
    if distillation_mode == "sampled_token":
        divergence = (batch.logps - batch.extras["teacher_logps"]).detach()
        per_token_loss = divergence * batch.logps
    else:
        divergence = per_token_loss = batch.extras["divergence"]
    log_ratio = (batch.logps - batch.old_logps).detach()
    weight = torch.ones_like(log_ratio)
    if distillation_is_clip is not None:
        weight = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)).clamp(max=distillation_is_clip)
    per_token_loss = per_token_loss * weight
    return PolicyLoss(
        per_token_loss,
        {
            "vpd/m_loss": per_token_loss,
            "vpd/kl_student_teacher": divergence,
            "vpd/is_weight/mean": weight,
            "vpd/is_weight/max": weight,
        },
    )


# --------------------------------------------------------------------------------------------------------------------
# E-step: the teacher learns what the feedback says about the outcome
# --------------------------------------------------------------------------------------------------------------------


def implicit_reward(
    teacher_logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    *,
    e_step_beta: float = 0.1,
    reward_reduction: str = "sum",
    reward_clip: float | None = None,
) -> Tensor:
    """(B,) `beta sum_t (teacher_logps - ref_logps)` over live tokens, or their mean; clamped to `reward_clip`.

    The log-ratio of posterior to prior is R / beta up to a constant of the prompt, so this estimates the outcome R.
    """
    log_ratio = ((teacher_logps - ref_logps) * mask).sum(-1)
    if reward_reduction == "mean":
        log_ratio = log_ratio / mask.sum(-1).clamp(min=1.0)
    reward = e_step_beta * log_ratio
    return reward if reward_clip is None else reward.clamp(-reward_clip, reward_clip)


def class_sums(reward: Tensor, success: Tensor) -> Tensor:
    """(4,) sum of rewards and number of responses with `success` 1, then with `success` 0; NaN is in neither."""
    positive, negative = success == 1, success == 0
    rows = (reward * positive, positive, reward * negative, negative)
    return torch.stack([row.sum().to(reward.dtype) for row in rows])


def next_shift(sums: list[float], shift: float | None, momentum: float) -> float | None:
    """The shift after a batch with these [`class_sums`]: its running average with the middle between the class means.

    Unchanged where a class is missing, whose mean is not 0 but unknown. The first middle is taken as it is.
    """
    reward_pos, n_pos, reward_neg, n_neg = sums
    if n_pos == 0 or n_neg == 0:
        return shift
    middle = 0.5 * (reward_pos / n_pos + reward_neg / n_neg)
    return middle if shift is None else momentum * shift + (1 - momentum) * middle


def preference_loss(reward: Tensor, success: Tensor, shift: float, n_pos: float, n_neg: float) -> Tensor:
    """(B,) shares of L_E: mean softplus(shift - reward) of successes + mean softplus(reward - shift) of failures.

    `n_pos` and `n_neg` count them over all rows of the update, wherever they are; all shares add up to L_E.
    `shift` is a constant. A row whose `success` is NaN has no share.
    """
    margin = reward - shift
    positive, negative = success == 1, success == 0  # NaN: neither
    return positive * F.softplus(-margin) / max(n_pos, 1) + negative * F.softplus(margin) / max(n_neg, 1)


# --------------------------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------------------------

_NO_RATIO = "the M-step has no policy gradient and clips no ratio; `distillation_is_clip` bounds the importance weight"
_NO_ADVANTAGE = "no advantage enters; `success_reward_threshold` makes outcomes of rewards"


@dataclass
class VPDConfig(TrustGRPOConfig, Settings):
    r"""
    Configuration of [`VPDTrainer`]: every field of [`TrustGRPOConfig`], the two steps, and the teacher's prompt.

    Names are those of TRL's `SDPOConfig` where it has the field. `disable_dropout` is `True`: with shared weights,
    dropout alone would set teacher and student apart. `loss_type` averages over the tokens of responses that have
    feedback: `"dapo"` over all such tokens, `"grpo"` over each response and then over all, as TRL's SDPO does.

    Raises:
        ValueError: for values outside the above, templates without their place-holders, `disable_dropout=False`,
            `neftune_noise_alpha`, E-steps with a `steps_per_generation` that is no multiple of
            `gradient_accumulation_steps`, or `epsilon`, `epsilon_high`, `delta`, `scale_rewards` or
            `multi_objective_aggregation` other than TRL's default.
    """

    unread_fields = {
        **TrustGRPOConfig.unread_fields,
        "epsilon": _NO_RATIO,
        "epsilon_high": _NO_RATIO,
        "delta": _NO_RATIO,
        "scale_rewards": _NO_ADVANTAGE,
        "multi_objective_aggregation": _NO_ADVANTAGE,
    }

    e_step_every: Whole = setting(5, "Rollout batches (`replace`: M-steps) to one E-step; 0: none, which is SDPO.")
    e_step_mode: Literal["extra", "replace"] = setting(
        "extra",
        "`extra`: every nth rollout batch makes an update more, on all of its rows. `replace`: an E-step takes an "
        "optimizer step of its own, for DeepSpeed and FSDP1, where the former cannot be.",
    )
    e_step_position: Literal["before", "after"] = setting(
        "before", "With `e_step_mode='extra'`: before the batch's first M-step, or after its last."
    )
    e_step_beta: Positive = setting(0.1, "Scale of the implicit reward of the E-step.")
    shift_momentum: BelowOne = setting(0.9, "Momentum of the E-step's shift; 0: each batch's own.")
    reward_reduction: Literal["sum", "mean"] = setting("sum", "Of log-ratios over tokens, in the implicit reward.")
    reward_clip: Positive | None = setting(None, "Bound of the implicit reward. None: no bound.")
    single_class: Literal["skip", "use"] = setting(
        "skip", "Where all outcomes are equal: skip the E-step, or use the one class, against the running shift."
    )
    all_wrong: Literal["skip", "use"] = setting(
        "skip",
        "Where no response to a prompt is a success: leave the prompt out of both steps, or use what text there is.",
    )
    prior: Literal["dynamic", "fixed"] = setting(
        "dynamic",
        "Reference of the implicit reward: the student as it is, or the initial policy, i.e. TRL's reference model, "
        "whose `kl` is then logged.",
    )
    distillation_mode: Literal["topk_logits", "full_logits", "sampled_token"] = setting(
        "topk_logits", "What the M-step compares; `sampled_token` estimates from the sampled tokens alone."
    )
    distillation_topk: Count = setting(100, "The student's likeliest tokens to compare on.")
    distillation_add_tail: bool = setting(True, "Whether the other tokens count, as one.")
    distillation_alpha: Fraction = setting(
        1.0, "1: reverse KL; 0: forward KL; between them: Jensen-Shannon divergence. `sampled_token` requires 1."
    )
    distillation_is_clip: Positive | None = setting(
        None, "Cap of a token's importance weight in the M-step. None: no weight."
    )
    success_reward_threshold: Number = setting(0.5, "Reward from which a response is a success.")
    feedback_func: str | None = setting(
        None, "Dotted path of feedback_func(prompts, completions, **columns) -> list[str | None]."
    )
    include_environment_feedback: bool = setting(True, "Whether the teacher reads feedback in words.")
    use_successful_as_teacher: bool = setting(
        True, "Whether it reads another, successful response to the same prompt."
    )
    remove_thinking_from_demonstration: bool = setting(
        True, "Whether that response is shown without its <think> blocks."
    )
    teacher_template: str = setting(
        "{prompt}\n\nAbout an earlier attempt at this:\n\n{feedback}\n\nNow answer it again, from the start.",
        "The teacher's prompt, with {prompt} and {feedback}. In a chat it is the last message of the user.",
    )
    solution_template: str = setting(
        "A solution that is right:\n\n{solution}", "How a successful response is shown, with {solution}."
    )
    max_teacher_prompt_length: Count = setting(
        10240, "In tokens; a response whose teacher's prompt is longer has no feedback."
    )
    disable_dropout: bool = setting(True, "Required: dropout would set apart teacher and student, who share weights.")

    def validate(self) -> None:
        check(self)
        super().validate()
        if self.distillation_mode == "sampled_token":
            alpha = self.distillation_alpha
            self.require(alpha == 1, "distillation_alpha", "must be 1 with distillation_mode='sampled_token'")
        self._require_places("teacher_template", "prompt", "feedback")
        self._require_places("solution_template", "solution")
        self.require(self.disable_dropout, "disable_dropout", "would set apart teacher and student; leave it True")
        self.require(
            self.neftune_noise_alpha is None,
            "neftune_noise_alpha",
            "would set apart teacher and student, as dropout would; leave it out",
        )
        if self.e_step_every:
            steps, accumulation = self.steps_per_generation, self.gradient_accumulation_steps
            self.require(
                steps % accumulation == 0,
                "steps_per_generation",
                f"must be a multiple of gradient_accumulation_steps={accumulation}: an E-step first looks at all "
                f"rollouts of its update",
            )

    def _require_places(self, name: str, *places: str) -> None:
        try:
            text = getattr(self, name).format(**{place: f"<{place}>" for place in places})
        except (LookupError, ValueError):
            text = ""
        found = all(f"<{place}>" in text for place in places)
        names = " and ".join(f"{{{place}}}" for place in places)
        self.require(found, name, f"must hold {names} and no other place-holder; write other braces twice")

    @property
    def needs_reference(self) -> bool:
        return self.e_step_every > 0 and self.prior == "fixed"

    @property
    def needs_stale_rollouts(self) -> bool:
        return False  # nothing is clipped


# --------------------------------------------------------------------------------------------------------------------
# Trainer
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EStep:
    """An E-step that is about to be made. One entry a micro-batch, from before the update.

    Attributes:
        logps, entropies: (B, T) of the student.
        ref_logps: (B, T) of the prior.
        shift, n_pos, n_neg: over all processes.
    """

    logps: list[Tensor]
    entropies: list[Tensor]
    ref_logps: list[Tensor]
    shift: float
    n_pos: float
    n_neg: float


class VPDTrainer(TrustGRPOTrainer):
    """
    Variational policy distillation (arXiv 2605.15113) on GRPO's rollouts: see [`vpd_loss`] and [`preference_loss`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is a [`VPDConfig`], or a `GRPOConfig` for the defaults. Feedback
    on a response is text (of the feedback function or, without one, the attribute `feedback` of the rollout's
    environment) and another response to the same prompt that succeeded. A failure gets both, as far as they exist; a
    success the other response, or else the text. A response with neither counts in neither step, nor do the responses
    to a prompt of which none succeeded.

    The teacher is the model itself on `teacher_template`, through the chat template where prompts are conversations.
    Both sets of logits exist only for a block of tokens at a time.

    Beside the metrics of [`vpd_loss`] it logs `vpd/feedback/{any,text,solution}`, fractions of responses; and with
    each E-step, over all processes: `vpd/e_loss`, `vpd/e_accuracy` (the implicit reward is on the outcome's side of
    the shift), `vpd/saturation` (further than 5 from it), `vpd/shift`, `vpd/reward/{pos,neg}`, `vpd/n/{pos,neg}`,
    `vpd/kl_before_e_step` (as `vpd/kl_student_teacher`), and `vpd/e_skipped`, 1 where it was left out.

    Args:
        feedback_func (`Callable`, *optional*):
            `feedback_func(prompts, completions, **columns) -> list[str | None]`, instead of `args.feedback_func`. It
            is called once a generation batch on every process, with what a reward function reads: the columns of the
            data set, `completion_ids`, `environments` if there are any; and with `rewards`, of these rows. It may be
            async.

    Raises:
        ValueError: for `feedback_func` given twice, not found, or returning something else, `e_step_mode="extra"`
            under DeepSpeed or FSDP1, images, or a conversation that does not end with the user.
    """

    config_class = VPDConfig
    replaces_advantages = "it learns from feedback"
    _name = "VPD"
    _tag_names = ["trl", "trl-trust", "vpd"]
    _paper = paper(
        "Learning from Language Feedback via Variational Policy Distillation",
        "2605.15113",
        "Yang Li and Erik Nijkamp and Semih Yavuz and Shafiq Joty",
    )

    def __init__(self, *args, feedback_func: FeedbackFunc | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.args
        if feedback_func is not None and config.feedback_func is not None:
            raise ValueError(
                f"feedback_func={config.feedback_func!r}: the trainer was given a `feedback_func` as well; keep one."
            )
        self.feedback_func = (
            load_function(config.feedback_func, "feedback_func") if config.feedback_func else feedback_func
        )
        self.shift: float | None = None  # of the E-step; saved with checkpoints, as is the next
        self.rollout_batches = 0  # begun so far
        self._e_step: EStep | None = None  # the one to be made in this optimizer step
        self._micro_batches: list[dict[str, Any]] = []
        self._hidden = HiddenStates(self.model, self.temperature, config.cast_lm_head_to_fp32)
        topk = config.distillation_topk if config.distillation_mode == "topk_logits" else None
        self._divergence = partial(
            token_divergence, alpha=config.distillation_alpha, topk=topk, tail=config.distillation_add_tail
        )
        if config.e_step_every and config.e_step_mode == "extra":
            if self.is_deepspeed_enabled or (self.is_fsdp_enabled and not self.accelerator.is_fsdp2):
                raise ValueError(
                    "e_step_mode='extra': DeepSpeed and FSDP1 make optimizer steps themselves, and none in between; "
                    "use e_step_mode='replace'."
                )
            if config.e_step_position == "after":
                self.add_callback(_AfterStep(self))

    # -- the teacher's prompts ---------------------------------------------------------------------------------------

    def extend_rollouts(self, rollouts: GenerationBatch) -> dict[str, Tensor]:
        tensors = rollouts.tensors
        if "pixel_values" in tensors:
            raise ValueError("VPD writes the teacher's prompt as text: prompts with images are not supported.")
        rewards = rollouts.rewards.tolist()  # of all processes
        texts, solutions = self._texts(rollouts, rewards), self._solutions(rollouts, rewards)
        solved = (rollouts.rewards >= self.args.success_reward_threshold).view(-1, rollouts.num_generations).any(1)
        feedback = []
        for i, row in enumerate(range(rollouts.rows.start, rollouts.rows.stop)):
            if self.args.all_wrong == "skip" and not solved[row // rollouts.num_generations]:
                texts[i] = None  # nor is there a solution
            if rewards[row] >= self.args.success_reward_threshold and solutions[i] is not None:
                texts[i] = None  # a success needs no comment where there is another one to look at
            if solutions[i] is not None:
                solutions[i] = self.args.solution_template.format(solution=solutions[i])
            feedback.append("\n\n".join(filter(None, (texts[i], solutions[i]))))

        with_feedback = partial(insert_feedback, template=self.args.teacher_template)
        prompts = [with_feedback(p, f) if f else p for p, f in zip(rollouts.prompts, feedback, strict=True)]
        ids, mask = self.prompt_tensors(prompts)  # (n, P')
        fits = mask.sum(1) <= self.args.max_teacher_prompt_length
        width = ids.size(1) if fits.all() else max(1, int((mask.sum(1) * fits).max()))
        width += -width % (self.args.pad_to_multiple_of or 1)  # never beyond that of `ids`, which is a multiple
        device = tensors["completion_ids"].device
        as_column = lambda flags: torch.tensor([[bool(x)] for x in flags], device=device) & fits[:, None]
        has_feedback = as_column(feedback)  # (n, 1)

        # Tokens of a response without feedback do not count
        mask_of_tokens = tensors["completion_mask"] * tensors.get("tool_mask", 1) * has_feedback  # (n, T)
        own = rollouts.rewards[rollouts.rows]
        success = (own >= self.args.success_reward_threshold).float()  # (n,)
        counts = has_feedback.squeeze(1) & ~own.isnan() & (mask_of_tokens.sum(1) > 0)
        extras = {
            "mask": mask_of_tokens,
            "teacher_prompt_ids": ids[:, -width:],
            "teacher_prompt_mask": mask[:, -width:],
            "success": success.masked_fill(~counts, torch.nan),
            "feedback": torch.cat([has_feedback, as_column(texts), as_column(solutions)], dim=1).float(),  # (n, 3)
        }
        if self.args.e_step_every and self.args.prior == "fixed":
            extras["prior_logps"] = tensors["ref_per_token_logps"]  # (n, T)
        return extras

    def _texts(self, rollouts: GenerationBatch, rewards: list[float]) -> list[str | None]:
        """What there is in words about each response of this process."""
        n = len(rollouts.completions)
        if not self.args.include_environment_feedback:
            return [None] * n
        if self.feedback_func is None:
            source = "the attribute `feedback` of an environment is"
            found = [getattr(environment, "feedback", None) for environment in self.environments or [None] * n]
        else:
            columns = {key: [row[key] for row in rollouts.examples] for key in rollouts.examples[0]}
            for name in ("prompt", "completion"):
                columns.pop(name, None)
            if self.environments is not None:
                columns["environments"] = self.environments
            columns |= {"completion_ids": rollouts.completion_ids, "rewards": rewards[rollouts.rows]}
            source = "feedback_func returned"
            found = finished(self.feedback_func(prompts=rollouts.prompts, completions=rollouts.completions, **columns))
        return comments(found, n, source)

    def _solutions(self, rollouts: GenerationBatch, rewards: list[float]) -> list[str | None]:
        """Another response to the same prompt that succeeded and says something, for each response of this process."""
        texts, first = [as_text(completion) for completion in rollouts.completions], rollouts.rows.start
        n, size = len(texts), rollouts.num_generations
        if not self.args.use_successful_as_teacher:
            return [None] * n
        if n % size != 0:  # groups are spread over processes
            texts, first = gather_object(texts), 0
        if self.args.remove_thinking_from_demonstration:
            texts = [without_thoughts(text) for text in texts]
        solved = [reward >= self.args.success_reward_threshold for reward in rewards]
        rows = range(rollouts.rows.start, rollouts.rows.stop)
        return [another_success(row, size, solved, lambda i: texts[i - first]) for row in rows]

    # -- the two steps -----------------------------------------------------------------------------------------------

    def score_completions(self, model, inputs, batch_size=None):
        if self._in_e_step:
            part = self.rollout_step % self.args.gradient_accumulation_steps
            shares, aux_loss = self._e_step_shares(model, inputs, part)
            logps, entropies = self._e_step.logps[part], self._e_step.entropies[part]
            return logps.clone().requires_grad_(), entropies, aux_loss, {"e_shares": shares}
        return self._score_both(model, inputs)

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        if "e_shares" in batch.extras:
            # the base divides by the accumulation, and processes average their gradients: the shares have to add up
            parts = self.accelerator.num_processes * self.args.gradient_accumulation_steps
            return PolicyLoss(torch.zeros_like(batch.logps), batch_loss=batch.extras["e_shares"].sum() * parts)
        feedback = batch.extras["feedback"]  # (B, 3)
        loss = vpd_loss(batch, **self.settings(vpd_loss))
        names = ("vpd/feedback/any", "vpd/feedback/text", "vpd/feedback/solution")
        return replace(loss, metrics={**loss.metrics, **dict(zip(names, feedback.split(1, dim=1), strict=True))})

    @property
    def _in_e_step(self) -> bool:
        return self.model.training and self._e_step is not None and self.args.e_step_mode == "replace"

    def _score_both(self, model, inputs) -> tuple[Tensor, Tensor, Tensor | None, dict[str, Tensor]]:
        """Log-probabilities and entropies of the student, the auxiliary loss, and how far the teacher is from it.

        The teacher goes first, without gradient, and leaves its hidden states (B, T, d); the student's forward
        compares them with its own.
        """
        length, left = inputs["completion_ids"].size(1), {}
        live = inputs["completion_mask"] * inputs["tool_mask"] > 0  # (B, T)
        compares = self.args.distillation_mode != "sampled_token"

        def keep(hidden: Tensor) -> None:
            left["hidden"] = hidden

        def compare(hidden: Tensor) -> None:
            divergence = self._hidden.compare(hidden[live], left.pop("hidden")[live], self._divergence)
            # `masked_scatter` keeps the graph when nothing is live: no process may skip a backward
            left["divergence"] = divergence.new_zeros(live.shape).masked_scatter(live, divergence)

        with torch.no_grad(), self._hidden.reading(keep, length):
            left["teacher_logps"] = self._score(model, as_teacher(inputs), None)[0]
        with self._hidden.reading(compare if compares else lambda hidden: None, length):
            scored = super().score_completions(model, inputs)
        left.pop("hidden", None)
        return *scored, left

    def _e_step_shares(self, model, inputs, part: int) -> tuple[Tensor, Tensor | None]:
        """Shares of L_E of the responses of one micro-batch, through the teacher, and the auxiliary loss."""
        e_step = self._e_step
        teacher_logps, _, aux_loss = self._score(
            model, as_teacher(inputs), None, compute_aux_loss=self.aux_loss_enabled
        )
        reward = implicit_reward(
            teacher_logps, e_step.ref_logps[part], live_mask(inputs), **self.settings(implicit_reward)
        )
        success = extras_of(inputs)["success"]
        return preference_loss(reward, success, e_step.shift, e_step.n_pos, e_step.n_neg), aux_loss

    # -- the schedule ------------------------------------------------------------------------------------------------

    def begin_step(self, micro_batches: list[dict[str, Any]]) -> None:
        self._micro_batches, self._e_step = micro_batches, None
        every = self.args.e_step_every
        fresh = self.rollout_step == 0
        self.rollout_batches += fresh
        if self.args.e_step_mode == "replace":
            if every and self.state.global_step % (every + 1) == 0:
                self._e_step = self._plan_e_step()
        elif fresh and self.args.e_step_position == "before":
            self._extra_e_step()

    def _extra_e_step(self) -> None:
        """Where one is due, an E-step on the whole rollout batch: an update of its own, at the current rate."""
        if not self.args.e_step_every or self.rollout_batches % self.args.e_step_every:
            return
        self._micro_batches = self.rollout_batch
        self._e_step = self._plan_e_step()
        if self._e_step is None:
            return
        model = self.model_wrapped
        with self.update_of_its_own(model):
            for part, inputs in enumerate(self._micro_batches):
                # the M-step that follows starts from another policy than the one that generated
                inputs.setdefault("old_per_token_logps", self._e_step.logps[part])
                with self.compute_loss_context_manager():
                    shares, aux_loss = self._e_step_shares(model, inputs, part)
                    loss = shares.sum() * self.accelerator.num_processes
                    if self.aux_loss_enabled:
                        loss = loss + self.router_aux_loss_coef * aux_loss / len(self._micro_batches)
                self.accelerator.backward(loss)
            if self.args.max_grad_norm > 0:
                self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            model.zero_grad()
        self._e_step = None

    @torch.no_grad()
    def _plan_e_step(self) -> EStep | None:
        """Look at the E-step's rollouts before it; `None`, on every process, if it is to be skipped.

        Two host synchronizations, on the steps that an E-step is due.
        """
        rewards, logps, entropies, priors = [], [], [], []
        distance = torch.zeros(2, device=self.accelerator.device)
        for inputs in self._micro_batches:
            student, entropy, _, left = self._score_both(self.model, inputs)
            prior = extras_of(inputs).get("prior_logps", student)
            mask = live_mask(inputs)
            rewards.append(implicit_reward(left["teacher_logps"], prior, mask, **self.settings(implicit_reward)))
            kl = left.get("divergence", student - left["teacher_logps"])
            distance += torch.stack([(kl * mask).sum(), mask.sum()])
            logps.append(student), entropies.append(entropy), priors.append(prior)
        reward = torch.cat(rewards)
        success = torch.cat([extras_of(inputs)["success"] for inputs in self._micro_batches])

        total = self.accelerator.reduce(torch.cat([class_sums(reward, success), distance])).tolist()
        reward_pos, n_pos, reward_neg, n_neg, kl, tokens = total
        self.shift = next_shift(total[:4], self.shift, self.args.shift_momentum)
        one_class_will_do = self.args.single_class == "use" and n_pos + n_neg > 0
        skip = self.shift is None or not (n_pos * n_neg > 0 or one_class_will_do)
        self.log_value("vpd/e_skipped", float(skip))
        if skip:
            return None

        margin, counted = reward - self.shift, ~success.isnan()
        right = ((margin > 0) == (success == 1)) & counted
        loss = preference_loss(reward, success, self.shift, n_pos, n_neg).sum()
        shares = torch.stack([loss, right.sum(), ((margin.abs() > SATURATED) & counted).sum()])
        loss, right, saturated = self.accelerator.reduce(shares).tolist()
        n = n_pos + n_neg
        values = {"e_loss": loss, "e_accuracy": right / n, "saturation": saturated / n, "shift": self.shift}
        values |= {"n/pos": n_pos, "n/neg": n_neg, "kl_before_e_step": kl / max(tokens, 1)}
        values |= {"reward/pos": reward_pos / n_pos} if n_pos else {}
        values |= {"reward/neg": reward_neg / n_neg} if n_neg else {}
        for name, value in values.items():
            self.log_value(f"vpd/{name}", value)
        return EStep(logps, entropies, priors, self.shift, n_pos, n_neg)

    def method_state(self) -> dict[str, Any]:
        return {"shift": self.shift, "rollout_batches": self.rollout_batches}

    def load_method_state(self, state: dict[str, Any]) -> None:
        self.shift, self.rollout_batches = state["shift"], state.get("rollout_batches", 0)


class _AfterStep(TrainerCallback):
    """The E-step of `e_step_position="after"`."""

    def __init__(self, trainer: VPDTrainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.rollout_step == 0:  # the last update on a rollout batch is made
            self.trainer._extra_e_step()


def as_teacher(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same completions after the teacher's prompts."""
    extras = extras_of(inputs)
    return {**inputs, **{name: extras[f"teacher_{name}"] for name in ("prompt_ids", "prompt_mask")}}


def live_mask(inputs: dict[str, Any]) -> Tensor:
    """(B, T) tokens that the model wrote, of responses that have feedback."""
    return (inputs["completion_mask"] * inputs["tool_mask"]).float()
