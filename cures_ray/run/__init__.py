"""A run on disk: checks before it starts, its folder, checkpoints, logs and pictures.

Promises: bad input ends before any actor starts; a checkpoint is complete or absent.
May import: the leaves, ``data``, ``verify``.
"""
