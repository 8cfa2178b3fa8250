"""Every method: two processes x accumulation 2 train like one process x accumulation 4."""

import layouts
import pytest
import torch
from tiny import on_two_processes
from transformers import AutoModelForCausalLM


NAMES = layouts.everything()


@pytest.fixture(scope="module")
def two_processes(tiny_model_path, tmp_path_factory):
    """Parameters after training on two gloo processes, by method and rank: one launch for all methods."""
    out = tmp_path_factory.mktemp("two-processes")
    on_two_processes(layouts.__file__, out, tiny_model_path, *NAMES, timeout=540)
    return {(name, rank): torch.load(out / f"{name}-{rank}.pt") for name in NAMES for rank in (0, 1)}


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_train_like_one(name, two_processes, tiny_model_path, tmp_path):
    single = layouts.run(name, tiny_model_path, tmp_path, processes=1)
    begin = dict(AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32).named_parameters())
    for key, parameter in single.items():
        torch.testing.assert_close(two_processes[name, 0][key], two_processes[name, 1][key], rtol=0, atol=0)
        torch.testing.assert_close(two_processes[name, 0][key], parameter, rtol=1e-4, atol=2e-6)
    moved = max((parameter - begin[key]).abs().max().item() for key, parameter in single.items())
    assert moved > 1e-3  # or the test would hold for a method that does nothing
