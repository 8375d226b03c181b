"""Queries in as many sweeps as a budget of memory asks for."""

import pytest
import torch
import xarray as xr
from torch import nn
from torch.optim import AdamW

import explaind
from explaind import decomposition, memory
from explaind.errors import ResultTooLargeError
from explaind.optimizers import RULES
from explaind.optimizers.adam import AdamRule
from explaind.path import queries
from explaind.path.sweep import Sweep
from explaind.request import check_request
from tests.benchmarks.timing import in_own_process, peak_memory
from tests.cases import CASES, query, record

FULL = ("query", "example", "step", "parameter")
RULE = explaind.quadrature.gauss_legendre(2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(CASES[1], tmp_path_factory.mktemp("run") / "run.zarr")[0]


def budget_for(run, asked, num_queries, **arguments):
    """Bytes that hold so many queries and no more."""
    return memory.working_set(check_request(run, asked, **arguments)).peak(num_queries)


def sweeps(monkeypatch):
    made = []

    class Counted(Sweep):
        def __init__(self, run, function, **arguments):
            made.append(function)
            super().__init__(run, function, **arguments)

    monkeypatch.setattr(decomposition, "Sweep", Counted)
    return made


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 7])
@pytest.mark.parametrize(
    "arguments",
    [
        {"by": FULL},
        {"by": ("query", "step", "layer")},
        {"by": ("query", "example", "update_step")},
        {"by": ("query", "example", "step"), "average": explaind.averages.ema(0.5)},
        {"by": ("query", "example"), "steps": [2, 4], "layers": ["2"]},
    ],
    ids=str,
)
def test_several_sweeps_give_what_one_gives(run, arguments, at_once, tmp_path, monkeypatch):
    asked = query(num=7)
    expected = run.attribute(asked, quadrature=RULE, **arguments)
    budget = budget_for(run, asked, at_once, **arguments)
    made = sweeps(monkeypatch)
    found = run.attribute(asked, quadrature=RULE, memory=budget, **arguments)
    most = max(function.num_queries for function in made)
    assert most <= at_once
    assert len(made) == -(-7 // most) == -(-7 // at_once)
    xr.testing.assert_allclose(found.dataset, expected.dataset, rtol=1e-11, atol=1e-13)
    out = tmp_path / "result.zarr"
    budget = budget_for(run, asked, at_once, out=out, **arguments)
    stored = run.attribute(asked, quadrature=RULE, memory=budget, out=out, **arguments)
    xr.testing.assert_identical(stored.dataset.load(), found.dataset)


def test_means_are_divided_with_their_inputs(run, monkeypatch):
    asked = query(num=6).mean(by_class=[0, 1, 2, 0, 1, 2])
    expected = run.attribute(asked, by=FULL, quadrature=RULE)
    made = sweeps(monkeypatch)
    found = run.attribute(asked, by=FULL, quadrature=RULE, memory=budget_for(run, asked, 1, by=FULL))
    assert [function.names for function in made] == [(0,), (1,), (2,)]
    xr.testing.assert_allclose(found.dataset, expected.dataset, rtol=1e-11, atol=1e-13)


def test_functions_of_the_whole_output_are_divided_too(run, monkeypatch):
    own = explaind.Query(query().inputs, output=lambda out: (out - out.mean(dim=0)).square().sum(dim=1))
    expected = run.attribute(own, by=FULL, quadrature=RULE)
    made = sweeps(monkeypatch)
    found = run.attribute(own, by=FULL, quadrature=RULE, memory=budget_for(run, own, 1, by=FULL))
    assert len(made) == 3
    xr.testing.assert_allclose(found.dataset, expected.dataset, rtol=1e-11, atol=1e-13)


def test_queries_are_chunked_as_they_are_divided(run, tmp_path, monkeypatch):
    monkeypatch.setattr("explaind.stream.CHUNK_BYTES", 2 * 9 * 4 * 8)  # two queries
    asked, out = query(num=7), tmp_path / "result.zarr"
    made = sweeps(monkeypatch)
    budget = budget_for(run, asked, 5, by=FULL, out=out)
    stored = run.attribute(asked, by=FULL, quadrature=RULE, memory=budget, out=out)
    assert [function.num_queries for function in made] == [4, 3]
    assert stored.dataset.contribution.encoding["chunks"] == (2, 9, 1, 4)
    assert stored.closure.error <= 1e-12


def test_a_query_that_does_not_fit_says_what_it_needs(run):
    with pytest.raises(ResultTooLargeError, match=r"a single query works in .* MiB, memory= allows 0 MiB"):
        run.attribute(query(), by=FULL, memory=10_000)
    with pytest.raises(ValueError, match="memory is a number of bytes, such as 2 << 30 for 2 GiB; got '2GB'"):
        run.attribute(query(), by=FULL, memory="2GB")


WIDTH, ROWS, QUERIES = 512, 256, 32
BY = ("query", "example", "step", "layer")


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(64, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 10)]
    return nn.Sequential(*layers)


def kinked_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))


def recorded(path, steps, model):
    optimizer = AdamW(model.parameters(), lr=1e-3)
    inputs, labels = torch.randn(ROWS, 64), torch.arange(ROWS) % 10
    with explaind.trace(model, optimizer, path) as recorder:
        for _ in range(steps):
            recorder.examples(range(ROWS))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()


def measured(path, num_queries, budget):
    """Peak above the result's own bytes, the estimate of it, and the number of sweeps."""
    torch.set_num_threads(1)
    run = explaind.open_run(path, model=network())
    asked = explaind.Query(torch.randn(num_queries, 64), output=explaind.outputs.logit([0] * num_queries))
    run.attribute(explaind.Query(torch.randn(1, 64), output=explaind.outputs.logit([0])), by=BY, quadrature=RULE)
    needed = memory.working_set(check_request(run, asked, by=BY, memory=budget))
    above, result = peak_memory(lambda: run.attribute(asked, by=BY, quadrature=RULE, memory=budget))
    at_once = needed.most_queries(check_request(run, asked, by=BY, memory=budget).memory, num_queries)
    return above - result.dataset.nbytes, needed.peak(at_once), at_once


def test_what_a_registered_rule_may_keep_is_counted(tmp_path, monkeypatch):
    recorded(tmp_path / "run.zarr", 2, network())
    asked = explaind.Query(torch.randn(3, 64), output=explaind.outputs.logit([0] * 3))
    sizes = []
    for rule in (AdamRule, type("OwnRule", (AdamRule,), {"__module__": __name__})):
        monkeypatch.setitem(RULES, "torch.optim.adamw.AdamW", rule(decoupled=True))
        run = explaind.open_run(tmp_path / "run.zarr", model=network())
        sizes.append(budget_for(run, asked, 3, by=("query", "step", "layer")))
    assert sizes[1] - sizes[0] == 3 * 2 * 4 * run.table.num_elements


def test_what_is_used_is_what_was_estimated_and_stays_within_the_budget(tmp_path):
    path, budget = tmp_path / "run.zarr", 200 << 20
    recorded(path, 3, network())
    used, estimated, at_once = in_own_process(measured, path, 64, None)
    assert at_once == 64
    assert estimated / 1.5 < used < 1.5 * estimated
    assert used > 1.5 * budget
    used, estimated, at_once = in_own_process(measured, path, 64, budget)
    assert at_once < 64
    assert estimated / 1.5 < used < 1.2 * budget


def measured_mean(path, budget):
    """Peak of a mean over many inputs, and what every step and layer did to it."""
    torch.set_num_threads(1)
    queries._HOST_BYTES = budget
    run = explaind.open_run(path, model=kinked_network())
    torch.manual_seed(1)
    number, arguments = 20_000, {"by": BY, "quadrature": explaind.quadrature.adaptive(max_depth=1)}
    asked = explaind.Query(torch.randn(number, 64), output=explaind.outputs.log_prob(torch.arange(number) % 10))
    run.attribute(explaind.Query(torch.randn(2, 64), output=explaind.outputs.logit([0, 1])).mean(), **arguments)
    above, result = peak_memory(lambda: run.attribute(asked.mean(), memory=budget, **arguments))
    return above - result.dataset.nbytes, result.dataset.load()


def test_a_mean_over_many_inputs_stays_within_the_budget(tmp_path):
    path, budget = tmp_path / "run.zarr", 200 << 20
    recorded(path, 2, kinked_network())
    unblocked, expected = in_own_process(measured_mean, path, 32 << 30)
    blocked, found = in_own_process(measured_mean, path, budget)
    assert unblocked > 2 * budget
    assert blocked < budget
    xr.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
