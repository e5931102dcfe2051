"""Sweeps of arms over seeds, statistics, tables and plots. May import: the product, ``inprocess``."""
