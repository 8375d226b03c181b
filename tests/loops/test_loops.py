"""Every row of the table, measured: exact in both storage modes, or refused as the page says."""

import inspect

import pytest
import torch

from tests.loops.measure import measure
from tests.loops.table import ROWS, bounds, cells, committed

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # torch.compile's own import
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # torch.func on EmbeddingBag
]


@pytest.fixture(scope="module", params=ROWS, ids=str)
def measured(request):
    return request.param, measure(request.param)


def test_the_row_is_exact_or_refused(measured):
    row, measurement = measured
    if measurement.refusal:
        return
    assert measurement.difference <= 1e-9
    assert measurement.closure <= 1e-12
    rounding = torch.finfo(row.dtype).eps
    assert (measurement.other > 1e-6) if row.foreign else (measurement.other <= 1e4 * rounding)
    assert measurement.stored_difference <= max(1e-9, 1e3 * rounding)


def test_the_page_says_what_was_measured(measured):
    row, measurement = measured
    line = committed()[row.name]
    now = cells(row, measurement)
    assert [cell.startswith("< ") for cell in line] == [cell.startswith("< ") for cell in now]
    assert [cell for cell in line if not cell.startswith("< ")] == [cell for cell in now if not cell.startswith("< ")]
    for name, limit in bounds(line).items():
        assert getattr(measurement, name) < limit


def test_the_page_has_these_rows_in_this_order():
    assert list(committed()) == [row.name for row in ROWS]
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_every_optimizer_of_torch_has_a_row():
    classes = [name for name, item in vars(torch.optim).items() if inspect.isclass(item) and name != "Optimizer"]
    names = " ".join(row.name for row in ROWS)
    assert [name for name in classes if name not in names] == []
