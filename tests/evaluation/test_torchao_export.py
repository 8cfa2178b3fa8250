"""The checkpoint in torchao's form: loaded again, it is what `compressed` measures."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_trust.cli import main
from trl_trust.evaluation import tiny
from trl_trust.evaluation.compression import compressed
from trl_trust.evaluation.torchao import save_torchao


@pytest.fixture(scope="module")
def policy():
    tokenizer = tiny.build_tokenizer()
    return tiny.build_model(tokenizer, hidden_size=32, layers=1, heads=2).eval(), tokenizer


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_loaded_has_the_logits_of_compressed(bits, policy, tmp_path):
    model, tokenizer = policy
    before = {key: value.clone() for key, value in model.state_dict().items()}
    save_torchao(model, tokenizer, tmp_path / "small", bits=bits, group_size=16)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32)
    assert type(loaded.model.layers[0].mlp.up_proj.weight).__module__.startswith("torchao")
    ids = AutoTokenizer.from_pretrained(tmp_path / "small")("Bas 42; Tell Bas?", return_tensors="pt")["input_ids"]
    with torch.no_grad(), compressed(model, f"rtn{bits}", group_size=16):
        expected = model(ids).logits
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, expected)
        assert not torch.equal(model(ids).logits, expected)


def test_from_the_command_line(policy, tmp_path, capsys):
    model, tokenizer = policy
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    words = ["compress", "--model", str(tmp_path / "dense"), "--out", str(tmp_path / "small"), "--group_size", "32"]
    assert main([*words, "--export", "torchao:int8"], launch=False) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").config.quantization_config is not None


FRESH = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = AutoTokenizer.from_pretrained(sys.argv[1])("Bas 42; Tell Bas?", return_tensors="pt")["input_ids"]
print(model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None)[0].tolist())
"""


def test_a_fresh_process_says_the_same_tokens_as_compressed(policy, tmp_path):
    model, tokenizer = policy
    folder = save_torchao(model, tokenizer, tmp_path / "small", bits=4, group_size=16)
    said = subprocess.run([sys.executable, "-c", FRESH, str(folder)], capture_output=True, text=True, timeout=240)
    assert said.returncode == 0, said.stderr[-2000:]
    ids = tokenizer("Bas 42; Tell Bas?", return_tensors="pt")["input_ids"]
    with compressed(model, "rtn4", group_size=16):
        expected = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None)[0].tolist()
    assert said.stdout.strip().splitlines()[-1] == str(expected)
    assert len(expected) == ids.shape[1] + 16


def test_what_cannot_be_exported(policy, tmp_path):
    with pytest.raises(ValueError, match="group_size=24 does not divide the 32 inputs of .*such as 32"):
        save_torchao(*policy, tmp_path, group_size=24)
    from trl_trust.evaluation.torchao import bits_of

    with pytest.raises(ValueError, match="'torchao:int3' is unknown"):
        bits_of("torchao:int3")
