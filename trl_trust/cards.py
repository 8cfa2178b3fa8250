"""What the model card of every trainer here says beyond TRL's: provenance, settings, the version of this package."""

import shutil
from importlib.metadata import version
from pathlib import Path

from .methods import GRADES, METHODS
from .plot import RECIPE_FILE
from .settings import Settings


def paper(title: str, arxiv: str, authors: str = "") -> dict[str, str]:
    """The `_paper` of a trainer, from which TRL writes the model card.

    Args:
        title: of the paper.
        arxiv: its identifier.
        authors: as BibTeX has them, `Ada Lovelace and Charles Babbage`.
    """
    key, year = "".join(c for c in title.split(":")[0].lower() if c.isalnum()), f"20{arxiv[:2]}"
    entries = {"title": f"{{{title}}}", "author": authors, "year": year, "eprint": f"arXiv:{arxiv}"}
    body = "".join(f"    {name:6} = {{{value}}},\n" for name, value in entries.items() if value)
    return {"title": title, "id": arxiv, "citation": f"@misc{{{key},\n{body}}}"}


class TrustCard:
    """Mixin before a trainer of TRL: its model card tells provenance and settings, and is written with every model."""

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)  # TRL 1.16 writes README.md to `args.output_dir`
        if self.is_world_process_zero():
            card = Path(self.args.output_dir, "README.md")
            card.write_text(extended(card.read_text("utf-8"), self), "utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if _internal_call:  # a checkpoint, or a push, each of which writes the card by itself
            return
        own = Path(self.args.output_dir)
        folder = own if output_dir is None else Path(output_dir)
        self.create_model_card(model_name=(self.args.hub_model_id or folder.resolve().name).split("/")[-1])
        if self.is_world_process_zero() and folder.resolve() != own.resolve():
            shutil.copyfile(own / "README.md", folder / "README.md")


def extended(text: str, trainer) -> str:
    """The text of TRL's card with what this package has to say about `trainer`."""
    ours = f"- trl-trust: {version('trl-trust')}"
    text = text.replace("\n- TRL: ", f"\n{ours}\n- TRL: ", 1)
    method = next((row for row in METHODS if row.paper == trainer._paper.get("id")), None)
    said = []
    if method is not None:
        page = f"a {method.grade}" if method.grade == "reconstruction" else method.grade
        said.append(f"Provenance of this implementation of {method.title}: **{page}**; {GRADES[method.grade]}.")
    if settings := method_settings(trainer.args):
        rows = "".join(f"| `{name}` | {value!r} |\n" for name, value in settings.items())
        said.append(f"### Settings of {trainer._name}\n\n| setting | value |\n|---|---|\n{rows.rstrip()}")
    if Path(trainer.args.output_dir, RECIPE_FILE).exists():
        said.append(f"All settings that were not at their defaults: [{RECIPE_FILE}]({RECIPE_FILE}).")
    heading = "### Framework versions"
    before, found, after = text.partition(heading)
    return "\n\n".join([before.rstrip(), *said, f"{found}{after}"]) if found else "\n\n".join([text.rstrip(), *said])


def method_settings(args) -> dict:
    """The settings that this package adds to TRL's config; those of the step control only where it is on."""
    if not isinstance(args, Settings):
        return {}
    off = getattr(args, "step_control", None) == "none"
    control = ("step_control", "target_kl", "max_kl", "step_scale_")
    return {name: getattr(args, name) for name in args.stated if not (off and name.startswith(control))}
