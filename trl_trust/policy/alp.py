"""ALP: adaptive layerwise perturbation (arXiv 2603.19470).

Nearest TRL loss: the clipped `dapo` term with vLLM correction. ALP drops correction factor and proximal policy: there
is one ratio, whose numerator is the trained model with small learnable Gaussian noise at every layer, and whose
denominator is the sampler's own log-probability.

Provenance: **exact** for noise and loss, from the authors' code (`amazon-science/adaptive-layerwise-perturbation`,
`Chenluye99/Adaptive-Layerwise-Perturbation`: `patch_qwen2.py`, `fsdp_workers.py`, `core_algos.py`). Their sources
contradict each other on the initial noise (1e-8 to 2e-2), so ours is a choice. Addition in float32, hashed seeds,
scales outside the model and the warning when the noise does nothing are ours.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from accelerate.logging import get_logger
from torch import Tensor

from ..anatomy import decoder_layers
from ..settings import Fraction, Integer, NonNegative, Positive, Range, Width, setting
from .base import (
    LOG_RATIO_LIMIT,
    GenerationBatch,
    PolicyBatch,
    PolicyLoss,
    TrustGRPOConfig,
    TrustGRPOTrainer,
    clipped_surrogate,
    masked_quantiles,
    paper,
)
from .noise import LayerNoise


logger = get_logger(__name__)

# mean KL(clean || perturbed) a token below which the noise does nothing: float32 rounding makes about 1e-12
NO_EFFECT = 1e-10


# --------------------------------------------------------------------------------------------------------------------
# Loss
# --------------------------------------------------------------------------------------------------------------------


def alp_loss(
    batch: PolicyBatch,
    *,
    ratio_mode: str = "sequence",
    epsilon: float = 0.5,
    epsilon_high: float = 3.0,
    dual_clip: float | None = 3.0,
) -> PolicyLoss:
    """`max(-A ratio, -A clip(ratio, 1 - epsilon, 1 + epsilon_high))`, for A < 0 at most `-A dual_clip`.

    `batch.logps` are the perturbed model's, and the ratio is to the sampler (`batch.sampler_logps`). With d the
    log-ratio of a token, the log of the ratio at token t is, by `ratio_mode`:

    - `"token"`: d_t;
    - `"sequence"`: the sum of d over the response's live tokens, shared by all of them;
    - `"geometric"`: that sum over their number;
    - `"cumulative"`: the sum over the live tokens up to t.

    In the last three the sum is a constant, and the gradient of an unclipped token is `-A ratio` for its own `logps`.

    Returns:
        per-token loss (B, T); metrics `alp/clip_ratio/{low,high,dual}` (fractions of the live tokens that each bound
        stops), `alp/ratio/{p02,p98,max}`.
    """
    advantages = batch.advantages  # (B, 1) or (B, T)
    log_ratio = batch.logps - batch.sampler_logps  # (B, T)
    if ratio_mode != "token":
        live = log_ratio.detach() * batch.mask
        total = live.cumsum(-1) if ratio_mode == "cumulative" else live.sum(-1, keepdim=True)
        if ratio_mode == "geometric":
            total = total / batch.mask.sum(-1, keepdim=True).clamp(min=1.0)
        log_ratio = total + (batch.logps - batch.logps.detach())
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))  # (B, T)

    per_token_loss = clipped_surrogate(ratio, advantages, epsilon, epsilon_high)
    above = torch.zeros_like(ratio)
    if dual_clip is not None:
        ceiling = torch.where(advantages < 0, -advantages * dual_clip, torch.inf)
        above = (per_token_loss > ceiling).float()
        per_token_loss = torch.minimum(per_token_loss, ceiling)

    p02, p98 = masked_quantiles(ratio.detach(), batch.mask > 0, (0.02, 0.98))
    return PolicyLoss(
        per_token_loss,
        {
            "alp/clip_ratio/low": ((ratio < 1 - epsilon) & (advantages < 0)).float(),
            "alp/clip_ratio/high": ((ratio > 1 + epsilon_high) & (advantages > 0)).float(),
            "alp/clip_ratio/dual": above,
            "alp/ratio/p02": p02,
            "alp/ratio/p98": p98,
            "alp/ratio/max": ratio,
        },
    )


# --------------------------------------------------------------------------------------------------------------------
# Config and trainer
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class ALPConfig(TrustGRPOConfig):
    r"""
    Configuration of [`ALPTrainer`]: every field of [`TrustGRPOConfig`], the noise and the form of the ratio.

    Raises:
        ValueError: for values outside the above, `fp16` with learned scales, or `delta` or `importance_sampling_level`
            other than TRL's default.
    """

    unread_fields: ClassVar[dict[str, str]] = {
        "delta": "use `dual_clip`",
        "importance_sampling_level": "use `ratio_mode`",
    }

    perturbation_sigma: NonNegative = setting(
        1e-2,
        "Initial standard deviation of the noise at every layer, in units of the residual stream. 0: no noise, the "
        '"bypass" baseline.',
    )
    learn_sigma: bool = setting(True, "Whether the scales of the noise are trained. False where there is no noise.")
    sigma_learning_rate: Positive = setting(
        5e-4, "Learning rate of the logarithms of the scales (Adam without weight decay, on the trainer's schedule)."
    )
    perturbation_layers: list[int] | None = setting(
        None, "Layers to perturb, negative ones counted from the last. Default: all."
    )
    sigma_max: Positive | None = setting(
        None, "Upper bound of the scales, at least `perturbation_sigma`. Default: none, as in the paper."
    )
    ratio_mode: Literal["token", "sequence", "geometric", "cumulative"] = setting(
        "sequence", "What a token's ratio is made of: itself, the response (product or geometric mean), all up to it."
    )
    epsilon: Fraction = setting(0.5, "Width of the clip band below 1.")
    epsilon_high: Width = setting(3.0, "Width of the clip band above 1.")
    dual_clip: Annotated[float, Range(1, above=True)] | None = setting(
        3.0, "Ceiling of the loss for A < 0, in units of -A. None: off."
    )
    perturbation_seed: Integer = setting(0, "Base of the seeds of the noise.")

    @property
    def has_clean_logps(self) -> bool:
        return False  # of the model with noise

    @property
    def anchors_on_sampler(self) -> bool:
        return True

    @property
    def needs_stale_rollouts(self) -> bool:
        return self.perturbation_sigma == 0 and super().needs_stale_rollouts  # the noise makes the ratio live

    def validate(self) -> None:
        super().validate()
        sigma, layers = self.perturbation_sigma, self.perturbation_layers
        if sigma == 0:
            self.learn_sigma = False
        self.require(
            layers is None or (len(layers) > 0 and len(set(layers)) == len(layers)),
            "perturbation_layers",
            "must name each layer once, and at least one; None is all, perturbation_sigma=0 is none",
        )
        self.require(
            self.sigma_max is None or self.sigma_max >= sigma,
            "sigma_max",
            f"must be a finite number > 0 and at least perturbation_sigma={sigma!r}, or None",
        )
        if self.learn_sigma:
            self._require(
                not self.fp16,
                "fp16",
                "scales the loss, and with it the gradient of the noise scales: use bf16, or learn_sigma=False",
            )


class ALPTrainer(TrustGRPOTrainer):
    """
    GRPO with adaptive layerwise perturbation (arXiv 2603.19470). See [`alp_loss`] and [`LayerNoise`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is an [`ALPConfig`], or a `GRPOConfig` for the defaults. The
    noise is in the training forward only, never in generation, old and reference log-probabilities, evaluation, saved
    weights or weights sent to vLLM. Beside the metrics of [`alp_loss`] it logs `alp/sigma/{mean,min,max}`, and
    `alp/kl/perturbed`: KL(clean || perturbed) by the k3 estimator, from the micro-batches before the first update on
    their rollouts, where nothing but the noise separates the two.

    Raises:
        ValueError: if the model has no decoder layers that can be found, or not the `perturbation_layers`.
    """

    config_class = ALPConfig
    _name = "ALP"
    _tag_names = ["trl", "trl-trust", "alp"]
    _paper = paper(
        "Adaptive Layerwise Perturbation: Unifying Off-Policy Corrections for LLM RL",
        "2603.19470",
        "Chenlu Ye and Xuanchang Zhang and Yifan Hao and Zhou Yu and Ziji Zhang and Abhinav "
        "Gullapalli and Hao Chen and Jing Huang and Tong Zhang",
    )

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        args = self.args
        self.noise: LayerNoise | None = None
        self._generated_at = self._noisy_at = -1  # global steps of the last generation, and of the last noisy forward
        self._micro_step = 0  # of the optimizer step
        self._warned = False
        if args.perturbation_sigma > 0:
            try:
                layers = decoder_layers(self.model)
            except ValueError as error:
                raise ValueError(
                    f"perturbation_sigma={args.perturbation_sigma!r}: {error}; set it to 0 to train without noise."
                ) from error
            indices = range(len(layers)) if args.perturbation_layers is None else args.perturbation_layers
            within = [index % len(layers) for index in indices if -len(layers) <= index < len(layers)]
            args._require(
                len(within) == len(indices) == len(set(within)),
                "perturbation_layers",
                f"must name different layers of {len(layers)}, from {-len(layers)} to {len(layers) - 1}",
            )
            self.noise = LayerNoise(
                layers, within, args.perturbation_sigma, args.learn_sigma, device=self.accelerator.device
            )
        if args.learn_sigma:
            self._sigma_optimizer = torch.optim.Adam(
                [self.noise.log_sigma],
                lr=args.sigma_learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            )
            self.tensors_aside = [self.noise.log_sigma]  # TRAM, which takes two gradients, leaves one in them

    def extend_rollouts(self, rollouts: GenerationBatch) -> dict[str, Tensor]:
        if self.model.training:
            self._generated_at = self.state.global_step
            # TRL leaves them out where updates and generations are aligned; the ratio would be the policy's to itself
            if "old_per_token_logps" not in rollouts.tensors:
                return {"old_logps": self.rollout_logps(rollouts.tensors)}
        return {}

    def score_completions(self, model, inputs, batch_size=None):
        if self.noise is not None and self.model.training:
            step = self.state.global_step
            self._micro_step = self._micro_step + 1 if self._noisy_at == step else 0
            self._noisy_at = step
            self.noise.on(self.args.perturbation_seed, step, self._micro_step, self.accelerator.process_index)
        return super().score_completions(model, inputs, batch_size)

    def training_step(self, *args, **kwargs):
        try:
            loss = super().training_step(*args, **kwargs)
        finally:
            if self.noise is not None:
                self.noise.off()  # not before the backward, which makes checkpointed forwards again
        if self.args.learn_sigma and self.accelerator.sync_gradients:
            self._update_sigma()
        return loss

    @torch.no_grad()
    def _update_sigma(self) -> None:
        log_sigma, group = self.noise.log_sigma, self.optimizer.param_groups[0]
        log_sigma.grad = self.accelerator.reduce(log_sigma.grad, reduction="mean")
        schedule = group["lr"] / (group.get("initial_lr") or group["lr"] or 1.0)  # warm-up and decay, as a factor
        self._sigma_optimizer.param_groups[0]["lr"] = self.args.sigma_learning_rate * schedule
        self._sigma_optimizer.step()
        self._sigma_optimizer.zero_grad()
        if self.args.sigma_max is not None:
            log_sigma.clamp_(max=math.log(self.args.sigma_max))

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        out = alp_loss(batch, **self.settings(alp_loss))
        if self.noise is None:
            return out
        sigma = self.noise.log_sigma.detach().exp()
        log_ratio = batch.logps.detach() - batch.old_logps  # (B, T)
        clean = self.model.training and self._generated_at == self.state.global_step
        kl = torch.expm1(log_ratio) - log_ratio  # k3, without the cancellation of exp(x) - 1
        noise_metrics = {
            "alp/sigma/mean": sigma.mean(),
            "alp/sigma/min": sigma.min(),
            "alp/sigma/max": sigma.max(),
            "alp/kl/perturbed": kl if clean else torch.full_like(kl, torch.nan),
        }
        return replace(out, metrics={**out.metrics, **noise_metrics})

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        kl = logs.get("alp/kl/perturbed")
        if kl is not None and kl < NO_EFFECT and not self._warned:
            self._warned = True
            logger.warning(
                f"The noise does nothing: KL(clean || perturbed) is {kl:.1e} at sigma {logs['alp/sigma/mean']:.1e}. "
                f"Raise perturbation_sigma; in bfloat16, noise below about 1e-3 of the residual stream rounds away."
            )

    def generation_state(self) -> dict[str, Any]:
        return {"generated_at": self._generated_at}

    def load_generation_state(self, state: dict[str, Any]) -> None:
        self._generated_at = state["generated_at"]

    def method_state(self) -> dict[str, Any]:
        if not self.args.learn_sigma:
            return {}
        adam = self._sigma_optimizer.state[self.noise.log_sigma]
        as_lists = {name: value.tolist() for name, value in adam.items()}  # exact: JSON keeps every bit of a float
        return {"log_sigma": self.noise.log_sigma.tolist(), "adam": as_lists}

    @torch.no_grad()
    def load_method_state(self, state: dict[str, Any]) -> None:
        if not self.args.learn_sigma:
            return
        log_sigma = self.noise.log_sigma
        if len(state["log_sigma"]) != len(log_sigma):
            raise ValueError(
                f"The checkpoint has noise scales of {len(state['log_sigma'])} layers, but {len(log_sigma)} are "
                f"perturbed: resume with the same perturbation_layers."
            )
        log_sigma.copy_(torch.tensor(state["log_sigma"]))
        self._sigma_optimizer.state[log_sigma] = {
            name: torch.tensor(value, device=log_sigma.device if isinstance(value, list) else None)
            for name, value in state["adam"].items()
        }
