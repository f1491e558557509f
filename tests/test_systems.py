"""The registry: forty rows, and nothing pretends."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mixtura.systems import ROOMS, SYSTEMS, get


def test_there_are_forty_different_rows():
    assert len(SYSTEMS) == len({row.id for row in SYSTEMS}) == len({row.arxiv for row in SYSTEMS}) == 40


@pytest.mark.parametrize("row", SYSTEMS, ids=lambda row: row.id)
def test_a_row_is_complete(row):
    assert row.room in ROOMS
    assert re.fullmatch(r"\d{4}\.\d{4,5}", row.arxiv)
    assert row.title and row.line.endswith(".")


@pytest.mark.parametrize("row", [row for row in SYSTEMS if row.built], ids=lambda row: row.id)
def test_the_names_of_a_built_system_exist(row):
    assert all(callable(found) for found in row.resolve())


def test_an_unknown_id_suggests_a_close_one():
    with pytest.raises(ValueError, match="did you mean mc-moe"):
        get("mcmoe")


def test_importing_mixtura_is_quick_because_it_leaves_torch_alone():
    code = "import sys, mixtura; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_readme_lists_every_system():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert all(f"`{row.id}`" in readme for row in SYSTEMS)
