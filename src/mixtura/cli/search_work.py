"""What ``search`` does; heavy imports happen here and not where its options are declared."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from rich.table import Table

from mixtura.cli.checks import check_device
from mixtura.core.checkpoint import write_json
from mixtura.core.page import as_written, check_picture, new_figure, save_figure
from mixtura.core.progress import progress
from mixtura.data.retrieval_sets import RetrievalSet, load_beir
from mixtura.lm.parallel.mesh import started_processes
from mixtura.multimodal.retrieval.crops import CropDataset, Way
from mixtura.multimodal.retrieval.encoder import EncoderConfig, TextEncoder
from mixtura.multimodal.retrieval.evaluate import Scores, evaluate, paired_bootstrap
from mixtura.multimodal.retrieval.index import DenseIndex, Found, LexicalIndex
from mixtura.multimodal.retrieval.index import fuse as fused
from mixtura.multimodal.retrieval.passages import NotText, documents_of
from mixtura.multimodal.retrieval.shared_encoding import EncodingTeam
from mixtura.multimodal.retrieval.store import Added, SearchIndex
from mixtura.multimodal.retrieval.tokenizer import train_tokenizer
from mixtura.multimodal.retrieval.train import UnsupervisedConfig, train_unsupervised

__all__ = ["ask", "judge", "make_index", "train"]

Say = Callable[[str], None]
SHOWN = 240  # characters of a passage
NAMED = 5  # documents that a message names
DEPTH = 1000  # documents that each search brings to a fusion, and that the curve of recall reaches
CURVE = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def make_index(
    sources: Sequence[Path], out: Path, model: str | None, *, prune: bool, device: str, dry_run: bool, say: Say
) -> None:
    """Bring an index up to date with its sources."""
    check_device(device)
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"{source} does not exist; name a folder of texts, a BEIR set, or a file")
    if dry_run:
        for source in sources if os.environ.get("RANK", "0") == "0" else ():
            n = sum(1 for _ in documents_of(source, without=out))
            say(f"{source}: {n:,} documents; would be indexed in {out}")
        return
    # Before the process that leads makes an index there.
    made_with = SearchIndex.model_of(out)
    chosen = model if model is not None else (made_with or None)
    with _encoders(chosen, device) as (encoder, team):
        if team is not None and not team.leads:
            team.serve()
            return
        index = SearchIndex(out, encoder, create=True, model=_absolute(chosen), team=team)
        _fill(index, sources, prune=prune, say=say)


@contextmanager
def _encoders(model: str | None, device: str) -> Iterator[tuple[TextEncoder, EncodingTeam | None]]:
    """The encoder of this process, and the team of all that torchrun started; no team where there is one process."""
    if started_processes() == 1:
        yield _encoder(model, device), None
        return
    import torch.distributed as dist

    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    encoder = _encoder(model, device)
    dist.init_process_group("gloo")
    try:
        with EncodingTeam(encoder) as team:
            yield encoder, team
    finally:
        dist.destroy_process_group()


def _fill(index: SearchIndex, sources: Sequence[Path], *, prune: bool, say: Say) -> None:
    out = index.path
    for source in sources:
        began = time.perf_counter()
        done = index.add(documents_of(source, without=out), str(source.resolve()), prune=prune, label=source.name)
        say(f"{source}: {_told(done)}, {time.perf_counter() - began:.1f} s")
        if done.n_empty:
            say(f"  {done.n_empty:,} empty, which nothing finds: {_some(done.empty, done.n_empty)}")
        if done.n_refused:
            reasons = [f"{name} ({reason.removeprefix(str(source / name)).strip()})" for name, reason in done.refused]
            say(f"  {done.n_refused:,} passed over: {_some(reasons, done.n_refused)}")
    if not len(index):
        raise ValueError(
            f"{', '.join(map(str, sources))}: no document with text was found, so there is nothing to search"
        )
    size = sum(file.stat().st_size for file in out.iterdir())
    say(f"{out}: {len(index):,} documents, {index.n_passages:,} passages, {size / 1e6:.1f} MB")


def ask(question: str, path: Path, k: int, by: str, model: str | None, *, as_json: bool, device: str, say: Say) -> None:
    """Print what an index answers."""
    check_device(device)
    if not question.strip():
        raise ValueError('the question is empty; ask something, for example: mixtura search "tuning a lute"')
    made_with = SearchIndex.model_of(path)
    if made_with is None and not path.exists():
        raise FileNotFoundError(f"{path} does not exist; make an index first: mixtura search index DIR")
    index = SearchIndex(path, _encoder(model if model is not None else made_with or None, device))
    hits = index.search(question, k, by=cast(Literal["both", "meaning", "words"], by))
    if as_json:
        for hit in hits:
            print(json.dumps(hit.__dict__, ensure_ascii=False))
        return
    if not hits:
        say("nothing was found" + ("; no document shares a word with the question" if by == "words" else ""))
    for rank, hit in enumerate(hits, 1):
        at = Path(hit.source)
        place = f"{at / hit.name}:{hit.line}" if at.is_dir() and (at / hit.name).exists() else f"{hit.name}"
        text = " ".join(hit.text.split())
        say(f"{rank}. {place}  ({hit.score:.2f})")
        say(f"   {text[:SHOWN]}{'...' if len(text) > SHOWN else ''}")


def train(
    corpora: Sequence[str],
    out: Path,
    options: Mapping[str, Any],
    *,
    device: str,
    dry_run: bool,
    command: str,
    say: Say,
) -> None:
    """Train an encoder on texts and write it."""
    check_device(device)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty; give another --out")
    if options["steps"] < 1:
        raise ValueError(f"--steps must be at least 1, got {options['steps']}")
    if not options["lr"] > 0:
        raise ValueError(f"--lr must be > 0, got {options['lr']}")
    # Made before any text is read: both refuse what is out of range.
    config = EncoderConfig(vocab_size=options["vocab"], width=options["width"], layers=options["layers"])
    contrast = UnsupervisedConfig(
        steps=options["steps"], batch=options["batch"], queue=options["queue"], lr=options["lr"], seed=options["seed"]
    )
    texts: list[str] = []
    groups: list[int] = []
    for number, name in enumerate(corpora):
        own = list(_texts(name))
        say(f"{name}: {len(own):,} documents, {sum(map(len, own)) / 1e6:.1f} M characters")
        texts += own
        groups += [number] * len(own)
    if dry_run:
        say(f"would train {options['steps']:,} steps of {options['batch']} pairs and write {out}")
        return
    tokenizer = train_tokenizer(progress(texts, desc="vocabulary", unit="document"), options["vocab"])
    encoder = TextEncoder(dataclasses.replace(config, vocab_size=len(tokenizer)), tokenizer, seed=options["seed"]).to(
        device
    )
    ids = [i for start in range(0, len(texts), 4096) for i in tokenizer.ids(texts[start : start + 4096])]
    del texts
    data = CropDataset(ids, way=cast(Way, options["pairs"]), groups=groups if len(corpora) > 1 else None)
    if data.skipped:
        say(f"{data.skipped:,} documents of fewer than two tokens are left out")
    unfinished = out.with_name(f"{out.name}.unfinished")
    began = time.perf_counter()
    history = train_unsupervised(encoder, data, contrast, out=unfinished, checkpoint_every=200)
    facts = {"command": command, "corpora": list(corpora), "documents": len(ids), "tokens": len(data.ids), **options}
    encoder.save_pretrained(out, half=options["half"], facts=facts)
    shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(file.stat().st_size for file in out.iterdir())
    last = float(np.mean(history.losses[-50:])) if history.losses else float("nan")
    say(f"{out}: {size / 1e6:.2f} MB, loss {last:.3f} nats, {time.perf_counter() - began:.0f} s")
    say(f"use it: mixtura search index DIR --model {out}")


def judge(
    source: str,
    out: Path,
    plot: Path,
    *,
    split: str,
    fuse: str | None,
    weight: float,
    model: str | None,
    questions: int,
    device: str,
    seed: int,
    say: Say,
) -> Table:
    """Figures of a search on a set with answers: a table to print; JSON and a picture are written."""
    check_device(device)
    check_picture(plot, "--plot")
    if fuse not in (None, "bm25"):
        raise ValueError(f"--fuse must be bm25, got {fuse!r}")
    if not 0 <= weight <= 1:
        raise ValueError(f"--weight must be between 0 and 1, got {weight}")
    found = _set(source, split, questions, seed)
    say(f"{source}: {len(found.documents):,} documents, {len(found.queries):,} judged questions")
    documents, queries = list(found.documents), list(found.queries)
    texts, asked = list(found.documents.values()), list(found.queries.values())
    encoder = _encoder(model, device)
    runs: dict[str, Found] = {}
    vectors = encoder.encode(texts, label="documents")
    runs["meaning"] = DenseIndex(vectors).search(encoder.encode(asked, label="questions"), DEPTH)
    if fuse:
        runs["words (BM25)"] = LexicalIndex(texts).search(asked, DEPTH)
        runs["both"] = fused([runs["meaning"], runs["words (BM25)"]], [weight, 1 - weight])
    scores: dict[str, Scores] = {
        name: evaluate(run.run(queries, documents), found.qrels, recall=CURVE) for name, run in runs.items()
    }
    shown = ("nDCG@10", "MRR@10", "R@1", "R@10", "R@100")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("search by")
    for name in shown:
        table.add_column(name, justify="right")
    for name, score in scores.items():
        table.add_row(name, *(f"{score.means[figure]:.3f}" for figure in shown))
    record: dict[str, Any] = {"set": source, "documents": len(texts), "questions": len(queries)}
    record["model"] = model or "default"
    record["figures"] = {name: score.means for name, score in scores.items()}
    if fuse:
        pair = [scores[name].figures["R@100"] for name in ("both", "words (BM25)")]
        record["weight"], record["p of R@100, both over words"] = weight, paired_bootstrap(*pair, seed=seed)
        say(f"chance that both are no better than words in R@100: {record['p of R@100, both over words']:.4f}")
    write_json(out, record)
    _draw(plot, scores, f"{source}: {len(queries):,} questions to {len(texts):,} documents")
    return table


def _draw(path: Path, scores: Mapping[str, Scores], title: str) -> None:
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    for (name, score), colour in zip(scores.items(), ("#0072B2", "#6b6b70", "#009E73"), strict=False):
        values = [score.means[f"R@{k}"] for k in CURVE]
        axes.plot(CURVE, values, marker="o", ms=4, color=colour, label=f"{name}, nDCG@10 {score.means['nDCG@10']:.3f}")
    axes.set_xscale("log")
    axes.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    axes.set_ylim(0, 1)
    axes.set_xlabel("documents looked at")
    axes.set_ylabel("recall")
    axes.set_title(as_written(title), fontsize=10)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def _set(source: str, split: str, questions: int, seed: int) -> RetrievalSet:
    if source != "debian" or Path(source).exists():
        return load_beir(source, split=split)
    from mixtura.data.package_descriptions import debian_descriptions, description_set

    whole = description_set(debian_descriptions(["en"])["en"])
    drawn = np.random.default_rng(seed).permutation(sorted(whole.queries))[:questions].tolist()
    return RetrievalSet(whole.documents, {q: whole.queries[q] for q in drawn}, {q: whole.qrels[q] for q in drawn})


def _texts(name: str) -> Iterator[str]:
    """Documents of a corpus by name or path."""
    from mixtura.data.package_descriptions import debian_descriptions
    from mixtura.data.texts import CORPORA, corpus

    if Path(name).exists():
        for document in documents_of(name):
            try:
                parts = [passage.text for passage in document.passages()]
            except (NotText, OSError):
                continue
            if parts:
                yield "\n".join(parts)
    elif name.partition(":")[0] == "debian":
        language = name.partition(":")[2] or "en"
        yield from dict.fromkeys(entry.long for entry in debian_descriptions([language])[language])
    elif name in CORPORA:
        part = corpus(name, characters=20_000_000)
        yield from part.train + part.held_out
    else:
        known = ", ".join(["debian", "debian:LANGUAGE", *sorted(CORPORA)])
        raise FileNotFoundError(f"{name} does not exist, and the corpora known by name are: {known}")


def _encoder(model: str | None, device: str) -> TextEncoder:
    return TextEncoder.from_pretrained(model, device=device)


def _absolute(model: str | None) -> str:
    if model is None:
        return ""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _told(done: Added) -> str:
    parts = {"new": done.added, "changed": done.changed, "unchanged": done.unchanged, "removed": done.removed}
    return ", ".join(f"{n:,} {what}" for what, n in parts.items() if n) or "no document"


def _some(names: Sequence[str], n: int) -> str:
    return ", ".join(names[:NAMED]) + (f" and {n - NAMED:,} more" if n > NAMED else "")
