"""The examples run, with smaller settings than by default, and leave what they promise."""

import sys

import matplotlib.pyplot as plt
import pytest

pytest.importorskip("sklearn")

from examples import digits_resnet

SMALL = ["--num-train", "200", "--num-queries", "2", "--width", "3", "--epochs", "2", "--batch-size", "50"]


@pytest.mark.parametrize("norm", [[], ["--no-batchnorm"]], ids=["batchnorm", "no-batchnorm"])
def test_digits_are_learned_attributed_and_drawn(tmp_path, capsys, norm):
    open_before = plt.get_fignums()
    digits_resnet.main([*SMALL, *norm, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "test accuracy" in printed
    assert "sum of terms differs from the prediction by" in printed
    assert {"raised", "lowered"} <= set(printed.split())
    assert plt.imread(tmp_path / "digits.png").std() > 0.05
    assert plt.get_fignums() == open_before


def test_the_defaults_learn_to_read(tmp_path):
    options = digits_resnet.parse(["--out", str(tmp_path)])
    digits = digits_resnet.load_digits(options.num_train, options.seed)
    digits_resnet.train(digits, options)
    _, model = digits_resnet.trained_model(options)
    read = model(digits.test_images).argmax(dim=1)
    assert float((read == digits.test_labels).float().mean()) >= 0.95


def test_without_scikit_learn_the_example_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SystemExit, match="pip install scikit-learn"):
        digits_resnet.load_digits(100, 0)
