"""The package's own errors: what must hold, what was found, what it would cost, the remedy."""

from __future__ import annotations

from typing import Any


class PrivacyError(Exception):
    """Base class of every error that this package raises on purpose.

    The four parts are attributes, so that a program can show them apart, and ``str(error)`` joins
    them, one line each. Errors survive pickling and copying, as worker processes need.

    Args:
        must: What must hold, in one sentence that names the argument or object.
        found: What was found instead.
        cost: What going on would have cost the privacy guarantee or the run.
        remedy: What to do about it.
    """

    def __init__(self, *, must: str, found: str, cost: str, remedy: str) -> None:
        super().__init__(must, found, cost, remedy)
        self.must = must
        self.found = found
        self.cost = cost
        self.remedy = remedy

    def __str__(self) -> str:
        return (
            f"Must hold: {self.must}\nFound: {self.found}\n"
            f"It would cost: {self.cost}\nRemedy: {self.remedy}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        # The default protocol would call the class with positional arguments, which it refuses.
        return _rebuild, (type(self), self.must, self.found, self.cost, self.remedy), self.__dict__


def _rebuild(kind: type[PrivacyError], must: str, found: str, cost: str, remedy: str) -> Any:
    return kind(must=must, found=found, cost=cost, remedy=remedy)


class ConfigurationError(PrivacyError, ValueError):
    """An argument, or a combination of arguments, has no meaning or no valid analysis."""


class UnsupportedOperationError(PrivacyError, ValueError):
    """The model, the data or the environment asks for something that has no sound rule here."""


class GuaranteeError(PrivacyError, RuntimeError):
    """Something happened during the run that would make the printed ε untrue."""


class BudgetExceededError(PrivacyError, RuntimeError):
    """The next release would spend more than the budget that was set."""
