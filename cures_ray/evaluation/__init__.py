"""What a model can do: scores with their uncertainty, and the answers behind them on disk.

Promises: a fault counts as not solved, and is shown; every answer is on disk before the next ones are asked.
The training loop and ``cures eval`` report through the same functions. May import: the leaves.
"""
