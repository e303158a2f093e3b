"""Which version of TVM and of a kernel a record was measured with."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
from pathlib import Path

from tvm_structured import schedules
from tvm_structured.schedules import KERNELS, Kernel

ROOT = Path(str(schedules.__file__)).parent
PACKAGE = "tvm_structured.schedules."
CUDA = "cuda/"


def tvm_version() -> str:
    import tvm

    return str(tvm.__version__)


@functools.cache
def kernel_version(name: str) -> str:
    """A digest of the kernel's source and of all sources under `schedules/` that it imports. `cuda/NAME` is that for
    GPUs; of a kernel from outside the package just its own file. KeyError where there is no such kernel."""
    family, digest = type(kernel_of(name)), hashlib.sha256()
    for source in sorted(imported_by(family.__module__)) or [Path(inspect.getfile(family))]:
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:12]


def kernel_of(name: str) -> Kernel:
    if name.startswith(CUDA):
        from tvm_structured.schedules.cuda import CUDA_KERNELS

        return CUDA_KERNELS[name.removeprefix(CUDA)]
    return KERNELS[name]


def imported_by(module: str) -> set[Path]:
    """The sources of a module and of what it imports from the package, directly or not."""
    found: set[Path] = set()
    waiting = [module]
    while waiting:
        source = path_of(waiting.pop())
        if source is None or source in found:
            continue
        found.add(source)
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def path_of(module: str) -> Path | None:
    """The file of a module of the package, None for others and for the package itself."""
    path = ROOT.joinpath(*module.removeprefix(PACKAGE).split(".")).with_suffix(".py")
    return path if module.startswith(PACKAGE) and path.is_file() else None


def cost_version() -> str:
    """Of the costs of whole layers, which depend on every kernel and pass."""
    from tvm_structured import costs

    return f"{tvm_version()}/{costs.kernel_version()}"
