"""What arms are called in tables and pictures: words that a reader knows, in one place."""

from __future__ import annotations

from benchmarks.harness.arms import ARMS, COMMON, CONTROLS, split_arm

WORDS = {
    "grpo": "GRPO",
    "rloo": "RLOO",
    "dr_grpo": "Dr.GRPO",
    "rpp": "REINFORCE++",
    "rpp_baseline": "REINFORCE++-baseline",
    "rpp_single": "REINFORCE++, one response",
    "gvm": "GVM",
    "gvm_raft": "GVM, RAFT++ advantage",
    "dapo": "DAPO",
    "speed": "SPEED-RL",
    "mopps": "MoPPS",
    "ada": "Reinforce-Ada",
    "knapsack": "Knapsack RL",
    "spo": "SPO",
    "spo_nopilot": "SPO without pilots",
    "spo_tokens": "SPO without pilots, whitened over tokens",
    "shrinkage_2": "shrinkage baseline, pairs",
    "shrinkage_4": "shrinkage baseline, groups of 4",
    "bots": "BOTS",
    "gps": "GPS",
    "greso": "GRESO",
    "cures": "CurES as published",
    "cures_rpp": "CurES as published, REINFORCE++ advantage",
    "cures_n1": "CurES as published, 1 pilot",
    "cures_n8": "CurES as published, 8 pilots",
    "cures_train_pilots": "CurES as published, pilots trained",
    "cures_discount": "CurES, beliefs discounted and no pilots",
    "cures_online": "CurES without pilots",
    "cures_online_sampling": "CurES without pilots, sampling only",
    "cures_online_allocation": "CurES without pilots, allocation only",
    "cures_online_rloo": "CurES without pilots, RLOO advantage",
    "cures_online_last_layer": "CurES without pilots, measured gradient noise",
    "sigma_bernoulli": "allocation by the noise of rewards",
    "sigma_last_layer": "allocation by measured gradient noise",
    "wide": "belief as baseline, constant prior",
    "wide_cures": "belief as baseline, CurES draws and allocation",
    "wide_sampling": "belief as baseline, CurES draws",
    "wide_predictor": "belief as baseline, predictor",
    "wide_predictor_std": "belief as baseline and scale, predictor",
    "wide_cures_predictor": "belief as baseline, predictor, CurES draws and allocation",
    "cures_wide": "predictor default",
    "cures_wide_uniform": "predictor default, uniform draws",
    "ladder_baseline": "step 1: belief as baseline",
    "ladder_predictor": "step 2: and the mixture as prior",
    "ladder_scale": "step 3: and the belief as scale",
    "ladder_thinning": "step 4: and thinning",
    "default": "default",
    "default_hidden": "default, hidden states as features",
    "default_uniform": "default, uniform draws",
    "uniform_curriculum": "GRPO through the curriculum's code",
}
CONTROL_WORDS = {
    "coin": "rewards by coin",
    "oracle": "true accuracies known",
    "oracle_sigma": "true accuracies and gradient noise known",
    "permuted": "features permuted",
}


def display(label: str) -> str:
    """An arm in words, with its batch shape where the label changes it and its other changes. The learning rate and
    its warm-up are in the tables. A name that is no arm is shown as it is."""
    name = label.split("@")[0]
    if name not in ARMS and name not in CONTROLS:
        return label
    arm, control, changes = split_arm(label)
    shape = {"curriculum.prompts_per_step", "curriculum.rollouts_per_step"}
    parts = [WORDS[arm]]
    if control:
        parts.append(CONTROL_WORDS[CONTROLS[name][1]])
    if shape & set(changes):
        values = COMMON | ARMS[arm] | changes
        m, n = values["curriculum.prompts_per_step"], values["curriculum.rollouts_per_step"]
        parts.append(f"{m} × {n / m:g}")
    hidden = shape | {"learner.lr", "learner.warmup_steps"}
    parts += [f"{key.split('.')[-1]} {value}" for key, value in changes.items() if key not in hidden]
    return ", ".join(parts)
