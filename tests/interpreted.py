"""Which Triton kernels the tests of a session launch in Triton's interpreter, by test function."""

import importlib.util
from collections import defaultdict

launches = defaultdict(set)  # "module:kernel" -> {"file.py::test_function"}
begun = set()  # test functions of which a case was begun
current = ""


def watch() -> None:
    """From now on note what is launched while a test runs."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def noted(self, *arguments, **named):
        launches[f"{self.fn.__module__}:{self.fn.__name__}"].add(current)
        return run(self, *arguments, **named)

    InterpretedFunction.run = noted


def begin(node) -> None:
    global current
    current = f"{node.path.name}::{getattr(node, 'originalname', node.name)}"
    begun.add(current)
