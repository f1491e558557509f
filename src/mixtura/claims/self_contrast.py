"""The claim of self-contrast decoding, on a small mixture made and trained in the run.

Problems are chains of modular arithmetic, "12+3*4-5>12+3=15;15*4=60;60-5=55;" (left to right, results mod 100, two
digits). In the training corpus a careless hand wrote 40 % of the steps: it repeats the running value as the result and
goes on from there. Both routings know that easy wrong continuation, the better one knows the sum as well: the case the
paper describes (its figure 2c). The same run on a clean corpus is the control, where nothing is to be gained.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixtura.claims.framework import Check, Claim, Record, Scale
from mixtura.core.training import TrainConfig, fit
from mixtura.lm.decode.divergence import routing_divergence
from mixtura.lm.decode.routing import RoutingRule, routed
from mixtura.lm.decode.self_contrast import contrast_logits, generate
from mixtura.lm.training import language_loss

__all__ = ["CLAIM"]

ALPHABET = "0123456789+-*>=;"
EXPERTS = 8
ALPHA = 0.1
BETAS = (0.1, 0.3, 0.5, 0.7, 0.9)
TAUS = (0.2, 0.3, 0.4, 0.5, 0.6)
CARELESS = 0.4


@dataclass(frozen=True)
class Size:
    """Model, budget and number of problems of a scale."""

    layers: int
    width: int
    hidden: int
    chain: int  # steps a problem
    steps: int  # optimizer steps of the dense model, and again of the mixture
    batch: int
    lr: float
    test: int
    development: int
    free: int  # problems solved by free generation


# Slow and long enough that the model copies operands and punctuation without fail: trained faster (300 steps at 5e-3), the weak
# pass is lost there too, and where the two routings differ says little about reasoning.
SIZES: dict[Scale, Size] = {
    "smoke": Size(2, 32, 48, 3, 12, 16, 3e-3, 40, 30, 8),
    "cpu": Size(3, 64, 96, 3, 600, 96, 2e-3, 3000, 1000, 500),
    "gpu": Size(4, 256, 384, 5, 1500, 256, 1e-3, 3000, 1000, 500),
}


def run(scale: Scale, seed: int, scratch: Path) -> dict[str, Any]:
    """Figures of one seed: shares in percent, gains in percentage points."""
    size = SIZES[scale]
    device = "cuda" if scale == "gpu" and torch.cuda.is_available() else "cpu"
    figures: dict[str, Any] = {}
    held_out = _held_out(size, seed)
    model = _trained_mixture(size, seed, CARELESS, held_out, device)
    figures |= _contrasted(model, size, held_out, device)
    figures |= _divergences(model, size, held_out[1][:500], device)
    clean = _trained_mixture(size, seed, 0.0, held_out, device)
    control = _contrasted(clean, size, held_out, device)
    figures |= {
        f"clean_{name}": control[name] for name in ("greedy", "rank2", "rank2_gain", "final_greedy", "final_rank2")
    }
    return figures


def _contrasted(model: Any, size: Size, held_out: tuple[list[str], list[str]], device: str) -> dict[str, Any]:
    development, test = (_encode(problems).to(device) for problems in held_out)
    score = _Scorer(model, size)
    greedy = score.plain(test, RoutingRule.default())
    best = {k: score.tuned(development, test, RoutingRule.rank(k)) for k in range(1, EXPERTS + 1)}
    chosen = max(best, key=lambda k: best[k]["development"])
    tops = {k: score.plain(test, RoutingRule.top(k)) for k in range(1, EXPERTS + 1)}
    others: dict[str, RoutingRule] = {f"top-{k}": RoutingRule.top(k) for k in tops}
    others |= {f"tau {tau}": RoutingRule.threshold(tau) for tau in TAUS}
    rival = max(others, key=lambda name: score.plain(development, others[name]))
    rival_score = score.plain(test, others[rival])
    rank2 = best[2]["test"]
    final = _final_answers(model, size, held_out[1][: size.free], best[2]["beta"], device)
    return {
        "greedy": greedy,
        "rank1": best[1]["test"],
        "rank2": rank2,
        "rank2_beta": best[2]["beta"],
        "chosen_rank": chosen,
        "chosen": best[chosen]["test"],
        "best_other_routing": rival_score,
        "rank1_gain": best[1]["test"] - greedy,
        "rank2_gain": rank2 - greedy,
        "rank2_over_other_routing": rank2 - rival_score,
        "chosen_gain": best[chosen]["test"] - greedy,
        "top4_minus_top2": tops[4] - tops[2],
        "final_greedy": final[0],
        "final_rank2": final[1],
        "final_gain": final[1] - final[0],
        "detail": {
            "by_beta": {str(k): best[k]["by_beta"] for k in best},
            "by_top": {str(k): value for k, value in tops.items()},
            "other_routing": rival,
        },
    }


class _Scorer:
    """Share of steps, in percent, whose two result digits are both the likeliest given the true prefix."""

    def __init__(self, model: Any, size: Size):
        self.model, self.size = model, size
        self.places = _result_places(size.chain)
        self.kept: dict[tuple[int, RoutingRule], Tensor] = {}

    @torch.inference_mode()
    def logits(self, ids: Tensor, rule: RoutingRule) -> Tensor:
        """Logits of the digits, shape (N, 2 chain, V); every rule runs once over a set."""
        key = (ids.data_ptr(), rule)
        if key not in self.kept:
            parts = []
            with routed(self.model, rule):
                for part in ids.split(500):
                    parts.append(self.model(input_ids=part, use_cache=False).logits[:, self.places - 1])
            self.kept[key] = torch.cat(parts)
        return self.kept[key]

    def share(self, scores: Tensor, ids: Tensor) -> float:
        right = scores.argmax(-1) == ids[:, self.places]
        return 100 * right.unflatten(1, (-1, 2)).all(-1).float().mean().item()

    def plain(self, ids: Tensor, rule: RoutingRule) -> float:
        return self.share(self.logits(ids, rule), ids)

    def contrasted(self, ids: Tensor, weak: RoutingRule, beta: float) -> float:
        strong = self.logits(ids, RoutingRule.default())
        return self.share(contrast_logits(strong, self.logits(ids, weak), alpha=ALPHA, beta=beta), ids)

    def tuned(self, development: Tensor, test: Tensor, weak: RoutingRule) -> dict[str, Any]:
        """Beta chosen on the development problems alone, then measured on the test problems."""
        by_beta = {beta: self.contrasted(development, weak, beta) for beta in BETAS}
        beta = max(by_beta, key=lambda b: by_beta[b])
        return {
            "beta": beta,
            "development": by_beta[beta],
            "test": self.contrasted(test, weak, beta),
            "by_beta": [self.contrasted(test, weak, b) for b in BETAS],
        }


def _final_answers(model: Any, size: Size, problems: Sequence[str], beta: float, device: str) -> tuple[float, float]:
    """Share of final answers that are right, in percent: greedy, and contrasted with rank 2, by free generation."""
    ids = _encode(problems).to(device)
    prompt = problems[0].index(">") + 1
    found = []
    for b in (0.0, beta):
        out = generate(model, ids[:, :prompt], beta=b, max_new_tokens=ids.shape[1] - prompt, eos_token_id=())
        answers = slice(-3, -1)
        assert isinstance(out, Tensor)
        found.append(100 * (out[:, answers] == ids[:, answers]).all(-1).float().mean().item())
    return found[0], found[1]


def _divergences(model: Any, size: Size, problems: Sequence[str], device: str) -> dict[str, Any]:
    ids = _encode(problems).to(device)
    predicted = _result_places(size.chain) - 1
    solution = torch.zeros(ids.shape[1], dtype=torch.bool)
    solution[problems[0].index(">") :] = True
    results = torch.zeros_like(solution)
    results[predicted] = True
    # Operands of the problem itself are drawn at random: nothing is copied there.
    classes = {"results": results, "copied": solution & ~results & (torch.arange(len(solution)) < ids.shape[1] - 1)}
    found = routing_divergence(model, [ids], range(1, EXPERTS + 1), classes=classes)
    kl = found.kl["all"]
    return {
        "kl_far_over_rank2": sum(kl[4:8]) / 4 / kl[1],
        "kl_rank1_over_least_other": kl[0] / min(kl[1:]),
        "kl_results_over_copied": found.kl["results"][1] / found.kl["copied"][1],
        "unchosen_rank2": sum(found.unchosen[1]) / len(found.unchosen[1]),
        "kl_by_rank": kl,
    }


def _trained_mixture(size: Size, seed: int, careless: float, held_out: tuple[list[str], list[str]], device: str) -> Any:
    """A dense model is trained, upcycled to eight experts and trained on."""
    from transformers import MixtralConfig, MixtralForCausalLM

    def config(experts: int, k: int) -> Any:
        return MixtralConfig(
            vocab_size=len(ALPHABET),
            hidden_size=size.width,
            intermediate_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=experts,
            num_experts_per_tok=k,
            max_position_embeddings=128,
            bos_token_id=None,
            eos_token_id=None,
        )

    torch.manual_seed(seed)
    dense = MixtralForCausalLM(config(1, 1)).to(device)
    forbidden = {problem.split(">")[0] for part in held_out for problem in part}
    batch = _batches(size, seed, careless, forbidden, device)
    schedule = TrainConfig(steps=size.steps, lr=size.lr, seed=seed)
    fit(dense, lambda step: language_loss(dense, batch(step)), schedule, label="dense")
    torch.manual_seed(seed + 1)
    mixture = MixtralForCausalLM(config(EXPERTS, 2)).to(device)
    state = mixture.state_dict()
    for name, value in dense.state_dict().items():
        if ".experts." in name:
            copies = value.repeat(EXPERTS, 1, 1)
            state[name].copy_(copies * (1 + 0.05 * torch.randn_like(copies)) + 0.02 * torch.randn_like(copies))
        elif ".gate." not in name:
            state[name].copy_(value)
    fit(
        mixture,
        lambda step: language_loss(mixture, batch(size.steps + step), balance=0.01, z=0.001),
        schedule,
        label="mixture",
    )
    return mixture.eval()


def _batches(size: Size, seed: int, careless: float, forbidden: set[str], device: str) -> Callable[[int], Tensor]:
    def batch(step: int) -> Tensor:
        draw = random.Random(f"train {seed} {step}")
        rows: list[str] = []
        while len(rows) < size.batch:
            row = _problem(draw, size.chain, careless)
            if row.split(">")[0] not in forbidden:
                rows.append(row)
        return _encode(rows).to(device)

    return batch


def _held_out(size: Size, seed: int) -> tuple[list[str], list[str]]:
    """Clean development and test problems, none of them twice."""
    draw, seen = random.Random(f"held out {seed}"), dict[str, None]()
    while len(seen) < size.development + size.test:
        seen[_problem(draw, size.chain, 0.0)] = None
    problems = list(seen)
    return problems[: size.development], problems[size.development :]


def _problem(draw: random.Random, chain: int, careless: float) -> str:
    value = draw.randrange(100)
    head, solution = f"{value:02d}", ""
    for _ in range(chain):
        operator, operand = draw.choice("+-*"), draw.randint(1, 9)
        head += f"{operator}{operand}"
        right = {"+": value + operand, "-": value - operand, "*": value * operand}[operator] % 100
        result = value if draw.random() < careless else right
        solution += f"{value:02d}{operator}{operand}={result:02d};"
        value = result
    return f"{head}>{solution}"


def _result_places(chain: int) -> Tensor:
    """Positions of the two digits of every result."""
    first = 2 + 2 * chain + 1
    return torch.tensor([first + 8 * step + 5 + digit for step in range(chain) for digit in (0, 1)])


def _encode(problems: Sequence[str]) -> Tensor:
    return torch.tensor([[ALPHABET.index(character) for character in problem] for problem in problems])


def plot(record: Record, figure: Any) -> None:
    """Left: accuracy over beta for some ranks; right: divergence by rank."""
    left, right = figure.subplots(1, 2)
    seeds = record["seeds"]
    for k, color in (("1", "#c05621"), ("2", "#2b6cb0"), ("3", "#2f855a"), ("8", "#6b46c1")):
        mean = [sum(values) / len(seeds) for values in zip(*(s["detail"]["by_beta"][k] for s in seeds), strict=True)]
        left.plot(BETAS, mean, "o-", color=color, label=f"rank {k}", markersize=3)
    left.axhline(sum(s["greedy"] for s in seeds) / len(seeds), color="black", linestyle=":", label="greedy")
    left.axhline(
        sum(s["best_other_routing"] for s in seeds) / len(seeds), color="gray", linestyle="--", label="other routing"
    )
    left.set_xlabel("beta")
    left.set_ylabel("steps right, %")
    left.legend(frameon=False, fontsize=8)
    for s in seeds:
        right.plot(range(1, EXPERTS + 1), s["kl_by_rank"], "o-", alpha=0.7, markersize=3, label=f"seed {s['seed']}")
    right.set_xlabel("rank of the weak expert")
    right.set_ylabel("KL(strong || weak), nats a token")
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


CLAIM = Claim(
    system="self-contrast",
    sentence=(
        "Contrasting a mixture of experts with itself, routed to its second-ranked expert, solves more steps of worked "
        "reasoning than greedy decoding and than any other number of experts."
    ),
    paper="GSM8K with Mixtral 8x7B: greedy 61.79, best other routing 63.84, self-contrast 66.94 (Table 1)",
    metric="Share of arithmetic steps with both result digits right given the true prefix, in percent of 3000 problems' steps.",
    baseline=(
        "Greedy decoding, ensemble routing (top-1 to top-8) and dynamic routing (tau 0.2 to 0.6) on the same model, each at its "
        "best on the same 1000 development problems on which beta and rank are chosen."
    ),
    checks=(
        Check(figure="rank2_gain", at_least=3.0, why="rank 2 over greedy, points"),
        Check(figure="rank2_over_other_routing", at_least=3.0, why="rank 2 over the best other routing, points"),
        Check(figure="rank2_gain", at_least=0.01, over="every", why="rank 2 over greedy in every seed, points"),
        Check(figure="chosen_gain", at_least=5.0, why="rank chosen on development data over greedy, points"),
        Check(figure="final_gain", at_least=0.0, why="final answers by free generation over greedy, points"),
        Check(figure="rank1_gain", at_most=0.5, why="rank 1 as the weak pass does not win, points"),
        Check(figure="kl_far_over_rank2", at_least=1.5, why="divergence of ranks 5 to 8 over that of rank 2"),
        Check(figure="kl_rank1_over_least_other", at_most=1.0, why="rank 1 diverges least"),
        Check(
            figure="kl_results_over_copied",
            at_least=5.0,
            why="divergence on results over that on copied tokens, rank 2",
        ),
        Check(figure="top4_minus_top2", at_most=0.0, why="more experts than trained do not help, points"),
    ),
    run=run,
    plot=plot,
    limits=(
        "A model of characters trained in the run. The gain needs text with easy but wrong continuations: on a clean "
        "corpus the same recipe gains nothing, which the figures that begin with clean_ show. The recipe was chosen, "
        "and not at the first try: 300 steps at 5e-3, best for greedy decoding on seed 100, met every bar on seeds 0 "
        "to 2 but that on copied tokens (3.8 for 5), as a pass routed to rank 2 alone failed on copying too. Steps "
        "and rate were then changed on seed 100, where the longer training met that bar, and seeds 0 to 2 were run "
        "once."
    ),
)
