"""Forward and backward passes, steps and `zero_grad` in any number and order."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr

from tests.cases import mlp, query
from tests.traced import FEATURES, LABELS, recorded, step_on


@pytest.mark.parametrize("place", ["before backward", "after step", "to zeros"])
def test_gradients_may_be_cleared_anywhere(place, tmp_path):
    def body(model, optimizer, recorder):
        for start in (0, 3, 6):
            if place != "after step":
                optimizer.zero_grad(set_to_none=place != "to zeros")
            F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3]).backward()
            optimizer.step()
            if place == "after step":
                optimizer.zero_grad()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert [run.call_examples(step).tolist() for step in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert run.verify().bit_exact


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("forward", ["one by one", "both first"])
def test_a_zeroed_micro_batch_does_not_count(forward, set_to_none, tmp_path):
    def body(model, optimizer, recorder):
        for _ in range(2):
            if forward == "both first":
                dropped = F.cross_entropy(model(FEATURES[0:2]), LABELS[0:2])
                kept = F.cross_entropy(model(FEATURES[5:7]), LABELS[5:7])
                dropped.backward()
                optimizer.zero_grad(set_to_none=set_to_none)
            else:
                F.cross_entropy(model(FEATURES[0:2]), LABELS[0:2]).backward()
                optimizer.zero_grad(set_to_none=set_to_none)
                kept = F.cross_entropy(model(FEATURES[5:7]), LABELS[5:7])
            kept.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)

    run, _ = recorded(tmp_path / "run.zarr", body)
    for step in range(2):
        (call,) = run.calls(step)
        assert torch.equal(call.inputs["0"], FEATURES[5:7])
    assert run.verify().bit_exact


@pytest.mark.filterwarnings("ignore::explaind.errors.UnattributedWarning")
def test_forgotten_gradients_count_again_in_the_next_step_as_no_example(tmp_path):
    def body(model, optimizer, recorder):
        for start in (0, 3, 6):
            F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3]).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert run.call_examples(1).tolist() == [3, 4, 5]
    result = run.attribute(query(), by=("query", "example", "step"))
    result.check()
    assert np.abs(result.dataset.other.sel(step=0)).max() < 1e-14
    assert np.abs(result.dataset.other.sel(step=1)).min() > 1e-6


def test_a_second_backward_through_one_call_adds_up(tmp_path):
    def body(model, optimizer, recorder):
        out = model(FEATURES[:3])
        F.cross_entropy(out, LABELS[:3]).backward(retain_graph=True)
        out.square().mean().backward()
        optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert len(run.calls(0)) == 1
    fresh = mlp()
    out = fresh(FEATURES[:3])
    (F.cross_entropy(out, LABELS[:3]) + out.square().mean()).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in fresh.parameters()])
    torch.testing.assert_close(run.flat_gradient(0), expected, rtol=1e-12, atol=1e-15)
    result = run.attribute(query(), by=("query", "example"))
    result.check()
    assert np.abs(result.dataset.other).max() < 1e-14


def test_accumulated_micro_batches_are_calls_of_one_step(tmp_path):
    def body(model, optimizer, recorder):
        for rows in [(slice(0, 2), slice(2, 5), slice(5, 6)), (slice(6, 7), slice(7, 9), slice(0, 1))]:
            optimizer.zero_grad()
            for part in rows:
                (F.cross_entropy(model(FEATURES[part]), LABELS[part]) / 3).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert [len(call.examples) for call in run.calls(0)] == [2, 3, 1]
    assert run.call_examples(1).tolist() == [6, 7, 8, 0]
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step"))
    result.check()
    assert np.abs(result.dataset.other).max() < 1e-14


def test_forward_calls_outside_the_loss_are_ignored(tmp_path):
    def body(model, optimizer, recorder):
        for start in (0, 2):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(FEATURES[start : start + 2]), LABELS[start : start + 2])
            with torch.no_grad():
                model(FEATURES[6:])
            model(FEATURES[4:6]).sum()  # has a graph, but no loss
            model.eval()
            model(FEATURES[8:])
            model.train()
            loss.backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert [len(run.calls(step)) for step in range(2)] == [1, 1]
    assert run.examples.tolist() == [0, 1, 2, 3]
    assert zarr.open_group(tmp_path / "run.zarr", mode="r")["inputs/0"].shape == (4, 3)
    assert run.verify().bit_exact


@pytest.mark.parametrize("of_inputs", [True, False], ids=["of inputs", "of parameters"])
def test_gradients_taken_to_look_at_are_ignored(of_inputs, tmp_path):
    """Saliency maps, adversarial examples or gradient norms within the loop change no `.grad`."""

    def body(model, optimizer, recorder):
        for start in (0, 3, 6):
            optimizer.zero_grad()
            x = FEATURES[start : start + 3].clone().requires_grad_()
            torch.autograd.grad(model(x).sum(), x if of_inputs else list(model.parameters()))
            F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3]).backward()
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert [len(run.calls(step)) for step in range(3)] == [1, 1, 1]
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "step"))
    result.check()
    assert np.abs(result.dataset.other).max() < 1e-14


def test_gradients_set_by_hand_from_autograd_are_recorded(tmp_path):
    def body(model, optimizer, recorder):
        for start in (0, 3, 6):
            loss = F.cross_entropy(model(FEATURES[start : start + 3]), LABELS[start : start + 3])
            parameters = list(model.parameters())
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert [run.call_examples(step).tolist() for step in range(3)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert run.verify().bit_exact


def test_a_model_applied_twice_in_a_row_is_two_calls(tmp_path):
    def body(model, optimizer, recorder):
        optimizer.zero_grad()
        F.cross_entropy(model(model(FEATURES[:3])), LABELS[:3]).backward()
        optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert len(run.calls(0)) == 2
    result = run.attribute(query(), by=("query", "example"))
    result.check()
    assert np.abs(result.dataset.other).max() < 1e-14


def test_a_step_without_any_gradient_is_recorded(tmp_path):
    def body(model, optimizer, recorder):
        step_on(model, optimizer, slice(0, 3))
        optimizer.zero_grad(set_to_none=False)
        optimizer.step()
        step_on(model, optimizer, slice(3, 6))
        optimizer.zero_grad()
        optimizer.step()

    run, _ = recorded(tmp_path / "run.zarr", body)
    assert run.num_steps == 4
    assert [len(run.calls(step)) for step in range(4)] == [1, 0, 1, 0]
    assert run.verify().bit_exact
    result = run.attribute(query(), by=("query", "example", "update_step", "layer"))
    result.check()
    assert np.abs(result.dataset.contribution.sel(update_step=1)).max() > 1e-6  # momentum goes on
    assert np.abs(result.dataset.contribution.sel(update_step=3)).max() == 0
