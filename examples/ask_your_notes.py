"""An index on disk of the topics of Python's language reference, asked by words, by meaning and by both."""

import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from mixtura.multimodal import SearchIndex, TextEncoder, documents_of

with tempfile.TemporaryDirectory() as place:
    folder = Path(place) / "topics"
    folder.mkdir()
    for name, text in topics.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    index = SearchIndex(Path(place) / "index", TextEncoder.from_pretrained(), create=True)
    done = index.add(documents_of(folder), "topics")
    print(f"{done.added} topics in {done.passages} passages")
    for question in ("clean up after an exception", "numbers with a decimal point", "how are names looked up"):
        print(question)
        for by in ("words", "meaning", "both"):
            found = [hit.name.removesuffix(".txt") for hit in index.search(question, k=3, by=by)]
            print(f"   {by:8} {', '.join(found)}")
    index.close()
