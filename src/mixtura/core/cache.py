"""Where mixtura keeps what it built or rebuilt once."""

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """``$MIXTURA_CACHE``, else ``$XDG_CACHE_HOME/mixtura``, else ``~/.cache/mixtura``; not created here."""
    if named := os.environ.get("MIXTURA_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixtura"
