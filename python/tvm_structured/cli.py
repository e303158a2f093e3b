"""The command `tvm-structured`: inspect, plan, compile, run and report on .onnx and .pt2 files.

Exit codes: 0 done, 1 an error of ours (one line on standard error), 2 wrong usage.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from tvm_structured.cli_inputs import examples, limits, read_inputs, read_samples, read_target
from tvm_structured.errors import StructuredError
from tvm_structured.tuning.commands import db

MODEL = click.argument("model", type=click.Path(path_type=Path))
TARGET = click.option("--target", default="host", show_default=True, help="TVM target: a name, JSON, 'host', or 'vta'.")
BUDGET = click.option("--budget", type=float, help="At most this fraction of each layer's dense parameters, e.g. 0.25.")
MAX_FLOPS = click.option("--max-flops", type=float, help="At most this fraction of each layer's dense operations.")
MAX_ERROR = click.option("--max-error", type=float, help="At most this relative Frobenius error of each weight.")
PLAN = click.option("--plan", type=click.Path(path_type=Path), help="Use this plan instead of making one.")
MEASURE = click.option(
    "--measure/--no-measure", default=True, help="Time the candidates here, or predict their times (default: time)."
)
DATABASE = click.option("--database", type=click.Path(path_type=Path), help="What `tune` found: its --work-dir.")
SHAPE = click.option(
    "--shape", "shapes", multiple=True, metavar="NAME=1,3,224,224", help="Shape of an input that the model leaves open."
)


def chooses_structures(command: Callable[..., None]) -> Callable[..., None]:
    """The options by which the layers of a model get their structure; the command is handed what they mean:
    `model`, `inputs`, `target`, `budget` (None where nothing limits) and `measure`."""

    @functools.wraps(command)
    def call(
        model: Path,
        shapes: tuple[str, ...],
        target: str,
        budget: float | None,
        max_flops: float | None,
        max_error: float | None,
        **others: Any,
    ) -> None:
        inputs, budgeted = examples(model, shapes), limits(budget, max_flops, max_error)
        command(model=model, inputs=inputs, target=read_target(target), budget=budgeted, **others)

    for option in (MEASURE, MAX_ERROR, MAX_FLOPS, BUDGET, TARGET, SHAPE, MODEL):
        call = option(call)
    return call


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="tvm-structured")
def cli() -> None:
    """Structured weights that run faster, on Apache TVM."""


@cli.command()
@MODEL
@SHAPE
@click.option("--max-params", default=0.25, show_default=True, help="Size for which nearness is measured.")
def inspect(model: Path, shapes: tuple[str, ...], max_params: float) -> None:
    """Show what structure each layer has, and how near it is to each form."""
    from tvm_structured.inspection import inspect as look

    click.echo(str(look(model, examples(model, shapes), max_params)))


@cli.command()
@chooses_structures
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to save the plan (JSON).")
def plan(model: Path, inputs: Any, target: Any, budget: Any, measure: bool, output: Path | None) -> None:
    """Choose a structure for every layer; print the plan, or save it to be edited."""
    from tvm_structured.compiler import canonicalize, settle_plan
    from tvm_structured.frontend import import_model
    from tvm_structured.targets import resolve_target

    resolved = resolve_target(target)
    mod = canonicalize(import_model(model, inputs), resolved)
    chosen = settle_plan(mod, resolved, budget, measure=measure)
    click.echo(str(chosen))
    if output is not None:
        chosen.save(output)
        click.echo(f"saved {output}", err=True)


@cli.command("compile")
@chooses_structures
@PLAN
@DATABASE
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="Samples (.npy, or .npz by input): compute in int8."
)
@click.option("--vta-config", type=click.Path(path_type=Path), help="JSON of the accelerator, for --target vta.")
@click.option("--vta-trials", default=0, help="Schedules to try for every program of the accelerator.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The library to write (.so).")
def compile_command(model: Path, calibration: Path | None, output: Path, **options: Any) -> None:
    """Compile a model to a shared library and print the report."""
    from tvm_structured.compiler import compile as build
    from tvm_structured.module import check_destination

    check_destination(output)
    samples = None if calibration is None else read_samples(calibration)
    compiled = build(model, calibration=samples, **options)
    compiled.export(output)
    click.echo(str(compiled.report()))
    if compiled.vta is not None:
        click.echo(str(compiled.vta_stats()))
    click.echo(f"wrote {output}", err=True)


@cli.command()
@chooses_structures
@PLAN
@click.option("--trials", default=64, show_default=True, help="Configurations to look at for each kernel.")
@click.option("--work-dir", type=click.Path(path_type=Path), required=True, help="The database: a directory.")
@click.option("--time-budget", type=float, metavar="SECONDS", help="Begin no new trials after so long.")
@click.option("--seed", default=0, show_default=True, help="Of the search.")
@click.option("--rpc-tracker", metavar="HOST:PORT", help="Measure on the servers of this tracker of TVM's RPC.")
@click.option("--rpc-key", help="The key of the servers.")
@click.option("--timeout", default=30.0, show_default=True, metavar="SECONDS", help="To build or run one candidate.")
def tune(model: Path, **options: Any) -> None:
    """Search for the fastest kernels of a model. A session that was stopped goes on when it is started again."""
    from tvm_structured.tuning.api import tune as run_session

    run_session(model, **options)


@cli.command()
@click.argument("library", type=click.Path(path_type=Path))
@click.option("--input", "inputs", multiple=True, metavar="NAME=FILE.npy", help="An input; random numbers otherwise.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Save the outputs here (.npz).")
@click.option("--time", "timed", is_flag=True, help="Also measure the median run time.")
def run(library: Path, inputs: tuple[str, ...], output: Path | None, timed: bool) -> None:
    """Run an exported library."""
    from tvm_structured.files import atomic
    from tvm_structured.module import load

    module = load(library)
    arrays = read_inputs(module, inputs)
    outputs = module(**arrays)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for index, array in enumerate(outputs):
        click.echo(f"output {index}: {array.dtype}{list(array.shape)} min {array.min():.6g} max {array.max():.6g}")
    if "vta" in module.metadata:
        click.echo(str(module.vta_stats()))
    if timed:
        click.echo(f"median {module.time(**arrays) * 1e3:.4f} ms")
    if output is not None:
        with atomic(output if output.suffix == ".npz" else output.with_suffix(".npz")) as temporary:
            np.savez(temporary, *outputs)


@cli.command()
@click.argument("library", type=click.Path(path_type=Path))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report as JSON.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write the report as an HTML page.")
def report(library: Path, json_path: Path | None, html_path: Path | None) -> None:
    """Print what an exported library is made of."""
    from tvm_structured.module import load

    found = load(library).report()
    click.echo(str(found))
    if json_path is not None:
        found.to_json(json_path)
    if html_path is not None:
        found.to_html(html_path)


@cli.command()
@click.argument("library", type=click.Path(path_type=Path))
@click.option("--input", "inputs", multiple=True, metavar="NAME=FILE.npy", help="An input; random numbers otherwise.")
@click.option("--repeat", default=10, show_default=True, help="Runs to take the median of.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the profile as JSON.")
@click.option("--html", "html_path", type=click.Path(path_type=Path), help="Write the profile as an HTML page.")
def profile(
    library: Path, inputs: tuple[str, ...], repeat: int, json_path: Path | None, html_path: Path | None
) -> None:
    """Run an exported library and print where the time goes."""
    from tvm_structured.module import load

    module = load(library)
    taken = module.profile(repeat=repeat, **read_inputs(module, inputs))
    click.echo(str(taken))
    if json_path is not None:
        taken.to_json(json_path)
    if html_path is not None:
        taken.to_html(html_path)


@cli.command()
@click.option("--roofline", "with_roofline", is_flag=True, help="Measure this machine's peak and bandwidths.")
def costs(with_roofline: bool) -> None:
    """Print where measured costs are kept, and how many there are."""
    from tvm_structured.cost_store import CostStore

    store = CostStore()
    click.echo(f"{store.path}: {len(store)} measured costs (set TVM_STRUCTURED_CACHE to keep them elsewhere)")
    if with_roofline:
        from tvm_structured.roofline import machine_key, roofline

        click.echo(f"{machine_key()}: {roofline(again=True)}")


cli.add_command(db)


@cli.group()
def vta() -> None:
    """The accelerator: check its simulator (compile to it with --target vta)."""


@vta.command("check-golden")
@click.argument("folder", type=click.Path(path_type=Path))
@TARGET
def check_golden(folder: Path, target: str) -> None:
    """Run each program with a known result (.npz) in FOLDER, under every start order of the modules."""
    from tvm_structured.vta.golden import check_folder

    counts = {True: 0, False: 0}
    for name, wrong in check_folder(folder, read_target(target)):
        counts[not wrong] += 1
        if wrong:
            click.echo(f"{name}: {wrong}")
    click.echo(f"{counts[True]} passed, {counts[False]} failed")
    if counts[False]:
        raise click.exceptions.Exit(1)


def main() -> None:
    """Entry point: errors of ours are one line and exit code 1."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.Abort:
        click.echo("stopped", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (StructuredError, OSError) as error:
        click.echo(f"tvm-structured: {error}", err=True)
        sys.exit(1)
