"""Commands that say which option was meant where one is not known: by its name, else by what its help says."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand


class SuggestingCommand(TyperCommand):
    """A command that answers an unknown option with those that are about that word: `--answer` with `--for`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments that are left; an error of an unknown option names what may have been meant."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # Typer brings its own click, whose NoSuchOption it does not export: it is known by its fields.
            name = getattr(error, "option_name", None)
            if isinstance(name, str) and hasattr(error, "possibilities") and not error.possibilities:
                error.possibilities = self._about(name)
            raise

    def _about(self, name: str) -> list[str]:
        """Options whose help has the word before its first full stop or semicolon."""
        word = re.compile(rf"\b{re.escape(name.lstrip('-').replace('-', ' '))}s?\b", re.IGNORECASE)
        about = []
        for one in self.params:
            text = re.split("[.;]", getattr(one, "help", None) or "")[0]
            if one.opts[-1].startswith("-") and word.search(text):
                about.append(one.opts[-1])
        return about
