"""Language models: token by token, with the loss inside the model, and a Hugging Face model from a config."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader, TensorDataset

import explaind
from tests.loops.row import Rows, Traced

LANGUAGE = Rows()
TOKENS = torch.randint(12, (6, 5), generator=torch.Generator().manual_seed(7))
PROMPTS, NEXT = TOKENS[:2, :4], [3, 8]


class LanguageModel(nn.Module):
    """One causal attention layer; logits `[row, token, class]`, or the loss as well where labels are given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.project, self.mix = nn.Embedding(12, 6), nn.Linear(6, 18), nn.Linear(6, 6)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Any:
        query, key, value = self.project(self.embedding(tokens)).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        logits = self.head(self.mix(attended).tanh())
        if labels is None:
            return logits
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def last_log_prob(output: Any) -> Tensor:
    """Log-probability of the next token after each prompt."""
    logits = output if isinstance(output, Tensor) else output["logits"]
    return F.log_softmax(logits[:, -1], dim=-1)[torch.arange(len(NEXT)), NEXT]


def batches() -> DataLoader:
    torch.manual_seed(11)
    return DataLoader(TensorDataset(TOKENS), batch_size=3, shuffle=True)


def logits_outside(by_token: bool, **options: Any) -> Traced:
    """The loss is computed from the logits by the loop."""
    model = LanguageModel()
    optimizer = AdamW(model.parameters(), lr=0.02)
    with explaind.trace(model, optimizer, **options) as recorder:
        for (tokens,) in recorder.batches(batches()):
            optimizer.zero_grad()
            logits = model(tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
    return Traced(recorder.path, model, explaind.Query(PROMPTS, output=last_log_prob), by_token)


def token_losses(model: nn.Module, batch: Any) -> Tensor:
    """Each token's share of the mean loss, `[example, token]`."""
    (tokens,) = batch
    logits = model(tokens[:, :-1])
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses / losses.numel()


def sequence_losses(model: nn.Module, batch: Any) -> Tensor:
    """Each sequence's share of the mean loss, `[example]`."""
    return token_losses(model, batch).sum(dim=1)


def labels_inside(objective: Any, by_token: bool, **options: Any) -> Traced:
    """The loss is computed inside the model."""
    model = LanguageModel()
    optimizer = AdamW(model.parameters(), lr=0.02)
    with explaind.trace(model, optimizer, objective=objective, **options) as recorder:
        for (tokens,) in recorder.batches(batches()):
            optimizer.zero_grad()
            model(tokens[:, :-1], labels=tokens[:, 1:])["loss"].backward()
            optimizer.step()
    query = explaind.Query(PROMPTS, output=last_log_prob)
    return Traced(recorder.path, model, query, by_token, objective=objective)


@LANGUAGE.row("logits [row, token, class], per sequence")
def sequences_outside(**options: Any) -> Traced:
    return logits_outside(False, **options)


@LANGUAGE.row("logits [row, token, class], per token")
def tokens_outside(**options: Any) -> Traced:
    return logits_outside(True, **options)


@LANGUAGE.row("loss inside the model, `objective=` per sequence")
def sequences_inside(**options: Any) -> Traced:
    return labels_inside(sequence_losses, False, **options)


@LANGUAGE.row("loss inside the model, `objective=` per token")
def tokens_inside(**options: Any) -> Traced:
    return labels_inside(token_losses, True, **options)


# ---------------------------------------------------------------------- Hugging Face


def gpt2() -> nn.Module:
    """Two layers with dropout, from a config: nothing is downloaded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=8,
        vocab_size=12,
        n_positions=5,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config)


def causal_token_losses(model: nn.Module, batch: Any) -> Tensor:
    """What `labels=` computes inside GPT-2, before its mean: each predicted token's share, `[example, token]`."""
    (tokens,) = batch
    logits = model(input_ids=tokens).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses / losses.numel()


def causal_sequence_losses(model: nn.Module, batch: Any) -> Tensor:
    """The same per sequence, `[example]`."""
    return causal_token_losses(model, batch).sum(dim=1)


def hugging_face(objective: Any, by_token: bool, **options: Any) -> Traced:
    """A plain loop over a model that returns its loss."""
    model = gpt2().train()
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
    with explaind.trace(model, optimizer, objective=objective, **options) as recorder:
        for (tokens,) in recorder.batches(batches()):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    query = explaind.Query({"input_ids": PROMPTS}, output=lambda output: last_log_prob(output.logits))
    return Traced(recorder.path, model, query, by_token, objective=objective)


@LANGUAGE.row("Hugging Face GPT-2 with `labels=` and dropout, per sequence", dtype=torch.float32)
def gpt2_sequences(**options: Any) -> Traced:
    return hugging_face(causal_sequence_losses, False, **options)


@LANGUAGE.row("Hugging Face GPT-2 with `labels=` and dropout, per token", dtype=torch.float32)
def gpt2_tokens(**options: Any) -> Traced:
    return hugging_face(causal_token_losses, True, **options)


@LANGUAGE.row("Hugging Face GPT-2, loss from its logits", dtype=torch.float32)
def gpt2_logits(**options: Any) -> Traced:
    model = gpt2().train()
    optimizer = SGD(model.parameters(), lr=0.02, momentum=0.9)
    with explaind.trace(model, optimizer, **options) as recorder:
        for (tokens,) in recorder.batches(batches()):
            optimizer.zero_grad()
            logits = model(input_ids=tokens).logits[:, :-1]
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
    query = explaind.Query({"input_ids": PROMPTS}, output=lambda output: last_log_prob(output.logits))
    return Traced(recorder.path, model, query)
