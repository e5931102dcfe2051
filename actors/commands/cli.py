"""The ``cures`` command. Each subcommand imports only what it needs, so that --help is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from cures_ray.messages import ConfigError, RunError


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cures``. Exit codes: 0 done, 1 run failed, 2 bad input."""
    # Before torch loads its OpenMP: threads that spin while they wait lose two thirds of the speed as soon as another
    # process wants a core (28 instead of 84 GFLOP/s on two cores with one of them busy).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="cures", description=__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"cures-ray {version('cures-ray')}")
    parser.add_argument("command", choices=list(COMMANDS), help="; ".join(f"{k}: {v[1]}" for k, v in COMMANDS.items()))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see cures COMMAND --help")
    known = parser.parse_args(argv)
    try:
        return COMMANDS[known.command][0](known.arguments)
    except ConfigError as error:
        print(f"cures {known.command}: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"cures {known.command}: the run failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"cures {known.command}: interrupted", file=sys.stderr)
        return 130


def _train(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="cures train", description="Train from a configuration file.")
    parser.add_argument("config", type=Path, help="a .yaml or .toml file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print what would run, start nothing")
    parser.add_argument("--no-data", action="store_true", help="with --dry-run: do not look for model and data")
    args = parser.parse_intermixed_args(argv)
    from cures_ray.config_load import load_config

    config = load_config(args.config, args.overrides)
    if args.dry_run:
        from actors.commands.dry_run import dry_run

        for section in dry_run(config, with_inputs=not args.no_data):
            print(section, flush=True)
        return 0
    from actors.cluster.launch import train
    from actors.commands.ending import ending

    try:
        summary = train(config)
    except SystemExit as error:  # Ray's own answer to SIGTERM while it starts
        raise KeyboardInterrupt from error
    print(ending(summary))
    return 0 if summary.interrupted_at is None else 130


def _prepare(argv: list[str]) -> int:
    if argv[:1] == ["smollm2"]:
        from actors.commands.smollm2 import main as smollm2

        return smollm2(argv[1:])
    from cures_ray.synthetic.base_model import main as prepare

    return prepare(argv)


def _eval(argv: list[str]) -> int:
    from actors.commands.evaluate import main as evaluate

    return evaluate(argv)


def _export(argv: list[str]) -> int:
    from actors.commands.export import main as export

    return export(argv)


def _ledger(argv: list[str]) -> int:
    from cures_ray.ledger.report import main as report

    return report(argv)


def _top(argv: list[str]) -> int:
    from cures_ray.run.top import main as top

    return top(argv)


def _report(argv: list[str]) -> int:
    from cures_ray.run.report import main as report

    return report(argv)


def _dashboard(argv: list[str]) -> int:
    from actors.commands.dashboard import main as dashboard

    return dashboard(argv)


def _doctor(argv: list[str]) -> int:
    from actors.commands.doctor import main as doctor

    return doctor(argv)


def _bench(argv: list[str]) -> int:
    from benchmarks.cli import main as bench

    return bench(argv)


def _submit(argv: list[str]) -> int:
    from actors.commands.submit import main as submit

    return submit(argv)


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (_train, "train from a configuration"),
    "submit": (_submit, "train as a job on a Ray cluster"),
    "prepare": (_prepare, "make a synthetic task and a small base model, or get a real one: prepare smollm2"),
    "eval": (_eval, "held-out accuracy of a model folder, with plain vLLM"),
    "export": (_export, "the model of a checkpoint as a Hugging Face folder"),
    "ledger": (_ledger, "what the curriculum of a run did, and would have done"),
    "top": (_top, "watch a run, with what is wrong and what to do"),
    "report": (_report, "one page about a run: verdict, curves, beliefs, samples, settings"),
    "dashboard": (_dashboard, "Prometheus and Grafana for a Ray cluster, with the board of a run"),
    "bench": (_bench, "run a benchmark"),
    "doctor": (_doctor, "check versions, accelerator, Ray, paths and verifier"),
}

if __name__ == "__main__":
    sys.exit(main())
