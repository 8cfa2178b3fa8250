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

SIDE = 16
COLORS = {"red": (1.0, 0.2, 0.2), "green": (0.2, 0.9, 0.2), "blue": (0.3, 0.4, 1.0), "yellow": (1.0, 0.9, 0.2)}
PLACES = ("left", "right", "top", "bottom")
COUNTS = ("one", "two", "three")
WORDS = (*COUNTS, *COLORS, *PLACES)
PALETTE = torch.tensor(list(COLORS.values()))  # (4, 3)
DISC = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 0]]).bool()  # 12 pixels


def shape_prompts() -> list[str]:
    """The 48 prompts, such as `two red discs at the left`."""
    return [f"{n} {c} {'disc' if n == 'one' else 'discs'} at the {p}" for n in COUNTS for c in COLORS for p in PLACES]


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
    """(3, 16, 16) in [0, 1]: discs of one color on black, in one half, at even rows and columns, that do not touch."""
    count, color, place = read_prompt(prompt)
    corners: list[tuple[int, int]] = []
    while len(corners) < count:
        top, left = (2 * torch.randint(0, SIDE // 2 - 1, (2,), generator=generator)).tolist()
        half = SIDE // 2 - 4  # a disc lies in one half as a whole
        inside = {"left": left <= half, "right": left >= SIDE // 2, "top": top <= half, "bottom": top >= SIDE // 2}
        free = all(abs(top - t) > 4 or abs(left - x) > 4 for t, x in corners)
        if inside[PLACES[place]] and free:
            corners.append((top, left))
        elif len(corners) and not torch.randint(0, 50, (1,), generator=generator):
            corners = []  # a first disc may leave no room
    return stamp([(top, left, color) for top, left in corners])


def stamp(discs: list[tuple[int, int, int]]) -> Tensor:
    """(3, 16, 16) picture of discs (top, left, color)."""
    picture = torch.zeros(3, SIDE, SIDE)
    for top, left, color in discs:
        window = picture[:, top : top + 4, left : left + 4]
        window[:, DISC] = PALETTE[color][:, None]
    return picture


def find_objects(pictures: Tensor) -> list[list[tuple[float, float, int]]]:
    """For each picture (n, 3, 16, 16) its objects: row and column of the center, and the nearest color.

    An object is a connected set of at least 5 bright pixels.
    """
    bright = pictures.amax(1) > 0.5  # (n, 16, 16)
    label = torch.arange(1, SIDE * SIDE + 1).view(1, SIDE, SIDE) * bright
    while True:  # the highest label of a connected set spreads over it
        wide = torch.nn.functional.pad(label, (1, 1, 1, 1))
        beside = torch.stack([wide[:, :-2, 1:-1], wide[:, 2:, 1:-1], wide[:, 1:-1, :-2], wide[:, 1:-1, 2:], label])
        spread = beside.amax(0) * bright
        if torch.equal(spread, label):
            break
        label = spread
    found = []
    for picture, labels in zip(pictures, label, strict=True):
        objects = []
        for one in labels.unique().tolist():
            where = (labels == one).nonzero()
            if one and len(where) >= 5:
                color = picture[:, where[:, 0], where[:, 1]].mean(1)
                row, column = where.float().mean(0).tolist()
                objects.append((row, column, int((PALETTE - color).square().sum(1).argmin())))
        found.append(objects)
    return found


def shape_reward(samples: Tensor, prompts, **columns) -> list[float]:
    """A third each for the right number of objects, the share in the right color, the share in the right half.

    It says nothing about what an object looks like.
    """
    middle, rewards = (SIDE - 1) / 2, []
    for objects, prompt in zip(find_objects(samples), prompts, strict=True):
        count, color, place = read_prompt(prompt)
        inside = {
            "left": lambda r, c: c < middle, "right": lambda r, c: c > middle,
            "top": lambda r, c: r < middle, "bottom": lambda r, c: r > middle,
        }[PLACES[place]]  # fmt: skip
        share = lambda hits, objects=objects: sum(hits) / max(len(objects), 1)
        rewards.append(
            (
                float(len(objects) == count)
                + share([seen == color for _, _, seen in objects])
                + share([inside(r, c) for r, c, _ in objects])
            )
            / 3
        )
    return rewards


def shape_distance(samples: Tensor) -> Tensor:
    """(n,) root mean square from a picture to the picture of perfect discs where its objects are; 0 on the data."""
    perfect = []
    for objects in find_objects(samples):
        corner = lambda x: min(max(2 * round((x - 1.5) / 2), 0), SIDE - 4)
        perfect.append(stamp([(corner(row), corner(column), color) for row, column, color in objects]))
    return (samples - torch.stack(perfect)).square().mean((1, 2, 3)).sqrt()


def shape_distance_reward(samples: Tensor, prompts, **columns) -> list[float]:
    """[`shape_distance`], to be logged beside the reward with a weight of 0."""
    return shape_distance(samples).tolist()


def build_shapes(seed: int = 0):
    """An untrained SD3 transformer of 0.1M parameters for these pictures, as latents in [-1, 1]."""
    from .adapters.tiny import tiny_sd3_transformer

    return tiny_sd3_transformer(
        seed, sample_size=SIDE, in_channels=3, joint_attention_dim=16, pooled_projection_dim=16, num_layers=2, heads=3
    )


def train_shapes(seed: int = 0, steps: int = 4000, wrong: float = 0.35, on_step=None):
    """A text-conditioned flow learned on 6,000 pictures, of which the share `wrong` has the prompt of another picture:
    what it draws is well drawn, and often not what was asked for. Some minutes on a CPU."""
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
