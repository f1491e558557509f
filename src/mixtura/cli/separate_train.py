"""``separate train``: a separator taught on one's own sounds, or on videos that are published as lists."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixtura.cli.plain import plain_console

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    from collections.abc import Callable

    from mixtura.data.video_frames import Frames
    from mixtura.data.video_sounds import Sound

__all__ = ["train"]


def train(
    out: Annotated[Path, typer.Option(help="Directory to write the separator to.")],
    captions: Annotated[
        Path | None,
        typer.Option(
            help="CSV file with the columns file and text: what each clip holds. Without it, the built-in recipe."
        ),
    ] = None,
    listed: Annotated[
        Path | None,
        typer.Option(
            "--videos", help="Published list of videos: of MUSIC (JSON), VGGSound or CLIPSep (CSV); needs --audio."
        ),
    ] = None,
    audio: Annotated[Path | None, typer.Option(help="Directory of the clips. Default: that of the CSV file.")] = None,
    frames: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the clips' pictures, a folder ID/ of numbered JPEG or PNG files each: learn from these, not "
            "from names. Needs --videos and --encoder."
        ),
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="CLIP that reads pictures and, afterwards, words: its directory, or its name on the hub."),
    ] = None,
    frame_rate: Annotated[float, typer.Option(help="Pictures a second in --frames.")] = 1.0,
    noise_heads: Annotated[
        bool, typer.Option(help="With --frames: heads that take up, in training, what no picture explains.")
    ] = True,
    held_out: Annotated[
        float, typer.Option(help="Share of a list's videos to score the result on, if the list has no split.")
    ] = 0.1,
    steps: Annotated[int, typer.Option(help="Steps of 16 mixtures.")] = 1500,
    phrases: Annotated[int, typer.Option(help="Phrases rendered of each program, in the built-in recipe.")] = 60,
    half: Annotated[bool, typer.Option(help="Store float16, half the size.")] = True,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of everything that chance enters.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it will do, and stop.")] = False,
) -> None:
    """Train a separator that is asked by name, or in words.

    With --captions on your own clips of single sounds, of which those with different texts are mixed with each other. With
    --videos on a data set that is published as a list of videos, whose sound you have got by yourself: files are found by their
    names (ID.wav, ID_000030.wav), and the result is scored on videos held out. Either way sounds are decoded once into
    OUT.state.pieces (115 MB an hour), so they need not fit into memory; bad files are named and left out.

    With --frames too, no name is read: each clip's pictures ask for its sound, as in CLIPSep. They are looked up by the clip's
    name (folders ID/ or ID_000030/, or a single ID.jpg; ffmpeg -i ID.mp4 -r 1 ID/%06d.jpg makes them), and embedded once.
    Words reach what was learned through the same CLIP, so it must stay where it is.

    Without either, by the recipe of the separator that comes with mixtura: phrases of instruments rendered from a sound font,
    and synthetic speech (Debian: fluidsynth, timgm6mb-soundfont, flite, espeak-ng); its 1500 steps take about five minutes on
    one core.

    An interrupted training goes on where it stopped; its state stands in OUT.state until it is done.

    Examples:

        mixtura separate train --out my-separator

        mixtura separate train --captions birds.csv --audio clips --steps 5000 --out birds

        mixtura separate train --videos MUSIC_solo_videos.json --audio music/ --steps 20000 --out instruments

        mixtura separate train --videos vggsound.csv --audio vggsound/ --frames frames/ --encoder clip/ --out seen

        mixtura separate dawn.wav --model birds --query blackbird
    """
    import shutil

    from mixtura.audio.separate import ready
    from mixtura.audio.separate.query import META
    from mixtura.cli.checks import check_device, check_writable

    console = plain_console()

    def say(line: str) -> None:
        console.print(line, soft_wrap=True, markup=False)

    check_device(device)
    if steps < 1 or phrases < 1:
        raise ValueError(f"--steps and --phrases must be at least 1, got {steps} and {phrases}")
    check_writable(out, [str(path) for path in (captions, listed, audio, frames, encoder) if path], mark=META)
    if captions is not None and listed is not None:
        raise ValueError("--captions and --videos both say what to train on; give one of them")
    if (frames is None) != (encoder is None) or (frames is not None and listed is None):
        raise ValueError("--frames, --encoder and --videos go together: pictures, what reads them, and what lists them")
    if frames is None and (frame_rate != 1 or not noise_heads):
        raise ValueError("--frame-rate and --no-noise-heads have a meaning with --frames only")
    state = out.with_name(f"{out.name}.state")
    if captions is None and listed is None:
        if audio is not None:
            raise ValueError("--audio names the directory of the clips in --captions or --videos; give both or neither")
        say(f"train on {phrases} phrases of each program, {len(ready.SOUNDS)} sounds, {steps:,} steps")
        if dry_run:
            return
        model, history = ready.train_default(state, steps=steps, phrases=phrases, seed=seed, device=device)
        note: dict[str, Any] = {"recipe": f"mixtura separate train --steps {steps} --phrases {phrases} --seed {seed}"}
    else:
        from mixtura.audio.separate.own import read_captions, train_by_pictures, train_own

        tests: list[Sound] = []
        pictures: list[Frames] = []
        if listed is not None:
            sounds, pictures, tests = _listed(listed, audio, frames, held_out, seed, say)
            source = f"--videos {listed.name} --held-out {held_out:g}"
        elif captions is not None:
            sounds, source = read_captions(captions, audio or captions.parent), f"--captions {captions.name}"
        if encoder is None:
            say(f"train on {len(sounds):,} clips of {len({sound.text for sound in sounds})} sounds, {steps:,} steps")
        else:
            from mixtura.audio.embed import load_encoder

            tower = load_encoder(encoder)
            source += f" --encoder {encoder} --frame-rate {frame_rate:g}{'' if noise_heads else ' --no-noise-heads'}"
            say(f"train on {len(sounds):,} clips with pictures, {steps:,} steps")
        if dry_run:
            return
        options: dict[str, Any] = {"tests": tests, "steps": steps, "seed": seed, "device": device}
        if encoder is None:
            trained = train_own(sounds, state, **options)
        else:
            options |= {"rate": frame_rate, "noise_heads": noise_heads}
            trained = train_by_pictures(sounds, pictures, tower, state, **options)
        model, history = trained.model, trained.history
        note = {"recipe": f"mixtura separate train {source} --steps {steps} --seed {seed}"}
        if trained.left_out:
            say(f"{trained.left_out:,} of {len(sounds):,} clips could not be used")
        if (score := trained.held_out) is not None:
            say(
                f"on {score.mixtures} mixtures of two sounds held out, SI-SDR goes from {score.before:.1f} "
                f"to {score.after:.1f} dB"
            )
            note["held_out"] = {"mixtures": score.mixtures, "si_sdr_before": score.before, "si_sdr_after": score.after}
    if history.resumed_at:
        say(f"went on from step {history.resumed_at}")
    last = history.losses[-100:]
    model.save_pretrained(out, half=half, note=note)
    shutil.rmtree(state, ignore_errors=True)
    shutil.rmtree(state.with_name(f"{state.name}.pieces"), ignore_errors=True)
    say(f"{out} is written; loss over the last steps {sum(last) / len(last):.4f}")
    say(f"use it: mixtura separate FILE --model {out} --query {'NAME' if encoder is None else 'WORDS'}")


def _listed(
    path: Path, audio: Path | None, frames: Path | None, held_out: float, seed: int, say: Callable[[str], None]
) -> tuple[list[Sound], list[Frames], list[Sound]]:
    """Sounds of a list to train on, their pictures if these are asked for, and sounds held out; what is missing is said."""
    from mixtura.data.video_frames import find_frames
    from mixtura.data.video_sounds import find_sounds, read_list, split_videos

    if audio is None:
        raise ValueError(f"--videos {path} needs --audio, the directory that holds the sounds of its videos")
    clips = read_list(path)
    parts = dict(zip(clips, split_videos(clips, held_out=held_out, seed=seed), strict=True))
    found = find_sounds(clips, audio)
    say(f"{path}: {len(found.clips):,} of {len(clips):,} clips are in {audio}")
    if found.missing:
        some = ", ".join(found.missing[:3])
        say(
            f"  missing are {some}{' and so on' if len(found.missing) > 3 else ''}; the sound of videos is for you to get"
        )
    pairs = list(zip(found.clips, found.sounds, strict=True))
    train = [(clip, sound) for clip, sound in pairs if parts[clip] == "train"]
    pictures: list[Frames] = []
    if frames is not None:
        places = find_frames([clip for clip, _ in train], frames)
        lacking = [clip.video for (clip, _), place in zip(train, places, strict=True) if place is None]
        train = [pair for pair, place in zip(train, places, strict=True) if place is not None]
        pictures = [place for place in places if place is not None]
        say(f"  {len(pictures):,} of {len(places):,} to train on have pictures in {frames}")
        if lacking:
            say(
                f"  without pictures are {', '.join(lacking[:10])}{' and so on' if len(lacking) > 10 else ''}; left out"
            )
    sounds = [sound for _, sound in train]
    tests = [sound for clip, sound in pairs if parts[clip] == "test"]
    if frames is not None and len(sounds) < 2:
        raise ValueError(f"at least two clips of {path} to train on must have pictures in {frames}, got {len(sounds)}")
    if frames is None and len({sound.text for sound in sounds}) < 2:
        raise ValueError(
            f"the clips of {path} to train on that are in {audio} must hold at least two different sounds, got "
            f"{len({sound.text for sound in sounds})}"
        )
    if tests:
        say(f"  {len(tests):,} of them are held out")
    return sounds, pictures, tests
