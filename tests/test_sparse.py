"""Embeddings with sparse gradients, under the optimizers of torch that take them."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, SparseAdam

import explaind
from explaind import quadrature, reference
from explaind.errors import RecordingError
from tests.test_reference import worst_relative_difference

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # Adagrad's own, when it is first used
NODES = quadrature.gauss_legendre(6)  # the twin's
NUM_TOKENS = 7
LABELS = torch.tensor([0, 1, 2, 0, 1])
# No token is in two rows of a batch of two: sums of several entries could be taken in another order.
TOKENS = torch.tensor([[0, 1], [2, 3], [1, 4], [5, 0], [3, 2]])
BATCHES = [[0, 1], [2, 3], [4], [1, 2], [0, 4]]


class Words(nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding
        self.head = nn.Linear(3, 3)

    def forward(self, tokens):
        vectors = self.embedding(tokens)
        return self.head(torch.tanh(vectors if vectors.ndim == 2 else vectors.sum(dim=1)))


def words(kind=nn.Embedding, sparse=True, **options):
    torch.manual_seed(3)
    return Words(kind(NUM_TOKENS, 3, sparse=sparse, **options)).double()


def bag():
    return words(nn.EmbeddingBag, mode="mean")


OPTIMIZERS = {
    "sparse-adam": lambda weights: SparseAdam(weights, lr=0.05, betas=(0.8, 0.9)),
    "sparse-adam-maximize": lambda weights: SparseAdam(weights, lr=torch.tensor(0.03), eps=1e-3, maximize=True),
    "adagrad": lambda weights: Adagrad(weights, lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2),
    "sgd": lambda weights: SGD(weights, lr=0.3),
    "sgd-momentum": lambda weights: SGD(weights, lr=0.2, momentum=0.8, dampening=0.3),
}


def split(model, make):
    return [make(model.embedding.parameters()), AdamW(model.head.parameters(), lr=0.05, weight_decay=0.1)]


def train(model, optimizers, recorder=None, *, tokens=TOKENS, batches=BATCHES, rest=lambda step: 1.0):
    for step, rows in enumerate(batches):
        if recorder is not None:
            recorder.examples(rows)
        for optimizer in optimizers:
            optimizer.zero_grad()
        losses = F.cross_entropy(model(tokens[rows]), LABELS[rows], reduction="none")
        (losses[0] + rest(step) * losses[1:].sum()).backward()
        for optimizer in optimizers:
            optimizer.step()


def record(path, make, *, model=words, **options):
    trained, untraced = model(), model()
    train(untraced, split(untraced, make), **options)
    optimizers = split(trained, make)
    with explaind.trace(trained, optimizers, path) as recorder:
        train(trained, optimizers, recorder, **options)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), untraced.parameters(), strict=True))
    return explaind.open_run(path, model=model())


def query(num=3):
    return explaind.Query(TOKENS[:num], output=explaind.outputs.log_prob(LABELS[:num].tolist()))


def check_against_the_twin(run):
    expected = reference.decompose(run, query())
    for step_axis, other_axis in (("step", "update_step"), ("update_step", "step")):
        result = run.attribute(query(), by=("query", "example", step_axis, "parameter"), quadrature=NODES)
        for term, twin in (("contribution", expected.contribution.sum("token")), ("decay", expected.decay)):
            assert worst_relative_difference(result.dataset[term], twin.sum(other_axis)) <= 1e-9
        assert not result.dataset.other.any()
        exact = run.attribute(query(), by=("query", "example", step_axis, "parameter"), tolerance=1e-12)
        np.testing.assert_allclose(exact.total, expected.prediction, rtol=1e-12)
        exact.check()


@pytest.mark.parametrize("model", [words, bag])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_every_contribution_equals_the_twin_and_the_weights_those_of_the_untraced_loop(make, model, tmp_path):
    run = record(tmp_path / "run.zarr", make, model=model)
    check_against_the_twin(run)


@pytest.mark.parametrize("model", [words, bag])
@pytest.mark.parametrize("name", ["sparse-adam", "sparse-adam-maximize", "adagrad", "sgd"])
def test_the_replay_is_exact_bit_for_bit(name, model, tmp_path):
    assert record(tmp_path / "run.zarr", OPTIMIZERS[name], model=model).verify().bit_exact


def test_a_row_that_is_looked_up_without_gradient_goes_on_with_its_moments(tmp_path):
    run = record(tmp_path / "run.zarr", OPTIMIZERS["sparse-adam"], rest=lambda step: float(step < 3))
    moved = run.params(4)["embedding.weight"] != run.params(3)["embedding.weight"]
    silent = run.table.unflatten(run.flat_gradient(3))["embedding.weight"] == 0
    assert bool((moved & silent)[TOKENS[2]].any())
    assert run.verify().bit_exact
    check_against_the_twin(run)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_tokens_that_repeat_within_a_batch(make, tmp_path):
    tokens = torch.tensor([[0, 0], [0, 1], [1, 0], [5, 1], [0, 5]])
    run = record(tmp_path / "run.zarr", make, tokens=tokens)
    assert run.verify().exact_gradients == run.num_steps
    assert run.verify().largest_update_difference < 1e-15
    check_against_the_twin(run)


def test_sparse_and_dense_gradients_have_the_same_decomposition(tmp_path):
    results = []
    for sparse in (True, False):
        run = record(tmp_path / f"{sparse}.zarr", OPTIMIZERS["sgd"], model=lambda sparse=sparse: words(sparse=sparse))
        results.append(run.attribute(query(), by=("query", "example", "step", "parameter")).dataset)
    np.testing.assert_array_equal(results[0].contribution, results[1].contribution)


def test_accumulated_gradients(tmp_path):
    model = words()
    optimizers = split(model, OPTIMIZERS["sparse-adam"])
    with explaind.trace(model, optimizers, tmp_path / "run.zarr") as recorder:
        for _ in range(3):
            model.zero_grad()
            for rows in BATCHES[:3]:
                recorder.examples(rows)
                F.cross_entropy(model(TOKENS[rows]), LABELS[rows], reduction="sum").backward()
            for optimizer in optimizers:
                optimizer.step()
    run = explaind.open_run(tmp_path / "run.zarr", model=words())
    assert run.verify().bit_exact
    check_against_the_twin(run)


def test_stored_example_gradients(tmp_path):
    model = words()
    optimizers = split(model, OPTIMIZERS["sparse-adam"])
    with explaind.trace(model, optimizers, tmp_path / "run.zarr", example_grads="stored") as recorder:
        train(model, optimizers, recorder)
    assert model.embedding.sparse
    check_against_the_twin(explaind.open_run(tmp_path / "run.zarr", model=words()))


@pytest.mark.parametrize("sparse", [True, False])
def test_bags_whose_rows_cannot_be_evaluated_alone(sparse, tmp_path):
    # torch cannot differentiate the backward pass of EmbeddingBag.
    def model():
        made = words(nn.EmbeddingBag, sparse=sparse, mode="sum")
        made.head = nn.Sequential(nn.Dropout(0.5), made.head)
        return made

    trained = model()
    optimizers = split(trained, OPTIMIZERS["sgd"])
    with explaind.trace(trained, optimizers, tmp_path / "run.zarr") as recorder:
        train(trained, optimizers, recorder)
    check_against_the_twin(explaind.open_run(tmp_path / "run.zarr", model=model()))


class Looker(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(NUM_TOKENS, 3))

    def forward(self, tokens):
        return F.embedding(tokens, self.weight, sparse=True)


def test_a_sparse_gradient_of_another_origin_is_refused(tmp_path):
    model = Looker()
    optimizer = SparseAdam(model.parameters())
    with (
        pytest.raises(RecordingError, match="gradient of 'weight' is sparse, and not as that of"),
        explaind.trace(model, optimizer, tmp_path / "run.zarr"),
    ):
        model(TOKENS).sum().backward()
        optimizer.step()
