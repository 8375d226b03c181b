"""Runs that record an objective, per-example losses, in place of cotangents; contributions by token."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import explaind
from explaind.errors import ModelMismatchError, RecordingError, UnknownUpdateRuleError
from explaind.path.step import Step

TOKENS = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(1))


class Language(nn.Module):
    """Predicts each next token; like many, it computes its loss itself if it is given labels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(7, 4)
        self.recurrent = nn.GRU(4, 5, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(5, 7)
        self.double()

    def forward(self, tokens, labels=None):
        logits = self.head(self.dropout(self.recurrent(self.embedding(tokens))[0]))
        return {"logits": logits} if labels is None else {"loss": token_losses(logits, labels).mean(), "logits": logits}


def token_losses(logits, labels):
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return losses.reshape(len(labels), -1)


def by_token(model, batch):
    losses = token_losses(model(batch[0])["logits"], batch[0])
    return losses / losses.numel()


def by_sequence(model, batch):
    return by_token(model, batch).sum(dim=1)


def loop(loss):
    def train(model, optimizer, recorder):
        loader = DataLoader(
            TensorDataset(TOKENS), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(2)
        )
        torch.manual_seed(5)
        for _ in range(2):
            for (tokens,) in recorder.batches(loader):
                optimizer.zero_grad()
                loss(model, tokens).backward()
                optimizer.step()

    return train


inside = loop(lambda model, tokens: model(tokens, labels=tokens)["loss"])
outside = loop(lambda model, tokens: token_losses(model(tokens)["logits"], tokens).mean())


def recorded(path, train, objective, **options):
    model = Language()
    optimizer = AdamW(model.parameters(), lr=0.05)
    with explaind.trace(model, optimizer, path, objective=objective, **options) as recorder:
        train(model, optimizer, recorder)
    return explaind.open_run(path, model=Language(), objective=objective)


def query():
    return explaind.Query(TOKENS[:2], output=lambda out: out["logits"][:, -1, 3])


def test_a_loss_inside_the_model_needs_an_objective(tmp_path):
    with pytest.raises(RecordingError, match=r"output 'loss' of shape \(\).*objective="):
        recorded(tmp_path / "run.zarr", inside, None)


@pytest.mark.parametrize("storage", ["replayed", "stored"])
@pytest.mark.parametrize("objective", [by_sequence, by_token])
def test_an_objective_gives_what_cotangents_give(objective, storage, tmp_path):
    by = ("query", "example", "step", "parameter")
    one = recorded(tmp_path / "objective.zarr", inside, objective, example_grads=storage)
    other = recorded(tmp_path / "cotangents.zarr", outside, None)
    result, expected = (run.attribute(query(), by=by) for run in (one, other))
    assert result.check().other < 1e-12
    np.testing.assert_allclose(result.dataset.contribution, expected.dataset.contribution, rtol=1e-9, atol=1e-13)
    assert one.verify().largest_gradient_difference < 1e-14


@pytest.mark.parametrize(("train", "objective", "tokens"), [(inside, by_token, 4), (outside, None, 5)])
def test_tokens_are_an_axis_that_sums_to_the_examples(train, objective, tokens, tmp_path):
    run = recorded(tmp_path / "run.zarr", train, objective)
    nodes = explaind.quadrature.gauss_legendre(4)
    result = run.attribute(query(), by=("query", "example", "step", "token", "layer"), quadrature=nodes)
    result.check()
    assert result.dataset.sizes["token"] == tokens
    whole = run.attribute(query(), by=("query", "example", "step", "layer"), quadrature=nodes)
    summed = result.dataset.contribution.sum("token")
    np.testing.assert_allclose(summed, whole.dataset.contribution, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(
        run.attribute(query(), by=("token",), quadrature=nodes).dataset.contribution,
        result.dataset.contribution.sum(["query", "example", "step", "layer"]),
        rtol=1e-9,
        atol=1e-14,
    )


def test_the_contribution_of_a_token_is_that_of_its_loss_alone(tmp_path):
    run = recorded(tmp_path / "run.zarr", inside, by_token)

    def only_last(model, batch):
        losses = by_token(model, batch)
        return torch.cat([torch.zeros_like(losses[:, :-1]), losses[:, -1:]], dim=1)

    tokens = run.attribute(query(), by=("query", "example", "token"), steps=[3]).dataset.contribution
    run.objective = only_last
    (call,) = run.calls(3)
    products = explaind.path.products.TangentProducts(run, dtype=torch.float64, device=torch.device("cpu"))
    psi = torch.randn(1, run.table.num_elements, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    whole = [slice(0, run.table.num_elements)]
    step = Step(run, 3, torch.device("cpu"))
    last = products.products(step, 0, torch.arange(len(call.examples)), psi, [whole])[0, :, 0, 0]
    run.objective = by_token
    products = explaind.path.products.TangentProducts(
        run, num_tokens=4, dtype=torch.float64, device=torch.device("cpu")
    )
    each = products.products(step, 0, torch.arange(len(call.examples)), psi, [whole])[0, :, :, 0]
    torch.testing.assert_close(each[:, -1], last, rtol=1e-9, atol=1e-14)
    assert tokens.sizes["token"] == 4


def test_a_token_axis_needs_one(tmp_path):
    run = recorded(tmp_path / "run.zarr", inside, by_sequence)
    with pytest.raises(ValueError, match="has no axis after the examples"):
        run.attribute(query(), by=("query", "token"))
    with pytest.raises(ValueError, match="'token' goes with 'step', not 'update_step'"):
        run.attribute(query(), by=("token", "update_step"))


def test_an_objective_on_another_scale_is_refused_with_the_factor(tmp_path):
    with pytest.raises(RecordingError, match=r"gradient of step 0: .* The loop's gradient is 0\.0625 times it"):
        recorded(tmp_path / "run.zarr", inside, lambda model, batch: by_token(model, batch) * 16)


def test_an_objective_of_another_loss_is_refused(tmp_path):
    with pytest.raises(RecordingError, match=r"gradient of step 0.*must be the objective's sum"):
        recorded(tmp_path / "run.zarr", inside, lambda model, batch: by_token(model, batch)[:, ::2].square())


@pytest.mark.parametrize(
    ("objective", "got"),
    [(lambda model, batch: by_token(model, batch).sum(), r"shape \(\)"), (lambda model, batch: 1.0, "float")],
)
def test_an_objective_that_returns_no_losses_is_refused(objective, got, tmp_path):
    with pytest.raises(RecordingError, match=rf"losses of a batch's 4 examples.*it returned.*{got}"):
        recorded(tmp_path / "run.zarr", inside, objective)


def test_an_objective_needs_to_know_the_batch(tmp_path):
    def train(model, optimizer, recorder):
        model(TOKENS, labels=TOKENS)["loss"].backward()

    with pytest.raises(RecordingError, match=r"iterate over recorder\.batches\(loader\)"):
        recorded(tmp_path / "run.zarr", train, by_token)


def test_a_run_with_an_objective_is_opened_with_it(tmp_path):
    recorded(tmp_path / "run.zarr", inside, by_token)
    run = explaind.open_run(tmp_path / "run.zarr", model=Language())
    with pytest.raises(ValueError, match=r"open_run\(path, model=…, objective=…\)"):
        run.attribute(query(), by=("query", "example"))
    run = explaind.open_run(
        tmp_path / "run.zarr", model=Language(), objective=lambda model, batch: 1.5 * by_token(model, batch)
    )
    with pytest.raises(ModelMismatchError, match=r"objective.s sum does not have .* recorded at step 3"):
        run.attribute(query(), by=("query", "example"))


def test_tokens_of_an_optimizer_without_a_rule_are_refused(tmp_path):
    class Unknown(AdamW):
        pass

    model = Language()
    optimizer = Unknown(model.parameters(), lr=0.05)
    with explaind.trace(model, optimizer, tmp_path / "run.zarr") as recorder:
        outside(model, optimizer, recorder)
    run = explaind.open_run(tmp_path / "run.zarr", model=Language())
    with pytest.raises(UnknownUpdateRuleError, match="no example can be credited"):
        run.attribute(query(), by=("query", "token"))
