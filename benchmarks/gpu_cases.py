"""The cases of the GPU benchmark: layers in structured forms, and how their kernels are compiled into a folder.

Members are made of random numbers from a seed, so that the machine that measures has the same ones without a compiler.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from tvm_structured.structures import STRUCTURES, Structure, Unstructured
from tvm_structured.structures.layer import Conv2d, Dense

MANIFEST = "manifest.json"
PROJECTIONS = {"4096x4096": (4096, 4096), "4096x11008": (11008, 4096), "1024x4096": (1024, 4096)}  # in x out
MODES = {4096: (16, 16, 16), 11008: (16, 16, 43), 1024: (8, 8, 16)}
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "block_circulant 8": {"block": 8},
    "block_circulant 16": {"block": 16},
    "permuted_diagonal 8": {"block": 8},
    "low_rank N/8": {"share": 8},
    "tensor_train 8": {"rank": 8},
}
# VGG-16's 3x3 layers: channels in, out, image; as in its workload
CONVS = {f"conv {c}->{o} @{hw}": (c, o, hw) for c, o, hw in
         ((64, 64, 224), (128, 128, 112), (256, 256, 56), (512, 512, 28), (512, 512, 14))}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One layer, in one form, for one number of rows (or batch of images) and type."""

    layer: str
    form: str
    rows: int
    dtype: str

    @property
    def is_conv(self) -> bool:
        return self.layer in CONVS

    @property
    def family(self) -> str:
        return self.form.split()[0]


def cases(layers: Sequence[str], batches: Sequence[int], dtypes: Sequence[str]) -> Iterator[Case]:
    for layer in layers:
        forms = ("winograd F2", "winograd F4") if layer in CONVS else FORMS
        for dtype in dtypes:
            for rows in batches if layer not in CONVS else [b for b in batches if b <= 8]:
                for form in forms:
                    yield Case(layer, form, rows, dtype)


def member_of(case: Case) -> Structure:
    """The layer as a member of its family; entries of the matrix have a variance of 1 / (terms of a sum)."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, terms: float) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(terms))).astype(np.float32)

    if case.is_conv:
        channels, out, _ = CONVS[case.layer]
        weight = Conv2d(case.layer, normal(out, channels, 3, 3, terms=9 * channels))
        return STRUCTURES["winograd"].from_dense(weight, tile=int(case.form[-1]))
    out, inner = PROJECTIONS[case.layer]
    size = FORMS[case.form]
    family = STRUCTURES.get(case.family, Unstructured)
    match case.family:
        case "block_circulant":
            n = size["block"]
            return family((out, inner), 1, normal(-(-out // n), -(-inner // n), n, terms=inner))
        case "permuted_diagonal":
            p = size["block"]
            rows, columns = -(-out // p), -(-inner // p)
            shifts = (np.arange(rows)[:, None] * columns + np.arange(columns)) % p  # the paper's natural indexing
            return family((out, inner), 1, normal(rows, columns, p, terms=columns), shifts.astype(np.int64))
        case "low_rank":
            rank = min(out, inner) // size["share"]
            return family((out, inner), normal(out, rank, terms=rank), normal(rank, inner, terms=inner))
        case "tensor_train":
            out_modes, in_modes, rank = MODES[out], MODES[inner], size["rank"]
            ranks = (1, rank, rank, 1)
            cores = [
                normal(ranks[k], out_modes[k], in_modes[k], ranks[k + 1], terms=in_modes[k] * ranks[k + 1])
                for k in range(3)
            ]
            return family.from_factors({"shape": (out, inner), "out_modes": out_modes, "in_modes": in_modes}, cores)
    return Unstructured.from_dense(Dense(case.layer, normal(out, inner, terms=inner)))


# -- compiling -------------------------------------------------------------------------------------------


def prepare(
    folder: Path, wanted: Sequence[Case], arch: str, configs: int = 1, workers: int = 1
) -> list[dict[str, Any]]:
    """Compile every case in its first `configs` configurations, several at a time, and write the manifest.

    A case that does not compile becomes an entry with `error`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(compile_case, folder, case, arch, configs): case for case in wanted}
        for done in as_completed(running):
            try:
                entries += done.result()
            except Exception as error:
                entries.append({"case": asdict(running[done]), "error": f"{type(error).__name__}: {error}"[:300]})
    order = {case: position for position, case in enumerate(wanted)}
    entries.sort(key=lambda entry: (order[Case(**entry["case"])], entry.get("config_index", 0)))
    (folder / MANIFEST).write_text(json.dumps({"arch": arch, "entries": entries}, indent=1), encoding="utf-8")
    return entries


def compile_case(folder: Path, case: Case, arch: str, configs: int) -> list[dict[str, Any]]:
    """Library and packed constants of one case in each configuration."""
    import itertools

    from tvm_structured.schedules.cuda import CUDA_KERNELS
    from tvm_structured.schedules.cuda.dense import MOST_ROWS
    from tvm_structured.targets import resolve_target

    target, member = resolve_target({"kind": "cuda", "arch": arch}), member_of(case)
    if case.family == "dense" and case.rows > MOST_ROWS:  # as `target="cuda"` does
        return [compile_one(folder, case, target, {"by": "TVM's rules"}, 0, *dense_function(case, target, member))]
    kernel, site = CUDA_KERNELS[case.family], site_of(case, target)
    entries: list[dict[str, Any]] = []
    for index, config in enumerate(itertools.islice(kernel.configs(member, site), configs)):
        try:
            packed = kernel.pack(member, site, config)
            func = kernel.prim_func(member, site, config)
            entries.append(compile_one(folder, case, target, config, index, func, list(packed.values())))
        except Exception as error:  # TVM raises several kinds; the other configurations may do
            failed = {"case": asdict(case), "config": repr(config), "config_index": index}
            entries.append({**failed, "error": f"{type(error).__name__}: {error}"[:300]})
    return entries


def compile_one(
    folder: Path, case: Case, target: Any, config: Any, index: int, func: Any, packed: Sequence[np.ndarray]
) -> dict[str, Any]:
    import tvm

    from tvm_structured.cuda_binaries import embedding

    stem = hashlib.sha256(f"{case} {index}".encode()).hexdigest()[:16]
    with target, embedding(str(target.attrs["arch"])):
        library = tvm.compile(func.with_attr("global_symbol", "main"), target)
    library.export_library(str(folder / f"{stem}.so"))
    np.savez(folder / f"{stem}.npz", *packed)
    return {"case": asdict(case), "config": repr(config), "config_index": index, "stem": stem}


def site_of(case: Case, target: Any) -> Any:
    from tvm_structured.schedules import ConvGeometry
    from tvm_structured.schedules.gpu import Gpu, GpuSite

    gpu = Gpu.of(target)
    if case.is_conv:
        channels, out, hw = CONVS[case.layer]
        geometry = ConvGeometry((3, 3), padding=(1, 1, 1, 1))
        shapes = (case.rows, channels, hw, hw), (case.rows, out, hw, hw)
        return GpuSite(*shapes, gpu, conv=geometry, dtype=case.dtype)
    out, inner = PROJECTIONS[case.layer]
    return GpuSite((case.rows, inner), (case.rows, out), gpu, dtype=case.dtype)


def dense_function(case: Case, target: Any, member: Structure) -> tuple[Any, list[np.ndarray]]:
    """What `target="cuda"` makes of a dense layer: (the scheduled function, its weight)."""
    from tvm import relax, tirx

    from tvm_structured.dialect import LayerCall
    from tvm_structured.lone_layer import alone
    from tvm_structured.relay_passes.pipeline import structured_pipeline
    from tvm_structured.schedules.cuda.functions import numpy_type

    weight = np.asarray(member.dense()).astype(numpy_type(case.dtype))
    x = relax.Var("x", relax.TensorType((case.rows, weight.shape[1]), case.dtype))
    call = LayerCall("dense", "weight", x, (relax.const(weight, case.dtype),))
    with target:
        lowered = structured_pipeline({}, target)(alone(call)[0])
    (func,) = (f for _, f in lowered.functions_items() if isinstance(f, tirx.PrimFunc))
    return func, [weight]
