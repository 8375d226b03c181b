"""Queries: what is asked is what is explained, for every kind of model."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import explaind

FEATURES = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def traced(
    make,
    path,
    *,
    optimizer=torch.optim.SGD,
    loss=lambda out: F.cross_entropy(out, LABELS),
    call=lambda model: model(FEATURES),
    steps=3,
):
    torch.manual_seed(1)
    model = make().double()
    optimizer = optimizer(model.parameters(), lr=0.2, momentum=0.5)
    with explaind.trace(model, optimizer, path):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(call(model)).backward()
            optimizer.step()
    return explaind.open_run(path, model=model), model


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(1, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.cell(x[..., None])[0][:, -1])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.a(x)
        return self.b(h.tanh() if h.mean() > 0 else h.sigmoid())


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        h = self.a(x).tanh()
        return self.b(h - h.mean(dim=0))


def conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 2, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


@pytest.mark.parametrize("make", [Recurrent, Branching, Centred, conv], ids=lambda make: make.__name__)
def test_any_model_closes_and_explains_its_own_prediction(make, tmp_path):
    run, model = traced(make, tmp_path / "run.zarr")
    query = explaind.Query(FEATURES, output=explaind.outputs.logit(LABELS))
    for by in (("query", "step", "layer"), ("query", "example")):
        result = run.attribute(query, by=by, tolerance=1e-5)
        result.check()
        with torch.no_grad():
            np.testing.assert_allclose(result.dataset.prediction, query.output(model(FEATURES)), rtol=1e-12)
        assert np.abs(result.dataset.other).sum() < 1e-10


def test_inplace_relus_are_averaged_like_others(tmp_path):
    def make(inplace):
        return lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=inplace), nn.Linear(8, 3))

    query = explaind.Query(FEATURES, output=explaind.outputs.logit(LABELS))
    nodes = []
    for inplace in (False, True):
        run, _ = traced(make(inplace), tmp_path / f"{inplace}.zarr")
        nodes.append(run.attribute(query, by=("query",)).dataset.num_nodes.values)
    np.testing.assert_array_equal(*nodes)


def test_dropout_inside_a_transformer_layer_splits_over_examples(tmp_path):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.encoder(x[:, None] * torch.ones(3, 1, dtype=x.dtype)).mean(dim=1))

    run, _ = traced(Encoder, tmp_path / "run.zarr")
    assert run.verify().bit_exact
    query = explaind.Query(FEATURES[:2], output=explaind.outputs.logit([0, 1]))
    result = run.attribute(query, by=("query", "example", "layer"), tolerance=1e-5)
    result.check()
    assert result.dataset.attrs["example_products"] == "factors"
    assert np.abs(result.dataset.other).sum() < 1e-10


@pytest.mark.parametrize("shape", [(6, 1), (6,)])
@pytest.mark.parametrize("target_shape", [(6, 1), (6,)])
def test_regression_losses_pair_rows_with_their_own_targets(shape, target_shape, tmp_path):
    def make():
        last = [nn.Flatten(0)] if shape == (6,) else []
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), *last)

    targets = torch.linspace(-1, 1, 6, dtype=torch.float64)
    run, model = traced(make, tmp_path / "run.zarr", loss=lambda out: F.mse_loss(out.flatten(), targets))
    query = explaind.Query(FEATURES, output=explaind.outputs.loss(targets.reshape(target_shape), F.mse_loss))
    result = run.attribute(query, by=("query", "example"))
    result.check()
    with torch.no_grad():
        np.testing.assert_allclose(result.dataset.prediction, (model(FEATURES).flatten() - targets) ** 2, rtol=1e-12)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x, bias, scale=1.0):
        return scale * self.a(x) + bias


def test_a_query_calls_the_model_as_the_loop_did(tmp_path):
    bias = torch.zeros(6, 3, dtype=torch.float64)
    run, model = traced(Scaled, tmp_path / "run.zarr", call=lambda model: model(FEATURES, bias, scale=2.0))
    good = explaind.Query((FEATURES, bias), output=explaind.outputs.logit(LABELS))
    result = run.attribute(good, by=("query", "example"))
    with torch.no_grad():
        expected = good.output(model(FEATURES, bias, scale=2.0))
    np.testing.assert_allclose(result.dataset.prediction, expected, rtol=1e-12)
    for inputs in (FEATURES, (FEATURES, bias, torch.ones(6, 1)), {"x": FEATURES, "bias": bias}):
        with pytest.raises(ValueError, match="the model was called with the inputs 0, 1, the query has"):
            run.attribute(explaind.Query(inputs, output=explaind.outputs.logit(LABELS)), by=("query",))


@pytest.mark.parametrize(
    ("optimizer", "by"), [(torch.optim.SGD, ("query", "example")), (torch.optim.RMSprop, ("query", "step"))]
)
def test_a_forward_pass_that_computes_something_else_is_refused(optimizer, by, tmp_path):
    class Model(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.a, self.b, self.activation = nn.Linear(4, 5), nn.Linear(5, 3), activation

        def forward(self, x):
            return self.b(self.activation(self.a(x)))

    traced(lambda: Model(torch.tanh), tmp_path / "run.zarr", optimizer=optimizer)
    run = explaind.open_run(tmp_path / "run.zarr", model=Model(torch.relu).double())
    query = explaind.Query(FEATURES, output=explaind.outputs.logit(LABELS))
    for use in (run.verify, lambda: run.attribute(query, by=by)):
        with pytest.raises(explaind.errors.ModelMismatchError, match="does not give the output that was recorded"):
            use()


def test_queries_have_short_names():
    query = explaind.Query(FEATURES, output=explaind.outputs.logit(LABELS), names=["a", "b", "c", "d", "e", "f"])
    assert repr(query) == "<Query of logit: 6 queries from 6 inputs>"
    assert repr(query.mean()) == "<Query of logit: 1 query from 6 inputs>"
    assert query.names == ("a", "b", "c", "d", "e", "f")
