"""Swaps, retraining, pruning and perturbations of a run that is too small to grok."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import explaind
from experiments.grokking.decompose import open_study
from experiments.grokking.figures.perturbations import perturbed_predictions
from experiments.grokking.figures.pruning import pruned_accuracy
from experiments.grokking.figures.retraining import retrained_accuracy
from experiments.grokking.figures.swaps import SET_STYLES, swapped_accuracy
from experiments.grokking.model import LAYER_GROUPS, OUTER, PIPELINE
from experiments.grokking.perturbations import correlations, element_scores, perturb_elements, perturb_examples
from experiments.grokking.phases import Phases
from experiments.grokking.pruning import prune_curves
from experiments.grokking.recipes import Recipe, StopRule
from experiments.grokking.removal import replay_difference, retrain_window
from experiments.grokking.retraining import Condition, conditions, first_epochs, retrain
from experiments.grokking.swaps import LAYER_SETS, swap_curves
from experiments.grokking.training import train

RECIPE = Recipe(
    modulus=5,
    num_train=10,
    num_validation=5,
    width=8,
    heads=2,
    hidden=12,
    unused_positions=2,
    learning_rate=0.02,
    betas=(0.9, 0.98),
    weight_decay=0.5,
    max_steps=12,
    stop=StopRule(train_accuracy=1.0, validation_accuracy=1.0, patience=12),
)
SPLIT = RECIPE.make_split()
PHASES = Phases(memorised=4, half_generalised=8, generalised=10, end=12)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    store = tmp_path_factory.mktemp("run") / "run.zarr"
    return train(RECIPE, store, progress=False), open_study(RECIPE, store)


@pytest.fixture(scope="module")
def run(recorded):
    return recorded[1]


@pytest.fixture(scope="module")
def query():
    labels = SPLIT.validation_labels
    return explaind.Query(SPLIT.validation_tokens, output=explaind.outputs.log_prob(labels), names=tuple("abcde"))


@pytest.fixture(scope="module")
def scores(run, query):
    result = run.attribute(query, by=("query", "window", "element"), windows=5, tolerance=1e-3)
    return element_scores(result.dataset)


def series(axes, label):
    return next(line.get_ydata() for line in axes.get_lines() if line.get_label() == label)


def test_outer_layers_and_pipeline_are_the_whole_network():
    assert sorted(OUTER + PIPELINE) == sorted(LAYER_GROUPS)
    assert set(SET_STYLES) | set(LAYER_GROUPS) == set(LAYER_SETS)


def test_swaps_start_at_the_recorded_accuracies_and_end_at_nothing(recorded):
    curves, run = recorded
    swapped = swap_curves(run, SPLIT, sets=LAYER_SETS | {"everything": tuple(run.layers)}, num_checkpoints=5)
    assert swapped["step"].unique().tolist() == [0, 3, 6, 9, 12]
    plain = swapped.groupby("step")["plain_accuracy"].unique().explode()
    np.testing.assert_allclose(plain.astype(float), curves["validation_accuracy"][plain.index])
    assert (swapped.loc[swapped["step"] == 12, "difference"] == 0).all()
    everything = swapped[swapped["set"] == "everything"]
    np.testing.assert_allclose(everything["accuracy"], curves["validation_accuracy"].iloc[-1])


def test_a_swapped_set_has_its_final_weights(run):
    model = RECIPE.make_model()
    parameters = {name for layer in OUTER for name in run.layers[layer]}
    mixed = {name: run.params(12 if name in parameters else 6)[name] for name in run.table.names}
    model.load_state_dict(mixed)
    right = (model(SPLIT.validation_tokens).argmax(dim=-1) == SPLIT.validation_labels).double().mean()
    swapped = swap_curves(run, SPLIT, sets={"outer": OUTER}, num_checkpoints=3)
    assert swapped.set_index("step")["accuracy"][6] == pytest.approx(float(right))


def test_the_swap_figure_shows_its_table(run):
    swapped = swap_curves(run, SPLIT, num_checkpoints=4)
    groups, sets = swapped_accuracy(swapped, PHASES.spans).axes
    for axes, name in ((groups, "linear1"), (sets, "pipeline")):
        np.testing.assert_allclose(series(axes, name), swapped.loc[swapped["set"] == name, "difference"])


def test_a_retrained_network_begins_with_what_was_copied(run):
    """Everything copied is the recorded network, and its first step the recipe's first step from there."""
    whole = Condition(name="whole", layers=tuple(run.layers), step=12)
    curves = retrain(RECIPE, run, whole, seed=1, epochs=1)
    model = RECIPE.make_model()
    model.load_state_dict(run.params(12))
    optimizer = RECIPE.make_optimizer(model)
    expected = []
    for _ in range(2):
        log_probs = model(SPLIT.train_tokens)
        expected.append(float((log_probs.argmax(dim=-1) == SPLIT.train_labels).double().mean()))
        expected.append(float((model(SPLIT.validation_tokens).argmax(-1) == SPLIT.validation_labels).double().mean()))
        optimizer.zero_grad()
        F.nll_loss(log_probs, SPLIT.train_labels).backward()
        optimizer.step()
    assert curves["accuracy"].tolist() == pytest.approx(expected)
    assert curves[["epoch", "split"]].to_numpy().tolist() == [
        [0, "train"],
        [0, "validation"],
        [1, "train"],
        [1, "validation"],
    ]


def test_retraining_differs_by_condition_and_seed(recorded):
    curves, run = recorded
    chosen = conditions(curves.assign(train_accuracy=[0.2, 0.4, 0.6, *[0.4] * 4, *[1.0] * 6]), PHASES)
    parts = [retrain(RECIPE, run, each, seed=seed, epochs=3) for each in chosen for seed in (0, 1)]
    again = retrain(RECIPE, run, chosen[1], seed=1, epochs=3)
    pd.testing.assert_frame_equal(again, parts[3])
    assert [each.step for each in chosen] == [12, 12, 4, 2, 0]
    joined = pd.concat(parts)
    assert len(joined) == 5 * 2 * 2 * 4
    axes = retrained_accuracy(joined).axes[1]
    values = np.array([part.query("split == 'validation'")["accuracy"] for part in parts[-2:]])
    np.testing.assert_allclose(series(axes, "nothing (n = 2)"), values.mean(axis=0))
    last = axes.collections[-1].get_paths()[0].vertices
    spread = last[last[:, 0] == 3][:, 1]
    assert np.ptp(spread) == pytest.approx(2 * np.std(values[:, 3], ddof=1))


def test_the_first_epoch_is_that_of_validation():
    def part(seed, validation):
        rows = [(seed, epoch, "validation", value) for epoch, value in enumerate(validation)]
        rows += [(seed, epoch, "train", 1.0) for epoch in range(len(validation))]
        return pd.DataFrame(rows, columns=["seed", "epoch", "split", "accuracy"]).assign(condition="c")

    first = first_epochs([part(0, [0.1, 0.99, 0.5, 1.0]), part(1, [0.0, 0.2, 0.3, 0.4])])
    assert first["seed"].tolist() == [0, 1]
    assert first["last_accuracy"].tolist() == [1.0, 0.4]
    np.testing.assert_array_equal(first["epoch"], [1, np.nan])


def test_element_scores_sum_to_what_training_did(run, query, scores):
    result = run.attribute(query, by=("query", "element"), tolerance=1e-3).dataset
    np.testing.assert_allclose(scores, result.contribution + result.decay, atol=1e-12)
    total = result.prediction - result.initial
    np.testing.assert_allclose(scores.sum("element"), total, atol=2e-2 * float(result.path_length.max()))


def test_pruning_goes_from_nothing_to_the_whole_network(recorded, scores):
    curves, run = recorded
    importance = abs(scores).sum("query")
    pruned = prune_curves(run, SPLIT, importance, fractions=(0.0, 0.5, 1.0), num_draws=3)
    assert pruned.groupby("criterion")["draw"].nunique().to_dict() == {"influence": 1, "magnitude": 1, "random": 3}
    whole = pruned[pruned["fraction"] == 1]
    assert (whole["kl"] == 0).all() and (whole["agreement"] == 1).all()
    np.testing.assert_allclose(whole["accuracy"], curves["validation_accuracy"].iloc[-1])
    nothing = pruned[pruned["fraction"] == 0]
    assert nothing["kl"].nunique() == 1 and nothing["kl"].iloc[0] > 0
    assert pruned[pruned["fraction"] == 0.5]["kl"].nunique() == 5
    axes = pruned_accuracy(pruned).axes[2]
    np.testing.assert_allclose(series(axes, "|weight|"), pruned.loc[pruned["criterion"] == "magnitude", "kl"])


def test_weights_that_were_never_used_are_pruned_first(run, scores):
    """Of the used weights all are kept by any criterion as soon as there is room for them."""
    unused = next(parameter for parameter in run.table if parameter.name == "positions")
    fraction = 1 - unused.num_elements / run.table.num_elements
    pruned = prune_curves(run, SPLIT, abs(scores).sum("query"), fractions=(fraction,), num_draws=1)
    assert (pruned["kl"] == 0).all()


def test_the_last_steps_made_again_give_the_recorded_weights_bit_for_bit(run):
    for num_steps in (1, 5, 12):
        assert replay_difference(RECIPE, run, num_steps=num_steps) == 0.0


def test_an_example_is_left_out_of_the_loss_with_the_divisor_kept(run):
    """By hand: one step of the recorded AdamW with the gradient less the example's part."""
    without = retrain_window(RECIPE, run, num_steps=1, without=3)
    grads = run.example_grads(11)
    ids = np.unique(run.call_examples(11)).tolist()
    table, state = run.table, run.state(11)
    start = table.flatten(run.params(11), torch.float64)
    gradient = table.flatten({name: grad.double().sum(0) - grad[ids.index(3)] for name, grad in grads.items()})
    moments = [
        table.flatten({name: entries.get(key) for name, entries in state.items()}, torch.float64)
        for key in ("exp_avg", "exp_avg_sq")
    ]
    used = table.expand([float(bool(state[name])) for name in table.names])
    mean = (0.9 * moments[0] + 0.1 * gradient) / (1 - 0.9**12)
    size = ((0.98 * moments[1] + 0.02 * gradient**2) / (1 - 0.98**12)).sqrt() + RECIPE.eps
    expected = start - used * RECIPE.learning_rate * (0.5 * start + mean / size)
    torch.testing.assert_close(table.flatten(without, torch.float64), expected, rtol=1e-4, atol=1e-6)


def test_what_cannot_be_made_again_is_said(run):
    with pytest.raises(ValueError, match="num_steps must be from 1 to the run's 12; got 13"):
        retrain_window(RECIPE, run, num_steps=13)
    with pytest.raises(ValueError, match="there is no example 10 in the run; its ids go up to 9"):
        retrain_window(RECIPE, run, num_steps=1, without=10)


def test_in_a_single_step_both_readings_of_an_example_agree(run, query):
    """With one step there is no training left that could answer to the removal, but for the optimizer's scale."""
    perturbed = perturb_examples(RECIPE, run, query, num_chosen=4, num_steps=1, tolerance=1e-3, progress=False)
    assert len(perturbed) == 2 * 4 * 5
    assert perturbed.loc[perturbed["chosen"] == "top", "item"].nunique() == 4
    assert correlations(perturbed).set_index("chosen")["pearson"]["all"] > 0.9


def test_examples_are_scored_by_their_contribution(run, query):
    perturbed = perturb_examples(RECIPE, run, query, num_chosen=10, num_steps=3, tolerance=1e-3, progress=False)
    result = run.attribute(query, by=("query", "example"), steps=range(9, 12), tolerance=1e-3).dataset
    row = perturbed.iloc[7]
    assert row["score"] == float(result.contribution.sel(query=row["query"], example=row["item"]))
    top = perturbed[perturbed["chosen"] == "top"]
    sizes = abs(result.contribution).sum("query").to_series().sort_values(ascending=False)
    assert top["item"].unique().tolist() == sizes.index.tolist()


def test_an_element_is_zeroed_in_the_final_network(run, query, scores):
    perturbed = perturb_elements(run, query, scores, num_chosen=6, progress=False)
    assert len(perturbed) == 2 * 6 * 5
    row = perturbed.iloc[0]
    flat = run.flat_params(12).double()
    flat[row["item"]] = 0
    model = RECIPE.make_model().double()
    outputs = []
    for params in (run.flat_params(12).double(), flat):
        model.load_state_dict(run.table.unflatten(params))
        with torch.no_grad():
            outputs.append(query.output(model(SPLIT.validation_tokens))["abcde".index(row["query"])].item())
    assert row["change"] == pytest.approx(outputs[0] - outputs[1], abs=1e-12)
    assert row["score"] == float(scores.sel(element=row["item"], query=row["query"]))
    with pytest.raises(ValueError, match=r"num_chosen must be from 1 to the \d+ that there are; got 0"):
        perturb_elements(run, query, scores, num_chosen=0)


def test_correlations_are_those_of_the_pairs():
    score = np.array([1.0, 2.0, 3.0, 4.0])
    pairs = pd.DataFrame({"score": score, "change": score**3, "chosen": ["top", "top", "random", "random"]})
    found = correlations(pairs.assign(kind="element", num_steps=9)).set_index("chosen")
    assert found["spearman"]["all"] == pytest.approx(1.0)
    assert found["pearson"]["all"] == pytest.approx(np.corrcoef(score, score**3)[0, 1])
    assert found["mean_change"]["top"] == pytest.approx(4.5)
    assert found["num"].to_dict() == {"all": 4, "top": 2, "random": 2}


def test_the_perturbation_figure_has_a_panel_for_each_kind(run, query, scores):
    examples = perturb_examples(RECIPE, run, query, num_chosen=3, num_steps=2, tolerance=1e-3, progress=False)
    elements = perturb_elements(run, query, scores, num_chosen=3, progress=False)
    figure = perturbed_predictions(pd.concat([examples, elements]))
    assert [axes.get_title().split("\n")[0] for axes in figure.axes] == [
        "training examples, last 2 steps",
        "parameter elements, all 12 steps",
    ]
    pearson = correlations(examples).set_index("chosen")["pearson"]["all"]
    assert f"Pearson {pearson:.3f}" in figure.axes[0].get_title()
    top = figure.axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(top, examples.loc[examples["chosen"] == "top", ["score", "change"]])
    assert "counterfactual reading" in figure.get_supxlabel()
