"""Every claim runs end to end at smoke scale and gives every figure that its checks name."""

import math
from pathlib import Path

import pytest
import torch

from mixtura.claims import available, load, run
from mixtura.claims.gallery import save_record
from mixtura.systems import SYSTEMS


@pytest.mark.parametrize("system", available())
def test_the_smoke_run_gives_every_judged_figure_and_a_plot(system: str, tmp_path: Path):
    torch.set_num_threads(1)
    claim = load(system)
    record = run(system, "smoke", scratch=tmp_path / "scratch")
    assert record["verdict"] in ("holds", "fails")
    for check in claim.checks:
        value = record["seeds"][0][check.figure]
        assert value is not None and math.isfinite(value), check.figure
    save_record(claim, record, tmp_path)
    assert (tmp_path / f"{system}-smoke.png").stat().st_size > 1000


@pytest.mark.parametrize("system", available())
def test_a_claim_says_what_it_is(system: str):
    claim = load(system)
    assert claim.system == system
    assert claim.sentence and claim.paper and claim.metric and claim.baseline and claim.checks


def test_every_claim_belongs_to_a_built_system_and_every_built_system_has_one():
    assert set(available()) == {row.id for row in SYSTEMS if row.built}


def test_an_unknown_claim_lists_the_known_ones():
    with pytest.raises(ValueError, match="there is one for"):
        load("no-such-system")
