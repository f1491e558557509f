"""The claim of sharded experts runs end to end and its figures are ratios of what was simulated."""

import pytest

from mixtura.claims.hecate import CLAIM


def test_a_small_run_has_every_judged_figure(tmp_path):
    figures = CLAIM.run("smoke", 0, tmp_path)
    assert {check.figure for check in CLAIM.checks} <= figures.keys()
    cells = figures["detail"]["cells"]
    drawn = [cell["seconds"] for name, cell in cells.items() if not name.endswith("recorded")]
    assert len(drawn) == 6
    assert figures["over_ep_least"] == pytest.approx(min(c["ep"] / c["papers_rule"] for c in drawn))
    assert figures["over_rivals_least"] == pytest.approx(
        min(min(c[r] for r in ("faster", "smart", "flex")) / c["hecate"] for c in drawn)
    )
