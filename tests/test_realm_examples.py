"""Every command that a user may copy, from --help or from the README, runs as printed, in this order."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import typer
from test_realm_cli import SMALL
from test_realm_walk import small
from typer.testing import CliRunner

from realm_model.cli import app, common, text, world
from realm_model.openqa import finetune

ROOT = Path(__file__).parent.parent
ORDER = "world pretrain, world evaluate, world swap, world answer, corpus, split, ict, pretrain, index"
ORDER += ", finetune, evaluate, answer, convert"


def commands(group, prefix=""):
    """Of every command its name and the text of its --help."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} ")
        else:
            yield prefix + name, command.help


def of_help():
    helps = dict(commands(typer.main.get_command(app)))
    assert sorted(helps) == sorted(ORDER.split(", "))
    for name in ORDER.split(", "):
        (example,) = re.findall(r"Example:\n\n((?: {4}.*\n?)+)", helps[name])
        assert example.strip().startswith(f"realm-model {name} ")
        shown = CliRunner().invoke(app, [*name.split(), "--help"])
        assert shown.exit_code == 0 and example.splitlines()[0].strip() in shown.stdout
        yield example


def of_readme():
    fenced = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    blocks = [code for kind, code in fenced.findall((ROOT / "README.md").read_text()) if not kind]
    for line in "".join(blocks).replace("\\\n", " ").splitlines():
        if line.startswith("realm-model "):
            yield line


def for_blocks_of_128(name, corpus):
    config = small(name, corpus)
    return replace(config, model=replace(config.model, document_length=131))


@pytest.mark.parametrize("examples", [of_help, of_readme])
def test_every_example_runs(tmp_path, monkeypatch, examples):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.console, "width", 160)
    monkeypatch.setattr(text, "preset_named", for_blocks_of_128)
    monkeypatch.setattr(world, "preset", lambda name, data: SMALL)
    configure = finetune.FinetuneConfig
    monkeypatch.setattr(finetune, "FinetuneConfig", lambda **given: replace(configure(**given), steps=2))
    lands = [f"Land{chr(65 + i // 26)}{chr(97 + i % 26)}" for i in range(34)]
    with open("paragraphs.jsonl", "w") as paragraphs, open("questions.jsonl", "w") as questions:
        for land in lands:
            body = f"The capital of {land} is the city of {land[::-1].title()}. In 1900 it was small."
            paragraphs.write(json.dumps({"id": land, "title": land, "text": body}) + "\n")
            question = {"question": f"what is the capital of {land}", "answers": [land[::-1].title()]}
            questions.write(json.dumps(question | {"paragraph": land}) + "\n")
    shutil.copytree(ROOT / "tests" / "goldens" / "realm" / "openqa", "realm-orqa-nq-openqa")
    count = 0
    for example in examples():
        words = shlex.split(example.replace("\\\n", " "), comments=True)
        result = CliRunner().invoke(app, words[1:], input="what is the capital of LandAa\n")
        assert result.exit_code == 0, f"{example}\n{result.output}"
        count += 1
    assert count >= 10
