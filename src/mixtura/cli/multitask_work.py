"""What ``train`` and ``prune`` do with the encoder-decoder: pairs in, a translator of many languages out."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mixtura.cli.checks import check_device, check_writable
from mixtura.core.checkpoint import read_json

if TYPE_CHECKING:
    from mixtura.lm.multitask import TaskMixture
    from mixtura.lm.parallel.training import ExpertParallel

__all__ = ["MODEL_TYPE", "is_multitask", "measured", "mixture_of", "texts_of", "train_multitask"]

MODEL_TYPE = "mixtura_multitask"
DEBIAN = "debian"  # a word in the place of a folder: descriptions of Debian's packages
TRANSLATED = ("da", "it", "fr", "de", "sk", "pt_BR", "ja", "uk", "pl", "ru", "es")
HELD_OUT = 0.02  # of the pairs of a folder, at least one and at most 200 a pair of languages
MOST_HELD_OUT = 200
OWN = ("vocab_size", "pad_token_id", "eos_token_id", "decoder_start_token_id", "bos_token_id")

Say = Callable[[str], None]
Texts = tuple[dict[Any, Any], dict[Any, Any], dict[str, list[str]]]


def is_multitask(source: str) -> bool:
    """Whether a config file or a checkpoint's directory is of the encoder-decoder."""
    path = Path(source)
    config = path if path.suffix == ".json" else path / "config.json"
    if not config.is_file():
        return False
    try:
        return read_json(config).get("model_type") == MODEL_TYPE
    except ValueError:  # what is wrong with it, whoever reads it says
        return False


def texts_of(text: Sequence[Path] | None) -> Texts:
    """Pairs to train on, pairs held out, and more text by language, of a folder or of Debian's descriptions."""
    if not text or len(text) != 1:
        raise ValueError(
            "--text must be given once for this model: a folder with files such as en-de.src and en-de.tgt, or the word debian"
        )
    if str(text[0]) == DEBIAN and not text[0].exists():
        from mixtura.data.package_pairs import package_pairs

        found = package_pairs(TRANSLATED)
        train = {("en", language): part.train for language, part in found.items()}
        held = {("en", language): part.test[:MOST_HELD_OUT] for language, part in found.items()}
        return train, held, {}
    from mixtura.data.parallel_texts import read_parallel

    pairs, mono = read_parallel(text[0])
    train, held = {}, {}
    for languages, part in pairs.items():
        n = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(part))))
        if len(part) < 2:
            raise ValueError(
                f"{'-'.join(languages)} has {len(part)} pair, and one is held out to measure on; give more"
            )
        train[languages], held[languages] = part[:-n], part[-n:]
    return train, held, mono


def mixture_of(tokenizer: Any, pairs: Any, mono: Mapping[str, list[str]], **options: Any) -> "TaskMixture":
    """Batches of both tasks; text of one language beside the pairs is repaired too."""
    from mixtura.lm.multitask import TaskMixture, texts_by_language

    together = texts_by_language(pairs)
    for language, texts in mono.items():
        together[language] = list(dict.fromkeys([*together.get(language, []), *texts]))
    return TaskMixture(tokenizer, pairs, together, **options)


@torch.inference_mode()
def measured(model: Any, mixture: "TaskMixture") -> dict[str, float]:
    """Nats a token by pair of languages, translated, on all rows of a mixture."""
    mode, device = model.training, next(model.parameters()).device
    model.eval()
    found = {}
    for languages in mixture.pairs:
        rows = mixture.rows("mt", languages)
        total = count = 0.0
        for i in range(0, len(rows), 16):
            batch = {name: t.to(device) for name, t in mixture.padded(rows[i : i + 16]).items()}
            labels = int((batch["labels"] >= 0).sum())
            total, count = total + float(model(**batch, use_cache=False).loss) * labels, count + labels
        found["-".join(languages)] = total / count
    model.train(mode)
    return found


def train_multitask(
    source: str,
    out: Path,
    text: Sequence[Path] | None,
    options: Mapping[str, Any],
    *,
    device: str,
    dry_run: bool,
    command: str,
    say: Say,
    parallel: str | None = None,
) -> None:
    """Train a new or an old encoder-decoder on pairs; an unfinished run's state stands in ``out.state``."""
    from mixtura.cli.train_parallel import team_of

    check_device(device)
    check_writable(out, [source])
    if options["trainable"] != "all" or "masks" in options:
        raise ValueError("--trainable and --masks are for decoders; the encoder-decoder trains as a whole")
    with team_of(parallel, device, say) as (team, device, say):
        _train(source, out, text, options, team, device=device, dry_run=dry_run, command=command, say=say)


def _train(
    source: str,
    out: Path,
    text: Sequence[Path] | None,
    options: Mapping[str, Any],
    team: "ExpertParallel | None",
    *,
    device: str,
    dry_run: bool,
    command: str,
    say: Say,
) -> None:
    from mixtura.core.training import TrainConfig, fit
    from mixtura.lm import cost, loading
    from mixtura.lm.model import MultitaskMoEForConditionalGeneration

    new, leads = source.endswith(".json"), team is None or team.leads
    train, held, mono = _read(team, text)
    tokens = 2 * options["steps"] * options["batch_size"] * options["length"]
    languages = sorted({language for pair in train for language in pair} | set(mono))
    if new:
        model, tokenizer = _drawn(source, train, languages, options["seed"], len_only=dry_run)
    else:
        model, tokenizer = loading.load(source, dtype=torch.float32)
    model.config.router_aux_loss_coef = options["balance"]
    size = cost.model_size(model)
    pairs = ", ".join(f"{'-'.join(pair)} {len(part):,}" for pair, part in train.items())
    say(f"train {source} on up to {tokens:,} tokens of {pairs}: {cost.estimate(size, trained_tokens=tokens)}")
    if dry_run:
        return
    shape = {"batch_size": options["batch_size"], "length": options["length"], "seed": options["seed"]}
    mixture = mixture_of(tokenizer, train, mono, **shape)
    watched = mixture_of(tokenizer, held, {}, **shape)
    model = model.to(device)
    before = measured(model, watched) if leads else {}
    if team is not None:
        _agree(team, mixture, model)
        team.prepare(model)
    shared = None if team is None else team.shared

    def loss_at(step: int) -> torch.Tensor:
        rows = mixture.batch_at(step)
        batch = {name: (t if team is None else team.rows(t)).to(device) for name, t in rows.items()}
        loss: torch.Tensor = model(**batch, use_cache=False, shared_batch=shared).loss
        return loss

    state = out.with_name(f"{out.name}.state")
    facts: dict[str, Any] = {"pairs": {"-".join(pair): len(part) for pair, part in train.items()}}
    facts["batch_size"] = options["batch_size"]
    if options["balance"] != 0.01:  # so that a run from before it was compared goes on
        facts["balance"] = options["balance"]
    config = TrainConfig(
        steps=options["steps"], lr=options["lr"], checkpoint_every=options["checkpoint_every"], seed=options["seed"]
    )
    history = fit(model, loss_at, config, out=state, resume=options["resume"], label="train", describe=facts, team=team)
    if team is not None:
        trained = team.state(model)
        if not leads:
            return
        model = MultitaskMoEForConditionalGeneration(model.config).to(device)
        model.load_state_dict(trained)
    if history.resumed_at:
        say(f"went on from step {history.resumed_at}")
    after = measured(model, watched)
    figures: dict[str, Any] = {"loss at the end": history.losses[-1] if history.losses else float("nan")}
    for name, loss in after.items():
        figures[f"held-out nats a token, {name}"] = f"{before[name]:.2f} -> {loss:.2f}"
        say(f"{name}: held-out nats a token {before[name]:.2f} -> {loss:.2f}")
    how = "" if team is None else f", by {team}"
    card = {
        "title": out.name,
        "base": ["random weights" if new else source],
        "recipe": f"Trained with mixtura to translate and to repair text in {', '.join(languages)}{how}.",
        "data": f"up to {tokens:,} tokens of {pairs}",
        "command": command,
        "figures": figures,
        "usage": usage(out, languages[-1]),
        "source": "2109.10465",
    }
    loading.save(model.to(torch.bfloat16), tokenizer, out, card=card)
    shutil.rmtree(state, ignore_errors=True)
    say(f"{out} is written; translate with mixtura.lm.multitask.translate")


def _read(team: "ExpertParallel | None", text: Sequence[Path] | None) -> Texts:
    """The texts; what is not on this machine yet the first process fetches, and the others find it."""
    if team is None:
        return texts_of(text)
    if not team.leads:
        team.wait()
        return texts_of(text)
    try:
        return texts_of(text)
    finally:
        team.wait()


def _agree(team: "ExpertParallel", mixture: "TaskMixture", model: torch.nn.Module) -> None:
    """Make sure that all processes hold the same texts and the same model, and that a batch has rows for each of them."""
    batches = [t for step in range(len(mixture.tasks)) for t in mixture.batch_at(step).values()]
    team.rows(batches[0])
    texts = [torch.cat(side) for part in mixture.pairs.values() for side in part]
    texts += [torch.cat(part) for part in mixture.mono.values()]
    team.agree("the data", *batches, *texts)
    team.agree("the model", *model.state_dict().values())


def usage(out: Path, language: str) -> str:
    """Python that loads what was written and translates with it, for the model card."""
    return "\n".join(
        [
            "import mixtura  # registers the model's classes with transformers",
            "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
            "",
            "from mixtura.lm.multitask import translate",
            "",
            f'model = AutoModelForSeq2SeqLM.from_pretrained("{out.name}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{out.name}")',
            f'print(translate(model, tokenizer, ["a text"], "{language}"))',
        ]
    )


def _drawn(source: str, train: Any, languages: list[str], seed: int, *, len_only: bool) -> tuple[Any, Any]:
    """A model with random weights and the tokenizer learned from the pairs; without weights for counting."""
    from mixtura.cli.train_new import read_fields
    from mixtura.lm.model import MultitaskMoEConfig, MultitaskMoEForConditionalGeneration
    from mixtura.lm.multitask import multitask_tokenizer

    fields = read_fields(source, MultitaskMoEConfig, also=(*MultitaskMoEConfig.attribute_map, "model_type"))
    fields.pop("model_type")
    if own := sorted(set(fields) & set(OWN) - {"vocab_size"}):
        raise ValueError(f"{source} sets {own}, which follow from the tokenizer that is learned; leave them out")
    config = MultitaskMoEConfig(**fields)
    if len_only:
        with torch.device("meta"):
            return MultitaskMoEForConditionalGeneration(config), None
    # Every pair of languages gives as many texts, so that the large ones don't take all the pieces.
    some = [text for part in train.values() for pair in part[:2000] for text in pair]
    tokenizer = multitask_tokenizer(some, config.vocab_size, languages)
    config.vocab_size = len(tokenizer)
    config.pad_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    config.decoder_start_token_id = tokenizer.eos_token_id
    torch.manual_seed(seed)
    return MultitaskMoEForConditionalGeneration(config), tokenizer
