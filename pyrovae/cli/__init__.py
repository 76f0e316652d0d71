"""The command line: ``pyrovae train`` and its sisters, their TOML files and the report page."""

from . import uses as uses  # registers its commands
from .app import main

__all__ = ["main"]
