"""Ranges of activations, observed on sample inputs: what an int8 tensor's scale is chosen from.

options = Quantization(method="percentile", percentile=99.9)
ranges = calibrate(mod, inputs, data, options, target)      # tensor name -> largest magnitude to represent
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tvm_structured.errors import ModelError
from tvm_structured.inputs import Input, check_input
from tvm_structured.layer_parts import part_name, whole_layer
from tvm_structured.progress import track

if TYPE_CHECKING:
    from tvm_structured.relay_passes.stages import Stage

METHODS = ("minmax", "percentile", "mse")
BINS = 2048
LEVELS = 127  # of each sign
CANDIDATES = 96  # ranges that "mse" tries


@dataclass(frozen=True)
class Quantization:
    """How a model becomes int8.

    method: how the range of an activation follows from the values observed. "minmax": the largest magnitude;
    "percentile": the magnitude that `percentile` percent of the values do not exceed; "mse": the range with the least
    mean squared rounding and clipping error. keep_first, keep_last: the first and the last layer stay float32; `keep`
    names others. Raises ModelError for other values.
    """

    method: str = "mse"
    percentile: float = 99.99
    keep_first: bool = False
    keep_last: bool = False
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ModelError(f"method={self.method!r}: expected one of {', '.join(METHODS)}")
        if not 0 < self.percentile <= 100:
            raise ModelError(f"percentile={self.percentile!r}: expected a number above 0, at most 100")
        if isinstance(self.keep, str) or not all(isinstance(name, str) for name in self.keep):
            raise ModelError(f"keep={self.keep!r}: expected a tuple of layer names")

    def kept(self, layers: Sequence[str]) -> set[str]:
        """Those that stay float32, of the layers (and parts of layers) in the order of the model.

        Raises ModelError where `keep` names one that is not there.
        """
        wholes = list(dict.fromkeys(whole_layer(name) for name in layers))
        for name in self.keep:
            if name not in wholes:
                raise ModelError(f"keep names {name!r}, which this model lacks; its layers are {', '.join(wholes)}")
        kept = {*self.keep, *(wholes[:1] if self.keep_first else ()), *(wholes[-1:] if self.keep_last else ())}
        return {name for name in layers if whole_layer(name) in kept}


class Observer:
    """A histogram of magnitudes. Where a value exceeds its range, bins are merged and the range doubles."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self.limit = 0.0
        self.largest = 0.0

    def add(self, name: str, values: np.ndarray) -> None:
        """Count. Raises ModelError for values that are not finite."""
        magnitudes = np.abs(values, dtype=np.float32).reshape(-1)
        largest = float(magnitudes.max(initial=0.0))
        if not np.isfinite(largest):
            raise ModelError(f"calibration: {name} has values that are not finite; look at the calibration data")
        self.largest = max(self.largest, largest)
        if not largest:
            self.counts[0] += magnitudes.size
            return
        if not self.limit:
            self.limit = largest
            # zeros were seen before, if anything
        while self.limit < largest:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.limit *= 2
        index = np.minimum((magnitudes * (BINS / self.limit)).astype(np.int64), BINS - 1)
        self.counts += np.bincount(index, minlength=BINS)

    def range(self, options: Quantization) -> float:
        """The largest magnitude to represent; 0 where only zeros were seen."""
        if options.method == "minmax" or not self.largest:
            return self.largest
        if options.method == "percentile":
            share = np.cumsum(self.counts) / self.counts.sum()
            index = int(np.searchsorted(share, options.percentile / 100))
            return min(self.largest, (index + 1) * self.limit / BINS)
        return self._least_error()

    def _least_error(self) -> float:
        """The range, of CANDIDATES from an eighth of the largest magnitude upward, with the least squared error."""
        centers = (np.arange(BINS) + 0.5) * (self.limit / BINS)
        errors = []
        candidates = np.linspace(self.largest / 8, self.largest, CANDIDATES)
        for candidate in candidates:
            step = candidate / LEVELS
            clipped = np.maximum(centers - candidate, 0.0)
            # a rounding error is uniform within its step; exact zeros have none, and lie in the first bin
            errors.append(float((self.counts[1:] * (clipped**2 + step**2 / 12)[1:]).sum()))
        return float(candidates[int(np.argmin(errors))])


def calibrate(mod: Any, inputs: Sequence[Input], data: Any, options: Quantization, target: Any) -> dict[str, float]:
    """Run a canonical float32 module on the data and give the range of every float32 tensor, by `tensor_names`.

    Raises ModelError for data that do not fit the inputs, and where there are none.
    """
    import tvm

    from tvm_structured.arrays import to_tvm
    from tvm_structured.relay_passes.observe_tensors import ObserveTensors
    from tvm_structured.relay_passes.pipeline import structured_pipeline

    observed = ObserveTensors()(mod)
    names = list(observed["main"].attrs["observed"])
    with target:
        lowered = structured_pipeline({}, target)(observed)
        executable = tvm.compile(lowered, target, relax_pipeline="default_build")
    run = tvm.relax.VirtualMachine(executable, tvm.cpu())["main"]
    staged = staged_layers(mod)
    observers = {name: Observer() for name in (*names, *(part for layer in staged for part in layer.parts))}
    batches = list(batches_of(data, inputs))
    if not batches:
        raise ModelError("calibration: no data; give arrays with at least one sample")
    if not any(np.any(array) for batch in batches for array in batch):
        raise ModelError("calibration: all samples are zeros, which says nothing about ranges; give real ones")
    for batch in track(batches, "Calibrating"):
        values = {n: v.numpy() for n, v in zip(names, run(*(to_tvm(array) for array in batch)), strict=True)}
        for layer in staged:
            values.update(layer.states(values[layer.x]))
        for name, value in values.items():
            observers[name].add(name, value)
    return {name: observer.range(options) for name, observer in observers.items()}


@dataclass(frozen=True, eq=False)
class Staged:
    """A layer that is a product of stages, whose states between them are no tensors of the module."""

    x: str  # name of its input
    layer: str
    stages: Sequence[Stage]

    @property
    def parts(self) -> list[str]:
        """Names of the states, less the last one, which is the layer's result."""
        return [part_name(self.layer, stage.name) for stage in self.stages[:-1]]

    def states(self, x: np.ndarray) -> dict[str, np.ndarray]:
        states: dict[str, np.ndarray] = {}
        state = x.reshape(-1, x.shape[-1])
        for name, stage in zip(self.parts, self.stages, strict=False):
            state = states[name] = stage.apply(state)
        return states


def staged_layers(mod: Any) -> list[Staged]:
    from tvm_structured.dialect import LayerCall
    from tvm_structured.relay_passes.observe_tensors import tensor_names
    from tvm_structured.relay_passes.stages import STAGED, stages_of

    main = mod["main"]
    names = tensor_names(main)
    values = [getattr(binding, "value", None) for block in main.body.blocks for binding in block.bindings]
    calls = [call for call in map(LayerCall.of, values) if call is not None and call.conv is None and call.op in STAGED]
    return [Staged(names[call.x], call.layer, stages_of(call.to_structure()) or []) for call in calls]


def batches_of(data: Any, inputs: Sequence[Input]) -> Iterator[list[np.ndarray]]:
    """Arrays of the inputs' shapes from what people hold: an array of samples, a tuple of them (or a dict by name), or
    an iterable of either, such as a DataLoader. What follows the inputs in a tuple (labels) is left out; samples are
    cut into batches of the model's size, the last one filled up with samples from the start."""
    is_series = isinstance(data, list) and len(inputs) == 1  # of batches; a tuple holds the inputs of one
    if is_batch(data, inputs) and not is_series:
        yield from cut(as_arrays(data, inputs), inputs)
        return
    if not isinstance(data, Iterable):
        raise ModelError(f"calibration: expected arrays, or an iterable of them, got {type(data).__name__}")
    for batch in data:
        if not is_batch(batch, inputs):
            raise ModelError(
                f"calibration: a batch is an array, or a tuple of {len(inputs)}, got {type(batch).__name__}"
            )
        yield from cut(as_arrays(batch, inputs), inputs)


def is_batch(data: Any, inputs: Sequence[Input]) -> bool:
    """Whether this is one value for every input (and perhaps labels)."""
    if hasattr(data, "shape") or isinstance(data, Mapping):
        return True
    is_tuple = isinstance(data, (tuple, list)) and len(data) >= len(inputs) > 0
    return is_tuple and all(hasattr(value, "shape") for value in data[: len(inputs)])


def as_arrays(batch: Any, inputs: Sequence[Input]) -> list[np.ndarray]:
    if isinstance(batch, Mapping):
        missing = [spec.name for spec in inputs if spec.name not in batch]
        if missing:
            raise ModelError(f"calibration: input {missing[0]!r} is missing; the data have {', '.join(batch)}")
        values = [batch[spec.name] for spec in inputs]
    else:
        values = [batch] if hasattr(batch, "shape") else list(batch)[: len(inputs)]
    return [np.asarray(value.detach().cpu() if hasattr(value, "detach") else value) for value in values]


def cut(arrays: list[np.ndarray], inputs: Sequence[Input]) -> Iterator[list[np.ndarray]]:
    """Samples, along the first axis, in batches of the model's size."""
    if len(arrays) != len(inputs):
        raise ModelError(f"calibration: {len(arrays)} arrays for {len(inputs)} inputs")
    sizes = {spec.shape[0] for spec in inputs if spec.shape}
    counts = {len(array) for array in arrays if array.ndim}
    if len(sizes) != 1 or len(counts) != 1 or None in sizes or 0 in counts:
        fitting = [check_input(spec, array) for spec, array in zip(inputs, arrays, strict=True)]
        yield [np.asarray(array) for array in fitting]
        return
    (size,), (count,) = sizes, counts
    assert size is not None
    for first in range(0, count, size):
        rows = np.arange(first, first + size) % count
        batch = [check_input(spec, array[rows]) for spec, array in zip(inputs, arrays, strict=True)]
        yield [np.asarray(array) for array in batch]
