"""The configuration: every key a user can set, with its default, its unit and its bounds.

Quantities carry units in their names: prompts, rollouts, tokens, seconds, MiB. Unknown keys are errors
that suggest the nearest name (``config_load.py``). Cross-field rules that need arithmetic are in
``Config.check_batch``.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Method = Literal["uniform", "cures", "gvm", "dapo", "speed", "mopps", "reinforce_ada", "knapsack"]
Advantage = Literal[
    "grpo",
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "posterior_loo",
    "posterior_centred",
    "posterior_std",
    "raft_pp",
]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


class LoraConfig(Section):
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)  # the adapters' output is scaled by alpha / rank
    targets: str | list[str] = "all-linear"  # layers with adapters: all below the output layer, or names as in q_proj


class ModelConfig(Section):
    path: str = ""  # a Hugging Face folder or Hub name
    revision: str | None = None
    trust_remote_code: bool = False
    lora: LoraConfig | None = None  # train low-rank adapters and keep the model frozen; None: train every parameter


class ReasoningGymTask(Section):
    name: str  # as the package calls it: chain_sum, gcd, calendar_arithmetic, ...
    params: dict[str, Any] = {}  # of the task, such as {min_terms: 2, max_digits: 1}
    weight: float = Field(1.0, gt=0)  # share of the prompts, against the other tasks
    label: str | None = None  # the level in reports; None: the name
    balance_answers: bool = False  # every answer equally often: for tasks with few answers, such as Yes and No


class ReasoningGymConfig(Section):
    train_size: int = Field(2048, ge=1)  # prompts
    eval_size: int = Field(256, ge=1)
    seed: int = 0
    tasks: list[ReasoningGymTask] = []
    partial_credit: bool = False  # True: the scorer's value is the reward; False: 1 if it is at least 0.99, else 0


class DataConfig(Section):
    train: str = ""  # a .jsonl, .parquet or .csv file, a Hugging Face "name", "name@subset:split", or reasoning-gym
    eval: str | None = None  # as data.train
    prompt_key: str = "prompt"  # column; dots reach into objects
    answer_key: str = "answer"
    preset: str | None = None  # columns and golds of a public data set: gsm8k, math, numina_math, dapo_math, ...
    eval_preset: str | None = None  # of data.eval: math500, gsm8k, aime24, ...; None: as data.preset
    level_key: str | None = "level"  # difficulty column, numbers or text: reports by level, priors by level
    template: str = "auto"  # auto | chat | plain | a text with {prompt}; auto: chat if the tokenizer has a template
    system_prompt: str | None = None  # None: the chat template's own default; "": none at all
    prompt_suffix: str = ""  # added to the last message, such as "\nPut your final answer within \\boxed{}."
    filter: dict[str, Any] = {}  # training rows to keep: column -> value, list of values, or {min, max}
    max_prompt_tokens: int = Field(1024, ge=1)
    max_train_prompts: int | None = Field(None, ge=1)  # a random subset, drawn with data.seed
    max_eval_prompts: int | None = Field(None, ge=1)
    decontaminate_against: list[str] = []  # evaluation sets or files; training prompts that overlap are dropped
    decontaminate_ngram: int = Field(8, ge=2)  # words in a row that count as an overlap
    reasoning_gym: ReasoningGymConfig = ReasoningGymConfig()
    seed: int = 0


class CurriculumConfig(Section):
    method: Method = "cures"
    sampling: Literal["potential", "uniform"] = "potential"  # CurES sampling on / off
    allocation: Literal["sigma", "rloo_gain", "cost_aware", "uniform"] = "uniform"  # sigma: CurES allocation, eq. 20
    draw: Literal["with_replacement", "epoch"] = "with_replacement"  # "epoch" only with uniform sampling
    prompts_per_step: int = Field(256, ge=1)  # m
    rollouts_per_step: int = Field(256, ge=1)  # N
    n_min: int = Field(1, ge=1)
    n_max: int = Field(32, ge=1)
    tau: float | None = Field(None, ge=1e-4, le=1e4)  # fixed temperature; None: steered to target_ess_fraction
    target_ess_fraction: float = Field(0.5, gt=0, le=1)
    importance_weight_power: float = Field(0.0, ge=0, le=1)  # kappa
    sigma: Literal["bernoulli", "last_layer"] = "bernoulli"
    # beliefs
    prior_alpha: float = Field(1.0, gt=0)
    prior_beta: float = Field(1.0, gt=0)
    prior_from: Literal["mixture", "predictor", "level", "constant"] = "mixture"  # weighted by measured skill
    predictor_features: Literal["text", "embedding"] = "text"  # of the predictor: hashed text, or frozen embeddings
    prior_strength: float = Field(4.0, gt=0)  # rollouts that a level's or the predictor's mean is worth
    prior_scope: Literal["unseen", "all"] = "all"  # whose prior follows level or predictor; seen prompts keep counts
    belief: Literal["reset", "discount", "none"] = "discount"
    belief_draw: Literal["mean", "thompson"] = "mean"
    discount: float = Field(0.8, gt=0, le=1)  # lambda per observation of the prompt, and per lag version
    subsets: int = Field(1, ge=1)  # T of Algorithm 1, used by belief=reset
    subset_steps: int = Field(10, ge=1)  # M of Algorithm 1
    pilot_rollouts: int = Field(0, ge=0)  # N'
    train_on_pilots: bool = False
    # relatives
    gvm_alpha: float = Field(1e-3, gt=0)
    gvm_beta: float = Field(2.0, ge=0)
    dapo_max_rounds: int = Field(4, ge=1)  # max_num_gen_batches
    speed_screen_rollouts: int = Field(4, ge=1)
    speed_continue_rollouts: int = Field(20, ge=1)
    mopps_pool_factor: int = Field(8, ge=1)  # candidates per drawn prompt
    mopps_target: float = Field(0.5, gt=0, lt=1)
    ada_round_rollouts: int = Field(8, ge=1)
    ada_max_rounds: int = Field(4, ge=1)
    ada_keep_rollouts: int = Field(4, ge=2)
    snapshot_every: int = Field(50, ge=1)  # committed batches between ledger snapshots


class RolloutConfig(Section):
    num_generators: int = Field(1, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(-1, ge=-1)
    max_new_tokens: int = Field(256, ge=1)
    stop: list[str] = []
    gpu_memory_utilization: float = Field(0.85, gt=0, lt=1)
    kv_cache_mib: int | None = Field(None, ge=16)  # CPU: KV cache size; None: chosen from the model
    max_concurrent_rollouts: int = Field(256, ge=1)  # per generator, vLLM's max_num_seqs
    enforce_eager: bool = False
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # auto: learner.dtype
    timeout_s: float = Field(600.0, gt=0)  # deadline of one lease


class AlgoConfig(Section):
    advantage: Advantage = "posterior_std"
    advantage_std_eps: float = Field(1e-6, gt=0)
    min_advantage: float | None = Field(None, ge=0)  # smaller |A| train at this size, rarely; None: 0.3 or 0
    train_cost: float | Literal["measured"] | None = None  # of a rollout, generating one = 1; sets min_advantage
    loss: Literal["clip", "decoupled", "cispo", "gspo", "reinforce"] = "decoupled"
    loss_length: Literal["constant", "sequence", "token"] = "constant"  # L: constant | |y| | tokens of batch
    clip_eps_low: float = Field(0.2, gt=0)
    clip_eps_high: float = Field(0.2, gt=0)
    is_correction: Literal["none", "tis", "mis"] = "tis"  # engine mismatch and staleness
    is_cap: float = Field(2.0, gt=1)
    kl_coef: float = Field(0.0, ge=0)
    kl_in_reward: bool = False  # REINFORCE++: subtract k1 from the reward instead of adding k3 to the loss
    updates_per_batch: int = Field(1, ge=1)  # passes over one batch (PPO epochs), each with its own optimizer steps
    mini_batches: int = Field(1, ge=1)  # optimizer steps of one pass, on disjoint parts of the batch; see clip_eps_low
    overlong_penalty_tokens: int = Field(0, ge=0)  # DAPO soft overlong punishment over the last tokens

    @field_validator("train_cost")
    @classmethod
    def _above_zero(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float | int) and value <= 0:
            raise ValueError('a cost above 0, "measured" or None is expected')
        return value


class AsyncConfig(Section):
    max_staleness: int = Field(1, ge=0)  # eta; 0 is synchronous training on the same loop
    in_flight_updates: bool = True  # weights change under running requests; False: drain first


class LearnerConfig(Section):
    num_ranks: int = Field(1, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 1
    lr: float = Field(1e-6, gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    max_tokens_per_rank: int = Field(16384, ge=1)  # padded tokens of one micro-batch
    gradient_checkpointing: bool = False
    seed: int = 0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    cpus_per_rank: float | Literal["auto"] = "auto"  # CPUs and threads; auto: 1 for Ray, threads by size and cores

    @field_validator("cpus_per_rank")
    @classmethod
    def _cpus_above_zero(cls, value: float | str) -> float | str:
        if isinstance(value, float | int) and value <= 0:
            raise ValueError('a number above 0 or "auto" is expected')
        return value

    @property
    def logical_cpus(self) -> float:
        """CPUs that a rank claims from Ray, so that "auto" never makes a placement fail."""
        return 1.0 if self.cpus_per_rank == "auto" else float(self.cpus_per_rank)


class VerifierConfig(Section):
    fn: str = "math"  # "math", "code", "module:function" or "file.py:function"
    num_workers: int = Field(1, ge=1)  # actors
    processes_per_worker: int = Field(1, ge=1)
    timeout_s: float = Field(5.0, gt=0)
    max_rss_mb: int = Field(1024, ge=128)
    format_reward: float = Field(0.0, ge=0, le=1)
    reward_range: tuple[float, float] = (0.0, 1.0)  # of a user's function; mapped to [0, 1]
    max_fault_share: float = Field(0.25, gt=0, le=1)  # of recent verdicts; above, the run stops with the reason

    @field_validator("reward_range")
    @classmethod
    def _low_below_high(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not (isfinite(low) and isfinite(high) and low < high):
            raise ValueError("the lowest and the highest reward are expected, as in [-1, 1]")
        return value


class WeightsConfig(Section):
    backend: Literal["auto", "shm", "object_store", "nccl", "gloo", "ipc"] = "auto"  # auto: by the number of nodes
    transfer_timeout_s: float = Field(120.0, gt=0)  # of one transfer to one generator, without progress
    canary_tolerance: float | None = Field(None, gt=0)  # nats, mean over tokens; None: 3e-4 in float32, else 0.1
    canary_prompts: int = Field(4, ge=1)


class PlacementConfig(Section):
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    colocate: bool = False  # generators and learner share GPUs
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    generator_cpus: float = Field(1.0, gt=0)
    verifier_cpus: float = Field(1.0, ge=0)
    timeout_s: float = Field(30.0, gt=0)


class EvalConfig(Section):
    interval: int = Field(10, ge=0)  # optimizer steps; 0: never
    samples_per_prompt: int = Field(0, ge=0)  # besides greedy
    before_training: bool = True
    logged_samples: int = Field(8, ge=0)  # prompts whose greedy answers go to samples.jsonl at every evaluation


class CheckpointConfig(Section):
    dir: str = "runs/default"
    interval: int = Field(50, ge=0)  # optimizer steps; 0: only at the end
    resume: str = "auto"  # auto | none | PATH
    keep: int = Field(2, ge=1)
    export_final: bool = True


class LoggingConfig(Section):
    tensorboard: bool = True
    jsonl: bool = True
    wandb: bool = False
    progress: Literal["auto", "live", "lines", "off"] = "auto"
    histogram_interval: int = Field(5, ge=1)


class TrainerConfig(Section):
    steps: int = Field(100, ge=1)
    rollout_budget: int | None = Field(None, ge=1)  # stop when this many rollouts are planned, all charged
    seed: int = 0
    no_progress_timeout_s: float = Field(900.0, gt=0)


class RayConfig(Section):
    address: str | None = None  # None: connect to a running cluster if RAY_ADDRESS says so, else start one
    num_cpus: int | None = Field(None, ge=1)  # logical CPUs of a cluster that is started here
    num_gpus: int | None = Field(None, ge=0)
    dashboard: bool = False
    object_store_mb: int = Field(512, ge=80)


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    curriculum: CurriculumConfig = CurriculumConfig()
    rollout: RolloutConfig = RolloutConfig()
    algo: AlgoConfig = AlgoConfig()
    async_rl: AsyncConfig = AsyncConfig()
    learner: LearnerConfig = LearnerConfig()
    verifier: VerifierConfig = VerifierConfig()
    weights: WeightsConfig = WeightsConfig()
    placement: PlacementConfig = PlacementConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    trainer: TrainerConfig = TrainerConfig()
    ray: RayConfig = RayConfig()

    @model_validator(mode="after")
    def check_batch(self) -> Config:
        """Refuse a batch that no integer allocation can satisfy, with the arithmetic shown."""
        c, a = self.curriculum, self.algo
        m, n = c.prompts_per_step, c.rollouts_per_step
        if c.n_min > c.n_max:
            raise ValueError(f"curriculum.n_min = {c.n_min} is larger than curriculum.n_max = {c.n_max}")
        if m * c.n_min > n:
            raise ValueError(
                f"unsatisfiable batch: prompts_per_step x n_min = {m} x {c.n_min} = {m * c.n_min} rollouts is "
                f"more than rollouts_per_step = {n}; raise rollouts_per_step to {m * c.n_min} or lower "
                f"prompts_per_step to {n // c.n_min}"
            )
        if c.n_max < n / m:
            raise ValueError(
                f"unsatisfiable batch: prompts_per_step x n_max = {m} x {c.n_max} = {m * c.n_max} rollouts is "
                f"less than rollouts_per_step = {n}; raise n_max to {-(-n // m)} or more"
            )
        if a.mini_batches > m:
            raise ValueError(f"algo.mini_batches = {a.mini_batches} is more than prompts_per_step = {m}; lower it")
        needs_pair = a.advantage in ("grpo", "rloo", "dr_grpo", "reinforce_pp_baseline")
        smallest = n // m if c.method == "uniform" or c.allocation == "uniform" else c.n_min
        if needs_pair and smallest < 2:
            raise ValueError(
                f"algo.advantage = {a.advantage} compares rollouts of one prompt and needs n_min >= 2, but the "
                f"smallest group here is {smallest}; use curriculum.n_min = 2, or algo.advantage = posterior_loo"
            )
        if c.draw == "epoch" and c.method == "cures" and c.sampling != "uniform":
            raise ValueError("curriculum.draw = epoch needs curriculum.sampling = uniform")
        if c.method == "gvm" and c.pilot_rollouts == 0:
            raise ValueError("curriculum.method = gvm needs curriculum.pilot_rollouts >= 1 (the paper uses 4)")
        if c.belief == "reset" and c.pilot_rollouts == 0:
            raise ValueError("curriculum.belief = reset (Algorithm 1) needs curriculum.pilot_rollouts >= 1")
        return self
