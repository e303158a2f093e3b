"""Shared by all tests. Threads are fixed before anything imports TVM."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TVM_NUM_THREADS", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads stall on small matrices when all cores are busy
os.environ["TVM_STRUCTURED_CACHE"] = tempfile.mkdtemp(prefix="tvm-structured-test-")  # costs of tests stay there
sys.path.insert(0, str(Path(__file__).parent))  # importlib mode leaves it out; kernel_harness is shared

import pytest


@pytest.fixture
def run_kernel():
    """run_kernel(structure, rows, epilogue=..., machine=..., ...) -> KernelRun; see tests/kernel_harness.py."""
    import kernel_harness

    return kernel_harness.run_kernel


@pytest.fixture(scope="session")
def guarded():
    """guarded(function, *args): run in another process, where kernels may crash; see GuardedWorker."""
    import kernel_harness

    worker = kernel_harness.GuardedWorker()
    yield worker.run
    worker.close()
