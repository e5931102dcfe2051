"""What another tau, method or N would have drawn, answered from the journal.

    snapshot --apply--> Curriculum --(a batch is about to be drawn)--> its own draw
                            '--copy of the pool--> the other configuration's draw

Both draws read the same beliefs and the same random stream (seed, batch, round 0), so what differs comes from the
settings. Each batch is one step from the beliefs that the run had: not what the other run would have learned later.
Only round 0 of a batch is answered; later rounds depend on rewards that nobody measured.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from scipy.special import betaln

from cures_ray.config import Config
from cures_ray.config_load import load_config
from cures_ray.curriculum.batches import Batch, Round
from cures_ray.curriculum.machine import Curriculum
from cures_ray.curriculum.methods import METHODS
from cures_ray.curriculum.planning import Method
from cures_ray.curriculum.pool import PromptPool
from cures_ray.curriculum.sampling import EpochSampler
from cures_ray.ledger.ledger import generations, history_line, journal_path
from cures_ray.ledger.read import Run
from cures_ray.messages import ConfigError

# they shape the beliefs, and the beliefs are those of the run
BELIEF_KEYS = (
    *("prior_alpha", "prior_beta", "prior_from", "prior_strength", "prior_scope"),
    *("belief", "discount", "subsets", "subset_steps"),
)
# what they need is measured only by a run that has them
MEASURED = {"sigma": ("last_layer", "gradient statistics"), "allocation": ("cost_aware", "the cost of rollouts")}
OTHER_KEYS = ("algo.advantage", "trainer.seed")  # besides the curriculum's, these change a draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """Round 0 of one batch. k = prompts with rollouts."""

    batch: int
    role: str  # "train" | "pilot" | "screen"
    index: np.ndarray  # int64 [k] rows
    n: np.ndarray  # int64 [k] rollouts
    alpha: np.ndarray  # float64 [k] belief before the draw
    beta: np.ndarray
    tau: float  # NaN: the method has none
    ess: float  # of rho*, in prompts; NaN likewise

    @property
    def p(self) -> np.ndarray:
        """Posterior mean of the accuracy, float64 [k]."""
        return self.alpha / (self.alpha + self.beta)

    def figures(self, actual: Drawn) -> dict[str, Any]:
        """One row of the table; shares of rollouts. ``mixed``: in groups with both outcomes, 1 - p^n - (1-p)^n at the
        posterior mean; ``mixed_posterior``: averaged over the posterior, which also counts how little is known;
        ``overlap``: of prompts, also in the actual draw."""
        share, p = self.n / max(self.n.sum(), 1), self.p
        return {
            "batch": self.batch,
            "role": self.role,
            "rollouts": int(self.n.sum()),
            "tau": self.tau,
            "ess": self.ess,
            "distinct_prompts": len(self.index),
            "max_n": int(self.n.max(initial=0)),
            "mean_accuracy": float(share @ p),
            "mixed": float(share @ (1.0 - p**self.n - (1.0 - p) ** self.n)),
            "mixed_posterior": float(share @ both_outcomes(self.alpha, self.beta, self.n)),
            "hard": float(share @ (p < 0.1)),
            "easy": float(share @ (p > 0.9)),
            "overlap": float(np.isin(self.index, actual.index).mean()) if len(self.index) else 0.0,
        }


def both_outcomes(alpha: np.ndarray, beta: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Probability that n rollouts of a prompt with p ~ Beta(alpha, beta) are neither all right nor all wrong [k]:
    1 - E[p^n] - E[(1-p)^n], with E[p^n] = B(alpha + n, beta) / B(alpha, beta)."""
    whole = betaln(alpha, beta)
    return 1.0 - np.exp(betaln(alpha + n, beta) - whole) - np.exp(betaln(alpha, beta + n) - whole)


@dataclass(slots=True, kw_only=True)
class Replay:
    """``others[a][b]`` is what alternative a would have drawn as ``actual[b]``."""

    overrides: list[list[str]]
    notes: list[str]  # about the alternatives
    actual: list[Drawn] = field(default_factory=list)
    others: list[list[Drawn]] = field(default_factory=list)
    agrees: int = 0  # committed batches whose leases are those of the history
    compared: int = 0
    problems: list[str] = field(default_factory=list)

    def sides(self) -> dict[str, list[Drawn]]:
        """The run and its alternatives by name."""
        names = [" ".join(words) for words in self.overrides]
        return {"the run": self.actual, **dict(zip(names, self.others, strict=True))}

    def totals(self, drawn: list[Drawn]) -> dict[str, Any]:
        """Sums of counts, means over batches of tau and ESS, means over rollouts of the rest."""
        rows = pd.DataFrame([d.figures(a) for d, a in zip(drawn, self.actual, strict=True)])
        shares = rows.loc[:, "mean_accuracy":].mul(rows.rollouts, axis=0).sum() / max(rows.rollouts.sum(), 1)
        return {
            "batches": len(rows),
            "rollouts": int(rows.rollouts.sum()),
            "tau": float(rows.tau.mean()),
            "ess": float(rows.ess.mean()),
            "distinct_prompts": len(np.unique(np.concatenate([d.index for d in drawn]))),
            "max_n": int(rows.max_n.max()),
            **shares.to_dict(),
        }


def replay(run: Run, overrides: Sequence[Sequence[str]]) -> Replay:
    """Answer each list of ``key=value`` overrides for every batch that the kept journals draw.

    Raises:
        ConfigError: an override that is wrong or cannot be answered, or no snapshot that can be read.
    """
    configs = [alternative(run, words) for words in overrides]
    result = Replay(overrides=[list(words) for words in overrides], notes=_notes(run, overrides, configs))
    result.others = [[] for _ in configs]
    history = {line["batch"]: line for line in run.history}
    curriculum: Curriculum | None = None

    def check(record: list[Any], answer: Any) -> None:
        if record[0] == "commit" and record[1] in history and curriculum is not None:
            line, old = history_line(curriculum, record[1]), history[record[1]]
            result.compared += 1
            result.agrees += line["n"] == old["n"] and np.allclose(line["p"], old["p"], atol=1.5e-4)

    for number in generations(run.ledger):
        if curriculum is None:  # else the journal before ended where this one begins
            try:
                curriculum = run.load(number)
            except ConfigError:
                if journal_path(run.ledger, number).exists():
                    raise
                continue  # the run has just removed it
            _listen(curriculum, configs, result)
        problem = run.play(number, curriculum, check)
        if problem:
            result.problems.append(problem)
            curriculum = None
    if result.agrees < result.compared:
        result.problems.append(
            f"{result.compared - result.agrees} of {result.compared} replayed batches differ from RUN/ledger/"
            "history.jsonl: the run was made by another version of this code, so this replay is not exact"
        )
    return result


def alternative(run: Run, overrides: Sequence[str]) -> Config:
    """The run's configuration with ``overrides``; a bare key is one of the curriculum.

    Raises:
        ConfigError: unknown keys, bad values, an unsatisfiable batch, or a key that a journal cannot answer.
    """
    dotted = [word if "." in word.partition("=")[0] else f"curriculum.{word}" for word in overrides]
    keys = [word.partition("=")[0].strip() for word in dotted]
    if "curriculum.target_ess_fraction" in keys and "curriculum.tau" not in keys and _tau(run.config) is not None:
        dotted.append("curriculum.tau=null")  # the run's fixed tau would hide it
    where = f"--replay {' '.join(overrides)}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        path.write_text(yaml.safe_dump(run.config.model_dump()))
        try:
            config = load_config(path, dotted)
        except ConfigError as error:
            raise ConfigError(str(error).replace(f"configuration {path}", where)) from None
    c, old = config.curriculum, run.config.curriculum
    for key in keys:
        section, _, name = key.partition(".")
        if key not in OTHER_KEYS and section != "curriculum":
            raise ConfigError(f"{where}: {key} does not change what is drawn; keys of the curriculum do")
        if name in BELIEF_KEYS and getattr(c, name, None) != getattr(old, name, None):
            raise ConfigError(
                f"{where}: {key} shapes the beliefs, and a replay takes those of the run; measure it with a new run"
            )
    for name, (value, what) in MEASURED.items():
        if getattr(c, name, None) == value != getattr(old, name, None):
            raise ConfigError(
                f"{where}: curriculum.{name} = {value} needs {what}, which this run did not keep "
                f"(its curriculum.{name} = {getattr(old, name, 'not set')}); measure it with a new run"
            )
    return config


def _notes(run: Run, overrides: Sequence[Sequence[str]], configs: list[Config]) -> list[str]:
    notes, old = [], run.config.curriculum
    for words, config in zip(overrides, configs, strict=True):
        c, name = config.curriculum, " ".join(words)
        if c.model_dump() == old.model_dump():
            notes.append(f"{name}: the run's own curriculum")
        if c.method == "cures" and c.tau is None and (tau := _tau(run.config)) is not None:
            notes.append(f"{name}: the run's tau = {tau} is dropped, tau is steered to the ESS")
        if c.method == "cures" and c.pilot_rollouts:
            notes.append(f"{name}: batches that begin with pilots are answered by their pilots (marked)")
    several = {c.method for c in (old, *(config.curriculum for config in configs))} & MULTI_ROUND
    if several:
        notes.append(f"{', '.join(sorted(several))}: a batch has several rounds, only round 0 is answered and counted")
    return notes


def _tau(config: Config) -> float | None:
    return config.curriculum.tau if config.curriculum.method == "cures" else None


MULTI_ROUND = {"gvm", "dapo", "speed", "reinforce_ada"}


def _listen(curriculum: Curriculum, configs: list[Config], result: Replay) -> None:
    """Ask the alternatives whenever ``curriculum`` is about to draw round 0 of a batch."""
    next_of_run: Callable[[PromptPool, Batch], Round | None] = curriculum.method.next_round

    def next_round(pool: PromptPool, batch: Batch) -> Round | None:
        if batch.rounds:
            return next_of_run(pool, batch)
        others = [_ask(pool, config, batch, words) for config, words in zip(configs, result.overrides, strict=True)]
        planned = next_of_run(pool, batch)
        if planned is not None:
            result.actual.append(_drawn(pool, batch, planned))
            for drawn, other in zip(result.others, others, strict=True):
                drawn.append(other)
        return planned

    curriculum.method = Method(next_round, curriculum.method.select)


def _ask(pool: PromptPool, config: Config, batch: Batch, words: Sequence[str]) -> Drawn:
    """Round 0 of ``config``'s method, on a copy of the pool."""
    kept = (*pool.mixture.experts.values(), pool.config)  # a draw does not change them
    other = copy.deepcopy(pool, {id(part): part for part in kept})
    other.config = config
    m, epoch = config.curriculum.prompts_per_step, config.curriculum.in_epochs
    if epoch and (pool.epochs is None or m != pool.config.curriculum.prompts_per_step):
        other.epochs = EpochSampler(other.size, config.trainer.seed)
        place = np.array(divmod(batch.number * m, other.size))  # as if every batch had been drawn so
        other.epochs.load_state_dict({"epoch_position": place})
    elif not epoch:
        other.epochs = None
    fresh = Batch(number=batch.number)
    try:
        planned = METHODS[config.curriculum.method].next_round(other, fresh)
    except ValueError as error:
        raise ConfigError(f"--replay {' '.join(words)}: batch {batch.number} cannot be drawn: {error}") from None
    if planned is None:
        raise ConfigError(f"--replay {' '.join(words)}: batch {batch.number} would have been empty")
    return _drawn(other, fresh, planned)


def _drawn(pool: PromptPool, batch: Batch, planned: Round) -> Drawn:
    given = planned.n > 0
    index = planned.index[given]
    alpha, beta = pool.belief.counts(index)
    nan = float("nan")
    return Drawn(
        batch=batch.number,
        role=planned.role,
        index=index,
        n=planned.n[given],
        alpha=alpha,
        beta=beta,
        tau=planned.metrics.get("tau", nan),
        ess=planned.metrics.get("ess", nan),
    )
