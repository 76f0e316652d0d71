"""The commands of ``pyrovae``, their TOML files and the report page."""

from . import start as start  # registers their commands
from . import sweep as sweep
from . import uses as uses
from .app import main

__all__ = ["main"]
