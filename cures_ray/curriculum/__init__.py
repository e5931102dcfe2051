"""What to practise: beliefs, sampling, allocation, methods, and the state machine that leases rollouts.

Promises: the same calls in the same order leave the same state; every rollout is accounted for.
May import: the leaves.
"""
