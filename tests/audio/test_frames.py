"""Pictures made embeddings on disk, the queries of pieces, and a separator that learns from them and is asked in words."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

soundfile = pytest.importorskip("soundfile")
Image = pytest.importorskip("PIL.Image")

from mixtura.audio import QuerySeparator, SmallClip  # noqa: E402
from mixtura.audio.separate import frames as module  # noqa: E402
from mixtura.audio.separate import own  # noqa: E402
from mixtura.audio.separate.frames import FrameEmbeddings, embed_frames, piece_queries  # noqa: E402
from mixtura.audio.separate.own import train_by_pictures  # noqa: E402
from mixtura.audio.separate.pieces import Pieces, unpack  # noqa: E402
from mixtura.data.video_frames import Frames  # noqa: E402
from mixtura.data.video_sounds import Sound  # noqa: E402

RATE = 8000


class Counting(SmallClip):
    """Keeps how many pictures each call had."""

    def __init__(self, *args, **shape):
        super().__init__(*args, **shape)
        self.calls = []

    def embed_image(self, images):
        self.calls.append(len(images))
        return super().embed_image(images)


def tower(seed=0):
    torch.manual_seed(seed)
    return Counting(["dark", "bright", "photo"], dim=6, side=8, width=4).eval().requires_grad_(False)


def picture(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), grey, np.uint8)).save(path)


def clip(path, greys):
    for i, grey in enumerate(greys):
        picture(path / f"{i + 1:06d}.png", grey)
    return Frames(path)


def by_hand(which, greys):
    return which.embed_image(torch.tensor(greys)[:, None, None].expand(-1, 8, 8) / 255)


def test_each_frame_stands_once_in_order_and_memory_holds_a_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 2)
    which = tower()
    clips = [clip(tmp_path / "a", [10, 60, 110, 160, 210]), clip(tmp_path / "b", [250])]
    found = embed_frames(clips, which, tmp_path / "out")
    assert which.calls == [2, 2, 1, 1]
    assert found.seconds.tolist() == [0, 1, 2, 3, 4, 0] and found.owners.tolist() == [0] * 5 + [1]
    want = by_hand(which, [10, 60, 110, 160, 210, 250])
    torch.testing.assert_close(found.vectors.float(), want, rtol=0, atol=1e-3)  # float16 of numbers up to 1


def test_embeddings_are_taken_again_until_pictures_tower_or_rate_change(tmp_path):
    clips = [clip(tmp_path / "a", [10, 60, 110]), clip(tmp_path / "b", [200])]

    def asked(which, rate=1.0):
        which.calls.clear()
        embed_frames(clips, which, tmp_path / "out", rate=rate)
        return sum(which.calls)

    which = tower()
    assert [asked(which), asked(which), asked(tower())] == [4, 0, 0], "equal weights are the same tower"
    assert [asked(tower(1)), asked(tower(1), 2.0)] == [4, 3]  # two seconds and one, at two pictures a second
    picture(tmp_path / "b" / "000002.png", 90)
    assert [asked(which), asked(which)] == [5, 0]


def test_bad_pictures_and_clips_without_any_are_told_and_left_out(tmp_path, caplog):
    good, half = clip(tmp_path / "good", [40, 80]), clip(tmp_path / "half", [40, 80, 120])
    (tmp_path / "half" / "000002.png").write_text("no picture")
    broken, empty = clip(tmp_path / "broken", [1]), tmp_path / "empty"
    (tmp_path / "broken" / "000001.png").write_bytes(b"")
    empty.mkdir()
    found = embed_frames([broken, good, Frames(empty), half], tower(), tmp_path / "out")
    assert found.kept == (1, 3) and found.owners.tolist() == [0, 0, 1, 1] and found.seconds.tolist() == [0, 1, 0, 2]
    for words in (
        "000002.png is no image",
        "000001.png is empty",
        "broken holds no numbered",
        "empty holds no numbered",
    ):
        assert sum(words in line and line.endswith("left out") for line in caplog.messages) == 1, words
    caplog.clear()
    embed_frames([good] + [Frames(empty)] * 25, tower(), tmp_path / "many")
    assert len(caplog.messages) == 11 and "and 15 more" in caplog.messages[-1]
    with pytest.raises(ValueError, match=r"none of 2 clips has a picture that can be read; the first: .*broken"):
        embed_frames([broken, Frames(empty)], tower(), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    with pytest.raises(ValueError, match="above 0, got 0"):
        embed_frames([good], tower(), tmp_path / "bad", rate=0)


def test_a_piece_is_asked_for_by_three_frames_around_its_middle_or_the_nearest(tmp_path):
    rng = torch.Generator().manual_seed(0)
    seconds = torch.tensor(
        [0, 1, 2, 3, 4, 5, 7, 7, 0]
    )  # of three clips: seven frames, one at second 7, a single picture
    owners = torch.tensor([0] * 7 + [1, 2])
    frames = FrameEmbeddings(
        F.normalize(torch.randn(9, 5, generator=rng), dim=1).half(), seconds, owners, (0, 1, 2), ""
    )
    of, places = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]), torch.tensor([0, 2, 3, 9, 0, 3, 0, 8])
    pieces = Pieces(torch.zeros(8, 1), ("x",) * 8, 3, 0, of, places)
    found = piece_queries(pieces, frames, tmp_path / "q.npy", seconds=2.0)
    # Pieces at 0, 4, 6 and 18 seconds of the first clip: middles in seconds 1, 5, 7 and 19.
    rows = [[0, 1, 2], [4, 5], [6], [6], [7], [7], [8], [8]]
    want = torch.stack([F.normalize(frames.vectors[some].float().mean(0), dim=0) for some in rows])
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), want, rtol=0, atol=1e-3)


def test_pieces_know_their_place_in_the_sound_though_quiet_ones_are_dropped(tmp_path):
    t = np.arange(8000) / 8000
    wave = np.concatenate([0.3 * np.sin(2000 * t) * loud for loud in (1, 0, 1, 1)])
    soundfile.write(tmp_path / "a.wav", wave, 8000)
    found = unpack([Sound(tmp_path / "a.wav", "x")] * 2, tmp_path / "p", rate=8000, seconds=1.0)
    assert found.places.tolist() == [0, 2, 3] * 2 and found.owners.tolist() == [0] * 3 + [1] * 3


@pytest.fixture
def videos(tmp_path, monkeypatch):
    """A low tone with dark pictures and a high one with bright ones, and towers that know what is dark and bright."""

    def small(text, seed):
        torch.manual_seed(seed)
        shape = {"maps": 4, "depth": 2, "width": 8, "bands": 24, "n_fft": 256, "hop": 128, "spread": 3.0}
        return QuerySeparator(text.dim, sample_rate=RATE, text=text, **shape)

    for name, value in {"new_separator": small, "MIXTURES": 10, "RATE": RATE, "SECONDS": 1.0}.items():
        monkeypatch.setattr(own, name, value)
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 2
    images = (0.15 + 0.7 * labels)[:, None, None] + 0.1 * torch.rand(80, 8, 8, generator=rng)
    captions = [["dark"], ["bright"]]
    learned = SmallClip.train_on(images, labels, captions, steps=40, batch=32, side=8, width=4, dim=8)
    t = np.arange(4 * RATE) / RATE
    sounds, frames = [], []
    for i in range(8):
        bright = i % 2
        pitch = (2000 if bright else 250) + 7 * i
        soundfile.write(tmp_path / f"{i}.wav", 0.3 * np.sin(2 * np.pi * pitch * t), RATE)
        sounds.append(Sound(tmp_path / f"{i}.wav", "bright" if bright else "dark"))
        frames.append(clip(tmp_path / str(i), [50 + 170 * bright + i] * 4))
    return sounds, frames, learned


def test_pictures_alone_teach_what_words_then_ask_for(videos, tmp_path, caplog):
    sounds, frames, learned = videos
    anonymous = [Sound(sound.path, f"nobody reads this {i}") for i, sound in enumerate(sounds[:6])]
    tests = [*sounds[6:], Sound(sounds[0].path, "zebra")]
    trained = train_by_pictures(anonymous, frames[:6], learned, tests=tests, steps=40, noise_heads=False)
    assert trained.pieces == 24 and trained.left_out == 0
    assert trained.held_out.after > trained.held_out.before + 6
    assert "query 'a photo of zebra' has no word" in caplog.text
    trained.model.save_pretrained(tmp_path / "m")
    again = QuerySeparator.from_pretrained(tmp_path / "m")
    assert torch.equal(again.embed(["dark"]), learned.embed_text(["dark"]))


def test_an_interrupted_run_goes_on_without_looking_again_and_not_as_another(videos, tmp_path, monkeypatch):
    sounds, frames, learned = videos
    looked, seen = [], []
    monkeypatch.setattr(
        type(learned),
        "embed_image",
        lambda self, x: looked.append(len(x)) or F.normalize(self.pictures(x[:, None]), dim=-1),
    )
    with monkeypatch.context() as interrupted:
        stopped = partial(own.fit_separator, stop=1)
        interrupted.setattr(
            own, "fit_separator", lambda *given, **options: seen.append(options) or stopped(*given, **options)
        )
        train_by_pictures(sounds, frames, learned, tmp_path / "s", steps=2)
    assert sum(looked) == 32
    assert torch.equal(seen[0]["groups"], torch.arange(8).repeat_interleave(4)), "a clip is never mixed with itself"
    assert seen[0]["objective"].gamma == 0.25 and seen[0]["mixing"].mask == "binary"
    with pytest.raises(ValueError, match="noise_heads"):
        train_by_pictures(sounds, frames, learned, tmp_path / "s", steps=2, noise_heads=False)
    done = train_by_pictures(sounds, frames, learned, tmp_path / "s", steps=2)
    assert sum(looked) == 32 and done.history.resumed_at == 1
    whole = train_by_pictures(sounds, frames, learned, steps=2)
    assert done.history.losses == pytest.approx(whole.history.losses, rel=1e-5)


def test_sounds_and_pictures_are_of_the_same_clips(videos):
    sounds, frames, learned = videos
    with pytest.raises(ValueError, match="of the same clips, got 8 and 7"):
        train_by_pictures(sounds, frames[1:], learned)
