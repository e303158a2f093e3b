"""Every error this package raises on purpose.

    StructuredError
    ├── EnvironmentMismatchError (ImportError)   wrong TVM, or a missing optional package
    ├── ModelError (ValueError)                  a model, a weight or an input we cannot use
    ├── TargetError (ValueError)                 a target TVM does not know
    ├── PlanError (ValueError)                   a plan that is broken or belongs to another model
    ├── BudgetError (ValueError)                 a budget that is malformed or that nobody can reach
    ├── CheckpointError (ValueError)             a checkpoint of a training that is broken or of another training
    ├── KernelNotFoundError (LookupError)        no kernel for a structure on a target
    ├── TuningError (RuntimeError)               a tuning session that cannot start or go on
    │   └── DatabaseError                        a tuning database that is in use, or is none
    ├── RemovedNameError (AttributeError)        a name of TVM's Relay that is gone
    └── VTAError (ValueError)                    the accelerator: a configuration, a program or its text
        ├── IllegalInstructionError              a field has a value that means nothing
        ├── ScratchpadOverflowError              an access past the end of an on-chip buffer
        ├── DramRangeError                       an access outside the memory that the program was given
        ├── DeadlockError                        a token that never comes
        └── FinishError                          no FINISH, or work that may come after it

A message names the thing, the value and the way out.
"""

from __future__ import annotations

from typing_extensions import Self


class StructuredError(Exception):
    """Base of all errors of this package."""


class EnvironmentMismatchError(StructuredError, ImportError):
    """An installed package is missing or has a version that is known not to work."""


class ModelError(StructuredError, ValueError):
    """The model, one of its weights or one of its inputs cannot be used."""


class TargetError(StructuredError, ValueError):
    """TVM does not know the target, or cannot build for it here."""


class BaselineTargetWarning(UserWarning):
    """A target that leaves most of this machine unused, probably without intent."""


class PlanError(StructuredError, ValueError):
    """The plan is malformed or does not belong to this model."""


class BudgetError(StructuredError, ValueError):
    """The budget is malformed, or no structure reaches it."""


class CheckpointError(StructuredError, ValueError):
    """A checkpoint of a training is broken or belongs to another training."""


class KernelNotFoundError(StructuredError, LookupError):
    """No kernel is known for a structure on a target."""


class TuningError(StructuredError, RuntimeError):
    """A tuning session cannot start or go on."""


class DatabaseError(TuningError):
    """A tuning database is in use by another session, or the path holds something else."""


class RemovedNameError(StructuredError, AttributeError):
    """A name that TVM's Relay had, that TVM has removed and that this package does not offer."""


class VTAError(StructuredError, ValueError):
    """A VTA configuration, program or listing is wrong.

    `instruction` is the index in the run's stream and `field` the name of the field at fault, where there is one.
    """

    def __init__(self, message: str, instruction: int | None = None, field: str | None = None) -> None:
        where = "" if instruction is None else f"instruction {instruction}"
        where += "" if field is None else f"{', ' if where else ''}field {field}"
        super().__init__(f"{where}: {message}" if where else message)
        self.message = message
        self.instruction = instruction
        self.field = field

    def at(self, instruction: int) -> Self:
        """The same error, of a known instruction."""
        return type(self)(self.message, instruction, self.field)


class IllegalInstructionError(VTAError):
    """A field of an instruction has a value that means nothing."""


class ScratchpadOverflowError(VTAError):
    """An instruction would go past the end of an on-chip buffer."""


class DramRangeError(VTAError):
    """An instruction would leave the memory that the program was given."""


class DeadlockError(VTAError):
    """An instruction waits for a token that nobody will push."""


class FinishError(VTAError):
    """A run without FINISH, or with work that FINISH does not wait for."""
