"""Pictures of listed videos: where they lie, and which shows which second."""

import pytest

from mixtura.data.texts import MissingData
from mixtura.data.video_frames import Frames, find_frames, frames_by_second
from mixtura.data.video_sounds import ListedClip


def folder(path, numbers, form="{:06d}.jpg"):
    path.mkdir(parents=True)
    for number in numbers:
        (path / form.format(number)).touch()
    return path


def test_pictures_are_found_under_the_names_that_sounds_have(tmp_path):
    folder(tmp_path / "a_000030", [1])
    folder(tmp_path / "0" / "u" / "b", [1])
    (tmp_path / "c_7.PNG").touch()
    (tmp_path / "d.txt").touch()
    clips = [ListedClip(v, "x", s) for v, s in (("a", 30), ("b", 5), ("c", 7), ("d", 0), ("000001", 0))]
    found = find_frames(clips, tmp_path)
    assert found == [
        Frames(tmp_path / "a_000030"),
        Frames(tmp_path / "0" / "u" / "b", 5),
        Frames(tmp_path / "c_7.PNG"),
        None,
        None,  # the picture of that name lies in the folder of another clip
    ]
    assert find_frames([ListedClip("b", "x")], tmp_path) == [Frames(tmp_path / "0" / "u" / "b")]
    with pytest.raises(MissingData, match=r"none of 1 clips has pictures in .*-i z\.mp4 -r 1 .*/z_000003/%06d\.jpg"):
        find_frames([ListedClip("z", "x", 3)], tmp_path)
    with pytest.raises(FileNotFoundError, match="is no directory"):
        find_frames(clips, tmp_path / "none")


def seconds(path, rate=1.0, **about):
    return [(second, int(file.stem.split("_")[-1])) for second, file in frames_by_second(Frames(path, **about), rate)]


def test_frame_k_shows_second_k_less_one_and_those_missing_are_passed_over(tmp_path):
    # The released code puts the sound of frame k around k - 1/2 seconds.
    assert seconds(folder(tmp_path / "a", [1, 2, 4, 12])) == [(0, 1), (1, 2), (3, 4), (11, 12)]
    assert seconds(folder(tmp_path / "z", [0, 1, 2], "x_{}.png")) == [(0, 0), (1, 1), (2, 2)]
    assert seconds(folder(tmp_path / "none", [1], "cover{}.txt")) == []
    (tmp_path / "b.jpg").touch()
    assert frames_by_second(Frames(tmp_path / "b.jpg", 3)) == [(0, tmp_path / "b.jpg")]


@pytest.mark.parametrize("rate", [0.3, 0.5, 1.0, 2.0, 8.0, 25.0, 29.97])
def test_at_any_rate_a_second_has_the_frame_nearest_to_its_middle(tmp_path, rate):
    kept = [k for k in range(1, round(20 * rate) + 1) if k % 7 != 3]
    found = seconds(folder(tmp_path / "a", kept), rate)
    assert [second for second, _ in found] == sorted({int((k - 0.5) / rate) for k in kept})
    for second, number in found:
        away = {k: abs((k - 0.5) / rate - second - 0.5) for k in kept}
        assert away[number] <= min(away.values()) + 1e-9 and away[number] <= 0.5


def test_a_folder_of_the_whole_video_gives_the_clip_and_another_all_of_it(tmp_path):
    whole = folder(tmp_path / "a", range(1, 61))
    assert seconds(whole, start=30, seconds=10) == [(s, 31 + s) for s in range(10)]
    cut = folder(tmp_path / "b", range(1, 13))
    assert seconds(cut, start=30, seconds=10) == [(s, 1 + s) for s in range(12)]
