"""Where an arm is not what its paper has. Tables print these beside the names."""

from __future__ import annotations

# What an arm had before this is another run; committed lines carry their date.
MENDED = "24 November 2026, 21:30 UTC"
ONE_UPDATE = "one optimizer step a batch, so that clips never act"
_GVM = f"gradient norms of the last layer from training, not of the pilots; in runs before {MENDED} N' = 4, not 8"
DEVIATIONS: dict[str, str] = {
    "rloo": "learning rate not swept",
    "dr_grpo": "learning rate not swept",
    "gvm": _GVM,
    "gvm_raft": _GVM,
    "dapo": f"{ONE_UPDATE}, clip-higher is inert; at most 10 draws a batch, in runs before {MENDED} at most 4",
    "speed": f"no buffer of screened prompts; learning rate not swept; in runs before {MENDED} GRPO's advantage (paper "
    "RLOO)",
    "mopps": f"discount 0.95, not tuned; in runs before {MENDED} a pool of 8 m prompts, not 16 m",
    "ada": f"{ONE_UPDATE}, clip-higher is inert (in runs before {MENDED} unset); learning rate not swept",
    "knapsack": "identical to GRPO until a prompt comes for the second time; learning rate not swept",
    "cures": "temperature tau = 0.1, which the paper does not state and nobody swept",
    "spo": "offline samples charged; draws from all prompts, not from a loaded part of them; the first trained "
    "response of a prompt forgets by 0.9, as drift on its offline samples is not measured",
    "spo_nopilot": "Beta(1/2, 1/2), no offline samples (a switch of the authors' release); draws from all prompts",
    "spo_tokens": "SPO++'s centring over action tokens on spo_nopilot; evidence is ordered by lease",
    "bots": "implicit evidence is the predictor's prior at rho n / lambda = 8 rollouts, the steady state, not an "
    "interpolation of two reference models; forgets at visits, not at steps",
    "gps": "the predictor is this project's (text features, logistic); no diversity term",
    "greso": "at most 4 draws a batch; the batch of candidates does not adapt its size",
    "default_hidden": "the probe reads the base model's states, not the current policy's (POISE); prompt level only",
}


def deviations_of(labels: list[str]) -> list[str]:
    """One line an arm that deviates, in the order of ``labels`` (``NAME@key=value`` has the deviations of NAME)."""
    names = dict.fromkeys(label.split("@")[0] for label in labels)
    return [f"`{name}`: {DEVIATIONS[name]}" for name in names if name in DEVIATIONS]
