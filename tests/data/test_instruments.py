"""Rendered instruments, speech and bursts: the file format byte by byte, and what the programs make of it."""

import shutil
import struct

import numpy as np
import pytest

from mixtura.data import instruments, noises
from mixtura.data.instruments import FAMILIES, INSTRUMENTS, Note, find_font, midi_file, phrases, render, render_clips
from mixtura.data.texts import MissingData

HAS_SYNTHESIZER = shutil.which("fluidsynth") is not None and (instruments.FONTS / "TimGM6mb.sf2").exists()
synthesizer = pytest.mark.skipif(not HAS_SYNTHESIZER, reason="needs fluidsynth and timgm6mb-soundfont")


def test_a_midi_file_is_what_the_standard_says_byte_by_byte():
    notes = [Note(0, 480, 60, 100), Note(480, 200, 62, 64)]
    track = (
        b"\x00\xff\x51\x03\x07\xa1\x20"  # 500,000 microseconds a quarter note
        b"\x00\xc0\x28"  # program 40 on channel 0
        b"\x00\x90\x3c\x64"
        b"\x83\x60\x80\x3c\x00"  # 480 = 3 * 128 + 96
        b"\x00\x90\x3e\x40"
        b"\x81\x48\x80\x3e\x00"  # 200 = 1 * 128 + 72
        b"\x00\xff\x2f\x00"
    )
    want = b"MThd" + struct.pack(">IHHH", 6, 0, 1, 480) + b"MTrk" + struct.pack(">I", len(track)) + track
    assert midi_file(notes, 40) == want
    assert midi_file(notes, -9)[30:32] == b"\xc9\x08", "a kit is a program on the channel of percussion"


@pytest.mark.parametrize(
    ("note", "program", "message"),
    [
        (Note(0, 10, 128, 64), 0, "pitch 0..127"),
        (Note(0, 10, 60, 0), 0, "velocity 1..127"),
        (Note(0, 10, 60, 64), 128, "between -128 and 127, got 128"),
    ],
)
def test_notes_and_programs_out_of_range_are_named(note, program, message: str):
    with pytest.raises(ValueError, match=message):
        midi_file([note], program)


@pytest.mark.parametrize("classes", [FAMILIES, INSTRUMENTS])
def test_phrases_stay_in_their_time_and_range(classes):
    for name, (programs, low, high) in classes.items():
        rng = np.random.default_rng(0)
        for note in phrases(5, 2.0, low, high, drums=programs[0] < 0, rng=rng):
            phrase, at = divmod(note.start, 3 * 960)
            assert 0 <= phrase < 5 and 0 <= at < 2 * 960 and low <= note.pitch <= high, name


def test_what_is_missing_is_said_with_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(instruments, "FONTS", tmp_path)
    monkeypatch.delenv("MIXTURA_SOUNDFONT", raising=False)
    with pytest.raises(MissingData, match="apt-get install fluidsynth timgm6mb-soundfont"):
        find_font()
    monkeypatch.setenv("MIXTURA_SOUNDFONT", str(tmp_path / "none.sf2"))
    with pytest.raises(MissingData, match=r"MIXTURA_SOUNDFONT names .*none.sf2, which is no file"):
        find_font()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingData, match="apt-get install flite espeak-ng"):
        noises._spoken("flite:rms", "hello", 8000)
    with pytest.raises(MissingData, match="fluidsynth renders instruments"):
        render(b"", 8000, tmp_path)


def test_bursts_are_equally_loud_and_follow_their_seed():
    first, again, other = (noises.bursts(6, 4000, 8000, seed=seed) for seed in (0, 0, 1))
    np.testing.assert_allclose(np.sqrt((first**2).mean(1)), 0.05, rtol=1e-4)
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@synthesizer
def test_a_rendered_tone_has_the_pitch_of_its_note():
    for pitch in (57, 69):
        wave = render(midi_file([Note(0, 1920, pitch, 100)], 73), 8000)
        part = wave[2000:10192] * np.hanning(8192)
        found = np.abs(np.fft.rfft(part)).argmax() * 8000 / 8192
        want = 440 * 2 ** ((pitch - 69) / 12)
        assert min(abs(found / want - harmonic) for harmonic in (1, 2, 3)) < 0.02


@synthesizer
def test_stems_add_up_because_nothing_but_notes_sounds():
    # One file with both notes against the sum of two files with one each: no reverb ties them together.
    low, high = Note(0, 480, 50, 90), Note(240, 480, 70, 90)
    both, one, two = (render(midi_file(notes, 0), 8000) for notes in ([low, high], [low], [high]))
    size = min(len(both), len(one), len(two))
    rest = both[:size] - one[:size] - two[:size]
    assert np.sqrt((rest**2).mean()) < 0.02 * np.sqrt((both**2).mean())


@synthesizer
def test_clips_are_labelled_equally_loud_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    classes = {name: FAMILIES[name] for name in ("flute", "drums")}
    clips = render_clips(classes, 2, presets=[0, 1], seconds=1.0, seed=3)
    assert clips.waves.shape == (8, 8000) and clips.labels.tolist() == [0] * 4 + [1] * 4
    assert clips.presets.tolist() == [73, 73, 74, 74, -1, -1, -9, -9]
    np.testing.assert_allclose(np.sqrt((clips.waves**2).mean(1)), 0.05, rtol=0.02)  # peaks may be cut
    monkeypatch.setenv("PATH", str(tmp_path))  # a second rendering would fail
    again = render_clips(classes, 2, presets=[0, 1], seconds=1.0, seed=3)
    assert np.array_equal(again.waves, clips.waves)


@pytest.mark.skipif(
    shutil.which("flite") is None or shutil.which("espeak-ng") is None, reason="needs flite and espeak-ng"
)
def test_speech_has_the_length_and_loudness_that_was_asked_for(monkeypatch, tmp_path):
    monkeypatch.setenv("MIXTURA_CACHE", str(tmp_path))
    waves = noises.speech(4, 8000, 8000, voices=("flite:slt", "espeak-ng:en-us"), seed=0)
    assert waves.shape == (4, 8000)
    np.testing.assert_allclose(np.sqrt((waves**2).mean(1)), 0.05, rtol=0.05)
    assert not np.array_equal(
        waves, noises.speech(4, 8000, 8000, voices=("flite:slt", "espeak-ng:en-us"), held_out=True)
    )
