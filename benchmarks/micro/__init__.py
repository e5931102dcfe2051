"""Measurements of single parts: ledger, verifier, weights, statistics. May import: the product, ``harness``."""
