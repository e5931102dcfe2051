"""The configuration: every key a user can set, with its default, its unit and its bounds.

Quantities carry units in their names: prompts, rollouts, tokens, seconds, MiB. The sections, with the meaning of their
keys, are in config_sections.py, config_data.py and config_curriculum.py. Here are the rules between sections. Unknown
keys are errors that suggest the nearest name (config_load.py).
"""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from cures_ray.config_curriculum import (
    METHODS,
    AdaCurriculum,
    CuresCurriculum,
    CurriculumConfig,
    DapoCurriculum,
    GresoCurriculum,
    GvmCurriculum,
    KnapsackCurriculum,
    MoppsCurriculum,
    SpeedCurriculum,
    SpoCurriculum,
    UniformCurriculum,
)
from cures_ray.config_data import DataConfig, ReasoningGymConfig, ReasoningGymTask
from cures_ray.config_sections import (
    Advantage,
    AlgoConfig,
    AsyncConfig,
    CheckpointConfig,
    EvalConfig,
    LearnerConfig,
    LoggingConfig,
    LoraConfig,
    ModelConfig,
    PlacementConfig,
    RayConfig,
    RolloutConfig,
    Section,
    TrainerConfig,
    VerifierConfig,
    WeightsConfig,
)

__all__ = [
    "METHODS",
    "NEEDS_A_PAIR",
    "AdaCurriculum",
    "Advantage",
    "AlgoConfig",
    "AsyncConfig",
    "CheckpointConfig",
    "Config",
    "CuresCurriculum",
    "CurriculumConfig",
    "DapoCurriculum",
    "DataConfig",
    "EvalConfig",
    "GresoCurriculum",
    "GvmCurriculum",
    "KnapsackCurriculum",
    "LearnerConfig",
    "LoggingConfig",
    "LoraConfig",
    "ModelConfig",
    "MoppsCurriculum",
    "PlacementConfig",
    "RayConfig",
    "ReasoningGymConfig",
    "ReasoningGymTask",
    "RolloutConfig",
    "Section",
    "SpeedCurriculum",
    "SpoCurriculum",
    "TrainerConfig",
    "UniformCurriculum",
    "VerifierConfig",
    "WeightsConfig",
]

NEEDS_A_PAIR = ("grpo", "rloo", "dr_grpo", "reinforce_pp_baseline")  # advantages that compare rollouts of one prompt


class Config(Section):
    model: ModelConfig = ModelConfig()
    """The policy."""
    data: DataConfig = DataConfig()
    """Prompts in."""
    curriculum: CurriculumConfig = CuresCurriculum()
    """Which prompts, and how many rollouts each."""
    rollout: RolloutConfig = RolloutConfig()
    """Generation."""
    algo: AlgoConfig = AlgoConfig()
    """From rewards to a loss."""
    async_rl: AsyncConfig = AsyncConfig()
    """How far generation may run ahead of training."""
    learner: LearnerConfig = LearnerConfig()
    """Training."""
    verifier: VerifierConfig = VerifierConfig()
    """Rewards."""
    weights: WeightsConfig = WeightsConfig()
    """From the learner to the generators."""
    placement: PlacementConfig = PlacementConfig()
    """Which machine runs what."""
    eval: EvalConfig = EvalConfig()
    """Held-out accuracy during the run."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """The run's folder."""
    logging: LoggingConfig = LoggingConfig()
    """What is written about the run."""
    trainer: TrainerConfig = TrainerConfig()
    """How long it runs."""
    ray: RayConfig = RayConfig()
    """The cluster."""

    @model_validator(mode="before")
    @classmethod
    def _default_method(cls, tree: Any) -> Any:
        """A curriculum without ``method`` is CurES."""
        if isinstance(tree, dict) and isinstance(section := tree.get("curriculum"), dict) and "method" not in section:
            return tree | {"curriculum": {"method": "cures"} | section}
        return tree

    @model_validator(mode="after")
    def check_deadlines(self) -> Config:
        """A silent generator must be found before the watchdog ends the run."""
        health, watchdog = self.rollout.health_timeout_s, self.trainer.no_progress_timeout_s
        if health >= watchdog:
            raise ValueError(
                f"rollout.health_timeout_s = {health:g} must be below trainer.no_progress_timeout_s = {watchdog:g}: "
                f"else the run ends before a silent generator is replaced"
            )
        if self.rollout.min_generators > self.rollout.num_generators:
            raise ValueError(
                f"rollout.min_generators = {self.rollout.min_generators} is more than rollout.num_generators = "
                f"{self.rollout.num_generators}"
            )
        return self

    @model_validator(mode="after")
    def check_elastic(self) -> Config:
        most, number = self.rollout.max_generators, self.rollout.num_generators
        if most is not None and most < number:
            raise ValueError(f"rollout.max_generators = {most} is less than rollout.num_generators = {number}")
        if most is not None and most > number and self.placement.colocate:
            raise ValueError(
                "rollout.max_generators: colocated generators live in the learner's GPUs and none can join; set "
                "placement.colocate = false, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def check_batch(self) -> Config:
        """Refuse a batch that no integer allocation can satisfy, with the arithmetic shown."""
        c, a = self.curriculum, self.algo
        m, total = c.prompts_per_step, c.rollouts_per_step
        least, most = c.bounds
        if most is not None and least > most:
            raise ValueError(f"curriculum.n_min = {least} is larger than curriculum.n_max = {most}")
        if m * least > total:
            what = "n_min" if "n_min" in c.model_fields_set else "1 rollout"
            raise ValueError(
                f"unsatisfiable batch: prompts_per_step x {what} = {m} x {least} = {m * least} rollouts is "
                f"more than rollouts_per_step = {total}; raise rollouts_per_step to {m * least} or lower "
                f"prompts_per_step to {total // least}"
            )
        if most is not None and most < total / m:
            raise ValueError(
                f"unsatisfiable batch: prompts_per_step x n_max = {m} x {most} = {m * most} rollouts is "
                f"less than rollouts_per_step = {total}; raise n_max to {-(-total // m)} or more"
            )
        if a.mini_batches > m:
            raise ValueError(f"algo.mini_batches = {a.mini_batches} is more than prompts_per_step = {m}; lower it")
        if a.advantage in NEEDS_A_PAIR and c.smallest_group < 2:
            how = "curriculum.n_min = 2" if least == c.smallest_group and most else "more rollouts_per_step"
            raise ValueError(
                f"algo.advantage = {a.advantage} compares rollouts of one prompt and needs 2 of each, but the "
                f"smallest group here is {c.smallest_group}; use {how}, or algo.advantage = posterior_loo"
            )
        if isinstance(c, CuresCurriculum):
            if c.draw == "epoch" and c.sampling != "uniform":
                raise ValueError("curriculum.draw = epoch needs curriculum.sampling = uniform")
            if c.belief == "reset" and c.pilot_rollouts == 0:
                raise ValueError("curriculum.belief = reset (Algorithm 1) needs curriculum.pilot_rollouts >= 1")
        return self
