"""Sounds made pieces in a file on disk: what stands in them, what is left out, and that memory does not hold them."""

import errno

import numpy as np
import pytest
import torch
from scipy.signal import resample_poly

soundfile = pytest.importorskip("soundfile")

from mixtura.audio import QuerySeparator  # noqa: E402
from mixtura.audio.separate import own  # noqa: E402
from mixtura.audio.separate import pieces as module  # noqa: E402
from mixtura.audio.separate.own import score_held_out, train_own  # noqa: E402
from mixtura.audio.separate.pieces import Pieces, unpack  # noqa: E402
from mixtura.data.video_sounds import Sound  # noqa: E402

RATE = 8000


def tone(path, pitch=440.0, seconds=3.0, rate=RATE, channels=1, gain=0.3):
    t = np.arange(round(seconds * rate)) / rate
    soundfile.write(
        path, np.repeat((gain * np.sin(2 * np.pi * pitch * t))[:, None], channels, 1), rate, subtype="FLOAT"
    )
    return path


def test_pieces_are_the_sound_in_order_at_one_level(tmp_path):
    rng = np.random.default_rng(0)
    wave = 0.2 * rng.standard_normal((int(2.4 * RATE), 2))
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    found = unpack([Sound(tmp_path / "a.wav", "hiss")], tmp_path / "p", rate=RATE, seconds=1.0)
    mono = np.pad(wave.mean(1), (0, int(0.6 * RATE))).reshape(3, RATE)
    want = mono * (0.05 / np.sqrt((mono**2).mean(1)))[:, None]
    assert found.waves.dtype == torch.float16 and found.texts == ("hiss",) * 3
    np.testing.assert_allclose(found.waves.numpy(), want, atol=2e-4)  # a float16 of 0.2 is right to 1.2e-4


def test_another_rate_is_resampled_and_blocks_leave_no_trace(tmp_path, monkeypatch):
    path = tone(tmp_path / "a.wav", seconds=6, rate=11_025)
    whole = unpack([Sound(path, "x")], tmp_path / "p", rate=RATE, seconds=1.0)
    monkeypatch.setattr(module, "READ", 2)
    parts = unpack([Sound(path, "x")], tmp_path / "q", rate=RATE, seconds=1.0)
    want = torch.from_numpy(resample_poly(soundfile.read(path)[0], RATE, 11_025)).reshape(6, RATE)
    want = want * (0.05 / (want**2).mean(1, keepdim=True).sqrt())
    inner = slice(200, -200)  # the filter sees zeros beyond the ends of a block
    for found in (whole, parts):
        torch.testing.assert_close(found.waves[:, inner].double(), want[:, inner], rtol=0, atol=5e-4)


def test_a_file_of_the_whole_video_gives_its_clip_and_a_cut_file_all_of_it(tmp_path):
    wave = np.concatenate([np.full(RATE * 4, 0.1), np.full(RATE * 2, -0.1), np.full(RATE * 4, 0.1)])
    soundfile.write(tmp_path / "v.wav", wave, RATE, subtype="FLOAT")
    found = unpack([Sound(tmp_path / "v.wav", "x", 4.0, 2.0)], tmp_path / "p", rate=RATE, seconds=1.0)
    assert found.waves.shape == (2, RATE) and bool((found.waves < 0).all())
    soundfile.write(tmp_path / "c.wav", wave[RATE * 4 : RATE * 6], RATE, subtype="FLOAT")
    found = unpack([Sound(tmp_path / "c.wav", "x", 4.0, 2.0)], tmp_path / "q", rate=RATE, seconds=1.0)
    assert found.waves.shape == (2, RATE)


def test_quiet_pieces_are_dropped_and_what_follows_moves_up(tmp_path):
    t = np.arange(RATE) / RATE
    loud = [0.3 * np.sin(2 * np.pi * pitch * t) for pitch in (200, 400, 800)]
    soundfile.write(tmp_path / "a.wav", np.concatenate([0 * t, loud[0], 1e-3 * loud[1], loud[1], 0 * t, loud[2]]), RATE)
    tone(tmp_path / "b.wav", 1600, 1)
    found = unpack(
        [Sound(tmp_path / "a.wav", "a"), Sound(tmp_path / "b.wav", "b")], tmp_path / "p", rate=RATE, seconds=1.0
    )
    peaks = torch.fft.rfft(found.waves.float()).abs().argmax(-1).tolist()
    assert peaks == [200, 400, 800, 1600] and found.texts == ("a", "a", "a", "b")
    assert (tmp_path / "p" / module.WAVES).stat().st_size == 4 * RATE * 2


def test_bad_files_are_told_and_left_out_and_the_rest_goes_on(tmp_path, caplog):
    good = [tone(tmp_path / "a.wav", 300), tone(tmp_path / "z.wav", 900)]
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    tone(tmp_path / "short.wav", seconds=0.1)
    tone(tmp_path / "early.wav", seconds=30)
    bad = [Sound(tmp_path / f"{name}.wav", "bad") for name in ("text", "silent", "nan", "short")]
    sounds = [Sound(good[0], "a"), *bad, Sound(tmp_path / "early.wav", "bad", 60.0), Sound(good[1], "z")]
    found = unpack(sounds, tmp_path / "p", rate=RATE, seconds=1.0)
    assert found.texts == ("a",) * 3 + ("z",) * 3 and (found.sounds, found.left_out) == (2, 5)
    for word in ("no sound file", "is silent", "NaN or infinite", "lasts 0.10 s", "begins after 60 s"):
        assert sum(word in line for line in caplog.messages) == 1
    caplog.clear()
    unpack([Sound(good[0], "a")] + [Sound(tmp_path / "text.wav", "bad")] * 25, tmp_path / "q", rate=RATE)
    assert len(caplog.messages) == 11 and "and 15 more" in caplog.messages[-1]
    with pytest.raises(ValueError, match=r"none of 4 sounds can be used; the first: .*text\.wav"):
        unpack(bad, tmp_path / "r", rate=RATE)
    assert not (tmp_path / "r").exists()


def test_a_full_disk_is_no_fault_of_the_sound(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_keep_loud", full)
    with pytest.raises(OSError, match="No space left"):
        unpack([Sound(tone(tmp_path / "a.wav"), "tone")], tmp_path / "pieces", rate=RATE)
    assert not (tmp_path / "pieces").exists()


def test_pieces_of_the_same_files_are_taken_as_they_are_and_of_others_made_anew(tmp_path):
    path = tone(tmp_path / "a.wav", 300)
    unpack([Sound(path, "a")], tmp_path / "p", rate=RATE, seconds=1.0)
    before = (tmp_path / "p" / module.WAVES).stat().st_mtime_ns
    unpack([Sound(path, "a")], tmp_path / "p", rate=RATE, seconds=1.0)
    assert (tmp_path / "p" / module.WAVES).stat().st_mtime_ns == before
    tone(path, 300, seconds=5)
    assert len(unpack([Sound(path, "a")], tmp_path / "p", rate=RATE, seconds=1.0).texts) == 5


def test_it_holds_a_block_and_not_the_sounds(tmp_path, monkeypatch):
    import tracemalloc

    sounds = []
    for i in range(3):
        rng = np.random.default_rng(i)
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * rng.standard_normal(RATE * 120), RATE)
        sounds.append(Sound(tmp_path / f"{i}.wav", str(i)))
    monkeypatch.setattr(module, "READ", 5)
    tracemalloc.start()
    found = unpack(sounds, tmp_path / "p", rate=RATE, seconds=1.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.waves.shape == (360, RATE)  # 5.8 MB on disk, 3.8 MB each decoded
    assert peak < 2e6


def test_training_reads_pieces_and_scores_what_it_never_heard(tmp_path, monkeypatch):
    def small(tower, seed):
        torch.manual_seed(seed)
        shape = {"maps": 4, "depth": 2, "width": 8, "bands": 24, "n_fft": 512, "hop": 256, "spread": 3.0}
        return QuerySeparator(tower.dim, sample_rate=16_000, text=tower, **shape)

    monkeypatch.setattr(own, "new_separator", small)
    monkeypatch.setattr(own, "MIXTURES", 10)

    def some(names, first):
        return [
            Sound(tone(tmp_path / f"{first + i}.wav", (250 if text == "hum" else 2000) + 7 * i, 4, 16_000), text)
            for i, text in enumerate(names)
        ]

    sounds, tests = some(["hum", "beep"] * 3, 0), some(["hum", "beep"], 50)
    (tmp_path / "bad.wav").write_text("")
    trained = train_own([*sounds, Sound(tmp_path / "bad.wav", "gone")], tmp_path / "state", tests=tests, steps=25)
    assert (trained.pieces, trained.left_out) == (12, 1) and list(trained.model.text.names) == ["beep", "hum"]
    assert trained.held_out.after > trained.held_out.before + 3
    assert (tmp_path / "state.pieces" / "train" / module.WAVES).exists()
    again = train_own(sounds[:4], tests=tests[:1], steps=1)
    assert again.held_out is None


def test_a_held_out_score_of_the_mixture_itself_is_no_gain():
    class Nothing:
        def separate(self, mixture, queries):
            assert queries in (["a"], ["b"])
            return mixture[None, None]

    rng = torch.Generator().manual_seed(0)
    found = Pieces(torch.randn(6, 400, generator=rng).half(), ("a", "b") * 3, 6, 0, torch.arange(6), torch.zeros(6))
    score = score_held_out(Nothing(), found, 20)
    assert score.before == score.after and abs(score.before) < 1 and score.mixtures == 20
