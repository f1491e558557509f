"""Recordings on disk: what is read, what is refused, and stems that appear together or not at all."""

from pathlib import Path

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip("soundfile")

from mixtura.audio import NamedSounds, QuerySeparator  # noqa: E402
from mixtura.audio.files import open_recording, survey, write_together  # noqa: E402
from mixtura.audio.separate.files import COLUMNS, separate_file  # noqa: E402


def write(path, wave, rate=8000, **options):
    soundfile.write(path, np.asarray(wave), rate, **options)
    return path


def noise(samples: int, channels: int = 1, seed: int = 0):
    return 0.1 * np.random.default_rng(seed).standard_normal((samples, channels))


def small() -> QuerySeparator:
    torch.manual_seed(0)
    tower = NamedSounds({"dog": [], "owl": []})
    shape = {
        "maps": 4,
        "depth": 2,
        "width": 4,
        "bands": 16,
        "sample_rate": 8000,
        "n_fft": 128,
        "hop": 64,
        "spread": 3.0,
    }
    return QuerySeparator(2, text=tower, **shape).eval()


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
def test_blocks_are_the_file_in_order(tmp_path, kind: str):
    wave = noise(5000, 2)
    found = open_recording(write(tmp_path / f"x.{kind}", wave))
    assert (found.rate, found.channels, found.samples) == (8000, 2, 5000)
    whole = torch.cat(list(found.blocks(0.1)), -1)
    assert whole.shape == (2, 5000)
    want = torch.from_numpy(soundfile.read(found.path, dtype="float32")[0].T.copy())
    torch.testing.assert_close(whole, want, rtol=0, atol=1e-4 if kind == "ogg" else 0)


def test_a_survey_finds_level_peak_and_clipped_peaks(tmp_path):
    wave = np.zeros(9000)
    wave[::10] = 0.5
    wave[3000:3300] = 1.0
    found = survey(open_recording(write(tmp_path / "x.wav", wave, subtype="FLOAT")))
    assert found.peak == 1.0 and found.level == pytest.approx(np.sqrt((wave**2).mean()), rel=1e-6)
    assert found.clipped == pytest.approx(300 / 9000)
    clean = survey(open_recording(write(tmp_path / "y.wav", noise(9000))))
    assert clean.clipped == 0


def test_what_is_no_recording_is_named_in_one_line(tmp_path):
    (tmp_path / "text.wav").write_text("this is no audio at all, whatever its name says")
    (tmp_path / "zero.wav").write_bytes(b"")
    write(tmp_path / "header.wav", np.zeros(0))
    whole = write(tmp_path / "cut.wav", noise(8000)).read_bytes()
    (tmp_path / "cut.wav").write_bytes(whole[:4000])
    cases = {
        "none.wav": (FileNotFoundError, "does not exist"),
        "text.wav": (ValueError, "is no sound file that can be read"),
        "zero.wav": (ValueError, "is empty: it has no bytes"),
        "header.wav": (ValueError, "has a header and no samples"),
        "": (ValueError, "is a directory"),
    }
    for name, (kind, message) in cases.items():
        with pytest.raises(kind, match=message) as caught:
            open_recording(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="is silent"):
        survey(open_recording(write(tmp_path / "silent.wav", np.zeros(100))))
    bad = np.full(100, np.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        survey(open_recording(write(tmp_path / "nan.wav", bad, subtype="FLOAT")))


def test_stems_and_rest_add_up_to_the_recording_and_equal_what_separate_gives(tmp_path):
    model = small()
    found = open_recording(write(tmp_path / "mix.wav", noise(30_000, 2), subtype="FLOAT"))
    stems, rest = [tmp_path / "dog.wav", tmp_path / "owl.wav"], tmp_path / "rest.wav"
    said = separate_file(model, found, ["dog", "owl"], stems, rest, seconds=1.0, overlap=0.25)
    mix = torch.cat(list(found.blocks()), -1)
    written = [torch.cat(list(open_recording(path).blocks()), -1) for path in (*stems, rest)]
    torch.testing.assert_close(sum(written), mix, rtol=0, atol=1e-6)
    want = model.separate(mix, ["dog", "owl"], seconds=1.0, overlap=0.25)
    torch.testing.assert_close(torch.stack(written[:2]), want, rtol=0, atol=1e-6)
    levels = [float(part.square().mean().sqrt()) for part in written]
    assert said.levels == pytest.approx(levels, rel=1e-4) and len(said.sketches) == 4


def test_sketches_do_not_grow_with_the_recording(tmp_path):
    found = open_recording(write(tmp_path / "long.wav", noise(8000 * 90)))
    said = separate_file(small(), found, ["dog"], [tmp_path / "dog.wav"], tmp_path / "rest.wav")
    assert all(sketch.shape == (16, COLUMNS) for sketch in said.sketches)
    # White noise has the same mean power in every column: 12 frames each, so a spread of some tenths.
    top = said.sketches[0][8:].mean(0)
    assert top.min() > 0.5 * top.mean() and top.max() < 2 * top.mean()


@pytest.mark.parametrize(
    ("name", "subtype", "written"),
    [
        ("x.wav", "PCM_U8", "PCM_U8"),
        ("x.wav", "PCM_24", "PCM_24"),
        ("x.wav", "DOUBLE", "DOUBLE"),
        ("x.wav", "ULAW", "PCM_24"),
        ("x.mp3", "MPEG_LAYER_III", "PCM_24"),
    ],
)
def test_stems_have_the_samples_of_the_recording_unless_those_are_compressed(tmp_path, name, subtype, written):
    if Path(name).suffix[1:].upper() not in soundfile.available_formats():
        pytest.skip("this libsndfile writes no MP3")
    found = open_recording(write(tmp_path / name, noise(8000), subtype=subtype))
    with write_together([tmp_path / "stem.wav"], found) as (writer,):
        writer(torch.zeros(1, 100))
    assert open_recording(tmp_path / "stem.wav").subtype == written


def test_an_interrupt_leaves_no_stem_behind(tmp_path):
    found = open_recording(write(tmp_path / "mix.wav", noise(1000)))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), write_together([out / "a.wav", out / "b.wav"], found) as writers:
        for writer in writers:
            writer(torch.zeros(1, 500))
        raise KeyboardInterrupt
    assert list(out.iterdir()) == []


def test_a_format_that_cannot_hold_the_channels_is_named(tmp_path):
    found = open_recording(write(tmp_path / "mix.wav", noise(100, 9)))
    with (
        pytest.raises(ValueError, match="has 9 channels and FLAC holds at most 8; write WAV"),
        write_together([tmp_path / "a.flac"], found),
    ):
        pass
