"""Warnings and errors of the package, so that they can be filtered or caught by class."""


class WtacrsWarning(UserWarning):
    """Something differs from what was asked, or will surprise: said once, with what to change."""


class InvariantError(RuntimeError):
    """A partitioned graph failed the check that every draw is one unit. Nothing wrong was trained: compilation stops."""


class BudgetError(ValueError):
    """A memory budget in bytes that no plan can meet. The message says the least peak and what holds it."""


class ReportError(ValueError):
    """A report cannot be made of what was given. The message says why and what to change."""


class RankError(RuntimeError):
    """Two ranks of a process group compile the same module with different options. The message names both ranks."""


class UnsupportedError(RuntimeError):
    """A combination that this package would get wrong, or does not take: the message says which, and what to do."""
