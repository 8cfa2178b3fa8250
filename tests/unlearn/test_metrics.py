"""Each metric against numbers made by hand, and whole reports of a scripted model."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from trl_trust.evaluation import TrustReport
from trl_trust.unlearn import load_unlearning, unlearning_report
from trl_trust.unlearn import metrics as M
from trl_trust.unlearn.data import encode, facts_tokenizer


def test_worked_numbers():
    assert M.extraction_strength([True, False, False, True, True]) == pytest.approx(0.4)
    assert M.extraction_strength([True] * 3) == 1 and M.extraction_strength([True, False]) == 0
    assert M.extraction_strength([]) == 0
    assert M.exact_memorization([True, False, True, True]) == 0.75
    assert M.truth_ratio(1.0, [2.0, 4.0]) == pytest.approx(math.exp(-2))
    assert M.option_probability(-math.log(0.5), [-math.log(0.25)] * 2) == pytest.approx(0.5)
    assert M.privacy_leakage(0.6, 0.5) == pytest.approx(-20)
    assert M.attack_auc([1.0, 2.0], [2.0, 3.0]) == pytest.approx(3.5 / 4)
    assert M.harmonic_mean([0.5, 1.0]) == pytest.approx(2 / 3) and M.harmonic_mean([0.5, 0.0]) == 0
    assert M.forget_quality([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]) == 1
    assert M.forget_quality([0.0] * 8, [1.0] * 8) == pytest.approx(2 / math.comb(16, 8))


class Scripted(torch.nn.Module):
    """Knows each question's answer: gives its right tokens the probability `p`, and the rest to the word w63."""

    def __init__(self, tokenizer, rows, p):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.config = SimpleNamespace(_name_or_path="scripted")
        self.known, self.p, self.size = {}, p, len(tokenizer)
        self.other = tokenizer.convert_tokens_to_ids("w63")
        for row in rows:
            ids = encode(tokenizer, row)["input_ids"]
            for t in range(1, len(ids)):
                self.known[tuple(ids[:t])] = ids[t]

    def forward(self, input_ids, attention_mask):
        logits = torch.full((*input_ids.shape, self.size), -1e4)
        for b, row in enumerate(input_ids.tolist()):
            start = row.count(0) if row[0] == 0 else 0  # padded on the left by generation
            for t in range(start, len(row)):
                right = self.known.get(tuple(row[start : t + 1]))
                logits[b, t, self.other] = math.log(1 - self.p) if right is not None else 0.0
                if right is not None:
                    logits[b, t, right] = math.log(self.p)
        return SimpleNamespace(logits=logits)

    def generate(self, input_ids, attention_mask, max_new_tokens, **kwargs):
        for _ in range(max_new_tokens):
            following = self(input_ids, attention_mask).logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, following], 1)
        return input_ids


@pytest.fixture(scope="module")
def world():
    """Six rows of TOFU's form: two to forget, two to keep, one each of the others."""
    rows = [
        {
            "question": f"genre of author{i}",
            "answer": "w1 w2 w3 w4",
            "paraphrased_answer": "w1 w2 w3 w4",
            "perturbed_answer": ["w1 w2 w3 w5", "w1 w2 w6 w4"],
        }
        for i in range(6)
    ]
    return rows


@pytest.fixture
def folder(world, tmp_path):
    bare = [{k: row[k] for k in ("question", "answer")} for row in world]
    names = {"forget10": bare[:2], "retain90": bare[2:4], "forget10_perturbed": world[:2], "holdout10": bare[5:]}
    names |= {
        "retain_perturbed": world[2:4],
        "real_authors_perturbed": world[4:5],
        "world_facts_perturbed": world[4:5],
    }
    for name, rows in names.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_report_of_a_scripted_model(world, folder):
    tokenizer = facts_tokenizer()
    data = load_unlearning("tofu:forget10", path=folder)
    assert len(data.train) == 2 and set(data.others) == {"real_authors", "world_facts", "holdout"}
    model = Scripted(tokenizer, world[:5], 0.6)
    report = unlearning_report(model, tokenizer, data, max_new_tokens=5, batch_size=3)
    rows = {row["split"]: row for row in report.rows}
    # five tokens, the end among them, of probability .6 each
    assert rows["forget"]["nll"] == pytest.approx(-math.log(0.6), abs=1e-6)
    assert rows["retain"]["probability"] == pytest.approx(0.6, abs=1e-6)
    assert rows["forget"]["extraction_strength"] == rows["forget"]["exact_memorization"] == 1
    assert rows["forget"]["rouge_l"] == 1 and rows["holdout"]["rouge_l"] is None
    # a wrong answer's odd token, and the one after it, have probability 0: the truth ratio is 0
    assert rows["forget"]["truth_ratio"] == 0 and rows["retain"]["truth_ratio"] == 1
    assert rows["real_authors"]["probability"] == pytest.approx(1)  # among the options
    assert report["model_utility"].value == pytest.approx(9 / (2 / 1 + 6 / 1 + 1 / 0.6), abs=1e-6)
    assert report["loss_attack_auc"].value == 1  # the holdout is unknown
    assert report["forget_quality"].value is None and "no truth ratios" in " ".join(report.meta["not_measured"])

    # one that has the second half wrong: .3 is not the first choice
    half = Scripted(tokenizer, world[2:5], 0.6)
    weak = Scripted(tokenizer, world[:2], 0.3)
    half.known |= {k: v for k, v in weak.known.items() if tokenizer.convert_tokens_to_ids("w2") not in k}
    measured = unlearning_report(half, tokenizer, data, max_new_tokens=5)
    row = measured.rows[0]
    assert row["exact_memorization"] == 0.5 and row["extraction_strength"] == 0
    assert 0 < row["rouge_l"] < 1


def test_a_reference_round_trips_and_logs_of_open_unlearning_are_read(world, folder, tmp_path):
    tokenizer, data = facts_tokenizer(), load_unlearning("tofu", path=folder)
    kept = Scripted(tokenizer, world[2:5], 0.6)
    report = unlearning_report(kept, tokenizer, data, max_new_tokens=5)
    path = report.save(tmp_path / "kept")
    for reference in (report, path, tmp_path / "kept", TrustReport.load(path)):
        again = unlearning_report(kept, tokenizer, data, retain_reference=reference, generate=False)
        assert again["forget_quality"].value == 1 and again["privleak"].value == pytest.approx(0, abs=1e-6)
    log = {
        "forget_truth_ratio": {"agg_value": 0.5, "value_by_index": {"0": {"score": 0.0}, "1": {"score": 0.0}}},
        "mia_loss": {"agg_value": 0.5},
    }
    (tmp_path / "log.json").write_text(json.dumps(log))
    knowing = Scripted(tokenizer, world[:5], 0.6)
    found = unlearning_report(knowing, tokenizer, data, retain_reference=tmp_path / "log.json", generate=False)
    assert found["forget_quality"].value == 1 and found["privleak"].value == pytest.approx(-100)
    with pytest.raises(ValueError, match="no such report"):
        unlearning_report(kept, tokenizer, data, retain_reference=tmp_path / "nowhere.json")
    TrustReport("x", "core").save(tmp_path / "other.json")
    with pytest.raises(ValueError, match="not of unlearning"):
        M.read_reference(tmp_path / "other.json")


def test_the_forms_of_muse_and_wmdp(tmp_path):
    write = lambda name, rows: (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    write("raw_forget.jsonl", [{"text": "w1 w2 w3"}])
    write("raw_retain1.jsonl", [{"text": "w4 w5 w6"}])
    write("raw_holdout.jsonl", [{"text": "w7 w8"}])
    write("knowmem_forget_qa.jsonl", [{"question": "genre of author1", "answer": "w1 w2"}])
    write("verbmem_forget.jsonl", [{"prompt": "w1", "gt": "w2 w3"}])
    tokenizer, data = facts_tokenizer(), load_unlearning("muse-news", path=tmp_path)
    assert set(data.others) == {"holdout", "verbmem", "knowmem_forget"}
    model = Scripted(tokenizer, [], 0.5)
    ids = tokenizer("w1 w2 w3")["input_ids"]
    model.known |= {tuple(ids[:1]): ids[1], tuple(ids[:2]): ids[2]}
    model.p = 0.9
    report = unlearning_report(model, tokenizer, data, max_new_tokens=2)
    rows = {row["split"]: row for row in report.rows}
    assert rows["verbmem"]["rouge_l"] == rows["verbmem"]["extraction_strength"] == 1
    assert rows["forget"]["extraction_strength"] == 1 and rows["forget"]["rouge_l"] is None
    write("cyber-forget-corpus.jsonl", [{"text": "w1"}])
    write("cyber-retain-corpus.jsonl", [{"text": "w2"}])
    data = load_unlearning("wmdp-cyber", path=tmp_path)
    assert "wmdp_cyber,mmlu" in unlearning_report(model, tokenizer, data).meta["notes"][0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("toffee", "no unlearning set 'toffee'; known: facts, tofu"),
        ("tofu:forget07", "holds no forget07.jsonl; it has forget10.jsonl"),
        ("tofu:all", "forget='all' has no matching retain split"),
        ("wmdp-bio", "holds no bio-forget-corpus.jsonl"),
    ],
)
def test_data_that_cannot_be_had_are_named(name, words, folder):
    with pytest.raises(ValueError) as error:
        load_unlearning(name, path=folder)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_missing_folder_or_column_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_unlearning("tofu", path="./nowhere")
    rows = Dataset.from_list([{"question": "q", "reply": "a"}])
    for name in ("forget10", "retain90"):
        rows.to_json(tmp_path / f"{name}.jsonl")
    with pytest.raises(ValueError, match="forget split has no column 'answer'; it has question, reply"):
        load_unlearning("tofu", path=tmp_path)
