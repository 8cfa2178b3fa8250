"""The other two families of the survey arXiv 2307.16851: the worst case over inputs, and invariance to a nuisance.

Provenance: **inspired**, as [`trl_trust.robust.weights`]; inner maximization over a ball, and an adversary that reads
the nuisance off the features (domain-adversarial training). Functions of tensors; no trainer.
"""

import math

import torch
from torch import Tensor, nn


def ascend(delta: Tensor, grad: Tensor, size: Tensor) -> Tensor:
    """One normalized step uphill: `delta + size grad / |grad|`, row by row. A row without a gradient stays.

    `steps` of them, each of `radius / steps`, start at 0 and end inside the ball of `radius`.

    Args:
        delta: (B, ...) perturbation.
        grad: (B, ...) gradient of the loss there.
        size: (B,) L2 length of the step.
    """
    rows = grad.flatten(1).float()
    norm = rows.norm(dim=1)
    scale = torch.where(norm > 0, size.float() / norm.clamp(min=torch.finfo(torch.float32).tiny), 0.0)  # (B,)
    return delta + (rows * scale.unsqueeze(1)).view_as(grad).to(delta.dtype)


def reversal(progress: float) -> float:
    """How much of the adversary's gradient reaches the features: 2 / (1 + exp(-10 t)) - 1, t in [0, 1] of the run."""
    return 2 / (1 + math.exp(-10 * progress)) - 1


def pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of the states (B, T, d) over live tokens (B, T), scaled to root mean square 1 a row: (B, d) float32.

    Scaled, since an adversary could otherwise be escaped by shrinking.
    """
    mask = mask.unsqueeze(-1).to(torch.float32)
    mean = (hidden.float() * mask).sum(1) / mask.sum(1).clamp(min=1)
    return mean / (mean.square().mean(1, keepdim=True) + 1e-6).sqrt()


class Reader:
    """A linear head that reads a nuisance off features; the adversary of invariance.

    It learns by a few steps of its own on every batch, on features without gradient. What the model is told is the
    head's cross-entropy with the head held still, times `-`[`reversal`] and a weight.

    Args:
        width: of the features.
        num_groups: K.
        num_conditions: values of what is allowed to go with the nuisance, such as the label; it is given to the head
            one-hot, so that only what the nuisance adds is unlearned. 0 for none.
        lr, steps: of its Adam, a batch.
    """

    def __init__(self, width: int, num_groups: int, num_conditions: int = 0, lr: float = 1e-2, steps: int = 10):
        self.num_conditions, self.steps = num_conditions, steps
        self.head = nn.Linear(width + num_conditions, num_groups, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=lr)

    def logits(self, features: Tensor, conditions: Tensor, still: bool = False) -> Tensor:
        """(B, K), for features (B, d) and conditions (B,); `still`: no gradient for the head."""
        if self.num_conditions:
            allowed = nn.functional.one_hot(conditions, self.num_conditions).to(features)
            features = torch.cat([features, allowed], dim=1)
        weight, bias = self.head.weight, self.head.bias
        return nn.functional.linear(features, *((weight.detach(), bias.detach()) if still else (weight, bias)))

    def fit(self, features: Tensor, conditions: Tensor, groups: Tensor) -> Tensor:
        """Learn on a batch of all processes; returns the share of it that was read right beforehand, 0-d."""
        features = features.detach()
        with torch.enable_grad():
            right = (self.logits(features, conditions).argmax(1) == groups).float().mean()
            for _ in range(self.steps):
                self.optimizer.zero_grad()
                nn.functional.cross_entropy(self.logits(features, conditions), groups).backward()
                self.optimizer.step()
        return right

    def loss(self, features: Tensor, conditions: Tensor, groups: Tensor) -> Tensor:
        """0-d cross-entropy of the head held still, with a gradient to the features."""
        return nn.functional.cross_entropy(self.logits(features, conditions, still=True), groups)

    def state(self) -> dict:
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])


def chance(groups: Tensor, conditions: Tensor, num_groups: int, num_conditions: int) -> Tensor:
    """What guessing reads right: the largest group of each condition, as a share of the rows (B,); 0-d."""
    pairs = groups.new_zeros(num_conditions * num_groups)
    pairs.scatter_add_(0, conditions * num_groups + groups, torch.ones_like(groups))
    return pairs.view(num_conditions, num_groups).max(1).values.sum() / len(groups)
