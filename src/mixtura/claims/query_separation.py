"""The claim of separation by query: names ask for sounds that only pictures taught, and noise heads keep noise out of them."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixtura.audio import QuerySeparator
from mixtura.audio.separate import Mixing, apply_masks, bss_eval, fit_from_video, fit_separator, si_sdr
from mixtura.claims._noisy_videos import RATE, Cases, World, make_world
from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.core.spectrum import loudness_weight, mask_targets
from mixtura.core.training import TrainConfig
from mixtura.data.digits import GARMENTS

__all__ = ["CLAIM"]

GAMMA, WEIGHT = 0.25, 0.1
# Other hinges, drawn in the plot; the first must give back what there is without noise heads.
ZERO = (0.0, 10.0)
SWEEP = ((0.1, WEIGHT), (0.5, WEIGHT))
KINDS = ("noise", "instruments")
DOMINATES = 3.0  # a place belongs to what is so many times louder there
BATCH = 25


@dataclass(frozen=True)
class Size:
    """How much a scale runs.

    Attributes:
        phrases: clips of each of ten instruments.
        steps: of 16 mixtures; noise heads rest for the first third.
        cases: tests of each kind.
        tower_steps: training of the towers.
        bands, depth, width, maps: of the separator.
    """

    phrases: int
    steps: int
    cases: int
    tower_steps: int
    bands: int
    depth: int
    width: int
    maps: int


SCALES: dict[Scale, Size] = {
    "smoke": Size(4, 6, 10, 20, 32, 2, 4, 4),
    "cpu": Size(60, 3000, 150, 400, 64, 4, 16, 16),
    "gpu": Size(120, 20_000, 600, 2000, 96, 6, 48, 32),
}

LIMITS = (
    "Instruments are rendered by a synthesizer, each seen with one kind of clothes, and two seconds at 8 kHz; the towers "
    "are small ones trained on clothes and captions, not CLIP. Tests have phrases, voices, texts and bursts that "
    "training has not, but the same ten presets. 3000 steps instead of 200,000, so queries start apart (spread 3 instead "
    "of 0.0001) and the rate is three times the paper's. Masks are used as they are: those with noise heads lie below "
    "1/2, where a threshold of 1/2 would silence them. The labelled rival and the sweep of gamma are run for one seed. "
    "SDR of 150 mixtures scatters by about 0.2 dB. Two checks fail. The noise heads' mask is 1.9 times as high on noise "
    "as on the targets (1.7, 1.9 and 2.1 by seed), where 2 was asked for: it was 1.7 after half the steps, so they see "
    "more with time. And with gamma 0 and weight 10 they should fall silent and give back the separator without them; "
    "they do fall silent, but all heads share their maps and one offset, and what silences some of them moves the rest: "
    "0.40 dB (0.51, 0.05 and 0.65), where 0.2 was asked for. The leak is close to its bar (0.346, and 0.35 was asked "
    "for; 0.36 after half the steps). The price on clean interferers is 0.2 to 0.6 dB, as the gain against noise is 1.5."
)


def separator(world: World, size: Size, seed: int, *, embed_dim: int | None = None) -> QuerySeparator:
    """An untrained separator, the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return QuerySeparator(
            embed_dim or world.tower.dim,
            maps=size.maps,
            depth=size.depth,
            width=size.width,
            bands=size.bands,
            sample_rate=RATE,
            n_fft=512,
            hop=256,
            spread=3.0,
        )


@torch.inference_mode()
def separated(model: QuerySeparator, cases: Cases, query: Tensor) -> tuple[Tensor, float, float]:
    """Estimates of the targets, shape (n, N), and the mean mask where the other sound is much louder (the leak).

    The third is that mean weighted by loudness as the loss weighs places: silent ones teach nothing, and nobody hears them.
    """
    estimates: list[Tensor] = []
    leaked, places, loud, heard = 0.0, 0, 0.0, 0.0
    device = model.shift.device
    for rows in torch.arange(len(query)).split(BATCH):
        target, other = cases.target[rows].to(device), cases.other[rows].to(device)
        spectrum = model.spectrum(target + other)
        masks = model.logits(model.magnitude_bands(spectrum), query[rows, None].to(device)).sigmoid()
        for one, mask in zip(spectrum, masks, strict=True):
            estimates.append(apply_masks(one[None], mask, model.hop, target.shape[-1])[0, 0])
        mine, theirs = (model.magnitude_bands(model.spectrum(x)) for x in (target, other))
        theirs_louder = theirs > DOMINATES * mine
        leaked += float(masks[:, 0][theirs_louder].sum())
        places += int(theirs_louder.sum())
        weight = loudness_weight(theirs)[theirs_louder]
        loud += float((weight * masks[:, 0][theirs_louder]).sum())
        heard += float(weight.sum())
    return torch.stack(estimates).cpu(), leaked / max(places, 1), loud / max(heard, 1e-9)


@torch.inference_mode()
def ideal(model: QuerySeparator, cases: Cases) -> float:
    """SI-SDR of the true ratio mask on the separator's bands: what no mask of this kind can pass."""
    found = []
    for target, other in zip(cases.target, cases.other, strict=True):
        spectrum = model.spectrum((target + other).cpu()[None])
        parts = model.magnitude_bands(model.spectrum(torch.stack([target, other])))
        masks = mask_targets(parts[None], model.magnitude_bands(spectrum), "ratio")[0, :1]
        found.append(si_sdr(apply_masks(spectrum, masks, model.hop, len(target))[0, 0], target))
    return float(torch.stack(found).mean())


@torch.inference_mode()
def absorbed(model: QuerySeparator, world: World) -> float:
    """Sum of the noise masks where sound off screen is much louder, over that where the two targets are."""
    device = model.shift.device
    query = torch.stack([world.tower.embed_text(list(pair)) for pair in world.captions]).to(device)
    waves = world.three.to(device)
    magnitude = model.magnitude_bands(model.spectrum(waves.sum(1)))
    masks = model.logits(magnitude, query, noise=True)[1].sigmoid().sum(1)
    seen, off = (model.magnitude_bands(model.spectrum(x)) for x in (waves[:, :2].sum(1), waves[:, 2]))
    return float(masks[off > DOMINATES * seen].mean() / masks[seen > DOMINATES * off].mean())


def run(scale: Scale, seed: int, scratch: Path) -> dict[str, Any]:
    """Figures of one seed: noise heads and none, from one beginning; other hinges; labels; the limit of masks."""
    size = SCALES[scale]
    world = make_world(scale, seed, phrases=size.phrases, cases=size.cases, tower_steps=size.tower_steps)
    warm = size.steps // 3
    config = TrainConfig(
        steps=size.steps, lr=3e-3, warmup=0.05, weight_decay=0.0, betas=(0.9, 0.999), checkpoint_every=100, seed=seed
    )
    mixing = Mixing(batch=16, warmup=1 / 3, seed=seed)
    device = "cuda" if scale == "gpu" else "cpu"
    begun = scratch / "begun"
    # Until the noise heads wake up, all are one training: it is run once and goes on from copies of its state.
    shared = separator(world, size, seed).to(device)
    if not begun.exists():
        fit_from_video(
            shared,
            world.waves,
            world.frames,
            world.tower,
            config,
            mixing=mixing,
            objective="query",
            out=begun,
            stop=warm,
        )

    def branch(name: str, hinge: tuple[float, float] | None) -> QuerySeparator:
        state = scratch / name
        if not state.exists():
            shutil.copytree(begun, state)
        model = separator(world, size, seed).to(device)
        fit_from_video(
            model,
            world.waves,
            world.frames,
            world.tower,
            config,
            gamma=(hinge or (GAMMA, WEIGHT))[0],
            weight=(hinge or (GAMMA, WEIGHT))[1],
            mixing=mixing,
            objective="noise-invariant" if hinge else "query",
            out=state,
        )
        return model.eval()

    figures: dict[str, Any] = {"retrieval": world.accuracy}
    models = {"plain": branch("plain", None), "nit": branch("nit", (GAMMA, WEIGHT)), "zero": branch("zero", ZERO)}
    cases = {"noise": world.noise, "instruments": world.instruments}
    with torch.inference_mode():
        queries = {
            kind: {
                "text": world.tower.embed_text(found.right),
                "wrong": world.tower.embed_text(found.wrong),
                "picture": world.tower.embed_image(found.pictures),
            }
            for kind, found in cases.items()
        }
    scores: dict[str, Tensor] = {}
    for kind, found in cases.items():
        figures[f"mixture_{kind}"] = float(si_sdr(found.target + found.other, found.target).mean())
        figures[f"ideal_{kind}"] = ideal(shared.cpu(), found)
        for name, model in models.items():
            for asked in ("text",) if name == "zero" else ("text", "picture", "wrong"):
                estimate, leak, loud = separated(model, found, queries[kind][asked])
                scores[f"{name}_{kind}_{asked}"] = score = si_sdr(estimate, found.target)
                figures[f"{name}_{kind}_{asked}"] = float(score.mean())
                figures[f"{name}_{kind}_{asked}_leak"] = leak
                figures[f"{name}_{kind}_{asked}_loud_leak"] = loud
                if asked == "text" and name != "zero":
                    bss = bss_eval(estimate, torch.stack([found.target, found.other], 1))
                    scores[f"{name}_{kind}_sdr"] = bss.sdr
                    for score_name in ("sdr", "sir", "sar"):
                        figures[f"{name}_{kind}_{score_name}"] = float(getattr(bss, score_name).mean())
                        figures[f"{name}_{kind}_{score_name}_median"] = float(getattr(bss, score_name).median())
    figures |= judged(figures, scores) | {"absorbed": absorbed(models["nit"], world)}
    detail: dict[str, Any] = {"plain": figures["plain_noise_text"], "0.0": figures["zero_noise_text"]}
    detail[str(GAMMA)] = figures["nit_noise_text"]
    if seed == 0:
        for gamma, weight in SWEEP:
            estimate, _, _ = separated(branch(f"gamma-{gamma}", (gamma, weight)), world.noise, queries["noise"]["text"])
            detail[str(gamma)] = float(si_sdr(estimate, world.noise.target).mean())
        figures |= labelled(world, size, seed, config, mixing, device)
    return figures | {"detail": {"gamma": detail}}


def labelled(world: World, size: Size, seed: int, config: TrainConfig, mixing: Mixing, device: str) -> dict[str, float]:
    """The rival that is told what each clip holds, and is asked by number: what pictures and words cost."""
    number = torch.eye(len(GARMENTS))
    model = separator(world, size, seed, embed_dim=len(number)).to(device)
    fit_separator(model, world.waves, number[world.labels], config, mixing=mixing, label="labels")
    found = {}
    for kind, cases in (("noise", world.noise), ("instruments", world.instruments)):
        estimate, _, _ = separated(model.eval(), cases, number[cases.labels])
        found[f"labels_{kind}_text"] = float(si_sdr(estimate, cases.target).mean())
    return found


def judged(figures: dict[str, Any], scores: dict[str, Tensor]) -> dict[str, float]:
    """What the checks read: gains over the rival, pair by pair, and what words lose against pictures."""

    def paired(one: str, other: str) -> tuple[float, float]:
        gain = scores[one] - scores[other]
        return float(gain.mean()), float(gain.mean() - 1.96 * gain.std() / len(gain) ** 0.5)

    found: dict[str, float] = {}
    found["gain"], found["gain_low"] = paired("nit_noise_text", "plain_noise_text")
    found["gain_sdr"], found["gain_sdr_low"] = paired("nit_noise_sdr", "plain_noise_sdr")
    found["price"] = figures["plain_instruments_text"] - figures["nit_instruments_text"]
    found["zero_gap"] = abs(figures["zero_noise_text"] - figures["plain_noise_text"])

    def over_both(asked: str) -> float:
        return float(np.mean([figures[f"nit_{kind}_{asked}"] - figures[f"mixture_{kind}"] for kind in KINDS]))

    # Where pictures themselves gain nothing, nothing was bridged.
    found["bridge"] = over_both("text") / over_both("picture") if over_both("picture") > 0 else 0.0
    found["wrong_name_loss"] = over_both("text") - over_both("wrong")
    return found


def plot(record: Record, figure: Any) -> None:
    """Scores by interferer and model, the leak, and the sweep of gamma."""
    seeds = record["seeds"]
    figure.set_size_inches(11.5, 4.0)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.5, 1.0, 1.0))
    rows = {
        "plain_{}_text": ("no noise heads", "#c05621"),
        "nit_{}_wrong": ("noise heads, wrong name", "#a0aec0"),
        "nit_{}_picture": ("noise heads, asked by picture", "#76a9d8"),
        "nit_{}_text": ("noise heads, asked by name", "#2b6cb0"),
        "ideal_{}": ("true ratio mask", "#38a169"),
    }
    for i, (key, (name, color)) in enumerate(rows.items()):
        values = np.array([[row[key.format(kind)] for kind in KINDS] for row in seeds])
        at = np.arange(len(KINDS)) + (i - 2) * 0.16
        left.bar(at, values.mean(0), 0.16, color=color, label=name)
        left.vlines(at, values.min(0), values.max(0), color="black", linewidth=0.8)
    left.axhline(0, color="black", linewidth=0.6)
    left.set_xticks(range(len(KINDS)), ["target + sound off screen", "target + other instrument"])
    left.set_ylabel("SI-SDR, dB (the mixture's is 0)")
    left.set_ylim(top=1.3 * left.get_ylim()[1])
    left.legend(frameon=False, fontsize=7, loc="upper left", ncols=2)
    names = {"plain": "no noise heads", "nit": "noise heads"}
    leaks = np.array([[row[f"{name}_noise_text_leak"] for name in names] for row in seeds])
    middle.bar(range(2), leaks.mean(0), 0.5, color=["#c05621", "#2b6cb0"])
    middle.vlines(range(2), leaks.min(0), leaks.max(0), color="black", linewidth=0.8)
    middle.set_xticks(range(2), list(names.values()))
    middle.set_title("mean mask where noise is three times louder", fontsize=9)
    sweep = dict(seeds[0]["detail"]["gamma"])
    plain = sweep.pop("plain")
    gammas = sorted(sweep, key=float)
    right.plot([float(g) for g in gammas], [sweep[g] for g in gammas], "o-", color="#2b6cb0", label="noise heads")
    right.axhline(plain, color="#c05621", linestyle="--", label="none")
    right.set(xlabel="gamma (at 0: weight 10)")
    right.set_title("SI-SDR against noise, dB, one seed", fontsize=9)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)


CLAIM = Claim(
    system="query-separation",
    sentence=(
        "A separator that was taught by pictures alone is asked by name and understands; and noise heads that compete to explain "
        "what no picture shows keep that noise out of what is asked for, where a separator without them lets half of it through."
    ),
    paper=(
        "Text queries, trained on noisy VGGSound videos: with noise-invariant training above without it on both test sets, close "
        "to a model trained on labels (table 2); gamma 0.25. Measured again by MARS-Sep on MUSIC-clean+: SDR 11.03, SIR 16.40, "
        "SAR 17.37 dB"
    ),
    metric="SI-SDR and BSS Eval's SDR of the target in dB, mean over mixtures of equal loudness, soft masks, queries in words.",
    baseline=(
        "The same separator with the same batches, rate and length, without noise heads (CLIPSep); both go on from one first "
        "third. For one seed also a rival that is told the labels."
    ),
    checks=(
        Check(figure="bridge", at_least=0.85, why="improvement asked by name over that asked by picture"),
        Check(figure="wrong_name_loss", at_least=4.0, why="dB lost when a wrong name is asked for"),
        Check(figure="gain", at_least=0.6, over="every", why="SI-SDR against noise over that without noise heads, dB"),
        Check(figure="gain_low", at_least=0.0, over="every", why="low end of its 95 % interval, paired over mixtures"),
        Check(figure="gain_sdr", at_least=0.6, over="every", why="the same in BSS Eval's SDR, dB"),
        Check(figure="gain_sdr_low", at_least=0.0, over="every", why="low end of its 95 % interval"),
        Check(figure="plain_noise_text_leak", at_least=0.45, why="without noise heads, mean mask on places of noise"),
        Check(figure="plain_noise_text_leak", at_most=0.6, why="the same, from above"),
        Check(figure="nit_noise_text_leak", at_most=0.35, why="with noise heads, mean mask on places of noise"),
        Check(figure="absorbed", at_least=2.0, why="noise heads' mask on places of noise over that on targets' places"),
        Check(
            figure="zero_gap", at_most=0.2, over="every", why="dB from no noise heads when gamma is 0 with weight 10"
        ),
    ),
    run=run,
    plot=plot,
    limits=LIMITS,
)
