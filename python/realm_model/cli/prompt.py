"""A prompt for questions: one after the other, until the end of the input."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress

from .common import console, errors


def readable(text: str) -> str:
    """A text from the terminal; bytes of it that are no UTF-8 become the replacement character."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def ask(show: Callable[[str], None]) -> None:
    """Show the answer to every line that is typed or piped in; an error is a line, and the prompt goes on.

    On a terminal Ctrl-D ends it, and Ctrl-C the answer that is being made, or else the prompt.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        console.print("Ask a question; Ctrl-D ends.", highlight=False)
        # It gives input() its arrow keys and a history. Not every system has it.
        with suppress(ImportError):
            importlib.import_module("readline")
    while True:
        try:
            line = readable(input("> " if is_terminal else "")).strip()
        except (EOFError, KeyboardInterrupt):
            if is_terminal:
                console.print()
            return
        if not line:
            continue
        try:
            show(line)
        except ValueError as error:
            errors.print(str(error), style="red", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print("stopped")
