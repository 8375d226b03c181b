"""Measure every row and write `docs/coverage.md`."""

import torch

from tests.loops.measure import measure
from tests.loops.table import PAGE, ROWS, page

if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page({row.name: measure(row) for row in ROWS}))
