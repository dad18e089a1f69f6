"""realm-model: a whole REALM, command by command. Every run lives in a folder of its own."""

from __future__ import annotations

import typer

from . import openqa, published, text, world

# torch and transformers take seconds to import: the commands import what needs them, so that --help is at
# once.

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")
app.add_typer(world.app, name="world")
for command in (text.corpus, text.ict, text.pretrain):
    app.command()(command)
for command in (openqa.split, openqa.index, openqa.finetune, openqa.evaluate, openqa.answer):
    app.command()(command)
app.command()(published.convert)


def main() -> None:
    app()
