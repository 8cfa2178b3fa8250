"""`trl-trust gu` and `trl-trust unlearn-eval` as a user starts them, on recipes made small and on what is wrong."""

import json

import pytest
import yaml

from trl_trust import cli
from trl_trust.evaluation import TrustReport
from trl_trust.methods import get_method
from trl_trust.unlearn import report as unlearn_report
from trl_trust.unlearn.data import facts
from trl_trust.unlearn.script import make_parser


RECIPES = {name: path for name, path in cli.recipes().items() if name.startswith("gu/")}
# Put in place of what needs a GPU, the network or time. Everything else is as the recipe has it.
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "dtype": "float32",
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 2,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The generated facts in the files of every set."""
    path = tmp_path_factory.mktemp("data")
    forget, retain, holdout = facts()
    texts = lambda rows: rows.map(lambda row: {"text": f"{row['question']} {row['answer']}"})
    files = {"forget10": forget, "retain90": retain, "forget10_perturbed": forget, "holdout10": holdout}
    files |= {"raw_forget": texts(forget), "raw_retain1": texts(retain), "cyber-forget-corpus": texts(forget)}
    files["cyber-retain-corpus"] = texts(retain)
    for name, rows in files.items():
        rows.to_json(path / f"{name}.jsonl")
    return path


@pytest.fixture
def run(tmp_path, knowing, folder):
    def call(name: str, **changes):
        small = {**yaml.safe_load(RECIPES[name].read_text()), **SMALL, "output_dir": str(tmp_path / "out")}
        if small["dataset_name"] != "facts":
            small |= {"model_name_or_path": knowing, "dataset_path": str(folder)}
        if small["forget_loss"] == "rmu":
            small |= {"rmu_layer": 1, "gu_params": [r"layers\.[01]\.mlp\.down_proj"]}
        small = {key: value for key, value in {**small, **changes}.items() if value is not None}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
        assert cli.main(["gu", "--config", str(tmp_path / "small.yaml")], launch=False) == 0
        return tmp_path / "out"

    return call


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_trains_and_is_measured(name, run, folder, tmp_path, capsys):
    recipe = yaml.safe_load(RECIPES[name].read_text())
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump({**recipe, "use_cpu": True, "bf16": False}))
    _, args, model_args = make_parser(get_method("gu")).parse(["--config", str(tmp_path / "whole.yaml")])
    assert RECIPES[name].read_text().startswith("# ") and args.gu_rank == 8
    assert model_args.model_name_or_path == recipe["model_name_or_path"]

    out = run(name)
    log = [entry for entry in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    assert len(log) == 2 and all(0 < entry["gu/forget_kept"] <= 1 and entry["grad_norm"] > 0 for entry in log)
    saved = "adapter_model.safetensors" if recipe.get("use_peft") else "model.safetensors"
    assert (out / saved).stat().st_size and (out / "checkpoint-2" / "gu_history.safetensors").stat().st_size
    card = (out / "README.md").read_text()
    assert "arXiv:2511.17100" in card and "| `gu_rank` | 8 |" in card and "Provenance" in card
    if recipe["dataset_name"] == "facts":
        rows = (out / "comparison.md").read_text().splitlines()
        assert [row.split("|")[1].strip().split(",")[0] for row in rows[2:]] == [
            "before", "retrained without it", "graddiff", "graddiff with GU", "graddiff", "graddiff with GU",
        ]  # fmt: skip
        assert "| 1.00 |" in rows[2] and rows[4] != rows[5]

    word = recipe["dataset_name"]
    words = ["--model", str(out), "--data", word, "--out", str(tmp_path / "report"), "--max-new-tokens", "4"]
    words += [] if word == "facts" else ["--data-path", str(folder)]
    capsys.readouterr()
    assert unlearn_report.main(words) == 0
    assert "| retain |" in capsys.readouterr().out
    assert TrustReport.load(tmp_path / "report")["forget/nll"].value > 0


def test_a_reference_a_comparison_and_a_gate(knowing, folder, tmp_path, capsys):
    words = ["unlearn-eval", "--model", knowing, "--data", "tofu", "--data-path", str(folder), "--max-new-tokens", "5"]
    assert cli.main([*words, "--out", str(tmp_path / "a")]) == 0
    again = [
        *words,
        "--out",
        str(tmp_path / "b"),
        "--reference",
        str(tmp_path / "a"),
        "--compare",
        str(tmp_path / "a"),
    ]
    assert cli.main([*again, "--gate", "min_forget_quality=0.99", "max_forget/nll=1"]) == 0
    report = TrustReport.load(tmp_path / "b")
    assert report["forget_quality"].value == 1 and report["privleak"].value == pytest.approx(0, abs=1e-6)
    assert (tmp_path / "b" / "report.png").stat().st_size and report["forget/rouge_l"].value == 1
    assert cli.main([*again, "--gate", "max_forget/rouge_l=0.5"]) == 1
    assert "forget/rouge_l 1.000 is above 0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_path": None, "model_name_or_path": "x"}, "model_name_or_path='facts' knows nothing"),
        ({"dataset_path": "./nowhere"}, "./nowhere: no such folder"),
        ({"forget_split": "forget05"}, "holds no forget05.jsonl; it has"),
        ({"model_name_or_path": "./nowhere"}, "model_name_or_path='./nowhere': set it to a model"),
        ({"model_name_or_path": "no/such-model"}, "is no directory with a model, and cannot be had from the Hub"),
        ({"load_in_4bit": True}, "load_in_4bit=True is not read by GU"),
        ({"anchor": "both"}, "anchor='both' must be 'forget' or 'retain'"),
        ({"gu_rank": 9}, "gu_rank=9 must be at most 8"),
        ({"resume_from_checkpoint": "true"}, "there is no checkpoint in output_dir"),
        ({"deepspeed": "zero2.json"}, "deepspeed='zero2.json' shards the gradients"),
        ({"gu_rnak": 4}, "did you mean 'gu_rank'"),
    ],
)
def test_what_is_wrong_is_one_line(changes, message, run, capsys):
    if changes.get("model_name_or_path") == "x":
        changes = {"dataset_path": None, "model_name_or_path": "facts"}
    with pytest.raises(SystemExit) as stop:
        run("gu/llama3.2-1b-tofu-forget10", **changes)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("trl-trust: error")]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]
