"""The one table of methods. The command line, the docs, the tests and the benchmarks all read it.

What measures instead of training is in a table of its own, [`trl_trust.tools.TOOLS`].

A new method is a row here, a module, and what the tests over this table then ask for: an import for type checkers, a
row in the README, a page, two recipes. This module imports neither torch nor TRL, so that `import trl_trust` and
`trl-trust methods` stay instant.
"""

from dataclasses import dataclass, replace


# What a user may believe about a method's formulas, from strongest to weakest.
GRADES = {
    "exact": "formulas and defaults taken from the authors' own code or the paper's own equations",
    "structure confirmed": "the paper confirms what the method does; details come from third-party code or are ours",
    "adapted": "exact in the setting of its paper, carried over to language models here",
    "reconstruction": "no equation of the paper was available; ours is a reading of what is published about it",
    "inspired": "the paper gives the aim and the outline; items, rules and figures are ours",
}


@dataclass(frozen=True)
class Host:
    """What a method is built on.

    Attributes:
        base: `module:Class`, the trainer that every trainer of this host extends.
        script: module behind `trl-trust NAME`, with `make_parser(method, prog)` and `prepare(words, method)`, which
            reads the words of a command line and returns the training, ready to start.
        arguments: class name, in `script`, of the arguments that stand beside config and model; TRL's own where it is
            `ScriptArguments`.
    """

    base: str
    script: str
    arguments: str = "TrustScriptArguments"


HOSTS = {
    "grpo": Host("trl_trust.policy.base:TrustGRPOTrainer", "trl_trust.script"),
    "frozen": Host(
        "trl_trust.frozen.trainer:FrozenRolloutsTrainer", "trl_trust.distill.rounds", "ERPDScriptArguments"
    ),
    "async": Host(
        "trl.experimental.async_grpo:AsyncGRPOTrainer", "trl_trust.asynchronous.script", "AsyncScriptArguments"
    ),
    "trainer": Host("transformers:Trainer", "trl_trust.unlearn.script", "UnlearnScriptArguments"),
    "flow": Host("transformers:Trainer", "trl_trust.flow.script", "FlowScriptArguments"),
    "sft": Host("trl:SFTTrainer", "trl_trust.robust.script", "ScriptArguments"),
    "reward": Host("trl:RewardTrainer", "trl_trust.robust.script", "ScriptArguments"),
}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        name: What a user types, `trl-trust NAME`.
        title: How the method is written in prose.
        module: Module that holds loss, Config and Trainer.
        trainer: Class name of the trainer in `module`.
        config: Class name of the config in `module`.
        paper: arXiv identifier.
        grade: A key of [`GRADES`].
        summary: What it changes, against its nearest TRL loss, in one line.
        loss: Name of the pure loss function in `module`, exported too; empty where there is none.
        host: A key of [`HOSTS`].
        script: A module in the place of the host's, with the same two functions.
        page: The page `docs/PAGE.md`; the name by default.
        recipes: The folder `recipes/RECIPES/`; the name by default.
        teacher: The field that names a frozen teacher, without which the method cannot run.
        reads: Fields that name functions which read columns of the data.
        asynchronous: "yes" where the term is in TRL's asynchronous trainer too ([`asynchronous`]); else why it cannot
            be, as what follows "because"; empty where nobody has looked.
    """

    name: str
    title: str
    module: str
    trainer: str
    config: str
    paper: str
    grade: str
    summary: str
    loss: str = ""
    host: str = "grpo"
    script: str = ""
    page: str = ""
    recipes: str = ""
    teacher: str = ""
    reads: tuple[str, ...] = ()
    asynchronous: str = ""

    def __post_init__(self):
        for name, default in {"script": HOSTS[self.host].script, "page": self.name, "recipes": self.name}.items():
            if not getattr(self, name):
                object.__setattr__(self, name, default)


METHODS: tuple[Method, ...] = (
    Method(
        name="dispo",
        title="DISPO",
        module="trl_trust.policy.dispo",
        trainer="DISPOTrainer",
        config="DISPOConfig",
        paper="2602.00983",
        grade="structure confirmed",
        summary="REINFORCE weight clipped from both sides, with one band for correct and one for incorrect responses",
        loss="dispo_loss",
        asynchronous="yes",
    ),
    Method(
        name="dppo",
        title="DPPO",
        module="trl_trust.policy.dppo",
        trainer="DPPOTrainer",
        config="DPPOConfig",
        paper="2602.04879",
        grade="exact",
        summary="drops a token when a divergence to the sampling policy, not a ratio, leaves the region",
        loss="dppo_loss",
        asynchronous="yes",
    ),
    Method(
        name="etr",
        title="ETR-style",
        module="trl_trust.policy.etr",
        trainer="ETRTrainer",
        config="ETRConfig",
        paper="2601.03723",
        grade="reconstruction",
        summary="clip widths that grow with a response's advantage, and on demand with the variance of its group",
        loss="etr_loss",
        asynchronous="yes",
    ),
    Method(
        name="dhpo",
        title="DHPO",
        module="trl_trust.policy.dhpo",
        trainer="DHPOTrainer",
        config="DHPOConfig",
        paper="2601.05607",
        grade="structure confirmed",
        summary="mixes GRPO's token ratio and GSPO's sequence ratio, each clipped in its own band, in one surrogate",
        loss="dhpo_loss",
        asynchronous="yes",
    ),
    Method(
        name="mdpo",
        title="MDPO",
        module="trl_trust.policy.mdpo",
        trainer="MDPOTrainer",
        config="MDPOConfig",
        paper="2005.09814",
        grade="adapted",
        summary="no clip: the importance-weighted term minus KL(new || old) / t, with t annealed over the run",
        loss="mdpo_loss",
        asynchronous="yes",
    ),
    Method(
        name="opmd",
        title="OPMD",
        module="trl_trust.policy.opmd",
        trainer="OPMDTrainer",
        config="OPMDConfig",
        paper="2501.12599",
        grade="exact",
        summary="no ratio: regresses tau log(new / old) of a whole response on its reward minus a baseline",
        loss="opmd_loss",
        asynchronous="its action is a whole response, and the loss there is a sum over tokens",
    ),
    Method(
        name="trpa",
        title="TRPA",
        module="trl_trust.policy.trpa",
        trainer="TRPATrainer",
        config="TRPAConfig",
        paper="2504.04524",
        grade="exact",
        summary="a DPO-like loss on pairs of preference levels in place of advantages; a small KL to the old policy",
        loss="trpa_loss",
        reads=("level_fn",),
        asynchronous="it compares whole groups, which are spread over micro-batches there",
    ),
    Method(
        name="alp",
        title="ALP",
        module="trl_trust.policy.alp",
        trainer="ALPTrainer",
        config="ALPConfig",
        paper="2603.19470",
        grade="exact",
        summary="one ratio, from the model with learnable noise at every layer to the sampler; no other correction",
        loss="alp_loss",
        asynchronous="responses share the positions of their prefix there, and so would share its noise",
    ),
    Method(
        name="rlad",
        title="RLAD",
        module="trl_trust.distill.rlad",
        trainer="RLADTrainer",
        config="RLADConfig",
        paper="2602.22495",
        grade="exact",
        summary="the ratio is taken to a mixture of the old policy and a frozen teacher",
        loss="rlad_loss",
        teacher="teacher_model_name_or_path",
        asynchronous="its teacher has no place to score rollouts there",
    ),
    Method(
        name="vpd",
        title="VPD",
        module="trl_trust.distill.vpd",
        trainer="VPDTrainer",
        config="VPDConfig",
        paper="2605.15113",
        grade="exact",
        summary="self-distillation from feedback, whose reading is trained on the outcomes",
        loss="vpd_loss",
        reads=("feedback_func",),
        asynchronous="its teacher has no place to be trained and to score rollouts there",
    ),
    Method(
        name="erpd",
        title="ERPD",
        module="trl_trust.distill.erpd",
        trainer="ERPDTrainer",
        config="ERPDConfig",
        paper="2605.25582",
        grade="reconstruction",
        summary="over-trains a teacher on frozen rollouts, then distils its token signal inside a trust region",
        loss="erpd_student_loss",
        host="frozen",
        asynchronous="it learns from frozen rollouts",
    ),
    Method(
        name="sage",
        title="SAGE-GRPO",
        module="trl_trust.flow.sage",
        trainer="SAGEGRPOTrainer",
        config="SAGEGRPOConfig",
        paper="2603.21872",
        grade="exact",
        summary="GRPO for flow-matching image and video models: less noise a step, even gradients, a moving anchor",
        loss="sage_loss",
        host="flow",
    ),
    Method(
        name="gu",
        title="GU",
        module="trl_trust.unlearn.gu",
        trainer="GUTrainer",
        config="GUConfig",
        paper="2511.17100",
        grade="exact",
        summary="unlearning: takes from each forget update what would move the loss of what is kept, to first order",
        host="trainer",
    ),
    Method(
        name="robust-grpo",
        title="Robust GRPO",
        module="trl_trust.robust.rl",
        trainer="RobustGRPOTrainer",
        config="RobustGRPOConfig",
        paper="2307.16851",
        grade="inspired",
        summary="weighs advantages for the worst group of a named nuisance; rewards like answers to like questions",
        page="robust",
        asynchronous="a generation's groups are never seen together there",
    ),
    Method(
        name="robust-sft",
        title="Robust SFT",
        module="trl_trust.robust.sft",
        trainer="RobustSFTTrainer",
        config="RobustSFTConfig",
        paper="2307.16851",
        grade="inspired",
        summary="SFT that raises the worst group, withstands moved embeddings, or forgets what tells the nuisance",
        host="sft",
        page="robust",
    ),
    Method(
        name="robust-reward",
        title="Robust reward model",
        module="trl_trust.robust.sft",
        trainer="RobustRewardTrainer",
        config="RobustRewardConfig",
        paper="2307.16851",
        grade="inspired",
        summary="the same three terms on the pairs of a reward model",
        host="reward",
        page="robust",
    ),
)


def hosted(*hosts: str) -> list[Method]:
    """The methods of these hosts, in the order of the table."""
    return [method for method in METHODS if method.host in hosts]


def asynchronous(method: Method) -> Method:
    """The row of `method` in TRL's asynchronous trainer, `async-NAME`: the same term, page and provenance."""
    return replace(
        method,
        name=f"async-{method.name}",
        module="trl_trust.asynchronous.trainers",
        trainer=f"Async{method.trainer}",
        config=f"Async{method.config}",
        host="async",
        script=HOSTS["async"].script,
        recipes="async",
    )


ASYNCHRONOUS: tuple[Method, ...] = tuple(asynchronous(method) for method in METHODS if method.asynchronous == "yes")


def get_method(name: str) -> Method:
    """Return the row called `name`, or raise `KeyError` naming the known ones."""
    for method in (*METHODS, *ASYNCHRONOUS):
        if method.name == name:
            return method
    raise KeyError(f"unknown method {name!r}; known methods: {', '.join(m.name for m in METHODS)}")


def why_not_asynchronous(name: str) -> str | None:
    """What to answer who asks for `async-NAME` of a method that is not in TRL's asynchronous trainer, else `None`."""
    for method in METHODS:
        if name == f"async-{method.name}" and method.asynchronous != "yes":
            because = f", because {method.asynchronous}" if method.asynchronous else ""
            others = ", ".join(row.name for row in ASYNCHRONOUS)
            return f"{method.title} is not in TRL's asynchronous trainer{because}; use `{method.name}`, or {others}"
    return None
