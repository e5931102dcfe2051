"""The curriculum made durable: a journal before every answer, snapshots, and what people read of them.

Promises: a process killed at any byte comes back with the same counts.
May import: the leaves, ``curriculum``, ``data`` (to show prompts).
"""
