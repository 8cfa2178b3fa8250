"""Pictures: every named point is inside, no two labels overlap, and nothing but premises is marked."""

import itertools
import json
import math

import pytest
from datasets import load_dataset

from trl_trust import cli
from trl_trust.tasks.geometry import draw_picture, geometry_dataset, parse_fact
from trl_trust.tasks.geometry.data import Settings, rows
from trl_trust.tasks.geometry.facts import Fact
from trl_trust.tasks.geometry.picture import circles, equal_lengths, labels, places, segments


@pytest.fixture(scope="module")
def table():
    settings = Settings(kinds=("angle", "length", "area"), min_steps=1, min_premise_ratio=0.3)
    return list(rows(25, 11, settings))


def figure(row):
    return {name: tuple(place) for name, place in json.loads(row["points"]).items()}


def test_every_point_is_in_the_frame_and_no_labels_overlap(table):
    for row in table:
        points, facts = figure(row), [parse_fact(fact) for fact in row["premises"]]
        at = places(points, 1000)
        assert all(0 < x < 1000 and 0 < y < 1000 for x, y in at.values())
        p, q, r = list(points)[:3]  # one scale, whatever the direction
        scale = math.dist(at[p], at[q]) / math.dist(points[p], points[q])
        assert math.dist(at[p], at[r]) == pytest.approx(scale * math.dist(points[p], points[r]))
        boxes = labels(at, segments(facts, at), 1000)
        assert set(boxes) == set(points)
        for a, b in itertools.combinations(boxes.values(), 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert all(min(box) >= 0 and max(box) <= 1000 for box in boxes.values())
        for x, y in at.values():
            assert not any(a[0] <= x <= a[2] and a[1] <= y <= a[3] for a in boxes.values())
        for name in set("".join(row["premises"]).replace("=", " ").split()) & set(points):
            assert name in boxes


def test_ink_lies_where_the_points_are(table):
    row = table[0]
    points, facts = figure(row), [parse_fact(fact) for fact in row["premises"]]
    drawn = draw_picture(points, facts, parse_fact(row["goal"]), 336)
    assert drawn.size == (336, 336)
    for x, y in places(points, 336).values():
        assert max(drawn.getpixel((round(x), round(y)))) < 120
    assert draw_picture(points, facts, parse_fact(row["goal"])).tobytes() == drawn.tobytes()


def test_marks_stand_for_premises_alone():
    points = {"A": (0.0, 0.0), "B": (4.0, 0.0), "C": (0.0, 3.0)}
    square = Fact.of("perp", "ABAC")
    marked = draw_picture(points, [square], None).tobytes()
    assert marked != draw_picture(points, [], None).tobytes()
    assert draw_picture(points, [], square).tobytes() == draw_picture(points, [], None).tobytes()


def test_equal_lengths_are_classes():
    pairs = [Fact.of("cong", "ABCD"), Fact.of("cong", "EFGH"), Fact.of("cong", "CDIJ")]
    first, second = equal_lengths(pairs)
    assert set(first) == {("A", "B"), ("C", "D"), ("I", "J")} and set(second) == {("E", "F"), ("G", "H")}
    (joined,) = equal_lengths([*pairs, Fact.of("cong", "ABEF")])
    assert len(joined) == 5


def test_a_circle_goes_through_its_points():
    at = {"A": (0.0, 5.0), "B": (5.0, 0.0), "C": (10.0, 5.0), "D": (5.0, 10.0)}
    ((left, top, right, bottom),) = circles([Fact.of("cyclic", "ABCD")], at)
    assert (left, top, right, bottom) == pytest.approx((0, 0, 10, 10))


def test_bad_sizes_and_crowded_points_are_named():
    with pytest.raises(ValueError, match="image_size=16"):
        draw_picture({"A": (0.0, 0.0), "B": (1.0, 0.0), "C": (0.0, 1.0)}, size=16)
    with pytest.raises(ValueError, match="images=True: with style='prose' only"):
        Settings(images=True, style="terse")


def test_a_data_set_with_pictures_and_its_files(tmp_path, capsys):
    made = geometry_dataset(n=2, seed=3, images=True, image_size=96, min_steps=1, min_premise_ratio=0.3)
    assert made[0]["image"].size == (96, 96)
    words = ["--n", "2", "--seed", "3", "--images", "--set", "image_size=96", "min_steps=1", "min_premise_ratio=0.3"]
    assert cli.main(["geometry", "build", "--out", str(tmp_path / "data"), *words], launch=False) == 0
    read = load_dataset("parquet", data_files=str(tmp_path / "data" / "part-*.parquet"), split="train")
    assert [row["image"].tobytes() for row in read] == [row["image"].tobytes() for row in made]
    assert read["prompt"] == made["prompt"]
    assert cli.main(["geometry", "verify", str(tmp_path / "data")], launch=False) == 0
    assert cli.main(["geometry", "show", "3", "--picture", str(tmp_path / "figure.png")], launch=False) == 0
    assert (tmp_path / "figure.png").stat().st_size > 500
