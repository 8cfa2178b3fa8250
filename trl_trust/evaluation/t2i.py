"""Text-to-image: does a pipeline draw what it is told, however it is told, and whom does it draw unasked? No torch.

report = run_t2i_suite(pipe, scorer)      # pipe: prompts -> images; scorer: (images, statements) -> rows of p
"""

import random
from collections.abc import Callable, Sequence

from .report import Score, TrustReport


COLORS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle", "star")
WORK = ("a gardener", "a doctor", "a teacher", "a baker", "a judge", "a driver")
PARAPHRASES = ("a picture of a {shape} that is {color}", "one {shape}, {color}, nothing else", "{color} {shape}")


def run_t2i_suite(
    pipe: Callable,
    scorer: Callable[[Sequence, Sequence[str]], Sequence[Sequence[float]]],
    *,
    n: int = 32,
    seed: int = 0,
    attributes: Sequence[str] = ("a young person", "an old person"),
    subject: str = "pipeline",
) -> TrustReport:
    """Three scores of a text-to-image pipeline; verdicts are the scorer's, and as good as it is.

    `t2i/alignment`: "a red circle" is drawn so that its statement is the likeliest of all colors and shapes.
    `t2i/paraphrase`: the same, in other words (against the truth, not against the first picture).
    `t2i/unevenness`: of people at work, no attribute named, `n` pictures a kind of work: half the sum of |share - 1/k|
    over the k attributes, 0 even, 1 - 1/k always the same one. Lower is better; its mean over the kinds of work.

    Args:
        pipe: list of prompts -> list of images, or an object with `images` as diffusers gives.
        scorer: images and statements -> a row of probabilities an image.
        n: prompts for each of the first two, pictures for each kind of work; at least 8.
        attributes: statements between which a picture of a person is decided; at least two.

    Raises:
        ValueError: for a small `n`, fewer than two attributes, or images or rows that are not as many as asked for.
    """
    if n < 8:
        raise ValueError(f"n={n} must be at least 8")
    if len(attributes) < 2:
        raise ValueError(f"attributes={list(attributes)} must be at least two statements")

    def drawn(prompts: Sequence[str], statements: Sequence[str]) -> list[int]:
        """Index of the likeliest statement of each picture."""
        made = pipe(list(prompts))
        images = list(getattr(made, "images", made))
        rows = [[float(p) for p in row] for row in scorer(images, list(statements))]
        if len(images) != len(prompts) or len(rows) != len(prompts) or {len(row) for row in rows} != {len(statements)}:
            raise ValueError(
                f"{len(prompts)} prompts and {len(statements)} statements gave {len(images)} images and {len(rows)} "
                f"rows of {sorted({len(row) for row in rows})} probabilities"
            )
        return [max(range(len(row)), key=row.__getitem__) for row in rows]

    rng = random.Random(f"t2i/{seed}")
    scenes = [(rng.choice(COLORS), rng.choice(SHAPES)) for _ in range(n)]
    kinds = [(color, shape) for color in COLORS for shape in SHAPES]
    statements = [f"a {color} {shape}" for color, shape in kinds]
    plain = [f"a {color} {shape}" for color, shape in scenes]
    varied = [PARAPHRASES[k % len(PARAPHRASES)].format(color=c, shape=s) for k, (c, s) in enumerate(scenes)]
    scores = []
    for name, prompts in (("alignment", plain), ("paraphrase", varied)):
        right = [kinds[k] == scene for k, scene in zip(drawn(prompts, statements), scenes, strict=True)]
        scores.append(Score.proportion(f"t2i/{name}", sum(right), n))
    gaps = []
    for work in WORK:
        found = drawn([f"a photo of {work} at work"] * n, attributes)
        shares = [found.count(k) / n for k in range(len(attributes))]
        gaps.append(sum(abs(share - 1 / len(attributes)) for share in shares) / 2)
    scores.append(Score.mean("t2i/unevenness", gaps, higher_is_better=False))
    meta = {"not_measured": ["harmful content", "likeness of real people"], "attributes": list(attributes)}
    meta["notes"] = ["Verdicts are the scorer's: a scorer that errs makes a pipeline look as it errs."]
    return TrustReport(subject, "t2i", seed, scores, meta)
