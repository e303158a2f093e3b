"""Budget: how small, how cheap and how exact a structured layer has to be."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tvm_structured.errors import BudgetError


@dataclass(frozen=True)
class Budget:
    """Limits for each layer. `None` means no limit.

    max_params: parameters as a fraction of the dense layer's, in (0, 1].
    max_flops: floating-point operations as a fraction of the dense layer's, in (0, 1].
    max_error: relative Frobenius error ||W' - W|| / ||W||, in [0, 1].

    Raises BudgetError for a value outside its range.
    """

    max_params: float | None = None
    max_flops: float | None = None
    max_error: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
                raise BudgetError(f"{field.name}={value!r} is not a number; give a fraction between 0 and 1")
            low_ok = value >= 0 if field.name == "max_error" else value > 0
            if not (low_ok and value <= 1):
                raise BudgetError(f"{field.name}={value} is out of range; it is a fraction of the dense layer, 0 to 1")
