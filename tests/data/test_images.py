"""Image folders: pixels against a hand-made array, every kind of bad file named once, and memory that does not grow."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mixtura.data.images import BadImage, batches, image_folder, image_list, read_image, unpack

RNG = np.random.default_rng(0)


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, **options).save(path)
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Three good images in two classes, and one of every kind of bad file."""
    root = tmp_path / "in"
    for i, name in enumerate(("ant/a.png", "ant/deeper/b.png", "bee/c.png")):
        save(root / name, np.full((6, 6, 3), 40 * (i + 1), np.uint8))
    whole = save(tmp_path / "whole.jpg", RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).read_bytes()
    (root / "ant" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    whole = save(tmp_path / "whole.png", RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).read_bytes()
    (root / "ant" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "bee" / "empty.png").write_bytes(b"")
    (root / "bee" / "text.jpg").write_text("no picture")
    (root / "bee" / "notes.txt").write_text("about bees")
    (root / "bee" / ".DS_Store").write_bytes(b"x")
    save(root / "bee" / "dot.png", np.zeros((1, 1, 3), np.uint8))
    return root


def test_a_folder_of_class_folders_gives_files_and_their_classes(mixed: Path):
    said = []
    folder = image_folder(mixed, on_problem=lambda p: said.append(str(p)))
    assert folder.classes == ("ant", "bee")
    assert [
        folder.classes[c] == path.relative_to(mixed).parts[0]
        for path, c in zip(folder.files, folder.labels, strict=True)
    ]
    assert (folder.labels == 0).sum() == 4 and (folder.labels == 1).sum() == 4
    assert said == [f"{mixed / 'bee' / 'notes.txt'}: is no image by its name (.txt); left out"]
    assert image_folder(mixed, exclude=["ant"], on_problem=said.append).classes == ("bee",)
    flat = image_folder(mixed / "ant", classes="none")
    assert flat.classes == () and set(flat.labels) == {-1}
    assert image_folder(mixed / "ant").classes == ()  # images beside a folder: no classes


def test_links_are_followed_except_those_that_lead_nowhere_or_back(mixed: Path, tmp_path: Path):
    save(tmp_path / "elsewhere" / "wasp.png", np.zeros((6, 6, 3), np.uint8))
    links = {"wasp": "../elsewhere", "ant/gone.png": "/nowhere.png", "ant/round": "..", "bee/self.png": "self.png"}
    for name, target in links.items():
        (mixed / name).symlink_to(target)
    (mixed / "bee" / "notes.txt").unlink()
    said = []
    folder = image_folder(mixed, on_problem=lambda p: said.append(str(p)))
    assert folder.classes == ("ant", "bee", "wasp") and folder.files[-1] == mixed / "wasp" / "wasp.png"
    assert sorted(said) == [
        f"{mixed / 'ant' / 'gone.png'}: is a link to nothing; left out",
        f"{mixed / 'ant' / 'round'}: is a link to a folder that holds it; left out",
        f"{mixed / 'bee' / 'self.png'}: is a link to nothing; left out",
    ]


def test_every_bad_file_is_one_line_and_the_rest_goes_on(mixed: Path):
    said = []
    folder = image_folder(mixed, on_problem=lambda p: None)
    found = list(batches(folder, 4, batch_size=2, on_problem=lambda p: said.append((p.path.name, p.what))))
    assert [len(batch.rows) for batch in found] == [2, 1]
    names = [folder.files[i].name for batch in found for i in batch.rows]
    assert names == ["a.png", "b.png", "c.png"]
    assert [int(image.mean()) for batch in found for image in batch.images] == [40, 80, 120]
    reasons = dict(said)
    assert len(said) == len(reasons) == 5
    assert reasons["cut.jpg"].startswith("is damaged or breaks off")
    assert reasons["cut.png"].startswith("is damaged or breaks off")
    assert reasons["empty.png"] == "is empty (0 bytes)"
    assert reasons["text.jpg"] == "is no image, whatever its name says"
    assert reasons["dot.png"] == "is 1 x 1 pixels, and 2 x 2 are needed"


def test_problems_are_logged_when_nobody_asks_for_them(mixed: Path, caplog):
    with caplog.at_level(logging.WARNING):
        list(batches(image_folder(mixed), 4))
    assert len(caplog.records) == 6 and all("\n" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_an_image_of_the_asked_size_keeps_its_pixels(tmp_path: Path, fit):
    want = RNG.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", want)
    np.testing.assert_array_equal(read_image(path, 5, fit=fit), want.transpose(2, 0, 1))


def test_crop_takes_the_middle_and_stretch_takes_all(tmp_path: Path):
    wide = np.zeros((4, 8), np.uint8)
    wide[:, 2:6] = 255
    path = save(tmp_path / "wide.png", wide)
    assert read_image(path, 4, channels=1, fit="crop").min() == 255
    assert 0 < read_image(path, 4, channels=1, fit="stretch").mean() < 255


def test_sixteen_bits_ink_palette_and_transparency_become_eight_bits(tmp_path: Path):
    said = []

    def note(problem) -> None:
        said.append((problem.path.name, problem.what, problem.used))

    deep = RNG.integers(0, 65536, (4, 4)).astype(np.uint16)
    got = read_image(save(tmp_path / "deep.png", deep), 4, channels=1, on_problem=note)
    assert np.abs(got[0] - deep / 257).max() <= 0.5 + 1e-9
    assert said == [("deep.png", "has 16 bits a pixel; rounded to 8", True)]
    ink = np.zeros((4, 4, 4), np.uint8)
    ink[..., 0] = 255  # cyan
    Image.frombytes("CMYK", (4, 4), ink.tobytes()).save(tmp_path / "ink.tif")
    assert read_image(tmp_path / "ink.tif", 4, on_problem=note)[:, 0, 0].tolist() == [0, 255, 255]
    assert said[1][0] == "ink.tif" and said[1][2]
    clear = np.zeros((4, 4, 4), np.uint8)
    assert read_image(save(tmp_path / "clear.png", clear), 4, on_problem=note).min() == 255
    drawn = Image.fromarray(np.full((4, 4, 3), (10, 200, 30), np.uint8)).quantize(4)
    drawn.save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png", 4, on_problem=note)[:, 0, 0].tolist() == [10, 200, 30]
    assert len(said) == 2


def test_a_camera_that_was_turned_is_turned_back(tmp_path: Path):
    image = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 10)
    exif = image.getexif()
    exif[0x0112] = 3  # upside down
    image.save(tmp_path / "a.png", exif=exif)
    got = read_image(tmp_path / "a.png", 4, channels=1)[0]
    np.testing.assert_array_equal(got, np.asarray(image)[::-1, ::-1])


def test_unpacked_images_are_those_of_the_batches_and_read_from_disk(mixed: Path, tmp_path: Path):
    folder = image_folder(mixed, on_problem=lambda p: None)
    images, rows = unpack(folder, 4, tmp_path / "kept", on_problem=lambda p: None)
    assert isinstance(images, np.memmap) and images.shape == (3, 3, 4, 4)
    streamed = list(batches(folder, 4, on_problem=lambda p: None))
    np.testing.assert_array_equal(images, streamed[0].images)
    np.testing.assert_array_equal(rows, streamed[0].rows)


def test_batches_take_no_more_memory_for_ten_times_the_files(tmp_path: Path):
    import tracemalloc

    save(tmp_path / "in" / "000.png", RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    one = (tmp_path / "in" / "000.png").read_bytes()
    for i in range(1, 200):
        (tmp_path / "in" / f"{i:03d}.png").write_bytes(one)
    folder = image_folder(tmp_path / "in")
    peaks = []
    for n in (20, 200):
        part = folder.take(np.arange(n))
        tracemalloc.start()
        assert sum(len(batch.rows) for batch in batches(part, 64, batch_size=10)) == n
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]  # all 200 decoded would be ten times as much


def test_a_list_of_paths_and_labels_is_read(tmp_path: Path):
    (tmp_path / "train.txt").write_text("a b/1.jpg 7\nc/2.jpg 3\n\nd.jpg\n", encoding="utf-8-sig")
    found = image_list(tmp_path / "train.txt")
    assert [str(path.relative_to(tmp_path)) for path in found.files] == ["a b/1.jpg", "c/2.jpg", "d.jpg"]
    assert found.labels.tolist() == [1, 0, -1] and found.classes == ("3", "7")
    (tmp_path / "bad.txt").write_text("a.jpg 1\nb.jpg cat\n")
    with pytest.raises(ValueError, match=r"line 2 must be 'path label' with an integer label, got 'b\.jpg cat'"):
        image_list(tmp_path / "bad.txt")


def test_what_can_not_be_listed_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        image_folder(tmp_path / "nowhere")
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"file\.png is a file; give the folder"):
        image_folder(tmp_path / "file.png")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no image; images end in"):
        image_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="has no class folder with images"):
        image_folder(tmp_path, classes="folders", on_problem=lambda p: None)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match="none of 1 files could be read as an image"):
        unpack(image_folder(tmp_path / "bad"), 4, tmp_path / "out", on_problem=lambda p: None)
    assert not (tmp_path / "out").exists()
    with pytest.raises(BadImage, match="is no image"):
        read_image(tmp_path / "bad" / "a.png", 4)
    with pytest.raises(ValueError, match="channels must be 1"):
        read_image(tmp_path / "bad" / "a.png", 4, channels=2)
