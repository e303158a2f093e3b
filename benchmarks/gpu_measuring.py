"""One row of the GPU benchmark: results checked, then all contenders in turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_cases import CONVS, Case
from gpu_peers import einsum_of, factors_of
from gpu_timing import Card, copies_for, seconds_of

from tvm_structured.structures import Structure

TOLERANCE = {"float16": 1e-2, "float32": 1e-4}  # of the norm, against float64; winograd F4 in half is the worst


class Bench:
    """`compile_seconds`: what torch.compile may take in all; after that its column is empty."""

    def __init__(self, card: Card, compile_seconds: float) -> None:
        self.card, self.compile_left = card, compile_seconds

    def row(self, case: Case, member: Structure, folder: Path, entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Times of all contenders, error, shares of the card's limits; `problem` where ours fails or is wrong."""
        row: dict[str, Any] = {"case": vars(case), "times": {}}
        dtype = getattr(torch, case.dtype)
        x, matrix, reference, y_shape = problem_of(case, member, dtype)
        contenders: dict[str, list[Callable[[], Any]]] = {}
        for entry in entries:
            try:
                calls, error = self.ours(entry, folder, x, reference, y_shape, dtype)
            except Exception as problem:  # one broken kernel must not end the run
                row["problem"] = f"{entry.get('config', '')}: {type(problem).__name__}: {problem}"[:300]
                continue
            if not error < TOLERANCE[case.dtype]:
                row["problem"] = f"{entry['config']}: relative error {error:.1e}"
                continue
            contenders[f"ours {entry['config_index']}"] = calls
            row.setdefault("errors", {})[f"ours {entry['config_index']}"] = error
        contenders["torch"] = self.torch_calls(case, x, matrix, dtype)
        contenders.update(self.factor_calls(case, member, x, dtype))
        times = seconds_of(contenders)
        self.conclude(row, case, member, times, entries)
        return row

    def ours(
        self, entry: dict[str, Any], folder: Path, x: Any, reference: Any, y_shape: Any, dtype: Any
    ) -> tuple[list[Callable[[], Any]], float]:
        import tvm

        if "error" in entry:
            raise RuntimeError(entry["error"])
        kernel = tvm.runtime.load_module(str(folder / f"{entry['stem']}.so"))["main"]
        with np.load(folder / f"{entry['stem']}.npz") as held:
            packed = [torch.from_numpy(held[name]).cuda() for name in held.files]
        y = torch.full(y_shape, float("nan"), device="cuda", dtype=dtype)
        kernel(x, *packed, y)
        torch.cuda.synchronize()
        error = float((y.double() - reference).norm() / reference.norm())
        copies = copies_for(sum(t.nbytes for t in packed), self.card.l2_bytes)
        sets = [packed, *([t.clone() for t in packed] for _ in range(copies - 1))]
        return [lambda held=held: kernel(x, *held, y) for held in sets], error

    def torch_calls(self, case: Case, x: Any, matrix: Any, dtype: Any) -> list[Callable[[], Any]]:
        weight = matrix.to(dtype)
        sets = [weight.clone() for _ in range(copies_for(weight.nbytes, self.card.l2_bytes))]
        if not case.is_conv:
            return [lambda w=w: torch.nn.functional.linear(x, w) for w in sets]
        best = self.faster_layout(x, weight)
        image = x.to(memory_format=best)
        return [lambda w=w: torch.conv2d(image, w, padding=1) for w in (v.to(memory_format=best) for v in sets)]

    def faster_layout(self, x: Any, weight: Any) -> Any:
        """The one of cuDNN's layouts that is faster here, x given in it."""
        times = {}
        torch.backends.cudnn.benchmark = True
        for layout in (torch.contiguous_format, torch.channels_last):
            image, w = x.to(memory_format=layout), weight.to(memory_format=layout)
            times[layout] = seconds_of({"conv": [lambda image=image, w=w: torch.conv2d(image, w, padding=1)]})["conv"]
        return min(times, key=lambda layout: times[layout])

    def factor_calls(self, case: Case, member: Structure, x: Any, dtype: Any) -> dict[str, list[Callable[[], Any]]]:
        """PyTorch's products of the same factors, plain and compiled."""
        function = einsum_of(member)
        if function is None or case.is_conv:
            return {}
        factors = factors_of(member, dtype)
        copies = copies_for(sum(t.nbytes for t in factors), self.card.l2_bytes)
        sets = [factors, *([t.clone() for t in factors] for _ in range(copies - 1))]
        found = {}
        with contextlib.suppress(RuntimeError):  # too large, or a type that an operator of PyTorch lacks
            function(x, *factors)
            found["einsum"] = [lambda held=held: function(x, *held) for held in sets]
        if self.compile_left > 0 and "einsum" in found:
            start = time.perf_counter()
            torch._dynamo.reset()
            compiled = torch.compile(function, dynamic=False)
            with contextlib.suppress(Exception):  # whatever the compiler raises, the column stays empty
                compiled(x, *factors)
                found["compiled"] = [lambda held=held: compiled(x, *held) for held in sets]
            self.compile_left -= time.perf_counter() - start
        return found

    def conclude(
        self, row: dict[str, Any], case: Case, member: Structure, times: dict[str, float], entries: Sequence[Any]
    ) -> None:
        ours = {name: seconds for name, seconds in times.items() if name.startswith("ours")}
        row["times"] = {name: seconds for name, seconds in times.items() if name not in ours}
        if not ours:
            return
        best = min(ours, key=lambda name: ours[name])
        row["times"]["ours"], row["error"] = ours[best], row["errors"][best]
        row["tried"] = {name: ours[name] for name in ours}
        row["config"] = next(e["config"] for e in entries if f"ours {e['config_index']}" == best)
        moved, flops = work_of(case, member)
        row["of_copy"] = moved / ours[best] / self.card.bandwidth
        row["of_peak"] = flops / ours[best] / self.card.flops[case.dtype]


def problem_of(case: Case, member: Structure, dtype: Any) -> tuple[Any, Any, Any, tuple[int, ...]]:
    """(x, dense weight in float32, result in float64, shape of y), on the GPU."""
    generator = torch.Generator(device="cuda").manual_seed(1)
    if case.is_conv:
        channels, out, hw = CONVS[case.layer]
        x = torch.randn(case.rows, channels, hw, hw, device="cuda", generator=generator).to(dtype)
        weight = torch.as_tensor(member.factors["weight"]).cuda()
        reference = torch.conv2d(x.double(), weight.double(), padding=1)
        return x, weight, reference, (case.rows, out, hw, hw)
    out, inner = member.shape
    x = torch.randn(case.rows, inner, device="cuda", generator=generator).to(dtype)
    weight = torch.from_numpy(np.ascontiguousarray(member.dense())).cuda()
    return x, weight, x.double() @ weight.double().T, (case.rows, out)


def work_of(case: Case, member: Structure) -> tuple[int, int]:
    """(bytes that must move, operations) of one call."""
    size = 2 if case.dtype == "float16" else 4
    if case.is_conv:
        channels, out, hw = CONVS[case.layer]
        moved = size * (9 * channels * out + case.rows * hw * hw * (channels + out))
        return moved, member.flops(case.rows * hw * hw)
    return size * (member.num_params + case.rows * sum(member.shape)), member.flops(case.rows)
