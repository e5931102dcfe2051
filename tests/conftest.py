import os

# Before torch loads its OpenMP, as `cures` does: threads that spin while they wait starve the other processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
