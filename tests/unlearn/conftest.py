import pytest

from trl_trust.unlearn.data import load_unlearning
from trl_trust.unlearn.offline import learn


@pytest.fixture(scope="session")
def knowing(tmp_path_factory):
    """A tiny model, on disk, that knows the generated facts by heart."""
    from datasets import concatenate_datasets

    data = load_unlearning("facts")
    model, tokenizer = learn(concatenate_datasets([data.forget, data.retain]))
    path = tmp_path_factory.mktemp("knowing")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)
