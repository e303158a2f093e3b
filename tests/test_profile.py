"""A profile: every kernel call of a run is found, and given to the right layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import tvm_structured as ts
from tvm_structured.module import Runnable
from tvm_structured.planning import Requested
from tvm_structured.profile import Profile, ProfileRow, profile_cells
from tvm_structured.profiling import readable, with_layers
from tvm_structured.roofline import Roofline


class Small(nn.Module):
    """Convolutions and dense layers; `twin` has the shape of `dense`, and each of `conv` and `dense` is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.dense, self.twin, self.last = nn.Linear(128, 128), nn.Linear(128, 128), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(torch.relu(self.conv(torch.relu(self.first(x))))))
        x = torch.sigmoid(nn.functional.max_pool2d(x, 2)).flatten(1)
        return torch.softmax(self.last(self.twin(self.dense(torch.relu(self.dense(x))))), dim=-1)


PLAN = {"dense.weight": Requested("block_circulant", {"block": 8}), "first.weight": Requested("tensor_train")}
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def compiled(plan: dict[str, Requested] | None = None, **options: object) -> ts.Compiled:
    torch.manual_seed(0)
    return ts.compile(Small().eval(), inputs=(X,), target="host", plan=ts.Plan(plan or {}), **options)


@pytest.fixture(scope="module")
def structured() -> ts.Compiled:
    return compiled(PLAN)


def layers_of(profile: Profile) -> dict[str, ProfileRow]:
    return {row.layer: row for row in profile.rows if row.layer}


def check_profile(profile: Profile) -> None:
    """What holds for the network above, however it was compiled or loaded."""
    rows = layers_of(profile)
    assert list(rows) == ["first.weight", "conv.weight", "dense.weight", "twin.weight", "last.weight"]
    assert rows["conv.weight"].calls == 2 * rows["twin.weight"].calls
    assert {row.kernel for row in profile.rows if not row.layer} >= {"softmax"}
    assert all(row.seconds > 0 and row.bytes > 0 and row.calls > 0 for row in profile.rows)
    assert sum(profile.share(row) for row in profile.rows) == pytest.approx(1)
    assert rows["last.weight"].flops == 2 * 2 * 128 * 10
    # the weight, which kernels may pad, the bias, x and y
    assert rows["last.weight"].bytes >= 4 * (128 * 10 + 10 + 2 * 128 + 2 * 10)
    assert profile.total().seconds == pytest.approx(sum(row.seconds for row in profile.rows))
    assert profile.run_seconds > 0


def test_layers_that_share_a_kernel_are_told_apart() -> None:
    profile = compiled().profile(X, repeat=2)
    check_profile(profile)
    rows = layers_of(profile)
    assert rows["dense.weight"].kernel == rows["twin.weight"].kernel == "dense"
    assert (rows["dense.weight"].calls, rows["twin.weight"].calls) == (2, 1)
    assert rows["dense.weight"].flops == 2 * rows["twin.weight"].flops == 2 * 2 * 2 * 128 * 128


def test_a_layer_of_several_kernels_is_one_row(structured: ts.Compiled) -> None:
    profile = structured.profile(X, repeat=2)
    check_profile(profile)
    rows = layers_of(profile)
    assert rows["first.weight"].kernel.split(", ") == ["patches", "tensor_train", "rows_to_image"]
    assert rows["dense.weight"].kernel == "block_circulant"
    reported = {row.layer: row.flops for row in structured.report().rows}
    assert {name: row.flops for name, row in rows.items()} == reported


def test_a_loaded_module_has_the_same_profile(structured: ts.Compiled, tmp_path: Path) -> None:
    loaded = ts.load(structured.export(tmp_path / "m.so"))
    profile = loaded.profile(X.numpy(), repeat=1)
    check_profile(profile)
    here = structured.profile(X, repeat=1)
    described = [[(r.layer, r.kernel, r.calls, r.flops, r.bytes) for r in p.rows] for p in (profile, here)]
    assert described[0] == described[1]


def test_a_module_without_the_list_of_kernels_has_a_profile_by_kernel(structured: ts.Compiled) -> None:
    metadata = {name: value for name, value in structured.metadata.items() if name != "kernels"}
    profile = Runnable(structured.executable, metadata).profile(X, repeat=1)
    assert {row.layer for row in profile.rows} == {""}
    assert {"conv2d", "block_circulant", "dense", "softmax"} <= {row.kernel for row in profile.rows}


def test_profiling_changes_no_result_and_leaves_no_instrument(structured: ts.Compiled) -> None:
    before = structured(X)
    structured.profile(X, repeat=1)
    torch.testing.assert_close(structured(X), before, rtol=0, atol=0)


def test_operations_grow_with_an_open_batch() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    program = torch.export.export(
        model, (torch.randn(4, 32),), dynamic_shapes={"input": {0: torch.export.Dim("batch")}}
    )
    made = ts.compile(program, target="host", plan=ts.Plan({}))
    for batch in (1, 7):
        rows = layers_of(made.profile(torch.randn(batch, 32), repeat=1))
        assert rows["0.weight"].flops == 2 * batch * 32 * 16
        assert rows["2.weight"].flops == 2 * batch * 16 * 8


def test_wrong_inputs_are_refused_as_in_a_call(structured: ts.Compiled) -> None:
    with pytest.raises(ts.ModelError, match="shape"):
        structured.profile(torch.zeros(1, 3, 8, 8))


def test_calls_of_a_symbol_are_counted_apart_from_others() -> None:
    written = [("dense", "a"), ("reshape", ""), ("dense", "b"), ("conv2d", "c"), ("conv2d", "c"), ("add", "")]
    run = [("dense", 1.0, 1), ("dense", 2.0, 2), ("conv2d", 3.0, 3), ("add", 4.0, 4)]
    # the view became no call; a branch left one call of conv2d out, and all of them are of one layer
    assert [layer for layer, *_ in with_layers(run, written)] == ["a", "b", "c", ""]
    # which dense layer a branch left out, nobody knows
    assert [layer for layer, *_ in with_layers(run[1:], written)] == ["", "c", ""]


def test_numbers_that_only_tell_symbols_apart_are_dropped() -> None:
    names = {"conv2d": "conv2d", "conv2d12": "conv2d", "dense_3": "dense", "max_pool2d1": "max_pool2d", "x": "x"}
    assert {symbol: readable(symbol) for symbol in names} == names


ROWS = (
    ProfileRow("a.weight", "dense", 2, 4e-6, 8_000, 400, 0.5),
    ProfileRow("", "<softmax>", 1, 1e-6, None, 100, 0.25),
)
PROFILE = Profile("znver5", ROWS, 6e-6, 10, Roofline(1e11, ((1 << 20, 1e11), (1 << 30, 1e10))))


def test_the_total_weighs_the_bound_by_time() -> None:
    total = PROFILE.total()
    assert (total.calls, total.flops, total.bytes) == (3, 8_000, 500)
    assert total.bound_fraction == pytest.approx((0.5 * 4 + 0.25 * 1) / 5)
    assert profile_cells(PROFILE, ROWS[0]) == [
        "a.weight",
        "dense",
        "2",
        "4.0 us",
        "80.0 %",
        "0.01",
        "2.0",
        "0.1",
        "50 %",
    ]


def test_table_json_and_page_agree(tmp_path: Path) -> None:
    text = str(PROFILE)
    for words in (["a.weight", "dense", "80.0 %"], ["<softmax>", "20.0 %"], ["total", "5.0 us"], ["whole run", "6.0"]):
        assert any(all(word in line for word in words) for line in text.splitlines()), words
    PROFILE.to_json(tmp_path / "p.json")
    document = json.loads((tmp_path / "p.json").read_text())
    assert Profile.from_dict(document) == PROFILE
    assert document["total"]["seconds"] == pytest.approx(5e-6)
    PROFILE.to_html(tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text()
    assert "<svg" in page and page.count("<tr") == 4 and "src=" not in page
    assert "&lt;softmax&gt;" in page and "100 GFLOP/s" in page


def test_an_empty_profile_prints_and_renders(tmp_path: Path) -> None:
    empty = Profile("llvm", (), 0.0, 1)
    assert "total" in str(empty)
    empty.to_html(tmp_path / "p.html")
