"""A group of commands one of which needs no name: ``mixtura separate mix.wav`` beside ``mixtura separate train``."""

from typing import Any

from typer.core import TyperGroup

__all__ = ["DefaultGroup"]

DEFAULT = "run"


class DefaultGroup(TyperGroup):
    """Commands of which the one called ``run`` also takes what names no other, and ``--help``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Arguments, with the default command's name before them where none is named."""
        if not args or args[0] not in self.commands:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """As in the base class, but the default command goes by its group's name in what a person reads."""
        name, command, rest = super().resolve_command(ctx, args)
        return ("" if name == DEFAULT else name), command, rest
