"""The sections of the configuration, but for the curriculum's and the data's (config_curriculum.py, config_data.py).

Each key is followed by a sentence: what it means, and when to change it. docs/configuration.md is written from them.
A section refuses settings that its other settings leave without effect, and leaves them out when it is printed.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_serializer, model_validator

Advantage = Literal[
    "grpo",
    "dr_grpo",
    "rloo",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "posterior_loo",
    "posterior_centred",
    "posterior_std",
    "posterior_whitened",
    "posterior_token_whitened",
    "shrinkage",
    "raft_pp",
]


class Section(BaseModel):
    """A group of keys. Unknown keys and values out of bounds are refused, also on assignment."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), use_attribute_docstrings=True
    )

    def without_effect(self) -> dict[str, str]:
        """Key -> why nothing reads it beside the other settings of this section."""
        return {}

    @model_validator(mode="after")
    def _refuse_without_effect(self) -> Section:
        idle = {key: why for key, why in self.without_effect().items() if key in self.model_fields_set}
        if idle:
            raise ValueError("; ".join(f"{key} has no effect {why}; remove it" for key, why in idle.items()))
        return self

    @model_serializer(mode="wrap")
    def _only_what_acts(self, handler: Any) -> dict[str, Any]:
        idle = self.without_effect()
        values = handler(self)
        return {key: values[key] for key in sorted(values, key=lambda key: key != "method") if key not in idle}


class LoraConfig(Section):
    rank: int = Field(16, ge=1)
    """Rank of the adapters. Raise it when the reward stays below that of full training."""
    alpha: int = Field(32, ge=1)
    """The adapters' output is scaled by alpha / rank. Raise it with the rank."""
    targets: str | list[str] = "all-linear"
    """Layers with adapters: all linear ones below the output layer, or a list of names as in `q_proj`."""


class ModelConfig(Section):
    path: str = ""
    """The policy to train: a Hugging Face folder, or a name on the Hub. Always set it."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model. Set it to keep a run reproducible."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model whose authors you trust."""
    lora: LoraConfig | None = None
    """Train low-rank adapters and keep the model frozen: less memory. None: train every parameter."""


class RolloutConfig(Section):
    num_generators: int = Field(1, ge=1)
    """vLLM engines that the run starts with, one actor each. Raise it when the learner waits for rollouts."""
    max_generators: int | None = Field(None, ge=1)
    """Further engines join up to this number, whenever the cluster has room. None: `num_generators`. Set it where nodes
    come and go."""
    tensor_parallel_size: int = Field(1, ge=1)
    """GPUs a generator. Raise it when the model does not fit one GPU."""
    temperature: float = Field(1.0, gt=0)
    """Of sampling, and of every log-probability in the loss. Below 1 there is less exploration."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus sampling. Below 1 the sampled policy is not quite the trained one; keep 1 unless samples are bad."""
    top_k: int = Field(-1, ge=-1)
    """Sample among the k likeliest tokens; -1 is all. Keep -1 for the same reason."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer. Raise it when many answers are cut off (`rollout/truncated`)."""
    stop: list[str] = []
    """Texts that end an answer, besides the model's own end token."""
    gpu_memory_utilization: float | None = Field(None, gt=0, lt=1)
    """Share of a GPU's memory that vLLM takes. None: 0.85, or 0.45 where generators and learner share GPUs."""
    kv_cache_mib: int | None = Field(None, ge=16)
    """Size of the key-value cache on a CPU, MiB. None: from the model and the free memory. GPUs ignore it."""
    max_concurrent_rollouts: int = Field(256, ge=1)
    """Requests in flight in one generator (vLLM's `max_num_seqs`). Lower it when memory is short."""
    enforce_eager: bool = False
    """Do without CUDA graphs: a faster start and slower tokens. CPUs always do."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the engine's weights. `auto` follows `learner.dtype`, so that both compute the same probabilities."""
    timeout_s: float = Field(600.0, gt=0)
    """Deadline of one lease, seconds. Raise it when long answers are lost to it."""
    start_timeout_s: float = Field(1800.0, gt=0)
    """How long an engine or a learner rank may take to start, seconds. Raise it where the model's first download takes
    longer."""
    min_generators: int = Field(1, ge=1)
    """With fewer generators the run ends. One that cannot come back is retired, and the others go on. A node that is
    drained keeps its generator to the end if the run needs it."""
    max_restarts: int = Field(5, ge=0)
    """Of one generator before it is retired. A restart is forgiven after ten minutes."""
    health_timeout_s: float = Field(120.0, gt=0)
    """A generator whose actor or engine is silent for so long is replaced, seconds. Raise it for very large models."""


class AlgoConfig(Section):
    advantage: Advantage = "posterior_std"
    """How a reward becomes an advantage. The `posterior_*` family compares it with the belief and works with one
    rollout a prompt; grpo, dr_grpo, rloo and reinforce_pp_baseline compare rollouts of one prompt and need two."""
    advantage_std_eps: float = Field(1e-6, gt=0)
    """Added to a standard deviation before dividing by it (grpo and reinforce_pp*)."""
    min_advantage: float | None = Field(None, ge=0)
    """Advantages smaller than this are thinned: most are skipped, the others enlarged to this size, with the same
    expectation. None: 0.3 with posterior_std, else 0 (off). Set 0 to train on every rollout."""
    train_cost: float | Literal["measured"] | None = None
    """What training on a rollout costs if generating it costs 1; sets the thinning to the cheapest level. `measured`
    takes the times of this run. Set it when the learner is the bottleneck."""
    loss: Literal["clip", "decoupled", "cispo", "gspo", "reinforce"] = "decoupled"
    """Policy loss: PPO's clip, decoupled PPO for stale rollouts, CISPO, GSPO, or plain REINFORCE."""
    loss_length: Literal["constant", "sequence", "token"] = "constant"
    """What a rollout's token losses are divided by: `rollout.max_new_tokens`, its own length, or the batch's mean
    length. `constant` does not favour short answers."""
    clip_eps_low: float = Field(0.2, gt=0)
    """PPO's clip: the ratio of new to old probability is held above 1 minus this."""
    clip_eps_high: float = Field(0.2, gt=0)
    """PPO's clip: the ratio is held below 1 plus this. DAPO uses 0.28 to keep more exploration."""
    is_correction: Literal["none", "tis", "mis"] = "tis"
    """Correction for tokens that an older or slightly different policy sampled: importance weights, truncated at
    `is_cap` (tis), or with tokens beyond it left out (mis)."""
    is_cap: float = Field(2.0, gt=1)
    """Largest importance weight. Lower it when `learner/is_ratio_max` is large and training is unstable."""
    kl_coef: float = Field(0.0, ge=0)
    """Weight of the KL divergence to the starting model. Above 0, the learner keeps a second, frozen copy."""
    kl_in_reward: bool = False
    """Subtract the KL from the reward, token by token, as REINFORCE++ does, and do not add it to the loss."""
    updates_per_batch: int = Field(1, ge=1)
    """Passes over each batch (PPO epochs). More learn faster from costly rollouts, and need the clip."""
    mini_batches: int = Field(1, ge=1)
    """Optimizer steps of one pass, on disjoint parts of the batch. From the second on the clip can act."""
    overlong_penalty_tokens: int = Field(0, ge=0)
    """DAPO's soft penalty: the reward falls by up to 1 over the last so many tokens before `rollout.max_new_tokens`.
    Set it when answers grow until they are cut off; 0 is off."""

    @field_validator("train_cost")
    @classmethod
    def _above_zero(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, float | int) and value <= 0:
            raise ValueError('a cost above 0, "measured" or None is expected')
        return value

    @model_validator(mode="after")
    def _kl_in_reward_needs_a_coefficient(self) -> AlgoConfig:
        if self.kl_in_reward and not self.kl_coef:
            raise ValueError(
                "kl_in_reward = true needs kl_coef > 0: with kl_coef = 0 there is no KL to subtract; "
                "set algo.kl_coef, for example 0.001, or kl_in_reward = false"
            )
        return self

    def without_effect(self) -> dict[str, str]:
        idle: dict[str, str] = {}
        if self.loss == "reinforce":
            idle |= dict.fromkeys(("clip_eps_low", "clip_eps_high"), "with loss = reinforce, which does not clip")
        if self.loss == "cispo":
            idle["clip_eps_low"] = "with loss = cispo, which limits the ratio from above only"
        if self.loss == "decoupled" and self.updates_per_batch == self.mini_batches == 1:
            why = (
                "with loss = decoupled and one update a batch: the first update starts at ratio 1 (set "
                "mini_batches or updates_per_batch to 2 or more, or use loss = clip)"
            )
            idle |= dict.fromkeys(("clip_eps_low", "clip_eps_high"), why)
        if self.loss in ("clip", "gspo", "cispo"):
            why = f"with loss = {self.loss}: its ratio is the correction"
            idle |= dict.fromkeys(("is_correction", "is_cap"), why)
        elif self.is_correction == "none":
            idle["is_cap"] = "with is_correction = none"
        if self.train_cost is not None:
            idle["min_advantage"] = "with train_cost, which sets the level of thinning"
        if self.advantage not in ("grpo", "reinforce_pp", "reinforce_pp_baseline"):
            idle["advantage_std_eps"] = f"with advantage = {self.advantage}, which divides by no sample deviation"
        return idle


class AsyncConfig(Section):
    max_staleness: int = Field(1, ge=0)
    """How many policy versions a rollout's oldest token may lag behind. 0 is synchronous training; raise it when
    generators wait for the learner."""
    in_flight_updates: bool = True
    """Give new weights to a generator while its requests run on. False: it first finishes them."""


class LearnerConfig(Section):
    num_ranks: int = Field(1, ge=1)
    """Data-parallel learner processes, one GPU each. Raise it when generators wait for the learner."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: what the ranks share out. 1 optimizer state, 2 gradients too, 3 parameters too."""
    lr: float = Field(1e-6, gt=0)
    """Learning rate of AdamW. The setting to tune first."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls over the run, after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Updates over which the rate rises from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decay of the weights."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Adam's memory of the gradient."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """Adam's memory of its square. Raise it to 0.999 when the loss jumps late in a run."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Longer gradients are scaled to this length."""
    max_tokens_per_rank: int = Field(16384, ge=1)
    """Padded tokens of one forward pass. Lower it when a rank runs out of memory; the result stays the same."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    seed: int = 0
    """Of the learner's own random numbers: dropout, and the projections of the gradient statistics."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the forward pass. bfloat16 is faster on a GPU, and on a CPU that has instructions for it. float32 is exact."""
    cpus_per_rank: float | Literal["auto"] = "auto"
    """CPUs that Ray reserves for a rank, and on a CPU machine its threads. `auto`: one CPU for Ray, and threads by the
    size of the model and the cores of the machine. Set it when several programs share the machine."""

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
    fn: str = "math"
    """The reward: `math`, `code`, or your function as `module:function` or `file.py:function`."""
    num_workers: int = Field(1, ge=1)
    """Verifier actors. Raise it when verdicts take longer than answers."""
    processes_per_worker: int = Field(1, ge=1)
    """Processes of one actor that judge side by side."""
    timeout_s: float = Field(5.0, gt=0)
    """Seconds for one verdict. A verdict that takes longer is a fault: its rollout is not trained."""
    max_rss_mb: int = Field(1024, ge=128)
    """Memory of one process, MiB. Beyond it the process is ended and the verdict is a fault."""
    format_reward: float = Field(0.0, ge=0, le=1)
    """Reward of a wrong answer in a closed box. Set it above 0 for a model that does not box its answers yet."""
    reward_range: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest reward of your function. They are mapped to 0 and 1. Set it for rewards such as [-1, 1]."""
    max_fault_share: float = Field(0.25, gt=0, le=1)
    """The run stops, and says why, when more than this share of recent verdicts are faults."""

    @field_validator("reward_range")
    @classmethod
    def _low_below_high(cls, value: tuple[float, float]) -> tuple[float, float]:
        low, high = value
        if not (isfinite(low) and isfinite(high) and low < high):
            raise ValueError("the lowest and the highest reward are expected, as in [-1, 1]")
        return value


class WeightsConfig(Section):
    backend: Literal["auto", "shm", "object_store", "nccl", "gloo", "ipc"] = "auto"
    """How weights reach the generators. `auto`: shared memory on one machine, Ray's object store on several."""
    transfer_timeout_s: float = Field(120.0, gt=0)
    """Longest time without progress in one transfer to one generator, seconds. Raise it on a slow network."""
    canary_tolerance: float | None = Field(None, gt=0)
    """How far a generator's log-probabilities may lie from the learner's after an update: mean over tokens, nats.
    None: 3e-4 in float32, else 0.1. The weights of a generator beyond it are sent again once; a difference that
    comes back ends the run."""
    canary_prompts: int = Field(4, ge=1)
    """Prompts on which the two are compared."""


class PlacementConfig(Section):
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray spreads actors over machines. SPREAD keeps a run alive when one machine is lost."""
    colocate: bool = False
    """Generators and learner ranks share GPUs. For one machine with few GPUs."""
    use_gpu: Literal["auto", "yes", "no"] = "auto"
    """`auto` uses GPUs where the cluster has them."""
    generator_cpus: float = Field(1.0, gt=0)
    """CPUs that Ray reserves for a generator; on a CPU machine also its threads."""
    verifier_cpus: float = Field(1.0, ge=0)
    """CPUs that Ray reserves for a verifier actor."""
    learner_resources: dict[str, float] = {}
    """Custom resources of Ray that each learner rank asks for. Set it to pin ranks to nodes that offer them, for
    instance to keep them off nodes that may be preempted."""
    generator_resources: dict[str, float] = {}
    """The same for each generator."""
    verifier_resources: dict[str, float] = {}
    """The same for each verifier actor."""
    timeout_s: float = Field(30.0, gt=0)
    """How long to wait for the cluster to make room, at the start and for a generator whose node is lost, seconds.
    Raise it where machines start on demand."""


class EvalConfig(Section):
    interval: int = Field(10, ge=0)
    """Optimizer steps between two evaluations; 0 is never."""
    samples_per_prompt: int = Field(0, ge=0)
    """Sampled answers a prompt, besides the greedy one. Set it to see pass@k."""
    before_training: bool = True
    """Evaluate the starting model too, so that there is something to compare with."""
    logged_samples: int = Field(8, ge=0)
    """Prompts whose greedy answers go to samples.jsonl at every evaluation."""


class CheckpointConfig(Section):
    dir: str = "runs/default"
    """Folder of the run: checkpoints, logs, journal, the final model. One run a folder."""
    interval: int = Field(50, ge=0)
    """Optimizer steps between two checkpoints; 0 writes one at the end only."""
    resume: str = "auto"
    """`auto` continues from the newest intact checkpoint of `dir`, `none` refuses a used folder, a path picks one."""
    keep: int = Field(2, ge=1)
    """How many checkpoints stay on disk."""
    export_final: bool = True
    """Write the final policy as a Hugging Face folder."""


class LoggingConfig(Section):
    tensorboard: bool = True
    """Write metrics for TensorBoard to RUN/tensorboard."""
    jsonl: bool = True
    """Write metrics to RUN/metrics.jsonl, one line a step."""
    wandb: bool = False
    """Send metrics to Weights & Biases; needs `pip install wandb`. WANDB_MODE=offline keeps them in the run folder."""
    mlflow: bool = False
    """Send metrics to MLflow: to RUN/mlruns, or to MLFLOW_TRACKING_URI; needs `pip install mlflow-skinny`."""
    trackio: bool = False
    """Not supported: Trackio brings a web server. Use wandb or mlflow."""
    ray_metrics: bool = True
    """Metrics of run and actors in Ray's endpoints, for `cures dashboard`. Turn off if Prometheus is short of room."""
    engine_metrics: bool = False
    """vLLM's own metrics there as well, to look into queue and cache. Costs CPU at every step of the engine."""
    progress: Literal["auto", "live", "lines", "off"] = "auto"
    """What the terminal shows. `auto`: a live table in a terminal, lines in a file."""
    histogram_interval: int = Field(5, ge=1)
    """Steps between two histograms in TensorBoard. Raise it when the files grow too large."""

    @field_validator("progress", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare off as false


class TrainerConfig(Section):
    steps: int = Field(100, ge=1)
    """Length of the run in batches, each trained once."""
    rollout_budget: int | None = Field(None, ge=1)
    """End when this many rollouts are planned, whatever became of them. For comparisons at equal cost."""
    seed: int = 0
    """Of the curriculum's draws and of every rollout."""
    no_progress_timeout_s: float = Field(900.0, gt=0)
    """End the run when nothing is settled or trained for so long, seconds. Keep it above `rollout.timeout_s`."""
    max_restarts: int = Field(2, ge=0)
    """Of the learner group after a rank died, each time from the newest checkpoint. 0: end the run."""
    stop_timeout_s: float = Field(30.0, ge=0)
    """How long a stopped run waits for the batch in work before its checkpoint, seconds."""


class RayConfig(Section):
    address: str | None = None
    """Cluster to join, for example `auto`. None: that of RAY_ADDRESS, or one that is started here."""
    num_cpus: int | None = Field(None, ge=1)
    """CPUs of a cluster that is started here. None: those of the machine."""
    num_gpus: int | None = Field(None, ge=0)
    """GPUs of a cluster that is started here. None: those of the machine."""
    dashboard: bool = False
    """Start Ray's dashboard with the cluster."""
    object_store_mb: int = Field(512, ge=80)
    """Shared memory of a cluster that is started here, MiB. Raise it for large models on one machine."""
