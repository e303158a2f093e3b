"""`target="cuda"` without a GPU: compiled, emulated on this CPU, exported; with one: run."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cuda_binaries import needs_nvcc

import tvm_structured as ts
from tvm_structured import relay
from tvm_structured.cuda_binaries import binary_of
from tvm_structured.devices import has_gpu
from tvm_structured.nn import StructuredLinear

TARGET = {"kind": "cuda", "arch": "sm_90"}
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
no_gpu = pytest.mark.skipif(has_gpu(), reason="there is a GPU: what happens without one cannot be seen")


class Net(torch.nn.Module):
    """Convolution, grouped convolution, pool, dense, a structured layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(16)
        self.depthwise = torch.nn.Conv2d(16, 16, 3, stride=2, groups=16)
        self.dense = torch.nn.Linear(16 * 3 * 3, 64)
        self.thin = StructuredLinear(64, 48, structure="low_rank", rank=8)
        self.last = torch.nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        x = torch.max_pool2d(self.depthwise(x), 2).flatten(1)
        x = self.thin(torch.nn.functional.gelu(self.dense(x)))
        return self.last(x)


@functools.cache
def example(dtype: torch.dtype) -> tuple[Any, torch.Tensor, torch.Tensor, Any]:
    """(model, input, expected in float64, compiled)."""
    torch.manual_seed(0)
    model, x = Net().eval().to(dtype), torch.randn(2, 3, 15, 15).to(dtype)
    compiled = ts.compile(model, inputs=(x,), target=TARGET)
    reference = Net().eval().double()
    reference.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    with torch.no_grad():
        return model, x, reference(x.double()), compiled


class Attention(torch.nn.Module):
    """A causal encoder layer with a normalisation of groups behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.groups = torch.nn.LayerNorm(32), torch.nn.GroupNorm(3, 9)
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.groups(x + self.out(y.transpose(1, 2).reshape(batch, tokens, width)))


def relative(actual: Any, expected: torch.Tensor) -> float:
    return float((torch.as_tensor(actual).double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_compiled_module_is_right_when_emulated(dtype: torch.dtype) -> None:
    _, x, expected, compiled = example(dtype)
    y = compiled.emulate(x)
    assert y.dtype == dtype and relative(y, expected) < TOLERANCE[dtype]
    assert compiled.report().rows[3].structure == "low_rank" and "cuda sm_90" in str(compiled.report())


def test_numpy_goes_in_and_comes_out() -> None:
    _, x, expected, compiled = example(torch.float32)
    y = compiled.emulate(x.numpy())
    assert isinstance(y, np.ndarray) and relative(y, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_structure_that_a_half_precision_weight_was_rounded_from_is_found(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4096, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 40)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(2048, 8) @ torch.randn(8, 4096) / 160)
    model, x = model.to(dtype), torch.randn(3, 4096).to(dtype)
    compiled = ts.compile(model, inputs=(x,), target=TARGET, measure=False)
    first, last = compiled.report().rows
    assert (first.structure, last.structure) == ("low_rank", "dense")
    assert 1e-5 < first.error < torch.finfo(dtype).eps / 2
    assert f"within the rounding of {str(dtype).removeprefix('torch.')}" in first.reason
    with torch.no_grad():
        expected = model.double()(x.double())
    assert relative(compiled.emulate(x), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_and_normalisation_are_compiled_by_tvms_rules(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = Attention().eval().to(dtype), torch.randn(2, 9, 32).to(dtype)
    compiled = ts.compile(model, inputs=(x,), target=TARGET, measure=False)
    with torch.no_grad():
        expected = model.double()(x.double())
    y = compiled.emulate(x)
    assert y.dtype == dtype and relative(y, expected) < TOLERANCE[dtype]


@no_gpu
def test_without_a_gpu_calls_and_files_say_so(tmp_path: Path) -> None:
    _, x, _, compiled = example(torch.float32)
    for use in (compiled, compiled.time, compiled.profile):
        with pytest.raises(ts.ModelError, match=r"no CUDA device|on a GPU"):
            use(x)
    path = compiled.export(tmp_path / "net.so")
    with pytest.raises(ts.ModelError, match="NVIDIA GPU, and there is no driver"):
        ts.load(path)


@needs_nvcc
def test_an_exported_file_carries_machine_code(tmp_path: Path) -> None:
    raw = example(torch.float16)[3].export(tmp_path / "net.so").read_bytes()
    start = raw.index(b"// tvm_structured binary sm_90 ")
    assert binary_of(raw[start : raw.index(b"\n", start) + 1].decode("ascii")) is not None


def test_where_nothing_was_measured_the_plan_says_assumed() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(1024, 1024), torch.randn(1, 1024)
    compiled = ts.compile(model, inputs=(x,), target=TARGET, budget=0.25, measure=False)
    note = compiled.plan.notes["weight"]
    assert not note.is_measured and "(assumed)" in note.reason
    assert "assumed" in str(compiled.report())


def test_a_structure_without_a_cuda_kernel_is_computed_with_its_dense_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    from tvm_structured.relay_passes import lower_on_gpu

    monkeypatch.setattr(lower_on_gpu, "CUDA_KERNELS", {})
    torch.manual_seed(0)
    model, x = StructuredLinear(20, 12, structure="permuted_diagonal", block=4).eval(), torch.randn(3, 20)
    compiled = ts.compile(model, inputs=(x,), target=TARGET)
    assert relative(compiled.emulate(x), model(x).detach().double()) < 1e-5


def test_a_matrix_structure_on_a_convolution_runs_on_patches() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Conv2d(8, 16, 3, padding=1, stride=2), torch.randn(2, 8, 9, 7)
    weight = model.weight.detach().numpy()
    member = ts.STRUCTURES["low_rank"].from_dense(ts.Conv2d("weight", weight), rank=5)
    compiled = ts.compile(model, inputs=(x,), target=TARGET, plan=ts.Plan({"weight": member}))
    matrix = torch.from_numpy(np.asarray(member.dense())).double()
    weight64 = matrix.reshape(16, 3, 3, 8).permute(0, 3, 1, 2)
    expected = torch.conv2d(x.double(), weight64, model.bias.detach().double(), 2, 1)
    assert relative(compiled.emulate(x), expected) < 1e-5


def test_a_batch_known_at_run_time_only() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    batch = torch.export.Dim("batch", min=1, max=512)
    program = torch.export.export(model, (torch.randn(4, 24),), dynamic_shapes=({0: batch},))
    compiled = ts.compile(program, target=TARGET)
    for rows in (1, 7, 33):
        x = torch.randn(rows, 24)
        assert relative(compiled.emulate(x), model(x).detach().double()) < 1e-5


def test_relay_build_takes_cuda() -> None:
    from tvm_structured.relay import frontend

    torch.manual_seed(0)
    model, x = torch.nn.Linear(24, 16).eval(), torch.randn(2, 24)
    mod, params = frontend.from_pytorch(torch.jit.trace(model, x), [("x", (2, 24))])
    lib = relay.build(mod, target="cuda -arch=sm_80", params=params)
    assert relative(lib.compiled.emulate(x), model(x).detach().double()) < 1e-5
    if not has_gpu():
        with pytest.raises(ts.ModelError, match="no CUDA device"):
            lib["default"]()


def test_only_a_module_for_a_gpu_is_emulated() -> None:
    model, x = torch.nn.Linear(4, 4), torch.randn(1, 4)
    with pytest.raises(ts.ModelError, match="nothing to emulate"):
        ts.compile(model, inputs=(x,), target="llvm", measure=False).emulate(x)


def test_what_tvm_cannot_compile_for_the_cpu_is_not_emulated_and_says_so() -> None:
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    compiled = ts.compile(torch.nn.SiLU(), inputs=(x,), target=TARGET)
    with pytest.raises(ts.ModelError, match="cannot compile the emulation"):
        compiled.emulate(x)
