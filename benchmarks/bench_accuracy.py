"""Accuracy against speed: the modified LeNet in every structured form, on 5000 MNIST digits, 1000 of them to test.

    python benchmarks/bench_accuracy.py [--quick] [--forms PATTERN] [--seeds 5] [--json accuracy.jsonl]
    python benchmarks/bench_accuracy.py --latency --json accuracy.jsonl     compiled latency of the trained networks
    python benchmarks/bench_accuracy.py --show --json accuracy.jsonl --plot accuracy.svg     tables in Markdown, figure

A form's layers are projected from a trained dense network, recovered layer by layer on unlabelled images, fine-tuned
with the dense network as teacher; and trained from scratch, with labels alone. Each seed has a split, initial weights
and an order of its own. Rows are written as they come, and an interrupted run goes on where it was.
"""

from __future__ import annotations

import fnmatch
import json
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import click
import torch
from lenet import EPOCHS, FORMS, QUICK_EPOCHS, measure, read_trained
from measuring import Timing, interleaved, machine, marked, print_table, relative_error
from to_markdown import line
from tqdm import tqdm

import tvm_structured as ts
from tvm_structured import demo
from tvm_structured.files import atomic

STAGES = ("projected", "recovered", "fine_tuned", "scratch")
HEADINGS = ("form", "parameters", "smaller", *STAGES, "us, batch 1", "x dense", "us, batch 64", "x dense")
QUICK = ("dense", "block-circulant 8", "low-rank")
BATCHES = (1, 64)
TOLERANCE = 1e-5  # relative to the largest output: the compiled network is the trained one
Rows = list[dict[str, Any]]


@click.command()
@click.option("--forms", "patterns", multiple=True, help="Only forms whose name matches, such as 'DeBut*'.")
@click.option("--seeds", default=5, show_default=True, help="Seeds 0, 1, ...")
@click.option("--seed", "chosen", multiple=True, type=int, help="Exactly these seeds instead.")
@click.option("--epochs", default=EPOCHS, show_default=True, help="Passes over the training part.")
@click.option("--processes", default=2, show_default=True, help="Trainings side by side, one thread each.")
@click.option("--scratch/--no-scratch", default=True, show_default=True, help="Train from scratch as well.")
@click.option("--latency", is_flag=True, help="Compile and time the trained networks of the first seed.")
@click.option("--show", is_flag=True, help="Measure nothing; print what the file holds, in Markdown.")
@click.option("--plot", "figure", type=click.Path(path_type=Path), help="Draw accuracy against latency (.svg, .png).")
@click.option("--quick", is_flag=True, help="Three forms, one seed, two epochs.")
@click.option("--json", "path", type=click.Path(path_type=Path), default=Path("accuracy.jsonl"), show_default=True)
def main(
    patterns: tuple[str, ...],
    seeds: int,
    chosen: tuple[int, ...],
    epochs: int,
    processes: int,
    scratch: bool,
    latency: bool,
    show: bool,
    figure: Path | None,
    quick: bool,
    path: Path,
) -> None:
    """Train, measure, and print the table of all that the file holds."""
    names = [name for name in (QUICK if quick and not patterns else FORMS) if matches(name, patterns)]
    if not names:
        raise click.ClickException(f"no form matches {' '.join(patterns)}; there are {', '.join(FORMS)}")
    wanted = list(chosen) or list(range(1 if quick else seeds))
    epochs = QUICK_EPOCHS if quick else epochs
    folder = path.parent / f"{path.stem}-checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    if latency:
        write_rows(
            path, [r for r in read_rows(path) if "times" not in r] + time_forms(names, wanted[0], epochs, folder)
        )
    elif not show:
        train_all(names, wanted, epochs, folder, path, processes, scratch)
    rows = read_rows(path)
    table = [cells(name, rows) for name in FORMS if any(row["form"] == name for row in rows)]
    if show:
        click.echo("\n".join([line(HEADINGS), line(["---"] * len(HEADINGS)), *map(line, table)]))
    else:
        print_table("accuracy in percent, mean and standard deviation over the seeds", HEADINGS, table)
    if figure is not None:
        draw(rows, figure)


def matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def read_rows(path: Path) -> Rows:
    if not path.exists():
        return []
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.strip()]


def write_rows(path: Path, rows: Rows) -> None:
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_all(
    names: Sequence[str], seeds: Sequence[int], epochs: int, folder: Path, path: Path, processes: int, scratch: bool
) -> None:
    """Every form with every seed that the file lacks; the dense networks, which are the teachers, first."""
    rows = read_rows(path)
    done = {(row["form"], row["seed"]) for row in rows if "accuracy" in row and row["epochs"] == epochs}
    tasks = [(name, seed) for seed in seeds for name in ("dense", *names) if (name, seed) not in done]
    tasks = list(dict.fromkeys(tasks))
    first = [task for task in tasks if task[0] == "dense"]
    rest = [task for task in tasks if task[0] != "dense"]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool, tqdm(total=len(tasks), desc="training", unit="form") as bar:
        for part in (first, rest):
            for future in as_completed([pool.submit(measure, *task, epochs, folder, scratch) for task in part]):
                rows.append(future.result())
                write_rows(path, rows)
                bar.update()


def time_forms(names: Sequence[str], seed: int, epochs: int, folder: Path) -> Rows:
    """Compiled networks in turns, and PyTorch on the dense one; each is checked against its torch module."""
    digits = demo.load_digits(seed)
    images = torch.from_numpy(digits.test_images)
    networks = {name: read_trained(name, seed, epochs, folder, digits) for name in names}
    found: dict[str, dict[str, Any]] = {name: {"times": {}, "error": 0.0} for name in names}
    for batch in BATCHES:
        x = images[:batch].clone()
        calls = {}
        for name, network in networks.items():
            compiled = ts.compile(network, inputs=(x,), target="host")
            with torch.no_grad():
                error = relative_error(compiled(x), network.double()(x.double()))
            network.float()
            if not error < TOLERANCE:
                raise click.ClickException(f"{name}: the compiled network differs by {error:.1e}")
            found[name]["error"] = max(found[name]["error"], error)
            calls[name] = lambda compiled=compiled, x=x: compiled(x)
        for name, timing in interleaved(calls, rounds=9).items():
            found[name]["times"][str(batch)] = {"seconds": timing.seconds, "spread": timing.spread}
    return [{"form": name, "seed": seed, "machine": machine(), **values} for name, values in found.items()]


def cells(name: str, rows: Rows) -> list[str]:
    """One line of the table: a form's mean and spread over the seeds, and its latency."""
    trained = [row for row in rows if row["form"] == name and "accuracy" in row]
    parameters = trained[0]["parameters"] if trained else 0
    dense = next((row["parameters"] for row in rows if row["form"] == "dense" and "accuracy" in row), 0)
    texts = [name, f"{parameters:,}", f"{dense / parameters:.1f}x" if parameters else "-"]
    texts += [percent([row["accuracy"][s] for row in trained if s in row["accuracy"]]) for s in STAGES]
    for batch in map(str, BATCHES):
        time, base = timing(rows, name, batch), timing(rows, "dense", batch)
        texts += [marked(time, 1e6, 1), f"{base.seconds / time.seconds:.2f}" if time and base else "-"]
    return texts


def percent(scores: Sequence[float]) -> str:
    """`97.31 ± 0.20`; `-` where a form has no such stage."""
    if not scores:
        return "-"
    spread = f" ± {100 * statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{100 * statistics.mean(scores):.2f}{spread}"


def timing(rows: Rows, name: str, batch: str) -> Timing | None:
    found = [row["times"][batch] for row in rows if row["form"] == name and batch in row.get("times", {})]
    return Timing(**found[-1]) if found else None


def draw(rows: Rows, path: Path) -> None:
    """Accuracy (fine-tuned; a dense network's: trained) against the latency of one image, error bars over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: a tenth of the size
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in FORMS:
        time = timing(rows, name, "1")
        scores = [
            r["accuracy"].get("fine_tuned", r["accuracy"].get("scratch"))
            for r in rows
            if r["form"] == name and "accuracy" in r
        ]
        if time is None or not scores:
            continue
        spread = 100 * statistics.stdev(scores) if len(scores) > 1 else 0.0
        marker = "s" if name.startswith("dense") else "o"
        axes.errorbar(time.seconds * 1e6, 100 * statistics.mean(scores), spread, fmt=marker, capsize=3, label=name)
    axes.set(xlabel="latency of one image, microseconds", ylabel="accuracy on 1000 test digits, percent")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    with atomic(path) as temporary:
        figure.savefig(temporary, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
