"""Models: each trains by the same three steps, on the inputs that it is for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import explaind
from explaind.errors import RecordingError
from tests.loops.problem import LABELS
from tests.loops.row import Row, Rows, Traced

MODELS = Rows()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


VECTORS = draw(9, 3)
SEQUENCES = draw(9, 4, 6)
IMAGES = draw(9, 1, 6, 6)
SIGNALS = draw(9, 2, 8)
TOKENS = torch.randint(1, 7, (9, 4), generator=torch.Generator().manual_seed(7))
PADDED = TOKENS * (torch.arange(4) < torch.tensor([4, 3, 2, 4, 1, 4, 3, 2, 4])[:, None])


MOMENTUM = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}


def fit(
    build: Callable[[], nn.Module], data: Tensor, micro_batches: int, settings: dict[str, float], **options: Any
) -> Traced:
    """Three steps of SGD on classes."""
    torch.manual_seed(3)
    model = build()
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], **settings)
    with explaind.trace(model, optimizer, **options) as recorder:
        for rows in ([0, 1, 2, 3], [4, 5, 6, 7], [8, 0, 1, 2]):
            optimizer.zero_grad()
            for part in torch.tensor(rows).chunk(micro_batches):
                F.cross_entropy(model(data[part]), LABELS[part]).backward()
            optimizer.step()
    return Traced(recorder.path, model, explaind.Query(data[[5, 8]], output=explaind.outputs.log_prob([0, 2])))


def add(
    name: str,
    data: Tensor,
    build: Callable[[], nn.Module],
    *,
    micro_batches: int = 1,
    settings: dict[str, float] = MOMENTUM,
    **properties: Any,
) -> None:
    dtype = properties.get("dtype", torch.float64)
    inputs = data.to(dtype) if data.is_floating_point() else data
    run = partial(fit, lambda: build().to(dtype), inputs, micro_batches, settings)
    MODELS.append(Row(name=name, run=run, **properties))


def mlp_with(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Linear(4, 3))


def conv_with(*middle: nn.Module, features: int = 32) -> nn.Sequential:
    """On images of 6 × 6: two channels of 4 × 4, and then what is in the middle."""
    return nn.Sequential(nn.Conv2d(1, 2, 3), *middle, nn.Flatten(), nn.Linear(features, 3))


class Pooled(nn.Module):
    """Classes from the mean over the positions of the sequence that a module returns."""

    def __init__(self, body: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.body, self.classes = body, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return self.classes((out[0] if isinstance(out, tuple) else out).mean(dim=1))


# ---------------------------------------------------------------------- random numbers and normalisation

add("Dropout", VECTORS, lambda: mlp_with(nn.Tanh(), nn.Dropout(0.5)))
add("Dropout, with accumulation", VECTORS, lambda: mlp_with(nn.Tanh(), nn.Dropout(0.5)), micro_batches=2)
add("BatchNorm1d in training", VECTORS, lambda: mlp_with(nn.BatchNorm1d(4), nn.Tanh()))
add("BatchNorm1d in training, with accumulation", VECTORS, lambda: mlp_with(nn.BatchNorm1d(4)), micro_batches=2)
add("BatchNorm2d in training", IMAGES, lambda: conv_with(nn.BatchNorm2d(2), nn.SiLU()))


class FrozenStatistics(nn.Sequential):
    """Fine-tuning with batch normalisation kept in evaluation mode."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self[1].eval()
        return self


add(
    "BatchNorm1d in evaluation mode",
    VECTORS,
    lambda: FrozenStatistics(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).train(),
)
add("GroupNorm", IMAGES, lambda: conv_with(nn.GroupNorm(2, 2), nn.SiLU()))
add("LayerNorm", VECTORS, lambda: mlp_with(nn.LayerNorm(4), nn.GELU()))
add("RMSNorm", VECTORS, lambda: mlp_with(nn.RMSNorm(4), nn.GELU()))

# ---------------------------------------------------------------------- images and sequences

add(
    "Conv1d with average pooling",
    SIGNALS,
    lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(9, 3)),
)
add(
    "Conv2d with max pooling",
    IMAGES,
    lambda: conv_with(nn.SiLU(), nn.MaxPool2d(2), features=8),
    settings=MOMENTUM | {"lr": 0.01},
)
add("Conv2d with adaptive pooling", IMAGES, lambda: conv_with(nn.SiLU(), nn.AdaptiveAvgPool2d(1), features=2))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence with itself."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Any:
        return self.attention(x, x, x)


class FusedAttention(nn.Module):
    """`scaled_dot_product_attention` from one projection."""

    def __init__(self, *, causal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.project, self.causal, self.dropout = nn.Linear(6, 18), causal, dropout

    def forward(self, x: Tensor) -> Tensor:
        heads = self.project(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(*heads, is_causal=self.causal, dropout_p=dropout)
        return out.transpose(1, 2).flatten(2)


def encoder(dropout: float, *, norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        6, 2, 8, dropout=dropout, activation="gelu", batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


add("MultiheadAttention", SEQUENCES, lambda: Pooled(SelfAttention()))
add("MultiheadAttention with dropout", SEQUENCES, lambda: Pooled(SelfAttention(dropout=0.3)))
add("scaled_dot_product_attention", SEQUENCES, lambda: Pooled(FusedAttention()))
add("scaled_dot_product_attention with dropout", SEQUENCES, lambda: Pooled(FusedAttention(dropout=0.3)))
add("TransformerEncoder", SEQUENCES, lambda: Pooled(encoder(0.0, norm_first=True)))
add("TransformerEncoder with dropout", SEQUENCES, lambda: Pooled(encoder(0.1)))
add("LSTM", SEQUENCES, lambda: Pooled(nn.LSTM(6, 4, batch_first=True), 4))
add("LSTM of two layers, both directions and dropout", SEQUENCES, lambda: Pooled(big_lstm(), 6))
add("GRU", SEQUENCES, lambda: Pooled(nn.GRU(6, 4, batch_first=True), 4))


def big_lstm() -> nn.Module:
    return nn.LSTM(6, 3, num_layers=2, bidirectional=True, dropout=0.3, batch_first=True)


# ---------------------------------------------------------------------- embeddings

add("Embedding with padding_idx", PADDED, lambda: Pooled(nn.Embedding(7, 6, padding_idx=0)))
add("Embedding with max_norm", TOKENS, lambda: Pooled(nn.Embedding(7, 6, max_norm=1.0)), refused=TypeError)
add("Embedding with sparse=True", TOKENS, lambda: Pooled(nn.Embedding(7, 6, sparse=True)), settings={"lr": 0.1})
add("EmbeddingBag", TOKENS, lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Tanh(), nn.Linear(4, 3)))


class TiedLanguageModel(nn.Module):
    """The embedding is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.mix(self.embedding(tokens)).tanh().mean(dim=1))


add("tied weights of embedding and head", TOKENS, TiedLanguageModel)

# ---------------------------------------------------------------------- parameters


def frozen() -> nn.Module:
    model = mlp_with(nn.Tanh())
    model[0].requires_grad_(False)
    return model


class Recurrent(nn.Module):
    """The same layer three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.classes = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x).tanh()
        return self.classes(x)


class Checkpointed(nn.Module):
    """Activations that are computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.3)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(checkpoint(self.body, x, use_reentrant=False))


class Rounding(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class StraightThrough(nn.Module):
    """Rounded inputs, differentiated as if they were not."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.classes = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.hidden(Rounding.apply(x)).tanh())


class Unused(nn.Module):
    """A layer that the forward pass leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


class Bare(nn.Module):
    """Parameters of no layer, one of them a single number, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.temperature = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.tensor([0.1, -0.2, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).tanh() * self.temperature.exp() + self.shift


class Counting(nn.Module):
    """A buffer that every forward pass in training changes, and uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.layer(x) / self.calls


add("frozen parameters", VECTORS, frozen)
add("parameters used more than once", VECTORS, Recurrent)
add("parameters never used", VECTORS, Unused)
add("activation checkpointing", VECTORS, Checkpointed, refused=RecordingError)
add("a custom `autograd.Function`", VECTORS, StraightThrough)
add("bare `nn.Parameter`, also of one number, and a buffer", VECTORS, Bare)
add("a buffer that training changes", VECTORS, Counting)
add("a buffer that training changes, with accumulation", VECTORS, Counting, micro_batches=2)
add("weight_norm", VECTORS, lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), *mlp_with()[1:]))
add("spectral_norm", VECTORS, lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), *mlp_with()[1:]))
add(
    "spectral_norm, with accumulation",
    VECTORS,
    lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(3, 4)), *mlp_with()[1:]),
    micro_batches=2,
)
add("orthogonal", VECTORS, lambda: nn.Sequential(parametrizations.orthogonal(nn.Linear(3, 3)), *mlp_with()[:0]))

# ---------------------------------------------------------------------- compilation and types

add("`torch.compile`, eager backend", VECTORS, lambda: torch.compile(mlp_with(nn.Tanh()), backend="eager"))
add("`torch.compile`, aot_eager backend", VECTORS, lambda: torch.compile(mlp_with(nn.Tanh()), backend="aot_eager"))
add("float32", VECTORS, lambda: mlp_with(nn.Tanh()), dtype=torch.float32)
add("bfloat16", VECTORS, lambda: mlp_with(nn.Tanh()), dtype=torch.bfloat16)
add("Dropout in float32", VECTORS, lambda: mlp_with(nn.Tanh(), nn.Dropout(0.5)), dtype=torch.float32)


class Complex(nn.Module):
    """Complex weights, real output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs()


MODELS.append(Row(name="complex parameters", run=partial(fit, Complex, VECTORS, 1, MOMENTUM), refused=TypeError))
