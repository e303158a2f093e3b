"""Only TVM's chatter about constants is left out of standard error."""

from __future__ import annotations

import os

import pytest

from tvm_structured.tvm_log import without_scope_warnings


def test_noise_goes_and_the_rest_stays(capfd: pytest.CaptureFixture[str]) -> None:
    with without_scope_warnings():
        os.write(2, b"a real message\n[12:00] executable.cc:276: Warning: Scope Saving: x\nanother\n")
    assert capfd.readouterr().err == "a real message\nanother\n"


def test_messages_survive_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError):
        with without_scope_warnings():
            os.write(2, b"the reason\n")
            raise RuntimeError
    assert capfd.readouterr().err == "the reason\n"
