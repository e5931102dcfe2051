"""Verdicts: mathematics, programs and users' functions, judged in processes that can be killed.

Promises: a fault is not a wrong answer; nothing a completion says runs outside the sandbox.
May import: the leaves.
"""
