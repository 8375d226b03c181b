"""How well two networks agree: accuracy, argmax agreement and mean KL of their outputs on the same inputs."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["accuracy", "argmax_agreement", "mean_kl"]


def accuracy(outputs: Tensor, labels: Tensor) -> float:
    """The part of the inputs whose largest output is that of their label, in 0 … 1.

    Args:
        outputs: logits or log-probabilities, `[input, class]`.
        labels: class indices, `[input]`.

    Raises:
        ValueError: not one label per row of the outputs.

    Example:
        >>> accuracy(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.tensor([1, 1]))
        0.5
    """
    if outputs.ndim != 2 or not len(outputs) or labels.shape != outputs.shape[:1]:
        raise ValueError(
            f"accuracy needs outputs [input, class] and labels [input], at least one; got the shapes "
            f"{tuple(outputs.shape)} and {tuple(labels.shape)}."
        )
    return float((outputs.argmax(dim=-1) == labels).double().mean())


def argmax_agreement(outputs: Tensor, others: Tensor) -> float:
    """The part of the inputs for which two networks name the same class, in 0 … 1.

    The argmax agreement of Table 1 in ExPLAIND (arXiv 2505.20076).

    Args:
        outputs: of one network, logits or log-probabilities, `[input, class]`.
        others: of the other network, likewise.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> argmax_agreement(torch.tensor([[0.0, 2.0], [3.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
        0.5
    """
    _check_pair(outputs, others)
    return float((outputs.argmax(dim=-1) == others.argmax(dim=-1)).double().mean())


def mean_kl(outputs: Tensor, others: Tensor) -> float:
    """Mean over the inputs of KL(p ‖ p') = Σ_c p_c log(p_c / p'_c), in nats; computed in float64.

    Args:
        outputs: logits or log-probabilities of the network that gives p, `[input, class]`.
        others: of the one that gives p', likewise.

    Raises:
        ValueError: the shapes differ.

    Example:
        p = (1, 0) and p' = (½, ½) differ by one bit.

        >>> round(mean_kl(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]])), 4)
        0.6931
    """
    _check_pair(outputs, others)
    log_p, log_other = outputs.double().log_softmax(dim=-1), others.double().log_softmax(dim=-1)
    p = log_p.exp()
    return float(torch.where(p > 0, p * (log_p - log_other), 0.0).sum(dim=-1).mean())


def _check_pair(outputs: Tensor, others: Tensor) -> None:
    if outputs.ndim != 2 or not len(outputs) or outputs.shape != others.shape:
        raise ValueError(
            f"two networks' outputs on the same inputs are both [input, class], at least one input; got the shapes "
            f"{tuple(outputs.shape)} and {tuple(others.shape)}."
        )
