"""Fourier frequencies, the frequency fit and the progress measures, on networks and matrices with known answers."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import xarray as xr

from experiments.grokking.figures.frequencies import frequency_fit, frequency_spectra, progress_curves
from experiments.grokking.frequencies import (
    fit_frequencies,
    frequency_shares,
    key_frequencies,
    similarity_profile,
    spectra,
    spectra_over_steps,
    weight_on,
)
from experiments.grokking.phases import Phases
from experiments.grokking.progress import progress_measures, progress_over_steps, wave_of_answer
from experiments.grokking.recipe import Recipe, StopRule
from experiments.grokking.task import TASKS, make_task
from experiments.grokking.training import train


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


class Wave(torch.nn.Module):
    """A network that computes with one frequency: f(a, b)_c = size · cos(2π f (k_a ∘ k_b − k_c) / n)."""

    def __init__(self, task, *, frequency, size, noise=0.0):
        super().__init__()
        self.task, self.size, n = task, size, len(task.cycle)
        angles = 2 * math.pi * frequency * torch.arange(n) / n
        self.embedding = torch.nn.Embedding(task.vocabulary, 2)
        self.linear1 = torch.nn.Linear(2, 2, bias=False)
        generator = torch.Generator().manual_seed(0)
        self.noise = noise * torch.randn(task.num_pairs * 4, task.vocabulary, generator=generator)
        with torch.no_grad():
            self.linear1.weight.copy_(torch.eye(2))
            self.embedding.weight.zero_()
            self.embedding.weight[list(task.cycle)] = torch.stack([angles.cos(), angles.sin()], dim=1)
        self.angles = angles

    def forward(self, tokens):
        a, b = self.task.operands(tokens)
        k = self.task.places(self.task.answer(a, b))
        self.linear1(torch.stack([self.angles[k].cos(), self.angles[k].sin()], dim=-1))
        logits = torch.zeros(len(tokens), self.task.vocabulary)
        logits[:, list(self.task.cycle)] = self.size * (self.angles[k][:, None] - self.angles).cos()
        return (logits + self.noise[: len(tokens)]).log_softmax(dim=-1)


def cyclic(profile, cycle):
    """A similarity matrix [query, other] that has this profile over differences."""
    n = len(cycle)
    values = [[profile((i - j) % n) for j in range(n)] for i in range(n)]
    order = sorted(range(n), key=lambda k: cycle[k])  # as it comes: by residue, not in cyclic order
    labels = [cycle[k] for k in order]
    return xr.DataArray(np.array(values)[np.ix_(order, order)], {"query": labels, "other": labels}, ["query", "other"])


@pytest.mark.parametrize("n", [7, 12])
def test_one_cyclic_axis_is_parsevals_theorem(n):
    values = np.random.default_rng(0).normal(size=(n, 5))
    shares = frequency_shares(values, num_axes=1)
    assert len(shares) == n // 2
    assert shares.sum() == pytest.approx(1.0)
    centred = values - values.mean(axis=0)
    wave = np.exp(-2j * np.pi * 2 * np.arange(n) / n)
    expected = 2 * (np.abs(wave @ centred) ** 2).sum() / n / (centred**2).sum()
    assert shares[1] == pytest.approx(expected)


def test_a_product_of_two_frequencies_is_in_none():
    k = np.arange(11)
    one, other = (np.cos(2 * np.pi * f * k / 11) for f in (2, 5))
    np.testing.assert_allclose(frequency_shares(np.outer(one, other)[..., None], num_axes=2), np.zeros(5), atol=1e-12)
    mixed = np.outer(one, one) + one[:, None] + 2 * other  # powers 1/4, 1/2 and 2 of the mean square
    expected = [0, 0.75 / 2.75, 0, 0, 2 / 2.75]
    np.testing.assert_allclose(frequency_shares(mixed[..., None], num_axes=2), expected, atol=1e-12)


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_a_network_of_one_frequency_is_read_as_such(name, positional):
    task = make_task(name, 13, positional=positional)
    shares = spectra(Wave(task, frequency=4, size=3.0), task)
    assert list(dict.fromkeys(shares["of"])) == ["embedding", "neurons", "logits"]
    for of in ("embedding", "logits"):
        assert key_frequencies(shares, of=of) == [4]
        part = shares[(shares["of"] == of) & (shares["frequency"] == 4)]
        assert part["share"].item() == pytest.approx(1.0)
    neurons = shares[shares["of"] == "neurons"].set_index("frequency")["share"]
    assert neurons.idxmax() == 4


def test_key_frequencies_carry_what_is_asked_for():
    shares = pd.DataFrame({"of": "neurons", "frequency": [1, 2, 3, 4], "share": [0.1, 0.5, 0.15, 0.05]})
    assert key_frequencies(shares, of="neurons", covering=0.6) == [2]
    assert key_frequencies(shares, of="neurons", covering=0.8) == [2, 3]
    assert key_frequencies(shares, of="neurons", covering=1.0) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["addition", "multiplication"])
def test_the_fit_finds_the_frequencies_of_a_similarity(name):
    cycle = make_task(name, 13).cycle
    n = len(cycle)
    matrix = cyclic(
        lambda d: 0.2 + 0.5 * math.cos(2 * math.pi * 3 * d / n) - 0.3 * math.cos(2 * math.pi * 5 * d / n), cycle
    )
    weights = fit_frequencies(matrix, cycle, penalty=1e-6).set_index("frequency")["weight"]
    assert weights[3] == pytest.approx(0.5, abs=1e-3)
    assert weights[5] == pytest.approx(-0.3, abs=1e-3)
    assert weights.drop([3, 5]).abs().max() < 1e-3
    assert weight_on(fit_frequencies(matrix, cycle), [3, 5]) == pytest.approx(1.0)
    assert weight_on(fit_frequencies(matrix, cycle, penalty=0.8), [3]) == 1.0  # less than the largest: gone


def test_the_penalty_takes_its_part_of_the_largest_amplitude_off_each():
    cycle = range(11)
    matrix = cyclic(lambda d: math.cos(2 * math.pi * d / 11) + 0.4 * math.cos(2 * math.pi * 4 * d / 11), cycle)
    weights = fit_frequencies(matrix, cycle, penalty=0.1).set_index("frequency")["weight"]
    np.testing.assert_allclose(weights, [0.9, 0, 0, 0.3, 0], atol=1e-3)


def test_a_peak_at_equal_classes_is_no_frequency():
    cycle = range(11)
    matrix = cyclic(lambda d: 3.0 * (d == 0) + math.cos(2 * math.pi * 4 * d / 11), cycle)
    everywhere = fit_frequencies(matrix, cycle).set_index("frequency")["weight"]
    assert (everywhere > 0.3).all()
    waves = fit_frequencies(matrix, cycle, equal_classes=False).set_index("frequency")["weight"]
    assert waves[4] > 0.8
    assert waves.drop(4).abs().max() < 0.1 * waves[4]


def test_the_profile_is_a_mean_over_equal_differences():
    values = xr.DataArray(
        [[np.nan, 0.2, 0.6], [0.2, np.nan, 0.4], [0.6, 0.4, np.nan]],
        {"query": [0, 0, 1], "other": [0, 0, 1]},
        ["query", "other"],
    )
    profile = similarity_profile(values, range(3))
    assert profile.index.tolist() == [0, 1, 2]
    assert profile.tolist() == pytest.approx([0.2, 0.5, 0.5])


def test_a_similarity_without_class_labels_is_refused():
    with pytest.raises(ValueError, match=r"labelled by classes, here 1 to 4; got 'a'"):
        fit_frequencies(xr.DataArray([[1.0]], {"query": ["a"], "other": [1]}, ["query", "other"]), (1, 2, 4, 3))


def test_a_projection_leaves_the_rest_alone():
    task = make_task("subtraction", 7, positional=True)
    _, places = task.table()
    logits = np.random.default_rng(0).normal(size=(7, 7, 4))
    part = wave_of_answer(logits, places.numpy(), [1, 3])
    np.testing.assert_allclose(wave_of_answer(part, places.numpy(), [1, 3]), part, atol=1e-12)
    np.testing.assert_allclose(wave_of_answer(logits - part, places.numpy(), [1, 3]), 0, atol=1e-12)
    waves = [f(2 * np.pi * k * places.numpy() / 7) for k in (1, 3) for f in (np.cos, np.sin)]
    expected = sum(w[..., None] * (w[..., None] * logits).sum((0, 1)) / (w**2).sum() for w in waves)
    np.testing.assert_allclose(part, expected, atol=1e-12)


@pytest.mark.parametrize("name", TASKS)
def test_progress_measures_of_a_known_network(name):
    task = make_task(name, 11, positional=True)
    split = task.split(40, 30, seed=1)
    model = Wave(task, frequency=2, size=8.0)
    losses = progress_measures(model, task, split, [2]).set_index("measure")["loss"]
    with torch.no_grad():
        own = F.nll_loss(model(split.validation_tokens), split.validation_labels)
        logits = torch.zeros(task.vocabulary)
    assert losses["validation"] == pytest.approx(float(own), rel=1e-5)
    assert losses["restricted"] == pytest.approx(losses["validation"], rel=1e-5)
    uniform = float(-logits.log_softmax(-1)[0])  # without its frequency it says nothing, but for the normaliser
    assert losses["excluded"] == pytest.approx(uniform, abs=0.05)
    other = progress_measures(model, task, split, [3]).set_index("measure")["loss"]
    assert other["excluded"] == pytest.approx(other["training"], rel=1e-4)
    assert other["restricted"] == pytest.approx(uniform, abs=0.05)


def test_noise_is_restricted_away():
    task = make_task("addition", 11, positional=True)
    split = task.split(40, 30, seed=1)
    losses = progress_measures(Wave(task, frequency=2, size=8.0, noise=3.0), task, split, [2]).set_index("measure")
    assert losses.loc["restricted", "loss"] < losses.loc["validation", "loss"]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    import explaind

    recipe = Recipe(
        operation="multiplication",
        modulus=7,
        num_train=14,
        num_validation=6,
        width=8,
        heads=2,
        hidden=12,
        learning_rate=0.02,
        betas=(0.9, 0.98),
        weight_decay=1.0,
        max_steps=4,
        stop=StopRule(train_accuracy=1.0, validation_accuracy=1.0),
    )
    store = tmp_path_factory.mktemp("frequencies") / "run.zarr"
    curves = train(recipe, store, progress=False)
    return recipe, explaind.open_run(store, model=recipe.make_model()), curves


def test_measures_over_checkpoints(recorded):
    recipe, run, curves = recorded
    shares = spectra_over_steps(recipe, run, [0, 4])
    assert shares["step"].unique().tolist() == [0, 4]
    assert len(shares) == 2 * 3 * 3
    losses = progress_over_steps(recipe, run, recipe.make_split(), [1], [0, 2, 4])
    table = losses.pivot_table(index="step", columns="measure", values="loss")
    np.testing.assert_allclose(table["training"], curves["train_loss"].loc[[0, 2, 4]], rtol=1e-5)
    np.testing.assert_allclose(table["validation"], curves["validation_loss"].loc[[0, 2, 4]], rtol=1e-5)


def test_the_figures_mark_key_frequencies(recorded):
    recipe, run, _ = recorded
    task = recipe.task
    fit = pd.DataFrame({"frequency": [1, 2, 3], "weight": [0.1, 0.0, -0.2]})
    bars, line = frequency_fit(fit, pd.Series([1.0, 0.2, 0.2], name="similarity"), [3], task).axes
    other, key = bars.containers
    assert [bar.get_height() for bar in other] == [0.1, 0.0]
    assert [bar.get_height() for bar in key] == [-0.2]
    assert line.lines[0].get_ydata().tolist() == [1.0, 0.2, 0.2]

    assert line.get_xlabel() == "d = log₃(class / other class) mod 6"
    shares = spectra_over_steps(recipe, run, [4])
    spectra_axes = frequency_spectra(shares, [1], task).axes
    assert spectra_axes[-1].get_xlabel() == "frequency f of waves cos(2π f k / 6), k = log₃(residue)"
    titles = [axes.get_title() for axes in spectra_axes]
    assert [title.split(":")[0] for title in titles] == ["embedding", "neurons", "logits"]


def test_the_figure_of_progress_has_a_line_for_every_measure(recorded):
    recipe, run, _ = recorded
    losses = progress_over_steps(recipe, run, recipe.make_split(), [1], [0, 2, 4])
    figure = progress_curves(losses, Phases(memorised=1, half_generalised=2, generalised=3, end=4).spans)
    (axes,) = figure.axes
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines if line.get_label()[0] != "_"}
    assert len(lines) == 4
    assert lines["training"] == losses.loc[losses["measure"] == "training", "loss"].tolist()
    assert axes.get_ylabel() == "loss (nats)"
