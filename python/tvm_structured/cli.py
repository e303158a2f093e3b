"""The command `tvm-structured`: inspect, plan, compile, run and report on .onnx and .pt2 files.

Exit codes: 0 done, 1 an error of ours (one line on standard error), 2 wrong usage.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import numpy as np

from tvm_structured.errors import ModelError, StructuredError
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


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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
@MODEL
@SHAPE
@BUDGET
@MAX_FLOPS
@MAX_ERROR
@TARGET
@MEASURE
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where to save the plan (JSON).")
def plan(
    model: Path,
    shapes: tuple[str, ...],
    budget: float,
    max_flops: float,
    max_error: float,
    target: str,
    measure: bool,
    output: Path | None,
) -> None:
    """Choose a structure for every layer; print the plan, or save it to be edited."""
    from tvm_structured.compiler import canonicalize, settle_plan
    from tvm_structured.frontend import import_model
    from tvm_structured.targets import resolve_target

    resolved = resolve_target(read_target(target))
    mod = canonicalize(import_model(model, examples(model, shapes)), resolved)
    chosen = settle_plan(mod, resolved, limits(budget, max_flops, max_error), measure=measure)
    click.echo(str(chosen))
    if output is not None:
        chosen.save(output)
        click.echo(f"saved {output}", err=True)


@cli.command("compile")
@MODEL
@SHAPE
@TARGET
@BUDGET
@MAX_FLOPS
@MAX_ERROR
@PLAN
@MEASURE
@DATABASE
@click.option(
    "--calibration", type=click.Path(path_type=Path), help="Samples (.npy, or .npz by input): compute in int8."
)
@click.option("--vta-config", type=click.Path(path_type=Path), help="JSON of the accelerator, for --target vta.")
@click.option("--vta-trials", default=0, help="Schedules to try for every program of the accelerator.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The library to write (.so).")
def compile_command(
    model: Path,
    shapes: tuple[str, ...],
    target: str,
    budget: float,
    max_flops: float,
    max_error: float,
    plan: Path | None,
    measure: bool,
    database: Path | None,
    calibration: Path | None,
    vta_config: Path | None,
    vta_trials: int,
    output: Path,
) -> None:
    """Compile a model to a shared library and print the report."""
    from tvm_structured.compiler import compile as build

    compiled = build(
        model,
        examples(model, shapes),
        read_target(target),
        limits(budget, max_flops, max_error),
        plan,
        database,
        measure,
        calibration=None if calibration is None else read_samples(calibration),
        vta_config=vta_config,
        vta_trials=vta_trials,
    )
    compiled.export(output)
    click.echo(str(compiled.report()))
    if compiled.vta is not None:
        click.echo(str(compiled.vta_stats()))
    click.echo(f"wrote {output}", err=True)


@cli.command()
@MODEL
@SHAPE
@TARGET
@BUDGET
@MAX_FLOPS
@MAX_ERROR
@PLAN
@MEASURE
@click.option("--trials", default=64, show_default=True, help="Configurations to look at for each kernel.")
@click.option("--work-dir", type=click.Path(path_type=Path), required=True, help="The database: a directory.")
@click.option("--time-budget", type=float, metavar="SECONDS", help="Begin no new trials after so long.")
@click.option("--seed", default=0, show_default=True, help="Of the search.")
@click.option("--rpc-tracker", metavar="HOST:PORT", help="Measure on the servers of this tracker of TVM's RPC.")
@click.option("--rpc-key", help="The key of the servers.")
@click.option("--timeout", default=30.0, show_default=True, metavar="SECONDS", help="To build or run one candidate.")
def tune(
    model: Path,
    shapes: tuple[str, ...],
    target: str,
    budget: float,
    max_flops: float,
    max_error: float,
    plan: Path | None,
    **session: Any,
) -> None:
    """Search for the fastest kernels of a model. A session that was stopped goes on when it is started again."""
    from tvm_structured.tuning.api import tune as run_session

    limited = limits(budget, max_flops, max_error)
    run_session(model, examples(model, shapes), read_target(target), budget=limited, plan=plan, **session)


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
@click.option("--roofline", "with_roofline", is_flag=True, help="Also this machine's peak and bandwidths (measured).")
def costs(with_roofline: bool) -> None:
    """Print where measured costs are kept, and how many there are."""
    from tvm_structured.cost_store import CostStore

    store = CostStore()
    click.echo(f"{store.path}: {len(store)} measured costs (set TVM_STRUCTURED_CACHE to keep them elsewhere)")
    if with_roofline:
        from tvm_structured.roofline import machine_key, roofline

        click.echo(f"{machine_key()}: {roofline()}")


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


def read_inputs(module: Any, texts: tuple[str, ...]) -> dict[str, Any]:
    """NAME=FILE.npy texts as arrays; random numbers for the other inputs."""
    given = {name: read_array(Path(file)) for name, file in (split(text, "--input") for text in texts)}
    rng = np.random.default_rng(0)
    return {**given, **{spec.name: random_input(spec, rng) for spec in module.inputs if spec.name not in given}}


def limits(max_params: float | None, max_flops: float | None, max_error: float | None) -> Any:
    """A Budget, or None where nothing limits."""
    from tvm_structured.structures import Budget

    if max_params is None and max_flops is None and max_error is None:
        return None
    return Budget(max_params, max_flops, max_error)


def read_target(text: str) -> Any:
    """A target given as JSON becomes a dict."""
    import json

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
    except (OSError, ValueError, EOFError) as error:
        raise ModelError(f"{path}: not a readable .npy file ({error})") from None


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
