"""The command line: ``pyrovae train`` and its sisters, their TOML files and the report page."""

from .app import main

__all__ = ["main"]
