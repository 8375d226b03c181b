"""Which optimizers' updates are known as linear filters; one file per family, and `register` for more."""

from __future__ import annotations

from torch.optim import Optimizer

from explaind.optimizers.adafactor import AdafactorRule
from explaind.optimizers.adagrad import AdadeltaRule, AdagradRule, RMSpropRule
from explaind.optimizers.adam import AdamaxRule, AdamRule, NAdamRule, RAdamRule
from explaind.optimizers.muon import MuonRule
from explaind.optimizers.rprop import RpropRule
from explaind.optimizers.rule import LinearFilter, ParameterStep, UpdateRule
from explaind.optimizers.sgd import ASGDRule, SGDRule
from explaind.optimizers.sparse_adam import SparseAdamRule

__all__ = ["RULES", "LinearFilter", "ParameterStep", "UpdateRule", "full_name", "register"]

RULES: dict[str, UpdateRule] = {
    "torch.optim.sgd.SGD": SGDRule(),
    "torch.optim.asgd.ASGD": ASGDRule(),
    "torch.optim.adam.Adam": AdamRule(decoupled=False),
    "torch.optim.adamw.AdamW": AdamRule(decoupled=True),
    "torch.optim.nadam.NAdam": NAdamRule(),
    "torch.optim.radam.RAdam": RAdamRule(),
    "torch.optim.adamax.Adamax": AdamaxRule(),
    "torch.optim.sparse_adam.SparseAdam": SparseAdamRule(),
    "torch.optim.adagrad.Adagrad": AdagradRule(),
    "torch.optim.adadelta.Adadelta": AdadeltaRule(),
    "torch.optim.rmsprop.RMSprop": RMSpropRule(),
    "torch.optim.rprop.Rprop": RpropRule(),
    "torch.optim.Adafactor": AdafactorRule(),
    "torch.optim.Muon": MuonRule(),
}
"""Update rules by the optimizer class's full name, as recorded."""


def full_name(optimizer_class: type[Optimizer]) -> str:
    """Module and name of an optimizer class, as a store has it, such as `"torch.optim.sgd.SGD"`."""
    return f"{optimizer_class.__module__}.{optimizer_class.__qualname__}"


def register(optimizer: type[Optimizer] | str, rule: UpdateRule) -> None:
    """Make the update of an optimizer known, for every run that is opened from now on.

    A rule need not be trusted: what the recorded steps do beyond it is measured, and is in the terms `other` and
    `rounding`. A rule that is there already is replaced.

    Args:
        optimizer: the class, or its full name as a store has it.
        rule: gives the linear filter of a step.

    Raises:
        TypeError: not an optimizer class or a full name, or not a rule.

    Example: a rule of torch, for a subclass that changes nothing in the update.
        >>> class Logging(torch.optim.SGD): ...
        >>> register(Logging, RULES["torch.optim.sgd.SGD"])
    """
    if isinstance(optimizer, type) and issubclass(optimizer, Optimizer):
        optimizer = full_name(optimizer)
    if not isinstance(optimizer, str) or "." not in optimizer:
        raise TypeError(
            "optimizer must be a subclass of torch.optim.Optimizer or the full name of one, such as "
            f"'torch.optim.sgd.SGD'; got {optimizer!r}."
        )
    if isinstance(rule, type) or not callable(getattr(rule, "filter", None)) or not hasattr(rule, "buffer"):
        raise TypeError(
            f"rule must be an instance with an attribute `buffer` and a method `filter(step)`, see "
            f"explaind.optimizers.UpdateRule; got {rule!r}."
        )
    RULES[optimizer] = rule
