"""One encoder for questions and documents: token vectors, averaged.

Shapes: B texts, L positions, D width, S tokens of all texts of a batch.

- ``layers=0``: the token vectors are a table, and a text is their mean. Nothing is quicker: what minutes on a CPU pay for.
- ``layers>0``: a BERT of that many layers, from nothing.
- any encoder of transformers: ``TextEncoder.from_pretrained("facebook/contriever")``.

Source: Contriever (2112.09118), sec. 3.2 and 4: mean over the tokens of the last layer, one encoder for both sides, dot product.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mixtura.core.checkpoint import atomic_directory, check_replaceable, read_json, verify_safetensors, write_json
from mixtura.core.progress import progress
from mixtura.multimodal.retrieval.crops import Tokens
from mixtura.multimodal.retrieval.tokenizer import SearchTokenizer

__all__ = ["EncoderConfig", "TextEncoder", "mean_pooling"]

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, TOKENIZER = "encoder.json", "model.safetensors", "tokenizer.json"
KIND = "mixtura-text-encoder"
DEFAULT = Path(__file__).parent / "default"


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What an encoder is made of.

    Attributes:
        vocab_size: tokens.
        width: D.
        layers: of the transformer; 0 averages the token table.
        heads: of its attention; divides the width.
        max_length: tokens of a text that are read, marks included.
        dropout: in training, on what is averaged (layers = 0) or inside the transformer.
        pooling: ``mean`` over the tokens, or ``cls``, the first token's vector.
        normalize: scale embeddings to length 1; the paper's are raw.
    """

    vocab_size: int
    width: int = 256
    layers: int = 0
    heads: int = 4
    max_length: int = 512
    dropout: float = 0.0
    pooling: Literal["mean", "cls"] = "mean"
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.vocab_size < 1 or self.width < 1 or self.max_length < 3 or self.layers < 0:
            raise ValueError(f"vocab_size and width must be >= 1, layers >= 0 and max_length >= 3, got {asdict(self)}")
        if self.layers and self.width % self.heads:
            raise ValueError(f"heads must divide width={self.width}, got {self.heads}")
        if self.pooling not in ("mean", "cls"):
            raise ValueError(f"pooling must be 'mean' or 'cls', got {self.pooling!r}")
        if self.pooling == "cls" and not self.layers:
            raise ValueError("pooling='cls' needs layers: a table of tokens has no first token that read the others")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


def mean_pooling(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean of token vectors over the tokens that are there.

    Args:
        hidden: shape (B, L, D).
        mask: 1 or True where there is a token, shape (B, L).
    Returns:
        Shape (B, D); zero for a text without tokens.
    """
    there = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * there).sum(1) / there.sum(1).clamp(min=1)


class TextEncoder(nn.Module):
    """Texts to vectors.

    Args:
        config: what to make.
        tokenizer: texts to ids.
        backbone: a transformer that gives ``last_hidden_state``; ``None`` makes one as ``config`` says.
        seed: of the weights made.

    Example:
        >>> from mixtura.multimodal.retrieval.tokenizer import train_tokenizer
        >>> tokenizer = train_tokenizer(["a lute and a viol", "a boat"], 300)
        >>> encoder = TextEncoder(EncoderConfig(vocab_size=len(tokenizer), width=8), tokenizer)
        >>> encoder.encode(["a lute", "a boat", ""]).shape
        (3, 8)
    """

    def __init__(
        self, config: EncoderConfig, tokenizer: SearchTokenizer, *, backbone: nn.Module | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.table: nn.Embedding | None = None
        self.foreign = backbone is not None
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            if backbone is not None:
                self.backbone: nn.Module | None = backbone
            elif config.layers:
                self.backbone = _bert(config)
            else:
                self.backbone = None
                self.table = nn.Embedding(config.vocab_size, config.width)
                nn.init.normal_(self.table.weight, std=0.02)  # as BERT's
        self.tokenizer.marks = self.tokenizer.marks or (config.layers > 0 and tokenizer.first is not None)

    @property
    def width(self) -> int:
        """D."""
        return self.config.width

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings of padded texts.

        Args:
            input_ids, attention_mask: shape (B, L).
        Returns:
            Shape (B, D), float32; zero for a text without tokens.
        """
        if self.table is not None:
            hidden = F.dropout(self.table(input_ids), self.config.dropout, self.training)
        else:
            assert self.backbone is not None
            hidden = self.backbone(input_ids=input_ids, attention_mask=attention_mask.long()).last_hidden_state
        z = hidden[:, 0] if self.config.pooling == "cls" else mean_pooling(hidden.float(), attention_mask)
        return self._finished(z)

    def embed(self, texts: Tokens) -> Tensor:
        """Embeddings of texts in one row, shape (B, D): as :meth:`forward` of the same texts padded, without the padding."""
        device = self.device
        if self.table is None or (self.training and self.config.dropout):
            padded, there = self.tokenizer.marked(texts).padded(self.tokenizer.pad)
            out: Tensor = self(torch.from_numpy(padded).to(device), torch.from_numpy(there).to(device))
            return out
        ids, starts = torch.from_numpy(texts.ids).to(device), torch.from_numpy(texts.starts).to(device)
        return self._finished(F.embedding_bag(ids, self.table.weight, starts, mode="mean").float())

    def _finished(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.config.normalize else z

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        batch: int = 64,
        max_length: int | None = None,
        *,
        by_length: bool = True,
        label: str | None = "encode",
    ) -> np.ndarray:
        """Embeddings of texts.

        Args:
            texts: strings; an empty one gets the zero vector, which is similar to nothing.
            batch: texts at a time.
            max_length: tokens that are read of each; ``None`` takes the config's.
            by_length: batch texts of like length together, so that little is padding.
            label: on the progress bar; ``None`` shows none.
        Returns:
            float32, shape (number of texts, D), in the order of the texts.
        Raises:
            TypeError: a text that is no string.
            ValueError: a batch below 1, or a length beyond what the encoder was made for.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        longest = self.config.max_length
        if max_length is not None and not 1 <= max_length <= longest:
            raise ValueError(f"max_length must be between 1 and {longest}, got {max_length}")
        if isinstance(texts, str):
            raise TypeError("texts must be a list of strings, got one string; put it in a list")
        ids = self.tokenizer.ids(texts, max_length or longest)
        # Marks alone are no text.
        empty = np.array([not text.strip() or not own for text, own in zip(texts, ids, strict=True)], dtype=bool)
        lengths = np.array([len(own) for own in ids])
        order = np.argsort(lengths, kind="stable")[::-1] if by_length else np.arange(len(ids))
        out = np.zeros((len(ids), self.width), dtype=np.float32)
        mode = self.training
        self.eval()
        try:
            begins = range(0, len(ids), batch)
            for begin in begins if label is None else progress(begins, desc=label, unit="batch"):
                rows = order[begin : begin + batch]
                out[rows] = self._of_ids([ids[i] for i in rows]).float().cpu().numpy()
        finally:
            self.train(mode)
        out[empty] = 0.0
        return out

    def _of_ids(self, ids: Sequence[Sequence[int]]) -> Tensor:
        texts = Tokens.of(ids)
        if self.table is not None:
            return self.embed(texts)
        padded, there = texts.padded(self.tokenizer.pad)
        return self(torch.from_numpy(padded).to(self.device), torch.from_numpy(there).to(self.device))

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that differ between encoders that embed differently."""
        digest = hashlib.blake2b(digest_size=8)
        facts = {k: v for k, v in asdict(self.config).items() if k != "dropout"}
        digest.update(repr(sorted(facts.items())).encode())
        digest.update(self.tokenizer.inner.to_str().encode())
        for name, value in sorted(self.state_dict().items()):
            # As they are stored, so that an encoder and its saved half precision copy agree.
            digest.update(name.encode())
            digest.update(value.detach().cpu().to(torch.float16).contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, path: str | Path, *, half: bool = False, facts: dict[str, Any] | None = None) -> None:
        """Write configuration, weights and tokenizer into a directory, whole or not at all.

        Args:
            path: directory.
            half: weights in float16, half the size; they are read as float32 again.
            facts: what else to remember, such as how it was trained; plain JSON.
        Raises:
            ValueError: the directory holds other things, which would be lost.
        """
        check_replaceable(path, CONFIG)
        with atomic_directory(path) as beside:
            tensors = {
                name: (t.half() if half and t.is_floating_point() else t).detach().cpu().contiguous()
                for name, t in self.state_dict().items()
            }
            save_file(tensors, beside / WEIGHTS)
            self.tokenizer.save(beside / TOKENIZER)
            config: dict[str, Any] = {"kind": KIND, **asdict(self.config)}
            if self.foreign:
                config["backbone"] = self.backbone.config.to_dict()  # type: ignore[union-attr, operator]
            write_json(beside / CONFIG, {**config, "facts": facts or {}})

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | None = None,
        *,
        pooling: Literal["mean", "cls"] = "mean",
        normalize: bool = False,
        device: str = "cpu",
    ) -> TextEncoder:
        """Load an encoder, in evaluation mode.

        Args:
            path: a directory that :meth:`save_pretrained` wrote, or any encoder of transformers (a directory or a name on
                the hub). ``None`` is the small one that comes with mixtura.
            pooling, normalize: for an encoder of transformers; mixtura's own remember theirs.
            device: where to put it.
        Raises:
            FileNotFoundError: nothing there.
            ValueError: damaged files.
        """
        folder = Path(path) if path is not None else DEFAULT
        if (folder / CONFIG).exists():
            return cls._own(folder).to(device).eval()
        if folder.exists() and not (folder / "config.json").exists():
            raise ValueError(f"{folder} holds no encoder: neither {CONFIG} (mixtura) nor config.json (transformers)")
        if not folder.exists() and (path is None or folder.is_absolute() or str(path).startswith(".")):
            raise FileNotFoundError(f"{folder} does not exist; give a directory with an encoder, or a name on the hub")
        return cls._foreign(str(path), pooling, normalize).to(device).eval()

    @classmethod
    def _own(cls, folder: Path) -> TextEncoder:
        kept = read_json(folder / CONFIG)
        if kept.pop("kind", None) != KIND:
            raise ValueError(f"{folder / CONFIG} describes no {KIND}")
        verify_safetensors(folder)
        kept.pop("facts", None)
        backbone = kept.pop("backbone", None)
        config = EncoderConfig(**kept)
        tokenizer = SearchTokenizer.load(folder / TOKENIZER, marks=config.layers > 0)
        made = None
        if backbone is not None:
            from transformers import AutoConfig, AutoModel

            kind = backbone.pop("model_type")
            made = AutoModel.from_config(AutoConfig.for_model(kind, **backbone))
        encoder = cls(config, tokenizer, backbone=made)
        tensors = {name: t.float() for name, t in load_file(folder / WEIGHTS).items()}
        try:
            encoder.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{folder / WEIGHTS} does not fit {folder / CONFIG} ({error})") from error
        return encoder

    @classmethod
    def _foreign(cls, source: str, pooling: Literal["mean", "cls"], normalize: bool) -> TextEncoder:
        from transformers import AutoModel, AutoTokenizer

        backbone = AutoModel.from_pretrained(source, dtype=torch.float32)
        loaded = AutoTokenizer.from_pretrained(source)
        if not loaded.is_fast:
            raise ValueError(f"{source} has no fast tokenizer (tokenizer.json), which batches of texts need")
        inner = loaded.backend_tokenizer
        inner.no_padding()
        inner.no_truncation()
        tokenizer = SearchTokenizer(inner)
        # A checkpoint's own marks and padding: XLM-R's are <s>, </s> and id 1.
        tokenizer.first, tokenizer.last, tokenizer.pad = loaded.cls_token_id, loaded.sep_token_id, loaded.pad_token_id
        tokenizer.marks = tokenizer.first is not None and tokenizer.last is not None
        settings = backbone.config
        config = EncoderConfig(
            vocab_size=settings.vocab_size,
            width=settings.hidden_size,
            layers=settings.num_hidden_layers,
            heads=settings.num_attention_heads,
            max_length=min(512, settings.max_position_embeddings),
            pooling=pooling,
            normalize=normalize,
        )
        return cls(config, tokenizer, backbone=backbone)


def _bert(config: EncoderConfig) -> nn.Module:
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=config.max_length,
            hidden_dropout_prob=config.dropout,
            attention_probs_dropout_prob=config.dropout,
        ),
        add_pooling_layer=False,
    )
