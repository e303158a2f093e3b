"""The package itself: its names, and one clear sentence where an installed version does not fit."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest

import tvm_structured as ts
from tvm_structured import _plugin


def test_every_exported_name_is_there() -> None:
    assert all(getattr(ts, name) is not None for name in ts.__all__)
    assert set(ts.__all__) <= set(dir(ts))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ts.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("package", "version"), [("apache-tvm-ffi", "0.1.15.post1"), ("apache-tvm", "0.26.0"), ("apache-tvm", "0.28.0")]
)
def test_a_wrong_version_gives_one_sentence_with_the_way_out(
    package: str, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == package else installed(name))
    with pytest.raises(ImportError, match=rf"found .*{version}.*; run: pip install apache-tvm==") as caught:
        _plugin.check_versions()
    assert isinstance(caught.value, ts.StructuredError)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(ImportError, match="apache-tvm is not installed; run: pip install"):
        _plugin.check_versions()


def test_registering_twice_is_harmless() -> None:
    from tvm_structured import dialect

    dialect.register()
    dialect.register()


def test_running_a_module_leaves_the_affinity_of_the_process_alone() -> None:
    """Elsewhere TVM pins the thread that calls it, and torch is left with one core."""
    script = (
        "import os, numpy as np, torch, tvm_structured as ts\n"
        "before = os.sched_getaffinity(0)\n"
        "module = ts.compile(torch.nn.Linear(64, 64).eval(), inputs=(torch.zeros(200, 64),), measure=False)\n"
        "module(torch.zeros(200, 64))\n"
        "assert os.sched_getaffinity(0) == before, (os.sched_getaffinity(0), before)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TVM_NUM_THREADS"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
