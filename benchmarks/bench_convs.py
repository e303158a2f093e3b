"""The distinct convolutions of VGG-16 and ResNet-50, with bias and ReLU, against PyTorch and ONNX Runtime.

    python benchmarks/bench_convs.py [--network vgg16] [--batch 1] [--quick] [--json out.json]

Each row is a torch module compiled by `ts.compile`, NCHW in and NCHW out, whose algorithm the guard chose by
measurement. PyTorch also runs with channels-last and with oneDNN's blocked layout, its input converted beforehand;
ours and ONNX Runtime convert inside. All of one layer are timed in turns in one process; results are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from measuring import Call, Timing, describe_machine, interleaved, microseconds, print_table, relative_error, write_json
from model_peers import channels_last, eager, onnx_runtime_conv, prepacked, to_numpy
from networks import NETWORKS, randomize
from torch import nn

import tvm_structured as ts
from tvm_structured.roofline import roofline
from tvm_structured.targets import physical_cores

PEERS = {"eager": eager, "channels_last": channels_last, "prepacked": prepacked, "onnxruntime": onnx_runtime_conv}
TOLERANCE = 1e-4  # relative to the largest output
QUICK_ROWS = 3


@dataclass(frozen=True)
class Convolution:
    """Channels, kernel, stride and padding (the same in both directions), size of the input's images."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    image: int

    def __str__(self) -> str:
        stride = f" /{self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride} {self.inputs}->{self.outputs} @ {self.image}"

    def module(self) -> nn.Sequential:
        """Convolution with bias, then ReLU; random weights."""
        conv = nn.Conv2d(self.inputs, self.outputs, self.kernel, self.stride, self.padding).requires_grad_(False)
        randomize(conv, torch.Generator().manual_seed(0))
        return nn.Sequential(conv, nn.ReLU()).eval()


def convolutions(network: str) -> list[Convolution]:
    """The distinct ones of a network, in order."""
    found: dict[Convolution, None] = {}

    def note(conv: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        size = (conv.in_channels, conv.out_channels, conv.kernel_size[0], conv.stride[0], conv.padding[0])
        found[Convolution(*size, inputs[0].shape[-1])] = None

    make, shape = NETWORKS[network]
    with torch.device("meta"):  # shapes only
        module = make().eval()
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                part.register_forward_hook(note)
        module(torch.empty((1, *shape)))
    return list(found)


HEADINGS = ("layer", "algorithm", *PEERS, "ours", *(f"x {name}" for name in PEERS), "x best", "of peak", "error")


@click.command()
@click.option("--network", "networks", multiple=True, type=click.Choice(["vgg16", "resnet50"]), help="[default: both]")
@click.option("--batch", "batches", multiple=True, type=int, default=(1,), show_default=True, help="Batch sizes.")
@click.option("--quick", is_flag=True, help=f"The last {QUICK_ROWS} layers of each network, few rounds.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the rows as JSON.")
def main(networks: Sequence[str], batches: Sequence[int], quick: bool, path: Path | None) -> None:
    """Print the tables."""
    torch.set_num_threads(physical_cores())
    rows = []
    for network in networks or ("vgg16", "resnet50"):
        layers = convolutions(network)
        for batch in batches:
            measured = [measure(c, batch, 3 if quick else 9) for c in (layers[-QUICK_ROWS:] if quick else layers)]
            show(f"{network}, batch {batch}, microseconds: {describe_machine()}", measured)
            rows += [{"network": network, **row} for row in measured]
            write_json(path, rows)


def measure(layer: Convolution, batch: int, rounds: int) -> dict[str, Any]:
    """One row: times, our error relative to the largest output, the chosen algorithm and its share of the peak."""
    module = layer.module()
    x = torch.randn((batch, layer.inputs, layer.image, layer.image), generator=torch.Generator().manual_seed(1))
    expected = to_numpy(eager(module, x)())
    calls: dict[str, Call] = {name: make(module, x) for name, make in PEERS.items()}
    compiled = ts.compile(module, (x,), target="host")
    calls["ours"] = lambda: compiled(x)
    errors = {name: relative_error(to_numpy(call()), expected) for name, call in calls.items()}
    worst = max(errors, key=lambda name: errors[name])
    if not errors[worst] < TOLERANCE:
        raise click.ClickException(f"{layer}, batch {batch}: {worst} has relative error {errors[worst]:.1e}")
    timings = interleaved(calls, rounds)
    (row,) = compiled.report().rows
    machine = roofline()
    assert machine is not None
    rate = row.flops / timings["ours"].seconds
    return {
        "layer": str(layer),
        "batch": batch,
        "algorithm": f"{row.structure} {row.size}".strip(),
        "times": {name: {"seconds": t.seconds, "spread": t.spread} for name, t in timings.items()},
        "error": errors["ours"],
        "dense_flops": row.dense_flops,
        "flops": row.flops,
        "of_peak": rate / machine.peak_flops,
    }


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    notes = ["of peak: operations of the chosen algorithm, as a share of the machine's multiply-adds from registers"]
    print_table(title, HEADINGS, [cells(row) for row in rows], notes)


def cells(row: dict[str, Any]) -> list[str]:
    times = {name: Timing(**values) for name, values in row["times"].items()}
    ratios = [times[name].seconds / times["ours"].seconds for name in PEERS]
    return [
        *(row["layer"], row["algorithm"]),
        *(microseconds(times[name]) for name in (*PEERS, "ours")),
        *(f"{ratio:.2f}" for ratio in (*ratios, min(ratios))),
        *(f"{row['of_peak']:.0%}", f"{row['error']:.0e}"),
    ]


if __name__ == "__main__":
    main()
