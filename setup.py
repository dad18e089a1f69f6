"""Builds csrc/ with CMake and ninja; the metadata is in pyproject.toml.

REALM_KERNELS_CUDA=auto|0|1 chooses whether the CUDA module is built: auto (the default) builds it where nvcc
is found, whether or not a GPU is visible; 1 makes a missing nvcc an error. REALM_KERNELS_CUDA_ARCHITECTURES,
in CMake's names ("90a-real"), builds for these alone, and so in seconds: for a machine that is at hand.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def want_cuda() -> bool:
    choice = os.environ.get("REALM_KERNELS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"REALM_KERNELS_CUDA must be auto, 0 or 1, got {choice!r}")
    if choice == "1" and find_nvcc() is None:
        raise SystemExit(
            "REALM_KERNELS_CUDA=1, but no nvcc was found: put it on PATH or set CUDA_HOME or CUDACXX"
        )
    return choice != "0" and find_nvcc() is not None


def require_compiler() -> None:
    """CMake says it in thirty lines; a user wants the one that helps."""
    named = os.environ.get("CXX")
    candidates = [named.split()[0]] if named else ["c++", "g++", "clang++"]
    if os.name == "posix" and not any(shutil.which(name) for name in candidates):
        raise SystemExit(
            f"realm_kernels: no C++ compiler was found (tried {', '.join(candidates)}): "
            "install g++ or clang++, or set CXX to one"
        )


class CMakeBuild(build_ext):
    """One configure and one build serve both modules; each Extension only names where its file goes."""

    def run(self) -> None:
        import pybind11

        require_compiler()

        module_dir = Path(self.get_ext_fullpath("realm_kernels._cpu")).resolve().parent
        # One build folder per interpreter, so that a rebuild is incremental.
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        build_dir.mkdir(parents=True, exist_ok=True)
        arguments = [
            "-G", "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",  # an isolated build's ninja moves
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={module_dir}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DREALM_KERNELS_CUDA={'ON' if want_cuda() else 'OFF'}",
        ]  # fmt: skip
        if want_cuda():
            arguments.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
            wanted = os.environ.get("REALM_KERNELS_CUDA_ARCHITECTURES")
            if wanted:
                arguments.append(f"-DREALM_KERNELS_CUDA_ARCHITECTURES={wanted}")
        module_dir.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cmake", *arguments, str(ROOT)], cwd=build_dir, check=True)
        subprocess.run(["cmake", "--build", "."], cwd=build_dir, check=True)


modules = [Extension("realm_kernels._cpu", sources=[])]
if want_cuda():
    modules.append(Extension("realm_kernels._cuda", sources=[]))

setup(
    packages=find_packages(include=["realm_kernels", "realm_kernels.*"])
    + find_packages("python", include=["realm_model", "realm_model.*"]),
    package_dir={"realm_kernels": "realm_kernels", "realm_model": "python/realm_model"},
    package_data={"realm_kernels": ["py.typed", "**/README.md"], "realm_model": ["**/*.json"]},
    ext_modules=modules,
    cmdclass={"build_ext": CMakeBuild},
)
