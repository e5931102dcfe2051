"""Measurements of the product. Nothing imports this package.

``harness``: sweeps, statistics, reports; ``inprocess``: the real loop in one process; ``micro``: single parts;
``research``: one-off questions; ``results``: committed figures, each with the command that made it.
"""
