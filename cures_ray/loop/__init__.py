"""The one training loop, the Protocols of the workers around it, and evaluation.

Promises: nothing waits forever; a lost worker costs its work, not the run.
May import: the leaves, ``learning``, ``evaluation``.
"""
