"""The command line: verbs, not papers."""

from mixtura.cli.app import main

__all__ = ["main"]
