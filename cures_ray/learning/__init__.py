"""The estimator and the learner step: advantages, thinning, losses, packing, gradient statistics, policy, LoRA.

Promises: every learner runs the one step here, in plain torch. The loss is a sum of per-token weights over the global
batch, so unequal n stays unbiased. May import: the leaves.
"""
