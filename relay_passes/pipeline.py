"""The map of the compiler: every pass, in phases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir.transform import PassContext, Sequential, module_pass

from tvm_structured.dialect import PREFIX
from tvm_structured.relay_passes.apply_schedules import ApplySchedules
from tvm_structured.relay_passes.block_layouts import BlockLayouts
from tvm_structured.relay_passes.canonicalize_layers import CanonicalizeLayers
from tvm_structured.relay_passes.emulate_kernels import EmulateKernels
from tvm_structured.relay_passes.expressions import FLOAT32, FLOATS
from tvm_structured.relay_passes.fuse_attention import FuseAttention
from tvm_structured.relay_passes.fuse_epilogue import FuseEpilogue
from tvm_structured.relay_passes.lower_structured import default_config, legalize_with
from tvm_structured.relay_passes.mark_layers import marking
from tvm_structured.relay_passes.rewrite_layers import RewriteLayers
from tvm_structured.relay_passes.wrap_indices import WrapIndices
from tvm_structured.schedules import KERNELS
from tvm_structured.schedules.cpu import Cpu


def canonical_pipeline(params: Mapping[str, np.ndarray], names: Mapping[str, str], target: Any = None) -> Sequential:
    """An imported module --> one whose layers are `structured.dense` and `structured.conv2d` calls.

    For a CPU target images are in blocks of channels between convolutions; for a GPU layers may be of half precision.
    """
    dtypes = FLOATS if target is not None and "cuda" in target.keys else FLOAT32
    layouts = [BlockLayouts(Cpu.of(target))] if target is not None and "cpu" in target.keys else []
    return Sequential(
        [
            WrapIndices(),
            CanonicalizeLayers(params, names, dtypes),
            relax.transform.CanonicalizeBindings(),  # looks through tuples, such as that of max pooling and its indices
            FuseEpilogue(dtypes),
            *layouts,
        ]
    )


def structured_pipeline(choices: Mapping[str, Any], target: Any, records: Any = None) -> Sequential:
    """A canonical module and a plan --> scheduled TensorIR, ready for `tvm.compile(..., "default_build")`.

    `records`: what tuning found, `tuning.Records` or a database of MetaSchedule, or None.
    """
    # Phase 3: a tuned record or a default schedule for every function that has none
    return Sequential([lowering_pipeline(choices, records), ApplySchedules(records)])


def lowering_pipeline(choices: Mapping[str, Any], records: Any = None) -> Sequential:
    """The phases before scheduling: structured kernels come out finished, other functions as fused loops."""
    legalize = marking(legalize_with(getattr(records, "configure", default_config)))
    return Sequential(
        [
            # Phase 1: layers become structured operators
            RewriteLayers(choices),
            FuseAttention(),
            # Phase 2: operators become TensorIR; what is not ours fuses as usual
            relax.transform.DecomposeOpsForInference(),
            relax.transform.LegalizeOps({PREFIX + name: legalize for name in KERNELS}),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
        ]
    )


def emulation_pipeline(choices: Mapping[str, Any], target: Any, host: Any) -> Sequential:
    """A canonical module and a plan for a GPU --> the same kernels, one thread after the other, on this CPU.

    Without tensor cores and other instructions that only a GPU has; what has no kernel of ours runs as on a CPU.
    """
    return Sequential(
        [
            Within(target, lowering_pipeline(choices, WithoutIntrinsics())),
            EmulateKernels(),
            Within(host, ApplySchedules()),
        ]
    )


class WithoutIntrinsics:
    """Records that ask every kernel for its default schedule with plain blocks."""

    def configure(self, kernel: Any, structure: Any, site: Any) -> dict[str, Any]:
        return {**default_config(kernel, structure, site), "tensorize": False}


@module_pass(opt_level=0, name="Within")
class Within:
    """A pass run with another target entered."""

    def __init__(self, target: Any, inner: Any) -> None:
        self.target, self.inner = target, inner

    def transform_module(self, mod: Any, _: PassContext) -> Any:
        with self.target:
            return self.inner(mod)
