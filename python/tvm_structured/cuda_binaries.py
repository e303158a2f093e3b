"""Machine code for NVIDIA GPUs beside the CUDA source, so that the machine that runs it needs no compiler.

TVM compiles CUDA only where a driver is installed; elsewhere an exported module holds the source, and TVM asks for its
binary (`tvm_callback_cuda_compile`) on the machine that runs it. Here nvcc or NVRTC, which need no GPU, compile the
source while it is generated, and the binary travels as a comment at its end; `install` makes TVM look there first.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tvm_structured.errors import TargetError

MARK = "// tvm_structured binary "  # + arch + " " + base64
COMPILE, POSTPROC = "tvm_callback_cuda_compile", "tvm_callback_cuda_postproc"
FLAGS = (
    "-O3", "-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_OPERATORS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__", "-U__CUDA_NO_BFLOAT162_OPERATORS__", "-U__CUDA_NO_BFLOAT162_CONVERSIONS__",
    "--expt-relaxed-constexpr",
)  # fmt: skip


def find_nvcc() -> str | None:
    """The compiler on the PATH or in CUDA_HOME, None without one."""
    found = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return found or (shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None)


def has_nvrtc() -> bool:
    """Whether NVRTC is here (packages cuda-bindings and nvidia-cuda-nvrtc), and the headers of CUDA in CUDA_PATH."""
    home = os.environ.get("CUDA_PATH")
    if home is None or not (Path(home) / "include" / "cuda_runtime.h").is_file():
        return False
    try:
        importlib.import_module("cuda.bindings.nvrtc")
    except ImportError:
        return False
    return True


def compile_cuda(source: str, arch: str, kind: str = "fatbin") -> bytes:
    """Machine code ("cubin"), PTX ("ptx"), or both ("fatbin"; NVRTC gives the first only) of CUDA source for an arch
    such as "sm_90".

    Raises TargetError without nvcc and NVRTC, or where they refuse the source.
    """
    nvcc = find_nvcc()
    if nvcc is not None:
        return compile_by_nvcc(nvcc, source, arch, kind)
    if has_nvrtc():
        return compile_by_nvrtc(source, arch, kind)
    raise TargetError("no CUDA compiler: put nvcc on the PATH, or set CUDA_HOME")


def compile_by_nvrtc(source: str, arch: str, kind: str) -> bytes:
    from tvm.support import nvcc

    try:
        return bytes(nvcc.compile_cuda(source, "ptx" if kind == "ptx" else "cubin", arch, compiler="nvrtc"))
    except RuntimeError as error:
        lines = [line for line in str(error).splitlines() if "error" in line] or [str(error)[:200]]
        raise TargetError(f"NVRTC refuses the generated source for {arch}: {lines[-1]}") from None


def compile_by_nvcc(nvcc: str, source: str, arch: str, kind: str) -> bytes:
    number = arch.removeprefix("sm_")
    codes = {"cubin": f"sm_{number}", "ptx": f"compute_{number}", "fatbin": f"[sm_{number},compute_{number}]"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernels.cu").write_text(source, encoding="utf-8")
        command = [nvcc, f"--{kind}", f"-gencode=arch=compute_{number},code={codes[kind]}", *FLAGS]
        done = subprocess.run(
            [*command, "-o", f"kernels.{kind}", "kernels.cu"], cwd=folder, capture_output=True, text=True, check=False
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()[-200:]]
            raise TargetError(f"nvcc refuses the generated source for {arch}: {errors[0]}")
        return (Path(folder) / f"kernels.{kind}").read_bytes()


@contextlib.contextmanager
def embedding(arch: str) -> Iterator[None]:
    """Binaries go into all CUDA source that TVM generates inside, if there is a compiler for them."""
    import tvm_ffi

    if find_nvcc() is None and not has_nvrtc():
        yield
        return
    previous = tvm_ffi.get_global_func(POSTPROC, allow_missing=True)

    def embed(source: str, target: Any) -> str:
        source = previous(source, target) if previous is not None else source
        return with_binary(source, arch, compile_cuda(source, arch))

    tvm_ffi.register_global_func(POSTPROC, embed, override=True)
    try:
        yield
    finally:
        if previous is None:
            tvm_ffi.registry.remove_global_func(POSTPROC)
        else:
            tvm_ffi.register_global_func(POSTPROC, previous, override=True)


def with_binary(source: str, arch: str, binary: bytes) -> str:
    return f"{source}\n{MARK}{arch} {base64.b64encode(binary).decode('ascii')}\n"


def binary_of(source: str) -> bytes | None:
    """The binary at the end of a source, None without one."""
    found = re.search(f"^{MARK}\\S+ (\\S+)$", source[source.rfind(MARK) :] if MARK in source else "", re.MULTILINE)
    return base64.b64decode(found[1]) if found else None


@functools.cache
def install() -> None:
    """From now on TVM takes the binary that travels with a source; other sources are compiled as before."""
    import tvm_ffi

    previous: Callable[[str], bytes] | None = tvm_ffi.get_global_func(COMPILE, allow_missing=True)

    def compiled(source: str) -> bytes:
        binary = binary_of(source)
        if binary is not None:
            return binary
        if previous is None:
            raise TargetError("the module holds CUDA source only, and there is no compiler here; export it with nvcc")
        return previous(source)

    tvm_ffi.register_global_func(COMPILE, compiled, override=True)
