"""Every GPU kernel of the project, found in its sources: nothing is imported and nothing need be compiled.

A Triton function that is launched is named *_kernel (tests/test_triton_compile.py holds it); the others are
parts of these.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_COMMENT = re.compile(r"//[^\n]*")
_ATTRIBUTE = r"__\w+__\s*\((?:[^()]|\([^()]*\))*\)\s*"  # __launch_bounds__, __cluster_dims__, calls in them
_GLOBAL = re.compile(rf"__global__\s+(?:void\s+)?(?:{_ATTRIBUTE})*(?:void\s+)?(\w+)\s*\(")


def triton_functions() -> list[str]:
    """ "module:function" of everything under @triton.jit in realm_kernels."""
    found = []
    for path in sorted((ROOT / "realm_kernels").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list)):
                found.append(f"{module}:{node.name}")
    return found


def triton_kernels() -> list[str]:
    """Those of triton_functions() that are launched."""
    return [name for name in triton_functions() if name.endswith("_kernel")]


def launched_functions() -> set[str]:
    """Names of Triton functions that something launches: function[grid](...)."""
    names = {name.rpartition(":")[2] for name in triton_functions()}
    found = set()
    for path in (ROOT / "realm_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                found.add(ast.unparse(node.func.value).rpartition(".")[2])
    return found & names


def cuda_kernels() -> list[str]:
    """The names of the __global__ functions of csrc."""
    files = sorted(
        path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h", ".inl")
    )
    texts = (_COMMENT.sub("", path.read_text()) for path in files)
    return sorted({name for text in texts for name in _GLOBAL.findall(text)})


def _is_jit(decorator: ast.expr) -> bool:
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    return ast.unparse(function) in ("triton.jit", "jit")
