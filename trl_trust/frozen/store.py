"""Frozen rollouts on disk: written once, a part at a time, and read by many runs.

    rollouts/settings.json         what they were made with; a second run with other settings is refused
    rollouts/part-00000.parquet    the responses to a few prompts, one row a response
    rollouts/teacher-00000.parquet log-probabilities of part 0 under a policy called `teacher`

A part is written whole or not at all. It depends on its number, and on the settings, the prompts and the model, which
settings.json tells apart: an interrupted run goes on where it stopped, and several processes, which take the parts in
turns, write what one would. Nothing is communicated, and all processes see one file system.
"""

import glob
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, concatenate_datasets
from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


# What `prepare_rollouts` needs of a data set; `write_rollouts` also stores `prompt`, `completion` and `base_logps`.
COLUMNS = ("group", "prompt_ids", "completion_ids", "reward")


@contextmanager
def claimed(folder: str | os.PathLike, name: str, settings: Mapping[str, Any], made: Sequence[str]) -> Iterator[Path]:
    """Within it `folder/NAME.json` holds `settings`, see [`claim`], and no other run works under it.

    What tells them apart is a lock of the operating system, which ends with the process, however that ends.

    Raises:
        ValueError: on every process, if another run is at work there, or the folder was made with other settings.
    """
    state, folder = PartialState(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, free = FileLock(folder / f".{name}.lock"), [True]
    if state.is_main_process:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            free = [False]
    broadcast_object_list(free)
    if not free[0]:
        raise ValueError(f"{folder}: another run is at work there; wait until it has ended, or choose another folder.")
    try:
        yield claim(folder, name, settings, made)
    finally:
        lock.release()


def claim(folder: str | os.PathLike, name: str, settings: Mapping[str, Any], made: Sequence[str]) -> Path:
    """Write `settings` to `folder/NAME.json`, or check that they are the ones that stand there. Returns the folder.

    Args:
        made: patterns of what is made with them. Until there is such a file, other settings take their place: a slip
            that is found when the work begins must not stand in the way of the mended run.

    Raises:
        ValueError: on every process, if what the folder holds was made with other settings.
    """
    state, folder = PartialState(), Path(folder)
    path = folder / f"{name}.json"
    if state.is_main_process and not (path.exists() and any(any(folder.glob(x)) for x in made)):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(settings, indent=1))
        os.replace(scratch, path)
    state.wait_for_everyone()
    found, wanted = json.loads(path.read_text()), json.loads(json.dumps(settings))
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise ValueError(
                f"{key}={wanted.get(key)!r}, but {path} was written with {key}={found.get(key)!r}; "
                f"go on with those settings, or choose another folder."
            )
    return folder


def number_of_parts(settings: Mapping[str, Any]) -> int:
    return -(-settings["num_prompts"] // settings["prompts_per_part"])


def write_parts(folder: Path, name: str, count: int, build: Callable[[], Callable[[int], dict[str, list]]]) -> None:
    """Write the missing ones of `count` parts, this process every n-th; `build` is called only if one is missing."""
    state = PartialState()
    files = [folder / f"{name}-{part:05d}.parquet" for part in range(count)]
    missing = [part for part in range(state.process_index, count, state.num_processes) if not files[part].exists()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    bars = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not state.is_main_process)
    with bars as progress:
        done = lambda: sum(file.exists() for file in files)  # of all processes
        bar = progress.add_task(f"{folder.name}/{name}", total=count, completed=done(), note="")
        make = build() if missing else None
        for part in missing:
            table = make(part)
            scratch = files[part].with_suffix(".tmp")
            pq.write_table(pa.table(table), scratch)
            os.replace(scratch, files[part])  # atomic: a part is there as a whole or not at all
            scored = [reward for reward in table.get("reward", ()) if not np.isnan(reward)]
            progress.update(bar, completed=done(), note=f"reward {np.mean(scored):.2f}" if scored else "")
        while done() < count:  # not in a collective, which would time out where a part takes long
            time.sleep(0.2)
            progress.update(bar, completed=done())
        progress.update(bar, completed=count)


def as_rows(table: Mapping[str, Sequence]) -> list[dict[str, Any]]:
    """Columns to rows."""
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def max_id(table: pa.Table) -> int:
    """The largest token id in `prompt_ids` and `completion_ids`."""
    return max(pc.max(pc.list_flatten(table[name])).as_py() or 0 for name in ("prompt_ids", "completion_ids"))


def finished_parts(folder: str | os.PathLike, name: str) -> tuple[list[Path], dict[str, Any]]:
    """The files of `name` and the settings of the rollouts; `ValueError` unless every part is there."""
    folder = Path(folder)
    if not (folder / "settings.json").is_file():
        raise ValueError(f"{folder} holds no rollouts; write them with `trl-trust rollouts`.")
    settings = json.loads((folder / "settings.json").read_text())
    files = [folder / f"{name}-{part:05d}.parquet" for part in range(number_of_parts(settings))]
    missing = sum(not file.exists() for file in files)
    if missing:
        raise ValueError(
            f"{folder}: {missing} of {len(files)} files {name}-*.parquet are missing; run again to finish."
        )
    return files, settings


def load_rollouts(folder: str | os.PathLike) -> Dataset:
    """The rollouts in `folder` as one data set, a row a response, with the log-probabilities of every policy scored.

    Columns: `group` (number of the prompt), `prompt`, `completion`, `prompt_ids`, `completion_ids`, `reward` (NaN
    where unscored), `truncated`, `temperature` of sampling and log-probabilities, `base_logps`, and `NAME_logps` for
    each [`~trl_trust.frozen.logps.score_rollouts`]; one that has not written a part yet is passed over.

    Raises:
        ValueError: if there are none, or they are unfinished.
    """
    files, settings = finished_parts(folder, "part")
    names = sorted(path.stem for path in Path(folder).glob("*.json") if path.stem != "settings")
    names = [name for name in names if any(Path(folder).glob(f"{name}-*.parquet"))]
    tables = [files, *(finished_parts(folder, name)[0] for name in names)]
    # escaped, since datasets reads paths as patterns: a folder called `run[1]` would be `run1`
    columns = [Dataset.from_parquet([glob.escape(str(file)) for file in files]) for files in tables]
    data = concatenate_datasets(columns, axis=1)
    return data.add_column("temperature", [settings["temperature"]] * len(data))


def prepare_rollouts(dataset: Dataset) -> Dataset:
    """Drop what carries no signal and add the column `advantage`, the reward normalised within its group.

    Dropped are unscored and empty responses, and groups whose rewards are all equal. An advantage is
    `(R - mean) / (std + 1e-4)` with the unbiased standard deviation, as in `GRPOTrainer`.

    Args:
        dataset: the columns in [`COLUMNS`], and any number of `NAME_logps`.

    Raises:
        ValueError: if a column is missing, a prompt is empty, or nothing remains.
    """
    missing = [column for column in COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(
            f"the rollouts have no column {', '.join(missing)}, only {', '.join(dataset.column_names)}; write them "
            f"with `trl-trust rollouts` and read them with `load_rollouts`."
        )
    logps = [column for column in dataset.column_names if column.endswith("_logps")]
    dataset = dataset.select_columns([*COLUMNS, *logps])
    lengths = lambda column: pc.list_value_length(dataset.with_format("arrow")[column][:]).to_numpy()
    if (lengths("prompt_ids") == 0).any():
        raise ValueError("a row has empty `prompt_ids`; a completion needs a token to follow.")
    for column in logps:
        values = pc.list_flatten(dataset.with_format("arrow")[column][:])
        if (lengths(column) != lengths("completion_ids")).any():
            raise ValueError(
                f"`{column}` and `completion_ids` differ in length in a row; one number a token is needed."
            )
        if not pc.all(pc.is_finite(values)).as_py():
            raise ValueError(f"`{column}` has a value that is not finite; the policy cannot have sampled that token.")
    rewards = np.asarray(dataset["reward"], dtype=np.float64)
    rewards[lengths("completion_ids") == 0] = np.nan
    _, group = np.unique(np.asarray(dataset["group"]), return_inverse=True)

    advantages = np.full_like(rewards, np.nan)
    for rows in np.split(np.argsort(group, kind="stable"), np.cumsum(np.bincount(group))[:-1]):
        rows = rows[~np.isnan(rewards[rows])]
        if len(rows) > 1 and np.ptp(rewards[rows]) > 0:
            advantages[rows] = (rewards[rows] - rewards[rows].mean()) / (rewards[rows].std(ddof=1) + 1e-4)
    kept = np.flatnonzero(~np.isnan(advantages))
    if len(kept) == 0:
        raise ValueError("no group of the rollouts has two different rewards, so there is nothing to learn from.")
    return dataset.select(kept).remove_columns("group").add_column("advantage", advantages[kept])
