"""Which TRL the trainers are written against. Imports nothing heavy; the optimizers need no TRL and do not ask."""

from importlib.metadata import version


TRL_MINORS = ("1.16",)  # for each of these the whole suite has passed


def check_trl(installed: str | None = None) -> None:
    """Refuse a TRL that the trainers were not read against: they re-do what its private methods do.

    Args:
        installed: a version; that of the installed TRL by default.

    Raises:
        ImportError: naming the version and what to install.
    """
    installed = version("trl") if installed is None else installed
    if ".".join(installed.split(".")[:2]) not in TRL_MINORS:
        raise ImportError(
            f"trl=={installed} is installed, and the trainers of trl-trust are written against TRL "
            f"{', '.join(TRL_MINORS)}: pip install 'trl~={TRL_MINORS[-1]}.0' (the optimizers alone, trl_trust.optim, "
            f"need no TRL)"
        )
