"""Published lists of videos: their forms, what is on disk, and splits that keep videos apart."""

import json

import pytest

from mixtura.data.texts import MissingData
from mixtura.data.video_sounds import ListedClip, find_sounds, read_list, split_videos


def music(path, videos):
    path.write_text(json.dumps({"version": 1.0, "videos": videos}, indent=4))
    return path


def test_the_form_of_music_is_read(tmp_path):
    clips = read_list(music(tmp_path / "m.json", {"acoustic_guitar": ["IPsA3sz934M"], "flute": ["-a_b", "c"]}))
    assert clips == [
        ListedClip("IPsA3sz934M", "acoustic guitar"),
        ListedClip("-a_b", "flute"),
        ListedClip("c", "flute"),
    ]


def test_the_form_of_vggsound_is_read_with_its_split_and_labels_that_hold_commas(tmp_path):
    (tmp_path / "v.csv").write_text(
        '---g-f_I2yQ,1,people marching,test\n0_8-g2rof7E,49,"heart sounds, heartbeat",train\n\n'
    )
    clips = read_list(tmp_path / "v.csv")
    assert clips == [
        ListedClip("---g-f_I2yQ", "people marching", 1, "test"),
        ListedClip("0_8-g2rof7E", "heart sounds, heartbeat", 49, "train"),
    ]
    assert split_videos(clips) == ["test", "train"]


def test_the_form_of_clipsep_is_read_with_and_without_a_label(tmp_path):
    (tmp_path / "c.csv").write_text(
        "/x/audio/erhu/AB.wav,/x/frames/erhu/AB,46\ndata/k/L/kLy.wav,d/k/L/kLy,12,golf driving\n"
    )
    assert read_list(tmp_path / "c.csv") == [ListedClip("AB", "erhu"), ListedClip("kLy", "golf driving")]


def test_a_clip_counts_once_and_a_video_under_two_labels_is_left_out(tmp_path, caplog):
    clips = read_list(music(tmp_path / "m.json", {"flute": ["a", "b", "b"], "tuba": ["b", "c"]}))
    assert [clip.video for clip in clips] == ["a", "c"]
    assert "1 videos stand under more than one label" in caplog.text


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.json", "[1, 2]", "is no list of videos"),
        ("x.json", "no json", "is no list of videos"),
        ("x.json", '{"videos": {"flute": [3]}}', "under 'flute' an id is 3"),
        ("x.json", '{"videos": {}}', "lists no clip"),
        ("x.csv", "a,1,dog,train\nb,one,dog,train\n", "line 2: got 'b,one,dog,train'"),
        ("x.csv", "file,text\na.wav,dog\n", "line 1: got 'file,text'"),
        ("x.csv", "a,1,,train\n", "line 1: the id or the label is empty"),
    ],
)
def test_another_form_is_refused_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_list(tmp_path / name)


def test_files_are_found_by_name_at_any_depth_and_the_rest_is_named(tmp_path):
    for name in ("a_000030.wav", "deep/er/b_7.flac", "c.WAV", "e.mp4", ".d_000001.wav"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_sounds([ListedClip(v, "x", s) for v, s in (("a", 30), ("b", 7), ("c", 5), ("d", 1))], tmp_path)
    assert [(s.path.name, s.start) for s in found.sounds] == [("a_000030.wav", None), ("b_7.flac", None), ("c.WAV", 5)]
    assert [clip.video for clip in found.clips] == ["a", "b", "c"] and found.missing == ("d_000001.wav",)
    with pytest.raises(MissingData, match=r"none of 1 listed clips.*3 sound files; get the sound.*as in e\.wav"):
        find_sounds([ListedClip("e", "x")], tmp_path)
    with pytest.raises(FileNotFoundError, match="is no directory"):
        find_sounds([ListedClip("e", "x")], tmp_path / "none")


def test_without_a_split_videos_are_split_by_label_and_seed():
    clips = [ListedClip(f"v{i}", "flute" if i < 30 else "tuba", s) for i in range(40) for s in (0, 50)]
    parts = split_videos(clips, held_out=0.2)
    of = {}
    for clip, part in zip(clips, parts, strict=True):
        assert of.setdefault(clip.video, part) == part, "both clips of a video stand on one side"
    assert sum(of[f"v{i}"] == "test" for i in range(30)) == 6 and sum(of[f"v{i}"] == "test" for i in range(30, 40)) == 2
    assert split_videos(clips[::-1], held_out=0.2) == parts[::-1]
    assert split_videos(clips, held_out=0.2, seed=1) != parts
    assert set(split_videos(clips, held_out=0)) == {"train"}
    assert split_videos([ListedClip("a", "x")], held_out=0.5) == ["train"]
    with pytest.raises(ValueError, match=r"held_out must lie in \[0, 1\), got 1"):
        split_videos(clips, held_out=1)
