"""The whole life on a tiny model: every stage measured, the results load, an interrupted life goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mixtura.data.texts import corpus
from mixtura.lm.life import LifeConfig, live
from mixtura.lm.report import write_report

CONFIG = LifeConfig(steps=2, batch_size=2, length=32)


def domains():
    return {name: corpus(name, characters=40_000) for name in ("code", "arithmetic")}


@pytest.fixture(scope="module")
def lived(tiny_dense: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("life")
    return live(tiny_dense, domains(), out, CONFIG), out


def test_every_stage_stands_in_the_table_with_all_its_figures(lived):
    life, out = lived
    names = [stage.name for stage in life.stages]
    assert names[0] == "dense" and names[-2:] == ["compress", "compress + prune"]
    assert {f"train: {m}" for m in ("copy", "shared-kv", "expert-kv")} <= set(names)
    for stage in life.stages:
        assert stage.disk > 0 and stage.memory > 0 and stage.decode > 0 and stage.active <= stage.total
        assert set(stage.perplexity) == {"code", "arithmetic"}
    by_name = {stage.name: stage for stage in life.stages}
    # A copy answers as the dense model does.
    assert by_name["upcycle: copy"].perplexity["code"] == pytest.approx(by_name["dense"].perplexity["code"], rel=0.02)
    assert by_name["compress"].bits < by_name[f"train: {life.chosen}"].bits
    assert by_name["compress"].total == by_name[f"train: {life.chosen}"].total
    assert not (out / "work").exists()


def test_the_report_stands_alone(lived):
    life, out = lived
    write_report(life, out, seconds=1.0)
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4 and "<script" not in page and 'src="' not in page
    assert json.loads((out / "report.json").read_text())["chosen"] == life.chosen


def test_what_it_leaves_loads_in_a_new_process(lived):
    _, out = lived
    code = (
        "import mixtura\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"for name in ('mixture', 'compressed'):\n    path = {str(out)!r} + '/' + name\n"
        "    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)\n"
        "    model.generate(**tokenizer('1 + 1', return_tensors='pt'), max_new_tokens=2)\n    print('ok')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["ok", "ok"], done.stderr


def test_a_life_that_was_interrupted_goes_on_with_the_stage_it_was_in(tiny_dense: Path, tmp_path: Path):
    def stop(stage):
        if stage.name == "branch: arithmetic":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        live(tiny_dense, domains(), tmp_path, CONFIG, on_stage=stop)
    kept = tmp_path / "work" / "branch-code" / "model.safetensors"
    when = kept.stat().st_mtime_ns
    seen: list[int] = []

    def look(stage):
        if kept.exists():
            seen.append(kept.stat().st_mtime_ns)

    live(tiny_dense, domains(), tmp_path, CONFIG, on_stage=look)
    assert seen and set(seen) == {when}


def test_bad_input_is_refused_before_anything_is_trained(tiny_dense: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="at least two domains, got"):
        live(tiny_dense, {"code": corpus("code", characters=40_000)}, tmp_path, CONFIG)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        LifeConfig(steps=0)
