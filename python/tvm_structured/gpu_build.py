"""What compiling for a GPU needs beyond a target, and the same module for the CPU, to check it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from tvm_structured.cuda_binaries import embedding
from tvm_structured.devices import prepare_cuda
from tvm_structured.errors import ModelError
from tvm_structured.module import Runnable
from tvm_structured.targets import is_cuda, resolve_target


@contextlib.contextmanager
def device_code(target: Any, cuda_graph: bool) -> Iterator[None]:
    """Within, CUDA source is compiled to machine code where there is nvcc, and kernels are gathered to CUDA graphs."""
    from tvm.ir.transform import PassContext

    if not is_cuda(target):
        yield
        return
    current = PassContext.current()
    config = {**current.config, "relax.backend.use_cuda_graph": cuda_graph}
    context = PassContext(current.opt_level, current.required_pass, current.disabled_pass, current.instruments, config)
    prepare_cuda()
    with context, embedding(str(target.attrs["arch"])):
        yield


def emulation(mod: Any, choices: Mapping[str, Any], target: Any, metadata: Mapping[str, Any]) -> Runnable:
    """A canonical module and a plan for a GPU, compiled for this CPU: see `relay_passes.emulate_kernels`.

    Raises ModelError where TVM has no CPU code for an operator (TVM 0.27: a sigmoid in bfloat16).
    """
    import tvm

    from tvm_structured.relay_passes.pipeline import emulation_pipeline

    host = resolve_target("host")
    lowered = emulation_pipeline(choices, target, host)(mod)
    try:
        with host:
            executable = tvm.compile(lowered, host, relax_pipeline="default_build")
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(
            f"TVM cannot compile the emulation for this CPU ({reason}); the module itself is done"
        ) from error
    return Runnable(executable, {**metadata, "device": "cpu"})
