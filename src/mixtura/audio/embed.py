"""Joint embeddings: texts and pictures as unit vectors of one space, in which a query can be either.

Shapes: B things, D width of the embedding, V words.
Source: CLIP (2103.00020), sec. 2.3, for the objective of :class:`SmallClip`.
"""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixtura.core.checkpoint import read_json, write_json
from mixtura.core.training import TrainConfig, fit

__all__ = [
    "ClipEmbedding",
    "JointEmbedding",
    "NamedSounds",
    "Prompted",
    "SmallClip",
    "TextTower",
    "load_encoder",
    "load_tower",
    "save_tower",
]

META, WEIGHTS, INNER = "tower.json", "tower.safetensors", "tower"
PROMPT = "a photo of {}"  # of CLIPSep (2212.07065), sec. 3.1
FILLERS = frozenset(
    [
        "a",
        "an",
        "the",
        "of",
        "sound",
        "sounds",
        "photo",
        "picture",
        "playing",
        "someone",
        "plays",
        "play",
        "some",
        "and",
        "is",
    ]
)


@runtime_checkable
class TextTower(Protocol):
    """What turns texts into unit vectors of width ``dim``, shape (B, D)."""

    dim: int

    def embed_text(self, texts: Sequence[str]) -> Tensor: ...


@runtime_checkable
class JointEmbedding(TextTower, Protocol):
    """A text tower with a tower for pictures (B, height, width) or (B, 3, height, width) in the same space."""

    def embed_image(self, images: Tensor) -> Tensor: ...


class NamedSounds:
    """A text tower that knows a list of sounds by name: each has a direction of its own, and synonyms share it.

    It reads a query's words, so "the sound of a violin" is "violin"; a query that names two sounds is their mean. It
    understands nothing beyond its list, and says so.

    Args:
        names: for each sound its names; the first is the one that is shown.
    Raises:
        ValueError: no sound, or a name that stands for two.
    Example:
        >>> tower = NamedSounds({"violin": ["fiddle"], "flute": []})
        >>> float(tower.embed_text(["a fiddle"])[0] @ tower.embed_text(["violin"])[0])
        1.0
    """

    def __init__(self, names: Mapping[str, Sequence[str]]) -> None:
        if not names:
            raise ValueError("names must hold at least one sound")
        self.names = {name: list(others) for name, others in names.items()}
        self.dim = len(names)
        self._index: dict[tuple[str, ...], int] = {}
        for i, (name, others) in enumerate(self.names.items()):
            for known in (name, *others):
                words = tuple(_words(known))
                if self._index.setdefault(words, i) != i:
                    raise ValueError(
                        f"{known!r} names two sounds, {list(self.names)[self._index[words]]!r} and {name!r}"
                    )

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors, shape (B, D).

        Raises:
            ValueError: a text names none of the sounds; close names or all of them are listed.
        """
        rows = torch.zeros(len(texts), self.dim)
        for row, text in zip(rows, texts, strict=True):
            found = self._found(_words(text))
            if not found:
                raise ValueError(f"query {text!r} names no sound that this model knows{self._hint(text)}")
            row[found] = 1.0
        return F.normalize(rows, dim=-1)

    def _found(self, words: list[str]) -> list[int]:
        """Sounds that the words name, the longest name first: an "electric guitar" is no "guitar" besides."""
        words, found = list(words), []
        for known in sorted(self._index, key=len, reverse=True):
            size = len(known)
            for i in range(len(words) - size + 1):
                if tuple(_singular(w) for w in words[i : i + size]) == tuple(_singular(w) for w in known):
                    found.append(self._index[known])
                    words[i : i + size] = [""] * size
        return sorted(set(found))

    def _hint(self, text: str) -> str:
        known = [" ".join(words) for words in self._index]
        asked = " ".join(word for word in _words(text) if word not in FILLERS)
        close = get_close_matches(asked, known, n=2, cutoff=0.7)
        return f"; did you mean {' or '.join(close)}?" if close else f"; it knows {', '.join(self.names)}"


class SmallClip(nn.Module):
    """A picture tower and a text tower trained together on small grey pictures with captions, and on nothing else.

    Two convolution blocks and a linear map for pictures; for texts the mean of word vectors and a two-layer network. Words
    that no caption had are skipped.

    Args:
        words: vocabulary of the captions.
        dim: D.
        side: pixels of a picture's side; a multiple of 4.
        width: channels of the first convolution.
        scale: what similarities are multiplied by. CLIP learns it, and ends at 100; small and fixed, it pulls a picture all the
            way to its caption, which is what a query in words needs where pictures were trained on.
    """

    channels = 1

    def __init__(
        self, words: Sequence[str], *, dim: int = 32, side: int = 28, width: int = 16, scale: float = 4.0
    ) -> None:
        super().__init__()
        if side % 4 or side < 4:
            raise ValueError(f"side must be a positive multiple of 4, got {side}")
        self.words = sorted(set(words))
        if not self.words:
            raise ValueError("words must hold at least one word")
        self.dim, self.side, self.width = dim, side, width
        self._place = {word: i for i, word in enumerate(self.words)}
        self.pictures = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * (side // 4) ** 2, dim),
        )
        self.bag = nn.EmbeddingBag(len(self.words), 64, mode="mean")
        self.texts = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, dim))
        self.scale = scale

    def embed_image(self, images: Tensor) -> Tensor:
        """Unit vectors of pictures (B, side, side) with values in [0, 1], shape (B, D)."""
        if images.dim() != 3 or images.shape[1:] != (self.side, self.side):
            raise ValueError(f"images must have shape (n, {self.side}, {self.side}), got {tuple(images.shape)}")
        return F.normalize(self.pictures(images.to(self.bag.weight)[:, None]), dim=-1)

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, shape (B, D).

        Raises:
            ValueError: a text has no word that a caption had.
        """
        rows = [[self._place[word] for word in _words(text) if word in self._place] for text in texts]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise ValueError(f"query {text!r} has no word of the captions that this tower was trained on")
        flat = torch.tensor([i for row in rows for i in row], device=self.bag.weight.device)
        starts = torch.tensor([0, *(len(row) for row in rows[:-1])], device=flat.device).cumsum(0)
        return F.normalize(self.texts(self.bag(flat, starts)), dim=-1)

    @classmethod
    def train_on(
        cls,
        images: Tensor,
        labels: Tensor,
        captions: Sequence[Sequence[str]],
        *,
        steps: int = 300,
        batch: int = 128,
        seed: int = 0,
        **shape: Any,
    ) -> "SmallClip":
        """Towers trained by the contrast of CLIP, in which equal captions count as one.

        Args:
            images: pictures, shape (n, side, side), in [0, 1].
            labels: which row of ``captions`` describes each, shape (n,).
            captions: several wordings of each label.
            steps, batch: length of the training.
            seed: of everything that chance enters.
            shape: ``dim``, ``side``, ``width`` and ``scale``.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls([word for row in captions for text in row for word in _words(text)], **shape)

        def loss_at(step: int) -> Tensor:
            rng = torch.Generator().manual_seed(seed * 1_000_003 + step)
            rows = torch.randint(len(images), (batch,), generator=rng)
            wording = [row[int(torch.randint(len(row), (1,), generator=rng))] for row in captions]
            z_BD, t_CD = made.embed_image(images[rows]), made.embed_text(wording)
            logits_BC = made.scale * z_BD @ t_CD.mT
            mine_BC = F.one_hot(labels[rows], len(captions)).bool()
            present_C = mine_BC.any(0)
            # A caption's positives are all its pictures: the mean of their log probabilities, as for pictures.
            to_text = F.cross_entropy(logits_BC, labels[rows])
            log_p_BC = logits_BC.log_softmax(0).masked_fill(~mine_BC, 0.0)
            to_image = -(log_p_BC.sum(0) / mine_BC.sum(0).clamp(min=1))[present_C].mean()
            return (to_text + to_image) / 2

        fit(made, loss_at, TrainConfig(steps=steps, lr=3e-3, weight_decay=0.0, seed=seed), label="towers")
        return made.eval().requires_grad_(False)


class ClipEmbedding:
    """CLIP's two towers through transformers, from a directory or the hub's cache; nothing is downloaded unless asked for.

    Args:
        name: directory or hub id.
        download: fetch what is missing from the hub.
    Raises:
        ImportError: transformers is not there.
        OSError: no weights under that name.
        ValueError: a model of another kind, whose weights would be left out without a word.
    """

    channels = 3

    def __init__(self, name: str = "openai/clip-vit-base-patch32", *, download: bool = False) -> None:
        from transformers import AutoConfig, AutoTokenizer, CLIPModel

        kind = AutoConfig.from_pretrained(name, local_files_only=not download).model_type
        if kind != "clip":
            raise ValueError(f"{name} holds a model of type {kind!r}, not 'clip'")
        self.name = name
        self.model = CLIPModel.from_pretrained(name, local_files_only=not download).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=not download)
        self.dim = int(self.model.config.projection_dim)
        vision = self.model.config.vision_config
        self.side = int(vision.image_size)

    def to(self, device: str | torch.device) -> Self:
        """Both towers on another device; returns itself."""
        self.model.to(device)
        return self

    @torch.inference_mode()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, shape (B, D)."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        states = self.model.text_model(**tokens).pooler_output
        return F.normalize(self.model.text_projection(states), dim=-1)

    @torch.inference_mode()
    def embed_image(self, images: Tensor) -> Tensor:
        """Unit vectors of pictures (B, 3, height, width) or grey (B, height, width), in [0, 1], shape (B, D)."""
        x = (images[:, None].expand(-1, 3, -1, -1) if images.dim() == 3 else images).to(self.model.device)
        x = F.interpolate(x.float(), (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
        states = self.model.vision_model((x - mean) / std).pooler_output
        return F.normalize(self.model.visual_projection(states), dim=-1)


# Of the pictures that CLIP was trained on, red, green and blue (its released preprocessing).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Prompted:
    """A text tower that is asked by bare names, and reads each inside a phrase.

    Args:
        tower: what reads the phrase.
        prompt: the phrase, with {} for the name.
    """

    def __init__(self, tower: TextTower, prompt: str = PROMPT) -> None:
        if prompt.count("{}") != 1:
            raise ValueError(f"prompt must hold {{}} once, where the name goes, got {prompt!r}")
        self.tower, self.prompt, self.dim = tower, prompt, tower.dim

    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of names, shape (B, D)."""
        return self.tower.embed_text([self.prompt.replace("{}", text) for text in texts])


def load_encoder(name: str | Path) -> ClipEmbedding | SmallClip:
    """Towers of pictures and texts: a directory of :func:`save_tower`, or one of transformers' CLIP, or its id on the hub.

    Raises:
        ImportError: transformers is not there, and it is a CLIP.
        ValueError: nothing of the kind stands there, nor in the hub's cache.
    """
    if (Path(name) / META).exists():
        made = load_tower(name)
        if not isinstance(made, SmallClip):
            raise ValueError(f"{name} holds a tower of kind {type(made).__name__}, which reads no pictures")
        return made
    if Path(name).is_absolute() and not Path(name).is_dir():
        raise ValueError(f"there is no directory {name}, which should hold a CLIP")
    try:
        return ClipEmbedding(str(Path(name).resolve() if Path(name).is_dir() else name))
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0].strip()
        raise ValueError(
            f"{name} is no CLIP that can be read ({why}); name its directory, or fetch one from the hub: hf download "
            "openai/clip-vit-base-patch32"
        ) from error


def save_tower(tower: TextTower, path: str | Path) -> None:
    """Write a text tower of this module into a directory. Of a CLIP, which is large, it is noted where it lies.

    Raises:
        TypeError: a tower of another kind, which must be saved by its own means.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if isinstance(tower, NamedSounds):
        write_json(path / META, {"tower": "NamedSounds", "names": tower.names})
    elif isinstance(tower, SmallClip):
        shape = {"dim": tower.dim, "side": tower.side, "width": tower.width, "scale": tower.scale}
        write_json(path / META, {"tower": "SmallClip", "words": tower.words, "shape": shape})
        save_file({name: t.contiguous() for name, t in tower.state_dict().items()}, path / WEIGHTS)
    elif isinstance(tower, ClipEmbedding):
        write_json(path / META, {"tower": "ClipEmbedding", "name": tower.name})
    elif isinstance(tower, Prompted):
        write_json(path / META, {"tower": "Prompted", "prompt": tower.prompt})
        save_tower(tower.tower, path / INNER)
    else:
        raise TypeError(
            f"a {type(tower).__name__} cannot be saved with the model; save it by its own means, and give text="
        )


def load_tower(path: str | Path) -> TextTower:
    """Read a text tower that :func:`save_tower` wrote.

    Raises:
        ValueError: a tower of an unknown kind, or a CLIP that does not lie any more where it is noted.
    """
    path = Path(path)
    meta = read_json(path / META)
    if meta.get("tower") == "NamedSounds":
        return NamedSounds(meta["names"])
    if meta.get("tower") == "SmallClip":
        made = SmallClip(meta["words"], **meta["shape"])
        made.load_state_dict(load_file(path / WEIGHTS))
        return made.eval().requires_grad_(False)
    if meta.get("tower") == "Prompted":
        return Prompted(load_tower(path / INNER), meta["prompt"])
    if meta.get("tower") == "ClipEmbedding":
        try:
            return load_encoder(meta["name"])
        except ValueError as error:
            raise ValueError(f"words are read by the CLIP that {path / META} names, and {error}") from error
    raise ValueError(f"{path} holds a tower of unknown kind {meta.get('tower')!r}")


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", text.lower())


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
