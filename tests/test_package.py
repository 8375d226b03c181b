import subprocess
import sys

import pytest

import explaind


def test_every_public_name_is_there_and_no_other():
    assert set(explaind.__all__) <= set(dir(explaind))
    assert all(getattr(explaind, name) is not None for name in explaind.__all__)
    with pytest.raises(AttributeError, match="module 'explaind' has no attribute 'attribute'"):
        explaind.attribute  # noqa: B018


def test_names_are_imported_when_they_are_used():
    check = "import sys, explaind; assert 'torch' not in sys.modules; explaind.trace; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
