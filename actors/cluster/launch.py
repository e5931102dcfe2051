"""From a configuration to a finished run: Ray, placement groups, actors, the driver, teardown."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import signal
import threading
import time
import uuid
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.adapters import RayLedger, RayVerifiers, answer
from actors.cluster.colocate import asleep
from actors.cluster.connect import own_ray
from actors.cluster.fleet import RayFleet
from actors.cluster.placement import Placement, live_nodes
from actors.cluster.places import Options, OwnPlaces
from actors.cluster.probe import check_shared
from actors.cluster.rollout_table import show_rollouts
from actors.cluster.usage import CpuMeter
from actors.generator import GeneratorActor
from actors.learner import LearnerGroup
from actors.ledger import LedgerActor
from actors.telemetry import ProcessGauges, RunGauges, dashboard_place
from actors.verifier import VerifierActor
from actors.weights.backend import resolve, road
from actors.weights.shm import shm_folder
from cures_ray.config import Config
from cures_ray.data.table import curriculum_columns
from cures_ray.ledger.ledger import begin_session
from cures_ray.ledger.prompts import write_prompts
from cures_ray.loop.driver import Driver, Ports
from cures_ray.loop.evaluate import Evaluator
from cures_ray.loop.ports import LearnerLost
from cures_ray.loop.sample_log import SampleLog
from cures_ray.messages import ConfigError, RunError
from cures_ray.run.checkpoint import CheckpointStore, step_of
from cures_ray.run.preflight import Inputs, prepare_inputs
from cures_ray.run.sinks import RunLog
from cures_ray.run.summary import RunSummary


def train(config: Config, inputs: Inputs | None = None) -> RunSummary:
    """Run ``config`` to its end. Blocks; SIGINT and SIGTERM end the run after a checkpoint.

    Raises:
        ConfigError: before any actor starts.
        RunError: a failure that the run cannot survive.
    """
    inputs = inputs or prepare_inputs(config)
    try:
        return _train(config, inputs)
    finally:
        inputs.release()


def _train(config: Config, inputs: Inputs) -> RunSummary:
    if inputs.resume is not None and step_of(inputs.resume) >= config.trainer.steps:
        raise ConfigError(
            f"{inputs.run_dir} has trained {step_of(inputs.resume)} steps already and trainer.steps is "
            f"{config.trainer.steps}: nothing to do; raise trainer.steps, or choose another checkpoint.dir"
        )
    began = time.monotonic()
    _interrupt_on_sigterm()  # until the event loop takes over
    with own_ray(config):
        _interrupt_on_sigterm()  # again: Ray has put a handler of its own there
        run = Run(config, inputs)
        try:
            return asyncio.run(run.execute(began))
        except asyncio.CancelledError:  # by ``Run.interrupt``
            raise KeyboardInterrupt from None
        finally:
            run.teardown()


class Run:
    """The actors of one run and their end."""

    def __init__(self, config: Config, inputs: Inputs) -> None:
        self.config, self.inputs = config, inputs
        self.placement = Placement(config)
        try:
            check_shared(config, inputs.run_dir, self.placement.nodes())
            if isinstance(self.placement.generators, OwnPlaces):
                self.placement.generators.check = self._check_node
        except BaseException:
            self.placement.remove()
            raise
        self.name = f"cures-{inputs.run_dir.name}-{uuid.uuid4().hex[:4]}"  # what the names of its actors begin with
        sinks = [RunGauges(inputs.run_dir.name)] if config.logging.ray_metrics else []
        start = step_of(inputs.resume) if inputs.resume else 0
        self.log = RunLog(config, inputs.run_dir, start=start, sinks=sinks)
        self.shm = shm_folder(inputs.run_dir)
        self.actors: list[Any] = []
        self.starts: Counter[str] = Counter()  # of each generator; a killed one gives its name back some time later
        self.learner: LearnerGroup | None = None
        self.driver: Driver | None = None
        self.main: asyncio.Task[Any] | None = None  # ``execute``
        self.signals = 0  # SIGINT and SIGTERM so far
        self.ledger: Any = None
        self.backend = self._backend()
        tables = {"train": inputs.train} | ({"eval": inputs.eval} if inputs.eval is not None else {})
        self.prompts = ray.put(tables)  # generators and verifiers look leases up in them
        self.golds = ray.put({name: replace(table, tokenizer=None) for name, table in tables.items()})
        self.store = CheckpointStore(inputs.run_dir, config.checkpoint.keep)
        for note in inputs.notes:
            self.log.note(note)

    async def execute(self, began: float) -> RunSummary:
        self.main = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(NotImplementedError, RuntimeError, ValueError):
                asyncio.get_running_loop().add_signal_handler(number, self.interrupt, number)
        ports = await self._start_actors()
        evaluator = self._evaluator(ports)
        version = 0
        if self.inputs.resume is not None:
            version = step_of(self.inputs.resume)
            evaluator.history = _load_history(self.inputs.resume)
            self.log.note(f"resuming from {self.inputs.resume} at version {version}")
        started = time.monotonic()
        await self.cpu.read()  # what came before is the start
        self.log.note(f"all actors are up after {started - began:.0f} s; in {self.inputs.run_dir}{dashboard_place()}")
        watch = asyncio.create_task(ProcessGauges(self.config, "driver", "driver", children=False).watch())
        for restarts in itertools.count():
            driver = self.driver = Driver(
                self.config,
                ports,
                self.log,
                version=version,
                evaluate=evaluator if self.inputs.eval is not None else None,
                save_checkpoint=lambda v: self._save(v, ports, evaluator),
                show_rollouts=partial(show_rollouts, config=self.config, prompts=self.inputs.train, log=self.log)
                if self.log.has_tables
                else None,
            )
            if self.signals:  # one that came before there was a driver
                driver.stop()
            try:
                accounting = await driver.run()
                break
            except LearnerLost as error:
                if restarts == self.config.trainer.max_restarts:
                    raise
                version = await self._restart_learner(ports, evaluator, driver.version, str(error))
        watch.cancel()
        await self.cpu.read()
        summary = RunSummary(
            accounting=accounting,
            evaluations=evaluator.history,
            seconds_start=started - began,
            seconds_training=time.monotonic() - started,
            run_dir=self.inputs.run_dir,
            seed=self.config.trainer.seed,
            interrupted_at=driver.interrupted_at,
            steps=self.config.trainer.steps,
            cpu_seconds=dict(self.cpu.totals),
            verifier_faults=driver.fault_reasons,
        )
        if self.config.checkpoint.export_final:
            target = self.inputs.run_dir / "model"
            try:
                await ports.learner.export(target)
                summary.exported = target
            except RunError as error:  # everything is in the last checkpoint
                again = f"cures export {self.inputs.run_dir} --out {target}-again"
                self.log.note(f"the model could not be exported ({error}); repeat it with: {again}")
        path = self.inputs.run_dir / "summary.json"
        path.write_text(json.dumps(summary.as_json(), indent=1) + "\n")
        return summary

    async def _restart_learner(self, ports: Ports, evaluator: Evaluator, reached: int, why: str) -> int:
        """Learner and ledger back to the newest checkpoint, generators stay; the version to go on from."""
        began = time.monotonic()
        assert self.learner is not None
        lost = (await ports.ledger.status()).accounting
        checkpoint, _ = self.store.newest_intact()
        version = step_of(checkpoint) if checkpoint else 0
        await self.learner.restart(checkpoint / "learner" if checkpoint else None)
        await self.fleet.reset()  # what they work on belongs to the ledger that ends here
        ray.kill(self.ledger)
        ports.ledger = RayLedger(self._ledger(checkpoint))
        kept = (await ports.ledger.status()).accounting
        evaluator.history = [entry for entry in evaluator.history if entry[0] <= version]
        self.log.rewind(version)
        self.log.note(
            f"{why}. Restarted from {checkpoint or 'the model'} in {time.monotonic() - began:.0f} s: "
            f"{reached - version} steps and {lost.planned - kept.planned} rollouts are made again"
        )
        return version

    def interrupt(self, number: int) -> None:
        """The first signal stops the run after its step; a second Ctrl-C ends it. Job servers repeat SIGTERM."""
        self.signals += 1
        if self.driver is not None and (self.signals == 1 or number == signal.SIGTERM):
            self.driver.stop()
        elif self.main is not None:
            saved = "what was saved last stays" if self.driver is not None else "nothing was trained"
            self.log.note(f"interrupted{'' if self.signals == 1 else ' again'}: ending now; {saved}")
            self.main.cancel()

    async def _start_actors(self) -> Ports:
        """Generators, learner and verifiers start side by side; the ledger last, when everything stands."""
        config, inputs = self.config, self.inputs
        options = [self.placement.options("learner", rank) for rank in range(config.learner.num_ranks)]
        fleet = self.fleet = RayFleet(self._generator, self.placement.generators, config, self.log.note)
        alone = partial(asleep, fleet.members.values) if config.placement.colocate else nullcontext
        learner = self.learner = LearnerGroup(config, options, alone, f"{self.name}-learner")
        verifiers = [self._verifier(i) for i in range(config.verifier.num_workers)]
        resume = inputs.resume / "learner" if inputs.resume else None
        canary = [inputs.train.row(i).token_ids for i in range(min(config.weights.canary_prompts, len(inputs.train)))]
        await asyncio.gather(
            learner.start(self.shm, self.backend, canary, resume),
            fleet.launch(),
        )
        ledger = self._ledger(inputs.resume)
        self.cpu = CpuMeter(
            lambda: {
                "ledger": [self.ledger],
                "generator": [g.handle for g in fleet.members.values()],
                "verifier": verifiers,
                "learner": learner.ranks,
            }
        )
        return Ports(
            ledger=RayLedger(ledger),
            fleet=fleet,
            verifier=RayVerifiers(verifiers, config),
            learner=learner,
            usage=self.cpu.take,
        )

    def _backend(self) -> str:
        """Ray's GPUs may be logical ones on a CPU host: the learner's node is asked whether CUDA is there."""

        def on_gpu() -> bool:
            if not self.placement.roles["learner"].gpus:
                return False
            probe = ray.remote(_has_cuda).options(**self.placement.options("learner", 0))
            return bool(ray.get(probe.remote(), timeout=self.config.placement.timeout_s + 60))

        return resolve(self.config, on_gpu=on_gpu, nodes=len(live_nodes()))

    def _ledger(self, checkpoint: Path | None) -> Any:
        inputs = self.inputs
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)  # beside its folder
        options = {"name": f"{self.name}-ledger", "num_cpus": 0, "max_restarts": -1, "max_task_retries": 0}
        actor = ray.remote(LedgerActor).options(scheduling_strategy=here, **options)
        folder = inputs.run_dir.resolve() / "ledger"
        write_prompts(folder, *curriculum_columns(self.config, inputs.train), inputs.train.columns["text"])
        session = uuid.uuid4().hex
        begin_session(folder, session)
        handle = actor.remote(
            str(folder),
            self.config,
            session,
            str(checkpoint.resolve() / "ledger") if checkpoint else None,
        )
        self.ledger = handle
        self.actors.append(handle)
        return handle

    def _check_node(self, node_id: str) -> None:
        """Of a generator that joins."""
        check_shared(self.config, self.inputs.run_dir, {"generator": [node_id]})

    def _generator(self, name: str, options: Options) -> Any:
        self.starts[name] += 1
        again = f"-again-{self.starts[name] - 1}" if self.starts[name] > 1 else ""
        options |= {"name": f"{self.name}-{name}{again}", "max_concurrency": 1000}
        handle = (
            ray.remote(GeneratorActor)
            .options(**options)
            .remote(name, self.config, self.config.model.path, self.prompts)
        )
        self.actors.append(handle)
        return handle

    def _verifier(self, index: int) -> Any:
        options = self.placement.options("verifier", index)
        name = f"verifier-{index}"
        options |= {"name": f"{self.name}-{name}", "max_restarts": -1, "max_task_retries": 0, "max_concurrency": 64}
        handle = ray.remote(VerifierActor).options(**options).remote(self.config, self.golds, name)
        self.actors.append(handle)
        return handle

    def _evaluator(self, ports: Ports) -> Evaluator:
        prompts = self.inputs.eval if self.inputs.eval is not None else self.inputs.train
        c = self.config
        samples = SampleLog(
            self.inputs.run_dir / "samples.jsonl",
            c.eval.logged_samples,
            lambda payload: answer(payload, "samples", c.rollout.timeout_s),
        )
        constants = prompts.best_constant()
        return Evaluator(prompts, ports.verifier, c.eval.samples_per_prompt, c.trainer.seed, samples, constants)

    async def _save(self, version: int, ports: Ports, evaluator: Evaluator) -> None:
        async def write(folder: Path) -> None:
            for part in ("learner", "ledger"):
                (folder / part).mkdir()
            await ports.learner.save(folder / "learner")
            await ports.ledger.save(folder / "ledger")
            state = {"version": version, "evaluations": [[v, m] for v, m in evaluator.history]}
            (folder / "driver.json").write_text(json.dumps(state))

        await self.store.save(version, write)

    def teardown(self) -> None:
        """End every actor, placement group and shared-memory file of this run."""
        for handle in [*self.actors, *(self.learner.ranks if self.learner else [])]:
            with suppress(Exception):
                ray.kill(handle)
        with suppress(Exception):
            road(self.backend).end()
        self.placement.remove()
        shutil.rmtree(self.shm, ignore_errors=True)
        self.log.close()


def _interrupt_on_sigterm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt: end in order


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _load_history(checkpoint: Path) -> list[tuple[int, dict[str, float]]]:
    state = json.loads((checkpoint / "driver.json").read_text())
    return [(int(v), {k: float(x) for k, x in m.items()}) for v, m in state["evaluations"]]
