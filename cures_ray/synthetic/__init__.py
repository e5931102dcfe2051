"""Synthetic tasks and their small base models, for the demo, tests and benchmarks. May import: the leaves."""
