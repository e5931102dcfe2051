"""One-off questions. May import: the product, ``harness``, ``inprocess``."""
