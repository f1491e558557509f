"""``mixtura separate``: stems, a picture, batches that go on, and errors of one line."""

import json

import numpy as np
import pytest
import torch
from test_cli import here, mixtura  # noqa: F401 (a fixture)

soundfile = pytest.importorskip("soundfile")

from mixtura.audio import NamedSounds, QuerySeparator, SmallClip  # noqa: E402
from mixtura.audio.embed import save_tower  # noqa: E402
from mixtura.audio.separate import own  # noqa: E402


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    tower = NamedSounds({"violin": ["fiddle"], "electric guitar": []})
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
    QuerySeparator(2, text=tower, **shape).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def write(path, seconds=1.5, rate=8000, channels=1, **options):
    rng = np.random.default_rng(0)
    soundfile.write(path, 0.1 * rng.standard_normal((round(seconds * rate), channels)), rate, **options)


def test_a_recording_gives_stems_a_rest_and_a_picture(here, model, tmp_path):  # noqa: F811
    write(tmp_path / "mix.wav", rate=11_025, channels=2)
    done = here(
        "separate",
        "mix.wav",
        "--query",
        "a fiddle",
        "-q",
        "electric guitar",
        "--model",
        model,
        "--out",
        "s",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "mix.wav: 1.5 s, 2 channels at 11,025 Hz" in done.stdout
    names = {"mix-a-fiddle.wav", "mix-electric-guitar.wav", "mix-rest.wav", "mix.png", "separated.json"}
    assert {path.name for path in (tmp_path / "s").iterdir()} == names
    parts = [soundfile.read(tmp_path / "s" / name)[0] for name in sorted(names) if name.endswith(".wav")]
    mix, rate = soundfile.read(tmp_path / "mix.wav")
    assert rate == 11_025 and np.abs(sum(parts) - mix).max() < 1e-3
    assert (tmp_path / "s" / "mix.png").read_bytes().startswith(b"\x89PNG")
    again = here(
        "separate",
        "mix.wav",
        "--query",
        "a fiddle",
        "-q",
        "electric guitar",
        "--model",
        model,
        "--out",
        "s",
        cwd=tmp_path,
    )
    assert "done before" in again.stdout


def test_a_bad_file_is_named_and_the_others_go_on(here, model, tmp_path):  # noqa: F811
    write(tmp_path / "good.wav")
    (tmp_path / "bad.wav").write_text("no audio")
    soundfile.write(tmp_path / "silent.wav", np.zeros(500), 8000)
    files = ("bad.wav", "silent.wav", "good.wav")
    done = here("separate", *files, "-q", "violin", "--model", model, "--no-picture", "--format", "flac", cwd=tmp_path)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert len(said) == 3 and "bad.wav is no sound file" in said[0] and "silent.wav is silent" in said[1]
    assert "2 of 3 recordings could not be separated" in said[2]
    assert {path.name for path in (tmp_path / "stems").iterdir()} == {
        "good-violin.flac",
        "good-rest.flac",
        "separated.json",
    }


def test_a_recording_is_not_written_over_by_the_stem_of_another(here, model, tmp_path):  # noqa: F811
    write(tmp_path / "mix.wav")
    write(tmp_path / "mix-violin.wav", seconds=1.0)
    before = (tmp_path / "mix-violin.wav").read_bytes()
    files = ("mix.wav", "mix-violin.wav")
    done = here("separate", *files, "-q", "violin", "--model", model, "--out", ".", cwd=tmp_path)
    assert done.returncode == 1 and "a stem of mix.wav would be written over mix-violin.wav" in done.stderr
    assert (tmp_path / "mix-violin.wav").read_bytes() == before


def test_a_dry_run_writes_nothing_and_a_list_names_what_is_known(here, model, tmp_path):  # noqa: F811
    write(tmp_path / "mix.wav")
    done = here("separate", "mix.wav", "-q", "violin", "--model", model, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "would write stems/mix-violin.wav, stems/mix-rest.wav, stems/mix.png" in done.stdout
    assert not (tmp_path / "stems").exists()
    assert here("separate", "--list", "--model", model, cwd=tmp_path).stdout.splitlines() == [
        "violin (also: fiddle)",
        "electric guitar",
    ]


def test_clipping_is_said(here, model, tmp_path):  # noqa: F811
    wave = np.clip(3 * np.sin(np.arange(8000) / 30), -1, 1)
    soundfile.write(tmp_path / "hot.wav", wave, 8000)
    done = here("separate", "hot.wav", "-q", "violin", "--model", model, "--no-picture", cwd=tmp_path)
    assert done.returncode == 0 and "of its samples are clipped" in done.stdout


def test_help_teaches_both_commands(here, tmp_path):  # noqa: F811
    shown = here("separate", "--help", cwd=tmp_path).stdout
    assert "mixtura separate mix.wav --query violin" in shown and "mixtura separate train --help" in shown
    assert "mixtura separate train --captions birds.csv" in here("separate", "train", "--help", cwd=tmp_path).stdout


def test_a_separator_is_trained_on_ones_own_clips_and_used(here, tmp_path):  # noqa: F811
    t = np.arange(12_000) / 8000
    rows = ["file,text"]
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", 0.3 * np.sin(2 * np.pi * (300 + 900 * (i % 2) + 20 * i) * t), 8000)
        rows.append(f"{i}.wav,{'owl' if i % 2 else 'toad'}")
    (tmp_path / "clips.csv").write_text("\n".join(rows), encoding="utf-8-sig")  # as a spreadsheet writes it
    done = here("separate", "train", "--captions", "clips.csv", "--steps", "2", "--out", "birds", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train on 4 clips of 2 sounds" in done.stdout and not (tmp_path / "birds.state").exists()
    assert "--captions clips.csv" in json.loads((tmp_path / "birds" / "separator.json").read_text())["note"]["recipe"]
    done = here("separate", "0.wav", "--model", "birds", "-q", "toads", "--no-picture", cwd=tmp_path)
    assert done.returncode == 0 and (tmp_path / "stems" / "0-toads.wav").exists()


def test_a_separator_is_trained_on_a_published_list(here, tmp_path, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr(own, "MIXTURES", 2)
    t = np.arange(12_000) / 8000
    (tmp_path / "sound").mkdir()
    ids = {"acoustic_guitar": ["aa", "ab", "ac", "gone"], "tuba": ["ba", "bb", "bc"]}
    for i, name in enumerate(v for videos in ids.values() for v in videos if v != "gone"):
        soundfile.write(tmp_path / "sound" / f"{name}.wav", 0.3 * np.sin(2 * np.pi * (300 + 250 * i) * t), 8000)
    (tmp_path / "sound" / "bc.wav").write_text("broken")
    (tmp_path / "music.json").write_text(json.dumps({"videos": ids}))
    given = ("separate", "train", "--videos", "music.json", "--audio", "sound", "--steps", "1", "--out", "m")
    done = here(*given, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "music.json: 6 of 7 clips are in sound" in done.stdout and "missing are gone.wav; the sound" in done.stdout
    assert not (tmp_path / "m.state.pieces").exists()
    done = here(*given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bc.wav is no sound file" in caplog.text and "2 mixtures of two sounds held out" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"m", "music.json", "sound"}
    note = json.loads((tmp_path / "m" / "separator.json").read_text())["note"]
    assert "--videos music.json --held-out 0.1" in note["recipe"]
    assert "tuba" in here("separate", "--list", "--model", "m", cwd=tmp_path).stdout


def test_a_separator_is_taught_by_pictures_and_asked_in_words(here, tmp_path, monkeypatch, caplog):  # noqa: F811
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(own, "MIXTURES", 2)
    t = np.arange(20_000) / 8000
    rows = []
    (tmp_path / "sound").mkdir()
    for i, name in enumerate(("aa", "ab", "ba", "bb", "bc", "at", "bt")):
        soundfile.write(tmp_path / "sound" / f"{name}.wav", 0.3 * np.sin(2 * np.pi * (300 + 250 * i) * t), 8000)
        label = "red kite" if name[0] == "a" else "green bird"
        rows.append(f"{name},0,{label},{'test' if name[1] == 't' else 'train'}")
        if name in ("bb", "at", "bt"):
            continue
        for second in range(1, 4):
            (tmp_path / "frames" / "deep" / f"{name}_000000").mkdir(parents=True, exist_ok=True)
            colour = Image.new("RGB", (40, 30), "red" if name[0] == "a" else "green")
            colour.save(tmp_path / "frames" / "deep" / f"{name}_000000" / f"{second:06d}.jpg")
    for picture in (tmp_path / "frames" / "deep" / "bc_000000").iterdir():
        picture.write_text("broken")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    torch.manual_seed(0)
    save_tower(SmallClip(["a", "photo", "of", "red", "green", "bird"], dim=8, side=8, width=4), tmp_path / "towers")
    given = (
        "separate",
        "train",
        "--videos",
        "list.csv",
        "--audio",
        "sound",
        "--frames",
        "frames",
        "--encoder",
        "towers",
    )
    given += ("--steps", "1", "--out", "m")
    done = here(*given, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "4 of 5 to train on have pictures in frames" in done.stdout and "without pictures are bb; left" in done.stdout
    )
    assert "train on 4 clips with pictures" in done.stdout and not (tmp_path / "m.state.pieces").exists()
    done = here(*given, "--no-noise-heads", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bc_000000 holds no numbered picture that can be read; left out" in caplog.text
    assert "1 of 4 clips could not be used" in done.stdout and "2 mixtures of two sounds held out" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"m", "list.csv", "sound", "frames", "towers"}
    note = json.loads((tmp_path / "m" / "separator.json").read_text())["note"]
    assert "--encoder towers --frame-rate 1 --no-noise-heads" in note["recipe"]
    told = mixtura("separate", "sound/aa.wav", "--model", "m", "-q", "green bird", "--no-picture", cwd=tmp_path)
    assert "aa-green-bird.wav" in told.stdout and (tmp_path / "stems" / "aa-green-bird.wav").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mix.wav"], "name a sound with --query"),
        (["-q", "violin"], "name a recording"),
        (["mix.wav", "-q", "dog"], "'dog' names no sound that this model knows"),
        (["mix.wav", "-q", "violin", "-q", " "], "none may be empty"),
        (["none.wav", "-q", "violin"], "none.wav does not exist"),
        (["mix.wav", "sub/mix.wav", "-q", "violin"], "would write the same files"),
        (["mix.wav", "-q", "violin", "-q", "a violin", "-q", "A Violin"], "would write the same file"),
        (["mix.wav", "-q", "violin", "--threshold", "1"], "--threshold must lie between 0 and 1"),
        (["mix.wav", "-q", "violin", "--seconds", "0.1"], "--seconds must lie between 1 and 600"),
        (["mix.wav", "-q", "violin", "--out", "mix.wav"], "exists and is not a directory"),
        (["mix.wav", "-q", "violin", "--device", "warp"], "--device must be"),
        (["train", "--captions", "one.csv", "--out", "."], ". holds one.csv, which would be lost"),
        (["train", "--captions", "none.csv", "--out", "x"], "none.csv does not exist"),
        (["train", "--captions", "bad.csv", "--out", "x"], "must have the columns file and text, got a, b"),
        (["train", "--captions", "one.csv", "--out", "x"], "at least two different sounds"),
        (["train", "--audio", "sub", "--out", "x"], "give both or neither"),
        (["train", "--videos", "m.json", "--captions", "one.csv", "--out", "x"], "give one of them"),
        (["train", "--videos", "m.json", "--out", "x"], "needs --audio"),
        (["train", "--videos", "m.json", "--audio", ".", "--out", "x"], "none of 1 listed clips is in ."),
        (
            ["train", "--videos", "m.json", "--audio", ".", "--frames", ".", "--out", "x"],
            "--encoder and --videos go together",
        ),
        (["train", "--videos", "m.json", "--audio", ".", "--no-noise-heads", "--out", "x"], "with --frames only"),
        (["train", "--videos", "one.csv", "--audio", ".", "--out", "x"], "one.csv, line 1: got 'file,text'"),
    ],
)
def test_mistakes_are_one_clear_line(here, model, tmp_path, arguments, message: str):  # noqa: F811
    write(tmp_path / "mix.wav", 0.1)
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    (tmp_path / "one.csv").write_text("file,text\nmix.wav,owl\n")
    (tmp_path / "m.json").write_text('{"videos": {"flute": ["a"]}}')
    given = arguments if arguments[0] == "train" else [*arguments, "--model", str(model)]
    done = here("separate", *given, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_a_missing_model_is_named(here, tmp_path):  # noqa: F811
    write(tmp_path / "mix.wav", 0.1)
    done = here("separate", "mix.wav", "-q", "violin", "--model", "nowhere", cwd=tmp_path)
    assert done.returncode == 1 and "nowhere holds no separator" in done.stderr
