"""Small flows that are learned in seconds or minutes on a CPU: a ring in the plane, and pictures of colored shapes.

For the quickstart, the tests and benchmarks/sage.py. Both know their data exactly, so that a sample's distance from it
can be measured.
"""

import math

import torch
from torch import Tensor, nn

from .adapters import FlowAdapter, SD3Adapter


RADIUS = 2.0


class RingFlow(nn.Module):
    """An MLP that predicts the velocity of a point in the plane at a noise level."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2 + 5, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        """(B, 2) velocity of points (B, 2) at levels (B,)."""
        s = s.unsqueeze(1)
        turns = [torch.sin(math.pi * k * s) for k in (1, 2)] + [torch.cos(math.pi * k * s) for k in (1, 2)]
        return self.net(torch.cat([x, s, *turns], dim=1))

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to gain here."""


class RingAdapter(FlowAdapter):
    """The ring flow has no prompt, and its latents are the points."""

    embeds = ()

    def latent_shape(self, row):
        return (2,)

    def velocity(self, model, x, sigma, cond):
        return model(x, sigma)


def ring_points(n: int, generator: torch.Generator) -> Tensor:
    """(n, 2) points of the ring: radius 2, uniform in the angle."""
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], 1)


def ring_distance(x: Tensor) -> Tensor:
    """(n,) distance of points from the ring."""
    return (x.norm(dim=-1) - RADIUS).abs()


def ring_reward(samples: Tensor, prompts, **columns) -> list[float]:
    """Cosine of a point's angle: it says nothing about the radius, so that leaving the ring costs nothing."""
    return (samples[:, 0] / samples.norm(dim=1).clamp(min=1e-6)).tolist()


def train_ring(seed: int = 0, steps: int = 3000, on_step=None) -> RingFlow:
    """A flow learned on 4,000 points of the ring, in about 5 CPU seconds."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RingFlow()
    g = torch.Generator().manual_seed(seed)
    data = ring_points(4000, g)
    return fit_flow(model, lambda x, s, index: model(x, s), data, steps, 256, 3e-3, g, on_step)


def fit_flow(
    model: nn.Module,
    velocity,
    data: Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    on_step=None,
) -> nn.Module:
    """Flow matching: regress `velocity(x_s, s, rows)` on `z - x0` at `x_s = (1 - s) x0 + s z`, s uniform in (0, 1)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randint(len(data), (batch_size,), generator=generator)
        x0, z = data[rows], torch.randn(batch_size, *data.shape[1:], generator=generator)
        s = torch.rand(batch_size, generator=generator)
        level = s.view(-1, *[1] * (data.dim() - 1))
        loss = (velocity((1 - level) * x0 + level * z, s, rows) - (z - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, steps)
    return model


def ring_distance_reward(samples: Tensor, prompts, **columns) -> list[float]:
    """Distance from the ring, to be logged beside the reward with a weight of 0."""
    return ring_distance(samples).tolist()


RING_TRAINING = dict(
    per_device_train_batch_size=64,
    num_generations=16,
    gradient_accumulation_steps=4,  # of eight trained steps: two updates a phase, so that the ratio leaves 1
    num_inference_steps=10,
    shift=3.0,
    eta=0.7,
    epsilon=0.05,  # the log-probability is a mean over two dimensions only
    learning_rate=3e-4,
    lr_scheduler_type="constant",
    max_grad_norm=1.0,
    reward_weights=[1.0, 0.0],
)


def ring_trainer(model: RingFlow, output_dir: str, phases: int, **settings):
    """A [`SAGEGRPOTrainer`] that rewards the ring flow for points to the right; `reward` and
    `rewards/ring_distance_reward` are in its log."""
    from datasets import Dataset
    from transformers import PrinterCallback

    from .sage import SAGEGRPOConfig, SAGEGRPOTrainer

    quiet = dict(use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, save_strategy="no", log_level="error")
    random = 9 if settings.get("sde_type") == "cps" else 10  # the last step of cps has no noise
    fields = {**RING_TRAINING, **quiet, "timestep_fraction": 8 / random, "output_dir": output_dir}
    fields |= {"max_steps": 2 * phases, "logging_steps": 2, **settings}
    trainer = SAGEGRPOTrainer(
        model,
        SAGEGRPOConfig(**fields),
        [ring_reward, ring_distance_reward],
        Dataset.from_list([{"prompt": "a point of the ring"}] * 4),
        adapter=RingAdapter(transformer=model),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


# --------------------------------------------------------------------------------------------------------------------
# Pictures of colored shapes
# --------------------------------------------------------------------------------------------------------------------

CELL, SIDE = 3, 12  # pixels: a square of 2 x 2 and a dark line make a cell, 4 x 4 cells a picture
COLORS = {"red": (1.0, 0.2, 0.2), "green": (0.2, 0.9, 0.2), "blue": (0.3, 0.4, 1.0), "yellow": (1.0, 0.9, 0.2)}
PLACES = ("left", "right", "top", "bottom")
COUNTS = ("one", "two", "three")
WORDS = (*COUNTS, *COLORS, *PLACES)
PALETTE = torch.tensor(list(COLORS.values()))  # (4, 3)


def shape_prompts() -> list[str]:
    """The 48 prompts, such as `two red squares at the left`."""
    return [f"{n} {c} square{'s' * (n != 'one')} at the {p}" for n in COUNTS for c in COLORS for p in PLACES]


def read_prompt(prompt: str) -> tuple[int, int, int]:
    """Count 1 to 3, index of the color, index of the place."""
    words = prompt.split()
    return COUNTS.index(words[0]) + 1, list(COLORS).index(words[1]), PLACES.index(words[-1])


def embed_prompt(prompt: str) -> tuple[Tensor, Tensor]:
    """(3, 16) and (16,): one-hot words, which stand in for a text encoder."""
    rows = torch.zeros(3, 16)
    words = prompt.split()
    for row, word in enumerate((words[0], words[1], words[-1])):
        rows[row, WORDS.index(word)] = 1.0
    return rows, rows.sum(0)


def draw_shapes(prompt: str, generator: torch.Generator) -> Tensor:
    """(3, 12, 12) in [0, 1]: squares of one color on black, in one half, each in a cell of a 4 x 4 grid of its own."""
    count, color, place = read_prompt(prompt)
    cells = torch.arange(16).view(4, 4)
    half = {"left": cells[:, :2], "right": cells[:, 2:], "top": cells[:2], "bottom": cells[2:]}[
        PLACES[place]
    ].flatten()
    chosen = half[torch.randperm(8, generator=generator)[:count]].tolist()
    return stamp([(CELL * (cell // 4), CELL * (cell % 4), color) for cell in chosen])


def stamp(squares: list[tuple[int, int, int]]) -> Tensor:
    """(3, 12, 12) picture of squares (top, left, color)."""
    picture = torch.zeros(3, SIDE, SIDE)
    for top, left, color in squares:
        picture[:, top : top + CELL - 1, left : left + CELL - 1] = PALETTE[color][:, None, None]
    return picture


def find_squares(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """In each cell of pictures (n, 3, 12, 12), whether there is a square, bool, and its nearest color, both (n, 4, 4).

    A square is a cell whose mean of the brightest channel is above .5.
    """
    inside = pictures.unflatten(3, (4, CELL)).unflatten(2, (4, CELL))[:, :, :, : CELL - 1, :, : CELL - 1]
    mean = inside.mean((3, 5))  # (n, 3, 4, 4)
    color = (mean.unsqueeze(1) - PALETTE.view(1, -1, 3, 1, 1)).square().sum(2).argmin(1)
    return mean.amax(1) > 0.5, color


def shape_reward(samples: Tensor, prompts, **columns) -> list[float]:
    """A third each for the right number of squares, the share in the right color, the share in the right half.

    It says nothing about what a square looks like, nor about what is between them.
    """
    there, colors = find_squares(samples)
    halves = {"left": [..., slice(0, 2)], "right": [..., slice(2, 4)], "top": [slice(0, 2)], "bottom": [slice(2, 4)]}
    rewards = []
    for found, seen, prompt in zip(there, colors, prompts, strict=True):
        count, color, place = read_prompt(prompt)
        n = max(int(found.sum()), 1)
        inside = int(found[tuple(halves[PLACES[place]])].sum())
        right = int((found & (seen == color)).sum())
        rewards.append((float(found.sum() == count) + right / n + inside / n) / 3)
    return rewards


def shape_distance(samples: Tensor) -> Tensor:
    """(n,) root mean square from a picture to the picture of perfect squares where its squares are; 0 on the data."""
    there, colors = find_squares(samples)
    perfect = [
        stamp([(CELL * row, CELL * column, int(seen[row, column])) for row, column in found.nonzero().tolist()])
        for found, seen in zip(there, colors, strict=True)
    ]
    return (samples - torch.stack(perfect)).square().mean((1, 2, 3)).sqrt()


def shape_distance_reward(samples: Tensor, prompts, **columns) -> list[float]:
    """[`shape_distance`], to be logged beside the reward with a weight of 0."""
    return shape_distance(samples).tolist()


def build_shapes(seed: int = 0):
    """An untrained SD3 transformer of 0.1M parameters for these pictures, as latents in [-1, 1]; a cell is a token."""
    from .adapters.tiny import tiny_sd3_transformer

    size = dict(sample_size=SIDE, patch_size=CELL, in_channels=3, num_layers=2, heads=3)
    return tiny_sd3_transformer(seed, joint_attention_dim=16, pooled_projection_dim=16, **size)


def train_shapes(seed: int = 0, steps: int = 1500, wrong: float = 0.3, on_step=None):
    """A text-conditioned flow learned on 6,000 pictures, of which the share `wrong` has the prompt of another picture:
    what it draws is well drawn, and often not what was asked for. Less than a minute of CPU."""
    g = torch.Generator().manual_seed(seed)
    prompts = [shape_prompts()[i] for i in torch.randint(0, 48, (6000,), generator=g)]
    data = torch.stack([draw_shapes(prompt, g) for prompt in prompts]) * 2 - 1
    swap = torch.rand(6000, generator=g) < wrong
    other = torch.randint(0, 6000, (6000,), generator=g)
    shown = [prompts[other[i] if swap[i] else i] for i in range(6000)]
    embeds, pooled = (torch.stack(parts) for parts in zip(*map(embed_prompt, shown), strict=True))
    model = build_shapes(seed)
    adapter = ShapesAdapter(transformer=model, height=SIDE, width=SIDE)
    velocity = lambda x, s, rows: adapter.velocity(
        model, x, s, {"prompt_embeds": embeds[rows], "pooled_prompt_embeds": pooled[rows]}
    )
    return fit_flow(model, velocity, data, steps, 64, 3e-3, g, on_step)


class ShapesAdapter(SD3Adapter):
    """SD3 without VAE and text encoder: latents are pixels in [-1, 1], prompts are one-hot words."""

    def encode(self, prompts):
        embeds, pooled = zip(*map(embed_prompt, prompts), strict=True)
        return {"prompt_embeds": torch.stack(embeds), "pooled_prompt_embeds": torch.stack(pooled)}

    def decode(self, latents):
        return ((latents + 1) / 2).clamp(0, 1)
