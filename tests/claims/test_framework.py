"""Checks, verdicts and records."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from mixtura.claims import agrees
from mixtura.claims.framework import Check, Claim, judge, run_claim
from mixtura.claims.gallery import entry, load_record, save_record, status, summary
from mixtura.systems import System


def claim_of(values: dict[int, float], calls: list[int] | None = None, **check) -> Claim:
    def run(scale: str, seed: int, scratch: Path) -> dict:
        if calls is not None:
            calls.append(seed)
        return {"gain": values[seed]}

    return Claim(
        system="toy",
        sentence="It gains.",
        paper="1.0 (Table 1)",
        metric="gain",
        baseline="none",
        checks=(Check(figure="gain", **(check or {"at_least": 1.0})),),
        run=run,
        seeds={"smoke": (0,), "cpu": tuple(values), "gpu": (0,)},
    )


@pytest.mark.parametrize(
    ("values", "check", "verdict"),
    [
        ([1.0, 2.0, 3.0], {"at_least": 2.0}, "holds"),
        ([1.0, 2.0, 3.0], {"at_least": 2.1}, "fails"),
        ([1.0, 2.0, 3.0], {"at_least": 1.5, "over": "every"}, "fails"),
        ([1.0, 2.0, 3.0], {"at_most": 3.0, "over": "every"}, "holds"),
        ([1.0, 2.0, 3.0], {"at_most": 1.9}, "fails"),
        ([1.0, float("nan"), 3.0], {"at_least": 0.0}, "fails"),
    ],
)
def test_verdicts(values, check, verdict):
    claim = claim_of(dict(enumerate(values)), **check)
    assert judge(claim, [{"gain": v} for v in values])[0] == verdict


def test_a_missing_figure_never_holds():
    claim = claim_of({0: 1.0})
    assert judge(claim, [{"other": 5.0}])[0] == "fails"


def test_a_mean_within_one_standard_error_of_the_bound_is_not_settled():
    claim = claim_of({0: 1.0}, at_least=1.9)
    rows = judge(claim, [{"gain": v} for v in (1.0, 2.0, 3.0)])[1]
    assert rows[0]["holds"] and not rows[0]["settled"]
    rows = judge(claim, [{"gain": v} for v in (2.9, 3.0, 3.1)])[1]
    assert rows[0]["settled"]


def test_a_check_needs_exactly_one_bound():
    with pytest.raises(ValueError, match="exactly one"):
        Check(figure="gain")
    with pytest.raises(ValueError, match="exactly one"):
        Check(figure="gain", at_least=1.0, at_most=2.0)


def test_a_record_holds_what_the_gallery_needs_and_survives_the_disk(tmp_path: Path):
    claim = claim_of({0: 1.0, 1: 2.0, 2: 4.0})
    record = run_claim(claim, "cpu", scratch=tmp_path / "scratch")
    needed = {"system", "scale", "verdict", "seeds", "metric", "baseline", "margin", "paper", "seconds"}
    assert needed | {"peak_memory_bytes", "machine", "versions", "commit"} <= set(record)
    assert record["verdict"] == "holds" and [row["gain"] for row in record["seeds"]] == [1.0, 2.0, 4.0]
    save_record(claim, record, tmp_path)
    assert load_record("toy", tmp_path) == record
    row = System("toy", "Toy", "0000.00000", "lm", "A toy.", ("mixtura.systems.get",))
    assert status(row, tmp_path) == "holds"
    assert "Verdict: **holds**" in entry(row, record)
    assert "holds" in summary(record)


def test_finished_seeds_are_not_run_again_by_the_same_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mixtura.claims.framework._commit", lambda: "abc")
    calls: list[int] = []
    claim = claim_of({0: 1.0, 1: 2.0}, calls)
    run_claim(claim, "cpu", seeds=[0], scratch=tmp_path)
    run_claim(claim, "cpu", scratch=tmp_path)
    assert calls == [0, 1]
    monkeypatch.setattr("mixtura.claims.framework._commit", lambda: "def")
    run_claim(claim, "cpu", scratch=tmp_path)
    assert calls == [0, 1, 0, 1]


def test_an_interrupted_seed_finds_what_it_kept_but_only_by_the_same_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    seen: list[int] = []

    def run(scale: str, seed: int, scratch: Path) -> dict:
        scratch.mkdir(parents=True, exist_ok=True)
        seen.append(len(list(scratch.iterdir())))
        (scratch / f"part{seen[-1]}").touch()
        if len(seen) < 4:
            raise KeyboardInterrupt
        return {"gain": 1.0}

    claim = replace(claim_of({0: 1.0}), run=run)
    for commit in ("abc", "abc", "abc+", "abc+"):
        monkeypatch.setattr("mixtura.claims.framework._commit", lambda commit=commit: commit)
        with contextlib.suppress(KeyboardInterrupt):
            run_claim(claim, "cpu", seeds=[0], scratch=tmp_path)
    assert seen == [0, 1, 0, 0]  # a changed tree is no commit
    assert not list(tmp_path.glob("*-abc+"))  # a finished seed keeps its figures only


def test_a_rerun_is_compared_with_its_record(tmp_path: Path):
    claim = claim_of({0: 1.0})
    record = run_claim(claim, "cpu", scratch=tmp_path)
    assert agrees(claim, record, {"seed": 0, "gain": 1.01}) == []
    assert agrees(claim, record, {"seed": 0, "gain": 1.2}) == ["gain: 1 recorded, 1.2 now"]


def test_an_unknown_scale_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="scale must be one of"):
        run_claim(claim_of({0: 1.0}), "large", scratch=tmp_path)  # type: ignore[arg-type]
