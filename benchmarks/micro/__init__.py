"""Measurements of single parts: ledger, verifier, weights. May import: the product, ``harness``, ``inprocess``."""
