"""Two processes make the index that one makes; what was broken off goes on, alone or together."""

import os
import socket

import numpy as np
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from mixtura.cli import search_work
from mixtura.multimodal.retrieval import pending, shared_encoding, store
from mixtura.multimodal.retrieval.encoder import EncoderConfig, TextEncoder
from mixtura.multimodal.retrieval.passages import Document
from mixtura.multimodal.retrieval.shared_encoding import EncodingTeam
from mixtura.multimodal.retrieval.store import SearchIndex
from mixtura.multimodal.retrieval.tokenizer import train_tokenizer

WORDS = ["lute", "viol", "harp", "flute", "boat", "river", "sail", "oar", "bread", "flour", "oven", "yeast", "star"]


def texts(n):
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 40))) for _ in range(n)]


def documents(n, stop=None):
    for i, text in enumerate(texts(n)):
        if i == stop:
            raise KeyboardInterrupt
        yield Document(f"d{i:03d}", "1", text=text if i != 5 else "")


@pytest.fixture(scope="module")
def encoder():
    tokenizer = train_tokenizer(texts(50), 300)
    config = EncoderConfig(vocab_size=len(tokenizer), width=16, layers=1, heads=2, max_length=64)
    return TextEncoder(config, tokenizer).eval()


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Batches of 4, loads of 16: 150 documents are many of both."""
    monkeypatch.setattr(shared_encoding, "BATCH", 4)
    monkeypatch.setattr(shared_encoding, "LOAD", 16)
    monkeypatch.setattr(store, "BATCH", 4)
    monkeypatch.setattr(pending, "SAVE", 16)
    monkeypatch.setattr(store, "SHARD", 64)


def contents(path, encoder):
    index = SearchIndex(path, encoder)
    files = [file for (file,) in index.db.execute("SELECT file FROM shards ORDER BY shard")]
    vectors = np.concatenate([np.load(index.path / file) for file in files])
    tables = [index.db.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall() for name in ("passages", "forgotten")]
    named = index.db.execute("SELECT name FROM documents WHERE stamp != '' ORDER BY 1").fetchall()
    return vectors, tables, named, [len(np.load(index.path / file)) for file in files]


def _together(rank, meet, path, encoder, stop):
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    with EncodingTeam(encoder) as team:
        if not team.leads:
            team.serve()
            return
        index = SearchIndex(path, encoder, create=True, team=team)
        try:
            index.add(documents(150, stop), "notes")
        except KeyboardInterrupt:
            assert stop is not None
    dist.destroy_process_group()


def together(folder, encoder, stop=None, run=0):
    # Forked, since two fresh interpreters take ten seconds to import torch.
    args = (folder / f"meet{run}", folder / "two", encoder, stop)
    mp.start_processes(_together, args, nprocs=2, start_method="fork")


def alone(path, encoder):
    index = SearchIndex(path, encoder, create=True)
    done = index.add(documents(150), "notes")
    index.close()
    return done


def same(a, b):
    assert np.array_equal(a[0], b[0])  # to the bit: the batches are the same
    assert a[1:] == b[1:]


def test_two_processes_make_the_index_of_one(encoder, tmp_path):
    alone(tmp_path / "one", encoder)
    together(tmp_path, encoder)
    one, two = contents(tmp_path / "one", encoder), contents(tmp_path / "two", encoder)
    same(one, two)
    assert len(one[0]) == 149 and one[3] == [64, 64, 21]


@pytest.mark.parametrize("then", ["together", "alone"])
def test_what_two_were_broken_off_at_goes_on(encoder, tmp_path, then):
    alone(tmp_path / "one", encoder)
    together(tmp_path, encoder, stop=103)
    kept = contents(tmp_path / "two", encoder)
    assert len(kept[0]) == 96 and len(kept[2]) == 97  # six loads of 16, and the empty document
    if then == "together":
        together(tmp_path, encoder, run=1)
    else:
        done = alone(tmp_path / "two", encoder)
        assert (done.unchanged, done.added, done.passages) == (97, 53, 53)
    same(contents(tmp_path / "one", encoder), contents(tmp_path / "two", encoder))


def _different(rank, meet, encoder):
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    own = TextEncoder(encoder.config, encoder.tokenizer, seed=rank)
    with pytest.raises(ValueError, match="the processes have loaded different encoders"):
        EncodingTeam(own)


def test_processes_with_different_encoders_are_refused(encoder, tmp_path):
    mp.start_processes(_different, args=(tmp_path / "meet", encoder), nprocs=2, start_method="fork")


def _left_alone(rank, meet, path, encoder):
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    with EncodingTeam(encoder) as team:
        if not team.leads:
            return
        index = SearchIndex(path, encoder, create=True, team=team)
        with pytest.raises(OSError, match="one of the processes that encode together is gone"):
            index.add(documents(150), "notes")
        index.team = None
        index.add(documents(150), "notes")


def test_a_process_that_is_gone_is_named_and_the_work_goes_on_alone(encoder, tmp_path):
    args = (tmp_path / "meet", tmp_path / "two", encoder)
    mp.start_processes(_left_alone, args, nprocs=2, start_method="fork")
    alone(tmp_path / "one", encoder)
    same(contents(tmp_path / "one", encoder), contents(tmp_path / "two", encoder))


def _command(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    said = []
    sources, model = [folder / "notes"], str(folder / "model")
    search_work.make_index(sources, folder / "two", model, prune=True, device="cpu", dry_run=False, say=said.append)
    assert bool(said) == (rank == 0), said


def test_the_command_started_by_torchrun_makes_the_index_of_one_process(encoder, tmp_path):
    (tmp_path / "notes").mkdir()
    for i, text in enumerate(texts(40)):
        (tmp_path / "notes" / f"{i}.txt").write_text(text)
    (tmp_path / "notes" / "picture.png").write_bytes(b"\x89PNG\0\0\0")
    encoder.save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_command, args=(port, tmp_path), nprocs=2, start_method="fork")
    sources, model = [tmp_path / "notes"], str(tmp_path / "model")
    search_work.make_index(
        sources, tmp_path / "one", model, prune=True, device="cpu", dry_run=False, say=lambda line: None
    )
    loaded = TextEncoder.from_pretrained(model)
    same(contents(tmp_path / "one", loaded), contents(tmp_path / "two", loaded))
