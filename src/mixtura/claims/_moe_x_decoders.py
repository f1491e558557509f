"""Small decoders of the claim of ``moe-x``: chess with probes of the board, text with rules for units.

Shapes: N rows, L positions, U units, G properties.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixtura.claims.framework import Figures
from mixtura.core.balance import load_statistics
from mixtura.core.training import TrainConfig, fit
from mixtura.data.chess import ALPHABET, Games, chess_games
from mixtura.data.texts import corpus
from mixtura.lm.anatomy import find_moe, rerouted, run_layers
from mixtura.lm.model import MixturaConfig, MixturaForCausalLM
from mixtura.lm.model.parts import inner_weights
from mixtura.lm.sparse_autoencoder import fit_autoencoder
from mixtura.lm.tokens import batch_at, blocks, byte_pair_tokenizer
from mixtura.lm.unit_probes import BoardProbe, board_properties
from mixtura.lm.unit_rules import detection_score, mean_score
from mixtura.lm.units import read_units, unit_layer
from mixtura.lm.upcycle import upcycle

__all__ = ["DECODERS", "DecoderSizes", "chess", "text"]

EXPERTS, ACTIVE, BALANCE = 8, 2, 0.01

# Fields of the config in which the arms differ.
DECODERS: Mapping[str, dict[str, Any]] = {
    "dense_gelu": {"hidden_act": "gelu", "num_experts": 0},
    "dense_relu": {"hidden_act": "relu", "num_experts": 0},
    "switch": {"hidden_act": "gelu", "num_experts": EXPERTS},
    "relu_only": {"hidden_act": "relu", "num_experts": EXPERTS},
    "moe_x": {"hidden_act": "relu", "num_experts": EXPERTS, "router": "sparsity"},
    "moe_x_upcycled": {},  # the dense GELU decoder of half the steps, converted and trained on
}


@dataclass(frozen=True, kw_only=True)
class DecoderSizes:
    """A training of decoders.

    Attributes:
        arms: of :data:`DECODERS`.
        games, policy: of chess.
        characters, vocabulary: of text.
        width, layers, heads, length, batch, steps: of the decoder and its training.
        grid, grid_steps: learning rates, and the steps after which one is chosen; 0 takes the first.
        rows: held-out rows of each part: to choose a rate, to fit probes, to measure.
        judged: units that rules are made for.
        upcycle: whether an upcycled arm is trained too.
        init_std: of matrices at the start.
        device: where it runs.
    """

    arms: tuple[str, ...] = ("dense_gelu", "switch", "moe_x")
    games: int = 2500
    policy: str = "greedy"
    characters: int = 1_500_000
    vocabulary: int = 1024
    width: int = 96
    layers: int = 3
    heads: int = 4
    length: int = 128
    batch: int = 16
    steps: int = 300
    grid: tuple[float, ...] = (1.5e-3, 3e-3, 6e-3)
    grid_steps: int = 60
    rows: int = 96
    judged: int = 200
    upcycle: bool = False
    init_std: float = 0.1
    device: str = "cpu"


@dataclass(frozen=True)
class Rows:
    """Token ids (N, L) to train on, to choose a rate on, to fit probes on and to measure on; 0 is padding in chess."""

    train: Tensor
    choose: Tensor
    fit: Tensor
    test: Tensor
    vocabulary: int
    padded: bool


def chess(sizes: DecoderSizes, seed: int) -> dict[str, Any]:
    """Decoders of games: loss, routing, and what units of the middle layer say of the board after each move."""
    games: Games = chess_games(sizes.games, seed=seed, policy=sizes.policy, max_chars=sizes.length)  # type: ignore[arg-type]
    n = min(sizes.rows, sizes.games // 6)
    parts = [slice(i * n, (i + 1) * n) for i in range(3)]
    choose, to_fit, test = (games.ids[p] for p in parts)
    rows = Rows(games.ids[3 * n :], choose, to_fit, test, vocabulary=len(ALPHABET) + 1, padded=True)
    ends, facts, of = games.move_ends(), board_properties, torch.arange(n)[:, None].expand(n, sizes.length)
    boards = [facts(games.boards[p][ends[p]]) for p in parts[1:]]
    which = [of[ends[p]] + i * n for i, p in enumerate(parts[1:])]
    models, arms = _arms(sizes, rows, seed)
    for name, model in models.items():
        units = [_units(model, part)[ends[p]] for part, p in zip((rows.fit, rows.test), parts[1:], strict=True)]
        probe = BoardProbe().fit(units[0], boards[0], which[0])
        order = torch.randperm(len(boards[0]), generator=torch.Generator().manual_seed(0))
        chance = BoardProbe().fit(units[0], boards[0][order])
        arms[name] |= {
            "coverage": probe.coverage(units[1], boards[1], which[1]),
            "boards": probe.reconstruction(units[1], boards[1], which[1]),
            "shuffled": chance.coverage(units[1], boards[1]),
            "properties": len(probe.properties_),
            "positions": len(units[1]),
            "alive": len(probe.alive_),
            "units": probe.n_units_,
            "active": float((units[1] > 0).float().sum(1).mean()),
        }
        if find_moe(model):
            arms[name] |= _routing(model, rows.test)
    kinds = ("loss", "coverage", "boards")
    figures: Figures = {f"chess_{kind}_{name}": arm[kind] for name, arm in arms.items() for kind in kinds}
    ours, dense = arms["moe_x"], arms["dense_gelu"]
    figures |= {
        "chess_loss_gap": ours["loss"] - dense["loss"],
        "chess_boards_gain": ours["boards"] - dense["boards"],
        "chess_shuffled": ours["shuffled"],
        "chess_agreement": ours["agreement"],
        "chess_agreement_learned": arms["switch"]["agreement"],
        "chess_fires": ours["fires"],
        "chess_load": ours["load"],
    }
    return {"figures": figures, "arms": arms, "policy": games.policy}


def text(sizes: DecoderSizes, seed: int) -> dict[str, Any]:
    """Decoders of text: loss, and how well rules tell where units of the middle layer fire; beside a sparse autoencoder."""
    found = [corpus(name, characters=sizes.characters, seed=seed) for name in ("code", "prose")]
    tokenizer = byte_pair_tokenizer([t for part in found for t in part.train], sizes.vocabulary)
    train = torch.cat([blocks(tokenizer, part.train, sizes.length) for part in found])
    held = [blocks(tokenizer, part.held_out, sizes.length, limit=3 * sizes.rows // 2) for part in found]
    choose, to_fit, test = (torch.cat([part[i::3] for part in held]) for i in range(3))
    rows = Rows(train, choose, to_fit, test, vocabulary=sizes.vocabulary, padded=False)
    models, arms = _arms(sizes, rows, seed)
    for name, model in models.items():
        arms[name] |= _rules(_units(model, rows.test), rows.test, tokenizer, sizes, seed)
    dense = models["dense_gelu"]
    made = _autoencoder(dense, rows, sizes, seed)
    with torch.no_grad():
        latents = made.encode(_units(dense, rows.test).flatten(0, 1)).view(*rows.test.shape, -1)
    arms["autoencoder"] = _rules(latents, rows.test, tokenizer, sizes, seed)
    figures: Figures = {f"text_score_{name}": arm["score"] for name, arm in arms.items()}
    figures |= {f"text_loss_{name}": arm["loss"] for name, arm in arms.items() if "loss" in arm}
    figures["text_score_gain"] = arms["moe_x"]["score"] - arms["dense_gelu"]["score"]
    return {"figures": figures, "arms": arms}


def _arms(sizes: DecoderSizes, rows: Rows, seed: int) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Every arm's decoder at its best rate, and its losses."""
    models: dict[str, Any] = {}
    arms: dict[str, dict[str, Any]] = {}
    for name in sizes.arms:
        grid = {}
        if sizes.grid_steps:
            short = replace(sizes, steps=sizes.grid_steps)
            grid = {
                r: _loss(_train(short, rows, _decoder(sizes, rows, name, seed), r, seed), rows, "choose")
                for r in sizes.grid
            }
        lr = min(grid, key=lambda rate: grid[rate]) if grid else sizes.grid[0]
        models[name] = _train(sizes, rows, _decoder(sizes, rows, name, seed), lr, seed)
        arms[name] = {
            "lr": lr,
            "grid": {f"{r:g}": v for r, v in grid.items()},
            "loss": _loss(models[name], rows, "test"),
        }
    if sizes.upcycle:
        half = replace(sizes, steps=sizes.steps // 2)
        lr = arms["dense_gelu"]["lr"]
        dense = _train(half, rows, _decoder(sizes, rows, "dense_gelu", seed), lr, seed)
        wide: Any = upcycle(dense, method="interpretable", n_experts=EXPERTS, top_k=ACTIVE, seed=seed)
        models["moe_x_upcycled"] = _train(half, rows, wide.to(sizes.device), lr, seed, first=half.steps)
        arms["moe_x_upcycled"] = {"lr": lr, "loss": _loss(models["moe_x_upcycled"], rows, "test")}
    return models, arms


def _decoder(sizes: DecoderSizes, rows: Rows, name: str, seed: int) -> MixturaForCausalLM:
    """Equal active parameters: 4 D dense units, or 2 of 8 experts with 2 D units each."""
    torch.manual_seed(seed)
    model = MixturaForCausalLM(
        MixturaConfig(
            vocab_size=rows.vocabulary,
            hidden_size=sizes.width,
            intermediate_size=4 * sizes.width,
            moe_intermediate_size=2 * sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_experts_per_tok=ACTIVE,
            max_position_embeddings=max(256, sizes.length),
            initializer_range=sizes.init_std,
            mlp_gated=False,
            mlp_bias=True,
            norm="layer",
            norm_bias=True,
            router_aux_loss_coef=BALANCE,
            router_z_loss_coef=0.0,
            **DECODERS[name],
        )
    )
    return model.to(sizes.device)


def _train(sizes: DecoderSizes, rows: Rows, model: Any, lr: float, seed: int, *, first: int = 0) -> Any:
    if find_moe(model):
        model.set_experts_implementation("grouped_mm")
    model.train()

    def loss_at(step: int) -> Tensor:
        ids = batch_at(rows.train, first + step, sizes.batch, seed=seed).to(sizes.device)
        with torch.autocast(sizes.device, torch.bfloat16, enabled=sizes.device == "cuda"):
            labels = ids.masked_fill(ids == 0, -100) if rows.padded else ids
            mask = (
                (ids > 0).long() if rows.padded else None
            )  # padding is behind the text: it only keeps quiet in the balance
            loss: Tensor = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        return loss

    fit(model, loss_at, TrainConfig(steps=sizes.steps, lr=lr, seed=seed), label=f"decoder {lr:g}")
    return model.eval()


@torch.no_grad()
def _loss(model: Any, rows: Rows, part: str) -> float:
    """Nats a token that is not padding."""
    total, count = 0.0, 0
    for ids in getattr(rows, part).split(16):
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        wanted = ids[:, 1:].masked_fill(ids[:, 1:] == 0, -100) if rows.padded else ids[:, 1:]
        total += float(F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum", ignore_index=-100))
        count += int((wanted != -100).sum())
    return total / count


def _units(model: Any, ids: Tensor) -> Tensor:
    """Units (N, L, U) of the middle layer."""
    return torch.cat(list(read_units(model, ids, unit_layer(model))))


@torch.no_grad()
def _routing(model: Any, ids: Tensor) -> dict[str, float]:
    """Over all layers: correlation of score and true active share, what chosen experts fire, and the largest load."""
    found: list[tuple[float, float, float]] = []
    inputs: dict[str, Tensor] = {}
    blocks_ = find_moe(model)
    hooks = [b.experts.register_forward_pre_hook(_keep(inputs, b.name), with_kwargs=True) for b in blocks_]
    mask_T = ids.flatten() > 0

    def look(block: Any, routing: Any) -> tuple[Tensor, Tensor]:
        seen[block.name] = routing
        return routing.weights, routing.indices

    seen: dict[str, Any] = {}
    try:
        with rerouted(blocks_, look):
            run_layers(model, ids)
    finally:
        for hook in hooks:
            hook.remove()
    for block in blocks_:
        up, bias = inner_weights(block.experts)
        x_TD = inputs[block.name].to(up.dtype).cpu()[mask_T]
        routing = seen[block.name]
        z_TEH = torch.einsum("td,ehd->teh", x_TD, up.cpu()) + (0 if bias is None else bias.cpu())
        fires_TE = (z_TEH > 0).float().mean(-1)
        logits_TE, chosen_TK = routing.logits.float().cpu()[mask_T], routing.indices.cpu()[mask_T]
        agreement = float(torch.corrcoef(torch.stack((logits_TE.flatten(), fires_TE.flatten())))[0, 1])
        fires = float(fires_TE.gather(1, chosen_TK).mean() / fires_TE.mean())
        found.append((agreement, fires, load_statistics(chosen_TK, block.n_experts).max_over_mean))
    agreement, fires, load = (sum(values) / len(found) for values in zip(*found, strict=True))
    return {"agreement": agreement, "fires": fires, "load": max(values[2] for values in found), "mean_load": load}


def _keep(inputs: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs[name] = args[0] if args else kwargs["hidden_states"]

    return hook


def _rules(units: Tensor, ids: Tensor, tokenizer: Any, sizes: DecoderSizes, seed: int) -> dict[str, Any]:
    """Mean detection score of units drawn among those that fire often enough, not always, to be judged."""
    fires = (units > 0).float().mean((0, 1))
    usual = ((fires > 2e-3) & (fires < 0.9)).nonzero().flatten()
    drawn = usual[torch.randperm(len(usual), generator=torch.Generator().manual_seed(seed))[: sizes.judged]]
    rules = detection_score(units[..., drawn], ids, tokenizer, units=drawn.tolist(), seed=seed)
    return {
        "score": mean_score(rules) if rules else 0.5,
        "judged": len(rules),
        "alive": int((fires > 0).sum()),
        "active": float((units > 0).float().sum(-1).mean()),
    }


def _autoencoder(dense: Any, rows: Rows, sizes: DecoderSizes, seed: int) -> Any:
    """As many latents as all experts have units, and as many tokens to learn from as the decoder had."""
    layer = unit_layer(dense)

    def units_at(step: int) -> Tensor:
        ids = batch_at(rows.train, step, sizes.batch, seed=seed)
        return torch.cat(list(read_units(dense, ids, layer, batch_size=len(ids)))).flatten(0, 1)

    config = TrainConfig(steps=sizes.steps, lr=3e-3, weight_decay=0.0, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    return fit_autoencoder(units_at, 2 * sizes.width * EXPERTS, 16, config, generator=draw)
