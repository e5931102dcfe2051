"""Where an arm is not what its paper has. Tables print these beside the names."""

from __future__ import annotations

ONE_UPDATE = "one optimizer step a batch, so that clips never act"
DEVIATIONS: dict[str, str] = {
    "rloo": "learning rate not swept",
    "dr_grpo": "learning rate not swept",
    "gvm": "N' = 4 pilots (paper 8); gradient norms of the last layer from training, not of the pilots",
    "gvm_raft": "N' = 4 pilots (paper 8); gradient norms of the last layer from training, not of the pilots",
    "dapo": f"at most 4 draws a batch (paper: until full); {ONE_UPDATE}, clip-higher is inert",
    "speed": "no buffer of screened prompts, GRPO's advantage (paper RLOO); learning rate not swept",
    "mopps": "pool of 8 m prompts (paper 16 m); discount 0.95",
    "ada": f"clip-higher unset ({ONE_UPDATE}); learning rate not swept",
    "knapsack": "learning rate not swept",
    "cures": "temperature tau = 0.1, which the paper does not state and nobody swept",
    "spo": "offline samples charged; draws from all prompts, not from a loaded part of them",
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
