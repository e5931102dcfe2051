"""Weights from the learner to the generators, a backend a module. May import: the library."""
