"""The curriculum's section: one model a method, chosen by ``curriculum.method``.

A method has the keys that it reads and no others, so that a setting that would do nothing is an error. What several
methods share is a base class here; which keys a method has is the list of its bases and of its own.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field

from cures_ray.config_sections import Section


class CurriculumSection(Section):
    """What every method has: the size of the draw, and the beliefs that it reports and may learn from."""

    prompts_per_step: int = Field(256, ge=1)
    """Prompts drawn for one optimizer step (m). Raise it with `rollouts_per_step` for a steadier gradient."""
    prior_alpha: float = Field(1.0, gt=0)
    """Successes that a prompt is believed to have had before its first rollout."""
    prior_beta: float = Field(1.0, gt=0)
    """Failures that a prompt is believed to have had before its first rollout."""
    prior_from: Literal["mixture", "predictor", "level", "constant"] = "mixture"
    """What the belief about a prompt starts from. `mixture`: the mean of all recent rollouts, the accuracy of the
    prompt's level and a small predictor that reads the prompt, each weighted by how well it has forecast rollouts so
    far; a useless one costs nothing. The others are for experiments: one of them alone, or the constant prior."""
    predictor_features: Literal["text", "embedding", "hidden"] = "text"
    """What the predictor reads: hashed words of the prompt, the mean of the base model's token embeddings, or the base
    model's last hidden state after the prompt (`hidden`: one forward pass of the whole data before training)."""
    prior_strength: float = Field(4.0, gt=0)
    """How many rollouts a level's or the predictor's word is worth. It acts as a regulariser; with the mixture a poor
    prediction is weighted down by itself."""
    prior_scope: Literal["unseen", "all"] = "all"
    """`all`: every prompt's prior follows the prediction, and its own rollouts are added. `unseen`: only that of
    prompts without rollouts. Keep `all` unless the prediction gets worse during the run."""
    discount: float = Field(0.8, gt=0, le=1)
    """What is left of old rollouts in a belief at each new one of the prompt, and for each policy version of lag.
    Lower it when the policy changes fast."""
    snapshot_every: int = Field(50, ge=1)
    """Committed batches between two snapshots of the ledger. Lower it for a faster recovery."""

    @property
    def in_epochs(self) -> bool:
        """Prompts are drawn without replacement, each once an epoch."""
        return False

    @property
    def measures_gradients(self) -> bool:
        """The learner collects last-layer gradient statistics for the ledger."""
        return False

    @property
    def measures_cost(self) -> bool:
        """The ledger keeps a mean cost a rollout for each prompt."""
        return False

    @property
    def measures_drift(self) -> bool:
        """The learner measures how far it has moved on each prompt's last response."""
        return False

    @property
    def trains_pilots(self) -> bool:
        return False

    @property
    def pilots(self) -> int:
        """Pilot rollouts of a prompt; 0 without pilots."""
        return 0

    @property
    def bounds(self) -> tuple[int, int | None]:
        """Fewest and most rollouts of a drawn prompt; None: no limit."""
        return 1, None

    def without_effect(self) -> dict[str, str]:
        idle: dict[str, str] = {}
        if self.prior_from == "constant":
            idle |= dict.fromkeys(("prior_strength", "prior_scope"), "with prior_from = constant")
        if self.prior_from not in ("mixture", "predictor"):
            idle["predictor_features"] = f"with prior_from = {self.prior_from}"
        return idle


class _Total(CurriculumSection):
    rollouts_per_step: int = Field(256, ge=1)
    """Rollouts of one optimizer step (N), over all its prompts. How many each prompt gets is the method's choice."""

    @property
    def smallest_group(self) -> int:
        """Rollouts of the prompt that gets the fewest."""
        return self.rollouts_per_step // self.prompts_per_step


class _Draw(CurriculumSection):
    draw: Literal["with_replacement", "epoch"] = "with_replacement"
    """How uniform prompts are drawn: independently, or each once before any comes again (`epoch`)."""

    @property
    def in_epochs(self) -> bool:
        return self.draw == "epoch"


class _Kept(CurriculumSection):
    belief: Literal["discount", "none"] = "discount"
    """`discount`: old rollouts count less and less. `none`: all count the same for ever."""

    def without_effect(self) -> dict[str, str]:
        return super().without_effect() | _undiscounted(self.belief)


class _Moments(CurriculumSection):
    sigma: Literal["bernoulli", "last_layer"] = "bernoulli"
    """Noise of a prompt's gradient: that of its rewards, or measured in the model's last layer during training."""
    train_on_pilots: bool = False
    """Also train on the pilot rollouts. It saves rollouts, but pilots chose their own weight."""

    @property
    def measures_gradients(self) -> bool:
        return self.sigma == "last_layer"

    @property
    def trains_pilots(self) -> bool:
        return self.train_on_pilots


class _Most(CurriculumSection):
    n_max: int = Field(32, ge=1)
    """Most rollouts of a drawn prompt in one step."""


class UniformCurriculum(_Total, _Draw, _Kept):
    """Uniform prompts with equal shares: GRPO, RLOO, REINFORCE++ as they are usually run."""

    method: Literal["uniform"] = "uniform"


class CuresCurriculum(_Total, _Draw, _Moments, _Most):
    """CurES: prompts are drawn by how much their reward is expected to vary."""

    method: Literal["cures"] = "cures"
    sampling: Literal["potential", "uniform"] = "potential"
    """`potential`: prompts whose believed accuracy p is near one half come more often, by sqrt(p(1-p)) (eq. 14).
    `uniform`: all come alike; use it as the control of an experiment."""
    allocation: Literal["sigma", "rloo_gain", "cost_aware", "uniform"] = "uniform"
    """How rollouts are shared among the drawn prompts: equally, by the noise of their gradient (`sigma`, eq. 20), by
    RLOO's gain, or by noise over cost. `uniform` with one rollout a prompt did best here; pair the others with
    `n_min` of 2 or more and a group advantage."""
    n_min: int = Field(1, ge=1)
    """Fewest rollouts of a drawn prompt in one step. Advantages that compare rollouts need 2."""
    tau: float | None = Field(None, ge=1e-4, le=1e4)
    """Fixed temperature of the draw; small is greedy. None: steered to `target_ess_fraction`."""
    target_ess_fraction: float = Field(0.5, gt=0, le=1)
    """The temperature is steered so that the draw spreads over this share of the prompts. Lower it to focus more."""
    importance_weight_power: float = Field(0.0, ge=0, le=1)
    """Weighs drawn prompts by (uniform / draw probability) to this power. 1 optimises the mean over all prompts,
    with more noise; 0 the mean over drawn prompts."""
    belief_draw: Literal["mean", "thompson"] = "mean"
    """Draw by each belief's mean, or by one random accuracy from it, which explores uncertain prompts."""
    belief: Literal["reset", "discount", "none"] = "discount"
    """`discount`: old rollouts count less and less. `none`: all count the same for ever. `reset`: the paper's
    Algorithm 1, where beliefs start anew with each subset of the prompts and pilots fill them."""
    subsets: int = Field(1, ge=1)
    """Disjoint parts of the data that `belief: reset` takes one after the other (T)."""
    subset_steps: int = Field(10, ge=1)
    """Optimizer steps on each subset (M)."""
    pilot_rollouts: int = Field(0, ge=0)
    """Rollouts of every prompt before it may be drawn (N'). They are charged; needed with `belief: reset`."""

    @property
    def measures_cost(self) -> bool:
        return self.allocation == "cost_aware"

    @property
    def pilots(self) -> int:
        return self.pilot_rollouts

    @property
    def bounds(self) -> tuple[int, int | None]:
        return (1, None) if self.allocation == "uniform" else (self.n_min, self.n_max)

    @property
    def smallest_group(self) -> int:
        return super().smallest_group if self.allocation == "uniform" else self.n_min

    def without_effect(self) -> dict[str, str]:
        idle = super().without_effect() | _undiscounted(self.belief)
        if self.sampling == "uniform":
            keys = ("tau", "target_ess_fraction", "importance_weight_power", "belief_draw")
            idle |= dict.fromkeys(keys, "with sampling = uniform")
        elif self.tau is not None:
            idle["target_ess_fraction"] = "beside tau, which fixes the temperature"
        if self.allocation == "uniform":
            m, total = self.prompts_per_step, self.rollouts_per_step
            why = f"with allocation = uniform, which gives every draw {total} / {m} rollouts"
            idle |= dict.fromkeys(("n_min", "n_max", "sigma"), why)
        if self.belief != "reset":
            idle |= dict.fromkeys(("subsets", "subset_steps"), f"with belief = {self.belief}")
        if not self.pilot_rollouts:
            idle["train_on_pilots"] = "without pilot_rollouts"
        return idle


class GvmCurriculum(_Total, _Draw, _Kept, _Moments, _Most):
    """GVM (arXiv 2505.02391): uniform prompts, rollouts by the gradient variance that pilots show."""

    method: Literal["gvm"] = "gvm"
    pilot_rollouts: int = Field(4, ge=1)
    """Pilot rollouts of every drawn prompt (N'). They are charged."""
    gvm_alpha: float = Field(1e-3, gt=0)
    """Keeps the share of prompts that are almost never solved finite."""
    gvm_beta: float = Field(2.0, ge=0)
    """How strongly such prompts are held back."""

    @property
    def pilots(self) -> int:
        return self.pilot_rollouts

    @property
    def bounds(self) -> tuple[int, int | None]:
        return 1, self.n_max


class DapoCurriculum(_Total, _Draw, _Kept):
    """DAPO's dynamic sampling (arXiv 2503.14476): draws until enough groups have unequal rewards."""

    method: Literal["dapo"] = "dapo"
    dapo_max_rounds: int = Field(4, ge=1)
    """Most draws for one batch (the paper's `max_num_gen_batches`). Every rollout of them is charged."""


class SpeedCurriculum(_Draw, _Kept):
    """SPEED-RL (arXiv 2506.09016): a few rollouts screen a prompt, more follow where rewards are unequal."""

    method: Literal["speed"] = "speed"
    speed_screen_rollouts: int = Field(4, ge=1)
    """Rollouts that screen a prompt."""
    speed_continue_rollouts: int = Field(20, ge=1)
    """Further rollouts of a prompt whose screen had right and wrong answers."""

    @property
    def rollouts_per_step(self) -> int:
        """At most: those of a batch whose prompts all pass the screen."""
        return self.prompts_per_step * self.smallest_group

    @property
    def smallest_group(self) -> int:
        return self.speed_screen_rollouts + self.speed_continue_rollouts


class MoppsCurriculum(_Total, _Kept):
    """MoPPS (arXiv 2507.04632): among many candidates, the prompts whose sampled belief is nearest a target."""

    method: Literal["mopps"] = "mopps"
    mopps_pool_factor: int = Field(8, ge=1)
    """Candidates for each prompt that is taken."""
    mopps_target: float = Field(0.5, gt=0, lt=1)
    """The accuracy that is looked for."""


class SpoCurriculum(_Total):
    """SPO (arXiv 2509.13232): one rollout a prompt, the baseline is a tracker of the prompt's past rewards."""

    method: Literal["spo"] = "spo"
    prior_from: Literal["constant"] = "constant"
    """The tracker knows nothing but the prompt's own rewards."""
    prior_alpha: float = Field(0.5, gt=0)
    """Successes that a tracker starts with; they are forgotten like those that were seen."""
    prior_beta: float = Field(0.5, gt=0)
    """Failures that a tracker starts with."""
    belief: Literal["drift"] = "drift"
    """A tracker forgets by 2^(-D / `drift_half_life`), where D is how far the policy has moved on the prompt's last
    response, in nats a token. The learner measures it by a forward pass over that response. Where it does not have one
    (after a resume, or when another rank trained it) the tracker forgets by `discount`."""
    discount: float = Field(0.9, gt=0, le=1)
    """What is left of old rewards at each new one where the drift is not measured."""
    drift_half_life: float = Field(0.06, gt=0)
    """Nats a token of drift that halve what is remembered."""
    rho_min: float = Field(0.875, gt=0, lt=1)
    """Least that is left at a new reward."""
    rho_max: float = Field(0.96, gt=0, le=1)
    """Most that is left at a new reward."""
    exploration: float = Field(0.05, ge=0)
    """Added to sqrt(v(1-v)) in the weights of the draw, so that settled prompts come again."""
    pilot_rollouts: int = Field(8, ge=0)
    """Offline rollouts of every prompt that start the trackers. They are charged. 0: start from the prior."""

    @property
    def pilots(self) -> int:
        return self.pilot_rollouts

    @property
    def measures_drift(self) -> bool:
        return True


class GresoCurriculum(_Total, _Draw, _Kept):
    """GRESO (arXiv 2506.02177): as DAPO, but prompts with a history of equal rewards are skipped before any rollout."""

    method: Literal["greso"] = "greso"
    greso_max_rounds: int = Field(4, ge=1)
    """Most draws for one batch. Every rollout of them is charged."""
    greso_target_easy: float = Field(1 / 12, ge=0, le=1)
    """Share of groups with right answers only that the skipping aims at."""
    greso_target_hard: float = Field(1 / 6, ge=0, le=1)
    """Share of groups with wrong answers only that the skipping aims at."""
    greso_step: float = Field(0.01, gt=0, lt=1)
    """Change, at each batch, of the probability of trying such a prompt again."""


class AdaCurriculum(_Draw, _Kept):
    """Reinforce-Ada (arXiv 2510.04996): rounds of rollouts until a prompt has enough right and wrong answers."""

    method: Literal["reinforce_ada"] = "reinforce_ada"
    ada_round_rollouts: int = Field(8, ge=1)
    """Rollouts of a prompt in one round."""
    ada_max_rounds: int = Field(4, ge=1)
    """Most rounds for one batch."""
    ada_keep_rollouts: int = Field(4, ge=2)
    """Rollouts of a prompt that are trained, half of them right where there are enough."""

    @property
    def rollouts_per_step(self) -> int:
        """At most: those of a batch whose prompts all go through every round."""
        return self.prompts_per_step * self.ada_round_rollouts * self.ada_max_rounds

    @property
    def smallest_group(self) -> int:
        return self.ada_keep_rollouts


class KnapsackCurriculum(_Total, _Draw, _Kept, _Most):
    """Knapsack RL (arXiv 2509.25849): uniform prompts, rollouts where the belief expects the most to learn."""

    method: Literal["knapsack"] = "knapsack"
    n_min: int = Field(1, ge=1)
    """Fewest rollouts of a drawn prompt in one step."""

    @property
    def bounds(self) -> tuple[int, int | None]:
        return self.n_min, self.n_max

    @property
    def smallest_group(self) -> int:
        return self.n_min


def _undiscounted(belief: str) -> dict[str, str]:
    return {} if belief == "discount" else {"discount": f"with belief = {belief}"}


AnyCurriculum = (
    UniformCurriculum
    | CuresCurriculum
    | GvmCurriculum
    | DapoCurriculum
    | SpeedCurriculum
    | MoppsCurriculum
    | AdaCurriculum
    | KnapsackCurriculum
    | SpoCurriculum
    | GresoCurriculum
)
CurriculumConfig = Annotated[AnyCurriculum, Field(discriminator="method")]
METHODS: dict[str, type[CurriculumSection]] = {
    kind.model_fields["method"].default: kind for kind in get_args(AnyCurriculum)
}


def methods_with(key: str) -> list[str]:
    """The methods that have ``key``."""
    return [name for name, kind in METHODS.items() if key in kind.model_fields]
