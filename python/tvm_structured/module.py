"""A compiled module: call it, time it, export it; and `load` for an exported one.

Needs only TVM's runtime: nothing here imports Relax.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvm_structured.arrays import are_ready, from_tvm, is_torch, to_gpu, to_host, to_tvm
from tvm_structured.devices import device_of, prepare_cuda
from tvm_structured.errors import ModelError
from tvm_structured.files import atomic
from tvm_structured.inputs import Input, check_inputs
from tvm_structured.targets import use_all_cores
from tvm_structured.tvm_log import without_scope_warnings
from tvm_structured.vta_stats import CountedMain, VTAStats, counted_main

if TYPE_CHECKING:
    from tvm_structured.planning import Plan
    from tvm_structured.profile import Profile
    from tvm_structured.report import Report
    from tvm_structured.vta.programs import Programs

METADATA = "structured_metadata"  # a function of the module that returns its description, JSON as uint8
FORMAT = "tvm_structured.module"
LIBRARY_SUFFIXES = (".so", ".dylib", ".dll", ".tar")


class Runnable:
    """Call with numpy or torch arrays, the same kind comes out. One object is not to be shared between threads.

    A module for a GPU takes torch tensors on the GPU as they are, runs on torch's current stream and returns tensors
    on the GPU; arrays in the CPU's memory are copied there and the results back.
    """

    def __init__(self, executable: Any, metadata: dict[str, Any]) -> None:
        use_all_cores()
        self.executable = executable
        self.metadata = metadata
        self.inputs = tuple(Input.from_json(described) for described in metadata["inputs"])
        self.is_on_gpu = metadata.get("device") == "cuda"
        if not self.is_on_gpu:
            self._main  # noqa: B018 - so that what does not load shows at once

    @functools.cached_property
    def _ready(self) -> tuple[tuple[Any, Any], ...] | None:
        """See `are_ready`; None where every input must be looked at: on a GPU, and where a size is not known."""
        extents = [extent for spec in self.inputs for extent in spec.shape]
        return None if self.is_on_gpu or not all(extents) else tuple((i.dtype, i.shape) for i in self.inputs)

    @functools.cached_property
    def device(self) -> Any:
        """The TVM device it runs on. Raises ModelError for a GPU module where there is none."""
        return device_of(self.metadata)

    @functools.cached_property
    def _vm(self) -> Any:
        from tvm.runtime.vm import VirtualMachine

        return VirtualMachine(self.executable, self.device)

    @functools.cached_property
    def _main(self) -> Any:
        described = self.metadata.get("vta")
        return CountedMain(self._vm, described) if described else self._vm["main"]

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run. Inputs in order or by name; raises ModelError naming the input that does not fit."""
        if not named and are_ready(self._ready, inputs):  # the usual case, which must not cost as much as a small layer
            return from_tvm(self._main(*inputs), as_torch=True)
        arrays = check_inputs(self.inputs, inputs, named)
        if self.is_on_gpu:
            return self._run_on_gpu(arrays)
        outputs = self._main(*[to_tvm(array) for array in arrays])
        return from_tvm(outputs, as_torch=any(is_torch(array) for array in arrays))

    def _run_on_gpu(self, arrays: Sequence[Any]) -> Any:
        outputs = self._main(*self._arguments(arrays))
        if any(is_torch(array) and array.is_cuda for array in arrays):
            return from_tvm(outputs, as_torch=True)
        return to_host(outputs, as_torch=any(is_torch(array) for array in arrays))

    def _arguments(self, arrays: Sequence[Any]) -> list[Any]:
        """The inputs where the module runs."""
        if not self.is_on_gpu:
            return [to_tvm(array) for array in arrays]
        return [to_gpu(array, self.device, spec.name) for array, spec in zip(arrays, self.inputs, strict=True)]

    def report(self) -> Report:
        """What was chosen for each layer and why."""
        from tvm_structured.report import Report

        return Report.from_dict(self.metadata["report"])

    def time(self, *inputs: Any, repeat: int = 10, **named: Any) -> float:
        """Median wall time of one run in seconds, of `repeat` measurements of at least 10 ms each."""
        arrays = self._arguments(check_inputs(self.inputs, inputs, named))
        evaluator = self._vm.time_evaluator("main", self.device, number=1, repeat=repeat, min_repeat_ms=10)
        return float(evaluator(*arrays).median)

    def profile(self, *inputs: Any, repeat: int = 10, **named: Any) -> Profile:
        """Where the time of a run goes, by layer: medians of `repeat` runs. See `Profile`.

        The first profile on a machine also measures its roofline, which takes about two seconds.
        """
        from tvm_structured.profiling import take_profile

        if self.is_on_gpu:
            raise ModelError("profile() times calls on a CPU; on a GPU use torch.profiler or Nsight around the module")
        arrays = [to_tvm(array) for array in check_inputs(self.inputs, inputs, named)]
        return take_profile(self._vm, self.metadata, arrays, repeat)

    def vta_stats(self) -> VTAStats:
        """Of a module for the accelerator: bytes moved and micro-ops executed in the calls since the start (`time` and
        `profile` do not count), and the layers with their modelled cycles. Raises ModelError for other modules."""
        return counted_main(self._main).stats()

    def clear_stats(self) -> None:
        """Count from zero again."""
        counted_main(self._main).clear()

    def __repr__(self) -> str:
        shapes = ", ".join(map(str, self.inputs))
        return f"<{type(self).__name__} main({shapes}) for {self.metadata['target']}>"


class Compiled(Runnable):
    """What `ts.compile` returns."""

    def __init__(
        self,
        executable: Any,
        metadata: dict[str, Any],
        plan: Plan,
        mod: Any,
        emulator: Callable[[], Runnable] | None = None,
        vta: Programs | None = None,
    ) -> None:
        super().__init__(executable, metadata)
        self.plan = plan
        self.vta = vta  # the accelerator's programs, where that is the target
        self.mod = mod  # the lowered Relax module, to look at with mod.show()
        self._emulator = emulator

    def emulate(self, *inputs: Any, **named: Any) -> Any:
        """Run a module for a GPU on this CPU, to check its results: slow, and without a GPU.

        Structured kernels run thread after thread as they are scheduled, without tensor cores; all other operators as
        compiled for a CPU. Raises ModelError for a module that runs on a CPU anyway.
        """
        if self._emulator is None:
            raise ModelError(f"the module is for {self.metadata['target']}: call it, there is nothing to emulate")
        return self._emulated(*inputs, **named)

    @functools.cached_property
    def _emulated(self) -> Runnable:
        assert self._emulator is not None
        return self._emulator()

    def export(self, path: Any) -> Path:
        """Write a shared library (or a .tar of objects, for another machine) that `ts.load` runs.

        Raises ModelError for an unknown suffix, a missing folder or a missing C++ compiler; a file
        that exists is replaced only when the new one is complete.
        """
        path = check_destination(path)
        try:
            with atomic(path) as temporary, without_scope_warnings():
                self.executable.export_library(str(temporary))
        except RuntimeError as error:  # TVM's wrapper of a failing or missing compiler
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"{path}: linking failed ({reason}); check the C++ compiler") from error
        return path


def check_destination(path: Any) -> Path:
    """The path, if a module can be exported there. Raises ModelError as `Compiled.export` does."""
    from tvm.support import cc

    path = Path(path)
    if path.suffix not in LIBRARY_SUFFIXES:
        raise ModelError(f"{path}: export to one of {', '.join(LIBRARY_SUFFIXES)}")
    if not path.parent.is_dir():
        raise ModelError(f"{path}: cannot export ({path.parent}: no such folder; create it first)")
    if path.suffix != ".tar" and cc.get_cc() is None:
        raise ModelError(f"{path}: linking needs a C++ compiler; install g++ or clang++, or set CXX")
    return path


def load(path: Any) -> Runnable:
    """Load an exported module. It needs only TVM's runtime.

    Loading runs code of the file, as with any shared library. Raises ModelError for a file that is
    missing, damaged or not one of ours.
    """
    import tvm
    from tvm.runtime.vm import VirtualMachine

    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    can_run_cuda = prepare_cuda()
    try:
        with without_scope_warnings():
            executable = tvm.runtime.load_module(os.fspath(path))
            raw = VirtualMachine(executable, tvm.cpu())[METADATA]().numpy().tobytes()
    except Exception as error:  # dlopen errors, missing symbols and foreign modules raise several kinds
        reason = str(error).strip().splitlines()[-1]
        if not can_run_cuda and "load_from_bytes.cuda" in str(error):
            raise ModelError(f"{path}: the module is for an NVIDIA GPU, and there is no driver here") from None
        raise ModelError(f"{path}: not a module exported by tvm_structured ({reason}); export it again") from None
    return Runnable(executable, read_metadata(raw, path))


def read_metadata(raw: bytes, path: Path) -> dict[str, Any]:
    metadata = json.loads(raw)
    if metadata.get("format") != FORMAT:
        raise ModelError(f"{path}: a TVM module, but not one of tvm_structured")
    return metadata
