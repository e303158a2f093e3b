"""Whole models, compiled by `ts.compile`, against PyTorch, ONNX Runtime and plain TVM.

    python benchmarks/bench_models.py [--model resnet18] [--batch 1] [--quick] [--json out.json]

"lossless" computes the same function as the torch module: Winograd and good kernels only. "structured" is the same
network with block-circulant dense layers (16 in AlexNet and VGG, 8 in the encoders), compiled with the plan of the
lossless one and these choices; its peers are the torch times of the dense network, since PyTorch and ONNX Runtime do
not look at the values of weights. All of one model and batch are measured in turns in one process, except plain TVM,
whose kernels may take minutes: a process of its own with a time limit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from children import ChildFailed, in_child, plain_tvm_run
from measuring import Call, Timing, describe_machine, interleaved, milliseconds, print_table, relative_error, write_json
from model_peers import PEERS, eager, to_numpy
from networks import NETWORKS, EncoderLayer, network
from torch import nn

import tvm_structured as ts
from tvm_structured.structures import BlockCirculant, Structure
from tvm_structured.targets import physical_cores

TOLERANCE = 1e-4  # relative to the largest output
QUICK_PEERS = ("eager", "channels_last", "prepacked", "onnxruntime")  # those that start at once
BLOCKS = {"alexnet": 16, "vgg16": 16, "vit_b16": 8, "bert_base": 8}
FORMS = ("lossless", "structured")
COLUMNS = (*PEERS, "plain_tvm", *FORMS)
TVM_LIMIT = 45.0  # seconds for plain TVM from its start, imports and compilation included
TVM_RUNS = 6.0  # seconds of runs that are counted


RATIOS = ("model, batch", "lossless x best", "x ORT", "x TVM", "structured x best", "x ORT", "error", "compile s")


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(NETWORKS)), help="Networks [default: all].")
@click.option("--batch", "batches", multiple=True, type=int, help="Batch sizes [default: 1 16].")
@click.option("--quick", is_flag=True, help="Batch 1, few rounds, without torch.compile and plain TVM.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows as JSON.")
@click.option("--forms", default="lossless,structured", show_default=True, help="What of ours to measure.")
def main(models: Sequence[str], batches: Sequence[int], quick: bool, path: Path | None, forms: str) -> None:
    """Print the tables."""
    torch.set_num_threads(physical_cores())
    wanted = forms.split(",")
    if unknown := set(wanted) - set(FORMS):
        raise click.UsageError(f"--forms {forms}: unknown {', '.join(sorted(unknown))}; known: {', '.join(FORMS)}")
    machine, rows = describe_machine(), []
    for model in models or list(NETWORKS):
        for batch in batches or ((1,) if quick else (1, 16)):
            start = time.perf_counter()
            row = measure(model, batch, wanted, quick)
            rows.append(row)
            click.echo(f"{model}, batch {batch}: {time.perf_counter() - start:.0f} s", err=True)
            write_json(path, rows)
    show(machine, rows)


def measure(model: str, batch: int, forms: Sequence[str], quick: bool) -> dict[str, Any]:
    """One row: times by column, errors of all, compile seconds of ours, and why a column is empty."""
    module, x = network(model, batch)
    expected = to_numpy(eager(module, x)())
    calls: dict[str, Call] = {}
    row: dict[str, Any] = {"model": model, "batch": batch, "errors": {}, "missing": {}, "compile_seconds": {}}
    for name in PEERS:
        if quick and name not in QUICK_PEERS:
            row["missing"][name] = "left out by --quick"
            continue
        try:
            call = PEERS[name](module, x)
            error = check(f"{model}, batch {batch}, {name}", call, expected)
        except click.ClickException:
            raise
        except Exception as problem:  # whatever a peer cannot do; the table says so
            row["missing"][name] = one_line(problem)
            continue
        calls[name], row["errors"][name] = call, error
    if quick:
        row["missing"]["plain_tvm"] = "left out by --quick"
    row["missing"] |= {form: "left out by --forms" for form in FORMS if form not in forms}
    plan: ts.Plan | None = None
    for form in forms:
        if form == "structured" and model not in BLOCKS:
            row["missing"][form] = "no dense layers worth a structure"
            continue
        changed, choices = (module, {}) if form == "lossless" else block_circulant(module, BLOCKS[model])
        if choices:
            # without the lossless plan the convolutions are compared anew, and the structure is found, not given
            plan = plan and with_choices(plan, choices)
        start = time.perf_counter()
        compiled = ts.compile(changed, (x,), target="host", plan=plan if choices else None)
        row["compile_seconds"][form] = time.perf_counter() - start
        plan = compiled.plan
        calls[form] = lambda compiled=compiled: compiled(x)
        reference = expected if form == "lossless" else to_numpy(eager(changed, x)())
        row["errors"][form] = check(f"{model}, batch {batch}, {form}", calls[form], reference)
    timings = interleaved(calls, rounds=3 if quick else 9)
    if not quick:
        add_plain_tvm(row, timings, expected)
    return {**row, "times": {n: {"seconds": t.seconds, "spread": t.spread} for n, t in timings.items()}}


def check(what: str, call: Call, expected: Any) -> float:
    """Our error or a peer's; a wrong result ends the benchmark."""
    error = relative_error(to_numpy(call()), expected)
    if not error < TOLERANCE:
        raise click.ClickException(f"{what}: relative error {error:.1e}, more than {TOLERANCE:.0e}")
    return error


def add_plain_tvm(row: dict[str, Any], timings: dict[str, Timing], expected: Any) -> None:
    model, batch = row["model"], row["batch"]
    try:
        output, times = in_child(plain_tvm_run, model, batch, TVM_RUNS, limit=TVM_LIMIT)
    except ChildFailed as problem:
        row["missing"]["plain_tvm"] = one_line(problem)
        return
    row["errors"]["plain_tvm"] = check(f"{model}, batch {batch}, plain TVM", lambda: output, expected)
    timings["plain_tvm"] = Timing.of(times)


def block_circulant(module: nn.Module, block: int) -> tuple[nn.Module, dict[str, Structure]]:
    """A copy whose dense layers (those inside the encoder layers, where there are any) are block-circulant, and the
    structures by parameter name.

    The projection keeps 1 / block of a random matrix's square norm; it is scaled so that activations stay as large.
    """
    changed, choices = copy.deepcopy(module), {}
    encoders = [name for name, part in changed.named_modules() if isinstance(part, EncoderLayer)]
    for name, part in changed.named_modules():
        inside = any(name.startswith(f"{encoder}.") for encoder in encoders) or not encoders
        if not isinstance(part, nn.Linear) or not inside:
            continue
        nearest = BlockCirculant.from_dense(ts.Dense("weight", part.weight.numpy()), block=block)
        member = replace(nearest, c=(nearest.c * block**0.5).astype(np.float32))
        part.weight.copy_(torch.from_numpy(member.dense()))
        choices[f"{name}.weight"] = member
    return changed, choices


def with_choices(plan: ts.Plan, choices: dict[str, Structure]) -> ts.Plan:
    """The plan with other choices for some layers, whose notes go: they speak of other weights."""
    notes = {name: note for name, note in plan.notes.items() if name not in choices}
    return ts.Plan({**plan.choices, **choices}, notes)


def one_line(problem: BaseException) -> str:
    text = str(problem).strip().splitlines() or [type(problem).__name__]
    sentence = text[0].partition(". ")[0]
    return sentence if len(sentence) <= 160 else sentence[:157] + "..."


def show(machine: str, rows: Sequence[dict[str, Any]]) -> None:
    """The table of times and the table of ratios."""
    table = []
    for row in rows:
        times = {name: Timing(**values) for name, values in row["times"].items()}
        table.append([label(row), *(milliseconds(times.get(name)) for name in COLUMNS)])
    print_table(f"milliseconds: {machine}", ["model, batch", *COLUMNS], table, missing(rows))
    print_table("times faster", RATIOS, [ratios(row) for row in rows], ["best: the fastest of PyTorch and ORT"])


def label(row: dict[str, Any]) -> str:
    return f"{row['model']}, {row['batch']}"


def missing(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why columns are empty, each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, reason in row["missing"].items():
            reasons.setdefault(f"{name}: {reason}", []).append(label(row))
    return [f"- {reason} ({'; '.join(labels)})" for reason, labels in reasons.items()]


def ratios(row: dict[str, Any]) -> list[str]:
    seconds = {name: values["seconds"] for name, values in row["times"].items()}
    best = min((seconds[name] for name in PEERS if name in seconds), default=None)
    texts = [label(row)]
    for form, others in (("lossless", (best, "onnxruntime", "plain_tvm")), ("structured", (best, "onnxruntime"))):
        for other in others:
            than = seconds.get(other) if isinstance(other, str) else other
            texts.append(f"{than / seconds[form]:.2f}" if than and form in seconds else "-")
    ours = [row["errors"][form] for form in ("lossless", "structured") if form in row["errors"]]
    texts.append(f"{max(ours):.0e}" if ours else "-")
    texts.append(" ".join(f"{value:.0f}" for value in row["compile_seconds"].values()) or "-")
    return texts


if __name__ == "__main__":
    main()
