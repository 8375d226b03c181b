"""Rules of the user, and optimizers without one."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD, RMSprop

import explaind
from explaind.errors import UnknownUpdateRuleError
from explaind.optimizers import RULES
from explaind.reference import filters
from tests.cases import Case, one_group, query
from tests.optimizer_cases import record_case
from tests.test_docs import blocks
from tests.traced import recorded, three_steps
from tests.twin import assert_equals_twin, errors_of_the_twin, other_and_rounding

# ---------------------------------------------------------------------- registered


def lion(updates):
    mean = whole = torch.zeros((), dtype=torch.float64)
    for x in updates:
        beta1, beta2 = x.settings["betas"]
        size = (beta1 * whole + (1 - beta1) * x.whole).abs()
        yield x.settings["lr"] * (beta1 * mean + (1 - beta1) * x.part) / size
        mean, whole = beta2 * mean + (1 - beta2) * x.part, beta2 * whole + (1 - beta2) * x.whole


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """What the documentation's page defines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RULES, "documented.Lion", None)  # put back after the test
    names = {"__name__": "documented"}
    for block in blocks("docs/optimizers.md"):
        exec(compile(block, "docs/optimizers.md", "exec"), names)
    return names


def test_the_documented_rule_of_lion_is_short_and_exact(documented, tmp_path, monkeypatch):
    assert max(len(block.splitlines()) for block in blocks("docs/optimizers.md") if "Rule" in block) < 40
    monkeypatch.setitem(filters.TEXTBOOKS, "Lion", lion)
    case = Case(name="", optimizer=one_group(documented["Lion"], lr=0.02), scheduled=True)
    run = record_case(case, tmp_path / "run.zarr")
    for terms in assert_equals_twin(run):
        assert float(np.abs(terms.other).sum() + np.abs(terms.rounding).sum()) < 1e-12
    assert max(errors_of_the_twin(run)) <= 1e-12


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_a_wrong_rule_shows_in_other(documented, tmp_path):
    class Wrong(documented["LionRule"]):
        def filter(self, step):
            return dataclasses.replace(super().filter(step), intake=0.02)

    explaind.optimizers.register("documented.Lion", Wrong())
    run = record_case(Case(name="", optimizer=one_group(documented["Lion"], lr=0.02)), tmp_path / "run.zarr")
    other, _ = other_and_rounding(run)
    assert other > 1e-3


def test_a_subclass_is_unknown_until_it_is_registered(tmp_path, monkeypatch):
    class Renamed(SGD):
        """Changes nothing."""

    name = f"{__name__}.{Renamed.__qualname__}"
    monkeypatch.setitem(RULES, name, None)
    run = record_case(Case(name="", optimizer=one_group(Renamed, lr=0.1)), tmp_path / "run.zarr")
    with pytest.raises(UnknownUpdateRuleError, match=r"Renamed is not known.*register adds one"):
        run.attribute(query(), by=("query", "example"))
    run.attribute(query(), by=("query", "step", "layer")).check()
    explaind.optimizers.register(Renamed, RULES["torch.optim.sgd.SGD"])
    run.attribute(query(), by=("query", "example")).check()


def test_register_says_what_it_needs():
    rule = RULES["torch.optim.sgd.SGD"]
    for optimizer in (SGD([torch.zeros(1)]), "SGD", nn.Linear):
        with pytest.raises(TypeError, match=r"subclass of torch\.optim\.Optimizer or the full name of one"):
            explaind.optimizers.register(optimizer, rule)
    for wrong in (type(rule), object(), None):
        with pytest.raises(TypeError, match=r"an attribute `buffer` and a method `filter\(step\)`"):
            explaind.optimizers.register(SGD, wrong)


# ---------------------------------------------------------------------- unknown


class Unknown(RMSprop):
    """An optimizer without a rule."""


def test_an_optimizer_without_a_rule_closes_by_step_and_layer(tmp_path):
    run, _ = recorded(tmp_path / "run.zarr", three_steps, optimizer=one_group(Unknown, lr=0.01, momentum=0.5))
    assert run.verify().exact_updates is None
    result = run.attribute(query(), by=("query", "step", "layer"))
    result.check()
    assert np.abs(result.dataset.contribution).min() > 0
    with pytest.raises(UnknownUpdateRuleError, match="by=\\('query', 'step', 'layer'\\) works"):
        run.attribute(query(), by=("query", "example"))


def test_an_unknown_optimizer_is_told_what_works(tmp_path):
    run, _ = recorded(tmp_path / "run.zarr", three_steps, optimizer=one_group(Unknown, lr=0.01))
    message = r"Unknown is not known as a linear filter.*SGD.*AdamW.*by=\('query', 'step', 'layer'\) works"
    with pytest.raises(UnknownUpdateRuleError, match=message):
        run.attribute(query(), by=("example",))
    with pytest.raises(UnknownUpdateRuleError, match=message):
        run.attribute(query(), by=("group",), groups=[0] * 9)
    with pytest.raises(UnknownUpdateRuleError, match=message):
        run.attribute(query(), by=("step",), examples=[0])
