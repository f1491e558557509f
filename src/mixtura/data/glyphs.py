"""Letters drawn from the fonts that matplotlib brings: images that no data set of digits or clothes holds."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["FONTS", "glyphs"]

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-BoldOblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBolIta.ttf",
)


def glyphs(n: int, side: int = 28, *, seed: int = 0) -> NDArray[np.float64]:
    """n white letters on black, each of a font, size and place drawn at random; shape (n, side, side), in [0, 1].

    Letters are up to 70 % of the side high and turned by up to 15 degrees.

    Example:
        >>> glyphs(3, 14).shape
        (3, 14, 14)
    """
    from pathlib import Path

    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    rng = np.random.default_rng(seed)
    fine = 2 * side  # drawn at twice the size and averaged, as scanned letters are
    fonts = [(name, size) for name in FONTS for size in (round(0.6 * fine), round(0.8 * fine))]
    ready = {key: ImageFont.truetype(str(folder / key[0]), key[1]) for key in fonts}
    out = np.empty((n, side, side))
    for i in range(n):
        font, letter = ready[fonts[rng.integers(len(fonts))]], LETTERS[rng.integers(len(LETTERS))]
        canvas = Image.new("L", (fine, fine))
        left, top, right, bottom = font.getbbox(letter)
        place = [
            (fine - far - near) / 2 + rng.integers(-fine // 20, fine // 20 + 1)
            for near, far in ((left, right), (top, bottom))
        ]
        ImageDraw.Draw(canvas).text((place[0], place[1]), letter, fill=255, font=font)
        canvas = canvas.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
        out[i] = np.asarray(canvas, dtype=np.float64).reshape(side, 2, side, 2).mean((1, 3)) / 255
    return out
