"""The model card: what the promise says about a method stands on every model that it made."""

from importlib import import_module
from importlib.metadata import version

import pytest
from tiny import tiny_config, tiny_trainer

from trl_trust import DISPOConfig, DISPOTrainer, ETRConfig, ETRTrainer, TrustGRPOConfig, TrustGRPOTrainer
from trl_trust.cards import paper
from trl_trust.methods import METHODS


def card_of(folder) -> str:
    return (folder / "README.md").read_text()


def test_a_saved_model_has_a_card_with_provenance_settings_and_authors(tiny_model_path, tmp_path):
    config = tiny_config(DISPOConfig, tmp_path / "out", epsilon_pos_low=0.25, step_control="none")
    trainer = tiny_trainer(DISPOTrainer, tiny_model_path, config)
    trainer.save_model()
    card = card_of(tmp_path / "out")
    assert card.count("DISPO: Enhancing") == 2 and "2602.00983" in card and "author = {Batuhan K. Karaman and" in card
    assert "Provenance of this implementation of DISPO: **structure confirmed**; the paper confirms what" in card
    assert "| `epsilon_pos_low` | 0.25 |" in card and "step_control" not in card
    assert f"### Framework versions\n\n- trl-trust: {version('trl-trust')}\n- TRL: " in card
    assert "trl_trust_recipe.yaml" not in card
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert "# Model Card for elsewhere" in card_of(tmp_path / "elsewhere")


def test_a_reconstruction_says_so_and_a_recipe_is_named(tiny_model_path, tmp_path):
    config = tiny_config(ETRConfig, tmp_path, step_control="kl", target_kl=0.002)
    (tmp_path / "trl_trust_recipe.yaml").write_text("seed: 0\n")
    trainer = tiny_trainer(ETRTrainer, tiny_model_path, config)
    trainer.create_model_card(model_name="x")
    card = card_of(tmp_path)
    assert "Provenance of this implementation of ETR-style: **a reconstruction**; no equation of the paper" in card
    assert "| `step_control` | 'kl' |" in card and "| `target_kl` | 0.002 |" in card
    assert "[trl_trust_recipe.yaml](trl_trust_recipe.yaml)" in card


def test_stock_grpo_has_no_provenance_of_ours(tiny_model_path, tmp_path):
    trainer = tiny_trainer(TrustGRPOTrainer, tiny_model_path, tiny_config(TrustGRPOConfig, tmp_path))
    trainer.save_model()
    assert "Provenance" not in card_of(tmp_path) and "- trl-trust: " in card_of(tmp_path)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_every_citation_names_authors(method):
    citation = getattr(import_module(method.module), method.trainer)._paper["citation"]
    assert "    author = {" in citation and f"arXiv:{method.paper}" in citation


def test_the_form_of_a_citation():
    assert paper("A: B", "2401.00001", "X Y and Z W")["citation"] == (
        "@misc{a,\n    title  = {{A: B}},\n    author = {X Y and Z W},\n    year   = {2024},\n"
        "    eprint = {arXiv:2401.00001},\n}"
    )
    assert "author" not in paper("A", "2401.00001")["citation"]
