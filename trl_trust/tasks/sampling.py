"""Sampling from a small causal language model, with log-probabilities and entropies as it goes.

On a model of this size `model.generate` spends most of its time outside of the model, and says neither. Uniform
numbers are drawn for all rows and positions beforehand and turned into tokens by the inverse of the distribution
function: two policies that are nearly the same then say nearly the same, which makes paired comparisons sharper.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass(frozen=True)
class Samples:
    """What [`sample`] drew: R = N * samples rows, the samples of a prompt side by side, T tokens.

    Attributes:
        prompt_ids, prompt_mask: (R, P), padded on the left.
        ids: (R, T), padded on the right.
        mask: (R, T) bool, whether a token was said; the end token was.
        logps: (R, T) log-probability of each token under what it was drawn from, logit noise included.
        entropies: (R, T) entropy of that distribution, in nats.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    ids: Tensor
    mask: Tensor
    logps: Tensor
    entropies: Tensor

    def next_token_logps(self, policy: PreTrainedModel) -> Tensor:
        """(live tokens, V) log-probabilities of every next token under `policy`, in one forward."""
        ids = torch.cat([self.prompt_ids, self.ids], 1)
        attention = torch.cat([self.prompt_mask, self.mask.long()], 1)
        logits = policy(input_ids=ids, attention_mask=attention).logits[:, self.prompt_ids.shape[1] - 1 : -1]
        return logits[self.mask].float().log_softmax(-1)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int,
    samples: int = 1,
    generator: torch.Generator | None = None,
    logit_noise: float = 0.0,
    **unread,
) -> Samples:
    """Draw completions at temperature 1 from the whole distribution.

    Args:
        model: Its config names the end and the pad token. Where `generation_config.use_cache` is off, every step
            reads the whole sequence.
        input_ids, attention_mask: (N, P), padded on the left.
        max_new_tokens: Bound of T.
        samples: Completions a prompt.
        generator: Source of the draws; `None` decodes greedily.
        logit_noise: Standard deviation of Gaussian noise that is added to every logit at every token, anew each time:
            a sampler that differs a little from the policy.
        unread: Other outputs of a tokenizer.
    """
    rows, device = len(input_ids) * samples, input_ids.device
    eos, pad = model.config.eos_token_id, model.config.pad_token_id
    prompt_ids, prompt_mask = (x.repeat_interleave(samples, 0) for x in (input_ids, attention_mask))
    if generator is not None:
        uniform = torch.rand(max_new_tokens, rows, generator=generator, device=device, dtype=torch.float64)

    cache = DynamicCache() if model.generation_config.use_cache else None
    padded = not attention_mask.bool().all()  # without padding no mask is needed, and attention is faster
    ids, mask, logps, entropies = [], [], [], []
    live = torch.ones(rows, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        if cache is None:
            attention = torch.cat([prompt_mask, *(m.long()[:, None] for m in mask)], 1)
            logits = model(
                input_ids=torch.cat([prompt_ids, *(i[:, None] for i in ids)], 1), attention_mask=attention
            ).logits[:, -1]
        else:
            given = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            if padded:
                told = attention_mask if step == 0 else prompt_mask
                given["attention_mask"] = torch.cat([told, told.new_ones(len(told), step)], 1)
                positions = given["attention_mask"].cumsum(1) - 1
                given["position_ids"] = positions.clamp(min=0)[:, -(told.shape[1] if step == 0 else 1) :]
            # the prompt is read once, however many samples it has
            logits = model(input_ids=input_ids if step == 0 else ids[-1][:, None], **given).logits[:, -1]
            if step == 0 and samples > 1:
                cache.batch_repeat_interleave(samples)
                logits = logits.repeat_interleave(samples, 0)
        logits = logits.float()
        if logit_noise:
            logits = logits + logit_noise * torch.randn(logits.shape, generator=generator, device=device)
        all_logps = logits.log_softmax(-1)  # (R, V)
        probabilities = all_logps.exp()
        if generator is None:
            token = all_logps.argmax(-1)
        else:
            cumulative = probabilities.double().cumsum(-1)
            token = (cumulative <= uniform[step, :, None] * cumulative[:, -1:]).sum(-1)
        ids.append(torch.where(live, token, pad))
        mask.append(live)
        logps.append(all_logps.gather(1, token[:, None]).squeeze(1))
        entropies.append(-(probabilities * all_logps).sum(-1))
        live = live & (token != eos)
        if not live.any():
            break
    stack = lambda steps: torch.stack(steps, 1)
    return Samples(prompt_ids, prompt_mask, stack(ids), stack(mask), stack(logps), stack(entropies))
