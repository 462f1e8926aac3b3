"""A few damaged files of every format in every run of the suite; `fuzz.py` reads as many as one likes."""

import pytest
from fuzz import fuzz
from fuzz_formats import FORMATS

COUNTS = {"run": 60, "report": 60}  # slower than the others
COUNT = 120


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_damaged_files_end_in_one_line(name):
    assert fuzz(name, COUNTS.get(name, COUNT)) == []
