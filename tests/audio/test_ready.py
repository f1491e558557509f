"""The separator that comes with the package: that it is there, small, knows its names, and separates what it never saw."""

import shutil
from importlib import resources

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mixtura.audio import separate
from mixtura.audio.separate import SOUNDS, bss_eval, default_separator
from mixtura.audio.separate.ready import new_separator
from mixtura.data import instruments


def test_its_weights_are_half_precision_and_small():
    folder = resources.files("mixtura.audio") / "weights" / "instruments"
    with resources.as_file(folder) as path:
        assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 4.5e6
        tensors = load_file(path / "model.safetensors")
    assert {t.dtype for name, t in tensors.items() if "num_batches" not in name} == {torch.float16}


def test_it_is_of_the_size_that_its_recipe_trains_and_knows_every_name():
    model = default_separator()
    assert model.text is not None and list(model.text.names) == list(SOUNDS)
    assert model.settings == new_separator(model.text).settings
    for name, others in SOUNDS.items():
        for known in (name, *others):
            assert int(model.embed([known])[0].argmax()) == list(SOUNDS).index(name)


@pytest.mark.skipif(
    shutil.which("fluidsynth") is None or not (instruments.FONTS / "TimGM6mb.sf2").exists(),
    reason="needs fluidsynth and timgm6mb-soundfont",
)
def test_it_pulls_new_phrases_out_of_mixtures(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    names = ("flute", "bass", "drums", "piano")
    chosen = {name: instruments.INSTRUMENTS[name] for name in names}
    clips = instruments.render_clips(chosen, 2, presets=[0], seconds=3.0, rate=16_000, seed=4321)
    gains, wrong = [], []
    for i in range(len(clips.waves)):
        j = (i + 3) % len(clips.waves)  # never of the same instrument: two clips each
        sources = torch.from_numpy(clips.waves[[i, j]])
        mix = sources.sum(0)
        found = separate(mix, [names[clips.labels[i]], names[clips.labels[j]]])[:, 0]
        before = bss_eval(mix, sources).sdr
        gains.append(float(bss_eval(found[0], sources).sdr - before))
        wrong.append(float(bss_eval(found[1], sources).sdr - before))
    assert np.mean(gains) > 2 and np.mean(wrong) < 0
