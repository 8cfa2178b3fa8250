"""Puzzles, demonstrator and reward of the sudoku task."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.tasks import get_task
from trl_trust.tasks.sudoku import EMPTY, HELD_OUT, UNITS, draw, fill, graded_reward, grids, problems


SOLVED = "1234341221434321"


def test_there_are_288_grids_of_twelve_units():
    assert len(set(grids())) == 288
    assert SOLVED in grids()
    assert len(set(map(frozenset, UNITS))) == 12
    assert all(sum(cell in unit for unit in UNITS) == 3 for cell in range(16))


@given(st.integers(0, 10**6), st.sampled_from(["train", "test"]))
def test_a_puzzle_has_its_empty_cells_and_a_grid_that_solves_it(seed, split):
    puzzle, grid = draw(random.Random(seed), split)
    assert puzzle.count(".") == EMPTY
    assert graded_reward([grid], [puzzle]) == [1.0]


def test_held_out_puzzles_are_never_trained_on():
    test = problems("test")
    assert test.column_names == ["prompt", "puzzle"]
    assert len(set(test["puzzle"])) == HELD_OUT
    assert not set(test["puzzle"]) & set(problems("train", 2000)["puzzle"])
    assert set(test["puzzle"]) == set(problems("test", seed=1)["puzzle"])
    assert list(problems("train", 5)["puzzle"]) == list(problems("train", 9)["puzzle"])[:5]
    assert list(problems("train", 5)["puzzle"]) != list(problems("train", 5, seed=1)["puzzle"])
    with pytest.raises(ValueError, match="split='dev' does not exist; use 'train' or 'test'"):
        problems("dev")
    with pytest.raises(ValueError, match="n=257 is out of range; the test split has 256 puzzles"):
        problems("test", 257)


def test_the_reward_is_the_fraction_of_units_of_a_grid_that_keeps_what_was_given():
    puzzle = "12.43412214.4321"
    wrong = "12143412214" + "14321"  # cell 2: row, column and box of it; cell 11: likewise
    assert graded_reward([SOLVED, wrong], [puzzle, puzzle]) == [1.0, 6 / 12]
    changed, short, letters = "2143432112343412", SOLVED[:-1], SOLVED.replace("3", "x")
    assert graded_reward([changed, short, letters, SOLVED + "1"], [puzzle] * 4) == [0.0] * 4
    assert graded_reward([[{"role": "assistant", "content": SOLVED}]], [puzzle], prompts=[""]) == [1.0]
    with pytest.raises(ValueError):
        graded_reward([SOLVED], [puzzle, puzzle])


def test_the_demonstrator_keeps_what_is_given_and_errs_as_asked():
    rng = random.Random(0)
    puzzles = [draw(rng)[0] for _ in range(2000)]

    def solved(**mistakes):
        grids = [fill(puzzle, rng, **mistakes) for puzzle in puzzles]
        assert all(
            a in ("." + b) for p, grid in zip(puzzles, grids, strict=True) for a, b in zip(p, grid, strict=True)
        )
        rewards = graded_reward(grids, puzzles)
        return sum(r == 1 for r in rewards) / len(puzzles)

    careful, forgetful, default = solved(drop_box=0.0, slip=0.0), solved(drop_box=1.0, slip=0.0), solved()
    assert careful > forgetful + 0.03 > default + 0.03
    assert solved(slip=1.0) < 0.05
    # one cell of which row and column allow two digits and the box one
    puzzle, right = "1.343.12.1.3.3.1", 2
    assert {fill(puzzle, random.Random(i), drop_box=0.0, slip=0.0)[1] for i in range(9)} == {str(right)}


def test_ten_thousand_puzzles_a_second():
    rng, began = random.Random(0), time.process_time()
    for _ in range(2000):
        draw(rng)
    assert time.process_time() - began < 1.0  # a fifth of the promise: machines differ


def test_tasks_are_found_by_name():
    assert get_task("sudoku").name == "sudoku"
    assert get_task("addition").name == "addition"
    with pytest.raises(KeyError, match="unknown task 'sodoku'; known tasks: addition, sudoku"):
        get_task("sodoku")
