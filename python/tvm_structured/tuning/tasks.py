"""Task: one kernel at one place on one target, described so that another process or machine can rebuild it.

The description holds no weights: float factors are random numbers of the right shapes, for the time of a kernel does
not depend on their values; index factors, on which kernels do depend, are part of it.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from tvm_structured.errors import TuningError
from tvm_structured.schedules import KERNELS, Config, ConvGeometry, Cpu, Epilogue, Kernel, Site
from tvm_structured.structures import STRUCTURES, Structure, Unstructured

MEASURED_ROWS = 8  # a number of rows (a batch) that is known at run time only is measured as this one
RANDOM_NUMBERS = 1 << 16  # random factors repeat after so many


@dataclass(frozen=True)
class KernelTask:
    """A kernel whose space is a list of configurations, the first of them the hand schedule.

    `factors`: name -> shape and dtype, and for indices their values. A leading extent of None is known at run time
    only.
    """

    kernel: str
    sizes: Mapping[str, Any]
    factors: Mapping[str, Mapping[str, Any]]
    x_shape: tuple[int | None, ...]
    y_shape: tuple[int | None, ...]
    epilogue: Mapping[str, Any]
    conv: Mapping[str, Any] | None
    blocked: tuple[bool, bool]
    target: str
    dtype: str = "float32"  # of x, y and the residual
    is_cold: bool = False  # whether the weights come from memory, as in a model that does not fit the caches

    @classmethod
    def of(cls, kernel: Kernel, structure: Structure, site: Site, target: Any, is_cold: bool = False) -> KernelTask:
        return cls(
            kernel.name,
            structure.sizes_of,
            {name: describe_factor(structure, name) for name in structure.factors},
            known_extents(site.x_shape),
            known_extents(site.y_shape),
            asdict(site.epilogue),
            None if site.conv is None else asdict(site.conv),
            (getattr(site, "blocked_x", False), getattr(site, "blocked_y", False)),
            target_text(target),
            getattr(site, "dtype", "float32"),
            is_cold,
        )

    @functools.cached_property
    def key(self) -> str:
        """What the task is, but for the target and whether weights are cold: those are compared one by one."""
        described = {name: value for name, value in asdict(self).items() if name not in ("target", "is_cold")}
        return digest_of(described)

    def describe(self) -> str:
        """`block_circulant 4096x4096 block=8, 16 rows`, for tables."""
        structure = self.structure
        size = "x".join(map(str, structure.shape))
        rows = "any" if self.x_shape[0] is None else self.x_shape[0]
        detail = f" {structure.describe()}" if structure.describe() else ""
        detail += "" if self.dtype == "float32" else f" {self.dtype}"
        if self.conv is None:
            return f"{self.kernel} {size}{detail}, {rows} row{'' if rows == 1 else 's'}"
        kh, kw = self.conv["kernel"]
        stride = f" /{self.conv['stride'][0]}" if self.conv["stride"][0] != 1 else ""
        where = f"{self.x_shape[1]}->{self.y_shape[1]} @ {self.x_shape[2]}"
        return f"{self.kernel} {kh}x{kw}{stride} {where}{detail}, batch {rows}"

    def to_json(self) -> dict[str, Any]:
        """`module` is where the kernel is defined: kernels from outside the package have to be imported first."""
        module = type(kernels_of(self.target)[self.kernel]).__module__
        return {"kind": "kernel", "module": module, **json.loads(json.dumps(asdict(self)))}

    @classmethod
    def from_json(cls, described: Mapping[str, Any]) -> KernelTask:
        """Raises TuningError for a description that is none."""
        try:
            values = {name: described[name] for name in cls.__dataclass_fields__}
            values |= {name: tuple(values[name]) for name in ("x_shape", "y_shape", "blocked")}
            task = cls(**values)
            kernels_of(task.target)[task.kernel]
        except (KeyError, TypeError) as error:
            raise TuningError(f"not the description of a kernel task ({type(error).__name__}: {error})") from None
        return task

    @functools.cached_property
    def structure(self) -> Structure:
        """A member of the family with random factors."""
        family = {**STRUCTURES, Unstructured.name: Unstructured}["dense" if self.kernel == "conv2d" else self.kernel]
        return family.from_factors(self.sizes, [rebuild_factor(described) for described in self.factors.values()])

    @functools.cached_property
    def site(self) -> Any:
        """A Site, or for CUDA a GpuSite."""
        from tvm import tirx

        rows = tirx.Var("rows", "int64") if self.x_shape[0] is None else self.x_shape[0]
        conv = None if self.conv is None else ConvGeometry(**{k: as_tuple(v) for k, v in self.conv.items()})
        shapes = (rows, *self.x_shape[1:]), (rows, *self.y_shape[1:])
        epilogue = Epilogue(**self.epilogue)
        if is_cuda_text(self.target):
            from tvm_structured.schedules.gpu import Gpu, GpuSite

            return GpuSite(*shapes, Gpu.of(self.tvm_target), epilogue, conv, self.dtype)
        return Site(*shapes, Cpu.of(self.tvm_target), epilogue, conv, *self.blocked)

    @functools.cached_property
    def tvm_target(self) -> Any:
        from tvm.target import Target

        return Target(json.loads(self.target))

    @functools.cached_property
    def space(self) -> list[Config]:
        """Every configuration once, the hand schedule first."""
        return distinct(kernels_of(self.target)[self.kernel].configs(self.structure, self.site))

    @property
    def by_hand(self) -> Config:
        """The hand schedule."""
        return self.space[0]

    def build(self, config: Config) -> tuple[Any, list[np.ndarray]]:
        """The PrimFunc and the arguments of one call; the last is the output."""
        kernel, site, rng = kernels_of(self.target)[self.kernel], self.site, np.random.default_rng(0)
        rows = MEASURED_ROWS if self.x_shape[0] is None else self.x_shape[0]
        stored = getattr(site, "stored_x", site.x_shape), getattr(site, "stored_y", site.y_shape)
        x_shape, y_shape = ((rows, *shape[1:]) for shape in stored)
        packed = [np.ascontiguousarray(array) for array in kernel.pack(self.structure, site, config).values()]
        func = kernel.prim_func(self.structure, site, config)
        features = self.y_shape[1:2]  # scale and bias are float32, whatever x is
        extra = {"scale": random_array(features, rng), "bias": random_array(features, rng)}
        extra["residual"] = random_array(y_shape, rng).astype(numpy_type(self.dtype), copy=False)
        x, y = random_array(x_shape, rng), np.zeros(y_shape, np.float32)
        ends = [array.astype(numpy_type(self.dtype), copy=False) for array in (x, y)]
        return func, [ends[0], *packed, *(extra[name] for name in site.epilogue.operands), ends[1]]


def kernels_of(target: str) -> Mapping[str, Any]:
    """The table of kernels of a target, as text."""
    if is_cuda_text(target):
        from tvm_structured.schedules.cuda import CUDA_KERNELS

        return CUDA_KERNELS
    return KERNELS


def is_cuda_text(target: str) -> bool:
    return bool(json.loads(target).get("kind") == "cuda")


def numpy_type(name: str) -> Any:
    """The numpy type of a name, that of ml_dtypes for bfloat16."""
    if name != "bfloat16":
        return np.dtype(name)
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16)


def describe_factor(structure: Structure, name: str) -> dict[str, Any]:
    array = np.asarray(structure.factors[name])
    described: dict[str, Any] = {"shape": list(array.shape), "dtype": str(array.dtype)}
    if name not in structure.trainable_factors:
        raw = np.ascontiguousarray(array).tobytes()
        described["values"] = base64.b64encode(zlib.compress(raw, 6)).decode("ascii")
    return described


def rebuild_factor(described: Mapping[str, Any]) -> np.ndarray:
    shape, dtype = tuple(described["shape"]), np.dtype(described["dtype"])
    if "values" not in described:
        return random_array(shape, np.random.default_rng(1)).astype(dtype, copy=False)
    raw = zlib.decompress(base64.b64decode(described["values"]))
    return np.frombuffer(raw, dtype).reshape(shape)


def random_array(shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Standard normal float32 numbers that repeat: large arrays are made in no time."""
    return np.resize(rng.standard_normal(RANDOM_NUMBERS, dtype=np.float32), tuple(shape))


def known_extents(shape: Sequence[Any]) -> tuple[int | None, ...]:
    return tuple(extent if isinstance(extent, int) else None for extent in shape)


def target_text(target: Any) -> str:
    """The target as JSON that TVM reads; equal targets have equal texts."""
    return json.dumps(without_tags(plain(target.export())), sort_keys=True)


def without_tags(config: Any) -> Any:
    """A target without its name, its host's left out too: a target given by name is the one it stands for."""
    if not isinstance(config, dict):
        return config
    return {name: without_tags(value) for name, value in config.items() if name != "tag"}


def plain(value: Any) -> Any:
    """Arrays, maps, strings and numbers of TVM as JSON has them."""
    if isinstance(value, (str, bytes)):
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if hasattr(value, "items"):
        return {str(key): plain(inner) for key, inner in value.items()}
    if hasattr(value, "__iter__"):
        return [plain(inner) for inner in value]
    return value.value if hasattr(value, "value") else str(value)


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def distinct(configs: Any) -> list[Config]:
    return list({config_text(config): config for config in configs}.values())


def config_text(config: Config) -> str:
    """The same text for equal configurations, also after a way through JSON."""
    return json.dumps(config, sort_keys=True)


def digest_of(described: Any) -> str:
    text = json.dumps(described, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
