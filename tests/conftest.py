"""One thread: sums come out in the same order on every machine, and small problems run faster."""

import matplotlib
import pytest
import torch

pytest.register_assert_rewrite("tests.traced", "tests.twin", "tests.unfreezing")  # so that failures show numbers
torch.set_num_threads(1)
matplotlib.use("Agg")
