"""TVM's C++ side warns once for every constant it saves or loads ("Scope Saving"); these lines are left out."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

NOISE = (b"Warning: Scope Saving", b"Warning: Scope Loaded")


@contextmanager
def without_scope_warnings() -> Iterator[None]:
    """Hold back what is written to standard error (the descriptor, where C++ writes) and pass on all but the noise."""
    try:
        sys.stderr.flush()
        saved = os.dup(2)
    except (OSError, AttributeError):  # no standard error: nothing to filter
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(saved, 2)
            os.close(saved)
            held.seek(0)
            for line in held:
                if not any(noise in line for noise in NOISE):
                    os.write(2, line)
