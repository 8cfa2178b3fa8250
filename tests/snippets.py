"""Runs code of the docs and of examples/ as it stands, with tiny local things in the place of models and data."""

import re
from pathlib import Path

import datasets
import transformers
import trl.rewards
from datasets import Dataset
from tiny import save_tiny_model
from transformers import AutoTokenizer
from trl import DPOConfig, GRPOConfig, SFTConfig
from trl.chat_template_utils import qwen3_chat_template

from trl_trust.evaluation import TrustEvalCallback
from trl_trust.evaluation import tiny as evaluation_tiny


ROOT = Path(__file__).parent.parent

# Owners of models that code may name: each is replaced by the tiny model.
MODELS = re.compile(r"""(["'])(?:Qwen|open-unlearning|meta-llama)/[\w.\-]+\1""")

# What every config gets, whatever the code says, as far as it has such a field.
SMALL = {
    "use_cpu": True,
    "bf16": False,
    "use_vllm": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "num_generations": 2,
    "num_prompts": 4,
    "max_completion_length": 8,
    "rmu_layer": 1,
}

CHAT = [{"role": "user", "content": "12+30="}]


def rows_of(name: str, config: str = "") -> list[dict] | None:
    """A few rows in the columns of a data set of the Hub that code may name; no two configs share one."""
    tofu = {"answer": "no one", "paraphrased_answer": "none", "perturbed_answer": ["a", "b"]}
    return {
        "trl-lib/DeepMath-103K": [{"prompt": CHAT, "solution": str(i)} for i in range(8)],
        "open-r1/OpenR1-Math-220k": [
            {"problem": CHAT, "solution": str(i), "problem_type": "Algebra" if i % 2 else "Geometry"} for i in range(8)
        ],
        "trl-lib/Capybara": [{"messages": [*CHAT, {"role": "assistant", "content": f"4{i}"}]} for i in range(8)],
        "HuggingFaceTB/smoltalk": [
            {"messages": [*CHAT, {"role": "assistant", "content": f"4{i}"}], "source": "ab"[i % 2]} for i in range(8)
        ],
        "locuslab/TOFU": [{"question": f"who is {config} {i}", **tofu} for i in range(8)],
    }.get(name)


def tiny_model(path, tools: bool = False, letters: bool = False) -> str:
    """A tiny model; with `tools`, one whose template knows them; with `letters`, one that writes more than sums."""
    if letters:
        tokenizer = evaluation_tiny.build_tokenizer()
        evaluation_tiny.build_model(tokenizer, hidden_size=16, layers=1, heads=2).save_pretrained(path)
        tokenizer.save_pretrained(path)
        return str(path)
    save_tiny_model(path)
    if tools:
        tokenizer = AutoTokenizer.from_pretrained(path)
        tokenizer.chat_template = qwen3_chat_template
        tokenizer.save_pretrained(path)
    return str(path)


def load_dataset(path, *args, **kwargs):
    """In the place of `datasets.load_dataset`: files as they are, a data set of the Hub by some rows."""
    rows = rows_of(path, *args[:1])
    return REAL_LOAD(path, *args, **kwargs) if rows is None else Dataset.from_list(rows)


REAL_LOAD = datasets.load_dataset


def shrink(monkeypatch) -> None:
    """Make every config small, every data set of the Hub a few rows, every evaluation short and soon."""
    import trl_trust.unlearn.data
    from trl_trust import ERPDConfig, RolloutsConfig
    from trl_trust.unlearn.gu import GUConfig

    for config in (GRPOConfig, SFTConfig, DPOConfig, ERPDConfig, RolloutsConfig, GUConfig):
        monkeypatch.setattr(config, "__post_init__", small_first(config.__post_init__))
    monkeypatch.setattr(TrustEvalCallback, "__init__", small_after(TrustEvalCallback.__init__))
    for module in (datasets, trl_trust.unlearn.data):
        monkeypatch.setattr(module, "load_dataset", load_dataset)
    monkeypatch.setattr(trl.rewards, "accuracy_reward", some_reward)
    monkeypatch.setattr(transformers.trainer_callback.PrinterCallback, "on_log", lambda *args, **kwargs: None)


def some_reward(completions, **kwargs):
    """In the place of TRL's `accuracy_reward`, which an untrained model does not earn: half of the responses do."""
    return [float(i % 2) for i in range(len(completions))]


def small_first(post_init):
    def wrapper(self):
        for name, value in SMALL.items():
            if hasattr(self, name):
                setattr(self, name, value)
        post_init(self)

    return wrapper


def small_after(init):
    def wrapper(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.every_n_steps, self.suite.n_per_dim, self.suite.max_new_tokens = 2, 8, 8

    return wrapper


def run_code(source: str, model: str, namespace: dict) -> dict:
    """Execute `source` with the tiny model's path for every model that it names."""
    exec(compile(MODELS.sub(repr(model), source), "<snippet>", "exec"), namespace)
    return namespace
