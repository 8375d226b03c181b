"""The published algorithm, written plainly: the features of every output, and a momentum buffer for every example.

For AdamW, with the diagonal a_s = η/(1 − β1^{s+1})/(√v̂_s + ε) of step s, c_{k,s} the loss's derivative by f(x_k), and
φ_{q,o,s} the mean of ∇f_o(x_q) over the midpoint rule's nodes between θ_s and θ_{s+1},

    m_{k,s} = β1 m_{k,s−1} + (1 − β1) J_k(θ_s)ᵀ c_{k,s}
    contribution[q, o, k, l] = −Σ_s ⟨φ_{q,o,s}^{(l)}, a_s ⊙ m_{k,s}^{(l)}⟩

ExPLAIND, arXiv 2505.20076, section 4. Every query is differentiated for each of its outputs and at each of the nodes,
and all that is kept grows with the number of examples.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, vmap

import explaind

__all__ = ["published_contributions"]


def published_contributions(run: explaind.Run, inputs: Tensor, *, num_nodes: int) -> tuple[Tensor, Tensor]:
    """Contributions `[query, output, example, layer]` of an AdamW run from its first step, in run.examples' order.

    Args:
        run: recorded from step 0, one call of the whole training set per step.
        inputs: of the queries, `[query, …]`.
        num_nodes: of the midpoint rule.

    Returns:
        The contributions, and ⟨φ_{q,o,s}, Δ_s⟩ `[query, output, step]` for the rule's error.
    """
    layers = list(run.layers.values())
    buffers = torch.zeros(len(run.examples), run.table.num_elements)
    contributions: Tensor | float = 0.0
    changes = []
    for step in range(run.num_steps):
        start, stop = run.flat_params(step), run.flat_params(step + 1)
        features = torch.stack([_query_features(run, x, start, stop, num_nodes) for x in inputs])
        first_beta = run.settings(step, 0)["betas"][0]
        buffers = first_beta * buffers + (1 - first_beta) * _example_gradients(run, step)
        weighted = _diagonal(run, step) * buffers
        pieces = []
        for names in layers:
            parts = [parameter.slice for parameter in run.table if parameter.name in names]
            pieces.append(sum(-features[..., part] @ weighted[:, part].T for part in parts))
        contributions = contributions + torch.stack(pieces, dim=-1)
        changes.append(features @ (stop - start))
    assert isinstance(contributions, Tensor)
    return contributions, torch.stack(changes, dim=-1)


def _query_features(run: explaind.Run, x: Tensor, start: Tensor, stop: Tensor, num_nodes: int) -> Tensor:
    """Mean of ∇f_o(x) over the nodes, `[output, element]`."""
    total: Tensor | float = 0.0
    for node in range(num_nodes):
        params = run.table.unflatten(start + (node + 0.5) / num_nodes * (stop - start))
        jacobian = jacrev(lambda p: functional_call(run.model, p, (x[None],))[0])(params)
        total = total + run.table.flatten_rows(jacobian)
    assert isinstance(total, Tensor)
    return total / num_nodes


def _example_gradients(run: explaind.Run, step: int) -> Tensor:
    """J_k(θ_s)ᵀ c_{k,s}, `[example, element]`."""
    (call,) = run.calls(step)

    def loss(params: dict[str, Tensor], x: Tensor, cotangent: Tensor) -> Tensor:
        weighted: Tensor = functional_call(run.model, params, (x[None],))[0] * cotangent
        return weighted.sum()

    rows = vmap(grad(loss), in_dims=(None, 0, 0))(run.params(step), call.inputs["0"], call.output_grad)
    order = torch.from_numpy(call.examples).argsort()
    return run.table.flatten_rows(rows)[order]


def _diagonal(run: explaind.Run, step: int) -> Tensor:
    """a_s, `[element]`; zero where a parameter is never used."""
    settings, state = run.settings(step, 0), run.state(step + 1)
    first_beta, second_beta = settings["betas"]
    bias = [1 - beta ** (step + 1) for beta in (first_beta, second_beta)]
    used = {
        name: settings["lr"] / bias[0] / ((entries["exp_avg_sq"] / bias[1]).sqrt() + settings["eps"])
        for name, entries in state.items()
        if "exp_avg_sq" in entries
    }
    return run.table.flatten(used)
