"""The device that a module runs on: this CPU, or the first NVIDIA GPU. Needs only TVM's runtime."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvm_structured.errors import ModelError

CUDA = "cuda"


def device_of(metadata: Mapping[str, Any]) -> Any:
    """The TVM device of a module. Raises ModelError for a GPU module where there is none."""
    import tvm

    if metadata.get("device") != CUDA:
        return tvm.cpu()
    if not has_gpu():
        raise ModelError(
            f"the module is compiled for {metadata['target']}, and there is no CUDA device here; export it and load it "
            "on a machine with one, or run compiled.emulate(...) to check its results"
        )
    return tvm.cuda(0)


def has_gpu() -> bool:
    """Whether TVM can run CUDA here."""
    import tvm

    return prepare_cuda() and bool(tvm.cuda(0).exist)


def compute_capability() -> int:
    """90 for a card of capability 9.0. Only where `has_gpu`."""
    import tvm

    major, minor = str(tvm.cuda(0).compute_version).split(".")
    return 10 * int(major) + int(minor)


@functools.cache
def prepare_cuda() -> bool:
    """Load TVM's CUDA runtime, which `import tvm` leaves out where it comes without a compiler, and make it look for
    the machine code that travels with our modules. False where there is no driver."""
    import tvm
    import tvm_ffi
    from tvm_ffi.libinfo import load_lib_ctypes

    from tvm_structured.cuda_binaries import install

    install()
    if tvm_ffi.get_global_func("device_api.cuda", allow_missing=True) is not None:
        return True
    folder = Path(tvm.base._LOADED_LIBS["tvm_runtime"]._name).resolve().parent
    try:
        library = load_lib_ctypes("tvm", "tvm_runtime_cuda", "RTLD_LOCAL", extra_lib_paths=[folder])
    except (OSError, RuntimeError):
        return False
    tvm.base._LOADED_LIBS["tvm_runtime_cuda"] = library
    return True
