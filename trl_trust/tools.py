"""The table of what measures, builds and reports, beside the table of what trains ([`trl_trust.methods.METHODS`]).

A new tool is a row here and a module with `main(words) -> int`, the exit status. `trl-trust COMMAND ...` calls it
with the words after COMMAND and tells a `ValueError`, `OSError` or `ImportError` from it in one line. The module is
imported only then; `main` should parse its words before it imports torch, so that help and mistakes are answered at
once.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """One row of the table.

    Attributes:
        name: Of the tool; `docs/NAME.md` is its page.
        title: How it is written in prose.
        module: Module with `main(words) -> int`.
        paper: arXiv identifier; empty where there is none.
        grade: A key of [`trl_trust.methods.GRADES`].
        summary: What it does, in one line.
        commands: What a user may type after `trl-trust`, such as `"geometry build"`; the first word, one for all of
            them, leads to `main`, which gets the rest.
        extra: The extra of the package that it needs, `pip install trl-trust[EXTRA]`.
        recipes: The folder `recipes/RECIPES/`; empty where it has none.
        page: The page `docs/PAGE.md`; the name by default.
    """

    name: str
    title: str
    module: str
    paper: str
    grade: str
    summary: str
    commands: tuple[str, ...]
    extra: str = ""
    recipes: str = ""
    page: str = ""

    def __post_init__(self):
        if not self.page:
            object.__setattr__(self, "page", self.name)

    @property
    def command(self) -> str:
        """The word after `trl-trust`."""
        return self.commands[0].split()[0]


TOOLS: tuple[Tool, ...] = (
    Tool(
        name="coopetition",
        title="Coopetition",
        module="trl_trust.tasks.coopetition.command",
        paper="2510.24909",
        grade="exact",
        summary="A game with a partner that trusts and remembers, as TRL environment; published figures; i* models",
        commands=(
            "coopetition reproduce",
            "coopetition sweep",
            "coopetition play",
            "coopetition istar",
            "coopetition data",
            "coopetition start",
        ),
        extra="plot",
        recipes="coopetition",
    ),
    Tool(
        name="geometry",
        title="Geometry",
        module="trl_trust.tasks.geometry.command",
        paper="2504.15780",
        grade="inspired",
        summary="Plane geometry by seed: proved answers, exact and step rewards, an independent checker",
        commands=("geometry build", "geometry verify", "geometry show", "geometry eval"),
        recipes="geometry",
    ),
    Tool(
        name="unlearn-eval",
        title="Unlearning report",
        module="trl_trust.unlearn.report",
        paper="2511.17100",
        grade="exact",
        summary="What a model still knows and what it kept: open-unlearning's metrics on TOFU, MUSE and WMDP",
        commands=("unlearn-eval",),
        extra="eval",
        page="gu",
    ),
    Tool(
        name="evaluation",
        title="Trust evaluation",
        module="trl_trust.evaluation.command",
        paper="2502.14296",
        grade="inspired",
        summary="Nine trust dimensions on fresh items, exact verdicts, intervals; a callback, rewards, gates",
        commands=("eval",),
        recipes="eval",
        page="trusteval",
    ),
    Tool(
        name="compression",
        title="Compression report",
        module="trl_trust.evaluation.compress",
        paper="2403.15447",
        grade="inspired",
        summary="What quantizing or pruning does to a policy: KL, TV, ratios, scores, and a verdict a method",
        commands=("compress",),
        recipes="compression",
    ),
    Tool(
        name="ladder",
        title="Ladder",
        module="trl_trust.robust.ladder",
        paper="2307.16851",
        grade="inspired",
        summary="On which rung a gap between groups stands: association, adjusted for covariates, between siblings",
        commands=("ladder",),
        page="robust",
    ),
)
