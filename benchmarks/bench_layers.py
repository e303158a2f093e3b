"""One dense layer in every structured form, through the public API, against PyTorch and ONNX Runtime.

    python benchmarks/bench_layers.py [--quick] [--rows PATTERN] [--batch N] [--json out.json]

Each row is a torch.nn.Linear whose weight has the structure; `ts.compile` compiles it with that plan. All run in
turns in one process, a time is the median of the turns. The result is compared with float64 in the same run.
`of bound` is the share of what the machine was measured to allow for these bytes and operations.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from measuring import Timing, describe_machine, interleaved, microseconds, print_table, relative_error, write_json
from model_peers import Call
from peers import linear_peers
from rich.progress import track

import tvm_structured as ts
from tvm_structured.roofline import roofline
from tvm_structured.structures.debut_chain import butterfly
from tvm_structured.targets import physical_cores

MODES = {"out_modes": (16, 16, 16), "in_modes": (16, 16, 16)}
NATURAL = {"indexing": "natural"}
TOLERANCE = 1e-4  # relative to the largest output
PEERS = ("torch", "torch.compile", "torch mkldnn", "ort")
HEADINGS = ("layer", "batch", *PEERS, "ours", "x torch", "x ORT", "x best", "GFLOP/s", "of bound", "error")


@dataclass(frozen=True)
class Form:
    """A layer of (out, inner) numbers in a structured form; `family` None is the plain dense layer."""

    family: str | None = None
    size: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, int] = (4096, 4096)


FORMS: dict[str, Form] = {
    "dense 1024x1024": Form(shape=(1024, 1024)),
    "dense": Form(),
    "dense 4096x9216": Form(shape=(4096, 9216)),
    **{f"block-circulant {n}": Form("block_circulant", {"block": n}) for n in (8, 16, 32, 64)},
    **{f"block-circulant {n}, 4096x9216": Form("block_circulant", {"block": n}, (4096, 9216)) for n in (8, 16)},
    **{f"permuted-diagonal {p}": Form("permuted_diagonal", {"block": p}) for p in (4, 8, 10, 16)},
    **{f"permuted-diagonal {p}, natural": Form("permuted_diagonal", {"block": p, **NATURAL}) for p in (4, 8, 16)},
    **{f"permuted-diagonal {p}, 4096x9216": Form("permuted_diagonal", {"block": p}, (4096, 9216)) for p in (4, 8, 16)},
    **{f"tensor-train 16^3 rank {r}": Form("tensor_train", {**MODES, "rank": r}) for r in (4, 8, 16)},
    "low rank N/8": Form("low_rank", {"rank": 512}),
    "butterfly radix 16": Form("debut", {"chain": butterfly(4096, 16)}),
    "butterfly radix 2": Form("debut", {"chain": butterfly(4096)}),
    "Monarch 64x64": Form("debut", {"chain": butterfly(4096, 64)}),
    "Toeplitz-like rank 2": Form("toeplitz_like", {"rank": 2}),
}
QUICK = ("dense", "block-circulant 16", "permuted-diagonal 8")


@click.command()
@click.option("--rows", "patterns", multiple=True, help="Only rows whose name matches, such as 'dense*'.")
@click.option("--batch", "batches", multiple=True, type=int, help="Batch sizes [default: 1 16 128].")
@click.option("--quick", is_flag=True, help="Three forms, two batches, few rounds.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(patterns: tuple[str, ...], batches: tuple[int, ...], quick: bool, path: Path | None) -> None:
    """Print the table."""
    torch.set_num_threads(physical_cores())
    batches = batches or ((1, 16) if quick else (1, 16, 128))
    names = [name for name in (QUICK if quick and not patterns else FORMS) if matches(name, patterns)]
    if not names:
        raise click.ClickException(f"no row matches {' '.join(patterns)}; there are {', '.join(FORMS)}")
    rows = []
    cases = [(name, batch) for batch in batches for name in names]
    for name, batch in track(cases, description="layers", transient=True):
        rows.append(measure(name, FORMS[name], batch, rounds=3 if quick else 7))
        write_json(path, rows)
    print_table(f"microseconds: {describe_machine()}", HEADINGS, [cells(row) for row in rows], [f"bound: {roofline()}"])


def matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def measure(name: str, form: Form, batch: int, rounds: int) -> dict[str, Any]:
    """One row: times of all, and our largest error relative to the largest output."""
    module, x, plan = layer(form, batch)
    compiled = ts.compile(module, inputs=(x,), target="host", plan=plan)
    weight, choice = module.weight.numpy(), plan.choices.get("weight")
    expected = x.numpy().astype(np.float64) @ weight.T.astype(np.float64)
    error = relative_error(compiled(x), expected)
    if not error < TOLERANCE:
        raise click.ClickException(f"{name}, batch {batch}: relative error {error:.1e}")
    times = interleaved({**peers_of(form.shape, batch), "ours": lambda: compiled(x)}, rounds)
    flops = 2 * batch * weight.size if choice is None else choice.flops(batch)
    weight_bytes = 4 * weight.size if choice is None else choice.num_bytes
    machine, moved = roofline(), weight_bytes + 4 * batch * sum(weight.shape)
    assert machine is not None
    return {
        "layer": name,
        "shape": form.shape,
        "batch": batch,
        "times": {who: {"seconds": timing.seconds, "spread": timing.spread} for who, timing in times.items()},
        "error": error,
        "gflops": flops / times["ours"].seconds / 1e9,
        "weight_bytes": weight_bytes,
        "of_bound": machine.fraction_of_bound(flops, moved, times["ours"].seconds),
    }


def layer(form: Form, batch: int) -> tuple[torch.nn.Linear, torch.Tensor, ts.Plan]:
    """A torch layer without bias whose weight has the form, an input in torch's own memory (aligned as TVM wants it, an
    array of numpy would be copied), and the plan that names the form."""
    choice, weight = member_of(form)
    module = torch.nn.Linear(form.shape[1], form.shape[0], bias=False).eval().requires_grad_(False)
    module.weight.data = torch.from_numpy(weight)
    x = torch.randn(batch, form.shape[1], generator=torch.Generator().manual_seed(1))
    return module, x, ts.Plan({} if choice is None else {"weight": choice})


def member_of(form: Form) -> tuple[Any, np.ndarray]:
    """(structure, its dense weight); None for the plain layer."""
    weight = (np.random.default_rng(0).standard_normal(form.shape) / np.sqrt(form.shape[1])).astype(np.float32)
    if form.family is None:
        return None, weight
    choice = ts.STRUCTURES[form.family].from_dense(ts.Dense("weight", weight), **form.size)
    return choice, np.ascontiguousarray(choice.dense(), dtype=np.float32)


@functools.cache
def peers_of(shape: tuple[int, int], batch: int) -> dict[str, Call]:
    """The peers multiply by all numbers whatever they are: one of each serves all forms of a shape."""
    rng = np.random.default_rng(2)
    weight = (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
    return linear_peers(weight, rng.standard_normal((batch, shape[1])).astype(np.float32))


def cells(row: dict[str, Any]) -> list[str]:
    times = {who: Timing(**values) for who, values in row["times"].items()}
    ours = times["ours"].seconds
    best = min(times[peer].seconds for peer in PEERS)
    ratios = [f"{seconds / ours:.1f}" for seconds in (times["torch"].seconds, times["ort"].seconds, best)]
    ratios += [f"{row['gflops']:.0f}", f"{row['of_bound']:.0%}", f"{row['error']:.0e}"]
    return [row["layer"], str(row["batch"]), *(microseconds(times[who]) for who in (*PEERS, "ours")), *ratios]


if __name__ == "__main__":
    main()
