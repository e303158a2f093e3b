"""fine_tune: it learns, it repeats itself, an interrupted training goes on as if it were not, bad files are refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tvm_structured.errors import CheckpointError, ModelError
from tvm_structured.nn import StructuredLinear, convert, fine_tune
from tvm_structured.nn.checkpoints import load_checkpoint, save_checkpoint
from tvm_structured.nn.fine_tune import default_rate


def problem(rows=192):
    """Three classes that a small network tells apart."""
    torch.manual_seed(0)
    x = torch.randn(rows, 16)
    return x, (x @ torch.randn(16, 3)).argmax(1)


def student(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(
        StructuredLinear(16, 24, "block_circulant", block=4), nn.ReLU(), nn.Dropout(dropout), nn.Linear(24, 3)
    )


def accuracy(data):
    return lambda model: float((model(data[0]).argmax(1) == data[1]).float().mean())


class Stop(Exception):
    pass


def stop_after(count):
    """An `evaluate` that interrupts the training after so many epochs, before their checkpoint is written."""
    calls = []

    def evaluate(model):
        calls.append(model)
        if len(calls) > count:
            raise Stop
        return 0.0

    return evaluate


def test_it_learns_and_leaves_the_model_in_evaluation_mode():
    data, model = problem(), student()
    record = fine_tune(model, data, epochs=20, lr=3e-2, evaluate=accuracy(data), progress=False)
    assert len(record.losses) == len(record.scores) == 20 and record.seconds > 0
    assert record.losses[-1] < 0.3 * record.losses[0] and record.scores[-1] > 0.95
    assert not model.training


def test_a_seed_gives_the_same_weights_whatever_else_draws_numbers():
    data, first, second = problem(), student(0.5), student(0.5)
    before = torch.get_rng_state()
    fine_tune(first, data, epochs=2, seed=3, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(7)
    fine_tune(second, data, epochs=2, seed=3, progress=False)
    third = student(0.5)
    fine_tune(third, data, epochs=2, seed=4, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first[0].c, third[0].c)


@pytest.mark.parametrize("interrupted_after", [1, 3])
def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path, interrupted_after):
    data, whole, part = problem(), student(0.3), student(0.3)
    expected = fine_tune(whole, data, epochs=5, progress=False, evaluate=lambda model: 0.0)
    path = tmp_path / "training.ckpt"
    with pytest.raises(Stop):
        fine_tune(part, data, epochs=5, checkpoint=path, progress=False, evaluate=stop_after(interrupted_after))
    fresh = student(0.3)  # a new process starts from the initial weights
    found = fine_tune(fresh, data, epochs=5, checkpoint=path, progress=False, evaluate=lambda model: 0.0)
    assert found.losses == expected.losses
    for a, b in zip(whole.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_finished_training_is_read_back(tmp_path):
    data, model = problem(), student()
    path = tmp_path / "done.ckpt"
    first = fine_tune(model, data, epochs=2, checkpoint=path, progress=False)
    again = student()
    assert fine_tune(again, data, epochs=2, checkpoint=path, progress=False).losses == first.losses
    assert torch.equal(again[0].c, model[0].c)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["done.ckpt"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epochs": 3}, "epochs=2, this one has 3"),
        ({"lr": 2e-3}, "lr=0.01, this one has 0.002"),
        ({"seed": 5}, "seed=0, this one has 5"),
        ({"batch": 32}, "steps=3, this one has 6"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(tmp_path, change, says):
    path = tmp_path / "a.ckpt"
    fine_tune(student(), problem(), epochs=2, checkpoint=path, progress=False)
    with pytest.raises(CheckpointError, match=says):
        fine_tune(student(), problem(), checkpoint=path, progress=False, **{"epochs": 2, **change})


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    fine_tune(student(), problem(), epochs=1, checkpoint=path, progress=False)
    other = nn.Sequential(StructuredLinear(16, 24, "low_rank", rank=4), nn.ReLU(), nn.Linear(24, 3))
    with pytest.raises(CheckpointError, match="model="):
        fine_tune(other, problem(), epochs=1, checkpoint=path, progress=False)


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("the checkpoint was unpickled",))


@pytest.mark.parametrize("kind", ["text", "truncated", "foreign", "payload", "later version"])
def test_files_that_are_no_checkpoints_are_refused_and_never_run(tmp_path, kind):
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, {"losses": [1.0]})
    if kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    elif kind == "foreign":
        torch.save({"weights": torch.ones(2)}, path)
    elif kind == "payload":
        torch.save({"format": "tvm_structured.checkpoint", "version": 1, "x": Payload()}, path)
    else:
        torch.save({"format": "tvm_structured.checkpoint", "version": 99}, path)
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        load_checkpoint(path)


def test_a_failed_write_keeps_the_checkpoint_before_it(tmp_path):
    path = tmp_path / "a.ckpt"
    save_checkpoint(path, {"losses": [1.0]})
    with pytest.raises(AttributeError, match="lambda"):
        save_checkpoint(path, {"losses": lambda: None})  # a function cannot be written
    assert load_checkpoint(path)["losses"] == [1.0]
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_teacher_replaces_labels():
    x, y = problem()
    teacher = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3))
    fine_tune(teacher, (x, y), epochs=30, lr=1e-2, progress=False)
    before = copy.deepcopy(teacher.state_dict())
    model = convert(teacher, {"0": ("low_rank", {"rank": 4})})
    found = fine_tune(model, x, teacher=teacher, epochs=20, lr=1e-2, progress=False)
    assert found.losses[-1] < 0.5 * found.losses[0]
    agreement = float((model(x).argmax(1) == teacher(x).argmax(1)).float().mean())
    assert agreement > 0.9
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_distillation_is_the_divergence_of_softened_outputs():
    from tvm_structured.nn.fine_tune import Criterion

    torch.manual_seed(0)
    output, expected = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    criterion = Criterion(nn.functional.cross_entropy, lambda x: expected, 0.25, 3.0)
    p, q = (np.exp(v.numpy() / 3) / np.exp(v.numpy() / 3).sum(1, keepdims=True) for v in (expected, output))
    soft = 9 * (p * np.log(p / q)).sum() / 4
    target = torch.tensor([0, 1, 2, 3])
    hard = float(nn.functional.cross_entropy(output, target))
    assert float(criterion(output, None, target)) == pytest.approx(0.75 * hard + 0.25 * soft)
    assert float(criterion(output, None, None)) == pytest.approx(soft)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_with_and_without_workers_are_read(workers):
    data = problem(96)
    context = "spawn" if workers else None
    loader = DataLoader(TensorDataset(*data), 32, num_workers=workers, multiprocessing_context=context)
    model = student()
    record = fine_tune(model, loader, epochs=2, progress=False)
    expected = fine_tune(student(), [(x, y) for x, y in loader], epochs=2, progress=False)
    assert record.losses == expected.losses


def test_the_default_rate_falls_with_the_size_of_the_network():
    sizes = {10: 0.01, 10_000: 0.01, 40_000: 0.005, 25_000_000: 2e-4}
    for size, rate in sizes.items():
        assert default_rate([nn.Parameter(torch.empty(size // 2, device="meta"))] * 2) == pytest.approx(rate)


def test_frozen_parameters_stay():
    model = student()
    model[0].c.requires_grad_(False)
    before = model[0].c.clone()
    fine_tune(model, problem(), epochs=1, progress=False)
    assert torch.equal(model[0].c, before)


def test_autocast_trains():
    data, model = problem(), student()
    record = fine_tune(model, data, epochs=10, lr=2e-2, autocast=torch.bfloat16, progress=False)
    assert record.losses[-1] < record.losses[0] and model[0].c.dtype == torch.float32


@pytest.mark.parametrize(
    ("data", "options", "says"),
    [
        (torch.randn(8, 16), {}, "no targets"),
        (problem(), {"distill": 1.1}, "distill=1.1 is a share"),
        (problem(), {"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ((torch.randn(8, 16), torch.zeros(7, dtype=torch.int64)), {}, "8 inputs and 7 targets"),
        (torch.randn(0, 16), {}, "no rows"),
        (5, {}, "not int"),
        ([(1, 2, 3)], {}, "got 3 values"),
        (problem(), {"epochs": 0}, "0 epochs"),
        ((torch.full((64, 16), float("nan")), torch.zeros(64, dtype=torch.int64)), {}, "loss became nan in epoch 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(data, options, says):
    with pytest.raises(ModelError, match=says):
        fine_tune(student(), data, progress=False, **options)
