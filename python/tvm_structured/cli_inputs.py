"""What commands are given, read: arrays, samples, shapes, targets and budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from tvm_structured.errors import ModelError
from tvm_structured.structures import Budget


def read_inputs(module: Any, texts: tuple[str, ...]) -> dict[str, Any]:
    """NAME=FILE.npy texts as arrays; random numbers for the other inputs."""
    given = {name: read_array(Path(file)) for name, file in (split(text, "--input") for text in texts)}
    rng = np.random.default_rng(0)
    return {**given, **{spec.name: random_input(spec, rng) for spec in module.inputs if spec.name not in given}}


def limits(max_params: float | None, max_flops: float | None, max_error: float | None) -> Any:
    """A Budget, or None where nothing limits."""
    if max_params is None and max_flops is None and max_error is None:
        return None
    return Budget(max_params, max_flops, max_error)


def read_target(text: str) -> Any:
    """A target given as JSON becomes a dict."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ModelError(f"--target {text!r} is not JSON ({error})") from None


def split(text: str, option: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"{option} {text!r}: write NAME=VALUE")
    return name, value


def examples(model: Path, shapes: tuple[str, ...]) -> Any:
    """Zeros of the shapes given on the command line, in the order of the ONNX model's inputs."""
    if not shapes:
        return None
    if model.suffix != ".onnx":
        raise click.UsageError("--shape is for .onnx models; a .pt2 file holds its shapes")
    wanted = {}
    for name, value in (split(text, "--shape") for text in shapes):
        try:
            wanted[name] = np.zeros([int(extent) for extent in value.split(",")], np.float32)
        except ValueError:
            raise click.UsageError(f"--shape {name}={value!r}: write extents as 1,3,224,224") from None
    return wanted


def read_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, EOFError):  # whose text proposes to unpickle the file
        raise ModelError(f"{path}: not a .npy file of numbers; write one with numpy.save") from None


def read_samples(path: Path) -> Any:
    """One array, or a dict of them by input."""
    if path.suffix != ".npz":
        return read_array(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError) as error:
        raise ModelError(f"{path}: not a readable .npz file ({error})") from None


def random_input(spec: Any, rng: np.random.Generator) -> np.ndarray:
    """Standard normal numbers (zeros for integers); an open extent is 1."""
    shape = [extent or 1 for extent in spec.shape]
    if spec.dtype.startswith("float"):
        return rng.standard_normal(shape).astype(spec.dtype)
    return np.zeros(shape, spec.dtype)
