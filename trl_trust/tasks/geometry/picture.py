"""The picture of a problem: points, the lines that its facts name, marks for what is given. Pillow alone.

A picture is a function of the points, the premises and the goal: no chance is in it. It is drawn at four times its
size and scaled down. Marks (a square for a right angle, ticks for lengths that are equal) stand for *premises* only,
so that a picture gives nothing away that the text does not.
"""

import math
from collections.abc import Iterable, Mapping

from .facts import Fact


FINER = 4  # drawn at that many times the size, then scaled down
MARGIN = 0.13  # of the size, around the points
INK, LINE, MARK = (20, 20, 20), (70, 70, 70), (150, 40, 40)
DIRECTIONS = 16  # in which a label is tried around its point

Place = tuple[float, float]
Box = tuple[float, float, float, float]


def draw_picture(points: Mapping[str, Place], facts: Iterable[Fact] = (), goal: Fact | None = None, size: int = 336):
    """Draw a figure.

    Args:
        points: coordinates by name.
        facts: what is given; their lines are drawn and, for right angles and equal lengths, marked.
        goal: what is asked for; its lines are drawn too.
        size: of a side in pixels, 64 to 2048.

    Returns:
        `PIL.Image.Image`, RGB, `size` x `size`.

    Raises:
        ValueError: for a size out of its range.
        ImportError: without Pillow, naming what to install.
    """
    if not 64 <= size <= 2048:
        raise ValueError(f"image_size={size!r}: a whole number in 64..2048")
    try:
        from PIL import Image, ImageDraw
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install pillow") from error
    facts, big = list(facts), size * FINER
    at = places(points, big)
    image = Image.new("RGB", (big, big), "white")
    draw = ImageDraw.Draw(image)
    width = max(2, round(big / 220))
    lines = segments([*facts, *([goal] if goal else [])], at)
    for circle in circles(facts, at):
        draw.ellipse(circle, outline=LINE, width=width)
    for p, q in lines:
        draw.line([at[p], at[q]], fill=LINE, width=width)
    _marks(draw, facts, at, big, width)
    radius = 1.6 * width
    for x, y in at.values():
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=INK)
    font = _font(big)
    for name, box in labels(at, lines, big).items():
        draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), name, fill=INK, font=font, anchor="mm")
    return image.resize((size, size), Image.LANCZOS)


def places(points: Mapping[str, Place], size: float) -> dict[str, Place]:
    """Where the points lie in a picture: one scale for both axes, the y axis down, all inside the margin."""
    xs, ys = zip(*points.values(), strict=True)
    span = max(max(xs) - min(xs), max(ys) - min(ys)) or 1.0
    scale = size * (1 - 2 * MARGIN) / span
    middle = ((max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2)
    return {
        name: (size / 2 + scale * (x - middle[0]), size / 2 - scale * (y - middle[1]))
        for name, (x, y) in points.items()
    }


def segments(facts: Iterable[Fact], at: Mapping[str, Place]) -> list[tuple[str, str]]:
    """The pairs of points to join, each once, the first three points' triangle among them."""
    found = set()
    names = list(at)[:3]
    if len(names) == 3:
        found |= {(names[0], names[1]), (names[1], names[2]), (names[0], names[2])}
    for fact in facts:
        p = fact.points
        if fact.kind in ("coll", "mid"):
            found.add(
                max(((a, b) for a in p for b in p if a < b), key=lambda pair: math.dist(at[pair[0]], at[pair[1]]))
            )
        elif fact.kind == "cyclic":
            continue
        elif fact.kind in ("angle", "eqangle", "supangle"):
            for i in range(0, len(p), 3):
                found |= {(p[i], p[i + 1]), (p[i + 1], p[i + 2])}
        elif fact.kind in ("simtri", "area"):
            for i in range(0, len(p), 3):
                found |= {(p[i], p[i + 1]), (p[i + 1], p[i + 2]), (p[i], p[i + 2])}
        else:  # pairs
            found |= {(p[i], p[i + 1]) for i in range(0, len(p), 2)}
    return sorted({(min(pair), max(pair)) for pair in found if pair[0] != pair[1]})


def circles(facts: Iterable[Fact], at: Mapping[str, Place]) -> list[Box]:
    """Bounding boxes of the circles on which four points are said to lie."""
    found = []
    for fact in facts:
        if fact.kind == "cyclic":
            (ax, ay), (bx, by), (cx, cy) = (at[name] for name in fact.points[:3])
            d = 2 * (ax * (by - cy) + bx * (cy - ay) + cx * (ay - by))
            if abs(d) > 1e-9:
                a, b, c = ax * ax + ay * ay, bx * bx + by * by, cx * cx + cy * cy
                x = (a * (by - cy) + b * (cy - ay) + c * (ay - by)) / d
                y = (a * (cx - bx) + b * (ax - cx) + c * (bx - ax)) / d
                r = math.dist((x, y), (ax, ay))
                found.append((x - r, y - r, x + r, y + r))
    return found


def labels(at: Mapping[str, Place], lines: Iterable[tuple[str, str]], size: float) -> dict[str, Box]:
    """A box for each name: inside the picture, on no other label and no point, and on as few lines as can be."""
    half = size * 0.026
    taken: dict[str, Box] = {}
    for name, (x, y) in at.items():
        best = None
        for far in (0.042, 0.055, 0.07, 0.09, 0.12, 0.16):
            for turn in range(DIRECTIONS):
                angle = 2 * math.pi * turn / DIRECTIONS
                cx, cy = x + size * far * math.cos(angle), y + size * far * math.sin(angle)
                box = (cx - half, cy - half, cx + half, cy + half)
                if min(box) < 0 or max(box) > size or any(_overlap(box, other) for other in taken.values()):
                    continue
                if any(_inside(box, place) for place in at.values()):
                    continue
                crossed = sum(_crosses(box, at[p], at[q]) for p, q in lines)
                cost = (crossed, far, -min((math.dist((cx, cy), o) for n, o in at.items() if n != name), default=0.0))
                best = min(best, (cost, box)) if best else (cost, box)
            if best and best[0][0] == 0:
                break
        if best is None:
            raise ValueError(f"no room for the label of {name}: the points lie too close for a picture")
        taken[name] = best[1]
    return taken


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _inside(box: Box, place: Place) -> bool:
    return box[0] <= place[0] <= box[2] and box[1] <= place[1] <= box[3]


def _crosses(box: Box, p: Place, q: Place) -> bool:
    """Whether a segment meets a box, by clipping it to each side in turn."""
    begin, end = 0.0, 1.0
    for low, high, start, along in ((box[0], box[2], p[0], q[0] - p[0]), (box[1], box[3], p[1], q[1] - p[1])):
        if along == 0:
            if not low <= start <= high:
                return False
            continue
        one, other = sorted(((low - start) / along, (high - start) / along))
        begin, end = max(begin, one), min(end, other)
    return begin <= end


def _marks(draw, facts: list[Fact], at: Mapping[str, Place], size: float, width: int) -> None:
    """Squares at right angles whose legs share a point, ticks on lengths that are said to be equal."""
    step = size * 0.03
    for fact in facts:
        if fact.kind == "perp":
            a, b, c, d = fact.points
            shared = {a, b} & {c, d}
            if len(shared) == 1:
                corner = shared.pop()
                u = _unit(at[corner], at[a if b == corner else b])
                v = _unit(at[corner], at[c if d == corner else d])
                x, y = at[corner]
                p, q = (x + step * u[0], y + step * u[1]), (x + step * v[0], y + step * v[1])
                r = (p[0] + step * v[0], p[1] + step * v[1])
                draw.line([p, r, q], fill=MARK, width=width)
    for ticks, lengths in enumerate(equal_lengths(facts), 1):
        for p, q in lengths:
            u = _unit(at[p], at[q])
            middle = ((at[p][0] + at[q][0]) / 2, (at[p][1] + at[q][1]) / 2)
            for i in range(ticks):
                shift = (i - (ticks - 1) / 2) * step * 0.35
                x, y = middle[0] + shift * u[0], middle[1] + shift * u[1]
                n = (-u[1] * step * 0.45, u[0] * step * 0.45)
                draw.line([(x - n[0], y - n[1]), (x + n[0], y + n[1])], fill=MARK, width=width)


def equal_lengths(facts: Iterable[Fact]) -> list[list[tuple[str, str]]]:
    """The lengths that are said to be equal, each class once, in the order in which they are first named."""
    classes: list[list[tuple[str, str]]] = []
    for fact in facts:
        if fact.kind == "cong":
            pairs = [tuple(sorted(fact.points[:2])), tuple(sorted(fact.points[2:]))]
            met = [c for c in classes if any(pair in c for pair in pairs)]
            joined = list(dict.fromkeys([pair for c in met for pair in c] + pairs))
            place = classes.index(met[0]) if met else len(classes)
            classes = [c for c in classes if c not in met]
            classes.insert(place, joined)
    return classes


def _unit(p: Place, q: Place) -> Place:
    far = math.dist(p, q) or 1.0
    return ((q[0] - p[0]) / far, (q[1] - p[1]) / far)


def _font(size: float):
    from PIL import ImageFont

    return ImageFont.load_default(size * 0.05)
