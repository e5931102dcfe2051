"""The command line. May import: everything but ``benchmarks`` (``cures bench`` loads it by name)."""
