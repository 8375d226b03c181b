"""What a step must be like to be recorded: each check refuses one way in which its record would be wrong."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from explaind.errors import NonFiniteError, RecordingError
from explaind.places import Place
from explaind.recording.forwards import ForwardCall
from explaind.recording.gradients import all_finite, first_nonfinite
from explaind.replay.model import sparse_weights

__all__ = ["check_calls_reach", "check_finite", "check_one_gradient", "check_sparse", "check_unchanged"]


def check_finite(what: str, flat: Tensor, tensors: Mapping[str, Tensor | None], step: int, path: Place) -> None:
    """No tensor may have NaN or infinite entries; `flat` is all of them.

    Raises:
        NonFiniteError: one has, named by `what` and its own name.
    """
    if not all_finite(flat):
        raise NonFiniteError(
            f"the {what} '{first_nonfinite(tensors)}' has NaN or infinite entries at step {step}. The steps before it "
            f"are safe in {path}."
        )


def check_sparse(gradients: Mapping[str, Tensor | None], model: nn.Module) -> None:
    """Sparse gradients may only be those of embeddings.

    Raises:
        RecordingError: another one is sparse.
    """
    sparse = {name for name, gradient in gradients.items() if gradient is not None and gradient.is_sparse}
    if sparse and (unknown := sorted(sparse - sparse_weights(model))):
        raise RecordingError(
            f"the gradient of '{unknown[0]}' is sparse, and not as that of a torch.nn.Embedding or EmbeddingBag "
            "with sparse=True. Use one of these layers, or keep the gradient dense with sparse=False."
        )


def check_one_gradient(calls: Sequence[ForwardCall], step: int) -> None:
    """The optimizers after the first of a round must find no new calls.

    Raises:
        RecordingError: they do.
    """
    if calls:
        raise RecordingError(
            f"a backward pass came between the steps of two optimizers in step {step}, so they do not share one "
            "gradient. Compute all gradients before the first of them steps, or make the forward pass of the second "
            "after the step of the first."
        )


def check_unchanged(calls: Iterable[ForwardCall], parameters: Mapping[str, Tensor], step: int) -> None:
    """The parameters must be those that the step's calls were made with.

    Raises:
        RecordingError: one was changed since.
    """
    for call in calls:
        if call.step == step and (changed := call.first_changed(parameters)) is not None:
            raise RecordingError(
                f"the parameter '{changed}' was changed between the forward pass and the optimizer's step {step}, so "
                "the gradient is not that of the weights that the step begins with. Change weights after the step (to "
                "decay or clamp them, say). A step along the gradient at other weights, as in sharpness-aware "
                "minimisation, cannot be traced."
            )


def check_calls_reach(calls: Sequence[ForwardCall], step: int, *, cleared: bool) -> None:
    """A gradient must have come through some call.

    Raises:
        RecordingError: there is one, and no call.
    """
    if not calls and not cleared:
        raise RecordingError(
            f"no call of the traced model reached the gradient of step {step}. Call the model itself, model(x), not "
            "model.forward(x) or one of its parts, inside the traced block."
        )
