"""Activation-aware projection: among the members of one size, the one whose outputs are nearest on calibration data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tvm_structured.nn.batches import Batches
from tvm_structured.nn.members import four_sides, to_numpy
from tvm_structured.nn.recover import run
from tvm_structured.structures import Layer, Structure

LARGEST_INPUT = 8192  # features; their second moments take 512 MiB
LBFGS_STEPS = 60


def input_moments(model: nn.Module, data: Any, paths: Iterable[str], batch: int = 64) -> dict[str, Tensor]:
    """Path -> E[x x^T] of the rows that a dense layer, or the patches that a convolution, multiplies; float64 (in, in).

    Patches are (kh, kw, in), channel fastest. Layers with more than `LARGEST_INPUT` features, and those that never
    run, are left out. data: as for `recover`.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = []
    for path in paths:
        module = model.get_submodule(path)
        if module.weight[0].numel() <= LARGEST_INPUT:  # type: ignore[index, union-attr]

            def add(module: Any, args: Any, path: str = path) -> None:
                rows = rows_of(module, args[0]).double()
                sums[path] = sums.get(path, 0) + (rows.T @ rows).cpu()
                counts[path] = counts.get(path, 0) + len(rows)

            handles.append(module.register_forward_pre_hook(add))
    try:
        for x, _ in Batches(data, batch).epoch(0):
            run(model, x)
    finally:
        for handle in handles:
            handle.remove()
    return {path: total / counts[path] for path, total in sums.items() if counts[path]}


def rows_of(module: Any, x: Tensor) -> Tensor:
    """What the layer's (out, in) matrix is multiplied by, one row each."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    x = x if x.dim() == 4 else x.unsqueeze(0)
    top, left, bottom, right = four_sides(module.padding, module.kernel_size, module.dilation)
    padded = F.pad(x, (left, right, top, bottom))
    patches = F.unfold(padded, module.kernel_size, module.dilation, stride=module.stride)  # (n, in * kh * kw, places)
    by_channel = patches.unflatten(1, (x.shape[1], -1)).permute(0, 3, 2, 1)
    return by_channel.reshape(-1, patches.shape[1])


def refitted(member: Structure, layer: Layer, moments: Tensor) -> Structure:
    """The member of the same sizes that is nearest in the outputs: the family's closed form, else L-BFGS from here."""
    if member.is_lossless:
        return member
    closed = member.refit(layer, moments.numpy())
    candidate = descended(member, layer, moments) if closed is None else closed
    # in float32 the descent may end a little above its start where that was exact
    errors = [m.output_error(layer, moments.numpy()) for m in (member, candidate)]
    return candidate if errors[1] < errors[0] else member


def descended(member: Structure, layer: Layer, moments: Tensor) -> Structure:
    """L-BFGS on tr((W' - W) C (W' - W)^T) over the trainable factors, in float64."""
    target = torch.from_numpy(layer.matrix.astype("float64"))
    scale = float(torch.einsum("ij,ij->", target @ moments, target)) or 1.0
    factors = [torch.as_tensor(factor) for factor in member.factors.values()]
    trainable = [name in member.trainable_factors for name in member.factors]
    values = [f.double().requires_grad_(t) if t else f for f, t in zip(factors, trainable, strict=True)]
    optimizer = torch.optim.LBFGS(
        [v for v, t in zip(values, trainable, strict=True) if t],
        max_iter=LBFGS_STEPS,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        difference = type(member).from_factors(member.sizes_of, values).dense() - target
        loss = torch.einsum("ij,ij->", difference @ moments, difference) / scale
        loss.backward()
        for value in values:  # L-BFGS takes flat views of them
            if value.grad is not None:
                value.grad = value.grad.contiguous()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    arrays = [to_numpy(v.to(f.dtype)) for v, f in zip(values, factors, strict=True)]
    return type(member).from_factors(member.sizes_of, arrays)
