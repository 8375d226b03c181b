"""Agreement of two networks, where it is known."""

import pytest
import torch

from explaind.agreement import accuracy, argmax_agreement, mean_kl


def test_kl_is_that_of_the_two_distributions_and_has_a_direction():
    p, q = torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([[0.5, 0.5], [0.9, 0.1]])
    expected = (p * (p / q).log()).sum(dim=1).mean()
    assert mean_kl(p.log(), q.log() + 3.0) == pytest.approx(float(expected), rel=1e-6)
    assert mean_kl(q.log(), p.log()) == pytest.approx(float((q * (q / p).log()).sum(dim=1).mean()), rel=1e-6)
    assert mean_kl(p.log(), p.log()) == 0.0


def test_kl_is_infinite_where_the_other_excludes_what_happens():
    assert mean_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -torch.inf]])) == torch.inf


def test_agreement_needs_no_right_answers():
    outputs = torch.eye(3)
    assert argmax_agreement(outputs, outputs.roll(1, dims=0)) == 0.0
    assert argmax_agreement(outputs, 5 * outputs) == 1.0
    assert accuracy(outputs, torch.tensor([0, 1, 0])) == pytest.approx(2 / 3)


def test_outputs_that_do_not_belong_together_are_refused():
    outputs = torch.eye(3)
    with pytest.raises(ValueError, match=r"labels \[input\], at least one; got the shapes \(3, 3\) and \(2,\)"):
        accuracy(outputs, torch.zeros(2))
    for measure in (argmax_agreement, mean_kl):
        with pytest.raises(ValueError, match=r"at least one input; got the shapes \(3, 3\) and \(1, 3\)"):
            measure(outputs, outputs[:1])
        with pytest.raises(ValueError, match=r"at least one input; got the shapes \(0, 3\)"):
            measure(outputs[:0], outputs[:0])
