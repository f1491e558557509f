"""Writing beside and renaming: the old stays until the new is whole."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixtura.core.checkpoint import (
    atomic_directory,
    atomic_file,
    check_replaceable,
    read_json,
    verify_safetensors,
    write_json,
)


def test_a_failed_write_leaves_the_old_directory_and_no_debris(tmp_path: Path):
    target = tmp_path / "model"
    with atomic_directory(target) as beside:
        (beside / "a").write_text("old")
    with pytest.raises(OSError, match="disk full"), atomic_directory(target) as beside:
        (beside / "a").write_text("new")
        raise OSError("disk full")
    assert (target / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_an_interrupt_leaves_the_old_directory(tmp_path: Path):
    target = tmp_path / "model"
    with atomic_directory(target) as beside:
        (beside / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_directory(target) as beside:
        (beside / "b").write_text("new")
        raise KeyboardInterrupt
    assert [p.name for p in target.iterdir()] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_finished_write_replaces_the_whole_directory(tmp_path: Path):
    target = tmp_path / "model"
    for name in ("a", "b"):
        with atomic_directory(target) as beside:
            (beside / name).write_text(name)
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_failed_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "model"
    with atomic_directory(target) as beside:
        (beside / "a").write_text("old")
    rename = Path.rename

    def fails_for_the_new_one(self: Path, to: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails_for_the_new_one)
    with pytest.raises(OSError, match="no"), atomic_directory(target) as beside:
        (beside / "a").write_text("new")
    assert (target / "a").read_text() == "old"


def test_a_failed_file_write_leaves_the_old_file(tmp_path: Path):
    write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "r.json", {"a": float("nan")})
    assert read_json(tmp_path / "r.json") == {"a": 1}
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "r.json") as beside:
        beside.write_text("{")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_directory_is_not_written_over_a_file(tmp_path: Path):
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="is not a directory"), atomic_directory(tmp_path / "x"):
        pass


def test_a_truncated_safetensors_file_is_named(tmp_path: Path):
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(1000)}, file)
    verify_safetensors(tmp_path)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        verify_safetensors(tmp_path)


def test_json_that_is_none_is_named(tmp_path: Path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")
    (tmp_path / "b.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold a JSON object, got list"):
        read_json(tmp_path / "b.json")


def test_only_an_earlier_result_may_be_replaced(tmp_path: Path):
    check_replaceable(tmp_path / "new", "mark.json")
    check_replaceable(tmp_path, "mark.json")
    note = tmp_path / "note.txt"
    note.write_text("mine")
    with pytest.raises(ValueError, match="holds other files, which would be lost; name a new directory"):
        check_replaceable(tmp_path, "mark.json")
    with pytest.raises(ValueError, match=r"note\.txt is a file; give a directory"):
        check_replaceable(note, "mark.json")
    (tmp_path / "mark.json").write_text("{}")
    check_replaceable(tmp_path, "mark.json")
