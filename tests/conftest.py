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
from hypothesis import settings

# The same examples in every run, so that only a change makes a test fail; HYPOTHESIS_PROFILE=random looks for new ones.
# The settings of single tests inherit from the profile, for they are made after it is loaded.
settings.register_profile("fixed", derandomize=True, database=None, deadline=None)
settings.register_profile("random", derandomize=False, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    """Each test draws the same numbers whatever ran before it in its process. Tests without torch stay without."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


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
