"""The asynchronous trainers and their configs, each made of its method's row in the table."""

from importlib import import_module

from ..methods import get_method
from ..policy.mdpo import annealed_step_size
from .base import AsyncTrustGRPOTrainer
from .config import asynchronous_config


AsyncDISPOConfig = asynchronous_config("dispo")
AsyncDPPOConfig = asynchronous_config("dppo")
AsyncETRConfig = asynchronous_config("etr")
AsyncDHPOConfig = asynchronous_config("dhpo")
AsyncMDPOConfig = asynchronous_config("mdpo")


def asynchronous_trainer(config: type, **members) -> type[AsyncTrustGRPOTrainer]:
    """The trainer of a method in [`AsyncGRPOTrainer`]'s place: its pure loss, named as its synchronous trainer is."""
    method = get_method(config.method)
    module = import_module(method.module)
    synchronous = getattr(module, method.trainer)
    members |= {
        "__doc__": f"[`AsyncTrustGRPOTrainer`] with the policy term of [`{method.trainer}`], [`{method.loss}`] (arXiv "
        f"{method.paper}). `args` is an [`{config.__name__}`], or an `AsyncGRPOConfig` for the defaults.",
        "__module__": __name__,
        "config_class": config,
        "loss": staticmethod(getattr(module, method.loss)),
        "_name": f"Async{synchronous._name}",
        "_tag_names": [*synchronous._tag_names, "async-grpo"],
        "_paper": synchronous._paper,
    }
    return type(f"Async{method.trainer}", (AsyncTrustGRPOTrainer,), members)


def annealed(self, loss) -> dict:
    """The settings of MDPO's loss with the step size of now; an iteration is one weight version."""
    args, found = self.args, AsyncTrustGRPOTrainer.settings(self, loss)
    if args.step_size_schedule == "linear":
        k, iterations = (n // args.weight_sync_steps for n in (self.state.global_step, self.state.max_steps))
        found["step_size"] = annealed_step_size(k, max(iterations, 1), args.step_size, args.step_size_min)
    return found


AsyncDISPOTrainer = asynchronous_trainer(AsyncDISPOConfig)
AsyncDPPOTrainer = asynchronous_trainer(AsyncDPPOConfig)
AsyncETRTrainer = asynchronous_trainer(AsyncETRConfig)
AsyncDHPOTrainer = asynchronous_trainer(AsyncDHPOConfig)
AsyncMDPOTrainer = asynchronous_trainer(AsyncMDPOConfig, settings=annealed)
