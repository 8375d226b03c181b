"""One thread: sums come out in the same order on every machine, and small problems run faster.

In the processes that tests start too, such as notebooks: threads would wait for each other while all cores are busy.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch, numpy and scikit-learn are imported

import matplotlib
import pytest
import torch

pytest.register_assert_rewrite("tests.traced", "tests.twin", "tests.unfreezing")  # so that failures show numbers
torch.set_num_threads(1)
matplotlib.use("Agg")
