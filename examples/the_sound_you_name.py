"""Two instruments rendered on top of each other; each is asked for by name and scored against what was mixed.

Needs Debian's fluidsynth and timgm6mb-soundfont, and: pip install 'mixtura[audio]'
"""

import numpy as np
import soundfile
import torch

from mixtura.audio import separate
from mixtura.audio.separate import bss_eval
from mixtura.data.instruments import INSTRUMENTS, midi_file, phrases, render

RATE, SECONDS = 16_000, 8.0
stems = []
for seed, name in enumerate(("flute", "bass")):
    programs, low, high = INSTRUMENTS[name]
    notes = phrases(1, SECONDS, low, high, drums=False, rng=np.random.default_rng(100 + seed))
    wave = torch.from_numpy(render(midi_file(notes, programs[0]), RATE)[: int(RATE * SECONDS)])
    stems.append(0.05 * wave / wave.square().mean().sqrt())
mix = torch.stack(stems).sum(0)
soundfile.write("mix.wav", mix.numpy(), RATE)

found = separate(mix, ["the flute", "a bass guitar"])
for i, name in enumerate(("flute", "bass")):
    sources = torch.stack([stems[i], stems[1 - i]])
    before, after = bss_eval(mix, sources), bss_eval(found[i, 0], sources)
    print(f"{name}: SDR {before.sdr:.1f} dB in the mixture, {after.sdr:.1f} dB separated (SIR {after.sir:.1f} dB)")
    soundfile.write(f"{name}.wav", found[i, 0].numpy(), RATE)
print("mix.wav, flute.wav and bass.wav are written")
