"""Compilation: training and scoring steps captured as graphs; the only code that touches torch's private names."""

__all__: list[str] = []
