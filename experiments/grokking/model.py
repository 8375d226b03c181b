"""The paper's one-layer transformer for modular addition, in plain differentiable operations.

With token embeddings e_t = √width · E[token_t] and, for each head h, the one projection that is query, key and value at
once, u_{t,h} = A_h e_t, the output at the last position T is

    o = Σ_h B_h Σ_t softmax_t(⟨u_{T,h}, u_{t,h}⟩ / √(width/heads)) u_{t,h}      attention, no residual
    z = o + relu(W₂ relu(W₁ o + b₁) + b₂)                                          MLP with residual
    f = log_softmax(U z)                                                           log-probabilities, in nats

There is no LayerNorm, no mask and no position information: addition commutes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["LAYER_GROUPS", "OUTER", "PIPELINE", "ModularTransformer", "layer_groups"]

LAYER_GROUPS: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding.weight",),
    "attention encoders": ("attention_encoders.weight",),
    "attention decoders": ("attention_decoders.weight",),
    "linear1": ("linear1.weight", "linear1.bias"),
    "linear2": ("linear2.weight", "linear2.bias"),
    "decoder": ("decoder.weight",),
}
"""The paper's six layer groups: group name to parameter names, in forward order."""

OUTER = ("embedding", "linear2", "decoder")
"""The paper's outer layers: they turn tokens into features, and features into answers."""

PIPELINE = ("attention encoders", "attention decoders", "linear1")
"""The paper's pipeline: the layers between them."""


def layer_groups(model: nn.Module) -> dict[str, list[str]]:
    """Return the layer groups of a model, so that every parameter is in exactly one.

    Args:
        model: A :class:`ModularTransformer` or a :class:`~experiments.grokking.positional.PositionalTransformer`.

    Returns:
        :data:`LAYER_GROUPS`, with the positional embedding, if the model has one, in the group ``"embedding"``.
    """
    groups = {name: list(parameters) for name, parameters in LAYER_GROUPS.items()}
    grouped = {parameter for parameters in groups.values() for parameter in parameters}
    groups["embedding"] += [name for name, _ in model.named_parameters() if name not in grouped]
    return groups


class ModularTransformer(nn.Module):
    """Map tokens ``[example, position]`` to log-probabilities ``[example, vocabulary]`` at the last position.

    The heads are stacked: rows ``h·width/heads … (h+1)·width/heads`` of ``attention_encoders.weight`` are A_h, the same
    columns of ``attention_decoders.weight`` are B_h. Only the last position is carried beyond the attention, because no
    other one can reach the output. Initial values are PyTorch's defaults for one layer per head, as in the paper, times
    ``init_scale`` and, for the embedding, ``embedding_scale``.

    The paper's 89,664 parameters are the 89,024 of the six layer groups and a learned positional embedding, 10 × 64,
    that its forward pass never reads. Such a parameter gets no gradient, so no optimizer step touches it, and it is
    left out unless ``unused_positions`` asks for it.

    Args:
        vocabulary: Number of token ids, also the number of outputs.
        width: Width of the embedding and of the residual stream.
        heads: Number of attention heads; must divide ``width``.
        hidden: Width of the MLP.
        init_scale: Factor on every initial value.
        embedding_scale: Further factor on the initial embedding. At 1 the scores of the attention start in the tens and
            each position attends to itself alone, which delays the fit.
        unused_positions: Rows of the positional embedding that the forward pass does not read; 10 in the paper.

    Raises:
        ValueError: If ``heads`` does not divide ``width``.

    Examples:
        >>> model = ModularTransformer(115, 64, heads=4, hidden=512, unused_positions=10)
        >>> sum(parameter.numel() for parameter in model.parameters())
        89664
        >>> model(torch.tensor([[3, 113, 1, 114]])).shape
        torch.Size([1, 115])
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        *,
        heads: int,
        hidden: int,
        init_scale: float = 1.0,
        embedding_scale: float = 1.0,
        unused_positions: int = 0,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide width; got heads={heads}, width={width}.")
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.attention_encoders = nn.Linear(width, width, bias=False)
        self.attention_decoders = nn.Linear(width, width, bias=False)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.decoder = nn.Linear(width, vocabulary, bias=False)
        if unused_positions:
            self.positions = nn.Parameter(torch.randn(1, unused_positions, width))
        with torch.no_grad():
            # One head's output layer has width/heads inputs, not width: its default bound is √heads times larger.
            self.attention_decoders.weight.mul_(math.sqrt(heads))
            for parameter in self.parameters():
                parameter.mul_(init_scale)
            self.embedding.weight.mul_(embedding_scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return log-probabilities ``[example, vocabulary]`` for tokens ``[example, position]``."""
        width = self.embedding.embedding_dim
        embedded = self.embedding(tokens) * math.sqrt(width)
        attended = self._attend(self.attention_encoders(embedded))
        residual = self.attention_decoders(attended)
        update = torch.relu(self.linear2(torch.relu(self.linear1(residual))))
        logits: Tensor = self.decoder(residual + update)
        return logits.log_softmax(dim=-1)

    def _attend(self, projected: Tensor) -> Tensor:
        """Attend from the last position: ``[example, position, width]`` to ``[example, width]``."""
        values = projected.reshape(*projected.shape[:-1], self.heads, -1)
        scores = torch.einsum("ehc,ethc->eht", values[:, -1], values) / math.sqrt(values.shape[-1])
        weights = scores.softmax(dim=-1)
        return torch.einsum("eht,ethc->ehc", weights, values).flatten(start_dim=-2)
