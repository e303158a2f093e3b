"""Benchmarks are run by hand; here they are imported and measure one small layer, so that they cannot rot."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

BENCHMARKS = sorted((Path(__file__).parent.parent / "benchmarks").glob("bench_*.py"))


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_has_a_command(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {option.name for option in load(path, monkeypatch).main.params}
    assert {"quick", "path"} <= names


def test_the_layer_benchmark_measures_and_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_layers"), monkeypatch)
    form = bench.Form("block_circulant", {"block": 8}, (64, 64))
    row = bench.measure("block-circulant 8", form, 2, rounds=1)
    assert min(row["times"][name]["seconds"] for name in (*bench.PEERS, "ours")) > 0
    assert row["error"] < bench.TOLERANCE
    assert row["of_bound"] > 0
    assert len(bench.cells(row)) == len(bench.HEADINGS)


def test_rows_of_the_layer_benchmark_are_chosen_by_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_layers"), monkeypatch)
    assert bench.matches("dense 1024x1024", ["dense*"]) and not bench.matches("low rank N/8", ["dense*"])
    assert set(bench.QUICK) <= set(bench.FORMS)


def test_layers_of_any_shape_are_the_same_for_a_seed_and_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_any_shape"), monkeypatch)
    for make in bench.KINDS.values():
        names = [[make(rng)[0] for _ in range(4)] for rng in (np.random.default_rng(3), np.random.default_rng(3))]
        assert names[0] == names[1] and len(set(names[0])) > 1
    row = bench.measure(*bench.linear(np.random.default_rng(0), "dense", np.eye(24, 40)))
    assert row["times"]["ours"]["seconds"] > 0 and row["error"] < bench.TOLERANCE


def test_peers_compute_the_same_product(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_layers"), monkeypatch)
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((24, 40)).astype(np.float32), rng.standard_normal((3, 40)).astype(np.float32)
    from model_peers import to_numpy

    for name, call in bench.linear_peers(weight, x).items():
        np.testing.assert_allclose(to_numpy(call()), x @ weight.T, rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_convolution_benchmark_measures_and_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_convs"), monkeypatch)
    row = bench.measure(bench.Convolution(8, 16, 3, 1, 1, 6), batch=2, rounds=1)
    assert set(row["times"]) == {"eager", "channels_last", "prepacked", "onnxruntime", "ours"}
    assert row["error"] < bench.TOLERANCE and row["of_peak"] > 0
    assert row["dense_flops"] == 2 * 2 * 6 * 6 * 16 * 8 * 9
    assert len(bench.cells(row)) == 4 + 2 * 4 + 3 - 1


def test_the_convolutions_are_those_of_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_convs"), monkeypatch)
    vgg, resnet = map(bench.convolutions, ("vgg16", "resnet50"))
    assert (len(vgg), len(resnet)) == (9, 23)
    assert bench.Convolution(3, 64, 7, 2, 3, 224) == resnet[0] and bench.Convolution(512, 512, 3, 1, 1, 14) == vgg[-1]


# millions of parameters, as everybody counts them, and the output
SIZES = {
    "alexnet": (61.10, (2, 1000)),
    "vgg16": (138.36, (2, 1000)),
    "resnet18": (11.69, (2, 1000)),
    "resnet50": (25.56, (2, 1000)),
    "vit_b16": (86.57, (2, 1000)),
    "bert_base": (85.05, (2, 128, 768)),
}


def test_the_networks_have_the_well_known_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS[0].parent)
    import networks
    import torch

    assert set(networks.NETWORKS) == set(SIZES)
    for name, (millions, output) in SIZES.items():
        make, shape = networks.NETWORKS[name]
        with torch.device("meta"):
            module = make()
            assert tuple(module(torch.empty(2, *shape)).shape) == output
        assert sum(p.numel() for p in module.parameters()) / 1e6 == pytest.approx(millions, abs=0.006), name


def test_random_networks_are_repeatable_and_stay_near_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS[0].parent)
    import networks
    import torch

    (module, x), (again, y) = (networks.network("resnet18", 1) for _ in range(2))
    assert torch.equal(x, y) and torch.equal(module[0].weight, again[0].weight)
    with torch.inference_mode():
        output = module(x)
    assert 0.1 < float(output.std()) < 10


def test_a_structured_network_keeps_the_size_of_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_models"), monkeypatch)
    import torch
    from torch import nn

    from tvm_structured.structures import BlockCirculant

    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(64, 40)).requires_grad_(False)
    changed, choices = bench.block_circulant(dense, 8)
    assert list(choices) == ["1.weight"]
    assert torch.equal(changed[0].weight, dense[0].weight)
    found = BlockCirculant.detect(changed[1].weight.numpy())
    assert found is not None and found.c.shape == (5, 8, 8)
    assert float(changed[1].weight.norm() / dense[1].weight.norm()) == pytest.approx(1, rel=0.2)


def test_the_lenet_forms_have_the_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS[0].parent)
    import lenet

    from tvm_structured.nn import convert

    dense = lenet.dense_network(lenet.FORMS["dense"], 0)
    sizes = {
        name: sum(
            p.numel()
            for p in (convert(dense, form.layers) if form.layers else lenet.dense_network(form, 0)).parameters()
        )
        for name, form in lenet.FORMS.items()
    }
    assert sizes["dense"] == 61_482 and sizes["DeBut"] == 10_186
    for name in ("dense, smaller", "tensor-train", "low-rank"):
        assert sizes[name] == pytest.approx(10_186, rel=0.04)


def test_the_accuracy_benchmark_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_accuracy"), monkeypatch)
    path = tmp_path / "accuracy.jsonl"
    row = {"seed": 0, "epochs": 2, "parameters": 100}
    rows = [
        {"form": "dense", **row, "accuracy": {"scratch": 0.98}},
        {"form": "dense", **row, "seed": 1, "accuracy": {"scratch": 0.96}},
        {"form": "DeBut", **row, "parameters": 20, "accuracy": {"projected": 0.1, "fine_tuned": 0.97}},
        {"form": "dense", "seed": 0, "times": {"1": {"seconds": 2e-5, "spread": 0.01}}},
        {"form": "DeBut", "seed": 0, "times": {"1": {"seconds": 1e-5, "spread": 0.01}}},
    ]
    bench.write_rows(path, rows)
    assert bench.read_rows(path) == rows
    asked = []
    monkeypatch.setattr(bench, "ProcessPoolExecutor", lambda *args: pytest.fail("nothing is left to train"))
    monkeypatch.setattr(
        bench, "cells", lambda name, rows, cells=bench.cells: asked.append(cells(name, rows)) or asked[-1]
    )
    figure = tmp_path / "accuracy.svg"
    result = CliRunner().invoke(bench.main, ["--show", "--json", str(path), "--plot", str(figure)])
    assert result.exit_code == 0, result.output
    assert "| dense | 100 | 1.0x | - | - | - | 97.00 ± 1.41 | 20.0 | 1.00 |" in result.output
    assert "| DeBut | 20 | 5.0x | 10.00 | - | 97.00 | - | 10.0 | 2.00 |" in result.output
    assert figure.read_text().lstrip().startswith("<?xml")


def test_the_accuracy_benchmark_shifts_images_but_not_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS[0].parent)
    import lenet

    from tvm_structured import demo

    digits = demo.load_digits()
    batches = list(lenet.Shifted(digits, seed=0))
    assert sum(len(labels) for _, labels in batches) == 4000 and len(batches) == len(lenet.Shifted(digits, 0))
    known = {image[0, 6:-6, 6:-6].tobytes() for image in digits.train_images}
    images = batches[0][0]
    assert (
        images.shape == (64, 1, 28, 28) and np.bincount(np.concatenate([y for _, y in batches])).tolist() == [400] * 10
    )
    found = [
        any(
            image[0, 6 + dy : 22 + dy, 6 + dx : 22 + dx].numpy().tobytes() in known
            for dy in range(-2, 3)
            for dx in range(-2, 3)
        )
        for image in images
    ]
    assert all(found)


def test_the_training_benchmark_compares_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_training"), monkeypatch)
    monkeypatch.setitem(bench.LAYERS, "tiny", (24, 32))
    row = bench.measure("block-circulant 8", "tiny", 3, rounds=1)
    assert min(row["times"][who]["seconds"] for who in ("dense", "expand", "ours")) > 0 and row["error"] < 1e-4
    assert len(bench.cells(row)) == len(bench.HEADINGS)


def test_timings_tell_noise_and_missing_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS[0].parent)
    import measuring

    assert measuring.milliseconds(measuring.Timing.of([1e-3, 1e-3, 1.01e-3])) == "1.00"
    assert measuring.milliseconds(measuring.Timing.of([1e-3, 2e-3, 3e-3])) == "2.00~"
    assert measuring.milliseconds(None) == "-"
    counts = {"a": 0}
    timing = measuring.interleaved({"a": lambda: counts.update(a=counts["a"] + 1)}, rounds=2)["a"]
    assert timing.seconds > 0 and counts["a"] > 6


def test_work_in_another_process_has_a_limit_and_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS[0].parent)
    import math
    import time

    import children

    assert children.in_child(math.sqrt, 4.0, limit=60) == 2.0
    with pytest.raises(children.ChildFailed, match="ValueError"):
        children.in_child(math.sqrt, -1.0, limit=60)
    with pytest.raises(children.ChildFailed, match="more than 1 s"):
        children.in_child(time.sleep, 30, limit=1)
    assert children.peak_bytes() > 1e6


def test_results_become_tables_in_markdown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_layers"), monkeypatch)
    rendering = load(BENCHMARKS[0].parent / "to_markdown.py", monkeypatch)
    path = tmp_path / "layers.json"
    bench.write_json(path, [bench.measure("low rank", bench.Form("low_rank", {"rank": 2}, (32, 48)), 2, rounds=1)])
    output = CliRunner().invoke(rendering.main, [str(path)]).output.splitlines()
    assert output[0].startswith("layers: cpu ")
    table = [row.count("|") for row in output if row.startswith("|")]
    assert table == [len(bench.HEADINGS) + 1] * 3 and "| low rank | 2 |" in output[-2]


def test_rows_are_compared_with_their_goals(monkeypatch: pytest.MonkeyPatch) -> None:
    goals = load(BENCHMARKS[0].parent / "goals.py", monkeypatch)

    def row(name: dict[str, Any], **seconds: float) -> dict[str, Any]:
        return {**name, "times": {peer: {"seconds": value} for peer, value in seconds.items()}}

    layers = [
        row({"layer": "dense", "batch": 1, "of_bound": 0.5}, torch=3e-3, ort=2e-3, ours=1.9e-3),
        row({"layer": "low rank N/8", "batch": 1, "of_bound": 0.8}, torch=3.5e-3, ort=1e-3, ours=1e-3),
        row({"layer": "block-circulant 8", "batch": 16, "of_bound": 1.0}, torch=9e-3, ort=5e-3, ours=1e-3),
        row({"layer": "low rank N/8", "batch": 16, "of_bound": 0.8}, torch=1e-3, ort=1e-3, ours=1e-3),
    ]
    assert goals.goals(layers) == [
        ["block-circulant 8", "16", "ONNX Runtime", "6", "5.0", "**no**", "100%"],
        ["low rank N/8", "1", "PyTorch", "3.9", "3.5", "near", "80%"],
        ["dense", "1", "the better of both", "1", "1.05", "yes", "50%"],
    ]
    algorithm = {"algorithm": "winograd tile=4", "of_peak": 0.4}
    convs = [row({**algorithm, "layer": f"3x3 8->8 @ {size}"}, eager=4e-3, ours=2e-3) for size in (56, 14, 7)]
    convs.append(row({"algorithm": "dense", "layer": "1x1 8->8 @ 14"}, eager=4e-3, ours=2e-3))
    assert [(cells[3], cells[5]) for cells in goals.goals(convs)] == [("2.5", "**no**"), ("1.8", "yes"), ("1.4", "yes")]
    times = {"eager": 9e-3, "onnxruntime": 3e-3, "lossless": 2e-3, "structured": 1e-3}
    networks = [row({"model": "vgg16", "batch": batch}, **times) for batch in (1, 16)]
    assert [cells[3:6] for cells in goals.goals(networks)] == [["2", "1.50", "**no**"], ["2.5", "3.0", "yes"]]


def test_the_compile_benchmark_times_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_compile"), monkeypatch)
    monkeypatch.setitem(bench.FORMS, "small", type(bench.FORMS["dense"])("low_rank", {"rank": 4}, (48, 32)))
    row = bench.layer_kernels("small", 2)
    assert [seconds > 0 for seconds in row["kernels"].values()] == [True] and "low_rank" in str(*row["kernels"])


def test_the_gpu_benchmark_compiles_without_a_gpu_and_says_that_it_did_not_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tvm_structured.devices import has_gpu

    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_gpu"), monkeypatch)
    case = bench.Case("1024x4096", "permuted_diagonal 8", 1, "float16")
    import gpu_cases

    (entry,) = gpu_cases.compile_case(tmp_path, case, "sm_90", 1)
    assert "error" not in entry and (tmp_path / f"{entry['stem']}.so").is_file()
    with np.load(tmp_path / f"{entry['stem']}.npz") as packed:
        assert sum(packed[name].size for name in packed.files) >= gpu_cases.member_of(case).num_params
    if not has_gpu():
        result = CliRunner().invoke(bench.main, ["--quick"])
        assert result.exit_code == 1 and "not measured" in result.output


def test_members_of_the_gpu_benchmark_are_what_pytorch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS[0].parent)
    import gpu_cases
    import torch
    from gpu_peers import einsum_of

    for form in ("low_rank N/8", "permuted_diagonal 8", "tensor_train 8"):
        member = gpu_cases.member_of(gpu_cases.Case("1024x4096", form, 2, "float32"))
        x = np.random.default_rng(0).standard_normal((2, member.shape[1])).astype(np.float32)
        factors = [torch.as_tensor(factor) for factor in member.factors.values()]
        y = einsum_of(member)(torch.from_numpy(x), *factors).numpy()
        np.testing.assert_allclose(y, x @ np.asarray(member.dense()).T, rtol=1e-3, atol=1e-3, err_msg=form)


def test_the_tuning_benchmark_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = load(next(path for path in BENCHMARKS if path.stem == "bench_tuning"), monkeypatch)
    import tuned_layers
    from tuning_samples import FakeMeasurer

    from tvm_structured.roofline import Roofline

    small = {
        "low rank": tuned_layers.Layer("low_rank", {"rank": 512}, (512, 512)),
        "dense": tuned_layers.Layer("dense", {}, (64, 48)),
        "1x1": tuned_layers.Layer("conv2d", {}, conv=(16, 24, 1, 6)),
    }
    rates = ((8 << 20, 1e9), (64 << 20, 1e9))
    machine, peaks = Roofline(1e9, rates), iter((0.5e9, 1e9, 0.7e9))
    monkeypatch.setattr(tuned_layers, "measure_roofline", lambda: Roofline(next(peaks), rates))
    assert tuned_layers.highest_roofline() == machine
    monkeypatch.setattr(bench, "highest_roofline", lambda: machine)
    monkeypatch.setattr(tuned_layers, "level2", lambda: 1024)
    for module in (bench, tuned_layers):
        monkeypatch.setattr(module, "LAYERS", small)
    seen: list[str] = []

    def run(*words: str, stop_after: int | None = None) -> Any:
        measurer = FakeMeasurer(stop_after)
        monkeypatch.setattr(tuned_layers, "LocalMeasurer", lambda *_: measurer)
        options = ["layers", "--work-dir", str(tmp_path / "db"), "--trials", "6", "--json", str(tmp_path / "rows.json")]
        result = CliRunner().invoke(bench.main, [*options, *words])
        seen.extend(measurer.measured)
        return result

    assert run(stop_after=9).exit_code != 0
    assert [row["trials"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == [6]
    finished = run()
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert finished.exit_code == 0, finished.output
    assert len(seen) == sum(row["trials"] for row in rows) == 6 * 6, "no trial is made twice"
    assert {(row["tuned_layer"], row["batch"]) for row in rows} == {
        (name, batch) for name in small for batch in (1, 16)
    }
    assert all(row["default_seconds"] >= row["seconds"] and row["limit"] in ("FLOPs", "cache bytes") for row in rows)
    assert "structured kernels: geometric mean" in finished.output and "0 slower" in finished.output
    assert "plain dense and 1x1 convolutions: geometric mean" in finished.output
    assert len(run("--trials", "9", "--minutes", "0").output.splitlines()) == len(finished.output.splitlines())
    assert len(seen) == 36, "out of time: what was found before is reported again"
