"""What a generator's vLLM engine is started with: environment, arguments, cache size."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

import numpy as np

from actors.weights.canary import engine_dtype
from cures_ray.config import Config
from cures_ray.messages import ConfigError

ALONE_SHARE, COLOCATED_SHARE = 0.85, 0.45  # of a GPU's memory, for the engine that has it alone or beside a learner
if TYPE_CHECKING:
    from vllm import SamplingParams

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def has_gpu(config: Config) -> bool:
    """Whether this process has a GPU to use; logical GPUs of a CPU host do not count."""
    import torch

    return config.placement.use_gpu != "no" and torch.cuda.is_available()


def set_environment(config: Config, gpu: bool) -> None:
    """Set what vLLM reads when it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if gpu:
        return
    threads = str(max(1, int(config.placement.generator_cpus)))
    os.environ["OMP_NUM_THREADS"] = threads
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # binding would put every engine on the same cores
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # no third process beside the actor and EngineCore
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # else the first request waits 12 s for a sampler's compilation


def engine_arguments(config: Config, model_path: str, gpu: bool) -> dict[str, Any]:
    """AsyncEngineArgs for this configuration.

    Raises:
        ConfigError: the model's context is too short for the configured prompts.
    """
    from transformers import AutoConfig

    rollout, model = config.rollout, config.model
    trust = {"trust_remote_code": model.trust_remote_code, "revision": model.revision}
    hf = AutoConfig.from_pretrained(model_path, **trust).get_text_config()
    limit = getattr(hf, "max_position_embeddings", None) or 1 << 30
    if config.data.max_prompt_tokens >= limit:
        raise ConfigError(
            f"data.max_prompt_tokens = {config.data.max_prompt_tokens} leaves no room for completions: the context "
            f"of {model_path} is {limit} tokens"
        )
    from vllm.config import WeightTransferConfig

    length = min(config.data.max_prompt_tokens + rollout.max_new_tokens + 1, limit)  # 1: the canary's own token
    arguments: dict[str, Any] = {
        "model": model_path,
        "dtype": engine_dtype(config),
        "max_model_len": length,
        "max_num_seqs": rollout.max_concurrent_rollouts + config.weights.canary_prompts,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "enforce_eager": rollout.enforce_eager or not gpu,
        "scheduling_policy": "priority",
        "logprobs_mode": "processed_logprobs",  # of the policy that samples: temperature, top_p, top_k
        "weight_transfer_config": WeightTransferConfig(backend="cures"),  # registered by the next line's module
        "worker_extension_cls": "actors.weights.vllm_worker.WorkerExtension",
        "disable_log_stats": not config.logging.engine_metrics,
        **trust,
    }
    if rollout.tensor_parallel_size > 1:
        # Inside a placement group vLLM would take Ray and one bundle a GPU; this actor's bundle holds all its GPUs.
        arguments["distributed_executor_backend"] = "mp"
    if gpu:
        shared = config.placement.colocate
        share = rollout.gpu_memory_utilization or (COLOCATED_SHARE if shared else ALONE_SHARE)
        return arguments | {"gpu_memory_utilization": share, "enable_sleep_mode": shared}
    mib = rollout.kv_cache_mib or kv_cache_mib(hf, config, length, free_memory_mib())
    return arguments | {
        "kv_cache_memory_bytes": mib << 20,
        "block_size": 32,
        # A seeded request whose prompt is computed in two steps kills vLLM 0.32's CPU engine ("CPU Generator does
        # not use offset"), so each prompt is computed whole.
        "enable_chunked_prefill": False,
        # After a sync the canary shares its step with the prompts that requests in flight compute again; a small
        # step makes it short (2 M model, 256 rollouts: 0.15 s instead of 0.42 s) and costs no throughput here.
        "max_num_batched_tokens": max(1024, length, rollout.max_concurrent_rollouts + config.weights.canary_prompts),
    }


def ray_loggers() -> list[Any]:
    """vLLM's loggers into Ray's metrics. vLLM 0.32 imports Ray Serve beside them, which needs packages that are not
    installed here, and then takes Ray for missing; the loggers themselves do without Serve."""
    from ray.util import metrics
    from vllm.v1.metrics import ray_wrappers

    ray_wrappers.ray_metrics = ray_wrappers.ray_metrics or metrics
    return [ray_wrappers.RayPrometheusStatLogger]


def kv_cache_mib(hf: Any, config: Config, max_model_len: int, free_mib: int) -> int:
    """KV cache of a CPU engine: room for max_concurrent_rollouts full contexts, at most an eighth of the free
    memory divided by the generators, and never less than 64 MiB or one context."""
    heads = hf.num_attention_heads
    head_size = getattr(hf, "head_dim", None) or hf.hidden_size // heads
    kv_heads = getattr(hf, "num_key_value_heads", None) or heads
    token = 2 * hf.num_hidden_layers * kv_heads * head_size * BYTES[engine_dtype(config)]
    context = -(-token * (max_model_len + 32) // 2**20)
    most = free_mib // 8 // config.rollout.num_generators
    return max(64, context, min(context * config.rollout.max_concurrent_rollouts, most))


def free_memory_mib() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) >> 10
    return 4096


# What this project uses of vLLM, as "module:name" or "module:name.attribute". `cures doctor` looks for each.
ENGINE_INTERFACE = (
    "vllm.outputs:CompletionOutput.weight_versions",
    "vllm.sampling_params:SamplingParams.flat_logprobs",
    "vllm.engine.arg_utils:AsyncEngineArgs.weight_transfer_config",
    "vllm.engine.arg_utils:AsyncEngineArgs.worker_extension_cls",
    "vllm.engine.arg_utils:AsyncEngineArgs.enable_sleep_mode",
    "vllm.config:WeightTransferConfig",
    "vllm.distributed.weight_transfer.base:WeightTransferEngine.receive_weights",
    "vllm.distributed.weight_transfer.base:WeightTransferUpdateRequest.update_info",
    "vllm.distributed.weight_transfer.factory:WeightTransferEngineFactory.register_engine",
    "vllm.model_executor.model_loader.reload:initialize_layerwise_reload",
    "vllm.model_executor.model_loader.reload:finalize_layerwise_reload",
    "vllm.v1.engine.async_llm:AsyncLLM.pause_generation",
    "vllm.v1.engine.async_llm:AsyncLLM.resume_generation",
    "vllm.v1.engine.async_llm:AsyncLLM.start_weight_update",
    "vllm.v1.engine.async_llm:AsyncLLM.update_weights",
    "vllm.v1.engine.async_llm:AsyncLLM.finish_weight_update",
    "vllm.v1.engine.async_llm:AsyncLLM.update_weight_version",
    "vllm.v1.engine.async_llm:AsyncLLM.get_num_unfinished_requests",
    "vllm.inputs.engine:TokensInput",
    "vllm.v1.engine.async_llm:AsyncLLM.sleep",
    "vllm.v1.engine.async_llm:AsyncLLM.wake_up",
    "vllm.v1.metrics.ray_wrappers:RayPrometheusStatLogger.record",
)
PAUSE_MODE: Final = "keep"  # requests wait in the engine and go on under the new weights


def missing_interface(names: tuple[str, ...] = ENGINE_INTERFACE) -> list[str]:
    """Those of ``names`` that the installed vLLM lacks, and what keeps a module from being imported."""
    missing = []
    for name in names:
        module, _, path = name.partition(":")
        try:
            owner: Any = importlib.import_module(module)
        except ImportError as error:
            missing.append(f"{module} ({error})")
            continue
        for part in path.split("."):
            fields = getattr(owner, "__dataclass_fields__", {}) | dict.fromkeys(getattr(owner, "__struct_fields__", ()))
            if not hasattr(owner, part) and part not in fields:
                missing.append(name)
                break
            owner = getattr(owner, part, None)
    if not missing:
        from vllm.v1.engine import PauseMode

        if PAUSE_MODE not in get_args(PauseMode):
            missing.append(f"pause_generation(mode={PAUSE_MODE!r})")
    return missing


def sampling_params(config: Config, seed: int, room: int, greedy: bool) -> SamplingParams:
    """Of one rollout, which has ``room`` tokens left in the model's context."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    rollout = config.rollout
    return SamplingParams(
        temperature=0.0 if greedy else rollout.temperature,
        top_p=1.0 if greedy else rollout.top_p,
        top_k=-1 if greedy else rollout.top_k,
        seed=None if greedy else seed,
        max_tokens=min(rollout.max_new_tokens, room),
        stop=list(rollout.stop) or None,
        include_stop_str_in_output=True,  # text is the text of token_ids
        detokenize=bool(rollout.stop),  # else once, at the end
        logprobs=0,  # of the sampled token only
        flat_logprobs=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def rollout_seed(seed: int, j: int) -> int:
    """The engine seed of rollout ``j`` of a request: a hash of both, 62 bits, so that neither neighbouring
    leases nor neighbouring rollouts share a stream."""
    words = np.random.SeedSequence([seed % 2**64, j]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(2))
