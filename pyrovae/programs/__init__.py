"""Pairs of Pyro programs: running, tracing, checking and weighing them. No other folder reads Pyro's traces."""

__all__: list[str] = []
