"""The one-layer transformer of Nanda et al. (2023, arXiv 2301.05217): learned positions and residual attention.

With x_t = E[token_t] + P[t] and, for each head h, its query, key and value projections, the last position T gets

    r = x_T + Σ_h O_h Σ_t softmax_t(⟨Q_h x_T, K_h x_t⟩ / √(width/heads)) V_h x_t     attention with residual
    z = r + W₂ relu(W₁ r + b₁) + b₂                                                  MLP with residual
    f = log_softmax(U z)                                                             log-probabilities, in nats

There is no LayerNorm. Their attention is causal; the last position, the only one that is read, sees all others, so a
mask would change nothing here.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["PositionalTransformer"]


class PositionalTransformer(nn.Module):
    """Map three tokens ``[example, position]`` to log-probabilities ``[example, vocabulary]`` at the last one.

    Parameters have the names that they have in :class:`~experiments.grokking.model.ModularTransformer`, so the layer
    groups are the same: queries, keys and values are the first, second and last ``width`` rows of
    ``attention_encoders.weight``, each with the heads stacked, and the columns of ``attention_decoders.weight`` are the
    heads' output projections. ``positions`` belongs to the embedding.

    Initial values are normal with variance ``1 / width``, in the decoder ``1 / vocabulary``, and biases are zero, as in
    the published code.

    Args:
        vocabulary: Number of token ids, also the number of outputs.
        width: Width of the embedding and of the residual stream.
        heads: Number of attention heads; must divide ``width``.
        hidden: Width of the MLP.
        init_scale: Factor on every initial value.
        embedding_scale: Further factor on the initial embedding.

    Raises:
        ValueError: If ``heads`` does not divide ``width``.

    Examples:
        >>> model = PositionalTransformer(114, 128, heads=4, hidden=512)
        >>> sum(parameter.numel() for parameter in model.parameters())
        226816
        >>> model(torch.tensor([[3, 1, 113]])).shape
        torch.Size([1, 114])
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
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide width; got heads={heads}, width={width}.")
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(3, width))
        self.attention_encoders = nn.Linear(width, 3 * width, bias=False)
        self.attention_decoders = nn.Linear(width, width, bias=False)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.decoder = nn.Linear(width, vocabulary, bias=False)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                variance = 0.0 if name.endswith("bias") else 1 / (vocabulary if name == "decoder.weight" else width)
                parameter.normal_(std=init_scale * math.sqrt(variance))
            self.embedding.weight.mul_(embedding_scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return log-probabilities ``[example, vocabulary]`` for tokens ``[example, position]``."""
        embedded = self.embedding(tokens) + self.positions
        residual = embedded[..., -1, :] + self.attention_decoders(self._attend(self.attention_encoders(embedded)))
        residual = residual + self.linear2(torch.relu(self.linear1(residual)))
        logits: Tensor = self.decoder(residual)
        return logits.log_softmax(dim=-1)

    def _attend(self, projected: Tensor) -> Tensor:
        """Attend from the last position: ``[example, position, 3 width]`` to ``[example, width]``."""
        split = projected.reshape(*projected.shape[:-1], 3, self.heads, -1)
        queries, keys, values = split[:, -1, 0], split[:, :, 1], split[:, :, 2]
        scores = torch.einsum("ehc,ethc->eht", queries, keys) / math.sqrt(keys.shape[-1])
        weights = scores.softmax(dim=-1)
        return torch.einsum("eht,ethc->ehc", weights, values).flatten(start_dim=-2)
