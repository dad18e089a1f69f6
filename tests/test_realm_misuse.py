"""Wrong uses of every command: one clear line each, and no file is touched."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from realm_openqa_cases import CAPITALS, QUESTIONS
from test_realm_walk import small
from typer.testing import CliRunner

from realm_model.cli import app, text

BODIES = (
    "{0} is a land. The capital of {0} is the city of {1}. People of {1} say that in 1900 it was small.",
    "Many rivers run through {0}. The longest of them was bridged in 1850 near {1}.",
)
# The options of a run that is right: each test changes or adds one.
COMMANDS = {
    "ict": {"corpus": "corpus", "out": "new"},
    "pretrain": {"corpus": "corpus", "out": "new"},
    "index": {"corpus": "corpus", "model": "realm", "out": "new"},
    "finetune": {
        "corpus": "corpus", "model": "realm", "index": "index", "questions": "questions.jsonl", "out": "new",
        "steps": 3, "batch": 2, "length": 64,
    },
    "evaluate": {"questions": "questions.jsonl", "model": "tuned", "out": "scores.json"},
    "answer": {"model": "tuned"},
    "world evaluate": {"run": "realm"},
    "world swap": {"run": "realm"},
}  # fmt: skip


def call(command, **options):
    given = COMMANDS[command] | options
    given |= {} if command.startswith("world") else {"threads": given.get("threads", 1)}
    arguments = []
    for name, value in given.items():
        option = f"--{name.replace('_', '-')}"
        arguments += [option] if value is True else [option, str(value)]
    return CliRunner().invoke(app, [*command.split(), *arguments])


def contents():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.name != ".lock"}


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def last(run):
    return max((run / "checkpoints").iterdir())


DAMAGES = {
    "half": ("realm", lambda run: shutil.rmtree(run / "checkpoints")),
    "cut": ("realm", lambda run: cut(last(run) / "state.safetensors")),
    "stateless": ("realm", lambda run: (last(run) / "state.json").unlink()),
    "wordless": ("realm", lambda run: cut(last(run) / "tokenizer.json")),
    "confused": ("realm", lambda run: cut(run / "config.json")),
    "cutindex": ("index", lambda index: cut(next(index.glob("shard-*")))),
    "nobodys": ("index", lambda index: next(index.glob("identity-*")).unlink()),
    "cuttuned": ("tuned", lambda run: cut(last(run) / "state.safetensors")),
    "cutreader": ("tuned", lambda run: cut(run / "reader" / "model.safetensors")),
    "unfinished": (
        "tuned",
        lambda run: [(run / "index.json").unlink(), *map(shutil.rmtree, (run / "reader", run / "embedder"))],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of every stage one that is right, and the damaged ones."""
    root = tmp_path_factory.mktemp("misuse")
    before, preset = os.getcwd(), text.preset_named
    os.chdir(root)
    text.preset_named = small
    documents = [
        {"id": f"{land}#{number}", "title": land, "text": body.format(land, town)}
        for land, town in CAPITALS.items()
        for number, body in enumerate(BODIES)
    ]
    for name, records in (("documents", documents), ("some", documents[:6]), ("questions", QUESTIONS)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for arguments in (
        ["documents.jsonl", "--out", "corpus", "--vocabulary-size", "200"],
        ["some.jsonl", "--out", "foreign", "--vocabulary-size", "160"],
        ["some.jsonl", "--out", "smaller", "--vocabulary", "corpus"],
    ):
        assert CliRunner().invoke(app, ["corpus", *arguments, "--block", "40"]).exit_code == 0
    for command, options in (
        ("ict", {"out": "ict"}),
        ("pretrain", {"from": "ict", "out": "realm"}),
        ("index", {"out": "index"}),
        ("index", {"model": "ict", "out": "ictindex"}),
        ("finetune", {"out": "tuned"}),
    ):
        result = call(command, **options)
        assert result.exit_code == 0, result.output
    for name, (source, damage) in DAMAGES.items():
        damage(Path(shutil.copytree(source, name)))
    wrong = json.loads(Path("realm/config.json").read_text())
    wrong["model"]["hidden"] = 32
    shutil.copytree("realm", "edited")
    Path("edited/config.json").write_text(json.dumps(wrong))
    Path("file").write_text("dear to somebody")
    yield root
    os.chdir(before)
    text.preset_named = preset


CASES = [
    ("ict", {"corpus": "nowhere"}, "nowhere is no corpus"),
    ("ict", {"corpus": "index"}, "index is no corpus"),
    ("ict", {"out": "file"}, "cannot write the run folder file"),
    ("ict", {"out": "file/new"}, "cannot write the run folder file/new"),
    ("ict", {"steps": -1}, "ict: steps must be at least 0, got -1"),
    ("pretrain", {"out": "corpus"}, "corpus is not a run folder: it has no config.json"),
    ("pretrain", {"out": "corpus", "fresh": True}, "corpus is not a run folder"),
    ("pretrain", {"out": "tuned"}, "it is that of a run of fine-tuning"),
    ("pretrain", {"out": "realm", "fresh": True, "corpus": "nowhere"}, "nowhere is no corpus"),
    ("pretrain", {"out": "realm", "fresh": True, "from": "half"}, "half has no checkpoint yet"),
    ("pretrain", {"out": "realm", "from": "ict", "seed": 1}, "realm holds a run with another configuration"),
    ("pretrain", {"out": "cut", "from": "ict"}, "checkpoint cut/.* is damaged"),
    ("pretrain", {"out": "stateless", "from": "ict"}, "checkpoint stateless/.* is damaged"),
    ("pretrain", {"out": "wordless", "from": "ict"}, "cannot read the tokenizer"),
    ("pretrain", {"from": "nowhere"}, "nowhere is no checkpoint"),
    ("pretrain", {"from": "index"}, "index is no checkpoint"),
    ("pretrain", {"from": "cut"}, "checkpoint cut/.* is damaged"),
    ("pretrain", {"from": "edited"}, r"not of the model of its config.json: .* must be \[32\], got \[16\]"),
    ("pretrain", {"from": "confused"}, "is not the configuration of a run of pre-training"),
    ("pretrain", {"from": "ict", "corpus": "foreign"}, "ict and the corpus have different vocabularies"),
    ("pretrain", {"batch": 0}, "realm: batch must be at least 1, got 0"),
    ("pretrain", {"accumulate": 0}, "realm: accumulate must be at least 1, got 0"),
    ("pretrain", {"threads": 0}, "threads must be at least 1, got 0"),
    ("pretrain", {"refresh_ranks": 1}, "refresh ranks must leave one rank of the job to train"),
    ("pretrain", {"timeout": 0}, "timeout must be more than 0 seconds, got 0"),
    ("index", {"corpus": "foreign"}, "realm must know the words of the corpus, lacks .* of "),
    ("index", {"model": "nowhere"}, "nowhere is no checkpoint"),
    ("index", {"model": "half"}, "half has no checkpoint yet"),
    ("index", {"model": "wordless"}, "cannot read the tokenizer"),
    ("index", {"model": "edited"}, "is not of the model of its config.json"),
    ("index", {"out": "corpus"}, "corpus is not an index"),
    ("index", {"out": "realm"}, "realm is not an index"),
    ("index", {"out": "file"}, "file"),
    ("finetune", {"index": "ictindex"}, "the index ictindex and the model realm do not belong together"),
    ("finetune", {"corpus": "smaller"}, "the index index and the corpus smaller do not belong together"),
    ("finetune", {"corpus": "foreign"}, "realm must know the words of the corpus, lacks .* of "),
    ("finetune", {"model": "cut"}, "checkpoint cut/.* is damaged"),
    ("finetune", {"index": "cutindex"}, "the shard is truncated"),
    ("finetune", {"index": "nobodys"}, "cannot read nobodys/identity"),
    ("finetune", {"index": "realm"}, "this is not a table"),
    ("finetune", {"questions": "file"}, "file, line 1: must be JSON"),
    ("finetune", {"out": "corpus"}, "corpus is not a run folder"),
    ("finetune", {"out": "realm"}, "realm holds a run with another configuration"),
    ("finetune", {"out": "index", "fresh": True}, "index is not a run folder"),
    ("finetune", {"out": "tuned", "fresh": True, "index": "ictindex"}, "do not belong together"),
    ("finetune", {"out": "cuttuned"}, "checkpoint cuttuned/.* is damaged"),
    ("evaluate", {"model": "realm"}, "realm is a run without a corpus and an index: name --corpus and"),
    ("evaluate", {"model": "unfinished"}, "unfinished is a run without a corpus and an index"),
    ("evaluate", {"model": "cutreader"}, "cutreader/reader/model.safetensors is damaged"),
    ("evaluate", {"model": "realm", "corpus": "corpus", "index": "ictindex"}, "do not belong together"),
    ("evaluate", {"out": "corpus"}, "cannot write corpus: Is a directory"),
    ("evaluate", {"reader_beam": 0}, "reader beam must be at least 1, got 0"),
    ("answer", {"model": "nowhere"}, "nowhere is not there: name with --model a run that `finetune` wrote"),
    ("evaluate", {"threads": 0}, "threads must be at least 1, got 0"),
    ("world evaluate", {"run": "corpus"}, "corpus is no run folder"),
    ("world evaluate", {"run": "edited"}, "is not of the model of its config.json"),
    ("world swap", {"run": "half"}, "half has no checkpoint yet"),
]


@pytest.mark.parametrize(
    ("command", "options", "message"),
    CASES,
    ids=[f"{command}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for command, options, _ in CASES],
)
def test_one_line_and_nothing_is_touched(folders, command, options, message):
    before = contents()
    result = call(command, **options)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("realm-model: ")
    assert re.search(message, line), line
    assert contents() == before


@pytest.mark.parametrize("command", ["ict", "pretrain", "index", "finetune", "evaluate", "world evaluate"])
def test_cuda_without_a_gpu_is_one_line(folders, monkeypatch, command):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = contents()
    result = call(command, device="cuda")
    (line,) = result.stderr.strip().splitlines()
    assert result.exit_code == 1 and line.startswith("realm-model: device cuda needs a GPU")
    assert contents() == before


def test_a_fresh_fine_tuning_leaves_nothing_of_the_old_one(folders):
    run = Path(shutil.copytree("tuned", "again"))
    (run / "stray").write_text("of the old run")
    result = call("finetune", out="again", fresh=True, seed=1)
    assert result.exit_code == 0, result.output
    assert not (run / "stray").exists() and json.loads((run / "config.json").read_text())["seed"] == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    shutil.rmtree(run)
