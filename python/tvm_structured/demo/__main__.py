"""`make demo`: train a network with structured layers on real digits, compile it, check it, time it, export it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import tvm_structured as ts
from tvm_structured.demo import Digits, StructuredLeNet, load_digits, train
from tvm_structured.metrics import interleaved_medians
from tvm_structured.targets import physical_cores

BATCH = 100
TOLERANCE = 1e-4  # on logits of order 10


@click.command()
@click.option("--epochs", default=8, show_default=True, help="Passes over the training images.")
@click.option("-o", "--output", "folder", default="out", show_default=True, type=click.Path(path_type=Path))
def main(epochs: int, folder: Path) -> None:
    """Digits end to end: torch in, a verified library out."""
    say = Console(width=160 if not sys.stdout.isatty() else None)
    torch.set_num_threads(physical_cores())
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)

    say.rule("1. train")
    digits, network = load_digits(), StructuredLeNet()
    trained = train(network, digits, epochs=epochs)
    total = len(digits.test_labels)
    say.print(f"{digits.source}: {trained.accuracy:.1%} of {total} test images right after {trained.seconds:.0f} s")

    say.rule("2. compile")
    images = torch.from_numpy(digits.test_images)
    compiled = ts.compile(network, inputs=(images[:BATCH],), target="host")
    say.print(compiled.report())

    say.rule("3. check against PyTorch on the whole test set")
    expected, found = logits(network, images), np.concatenate([compiled(part).numpy() for part in batches(images)])
    compare(say, expected, found, "the compiled module")

    say.rule("4. time")
    say.print(timings(network, compiled, images))

    say.rule("5. export, and run the file in a fresh process")
    library = compiled.export(folder / "digits.so")
    compiled.report().to_html(folder / "report.html")
    compiled.report().to_json(folder / "report.json")
    compiled.plan.save(folder / "plan.json")
    compare(say, expected, run_in_fresh_process(library, digits, folder), "the library")
    say.print(f"wrote {library}, {folder / 'report.html'}, {folder / 'report.json'} and {folder / 'plan.json'}")


def batches(images: torch.Tensor) -> list[torch.Tensor]:
    """Whole batches; the last one is filled up with the first images."""
    short = -len(images) % BATCH
    return list(torch.cat([images, images[:short]]).split(BATCH))


def logits(network: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([network(part).numpy() for part in batches(images)])


def compare(say: Console, expected: np.ndarray, found: np.ndarray, what: str) -> None:
    """Print the largest difference; end the program where a prediction differs or the difference is too large."""
    error = float(np.abs(found - expected).max())
    differing = int((found.argmax(1) != expected.argmax(1)).sum())
    say.print(f"{what}: {differing} of {len(expected)} predictions differ, largest difference of a logit {error:.1e}")
    if differing or not error < TOLERANCE:
        raise click.ClickException(f"{what} does not agree with PyTorch")


def timings(network: torch.nn.Module, batched: ts.Compiled, images: torch.Tensor) -> Table:
    """Milliseconds for one run, PyTorch and compiled in turns, at batch 1 and at the batch of the demo."""
    table = Table(title=f"median of one run, {physical_cores()} threads", title_justify="left")
    for heading in ("batch", "PyTorch", "compiled", "ratio"):
        table.add_column(heading, justify="right")
    single = ts.compile(network, inputs=(images[:1],), target="host")
    for module, x in ((single, images[:1]), (batched, images[:BATCH])):
        with torch.no_grad():
            times = interleaved_medians({"torch": lambda x=x: network(x), "ours": lambda m=module, x=x: m(x)})
        ratio = times["torch"] / times["ours"]
        table.add_row(str(len(x)), f"{times['torch'] * 1e3:.3f} ms", f"{times['ours'] * 1e3:.3f} ms", f"{ratio:.2f}x")
    return table


def run_in_fresh_process(library: Path, digits: Digits, folder: Path) -> np.ndarray:
    """The library's logits, from a process that loads TVM's runtime only."""
    images, answers = folder / "images.npy", folder / "logits.npy"
    np.save(images, np.stack([part.numpy() for part in batches(torch.from_numpy(digits.test_images))]))
    script = (
        "import sys, numpy as np, tvm_structured as ts\n"
        "module = ts.load(sys.argv[1])\n"
        "np.save(sys.argv[3], np.concatenate([module(x) for x in np.load(sys.argv[2])]))\n"
    )
    environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1"}
    subprocess.run([sys.executable, "-c", script, library, images, answers], check=True, env=environment)
    return np.load(answers)


if __name__ == "__main__":
    main()
