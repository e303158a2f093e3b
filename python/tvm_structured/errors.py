"""Every error this package raises on purpose.

    StructuredError
    ├── EnvironmentMismatchError (ImportError)   wrong TVM, or a missing optional package
    ├── ModelError (ValueError)                  a model, a weight or an input we cannot use
    ├── TargetError (ValueError)                 a target TVM does not know
    ├── PlanError (ValueError)                   a plan that is broken or belongs to another model
    ├── BudgetError (ValueError)                 a budget that is malformed or that nobody can reach
    ├── KernelNotFoundError (LookupError)        no kernel for a structure on a target
    └── RemovedNameError (AttributeError)        a name of TVM's Relay that is gone

A message names the thing, the value and the way out.
"""


class StructuredError(Exception):
    """Base of all errors of this package."""


class EnvironmentMismatchError(StructuredError, ImportError):
    """An installed package is missing or has a version that is known not to work."""


class ModelError(StructuredError, ValueError):
    """The model, one of its weights or one of its inputs cannot be used."""


class TargetError(StructuredError, ValueError):
    """TVM does not know the target, or cannot build for it here."""


class PlanError(StructuredError, ValueError):
    """The plan is malformed or does not belong to this model."""


class BudgetError(StructuredError, ValueError):
    """The budget is malformed, or no structure reaches it."""


class KernelNotFoundError(StructuredError, LookupError):
    """No kernel is known for a structure on a target."""


class RemovedNameError(StructuredError, AttributeError):
    """A name that TVM's Relay had, that TVM has removed and that this package does not offer."""
