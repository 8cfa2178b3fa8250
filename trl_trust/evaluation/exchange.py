"""The suite's items in the form of lm-eval and of inspect-ai, and the results of both as reports. No torch.

write_lm_eval(suite, "tasks", tokenizer)         # lm_eval --include_path tasks --tasks trust_honesty,trust_privacy
read_lm_eval("results/model/results_DATE.json")  # any task of lm-eval, ours with our own intervals
write_inspect(suite, "tasks")                    # inspect eval tasks/task.py --log-format json
read_inspect("logs/NAME.json")

Both harnesses ask, and the verdict is the suite's own function: their score is our score on the same outputs.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ..lookup import near
from .dimensions import DIMENSIONS
from .items import Item, answer_of, passed
from .report import Score, TrustReport, name_of
from .stats import z_value
from .suite import Tally, TrustSuite, report_of


PREFIX = "trust_"  # of our tasks' names in lm-eval
_KEPT = ("dimension", "target", "verifier", "variant", "role", "secret", "wrong", "name", "pair_id", "split")


# --------------------------------------------------------------------------------------------------------------------
# Out
# --------------------------------------------------------------------------------------------------------------------


def rows_of(suite: TrustSuite, dimension: str, *, evaluation: int = 0) -> list[dict]:
    """The items of a dimension as flat rows: what is asked, what the verdict needs, and which slot it belongs to."""
    flat = [(slot, item) for slot, items in enumerate(suite.items(dimension, evaluation=evaluation)) for item in items]
    return [
        {
            "id": f"{item.id}/{place}",  # terse items can coincide, ids of rows may not
            "seed": suite.seed,
            "slot": slot,
            "messages": list(item.messages),
            **{name: getattr(item, name) for name in _KEPT},
        }
        for place, (slot, item) in enumerate(flat)
    ]


_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs:
  until: []
  do_sample: false
  max_gen_toks: {tokens}
process_results: !function verdict.process_results
metric_list:
  - metric: score
    aggregation: !function verdict.score
    higher_is_better: true
  - metric: no_answer
    aggregation: mean
    higher_is_better: false
metadata:
  version: 1
  seed: {seed}
"""


def write_lm_eval(suite: TrustSuite, folder: str | os.PathLike, tokenizer=None) -> Path:
    """Write a folder for `lm_eval --include_path FOLDER`: a task and its items for each dimension; returns it.

    Items are those of `run_trust_suite` at the suite's seed. `score` counts slots (a pair once), as the report does;
    lm-eval gives it no standard error, [`read_lm_eval`] Wilson's interval. Paths in it are absolute: write it anew
    after moving.

    Args:
        tokenizer: of the model that will be asked. lm-eval hands on one text, so the conversation is rendered here,
            by its chat template; leave `--apply_chat_template` out.
    """
    from .generation import render_all

    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "verdict.py").write_text(
        '"""The verdicts of these tasks: those of trl-trust, which must be installed."""\n\n'
        "from trl_trust.evaluation.exchange import process_results, score  # noqa: F401\n",
        "utf-8",
    )
    for dimension in suite.dims:
        task, data = PREFIX + dimension, folder / f"{dimension}.jsonl"
        rows = rows_of(suite, dimension)
        prompts = render_all(tokenizer, [row["messages"] for row in rows])
        _write_lines(data, [{**row, "prompt": prompt} for row, prompt in zip(rows, prompts, strict=True)])
        text = _YAML.format(task=task, data=json.dumps(str(data)), tokens=suite.max_new_tokens, seed=suite.seed)
        (folder / f"{task}.yaml").write_text(text, "utf-8")
    return folder


def process_results(doc: Mapping, results: Sequence[str]) -> dict:
    """lm-eval's hook: the verdict on one output, as what [`score`] takes together."""
    output = results[0]
    ok = passed(item_of(doc), output)
    return {
        "score": (doc["dimension"], doc["slot"], doc["role"], ok),
        "no_answer": float(answer_of(output) is None),
    }


def score(verdicts: Iterable[tuple[str, int, str, bool]]) -> float:
    """lm-eval's aggregation: the share of slots passed. Of a pair both twins count, or the one varied."""
    slots: dict[int, list[bool]] = {}
    for _, slot, role, ok in verdicts:
        if role not in ("neutral", "clean"):
            slots.setdefault(slot, []).append(ok)
    return sum(map(all, slots.values())) / len(slots)


_INSPECT = '''\
"""The suite's items as an inspect-ai task: inspect eval {name} --model MODEL --log-format json"""

from inspect_ai import Task, task
from inspect_ai.dataset import json_dataset
from inspect_ai.scorer import Score, accuracy, scorer
from inspect_ai.solver import generate

from trl_trust.evaluation.exchange import item_of
from trl_trust.evaluation.items import passed


@scorer(metrics=[accuracy()])
def verdict():
    async def judge(state, target):
        return Score(value=float(passed(item_of(state.metadata), state.output.completion)))

    return judge


@task
def trust():
    items = json_dataset({data!r})
    return Task(dataset=items, solver=generate(), scorer=verdict(), max_tokens={tokens})
'''


def write_inspect(suite: TrustSuite, folder: str | os.PathLike) -> Path:
    """Write `items.jsonl` and `task.py` for inspect-ai, all dimensions in one task; returns the folder.

    inspect-ai pins fsspec below what `datasets` takes here, so it lives in an environment of its own, beside
    `pip install --no-deps trl-trust`: the verdict needs neither torch nor TRL.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for dimension in suite.dims for row in rows_of(suite, dimension)]
    lines = [
        {
            "input": row["messages"],
            "target": row["target"],
            "id": row["id"],
            "metadata": {name: row[name] for name in ("seed", "slot", "messages", *_KEPT)},
        }
        for row in rows
    ]
    _write_lines(folder / "items.jsonl", lines)
    text = _INSPECT.format(name="task.py", data=str(folder / "items.jsonl"), tokens=suite.max_new_tokens)
    (folder / "task.py").write_text(text, "utf-8")
    return folder


def _write_lines(path: Path, rows: Iterable[Mapping]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


# --------------------------------------------------------------------------------------------------------------------
# Asked by lm-eval
# --------------------------------------------------------------------------------------------------------------------


def run_lm_eval(
    model,
    tokenizer,
    tasks: Sequence[str],
    *,
    subject: str | None = None,
    include_path: str | os.PathLike | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 0,
) -> TrustReport:
    """Ask a model the named tasks of lm-eval and report; the model is as it was afterwards.

    Args:
        tasks: names such as `"truthfulqa_mc2"`, `"bbq"`, `"wmdp_cyber"`; their data comes from the hub or its cache.
        include_path: a folder of tasks, such as [`write_lm_eval`] writes. Then only its tasks are known.
        limit: examples a task, for a trial.
        seed: of lm-eval's few-shot choice.

    Raises:
        ImportError: without lm-eval, extra `eval`.
        ValueError: for a task that does not exist.
    """
    from .generation import untouched

    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError("lm-eval is not installed; pip install trl-trust[eval]") from error
    manager = TaskManager(include_path=include_path and str(include_path), include_defaults=include_path is None)
    for task in tasks:
        if not manager.match_tasks([task]):
            raise ValueError(f"lm_eval: task {task!r} does not exist; {near(task, manager.all_tasks)}")
    with untouched(model):
        results = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=apply_chat_template,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return read_lm_eval(results, subject or name_of(model))


# --------------------------------------------------------------------------------------------------------------------
# In
# --------------------------------------------------------------------------------------------------------------------


def item_of(row: Mapping) -> Item:
    """The item of an exported row, as far as a verdict needs it."""
    return Item(messages=tuple(row["messages"]), **{name: row[name] for name in _KEPT})


def report_on_outputs(answered: Iterable[tuple[Mapping, str]], subject: str, confidence: float = 0.95, **meta):
    """The report of exported rows and what was said to each: what `run_trust_suite` gives for the same outputs.

    Raises:
        ValueError: if there is no row.
    """
    tallies: dict[str, Tally] = {}
    slots: dict[tuple[str, int], list[tuple[Item, str]]] = {}
    seed = None
    for row, output in sorted(answered, key=lambda pair: int(pair[0].get("id", "/0").rsplit("/", 1)[-1])):
        slots.setdefault((row["dimension"], row["slot"]), []).append((item_of(row), output))
        seed = row.get("seed")
    if not slots:
        raise ValueError(f"{subject}: holds no item of the suite")
    for (dimension, _), said in sorted(
        slots.items(), key=lambda entry: (list(DIMENSIONS).index(entry[0][0]), entry[0])
    ):
        tally = tallies.setdefault(dimension, Tally(dimension))
        tally.add([[item for item, _ in said]], [output for _, output in said])
    return replace(report_of(tallies, TrustSuite(confidence=confidence), subject, meta=meta), seed=seed)


def read(path: str | os.PathLike) -> TrustReport:
    """A file of lm-eval or of inspect-ai, whichever it is, as a report.

    Raises:
        ValueError: for any other file.
    """
    try:
        given = json.loads(Path(path).read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); inspect writes it with --log-format json") from None
    if isinstance(given, Mapping) and "eval" in given and "status" in given:
        return read_inspect(path)
    return read_lm_eval(path)


def read_lm_eval(results: Mapping | str | os.PathLike, subject: str | None = None) -> TrustReport:
    """A result of lm-eval as a report: `TASK/METRIC` with the interval of its standard error, where it has one.

    Our own tasks whose samples are there (`log_samples`) are judged again from the outputs, so that their scores have
    the interval, the no-answer share and the item ids of any other report of the suite.

    Args:
        results: what `lm_eval.simple_evaluate` returned, or its file `results_DATE.json`; `samples_TASK_DATE.jsonl`
            beside the file are read too.

    Raises:
        ValueError: if there are no results in it.
    """
    path = None if isinstance(results, Mapping) else Path(results)
    given = results if path is None else json.loads(path.read_text("utf-8"))
    if not isinstance(given, Mapping) or not given.get("results"):
        raise ValueError(f"{path or 'results'}: no result of lm-eval; it holds no field `results`")
    samples = dict(given.get("samples") or {})
    if path is not None:
        date = path.stem.removeprefix("results_")
        for task in given["results"]:
            if (file := path.with_name(f"samples_{task}_{date}.jsonl")).is_file():
                samples[task] = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    ours = {task: rows for task, rows in samples.items() if task.startswith(PREFIX) and rows}
    subject = subject or str(given.get("model_name") or (given.get("config") or {}).get("model") or "lm-eval")
    scores = [s for task in given["results"] if task not in ours for s in _lm_eval_scores(task, given)]
    theirs = TrustReport(subject, suite="lm_eval: " + ", ".join(given["results"]), scores=scores)
    if not ours:
        return theirs
    said = [(sample["doc"], sample["resps"][0][0]) for rows in ours.values() for sample in rows]
    report = report_on_outputs(said, subject, items=len(said))
    return report.merge(theirs) if scores else report


def _lm_eval_scores(task: str, given: Mapping) -> Iterable[Score]:
    counts = ((given.get("n-samples") or {}).get(task) or {}).get("effective", 0)
    directions = (given.get("higher_is_better") or {}).get(task) or {}
    values = given["results"][task]
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or isinstance(value, str):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        reach = z_value() * error if isinstance(error, int | float) else None
        name = f"{task}/{metric}" + ("" if kind == "none" else f",{kind}")
        limits = {} if reach is None else {"low": value - reach, "high": value + reach}
        yield Score(name, value, counts, kind="mean", higher_is_better=directions.get(metric, True), **limits)


def read_inspect(log: Mapping | str | os.PathLike, subject: str | None = None) -> TrustReport:
    """A JSON log of inspect-ai as a report. Items of [`write_inspect`] are judged again from the outputs.

    Of any other task: each scorer's metrics, with the interval of `stderr` where there is one.

    Raises:
        ValueError: for a log that did not succeed, or without results.
    """
    given = log if isinstance(log, Mapping) else json.loads(Path(log).read_text("utf-8"))
    name = "the log" if isinstance(log, Mapping) else str(log)
    if given.get("status") != "success":
        raise ValueError(f"{name}: status {given.get('status')!r}, so it is not whole; run the task to its end")
    subject = subject or str(given["eval"].get("model", "inspect"))
    rows = [
        (sample["metadata"], sample["output"]["choices"][0]["message"]["content"])
        for sample in given.get("samples") or ()
        if "slot" in (sample.get("metadata") or {}) and sample["output"].get("choices")
    ]
    if rows:
        return report_on_outputs(rows, subject, items=len(rows))
    scores = []
    for scorer in (given.get("results") or {}).get("scores") or ():
        metrics = {key: metric["value"] for key, metric in scorer["metrics"].items()}
        error = metrics.pop("stderr", None)
        for key, value in metrics.items():
            limits = {"low": value - z_value() * error, "high": value + z_value() * error} if error else {}
            n = given["results"].get("completed_samples", 0)
            scores.append(Score(f"{scorer['name']}/{key}", value, n, kind="mean", **limits))
    if not scores:
        raise ValueError(f"{name}: no score in it")
    return TrustReport(subject, suite=f"inspect: {given['eval'].get('task', '')}", scores=scores)
