"""Retrieval beside sentence-transformers with faiss (the same model, the same vectors), a bare product, and bm25s.

Encoding: a BERT of 2 layers with random weights, loaded by both sides from one directory, on texts whose lengths vary as those of
package descriptions do; then ours unsorted. Search: 2,000 queries in 54,000 x 256 unit vectors, k = 100, by way of faiss (what
"auto" takes where it is installed) and without. Both sides' results are compared first. Then an index on disk of up to a million
documents. One thread, CPU time.

    python benchmarks/retrieval.py           # writes docs/benchmarks/retrieval.json
    python benchmarks/retrieval.py --short   # a fraction of it, to try; writes nothing
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _side_by_side import alternate, median, ratio, versions, write_record

from mixtura.core.measure import Meter, resident_memory
from mixtura.multimodal import CropDataset, DenseIndex, LexicalIndex, SearchIndex, TextEncoder, documents_of
from mixtura.multimodal.retrieval.encoder import EncoderConfig
from mixtura.multimodal.retrieval.tokenizer import train_tokenizer
from mixtura.multimodal.retrieval.train import MomentumRetriever

WIDTH, K = 256, 100
NOTES = (
    "Random weights and made-up texts: what is timed is work, not quality. The peers are given the same thread. "
    "sentence-transformers sorts by length too. bm25s answers another question, by words; it stands there for scale."
)


def texts_of(n: int, seed: int = 0) -> list[str]:
    """Texts of made-up words; lengths are log-normal, most between 20 and 200 words."""
    rng = np.random.default_rng(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = np.array(["".join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(4000)])
    shares = 1 / np.arange(1, 4001)
    lengths = np.clip(rng.lognormal(4.0, 0.7, n), 5, 350).astype(int)
    return [" ".join(rng.choice(words, size, p=shares / shares.sum())) for size in lengths]


def bert(folder: Path, texts: list[str]) -> None:
    """A small BERT with a tokenizer, as transformers and sentence-transformers load it."""
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = train_tokenizer(texts[:2000], 8000)
    made = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=768,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    BertModel(made, add_pooling_layer=False).save_pretrained(folder)
    from tokenizers.processors import TemplateProcessing

    marks = [(name, tokenizer.inner.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.inner.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=marks)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.inner,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=512,
    ).save_pretrained(folder)


def encoding(n: int, rounds: int) -> list[dict[str, Any]]:
    """Ours, sorted and not, beside sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    texts = texts_of(n)
    with tempfile.TemporaryDirectory() as folder:
        bert(Path(folder), texts)
        ours = TextEncoder.from_pretrained(folder)
        words = Transformer(folder, max_seq_length=512)
        peer = SentenceTransformer(modules=[words, Pooling(192, "mean")], device="cpu")
        a, b = ours.encode(texts[:64], label=None), peer.encode(texts[:64], show_progress_bar=False)
        np.testing.assert_allclose(a, b, atol=1e-4)
        times = alternate(
            {
                "mixtura": lambda: ours.encode(texts, 32, label=None),
                "mixtura, unsorted": lambda: ours.encode(texts, 32, by_length=False, label=None),
                "sentence-transformers": lambda: peer.encode(texts, batch_size=32, show_progress_bar=False),
            },
            rounds,
            1,
            time.process_time,
        )
    rows = []
    for rival, bar, at_least in (("sentence-transformers", 1.05, False), ("mixtura, unsorted", 1.8, True)):
        found = ratio(times, rival, "mixtura") if at_least else ratio(times, "mixtura", rival)
        row = {"what": f"encoding {n:,} texts", "of": f"{rival} over mixtura" if at_least else f"mixtura over {rival}"}
        met = found.median >= bar if at_least else found.median <= bar
        row |= {"ratio": str(found), "bar": f"{'at least' if at_least else 'at most'} {bar}", "met": met}
        rows.append(row | {"seconds": round(median(times)["mixtura"], 2)})
    return rows


def searching(n: int, queries: int, rounds: int) -> list[dict[str, Any]]:
    """Exact search beside a bare product with topk, faiss and bm25s."""
    import faiss

    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    x, q = (rng.normal(size=(rows, WIDTH)).astype(np.float32) for rows in (n, queries))
    x, q = x / np.linalg.norm(x, axis=1, keepdims=True), q / np.linalg.norm(q, axis=1, keepdims=True)
    ours, through, peer = DenseIndex(x, backend="torch"), DenseIndex(x, backend="faiss"), faiss.IndexFlatIP(WIDTH)
    peer.add(x)
    tx, tq = torch.from_numpy(x), torch.from_numpy(q)

    def bare() -> torch.Tensor:
        return torch.cat([(part @ tx.mT).topk(K).indices for part in tq.split(256)])

    rows = ours.search(q, K).rows
    for other in (bare().numpy(), peer.search(q, K)[1], through.search(q, K).rows):
        assert (rows == other).mean() > 0.999
    texts = texts_of(n // 10, 1)
    lexical, asked = LexicalIndex(texts), [" ".join(text.split()[:5]) for text in texts[:queries]]
    times = alternate(
        {
            "mixtura": lambda: through.search(q, K),
            "mixtura without faiss": lambda: ours.search(q, K),
            "product and topk": bare,
            "faiss": lambda: peer.search(q, K),
            "bm25s": lambda: lexical.search(asked, K),
        },
        rounds,
        1,
        time.process_time,
    )
    made = []
    for own in ("mixtura", "mixtura without faiss"):
        for rival, bar in (("product and topk", 1.3), ("faiss", 1.05 if own == "mixtura" else None), ("bm25s", None)):
            found = ratio(times, own, rival)
            row = {"what": f"{queries:,} queries in {n:,} x {WIDTH}", "of": f"{own} over {rival}", "ratio": str(found)}
            row |= {"bar": "" if bar is None else f"at most {bar}", "met": "" if bar is None else found.median <= bar}
            made.append(row | {"seconds": round(median(times)[own], 2)})
    seconds = median(times)["mixtura without faiss"]
    made.append(
        {
            "what": "the same, seconds",
            "of": "mixtura without faiss",
            "ratio": f"{seconds:.2f}",
            "bar": "under 2 s",
            "met": seconds < 2,
        }
    )
    return made


def crops(rounds: int) -> list[dict[str, Any]]:
    """What drawing a batch of pairs costs beside the step that learns from it."""
    texts = texts_of(4000)
    tokenizer = train_tokenizer(texts, 8000)
    data = CropDataset(tokenizer.ids(texts))
    learner = MomentumRetriever(TextEncoder(EncoderConfig(vocab_size=16_000, width=WIDTH), tokenizer))
    while len(learner.queue) < 8192:
        learner.queue.push(torch.nn.functional.normalize(torch.randn(256, WIDTH), dim=-1))
    optimizer = torch.optim.AdamW(learner.encoder.parameters(), lr=1e-3, fused=True)
    pair = data.batch(0, 256, seed=0)

    def step() -> None:
        optimizer.zero_grad()
        learner(*pair).backward()
        optimizer.step()

    draws = {"drawing": lambda: data.batch(1, 256, seed=0), "learning": step}
    times = alternate(draws, 5 * rounds, 2, time.process_time)
    share = median(times)["drawing"] / (median(times)["drawing"] + median(times)["learning"])
    row = {
        "what": "256 pairs of crops",
        "of": "share of a step",
        "ratio": f"{share:.3f}",
        "bar": "under 0.1",
        "met": share < 0.1,
    }
    return [row]


def growing(sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    """Memory of making and of asking an index on disk, over corpora of growing size."""
    rows, encoder = [], TextEncoder.from_pretrained()
    base = texts_of(2000, 2)

    def corpus(n: int) -> Iterator[str]:
        for i in range(n):
            yield json.dumps({"_id": str(i), "text": f"{base[i % 2000][: 300 + i % 97]} number {i}"}) + "\n"

    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "set"
            source.mkdir()
            with (source / "corpus.jsonl").open("w") as handle:
                handle.writelines(corpus(n))
            before, start = resident_memory(), time.process_time()
            with Meter() as making:
                index = SearchIndex(Path(folder) / "index", encoder, create=True)
                index.add(documents_of(source), "set")
            made = time.process_time()
            with Meter() as asking:
                # The words of a document, as a question: each stands in a large share of the others.
                assert index.search(f"{base[7][:100]} number 7", 10)[0].name == "7"
            asked = time.process_time()
            size = sum(file.stat().st_size for file in index.path.iterdir())
            index.close()
        for what, meter, seconds in (("making", making, made - start), ("asking", asking, asked - made)):
            row = {"what": f"{what} an index of {n:,} documents on disk ({size / 1e6:,.0f} MB)"}
            row |= {"of": "memory beyond the start", "ratio": f"{(meter.peak_bytes - before) / 1e6:.0f} MB"}
            rows.append(row | {"bar": "", "met": "", "seconds": round(seconds, 2)})
    return rows


def main() -> None:
    """Measure and write the record."""
    torch.set_num_threads(1)
    os.environ.setdefault("MIXTURA_PROGRESS", "0")
    short = "--short" in sys.argv
    rows = encoding(200 if short else 2000, 1 if short else 5)
    rows += searching(5400 if short else 54_000, 200 if short else 2000, 1 if short else 7)
    rows += crops(1 if short else 5)
    rows += growing((500, 2000) if short else (20_000, 100_000, 1_000_000))
    for row in rows:
        print(row)
    if short:
        return
    header = list({key: "" for row in rows for key in row})
    payload = {
        "title": "Dense retrieval",
        "what": "CPU seconds, one thread, beside sentence-transformers and faiss on equal models and vectors.",
        "rows": [{key: row.get(key, "") for key in header} for row in rows],
        "notes": NOTES,
        "peers": versions("sentence-transformers", "faiss-cpu", "bm25s"),
    }
    write_record("retrieval", payload)


if __name__ == "__main__":
    main()
