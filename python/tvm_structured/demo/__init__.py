"""The demonstration's first half: real digits, a LeNet-size network with structured layers, and its training."""

from __future__ import annotations

from tvm_structured.demo.data import Digits, load_digits
from tvm_structured.demo.network import StructuredLeNet, make_network
from tvm_structured.demo.train import Training, accuracy, predict, train

__all__ = ["Digits", "StructuredLeNet", "Training", "accuracy", "load_digits", "make_network", "predict", "train"]
