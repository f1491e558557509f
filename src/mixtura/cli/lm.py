"""The life of a language model of experts: ``upcycle``, ``train``, ``compress``, ``generate``, ``inspect``."""

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["add_to"]

SOURCE = typer.Argument(help="Checkpoint: a directory, or an id on the Hugging Face hub.")
Seed = Annotated[int, typer.Option(help="Seed of everything that chance enters.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, mps.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it will take, and stop.")]
Text = Annotated[
    list[Path] | None,
    typer.Option(
        help="Text file or directory of texts; may be repeated. Default: Python's own sources, reference and sums."
    ),
]


class UpcycleMethod(StrEnum):
    """Ways to make experts of dense models."""

    copy = "copy"
    fine_grained = "fine-grained"
    interpretable = "interpretable"
    own_units = "own-units"
    pyramid = "pyramid"
    branch_attend_mix = "branch-attend-mix"
    branch_train_mix = "branch-train-mix"


class CombineName(StrEnum):
    """How an expert and the fixed network beside it come together."""

    coefficient = "coefficient"
    sum = "sum"


class CompressMethod(StrEnum):
    """Ways to make a model small."""

    mc_moe = "mc-moe"
    mixllm = "mixllm"
    sparse_attention = "sparse-attention"


class ScopeName(StrEnum):
    """What one integer program spends its bits over."""

    model = "model"
    block = "block"


class DecodeName(StrEnum):
    """Ways to choose the next token."""

    greedy = "greedy"
    sample = "sample"
    self_contrast = "self-contrast"


class TrainableName(StrEnum):
    """What learns in a training."""

    all = "all"
    experts = "experts"
    router = "router"


class MasksName(StrEnum):
    """How the masks of a sparse model move while it trains."""

    rigl = "rigl"
    set = "set"
    static = "static"


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module."""
    for command in (upcycle, train, compress, generate, inspect):
        app.command()(command)


def upcycle(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC... DST",
            help="Dense checkpoints (several for the branch methods), then the directory to write.",
        ),
    ],
    method: Annotated[UpcycleMethod, typer.Option(help="How experts are made of dense models.")] = UpcycleMethod.copy,
    experts: Annotated[
        str,
        typer.Option(
            help="Experts a layer (copy, fine-grained, interpretable); for pyramid also of each in turn: 4,4,8,8 or 4x2,8x2."
        ),
    ] = "8",
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Experts that each token visits; default 2, 1 for pyramid, half the blocks for own-units (shared ones included)."
        ),
    ] = None,
    combine: Annotated[
        CombineName | None,
        typer.Option(help="How expert and fixed network come together; default coefficient (pyramid)."),
    ] = None,
    segments: Annotated[
        int | None,
        typer.Option(
            help="Segments each copy is cut into (fine-grained, default 4), or the hidden units themselves (own-units, 8)."
        ),
    ] = None,
    shared: Annotated[
        int | None,
        typer.Option(help="Segments that are always on, outside the router: default 0 (fine-grained), 1 (own-units)."),
    ] = None,
    text: Text = None,
    samples: Annotated[int, typer.Option(help="Blocks of text to see which units are used (own-units).")] = 32,
    length: Annotated[int, typer.Option(help="Tokens a block (own-units).")] = 256,
    shared_kv: Annotated[
        bool, typer.Option("--shared-kv", help="One key/value cache for all attention experts.")
    ] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Turn dense checkpoints into one mixture of experts.

    `copy` starts every expert as a copy of the dense feed-forward layer: right after it the model answers as before.
    `fine-grained` cuts the copies into smaller experts. `own-units` makes no copies: it cuts the dense layer's own hidden units
    into blocks, keeps those that all tokens need always on, and lets each token choose a few of the others, so that it costs less
    and answers less well until it is trained. `branch-attend-mix` makes experts of several specialists,
    feed-forward and attention; `branch-train-mix` averages their attention instead. `pyramid` keeps the dense feed-forward layer
    of every second block and puts one of several experts beside it, more of them in deeper blocks. `interpretable` makes sparse
    ReLU experts of random halves of the layer, whose units `mixtura explain` reads; it wants a model without gated
    feed-forward parts, and training afterwards.

    Examples:

        mixtura upcycle HuggingFaceTB/SmolLM2-135M out/moe --experts 8 --top-k 2

        mixtura upcycle base out/own --method own-units --segments 8 --top-k 3 --shared 1 --text notes/

        mixtura upcycle base out/pyramid --method pyramid --experts 4,4,8,8

        mixtura upcycle base code law out/bam --method branch-attend-mix --top-k 1

        mixtura upcycle EleutherAI/pythia-160m out/wide --method interpretable
    """
    from mixtura.cli import work

    if len(sources) < 2:
        raise ValueError("upcycle needs at least one source and, last, the directory to write: mixtura upcycle SRC DST")
    several = method is UpcycleMethod.pyramid
    own = method is UpcycleMethod.own_units
    options: dict[str, Any] = {"seed": seed}
    if top_k is not None or not own:
        options["top_k"] = (1 if several else 2) if top_k is None else top_k
    if not method.value.startswith("branch") and not own:
        counts = work.expert_counts(experts)
        if len(counts) > 1 and not several:
            raise ValueError(f"--experts as a list goes with --method pyramid, got {experts!r} for {method.value}")
        options["n_experts"] = counts if len(counts) > 1 else counts[0]
    if several:
        options["combine"] = (combine or CombineName.coefficient).value
    elif combine is not None:
        raise ValueError(f"--combine goes with --method pyramid, got it with {method.value}")
    cut = own or method is UpcycleMethod.fine_grained
    for name, value, default in (("segments", segments, 8 if own else 4), ("shared", shared, 1 if own else 0)):
        if cut:
            options[name] = default if value is None else value
        elif value is not None:
            raise ValueError(f"--{name} goes with --method fine-grained or own-units, got it with {method.value}")
    if own:
        from mixtura.cli.upcycle_units import upcycle_units

        upcycle_units(
            sources[:-1],
            Path(sources[-1]),
            text,
            options | {"samples": samples, "length": length},
            device=device,
            dry_run=dry_run,
            command=_command(),
            say=_say,
        )
        return
    if text:
        raise ValueError(f"--text goes with --method own-units, got it with {method.value}")
    if method is UpcycleMethod.branch_attend_mix:
        options["attention"] = "shared-kv" if shared_kv else "expert-kv"
    work.upcycle(
        sources[:-1],
        Path(sources[-1]),
        method.value,
        options,
        device=device,
        dry_run=dry_run,
        command=_command(),
        say=_say,
    )


def train(
    directory: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG_OR_DIR",
            help="Checkpoint (a directory, or an id on the Hugging Face hub), or a .json file with the config of a new model.",
        ),
    ],
    text: Text = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory to write; default: the source's name with -trained behind it.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    batch: Annotated[int, typer.Option(help="Rows a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    trainable: Annotated[TrainableName, typer.Option(help="What learns.")] = TrainableName.all,
    balance: Annotated[float, typer.Option(help="Weight of the load-balance loss.")] = 0.01,
    masks: Annotated[
        MasksName | None, typer.Option(help="How the masks of a sparse model move; default for one: rigl.")
    ] = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 20,
    resume: Annotated[bool, typer.Option(help="Go on from the checkpoint of an interrupted run.")] = True,
    parallel: Annotated[
        str | None,
        typer.Option(
            help="How the processes that torchrun started share the work: expert=N (experts apart), data=N (copies of them), "
            "slices=N, tensor=N; their product is the number of processes. Or hecate: every expert once, busy ones copied for a "
            "step; hecate,capacity=N,overlap=N,reshard=N,free=1 by hand."
        ),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Train a checkpoint, or a new model, on text: router and experts together, with load balancing.

    A .json file names the parts of a new model (fields of `MixturaConfig`: experts, shared ones, latent attention and so on);
    its tokenizer is learned from the text. A new model wants a rate near 2e-3 and thousands of steps.

    With `"model_type": "mixtura_multitask"` in it the model is an encoder-decoder that translates and repairs text (fields of
    `MultitaskMoEConfig`). It takes one `--text`: a folder with files such as `en-de.src` and `en-de.tgt`, one text a line, and
    perhaps `de.txt`, text to repair; or the word `debian`, for descriptions of packages in twelve languages.

    An interrupted run leaves its last checkpoint beside the output; the same command goes on from there, also with another
    number of processes: started by torchrun, several processes train one model, each with its part of the rows and experts.
    That holds for decoders and for the encoder-decoder.

    Examples:

        mixtura train out/moe --text book.txt --text notes/ --steps 200

        torchrun --nproc-per-node 4 -m mixtura train out/moe --text notes/ --parallel expert=2,data=2

        torchrun --nproc-per-node 4 -m mixtura train out/moe --text notes/ --parallel hecate

        mixtura train out/moe --trainable router --steps 50 --out out/routed

        mixtura train fine.json --text notes/ --steps 2000 --lr 2e-3 --out out/fine

        mixtura train translate.json --text debian --steps 2000 --batch 16 --length 64 --lr 5e-3 --out out/translate
    """
    from mixtura.cli import work
    from mixtura.cli.multitask_work import is_multitask, train_multitask

    if batch < 1 or not balance >= 0:
        raise ValueError(f"--batch must be at least 1 and --balance >= 0, got {batch} and {balance:g}")
    source = Path(directory)
    run = train_multitask if is_multitask(directory) else work.train
    run(
        directory,
        out or source.with_name(f"{source.name.removesuffix('.json')}-trained"),
        text,
        {
            "steps": steps,
            "batch_size": batch,
            "length": length,
            "lr": lr,
            "trainable": trainable.value,
            "balance": balance,
            **({"masks": masks.value} if masks else {}),
            "checkpoint_every": checkpoint_every,
            "resume": resume,
            "seed": seed,
        },
        device=device,
        dry_run=dry_run,
        command=_command(),
        say=_say,
        parallel=parallel,
    )


def compress(
    source: Annotated[str, SOURCE],
    destination: Annotated[Path, typer.Argument(help="Directory to write.")],
    method: Annotated[CompressMethod, typer.Option(help="How to compress.")] = CompressMethod.mc_moe,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Average bits of a quantized weight, scales not counted. Default: 2.5 (mc-moe, of experts), 4.4 (mixllm)."
        ),
    ] = None,
    prune: Annotated[
        float | None,
        typer.Option(help="Also skip second experts that hardly count, but protect this share of the tokens."),
    ] = None,
    scope: Annotated[
        ScopeName, typer.Option(help="One program for the whole model, or one for each block.")
    ] = ScopeName.model,
    span: Annotated[
        float, typer.Option(help="Share of the cache of keys and values that is kept (sparse-attention).")
    ] = 0.5,
    lengths: Annotated[
        str, typer.Option(help="Total lengths that spans are made for, as in 2k,4k,8k (sparse-attention).")
    ] = "2k",
    plan: Annotated[
        Path | None, typer.Option(help="Spans from a file, `spans.json` of another run (sparse-attention).")
    ] = None,
    text: Text = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration blocks. Default: 32, or 8 texts of each length (sparse-attention).")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens a calibration block.")] = 256,
    seed: Seed = 0,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Compress a language model.

    `mc-moe` takes a mixture of experts: 1 to 3 bits an expert by an integer program, 4 bits for the rest. `mixllm` takes any
    model, dense or not: 4 bits a weight, and 8 for the output channels that matter most to the loss of the whole model;
    activations become 8-bit integers as it runs. `sparse-attention` leaves the weights and cuts the cache of keys and values:
    each head keeps the first tokens and a window of its own, which grows with the length. The result loads with transformers
    after `import mixtura`.

    Examples:

        mixtura compress out/moe out/small --bits 2.5

        mixtura compress out/moe out/small --bits 2.0 --prune 0.02 --text corpus/

        mixtura compress HuggingFaceTB/SmolLM2-135M out/small --method mixllm --bits 4.4 --text corpus/

        mixtura compress HuggingFaceTB/SmolLM2-135M out/spans --method sparse-attention --span 0.5 --lengths 2k,4k,8k
    """
    if method is CompressMethod.mixllm:
        from mixtura.cli.compress_channels import compress_channels

        if prune is not None:
            raise ValueError("--prune goes with --method mc-moe; mixllm skips no experts")
        compress_channels(
            source,
            destination,
            text,
            bits=4.4 if bits is None else bits,
            options={
                "scope": scope.value,
                "samples": 32 if samples is None else samples,
                "length": length,
                "seed": seed,
            },
            device=device,
            dry_run=dry_run,
            command=_command(),
            say=_say,
        )
        return
    if method is CompressMethod.sparse_attention:
        from mixtura.cli.compress_spans import compress_spans

        if bits is not None or prune is not None:
            raise ValueError("--bits and --prune go with other methods; sparse-attention takes --span and --lengths")
        compress_spans(
            source,
            destination,
            text,
            span=span,
            lengths=lengths,
            plan=plan,
            options={"samples": 8 if samples is None else samples, "seed": seed},
            device=device,
            dry_run=dry_run,
            command=_command(),
            say=_say,
        )
        return
    from mixtura.cli import work

    bits = 2.5 if bits is None else bits
    samples = 32 if samples is None else samples
    options = {"bits": bits, "prune": prune, "scope": scope.value, "samples": samples, "length": length, "seed": seed}
    work.compress(
        source, destination, method.value, text, options, device=device, dry_run=dry_run, command=_command(), say=_say
    )


def generate(
    source: Annotated[str, SOURCE],
    prompt: Annotated[str, typer.Argument(help="Text to continue; `-` reads standard input.")],
    decode: Annotated[DecodeName, typer.Option(help="How the next token is chosen.")] = DecodeName.greedy,
    tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Of sampling: smallest set of tokens with this probability.")] = 0.95,
    contrast: Annotated[str, typer.Option(help="Weak routing of self-contrast: rank:2, top:1, random:1.")] = "rank:2",
    alpha: Annotated[float, typer.Option(help="Self-contrast: plausibility mask.")] = 0.1,
    beta: Annotated[float, typer.Option(help="Self-contrast: how far to push away.")] = 0.5,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the tokenizer's chat template.")] = False,
    seed: Seed = 0,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Continue a prompt.

    Examples:

        mixtura generate out/moe "def fibonacci(n):"

        mixtura generate out/moe "12 + 3 * 4 =" --decode self-contrast --contrast rank:2 --beta 0.5

        mixtura generate out/moe "Why is the sky blue?" --chat --decode sample --temperature 0.7
    """
    from mixtura.cli import work

    options: dict[str, Any] = {"decode": decode.value, "max_new_tokens": tokens, "seed": seed, "chat": chat}
    if decode is DecodeName.sample:
        options |= {"temperature": temperature, "top_p": top_p}
    if decode is DecodeName.self_contrast:
        options |= {"contrast": contrast, "alpha": alpha, "beta": beta}
    text = sys.stdin.read() if prompt == "-" else prompt
    work.generate(source, text, options, device=device, dry_run=dry_run, say=_say)


def inspect(
    directory: Annotated[str, SOURCE],
    text: Text = None,
    report: Annotated[
        Path, typer.Option(help="HTML file to write; a JSON file of the same name stands beside it.")
    ] = Path("routing.html"),
    samples: Annotated[int, typer.Option(help="Blocks a domain.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens a block.")] = 256,
    device: Device = "cpu",
    dry_run: DryRun = False,
) -> None:
    """Look inside: which experts fire on which domain and which tokens, load over layers, bits over experts.

    Each `--text` is a domain of its own.

    Examples:

        mixtura inspect out/moe

        mixtura inspect out/moe --text code/ --text letters/ --report routing.html
    """
    from mixtura.cli import work

    work.inspect(directory, text, report, samples=samples, length=length, device=device, dry_run=dry_run, say=_say)


def _command() -> str:
    return shlex.join(["mixtura", *sys.argv[1:]])


def _say(text: str) -> None:
    Console(highlight=False).print(text, soft_wrap=True, markup=False)
