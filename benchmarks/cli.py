"""``cures bench``: the benchmarks by name. Each imports only what it needs."""

from __future__ import annotations

import argparse
import importlib

BENCHMARKS = {  # subcommand -> (module with main(argv), or module:function; what it measures)
    "demo": ("benchmarks.harness.demo", "what `make demo` gives on several seeds"),
    "convergence": ("benchmarks.harness.convergence", "methods at equal cost, with confidence intervals"),
    "protocol": ("benchmarks.harness.protocol", "the comparison that is fixed in PROTOCOL.md, part by part"),
    "survey": ("benchmarks.harness.survey", "a base model's start accuracies by task, and the mixture that follows"),
    "sweep": ("benchmarks.harness.lr_sweep", "the same learning-rate sweep for every method, on seeds of its own"),
    "plateau": (
        "benchmarks.research.plateau",
        "base models that have been trained to a plateau, for the collapse question",
    ),
    "picture": ("benchmarks.research.readme_picture", "the README's picture, from the committed results"),
    "tables": ("benchmarks.harness.doc_tables", "the tables of the documents, from the committed results"),
    "map": ("benchmarks.research.map_picture", "one picture over several results: when the curriculum pays"),
    "show": ("benchmarks.harness.convergence:show", "tables and plots of a committed comparison"),
    "peers": ("benchmarks.peers.demo", "beside TRL's GRPOTrainer on the demo, in TRL's own environment"),
    "compare": ("benchmarks.harness.compare", "two result files; fails on a regression beyond the recorded spread"),
    "ledger-scale": ("benchmarks.micro.ledger_scale", "the curriculum at up to a million prompts"),
    "journal-sqlite": (
        "benchmarks.research.journal_sqlite",
        "the ledger's journal against SQLite",
    ),
    "control-plane": ("benchmarks.micro.control_plane", "rollouts/s and CPU of driver, ledger and the actors around"),
    "virtual-time": ("benchmarks.micro.virtual_time", "how many generators one driver and one ledger carry"),
    "verifier": ("benchmarks.micro.verifier", "verdicts per second"),
    "weight-sync": ("benchmarks.micro.weight_sync", "weights from the learner to the generators"),
    "weight-nodes": ("benchmarks.micro.weight_nodes", "weights to the generators of another node"),
    "lora": ("benchmarks.micro.lora", "memory and seconds of LoRA against full training"),
    "soak": ("benchmarks.micro.soak", "a long run under fire, and the same in peace: growth, time lost, accuracy"),
    "gradient-stats": ("benchmarks.micro.gradient_stats", "cost of the output-layer statistics"),
}


def main(argv: list[str]) -> int:
    """Exit code of the benchmark."""
    parser = argparse.ArgumentParser(prog="cures bench", description="Run a benchmark.")
    parser.add_argument(
        "benchmark", choices=list(BENCHMARKS), help="; ".join(f"{k}: {v[1]}" for k, v in BENCHMARKS.items())
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see cures bench BENCHMARK --help")
    known = parser.parse_args(argv)
    place, _, function = BENCHMARKS[known.benchmark][0].partition(":")
    return int(getattr(importlib.import_module(place), function or "main")(known.arguments))
