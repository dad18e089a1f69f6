"""Compiles every .cu for its architectures, none of which need be here; reads what ptxas and the SASS say."""

import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CACHE = ROOT / "build" / "cuda-resources"
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xptxas", "-v"]
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
# Of tensor cores, in SASS: sm_80 and before, sm_90, sm_100.
MATRIX = re.compile(r"\b([HI]MMA|[HIQ]GMMA|UTC[HIQ]MMA)\b")


@dataclass(frozen=True)
class Resources:
    kernel: str  # the name in the source
    instance: str  # as the linker knows it
    architecture: str  # "sm_90a"
    registers: int
    shared: int  # bytes, of static shared memory
    stack: int  # bytes of a thread's local memory
    spills: int  # bytes
    matrix: tuple[str, ...]  # instructions of the tensor cores


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def find_cuobjdump() -> str | None:
    """The toolkit's, or Triton's."""
    import triton

    carried = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or (str(carried) if carried.exists() else None)


def architectures() -> list[str]:
    """Those of CMakeLists.txt that get machine code: "80", "90a"."""
    listed = re.search(
        r"set\(REALM_KERNELS_CUDA_ARCHITECTURES ([^)]*?) CACHE", (ROOT / "CMakeLists.txt").read_text()
    )
    return re.findall(r"(\w+)-real", listed[1])


def architectures_of(source: Path) -> list[str]:
    """All, or those of the folder it lies in: csrc/cuda/sm90 is for 90a alone."""
    folder = next((part[2:] for part in source.parts if re.fullmatch(r"sm\d+", part)), "")
    return [name for name in architectures() if name.rstrip("a") == folder or not folder]


def sources() -> list[Path]:
    return sorted((ROOT / "csrc/cuda").rglob("*.cu"))


def all_resources() -> list[Resources]:
    """Of every kernel, instance and architecture; what was compiled before is not compiled again."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [found for each in pool.map(resources_of, sources()) for found in each]


def resources_of(source: Path) -> list[Resources]:
    text, sass = _compiled(source)
    return parse(text, matrix_instructions(sass))


def parse(text: str, matrix: dict[tuple[str, str], set[str]]) -> list[Resources]:
    """What `ptxas -v` prints: for each entry function a line of its frame and one of what it uses."""
    found, entry, frame = [], None, None
    for line in text.splitlines():
        if match := ENTRY.search(line):
            entry, frame = match.groups(), None
        elif entry and (match := FRAME.search(line)):
            frame = tuple(map(int, match.groups()))
        elif entry and frame and (match := USED.search(line)):
            instance, architecture = entry
            found.append(
                Resources(
                    kernel=kernel_name(instance),
                    instance=instance,
                    architecture=architecture,
                    registers=int(match[1]),
                    shared=int(match[2] or 0),
                    stack=frame[0],
                    spills=frame[1] + frame[2],
                    matrix=tuple(sorted(matrix.get(entry, ()))),
                )
            )
            entry = None
    return found


def kernel_name(instance: str) -> str:
    """Of the mangled name: the last identifier that its length announces and that ends in _kernel."""
    for match in re.finditer(r"(\d+)(?=[A-Za-z_])", instance):
        for digits in (match[1][start:] for start in range(len(match[1]))):
            name = instance[match.end() : match.end() + int(digits)]
            if name.endswith("_kernel") and len(name) == int(digits) and re.fullmatch(r"[a-z]\w*", name):
                return name
    return instance


def matrix_instructions(sass: str) -> dict[tuple[str, str], set[str]]:
    """By (instance, architecture) the instructions of tensor cores in what `cuobjdump -sass` prints."""
    found, architecture, instance = {}, "", ""
    for line in sass.splitlines():
        if match := re.search(r"code for (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            instance = match[1]
        elif match := MATRIX.search(line):
            found.setdefault((instance, architecture), set()).add(match[1])
    return found


def _compiled(source: Path) -> tuple[str, str]:
    """What ptxas says of a file, and its SASS, kept by the contents of all that it may include."""
    targets = architectures_of(source)
    digest = hashlib.sha256(repr((targets, FLAGS, _version())).encode())
    for path in [
        source,
        *sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".inl")),
    ]:
        digest.update(path.read_bytes())
    kept = CACHE / f"{source.stem}-{digest.hexdigest()[:24]}"
    said, sass, binary = (kept.with_suffix(end) for end in (".ptxas", ".sass", ".o"))
    if not sass.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        generate = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in targets]
        command = [
            find_nvcc(),
            *FLAGS,
            *generate,
            "--threads=2",
            "-I",
            ROOT / "csrc",
            "-c",
            source,
            "-o",
            binary,
        ]
        said.write_text(_output(command))
        sass.write_text(_output([find_cuobjdump(), "-sass", binary]))
        binary.unlink()
    return said.read_text(), sass.read_text()


def _version() -> str:
    return _output([find_nvcc(), "--version"])


def _output(command) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout)[-3000:]}")
    return done.stdout + done.stderr


def table(found: list[Resources]) -> str:
    """A line a kernel and architecture: the worst of its instances."""
    header = f"{'kernel':<34}{'sm':>6}{'instances':>11}{'registers':>11}{'stack':>7}{'spills':>8}"
    lines = [f"{header}{'shared':>9}  matrix"]
    for kernel, architecture in sorted({(one.kernel, one.architecture) for one in found}):
        every = [one for one in found if (one.kernel, one.architecture) == (kernel, architecture)]
        most = [
            max(getattr(one, name) for one in every) for name in ("registers", "stack", "spills", "shared")
        ]
        matrix = sorted({name for one in every for name in one.matrix})
        numbers = f"{len(every):>11}{most[0]:>11}{most[1]:>7}{most[2]:>8}{most[3]:>9}"
        lines.append(f"{kernel:<34}{architecture[3:]:>6}{numbers}  {', '.join(matrix)}".rstrip())
    return "\n".join(lines)
