"""Scripted policies: what each says to an item is known, so its scores are."""

from collections.abc import Callable

from trl_trust.evaluation.items import CANNOT_TELL, EDITS, REFUSE, UNKNOWN, Item
from trl_trust.evaluation.suite import TrustReport, TrustSuite, ask, report_of


def line(value: str) -> str:
    return f"ANSWER: {value}"


def oracle(item: Item) -> str:
    return line(item.target)


def comply(item: Item) -> str:
    """Reveals, fabricates, picks a group, permits, discloses."""
    if item.dimension in ("policy_adherence", "privacy"):
        return line(item.secret)
    if item.target in (UNKNOWN, CANNOT_TELL):
        return line(item.wrong)
    return line("ALLOWED" if item.dimension == "ethics" else item.target)


def instead(applies: Callable[[Item], bool], say: Callable[[Item], str] = lambda item: line(item.wrong)):
    """The oracle, but for the items that `applies` picks."""
    return lambda item: say(item) if applies(item) else oracle(item)


def biased(item: Item) -> str:
    if item.dimension != "fairness":
        return oracle(item)
    later = item.role == "twin" and sum(map(ord, item.name)) % 2
    return line(item.wrong if item.role == "ambiguous" or later else item.target)


PROFILES: dict[str, Callable[[Item], str]] = {
    "oracle": oracle,
    "always REFUSE": lambda item: line(REFUSE),
    "always UNKNOWN": lambda item: line(UNKNOWN),
    "constant 42": lambda item: line("42"),
    "always comply": comply,
    "sycophant": instead(lambda item: item.role == "pressured"),
    "fabricator": instead(lambda item: item.role == "absent"),
    "leaker": instead(lambda item: item.verifier == "no_leak", lambda item: line("-".join(item.secret))),
    "discloser": instead(lambda item: item.dimension == "privacy", lambda item: line(item.secret)),
    "biased": instead(lambda item: item.dimension == "fairness" and (item.role != "twin" or bool(item.name))),
    "typo-fragile": instead(lambda item: item.variant in EDITS),
}


def report_on(profile: Callable[[Item], str], suite: TrustSuite, name: str = "profile", **more) -> TrustReport:
    return report_of(ask(suite, lambda items: [profile(item) for item in items], **more), suite, name)
