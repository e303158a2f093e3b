"""Entry point of the `tvm.backends` group: TVM calls `autoload` at the end of `import tvm`, in tuning workers too."""

from __future__ import annotations

import os
from importlib import metadata

from tvm_structured.errors import EnvironmentMismatchError

TVM_VERSION = "0.27.0.post1"
FFI_VERSIONS = ("0.1.14.post0", "0.1.14.post1")
INSTALL = f"pip install apache-tvm=={TVM_VERSION} apache-tvm-ffi=={FFI_VERSIONS[-1]}"
_loaded = False

# TVM would pin the calling thread to one core, and with it every thread pool (torch's, say) that starts afterwards
os.environ.setdefault("TVM_BIND_THREADS", "0")
# TVM's workers would spin for 150 ms after each call and take cores from whatever runs next; this makes it 10 ms
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "20000")


def autoload() -> None:
    """Register our operators. Idempotent; does nothing where TVM runs without its compiler."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    import tvm

    if tvm.base._RUNTIME_ONLY:  # no operator registry there
        return
    from tvm_structured import dialect, quantized

    dialect.register()
    quantized.register()


def check_versions() -> None:
    """Raise EnvironmentMismatchError unless TVM and its ffi are versions known to work together."""
    try:
        tvm_version, ffi_version = metadata.version("apache-tvm"), metadata.version("apache-tvm-ffi")
    except metadata.PackageNotFoundError as error:
        raise EnvironmentMismatchError(f"{error.name} is not installed; run: {INSTALL}") from None
    if tvm_version != TVM_VERSION or ffi_version not in FFI_VERSIONS:
        raise EnvironmentMismatchError(
            f"tvm_structured needs apache-tvm {TVM_VERSION} with apache-tvm-ffi {FFI_VERSIONS[-1]}, "
            f"found {tvm_version} with {ffi_version}; run: {INSTALL}"
        )
