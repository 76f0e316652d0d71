"""Models: the pairs of programs that this package writes for you."""
