"""Separate what a query asks for: one network reads the mixture once, and every query combines its maps into a mask.

Shapes: B mixtures, R channels, N samples, U queries, n noise heads, D width of a query's embedding, K maps, M bands, L frames.
Source: CLIPSep (2212.07065), sec. 3.1 (late fusion) and 3.2 (noise heads); early and middle fusion as in its released code.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixtura.audio.embed import TextTower, load_tower, save_tower
from mixtura.audio.separate.unet import SpectrumUNet
from mixtura.core.checkpoint import atomic_directory, check_replaceable, read_json, verify_safetensors, write_json
from mixtura.core.spectrum import FLOOR, from_bands, istft, stft, to_bands

__all__ = ["Fusion", "MaskUse", "QuerySeparator", "apply_masks"]

Fusion = Literal["late", "middle", "early"]
MaskUse = Literal["binary", "soft"]
FUSIONS = ("late", "middle", "early")
META, WEIGHTS, TEXT = "separator.json", "model.safetensors", "text"


class QuerySeparator(nn.Module):
    """Masks of a mixture for queries that are vectors of a joint embedding of text with pictures or sound.

    With late fusion the network sees the mixture alone, so one pass serves every query. The noise heads exist for training
    (:class:`NoiseInvariantLoss`); ``separate`` never asks them.

    Args:
        embed_dim: D.
        maps: K.
        depth, width: levels of the network and channels of the first.
        fusion: ``"late"``, ``"middle"`` (the query joins at the innermost level) or ``"early"`` (at the input).
        bands: M, on a logarithmic axis from 0 to half the sample rate.
        sample_rate: samples a second.
        n_fft, hop: window of a spectrum and distance of its frames, in samples.
        noise_heads: n, as many as sources in a training mixture.
        spread: standard deviation of the queries' first weights. The paper's tiny one starts all queries alike, and trainings of
            a thousand steps are over before they part; a few units give each a gate of its own from the start. Masks start at
            1/2 either way.
        text: turns the words of a query into its embedding; without one ``separate`` takes vectors only.
    Raises:
        ValueError: a fusion that is not known, or a size below 1.
    """

    def __init__(
        self,
        embed_dim: int = 512,
        *,
        maps: int = 32,
        depth: int = 7,
        width: int = 64,
        fusion: Fusion = "late",
        bands: int = 256,
        sample_rate: int = 16_000,
        n_fft: int = 1024,
        hop: int = 256,
        noise_heads: int = 2,
        spread: float = 1e-4,
        text: TextTower | None = None,
    ) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {list(FUSIONS)}, got {fusion!r}")
        if min(embed_dim, sample_rate, noise_heads) < 1 or bands < 2:
            raise ValueError(
                "embed_dim, sample_rate and noise_heads must be at least 1 and bands at least 2, got "
                f"{embed_dim}, {sample_rate}, {noise_heads} and {bands}"
            )
        if text is not None and text.dim != embed_dim:
            raise ValueError(f"text gives vectors of width {text.dim}, and embed_dim is {embed_dim}; they must agree")
        self.embed_dim, self.maps, self.fusion, self.bands = embed_dim, maps, fusion, bands
        self.sample_rate, self.n_fft, self.hop = sample_rate, n_fft, hop
        self.text = text
        self.settings: dict[str, Any] = {
            "embed_dim": embed_dim,
            "maps": maps,
            "depth": depth,
            "width": width,
            "fusion": fusion,
            "bands": bands,
            "sample_rate": sample_rate,
            "n_fft": n_fft,
            "hop": hop,
            "noise_heads": noise_heads,
            "spread": spread,
        }
        self.unet = SpectrumUNet(
            maps if fusion == "late" else 1,
            depth=depth,
            width=width,
            early=maps if fusion == "early" else 0,
            middle=maps if fusion == "middle" else 0,
        )
        self.query = nn.Linear(embed_dim, maps)
        self.noise = nn.ModuleList(nn.Linear(maps, maps) for _ in range(noise_heads))
        self.map_weight = nn.Parameter(torch.ones(maps))
        self.shift = nn.Parameter(torch.zeros(()))
        for layer in (self.query, *self.noise):
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, 0.0, spread if layer is self.query else max(spread / 10, 1e-4))
            nn.init.zeros_(layer.bias)

    # ------------------------------------------------------------------ spectra

    def spectrum(self, wave: Tensor, sample_rate: int | None = None) -> Tensor:
        """Complex spectrum of recordings, (..., N) -> (..., Q, L), under windows as long in seconds as the model's."""
        n_fft, hop = self.frames(sample_rate or self.sample_rate)
        return stft(wave, n_fft, hop)

    def magnitude_bands(self, spectrum: Tensor, sample_rate: int | None = None) -> Tensor:
        """Magnitudes on the model's bands, (..., Q, L) -> (..., M, L), as if the recording had the model's rate.

        Where half the recording's sample rate lies below the last bands, those are silent.
        """
        rate = sample_rate or self.sample_rate
        # A longer window sums more samples; the network was trained on the sums of its own.
        scale = self.n_fft / (2 * (spectrum.shape[-2] - 1))
        return to_bands(spectrum.abs() * scale, self.bands, top=self.sample_rate / rate)

    def frames(self, rate: int) -> tuple[int, int]:
        """Samples of a window and of a hop at another sample rate: as long in seconds as the model's."""
        if rate == self.sample_rate:
            return self.n_fft, self.hop
        hop = max(1, round(self.hop * rate / self.sample_rate))
        return max(2 * hop, 2 * round(self.n_fft * rate / self.sample_rate / 2)), hop

    # ------------------------------------------------------------------- masks

    def forward(self, mix: Tensor, query: Tensor, *, noise: bool = False) -> Any:
        """Mask logits of each query.

        Args:
            mix: recordings, shape (B, N), at the model's sample rate.
            query: embeddings, shape (B, U, D).
            noise: also the noise heads' logits, which need U equal to their number.
        Returns:
            Logits of shape (B, U, M, L); with ``noise`` a pair, the second of shape (B, n, M, L).
        Raises:
            ValueError: shapes or widths that do not fit (both are named).
        """
        if mix.dim() != 2:
            raise ValueError(f"mix must have shape (mixtures, samples), got {tuple(mix.shape)}")
        return self.logits(self.magnitude_bands(self.spectrum(mix)), query, noise=noise)

    def logits(self, magnitude: Tensor, query: Tensor, *, noise: bool = False) -> Any:
        """As ``forward``, from magnitudes on the bands, shape (B, M, L)."""
        if query.dim() != 3 or len(query) != len(magnitude) or query.shape[1] < 1:
            raise ValueError(f"query must have shape ({len(magnitude)}, queries, width), got {tuple(query.shape)}")
        if query.shape[-1] != self.embed_dim:
            raise ValueError(f"query has width {query.shape[-1]}, this separator takes embeddings of {self.embed_dim}")
        x = (magnitude + FLOOR).log()
        asked_BUK = self.query(query)
        rows = [asked_BUK]
        if noise:
            if query.shape[1] != len(self.noise):
                raise ValueError(
                    f"this separator has {len(self.noise)} noise heads, for as many queries a mixture; got {query.shape[1]}"
                )
            # From the mean of the pictures' queries: what competes must know the clips, or it is a mere bias.
            rows.append(torch.stack([head(asked_BUK.mean(1)) for head in self.noise], 1))
        found = self._combined(x, torch.cat(rows, 1))
        return (found[:, : query.shape[1]], found[:, query.shape[1] :]) if noise else found

    def _combined(self, x: Tensor, asked_BUK: Tensor) -> Tensor:
        gate_BUK = asked_BUK.sigmoid()
        if self.fusion == "late":
            return torch.einsum("buk,bkml->buml", gate_BUK * self.map_weight, self.unet(x)) + self.shift
        queries = asked_BUK.shape[1]
        each = self.unet(x.repeat_interleave(queries, 0), (gate_BUK * self.map_weight).flatten(0, 1))
        return each.reshape(len(x), queries, *x.shape[1:]) + self.shift

    # --------------------------------------------------------------- the task

    def embed(self, queries: Sequence[str] | Tensor) -> Tensor:
        """Embeddings of queries, shape (U, D).

        Raises:
            ValueError: no query, an empty one, one that the text tower does not know, or vectors of another width.
        """
        if isinstance(queries, str):
            raise ValueError(f"queries must be a list of texts; for one, give [{queries!r}]")
        if isinstance(queries, Tensor):
            if queries.dim() != 2 or len(queries) == 0 or queries.shape[1] != self.embed_dim:
                raise ValueError(f"queries must have shape (queries, {self.embed_dim}), got {tuple(queries.shape)}")
            return queries.to(self.shift)
        if not queries or not all(text.strip() for text in queries):
            raise ValueError("queries must name at least one sound, and none may be empty")
        if self.text is None:
            raise ValueError("this separator has no text tower; give the queries' vectors, or build it with text=")
        return self.text.embed_text(list(queries)).to(self.shift)

    @torch.inference_mode()
    def separate(
        self,
        wave: Tensor,
        queries: Sequence[str] | Tensor,
        *,
        mask: MaskUse = "soft",
        threshold: float = 0.5,
        sample_rate: int | None = None,
        resample: bool = False,
        seconds: float | None = 20.0,
        overlap: float = 2.0,
    ) -> Tensor:
        """What each query asks for, with the phase of the mixture.

        Args:
            wave: recording, shape (N,) or (R, N), finite. Channels share the mask, which is made from their mean.
            queries: texts, or vectors of shape (U, D).
            mask: ``"soft"`` multiplies by the mask, ``"binary"`` keeps what has a mask above ``threshold``.
            threshold: in (0, 1), for binary masks.
            sample_rate: of ``wave``; the model's by default.
            resample: allow another sample rate. The spectrum is then taken at the recording's own rate under windows of
                the model's duration; above the model's last band its mask continues, and what comes out has the rate that
                came in.
            seconds: windows of this length are separated one by one and cross-faded over ``overlap`` seconds; ``None``
                takes the recording whole.
            overlap: seconds, less than half of ``seconds``.
        Returns:
            Shape (U, R, N).
        Raises:
            ValueError: a recording that is empty, silent or not finite, another sample rate without ``resample``, or a setting
                out of range.
        """
        x_RN = wave if wave.dim() == 2 else wave[None]
        if x_RN.dim() != 2 or x_RN.shape[0] == 0 or x_RN.shape[1] == 0:
            raise ValueError(f"wave must have shape (samples,) or (channels, samples), got {tuple(wave.shape)}")
        if not x_RN.any():
            raise ValueError("wave is silent: every sample is 0, so there is nothing to separate")
        rate = self._rate(sample_rate, resample)
        parts = list(
            self.stream(
                [x_RN],
                self.embed(queries),
                mask=mask,
                threshold=threshold,
                sample_rate=rate,
                seconds=seconds,
                overlap=overlap,
            )
        )
        return torch.cat(parts, -1)

    def _rate(self, sample_rate: int | None, resample: bool) -> int:
        rate = self.sample_rate if sample_rate is None else sample_rate
        if rate < 1:
            raise ValueError(f"sample_rate must be at least 1, got {rate}")
        if rate != self.sample_rate and not resample:
            raise ValueError(
                f"wave has {rate} samples a second and this separator works at {self.sample_rate}; pass resample=True"
            )
        return rate

    @torch.inference_mode()
    def stream(
        self,
        blocks: Iterable[Tensor],
        query: Tensor,
        *,
        mask: MaskUse = "soft",
        threshold: float = 0.5,
        sample_rate: int | None = None,
        seconds: float | None = 20.0,
        overlap: float = 2.0,
    ) -> Iterator[Tensor]:
        """Separate a recording that comes in blocks of shape (R, any), in memory that does not grow with it.

        Args:
            blocks: consecutive parts of the recording.
            query: vectors, shape (U, D).
            mask, threshold, seconds, overlap: as for :meth:`separate`.
            sample_rate: of the recording, which may be any.
        Yields:
            Consecutive parts of what was asked for, shape (U, R, some); together as long as what came.
        """
        if mask not in ("binary", "soft"):
            raise ValueError(f"mask must be 'binary' or 'soft', got {mask!r}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")
        rate = sample_rate or self.sample_rate
        length, shared = _window(seconds, overlap, rate, self.frames(rate)[1] * 2**self.unet.depth)
        was, tail = self.training, None
        self.eval()
        try:
            for piece_RN, last in _pieces(blocks, length, shared):
                part_URN = self._piece(piece_RN.to(self.shift), query, mask, threshold, rate)
                if tail is not None:
                    fade = torch.linspace(0, 1, tail.shape[-1] + 2, device=tail.device)[1:-1]
                    part_URN[..., : tail.shape[-1]] = torch.lerp(tail, part_URN[..., : tail.shape[-1]], fade)
                keep = part_URN.shape[-1] - (0 if last else shared)
                tail = part_URN[..., keep:]
                yield part_URN[..., :keep]
        finally:
            self.train(was)

    def _piece(self, x_RN: Tensor, query: Tensor, mask: MaskUse, threshold: float, rate: int) -> Tensor:
        spectrum_RQL = self.spectrum(x_RN, rate)
        # The mean of the channels' waves, not of their magnitudes: what the network was trained on is a wave.
        magnitude = self.magnitude_bands(spectrum_RQL.mean(0), rate)
        masks_UML = self.logits(magnitude[None], query[None])[0].sigmoid()
        if mask == "binary":
            masks_UML = (masks_UML > threshold).to(masks_UML)
        return apply_masks(spectrum_RQL, masks_UML, self.frames(rate)[1], x_RN.shape[-1], top=self.sample_rate / rate)

    # ------------------------------------------------------------------ on disk

    def save_pretrained(self, path: str | Path, *, half: bool = False, note: dict[str, Any] | None = None) -> None:
        """Write the model to a directory, whole or not at all: JSON, safetensors, and its text tower if it has one.

        Args:
            path: the directory.
            half: store float16, which halves the file and moves masks by about 0.001.
            note: facts to keep beside the settings, such as the recipe.
        Raises:
            ValueError: the directory holds other things, which would be lost.
        """
        check_replaceable(path, META)
        kind = torch.float16 if half else torch.float32
        tensors = {
            name: (t.to(kind) if t.is_floating_point() else t).contiguous()
            for name, t in self.state_dict().items()
            if not name.startswith("text.")
        }
        with atomic_directory(path) as beside:
            save_file(tensors, beside / WEIGHTS)
            write_json(beside / META, {"model": "QuerySeparator", "settings": self.settings, "note": note or {}})
            if self.text is not None:
                save_tower(self.text, beside / TEXT)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Self:
        """Read what ``save_pretrained`` wrote, in evaluation mode and float32.

        Raises:
            ValueError: no such directory, a damaged file, or weights of another model.
        """
        path = Path(path)
        if not (path / META).exists():
            raise ValueError(f"{path} holds no separator: {META} is missing")
        meta = read_json(path / META)
        if meta.get("model") != "QuerySeparator":
            raise ValueError(f"{path} holds a {meta.get('model')!r}, not a QuerySeparator")
        verify_safetensors(path)
        text = load_tower(path / TEXT) if (path / TEXT).exists() else None
        model = cls(**meta["settings"], text=text)
        tensors = {name: t.float() if t.is_floating_point() else t for name, t in load_file(path / WEIGHTS).items()}
        own = {name for name in model.state_dict() if not name.startswith("text.")}
        if own != set(tensors):
            odd = sorted(own ^ set(tensors))[0]
            raise ValueError(f"{path} holds weights of another model: {odd} is on one side only")
        model.load_state_dict(tensors, strict=False)
        return model.eval()


def apply_masks(spectrum: Tensor, masks: Tensor, hop: int, length: int, *, top: float = 1.0) -> Tensor:
    """Recordings under masks, with the mixture's phase.

    Args:
        spectrum: complex, of each channel, shape (R, Q, L).
        masks: on bands, shape (U, M, L).
        hop: of the spectrum.
        length: N.
        top: the last band's frequency over the last one of the spectrum.
    Returns:
        Shape (U, R, N).
    """
    linear_UQL = from_bands(masks, spectrum.shape[-2], top=top)
    return istft(linear_UQL[:, None] * spectrum[None], hop, length)


def _window(seconds: float | None, overlap: float, rate: int, step: int) -> tuple[int | None, int]:
    """Samples of a window and of its overlap; starts of windows stay on the network's grid of ``step`` samples."""
    if seconds is None:
        return None, 0
    if not 0 <= overlap < seconds / 2:
        raise ValueError(f"overlap must be at least 0 and less than half of seconds={seconds}, got {overlap}")
    shared = round(overlap * rate)
    advance = max(1, math.ceil((seconds - overlap) * rate / step)) * step
    return advance + shared, shared


def _pieces(blocks: Iterable[Tensor], length: int | None, shared: int) -> Iterator[tuple[Tensor, bool]]:
    """Windows of ``length`` samples that overlap by ``shared``, and whether each is the last; the last may be shorter."""
    held: list[Tensor] = []
    count = 0
    for block in blocks:
        if not bool(block.isfinite().all()):
            raise ValueError("wave must be finite; it holds NaN or infinity")
        held.append(block)
        count += block.shape[-1]
        # More than a window, so that what is left never lies in the overlap alone.
        while length is not None and count > length:
            whole = torch.cat(held, -1)
            yield whole[..., :length], False
            held = [whole[..., length - shared :]]
            count = held[0].shape[-1]
    if count:
        yield torch.cat(held, -1), True
