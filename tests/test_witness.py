"""Central finite differences: a contribution is how the recorded update answers when an example's loss is scaled.

The witness is a plain loop of torch's own SGD: every step starts from the recorded parameters and takes its gradient
from a loss in which an example weighs 1 ± ε at some steps, so that only the optimizer's buffer carries over. Nothing of
the library but the recorded parameters enters it.
"""

from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD

import explaind
from tests.cases import NUM_EXAMPLES, data, mlp, query

BATCHES = [[0, 3, 6, 1], [4, 2, 8], [7, 5], [1, 8, 4], [0, 2, 5, 7], [3, 6]]  # two epochs of ragged batches
MAX_NORM = 0.2
SETTINGS = {
    "plain": {"lr": 0.3},
    "momentum": {"lr": 0.2, "momentum": 0.8},
    "momentum-dampening-decay": {"lr": 0.2, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.05},
    "nesterov": {"lr": 0.1, "momentum": 0.7, "nesterov": True, "weight_decay": 0.1},
}
PAIRS = [(step, example) for step, batch in enumerate(BATCHES) for example in batch]


def record(path, settings, clipped=False):
    model = mlp()
    optimizer = SGD(model.parameters(), **settings)
    features, labels = data().tensors
    with explaind.trace(model, optimizer, path) as recorder:
        for batch in BATCHES:
            recorder.examples(batch)
            optimizer.zero_grad()
            F.cross_entropy(model(features[batch]), labels[batch]).backward()
            if clipped:
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
    return explaind.open_run(path, model=mlp())


def flat_params(run, step):
    return torch.cat([tensor.reshape(-1) for tensor in run.params(step).values()])


def updates(run, settings, weights, rescale=lambda params, step: None):
    """Δ_s of every step from the recorded θ_s, with `weights [step, example]` on the losses."""
    model = mlp()
    optimizer = SGD(model.parameters(), **settings)
    features, labels = data().tensors
    found = []
    for step, batch in enumerate(BATCHES):
        start = flat_params(run, step)
        vector_to_parameters(start.clone(), model.parameters())
        optimizer.zero_grad()
        losses = F.cross_entropy(model(features[batch]), labels[batch], reduction="none")
        (weights[step, batch] * losses).mean().backward()
        rescale(list(model.parameters()), step)
        optimizer.step()
        found.append(parameters_to_vector(model.parameters()).detach() - start)
    return torch.stack(found)


@cache
def average_gradients(run):
    """φ_s of every query, `[step, query, element]`, by eight Gauss–Legendre nodes and plain autograd."""
    nodes, node_weights = np.polynomial.legendre.leggauss(8)
    result = []
    for step in range(run.num_steps):
        start, stop = run.params(step), run.params(step + 1)
        average = 0.0
        for node, weight in zip((nodes + 1) / 2, node_weights / 2, strict=True):
            params = {name: (start[name] + node * (stop[name] - start[name])).requires_grad_() for name in start}
            values = query().output(functional_call(mlp(), params, (query().inputs,)))
            rows = [torch.autograd.grad(value, list(params.values()), retain_graph=True) for value in values]
            average = average + weight * torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
        result.append(average)
    return torch.stack(result)


def change(run, settings, scaled, eps, **options):
    """Central difference in ε of ⟨φ_s, Δ_s⟩ when the losses `scaled [step, example]` weigh 1 + ε, `[query, step]`."""
    up, down = (updates(run, settings, 1 + sign * eps * scaled, **options) for sign in (1, -1))
    return torch.einsum("sqd,sd->qs", average_gradients(run), up - down).numpy() / (2 * eps)


def only(step, example):
    scaled = torch.zeros(len(BATCHES), NUM_EXAMPLES, dtype=torch.float64)
    scaled[step, example] = 1
    return scaled


def contributions(run, step_axis):
    return run.attribute(query(), by=("query", "example", step_axis), tolerance=1e-12).dataset.contribution


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-8, atol=1e-11)


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def recorded(request, tmp_path_factory):
    settings = SETTINGS[request.param]
    return record(tmp_path_factory.mktemp("run") / "run.zarr", settings), settings


def test_the_witness_makes_the_recorded_updates(recorded):
    run, settings = recorded
    remade = updates(run, settings, torch.ones(len(BATCHES), NUM_EXAMPLES, dtype=torch.float64))
    for step in range(run.num_steps):
        close(remade[step].numpy(), (flat_params(run, step + 1) - flat_params(run, step)).numpy())


@pytest.mark.parametrize("eps", [0.5, 1e-3])  # a gradient is linear in its examples' weights: any ε is as good
def test_scaling_an_example_at_one_step_moves_this_and_later_updates_by_its_contribution_of_that_step(recorded, eps):
    run, settings = recorded
    found = contributions(run, "step")
    for step, example in PAIRS:
        moved = change(run, settings, only(step, example), eps)
        close(moved[:, :step], 0)
        close(found.sel(step=step, example=example), moved.sum(axis=1))


def test_scaling_an_example_at_every_step_moves_each_update_by_its_contribution_of_that_update_step(recorded):
    run, settings = recorded
    found = contributions(run, "update_step")
    for example in range(NUM_EXAMPLES):
        close(
            found.sel(example=example), change(run, settings, sum(only(s, example) for s in range(len(BATCHES))), 0.1)
        )


def test_where_the_optimizer_has_no_memory_only_the_very_update_moves_and_both_step_axes_agree(tmp_path):
    run = record(tmp_path / "run.zarr", SETTINGS["plain"])
    by_step, by_update_step = contributions(run, "step"), contributions(run, "update_step")
    for step, example in PAIRS:
        moved = change(run, SETTINGS["plain"], only(step, example), 0.1)
        close(moved[:, step], by_step.sel(step=step, example=example))
        close(moved[:, step], by_update_step.sel(update_step=step, example=example))
        close(moved[:, step + 1 :], 0)


# ---------------------------------------------------------------------- what depends on all examples at once


@pytest.fixture(scope="module")
def clipped(tmp_path_factory):
    run = record(tmp_path_factory.mktemp("run") / "run.zarr", SETTINGS["plain"], clipped=True)
    norms = torch.stack([run.flat_gradient(step).norm() for step in range(run.num_steps)])
    torch.testing.assert_close(norms, torch.full_like(norms, MAX_NORM), rtol=1e-5, atol=0.0)  # every step is clipped
    return run


def clip(params, step):
    nn.utils.clip_grad_norm_(params, MAX_NORM)


def recorded_scales(run):
    """The factor that clipping put on each step's gradient."""
    scales = []
    features, labels = data().tensors
    for step, batch in enumerate(BATCHES):
        params = {name: tensor.requires_grad_() for name, tensor in run.params(step).items()}
        loss = F.cross_entropy(functional_call(mlp(), params, (features[batch],)), labels[batch])
        gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(params.values()))])
        scales.append(float(run.flat_gradient(step).norm() / gradient.norm()))
    return scales


def test_with_the_recorded_clipping_factor_held_fixed_a_contribution_is_the_finite_difference(clipped):
    scales = recorded_scales(clipped)
    found = contributions(clipped, "step")

    def rescale(params, step):
        for param in params:
            param.grad.mul_(scales[step])

    for step, example in PAIRS:
        moved = change(clipped, SETTINGS["plain"], only(step, example), 0.1, rescale=rescale)
        close(found.sel(step=step, example=example), moved[:, step])


def counterfactual(run, found, step, example):
    """d/dε when clipping answers too: its own part, less the share of ‖G‖ that it makes up from everyone's.

    With G = Σ_k g_k and u = G / ‖G‖, d(cu)/dε = c (g_k − ⟨u, g_k⟩ u) / ‖G‖.
    """
    gradients = run.example_grads(step)
    examples = np.unique(BATCHES[step])
    rows = torch.cat([gradient.reshape(len(examples), -1) for gradient in gradients.values()], dim=1)
    total = rows.sum(dim=0)
    share = float(rows[list(examples).index(example)] @ total / total.square().sum())
    everyone = found.sel(step=step).sum("example")
    return found.sel(step=step, example=example) - share * everyone


def test_the_counterfactual_with_clipping_redone_is_another_number_that_central_differences_reach_as_eps_squared(
    clipped,
):
    found = contributions(clipped, "step")
    sizes = np.array([0.4, 0.2, 0.1, 0.05])
    slopes, gaps = [], []
    for step, example in PAIRS:
        exact = counterfactual(clipped, found, step, example)
        differences = [
            change(clipped, SETTINGS["plain"], only(step, example), eps, rescale=clip)[:, step] for eps in sizes
        ]
        errors = [float(np.abs(difference - exact.values).max()) for difference in differences]
        assert errors[-1] <= 1e-3 * float(np.abs(found.sel(step=step)).sum())
        slopes.append(np.polyfit(np.log(sizes), np.log(errors), 1)[0])
        gaps.append(float(np.abs(exact - found.sel(step=step, example=example)).max()))
    np.testing.assert_allclose(slopes, 2.0, atol=0.2)
    assert np.median(gaps) > 1e-3
