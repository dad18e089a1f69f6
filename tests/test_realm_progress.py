"""How a command says how far it is, and how a prompt behaves on a terminal."""

import io
import json
import os
import pty
import re
import select
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from rich.console import Console

from realm_model.cli import progress, prompt
from realm_model.report import excerpt, share

PUBLISHED = Path(__file__).parent / "goldens" / "realm" / "openqa"
SECONDS = 100  # that a key may wait for the prompt


def test_a_pipe_gets_a_line_every_half_minute_and_one_at_the_end(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=80)
    with progress.bars(console) as add:
        see = add("REALM", 100, "steps")
        for done in range(40, 101):  # a run that goes on at step 40
            see(done, f"loss {done}.0")
            clock[0] += 1.0
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "REALM: 70/100  1.0 steps/s  loss 70.0  0:00:30 left"
    assert lines[1:] == ["REALM: 100/100  1.0 steps/s  loss 100.0  after 0:01:01"]


def test_a_terminal_gets_a_bar_with_the_rate_and_the_time_left_in_80_columns():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with progress.bars(console) as add:
        see = add("ICT warm start", 4000, "steps")
        for done in range(5):
            see(done, "loss 10.072  age 500")
            time.sleep(0.3)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", console.file.getvalue())
    last = plain.replace("\r", "\n").strip().splitlines()[-1]
    assert re.fullmatch(
        r"ICT warm start \S+    4/4000 \d\.\d steps/s loss 10.072  age 500 \d\d:\d\d(:\d\d)?", last
    )


def test_a_probability_keeps_its_digits_and_nothing_is_nothing():
    assert [share(value) for value in (1.0, 0.0123, 3.2e-5, 0.0)] == ["1.000", "0.012", "3e-05", "0"]


def test_an_excerpt_is_cut_between_words_around_the_first_place_and_marks_all():
    text = "one [two] three four five six seven four"
    assert excerpt("T", text, [(16, 20), (36, 40)], around=9).plain == "T: ...three four five six..."
    assert excerpt("", text, [(0, 3)], around=9).plain == "one [two]..."  # brackets are no markup
    view = excerpt("T", text, [(16, 20), (36, 40)])
    marked = [view.plain[span.start : span.end] for span in view.spans if "reverse" in str(span.style)]
    assert view.plain == f"T: {text}" and marked == ["four", "four"]


def test_bytes_that_are_no_text_are_replaced():
    assert prompt.readable(b"caf\xc3\xa9 \xff".decode("utf-8", "surrogateescape")) == "café \ufffd"


def on_a_terminal(command, keys):
    """What a command prints to which the keys are typed, one after the other at its prompt; its code."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ |= {"TERM": "xterm", "COLUMNS": "100"}
        os.execv(command[0], command)
    keys, out, seen = list(keys), b"", 0
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                read = os.read(terminal, 65536)
            except OSError:  # its end on Linux
                break
            out += read
            if not read:
                break
        elif keys and out[seen:].endswith(b"> "):
            seen = len(out)
            os.write(terminal, keys.pop(0))
    else:
        os.kill(process, 9)
    _, status = os.waitpid(process, 0)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.decode(errors="replace")), os.waitstatus_to_exitcode(
        status
    )


@pytest.mark.skipif(sys.platform == "win32", reason="has no such terminals")
def test_a_prompt_edits_lines_survives_bad_ones_and_ends():
    (case, *_) = json.loads((PUBLISHED.parent / "openqa.json").read_text())["cases"]
    main = "from realm_model.cli import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", main, "answer", "--model", str(PUBLISHED)]
    question, up, left = case["question"].encode(), b"\x1b[A", b"\x1b[D"
    keys = [
        b"\r",  # an empty line is no question
        question[:-2] + question[-1:] + left + question[-2:-1] + b"\r",  # a letter that was forgotten
        b"why " * 1250 + b"\r",  # more than a terminal takes in a line without readline
        b"\xff\r",
        up + up + up + b"\r",  # the first question again
        b"what\x03",
    ]
    out, code = on_a_terminal(command, keys)
    assert code == 0, out
    assert out.count("reader logit") == 3 and out.lower().count(f"answer: {case['answer']}") == 2
    assert "a question may have 22 wordpieces, got 1250" in out.replace("\r\n", "")
    assert "Traceback" not in out
