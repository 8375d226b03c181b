"""The page of all results, written from the JSON alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.plots import exponents

__all__ = ["PAGE", "PICTURES", "page", "verdict"]

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
PICTURES = PAGE.with_suffix("")

_INTRODUCTION = """\
# What it costs

`python -m tests.benchmarks` measures everything below, `python -m tests.benchmarks NAME …` some of it, into
`tests/benchmarks/results.json`; `python -m tests.benchmarks plots` writes this page and its pictures from that file.

The unit **t** is one training step of the same model on the same batch, untraced (zero_grad, forward, loss, backward,
step), on one thread. It takes turns with what is measured; a value is the median of the rounds' quotients, and if there
are several, in parentheses the least and the most. *must* and *stretch* are this project's own goals. *nodes per step*
are the gradient evaluations per query and step that the wanted accuracy took, *error per step* is the mean quadrature
error of a query and step, in nats. *gradients alone* is what the same gradients would take if each were one plain
forward and backward pass, all queries at once, and one pass of the batch where examples are asked for: no bookkeeping,
no products, no certificate. A goal below it cannot be reached with that many nodes. On MOD-113 each query and step is
allowed 4.7 millionths, a ten-thousandth of the path of a short run (41 nats in 875 steps; others took 135 in 1,495); of
100 queries at most 1.4 millionths must come out on average, which in the 1,068 steps of the paper's run add up to the
error of 100 midpoint nodes. On the digits a
ten-thousandth is allowed, which in small batches gives the error of 100 midpoint nodes, too. What is done once for all
steps, such as the queries' values at all snapshots and the choice of how to multiply, is no part of a step: see the
rows of single ones. By step × layer,
batches have been replayed before, as they are once for all queries of a run. *MOD-113* is the network as the paper
trains it, where every position goes through all layers; *last position only* computes the same in less time.
"""

_COLUMNS = ("nodes_per_step", "error_per_step", "gradients_alone")
_NAMED = 5
"""Shares that the text names; the picture has more."""

_PRECISION = """\
## Work and precision

The error of the path integral, measured against the change of each prediction in each step, for the gradient
evaluations that a rule spent, on the first steps of two runs. *kink-aware* averages the slopes of ReLUs over the
sub-interval that a node stands for; *adaptive* does so too, and divides only the sub-intervals above tolerance.
`python -m tests.benchmarks precision`

![error against gradient evaluations](benchmarks/precision.png)
"""

_SCALING = """\
## Scaling

Exponents of time and of peak memory beside the result, fitted to the three largest sizes of each curve; a network of
three layers on random data, the last one not trained. `python -m tests.benchmarks scaling`

![time and memory against sizes](benchmarks/scaling.png)

| with | from | time | memory | why |
|---|---|---|---|---|
"""

_EXPLANATIONS = {
    "examples": "time: a forward row, a backward row and a product each; memory: activations of the batch",
    "steps": "time: all steps cost the same; memory: one step at a time, with the query's values along the path",
    "parameters": "time and memory: products, and vectors that go from step to step, have an entry for each",
    "queries": "time: a gradient and a product each; memory: an average gradient and an adjoint each",
    "outputs": "a query is one scalar, so more outputs (of a layer that is not trained) only make forward passes wider",
}

_NAIVE = """\
## Beside the published algorithm

`tests/benchmarks/published.py` is the algorithm of ExPLAIND (arXiv 2505.20076) written plainly: gradients of all
outputs at every node of the midpoint rule, and a momentum buffer for every example. Both explain the log-probability of
the right answer of {queries} inputs by {examples} examples and all layers, over {steps} steps of {case}, a network
with {outputs} outputs. Ours has the loosest tolerance at which it is no less accurate. Operations are those of matrix
products, as torch counts them. `python -m tests.benchmarks naive`

| | nodes per step | error, nats | operations | seconds |
|---|---|---|---|---|
| published algorithm | {published} |
| `run.attribute` | {ours} |

The largest difference between their contributions is {difference} of the largest one.
"""

_MACHINE = """\
## The kernel machine is the network

`explaind.PathKernelModel` computes every output of the trained network as the sum over its path, at a tolerance of 1e-4
of each output's path, from the initial weights on. Beside it the network's own outputs. `python -m tests.benchmarks
machine`

| network | steps | inputs × outputs | error on average | at most | argmax agrees | KL, nats |
|---|---|---|---|---|---|---|
"""

_HOT = """\
## Where the time goes

Many queries by example, step and layer: {hottest}. `python -m tests.benchmarks products`

![shares of operations](benchmarks/products.png)
"""

_ENVIRONMENTS = """\
## Measured with

| benchmark | date | machine | threads | load before | versions |
|---|---|---|---|---|---|
"""


def page(results: Mapping[str, Any]) -> str:
    """The whole page; benchmarks that were not measured yet are left out."""
    parts = [_INTRODUCTION, _goals(results)]
    sections = {
        "precision": lambda _: _PRECISION,
        "scaling": _scaling,
        "naive": _naive,
        "machine": _machine,
        "products": _hot,
    }
    parts += [section(results[name]["records"]) for name, section in sections.items() if name in results]
    parts.append(_environments(results))
    return "\n".join(parts)


def verdict(record: Mapping[str, Any]) -> str:
    """How far a record's value reaches."""
    sign = -1 if record.get("more_is_better") else 1
    for goal in ("stretch", "must"):
        if goal in record and sign * record["value"] <= sign * record[goal]:
            return goal
    return "missed" if "must" in record else ""


def _goals(results: Mapping[str, Any]) -> str:
    lines = [
        "## Goals\n",
        "| work | on | measured | unit | must | stretch | reached | nodes per step | error per step | gradients alone "
        "| command |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in results.items():
        for record in entry["records"]:
            if "value" not in record:
                continue
            several = record.get("rounds", 1) > 1
            spread = f" ({_number(record['low'])} to {_number(record['high'])})" if several else ""
            goals = [_number(record[goal]) if goal in record else "" for goal in ("must", "stretch")]
            relation = "≥" if record.get("more_is_better") else "≤"
            cells = [
                record["work"],
                record["case"],
                _number(record["value"]) + spread,
                record["unit"],
                *(f"{relation} {goal}" if goal else "" for goal in goals),
                verdict(record),
                *(_number(record[column]) if column in record else "" for column in _COLUMNS),
                f"`{name}`",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _scaling(records: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for axis in dict.fromkeys(record["axis"] for record in records):
        points = [record[axis] for record in records if record["axis"] == axis]
        time, memory = exponents(records, axis)
        rows.append(
            f"| {axis} | {points[0]:,} to {points[-1]:,} | {time:.2f} | {memory:.2f} | {_EXPLANATIONS[axis]} |\n"
        )
    return _SCALING + "".join(rows)


def _naive(records: Sequence[Mapping[str, Any]]) -> str:
    both = next(record for record in records if "published" in record)
    columns = ("nodes", "error", "operations", "seconds")
    rows = {who: " | ".join(_number(both[who][column]) for column in columns) for who in ("published", "ours")}
    return _NAIVE.format(**{**both, **rows}, difference=_number(both["largest_difference"]))


def _machine(records: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"| {r['case']} | {r['steps']:,} | {r['num_inputs']} × {r['num_outputs']} | {_number(r['mean_error'])} | "
        f"{_number(r['max_error'])} | {r['argmax_agreement']:.1%} | {_number(r['kl'])} |\n"
        for r in records
    ]
    return _MACHINE + "".join(rows)


def _hot(records: Sequence[Mapping[str, Any]]) -> str:
    shares = next(record["shares"] for record in records if "shares" in record)
    hottest = sorted(shares, key=lambda name: shares[name], reverse=True)[:_NAMED]
    return _HOT.format(hottest=", ".join(f"{name} {shares[name]:.0%}" for name in hottest))


def _environments(results: Mapping[str, Any]) -> str:
    rows = []
    for name, entry in results.items():
        machine, versions = entry["machine"], entry["versions"]
        cells = [
            f"`{name}`",
            entry["date"],
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
            str(machine["torch_threads"]),
            str(machine["load_before"]),
            ", ".join(f"{package} {version}" for package, version in versions.items()),
        ]
        rows.append(f"| {' | '.join(cells)} |\n")
    return _ENVIRONMENTS + "".join(rows)


def _number(value: float) -> str:
    """Three digits; powers of ten where that is shorter."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:.1e}"
