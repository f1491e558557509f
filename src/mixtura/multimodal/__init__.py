"""Text with text, images and sound; so far a search by meaning, learned from text that nobody labelled."""

from mixtura._lazy import lazy_names

__all__ = [
    "CropDataset",
    "DenseIndex",
    "EncoderConfig",
    "EncodingTeam",
    "LexicalIndex",
    "MomentumRetriever",
    "Retriever",
    "SearchIndex",
    "TextEncoder",
    "UnsupervisedConfig",
    "documents_of",
    "evaluate",
    "finetune",
    "fuse",
    "independent_crops",
    "mine_hard_negatives",
    "paired_bootstrap",
    "train_tokenizer",
    "train_unsupervised",
]

_RETRIEVAL = "mixtura.multimodal.retrieval"
NAMES: dict[str, str] = {
    "CropDataset": f"{_RETRIEVAL}.crops",
    "DenseIndex": f"{_RETRIEVAL}.index",
    "EncoderConfig": f"{_RETRIEVAL}.encoder",
    "EncodingTeam": f"{_RETRIEVAL}.shared_encoding",
    "LexicalIndex": f"{_RETRIEVAL}.index",
    "MomentumRetriever": f"{_RETRIEVAL}.train",
    "Retriever": f"{_RETRIEVAL}.retriever",
    "SearchIndex": f"{_RETRIEVAL}.store",
    "TextEncoder": f"{_RETRIEVAL}.encoder",
    "UnsupervisedConfig": f"{_RETRIEVAL}.train",
    "documents_of": f"{_RETRIEVAL}.passages",
    "evaluate": f"{_RETRIEVAL}.evaluate",
    "finetune": f"{_RETRIEVAL}.train",
    "fuse": f"{_RETRIEVAL}.index",
    "independent_crops": f"{_RETRIEVAL}.crops",
    "mine_hard_negatives": f"{_RETRIEVAL}.train",
    "paired_bootstrap": f"{_RETRIEVAL}.evaluate",
    "train_tokenizer": f"{_RETRIEVAL}.tokenizer",
    "train_unsupervised": f"{_RETRIEVAL}.train",
}

__getattr__ = lazy_names(__name__, NAMES)
