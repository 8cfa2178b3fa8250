import os


# Set before torch and the Hub client are imported. One thread a test worker is enough to keep two cores busy.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings
from tiny import save_tiny_model


settings.register_profile("ci", deadline=None, max_examples=40, print_blob=True)
settings.load_profile("ci")
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory):
    """Folder of an untrained Qwen2 of hidden size 16 with its tokenizer: a model id for any trainer."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))
