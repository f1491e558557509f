"""A column of known classes, as ``cluster`` and ``discover`` read it: names or whole numbers, empty or -1 where unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # heavy, and `--help` needs none of it
    import numpy as np
    import pandas as pd

__all__ = ["class_numbers"]


def class_numbers(values: pd.Series) -> tuple[np.ndarray, list[str]]:
    """Numbers of the classes, shape (N,), -1 where unknown, and their names, sorted.

    Raises:
        ValueError: fractions, or no class in any row.
    """
    import numpy as np
    import pandas as pd

    unknown = values.isna()
    if pd.api.types.is_numeric_dtype(values):
        unknown |= values == -1
        whole = values[~unknown]
        if len(whole) and (whole != np.round(whole)).any():
            bad = whole[whole != np.round(whole)].iloc[0]
            raise ValueError(f"--labels {values.name} must hold classes, names or whole numbers, got {bad}")
        text = values.where(~unknown, 0).astype(np.int64).astype(str)
        names = [str(v) for v in sorted({int(v) for v in whole})]
    else:
        text = values.astype(str).str.strip()
        unknown |= text.isin(["", "-1"])
        names = sorted(set(text[~unknown]))
    if not names:
        raise ValueError(f"--labels {values.name} is empty in every row; leave the option out")
    number = {name: i for i, name in enumerate(names)}
    return np.array([-1 if gone else number[name] for gone, name in zip(unknown, text, strict=True)]), names
