"""Search by meaning in a handful of texts: the question shares no word with the text that answers it."""

from mixtura.multimodal import Retriever

texts = [
    "A program that tunes guitars and other string instruments.",
    "A server that delivers electronic mail for large organisations.",
    "A viewer for photographs taken with digital cameras.",
    "A compiler for numerical programs written in Fortran.",
]
retriever = Retriever.from_pretrained().read(texts)
for question in ("software for musicians", "look at my pictures", "send messages over the internet"):
    best = retriever.search(question, k=1)[0]
    print(f"{question}\n   {best.score:.2f}  {best.text}")
