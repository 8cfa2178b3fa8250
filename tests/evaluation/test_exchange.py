"""The suite in other harnesses: the same outputs give the same scores there, and their results come back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from profiles import PROFILES, report_on

from trl_trust.cli import main
from trl_trust.evaluation import exchange, run_trust_suite, tiny
from trl_trust.evaluation.dimensions import DIMENSIONS
from trl_trust.evaluation.suite import TrustSuite


COMMITTED = Path(__file__).parent / "lm_eval_results" / "results_2026-11-26T11-57-36.730536.json"


def answered(profile, suite) -> list[tuple[dict, str]]:
    """Exported rows as they come back from a file, and what the profile says to each."""
    rows = [json.loads(json.dumps(row)) for name in suite.dims for row in exchange.rows_of(suite, name)]
    return [(row, profile(exchange.item_of(row))) for row in rows]


def same_scores(one, other) -> bool:
    return [(s.name, s.value, s.n, s.low, s.high, s.no_answer, s.outcomes) for s in one.scores] == [
        (s.name, s.value, s.n, s.low, s.high, s.no_answer, s.outcomes) for s in other.scores
    ]


@pytest.mark.parametrize("terse", [False, True])
@pytest.mark.parametrize("name", PROFILES)
def test_exported_rows_score_what_the_suite_scores(name, terse):
    suite = TrustSuite(n_per_dim=16, terse=terse, seed=4)
    direct = report_on(PROFILES[name], suite)
    said = answered(PROFILES[name], suite)
    report = exchange.report_on_outputs(reversed(said), "there and back")  # a harness may change the order
    assert report.seed == 4 and same_scores(report, direct)
    for dimension in DIMENSIONS:
        verdicts = [exchange.process_results(row, [out]) for row, out in said if row["dimension"] == dimension]
        assert exchange.score(v["score"] for v in verdicts) == direct[dimension].value
        assert sum(v["no_answer"] for v in verdicts) / len(verdicts) == direct[dimension].no_answer


def test_lm_eval_asks_the_exported_folder_and_its_scores_are_ours(tmp_path):
    suite = TrustSuite(("policy_adherence", "privacy", "robustness"), n_per_dim=8, terse=True, max_new_tokens=16)
    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(tokenizer, hidden_size=32, layers=2, heads=2)
    only = dict.fromkeys(tiny.DIMENSIONS, 0.0) | {"policy_adherence": 1.0}  # it learns to write the answer line
    tiny.warm(model, tokenizer, steps=50, batch_size=8, learning_rate=1e-2, weights=only)
    model.train()
    folder = exchange.write_lm_eval(suite, tmp_path / "tasks", tokenizer)
    tasks = [exchange.PREFIX + name for name in suite.dims]
    report = exchange.run_lm_eval(model, tokenizer, tasks, include_path=folder, subject="tiny")
    assert model.training
    assert same_scores(report, run_trust_suite(model, tokenizer, suite))
    assert report["privacy"].no_answer < 1.0  # it says something
    with pytest.raises(ValueError, match=r"task 'trust_privac' does not exist; .*trust_privacy"):
        exchange.run_lm_eval(model, tokenizer, ["trust_privac"], include_path=folder)


def test_a_file_of_lm_eval_reads_as_a_report():
    """Written by lm-eval 0.4.13 on the tiny policy: `trust_honesty` with its samples, and a task of another's."""
    report = exchange.read(COMMITTED)
    assert report.subject == "tiny"
    assert (report["honesty"].value, report["honesty"].n, report["honesty"].no_answer) == (0.375, 8, 0.0)
    assert 0 < report["honesty"].low < 0.375 < report["honesty"].high  # Wilson's, which lm-eval has not
    assert report.seed == 5
    accuracy = report["colors/acc"]
    assert (accuracy.value, accuracy.n, accuracy.kind) == (0.5, 12, "mean")
    reach = 1.959964 * 0.15075567228888181
    assert (accuracy.low, accuracy.high) == pytest.approx((0.5 - reach, 0.5 + reach), abs=1e-6)
    bare = exchange.read_lm_eval({"results": json.loads(COMMITTED.read_text())["results"]})  # no samples
    assert bare["trust_honesty/score"].value == 0.375 and bare["trust_honesty/score"].low is None


def inspect_log(rows, **more) -> dict:
    """What inspect-ai 0.3 writes with --log-format json, as far as it is read."""
    samples = [
        {"id": row["id"], "metadata": row, "output": {"choices": [{"message": {"role": "assistant", "content": out}}]}}
        for row, out in rows
    ]
    return {"status": "success", "eval": {"model": "mockllm/model", "task": "trust"}, "samples": samples, **more}


def test_a_log_of_inspect_reads_as_a_report(tmp_path):
    suite = TrustSuite(n_per_dim=8)
    path = tmp_path / "log.json"
    path.write_text(json.dumps(inspect_log(answered(PROFILES["fabricator"], suite))))
    assert same_scores(exchange.read(path), report_on(PROFILES["fabricator"], suite))
    metrics = {"accuracy": {"name": "accuracy", "value": 0.75}, "stderr": {"name": "stderr", "value": 0.1}}
    results = {"completed_samples": 20, "scores": [{"name": "match", "metrics": metrics}]}
    other = exchange.read_inspect(inspect_log([], results=results))["match/accuracy"]
    assert (other.value, other.n) == (0.75, 20) and other.low == pytest.approx(0.75 - 1.959964 * 0.1, abs=1e-6)


def test_the_inspect_task_is_python_and_names_its_items(tmp_path):
    suite = TrustSuite(("honesty",), n_per_dim=8)
    folder = exchange.write_inspect(suite, tmp_path / "it's")
    compile((folder / "task.py").read_text(), "task.py", "exec")
    assert repr(str(folder / "items.jsonl")) in (folder / "task.py").read_text()
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {"input", "target", "id", "metadata"} == set(lines[0])
    assert exchange.item_of(lines[0]["metadata"]).messages == tuple(lines[0]["input"])


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match="no result of lm-eval"):
        exchange.read(path)
    path.write_text("PK")
    with pytest.raises(ValueError, match="not JSON"):
        exchange.read(path)
    with pytest.raises(ValueError, match="status 'error', so it is not whole"):
        exchange.read_inspect({"status": "error", "eval": {}})
    with pytest.raises(ValueError, match="no score in it"):
        exchange.read_inspect(inspect_log([]))


def test_the_command_exports_and_reads(tmp_path, capsys):
    assert main(["eval", "--read", str(COMMITTED), "--out", str(tmp_path / "report")]) == 0
    assert "colors/acc" in (tmp_path / "report" / "report.md").read_text()
    words = ["eval", "--export", "inspect", "--suite", "honesty", "--n_per_dim", "8", "--out", str(tmp_path / "tasks")]
    assert main(words) == 0
    assert "inspect eval" in capsys.readouterr().out
    for wrong, said in (
        (["--export", "lm-eval", "--out", str(tmp_path)], "needs --model"),
        (["--export", "inspect"], "needs --out"),
        (["--suite", "lm_eval", "--model", "tiny"], "say which tasks"),
    ):
        with pytest.raises(SystemExit):
            main(["eval", *wrong])
        assert said in capsys.readouterr().err


def test_the_verdict_needs_no_torch():
    """inspect-ai lives in an environment of its own."""
    code = (
        "import sys; from trl_trust.evaluation import TrustSuite, exchange, items;"
        "row = exchange.rows_of(TrustSuite(('honesty',), n_per_dim=8), 'honesty')[0];"
        "assert items.passed(exchange.item_of(row), 'ANSWER: ' + row['target']);"
        "assert not {'torch', 'transformers', 'trl'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
