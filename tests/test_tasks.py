"""The four tasks, the second architecture, and the table over tasks and seeds."""

import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
import xarray as xr

import explaind
from experiments.grokking import across
from experiments.grokking.decompose import open_study
from experiments.grokking.figures import kernel, similarity, umap
from experiments.grokking.figures.across import layer_shares
from experiments.grokking.layer_tables import layers_by_phase
from experiments.grokking.measures import class_difference_profile
from experiments.grokking.model import layer_groups
from experiments.grokking.positional import PositionalTransformer
from experiments.grokking.recipe import Recipe, StopRule
from experiments.grokking.recipes import RECIPES, paper, positional, quick
from experiments.grokking.summary import in_markdown
from experiments.grokking.task import TASKS, ModularAddition, ModularDivision, make_task, primitive_root
from experiments.grokking.training import train

OPERATIONS = {
    "addition": lambda a, b: a + b,
    "subtraction": lambda a, b: a - b,
    "multiplication": lambda a, b: a * b,
    "division": lambda a, b: a * pow(b, -1, 7),
}


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def small(task, *, positional=False, seed=0):
    return Recipe(
        operation=task,
        modulus=7,
        positional=positional,
        num_train=14,
        num_validation=6,
        width=8,
        heads=2,
        hidden=12,
        embedding_scale=0.3,
        learning_rate=0.02,
        betas=(0.9, 0.98),
        weight_decay=1.0,
        max_steps=12,
        stop=StopRule(train_accuracy=1.0, validation_accuracy=1.0),
        seed=seed,
    )


@pytest.mark.parametrize("positional", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_labels_are_the_operations_results(name, positional):
    task = make_task(name, 7, positional=positional)
    tokens, labels = task.pairs()
    assert len(tokens) == task.num_pairs == len({tuple(row) for row in tokens.tolist()})
    assert int(tokens.max()) < task.vocabulary
    a, b = task.operands(tokens)
    expected = [OPERATIONS[name](int(x), int(y)) % 7 for x, y in zip(a, b, strict=True)]
    assert labels.tolist() == expected


@pytest.mark.parametrize("name", TASKS)
def test_a_bag_of_tokens_tells_every_pair(name):
    task = make_task(name, 7)
    tokens, _ = task.pairs()
    assert len({tuple(sorted(row)) for row in tokens.tolist()}) == task.num_pairs


@pytest.mark.parametrize("name", TASKS)
def test_the_cycle_turns_the_operation_into_a_sum_or_difference_of_places(name):
    task = make_task(name, 11)
    tokens, answers = task.table()
    first, second = torch.meshgrid(*2 * [torch.arange(len(task.cycle))], indexing="ij")
    sign = -1 if name in ("subtraction", "division") else 1
    assert torch.equal(answers, (first + sign * second) % len(task.cycle))
    a, b = task.operands(tokens)
    assert torch.equal(task.places(a), first)
    assert torch.equal(task.places(b), second)


@pytest.mark.parametrize("name", TASKS)
def test_pairs_are_sorted_by_the_tasks_own_answer(name):
    task = make_task(name, 7)
    tokens, labels = task.pairs()
    order = task.sort(tokens)
    answers = list(dict.fromkeys(labels[order].tolist()))
    assert answers == list(task.cycle)
    first, _ = task.operands(tokens[order])
    keys = list(zip(task.places(labels[order]).tolist(), task.places(first).tolist(), strict=True))
    assert keys == sorted(keys)
    assert len(set(keys)) == task.num_pairs


def test_tasks_are_called_by_their_operation():
    subtraction, division = make_task("subtraction", 7), make_task("division", 7)
    assert (subtraction.expression, division.expression) == ("a − b mod 7", "a / b mod 7")
    assert (subtraction.order, division.order) == ("in ascending order", "in the order 3⁰, 3¹, 3², …")
    assert subtraction.place_name("residue") == "residue"
    assert subtraction.difference_name("c", "d") == "c − d mod 7"
    assert division.place_name("residue") == "log₃(residue)"
    assert division.difference_name("c", "d") == "log₃(c / d) mod 6"


@pytest.mark.parametrize("name", TASKS)
def test_class_profiles_are_over_differences_in_the_tasks_group(name):
    cycle, n = make_task(name, 7).cycle, len(make_task(name, 7).cycle)
    values = [[(k - j + n // 2) % n - n // 2 for k in range(n)] for j in range(n)]
    kernel = xr.DataArray(values, {"query": list(cycle), "group": list(cycle)}, ["query", "group"])
    profile = class_difference_profile(kernel.sortby(["query", "group"]).T, cycle)
    assert profile.values.tolist() == profile["difference"].values.tolist() == list(range(-(n // 2), n - n // 2))
    some = class_difference_profile(kernel[:2, :1], cycle)
    assert some["difference"].values[some.notnull()].tolist() == [-1, 0]


@pytest.mark.parametrize("name", ["subtraction", "multiplication"])
def test_figures_are_in_the_order_of_the_tasks_group_and_name_its_operation(name):
    task = make_task(name, 7)
    classes, pairs = sorted(task.cycle), ["query", "example"]
    values = torch.arange(len(classes) ** 2, dtype=torch.float64).reshape(1, len(classes), len(classes)).numpy()
    phases = {"phase": ["memorisation"], "query": classes, "group": classes}
    by_class = xr.DataArray(values, phases, list(phases), "kernel").assign_coords(
        first_step=("phase", [0]), last_step=("phase", [9])
    )
    figure = kernel.kernel_by_class(by_class, task)
    heat, profile = figure.axes[:2]
    assert [label.get_text() for label in heat.get_yticklabels()] == [
        str(c) for c in ([0, 1, 2, 4, 5, 6] if name == "subtraction" else task.cycle)
    ]
    assert (heat.get_ylabel(), heat.get_xlabel()) == (
        f"validation class: {task.expression}",
        f"training class: {task.expression}",
    )
    assert profile.get_xlabel() == task.difference_name("training class", "validation class")
    windows = {"layer": ["decoder"], "window": ["start"]}
    in_windows = xr.DataArray(values[None], windows | {"query": [*"abcdef", "g"][: len(classes)]}, [*windows, *pairs])
    labels = {f"{axis}_class": (axis, list(task.cycle)) for axis in pairs}
    labels |= {"first_step": ("window", [0]), "last_step": ("window", [4])}
    figure = kernel.kernel_in_windows(in_windows.assign_coords(labels), task)
    assert figure.axes[0].get_xlabel() == f"training, {task.expression}"
    assert f"{task.expression}, {task.order}" in figure.get_suptitle()
    matrices = xr.DataArray(values, dims=["layer", "query", "other"]).assign_coords(layer=["decoder"])
    figure = similarity.similarity(matrices.assign_coords({"class": ("query", list(task.cycle))}), task)
    assert figure.axes[0].get_ylabel() == task.expression
    points = pd.DataFrame({"x": 0.0, "y": 0.0, "class": task.cycle})
    figure = umap.embedding(points, task, layer="linear2")
    assert figure.axes[0].collections[0].get_array().tolist() == list(range(len(classes)))
    assert figure.axes[1].get_ylabel() == task.place_name(task.expression)


def test_zero_is_no_operand_of_multiplication_and_division():
    for name in ("multiplication", "division"):
        tokens, labels = make_task(name, 7, positional=True).pairs()
        assert int(tokens[:, :2].min()) == 1
        assert labels.bincount().tolist() == [0] + 6 * [6]


def test_a_task_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"no task 'power'; the tasks are addition, subtraction, multiplication, div"):
        make_task("power", 7)
    with pytest.raises(ValueError, match=r"no task 'power'"):
        paper(task="power")
    with pytest.raises(ValueError, match=r"need a modulus that is an odd prime, got 9"):
        ModularDivision(9)
    with pytest.raises(ValueError, match=r"modulus must be at least 2, got 1"):
        ModularAddition(1)
    with pytest.raises(ValueError, match=r"at most 28, the number of unordered pairs modulo 7; got num_train=20"):
        ModularAddition(7).split(20, 9)
    with pytest.raises(ValueError, match=r"at most 49, the number of ordered pairs"):
        ModularAddition(7, positional=True).split(50)


@pytest.mark.parametrize("modulus", [3, 5, 13, 31, 113])
def test_a_primitive_root_has_all_residues_as_powers(modulus):
    root = primitive_root(modulus)
    assert sorted(pow(root, k, modulus) for k in range(modulus - 1)) == list(range(1, modulus))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_every_task(name, task):
    recipe = RECIPES[name](1, task=task)
    split, model = recipe.make_split(), recipe.make_model()
    assert model(split.train_tokens[:3]).shape == (3, recipe.task.vocabulary)
    grouped = [parameter for group in layer_groups(model).values() for parameter in group]
    assert sorted(grouped) == sorted(parameter for parameter, _ in model.named_parameters())
    assert recipe == RECIPES[name](1, task=task)
    if name in ("quick", "paper") and task == "addition":
        assert recipe == {"quick": quick, "paper": paper}[name](1)


def test_the_second_architecture_is_the_published_one():
    recipe = positional()
    model = recipe.make_model()
    assert recipe.num_train == math.ceil(0.3 * 113**2)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes == {
        "positions": (3, 128),
        "embedding.weight": (114, 128),
        "attention_encoders.weight": (3 * 128, 128),
        "attention_decoders.weight": (128, 128),
        "linear1.weight": (512, 128),
        "linear1.bias": (512,),
        "linear2.weight": (128, 512),
        "linear2.bias": (128,),
        "decoder.weight": (114, 128),
    }
    assert float(model.embedding.weight.detach().std()) == pytest.approx(128**-0.5, rel=0.05)
    assert "positions" in layer_groups(model)["embedding"]


def test_the_second_architecture_equals_torchs_attention():
    model = PositionalTransformer(8, 12, heads=3, hidden=20).double()
    attention = torch.nn.MultiheadAttention(12, 3, bias=False, batch_first=True).double()
    attention.load_state_dict(
        {"in_proj_weight": model.attention_encoders.weight, "out_proj.weight": model.attention_decoders.weight}
    )
    tokens = torch.tensor([[3, 1, 7], [1, 3, 7]])
    x = model.embedding(tokens) + model.positions
    causal = torch.ones(3, 3).triu(1).bool()
    residual = (x + attention(x, x, x, attn_mask=causal, need_weights=False)[0])[:, -1]
    logits = model.decoder(residual + model.linear2(model.linear1(residual).relu()))
    torch.testing.assert_close(model(tokens), logits.log_softmax(-1))
    assert not torch.equal(*model(tokens))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match=r"heads must divide width; got heads=3, width=8"):
        PositionalTransformer(8, 8, heads=3, hidden=4)


@pytest.mark.parametrize(("task", "positional"), [("division", False), ("subtraction", True)])
def test_a_decomposition_closes(task, positional, tmp_path):
    recipe = small(task, positional=positional)
    curves = train(recipe, tmp_path / "run.zarr", progress=False)
    split = recipe.make_split()
    run = open_study(recipe, tmp_path / "run.zarr")
    query = explaind.Query(split.validation_tokens, output=explaind.outputs.log_prob(split.validation_labels))
    result = run.attribute(query, by=("query", "example", "step", "layer"), tolerance=1e-4)
    assert result.check().passed
    assert float(-result.total.mean()) == pytest.approx(curves["validation_loss"].iloc[-1], rel=1e-5)
    assert list(result.dataset["layer"].values) == list(layer_groups(run.model))


@pytest.fixture
def tiny(monkeypatch):
    """A recipe of tiny runs, whose phases are made up but for seed 1, which never groks."""

    def find(curves):
        if curves.attrs.get("fails"):
            raise ValueError("the validation accuracy never reached 0.5")
        return across.Phases(memorised=3, half_generalised=8, generalised=10, end=12)

    def trained(recipe, store, *, progress):
        curves = train(recipe, store, progress=progress)
        curves.attrs["fails"] = recipe.seed == 1
        return curves

    monkeypatch.setitem(RECIPES, "tiny", lambda seed, *, task: small(task, seed=seed))
    monkeypatch.setattr(across, "find_phases", find)
    monkeypatch.setattr(across, "train", trained)


def test_the_table_over_tasks_and_seeds(tiny, tmp_path, monkeypatch, capsys):
    arguments = ["--recipe", "tiny", "--tasks", "addition,division", "--seeds", "2", "--out", str(tmp_path), "--quiet"]
    follow, followed = across.follow, []

    def interrupted(recipe, directory):
        if recipe.operation == "division" and recipe.seed == 1:
            raise KeyboardInterrupt
        followed.append((recipe.operation, recipe.seed))
        follow(recipe, directory)

    monkeypatch.setattr(across, "follow", interrupted)
    assert across.main(arguments) == 130
    assert "goes on with the run" in capsys.readouterr().err
    assert followed == [("addition", 0), ("division", 0), ("addition", 1)]

    monkeypatch.setattr(across, "follow", lambda *run: (followed.append((run[0].operation, run[0].seed)), follow(*run)))
    assert across.main(arguments) == 0
    assert followed[3:] == [("division", 1)]
    runs, layers = pd.read_csv(tmp_path / "runs.csv"), pd.read_csv(tmp_path / "layers.csv")
    assert runs["seed"].tolist() == [0, 0, 1, 1]
    assert runs["failure"].notna().tolist() == [False, False, True, True]
    assert (runs["closure_error"].dropna() <= 1e-12).all()
    for share in ("share", "mean_share"):
        assert layers.groupby(["task", "phase"])[share].sum().tolist() == pytest.approx(6 * [1.0])
    assert len(pd.read_csv(tmp_path / "division-0" / "steps.csv")) == 12 * 6
    page = (tmp_path / "across.md").read_text()
    assert "| division | position-free | 0 | 3 | 8 | 10 | 12 |" in page
    assert "did not grok" in page
    for figure in ("layer_shares", "change_points"):
        assert {f"{figure}.png", f"{figure}.svg"} <= {path.name for path in tmp_path.iterdir()}
    stability = pd.read_csv(tmp_path / "change_points-stability.csv")
    assert stability["task"].tolist() == ["addition", "division"]
    assert (stability["seeds"] == 1).all()
    assert "| division | position-free | 1 |" in page.split("## Phases found by a statistic")[1]
    found = [pd.read_csv(tmp_path / f"{task}-0" / "change_points.csv") for task in ("addition", "division")]
    assert len(pd.read_csv(tmp_path / "change_points-found.csv")) == sum(map(len, found))
    assert not list(tmp_path.glob("*/run.zarr"))

    assert across.main([*arguments[:-1], "--recipe", "quick"]) == 1
    assert "run of another recipe" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        across.main(["--tasks", "power", "--out", str(tmp_path)])
    assert "there is no task 'power'" in capsys.readouterr().err


def test_a_phase_sums_its_steps_and_a_spike_counts_once_in_the_mean():
    steps = pd.DataFrame(
        [(0, "a", 1.0), (0, "b", 3.0), (1, "a", 2.0), (1, "b", 2.0), (2, "a", 90.0), (2, "b", 10.0), (3, "a", 1.0)],
        columns=["step", "layer", "influence"],
    ).assign(decay_influence=0.5, contribution=-1.0, decay=0.25)
    table = layers_by_phase(steps, across.Phases(memorised=1, half_generalised=3, generalised=3, end=3))
    rows = table.set_index(["phase", "layer"])
    assert rows.loc[("memorisation", "b"), ["start", "stop", "share", "mean_share"]].tolist() == [0, 1, 0.75, 0.75]
    circuit = rows.loc[("circuit formation", "a")]
    assert circuit[["influence", "decay_influence", "contribution", "decay"]].tolist() == [92.0, 1.0, -2.0, 0.5]
    assert circuit["share"] == pytest.approx(92 / 104)
    assert circuit["mean_share"] == pytest.approx((0.5 + 0.9) / 2)


def rows(shares):
    return pd.DataFrame(
        [
            ("division", "positional", seed, phase, layer, share, 2.0, 1.0)
            for seed in (0, 1)
            for phase in ("memorisation", "generalisation")
            for layer, share in shares[seed].items()
        ],
        columns=["task", "architecture", "seed", "phase", "layer", "mean_share", "influence", "decay_influence"],
    )


def test_the_page_gives_mean_and_spread():
    layers = rows({0: {"embedding": 0.2, "decoder": 0.8}, 1: {"embedding": 0.4, "decoder": 0.6}})
    runs = pd.DataFrame([{"task": "division", "architecture": "positional", "seed": 0, "failure": "never"}])
    page = in_markdown(runs, layers)
    assert "| division | positional | memorisation | 2 | 30.0 ± 14.1 % | 70.0 ± 14.1 % | 0.50 ± 0.00 |" in page
    assert "## Through which layers" not in in_markdown(runs, pd.DataFrame())


def test_the_figure_draws_every_seed_and_the_mean():
    small = rows({0: {"embedding": 0.2, "decoder": 0.8}, 1: {"embedding": 0.4, "decoder": 0.6}})
    large = rows({0: {"embedding": 0.05, "decoder": 0.95}, 1: {"embedding": 0.0, "decoder": 1.0}}).assign(task="other")
    axes, other = layer_shares(pd.concat([small, large])).axes
    assert axes.get_ylim() == other.get_ylim() == (0, 1.05)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["embedding", "decoder"]
    seeds, mean = axes.lines[:2]
    assert seeds.get_ydata().tolist() == [0.2, 0.8, 0.4, 0.6]
    assert mean.get_ydata().tolist() == pytest.approx([0.3, 0.7])
    assert axes.get_legend_handles_labels()[1] == ["memorisation", "generalisation"]
