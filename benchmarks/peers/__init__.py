"""The trainers that a user would pick instead, on the same model, prompts, reward and batch.

Each peer runs in an environment of its own (``--python``), which is no part of the lock. May import: the product,
``harness``.
"""
