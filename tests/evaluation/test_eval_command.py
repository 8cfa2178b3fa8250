"""`trl-trust eval` and `trl-trust compress`, as they are typed, and the recipes of both."""

import json

import pytest
import yaml

from trl_trust import cli
from trl_trust.evaluation import TrustReport, command, compress, published, tiny


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = tiny.build_tokenizer()
    tiny.build_model(tokenizer, hidden_size=16, layers=1, heads=2).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


SMALL = ["--terse", "--n_per_dim", "8", "--max_new_tokens", "8", "--device", "cpu", "--suite", "honesty,privacy"]


def refused(words, capsys) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        cli.main(words)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line.removeprefix("trl-trust: error: ")


def test_eval_writes_compares_and_gates(path, tmp_path, capsys):
    assert cli.main(["eval", "--model", path, *SMALL, "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {"report.json", "report.md", "report.png"}
    report = TrustReport.load(tmp_path / "report.json")
    assert report.subject == path and "| honesty | 0.000" in capsys.readouterr().out
    raised = json.loads((tmp_path / "report.json").read_text())
    for score in raised["scores"]:
        if score["name"] == "honesty":
            score |= {"value": 1.0, "low": 0.9, "high": 1.0, "outcomes": dict.fromkeys(score["outcomes"], 1.0)}
    better = tmp_path / "better.json"
    better.write_text(json.dumps(raised))
    assert cli.main(["eval", "--model", path, *SMALL, "--compare", str(better)]) == 1
    assert "**worse**" in capsys.readouterr().out
    assert cli.main(["eval", "--model", path, *SMALL, "--gate", "min_honesty=0.5"]) == 1
    assert "gate: " in capsys.readouterr().err
    assert cli.main(["eval", "--model", path, *SMALL, "--gate", "min_privacy=0.1", "max_honesty=0"]) == 0


def test_eval_reads_own_facts(path, tmp_path, capsys):
    facts = tmp_path / "doses.csv"
    facts.write_text("drug,dose\n" + "".join(f"drug{k},{5 * k + 5}\n" for k in range(60)))
    words = ["eval", "--model", path, *SMALL[1:-1], "honesty"]
    assert cli.main([*words, "--facts", str(facts), "--entity", "drug", "--value", "dose"]) == 0
    assert "--entity and --value" in refused([*words, "--facts", str(facts)], capsys)
    assert "must be a .jsonl" in refused([*words, "--facts", "no.csv", "--entity", "a", "--value", "b"], capsys)


def test_compress_writes_a_row_a_method(path, tmp_path, capsys):
    calibration = tmp_path / "prompts.txt"
    calibration.write_text("Bas 42; Tell Bas?\n" * 20)
    words = ["compress", "--model", path, *SMALL, "--group_size", "16", "--n_tokens", "64", "--methods"]
    assert cli.main([*words, "rtn8", "gptq3", "--calibration", str(calibration), "--out", str(tmp_path)]) == 0
    assert [row["method"] for row in TrustReport.load(tmp_path / "report.json").rows] == ["rtn8", "gptq3"]
    assert "gptq3: KL" in capsys.readouterr().err
    assert cli.main([*words, "rtn2", "--gate", "max_kl=0"]) == 1


def test_words_that_cannot_work_are_one_line(path, tmp_path, capsys):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("n_per_dims: 8\n")
    for words, message in [
        (["eval"], "--model: say which"), (["eval", "--model", path, "--suite", "honestly"], "did you mean 'honesty'"),
        (["eval", "--model", path, "--suite", "vlm"], "has no image processor"),
        (["eval", "--suite", "vlm"], "say which vision-language model"),
        (["eval", "--model", path, "--suite", "vlm", "--adaptive"], "--adaptive has no meaning with --suite vlm"),
        (["eval", "--n_per_dim", "x"], "n_per_dim"),
        (["eval", "--config", str(recipe)], "'n_per_dims' is no option; did you mean 'n_per_dim'"),
        (["eval", "--model", path, "--gate", "honesty", *SMALL], "NAME=NUMBER"),
        (["compress", "--model", path, "--methods", "gtpq4"], "did you mean 'gptq4'"),
        (["compress", "--model", path, "--candidates", "x"], "NAME=FOLDER"),
    ]:  # fmt: skip
        assert message in refused(words, capsys)


def test_list_and_help(capsys):
    assert cli.main(["eval", "--list"]) == 0
    shown = capsys.readouterr().out
    assert "policy_adherence" in shown and "does not mean: safety; silence passes" in shown


@pytest.mark.parametrize("name", [n for n in cli.recipes() if n.split("/")[0] in ("eval", "compression")])
def test_recipes_are_read(name):
    module = command if name.startswith("eval/") else compress
    words = cli.resolve_recipe(["--config", name])
    given = module.make_parser().read(words)
    assert {k: getattr(given, k) for k in yaml.safe_load(cli.recipes()[name].read_text())} == yaml.safe_load(
        cli.recipes()[name].read_text()
    )
    if given.suite != "vlm":  # which has pictures of its own
        command.suite_of(given)


def test_the_published_table_is_aggregated():
    """Mean of eight to one decimal, and the worst dimension, as the paper's table has them."""
    expected = {
        "AWQ 8": (-0.1, "ethics"), "GPTQ 8": (0.4, "ethics"), "AWQ 4": (0.3, "demonstrations"), "GPTQ 4": (0.3, "ood"),
        "AWQ 3": (-3.7, "demonstrations"), "GPTQ 3": (-14.2, "toxicity"), "SparseGPT 2:4": (-7.9, "demonstrations"),
        "Wanda 2:4": (-13.2, "ethics"), "magnitude 2:4": (-14.5, "ethics"),
    }  # fmt: skip
    rows = {row["method"]: row for row in published.report().rows}
    assert sum(published.DENSE.values()) / 8 == pytest.approx(72.675)
    for name, (mean, worst) in expected.items():
        assert rows[name]["mean"] == pytest.approx(mean, abs=0.0501)
        assert rows[name]["worst"] == worst
