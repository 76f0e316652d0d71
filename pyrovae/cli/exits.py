"""How an error ends the command line: with one line, and an exit code that says the cause."""

from __future__ import annotations

from cyclopts import CycloptsError, MixedArgumentError, UnknownOptionError, UnusedCliTokensError

__all__ = ["DIVERGED", "MISTAKE", "NO_MEMORY", "SYSTEM", "UNFORESEEN", "explain"]

UNFORESEEN = 1  # an error of pyrovae's own
MISTAKE = 2  # of the command, its settings or its data
SYSTEM = 3  # a full disk, a place that cannot be written
DIVERGED = 4  # training, at NaN or infinite values
NO_MEMORY = 5  # no memory is left on the machine or the GPU

_UNFORESEEN = " (pyrovae did not foresee this error; PYROVAE_DEBUG=1 shows where it comes from)"
# torch has an exception of its own for GPUs alone.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")


def explain(error: Exception) -> tuple[int, str]:
    """The exit code and the one line for an error.

    Example:
        >>> from pyrovae.cli.exits import explain
        >>> explain(ValueError("lr must be positive, got -1."))
        (2, 'lr must be positive, got -1.')
        >>> explain(PermissionError(13, "Permission denied", "runs"))
        (3, 'runs cannot be used: permission denied.')
    """
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename} cannot be used: " if error.filename else ""
        reason = error.strerror or type(error).__name__
        return SYSTEM, f"{where}{reason[0].lower() if where else reason[0]}{reason[1:].rstrip('.')}."
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in first for word in _OUT_OF_MEMORY)):
        return NO_MEMORY, "There is not enough memory: use a smaller model, batch_size or num_samples, or less data."
    if isinstance(error, MixedArgumentError) and error.argument is not None:
        name = error.argument.name
        return MISTAKE, f"{name} has a name and options: give the name as {name}.kind beside the options."
    if isinstance(error, UnusedCliTokensError):
        extra = " ".join(map(str, error.unused_tokens or []))
        cure = "pyrovae sweep trains several" if "train" in (error.command_chain or ()) else "see --help"
        return MISTAKE, f"{extra} belongs to no option, each of which takes one value: {cure}."
    if isinstance(error, UnknownOptionError):
        option = error.token.keyword or error.token.value
        if option in ("--seeds", "--grid", "--jobs"):
            return MISTAKE, f"{option} is an option of pyrovae sweep, which trains several runs: use that command."
    if isinstance(error, FloatingPointError):
        return DIVERGED, first
    if isinstance(error, ValueError | OSError | CycloptsError):
        return MISTAKE, first
    return UNFORESEEN, first + _UNFORESEEN
