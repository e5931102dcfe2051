"""The estimator: advantages, losses, packing and gradient statistics, in NumPy and PyTorch.

Promises: the loss is a sum of per-token weights over the global batch, so unequal n stays unbiased.
May import: the leaves.
"""
