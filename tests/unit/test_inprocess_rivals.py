"""The permuted control on the in-process engine."""

import argparse

import numpy as np

from benchmarks.harness.arms import arm_config
from benchmarks.inprocess.controls import permuted
from benchmarks.inprocess.engine import make_curriculum


def test_permuted_features_are_those_of_other_prompts_and_the_levels_go_along():
    levels, features = np.arange(50), np.arange(100.0).reshape(50, 2)
    own_levels, own_features = permuted(3, 50, levels, features)
    assert sorted(own_levels) == list(range(50)) and np.mean(own_levels == levels) < 0.2
    assert (own_features[:, 0] == 2 * own_levels).all()
    again = permuted(3, 50, levels, features)
    assert (again[0] == own_levels).all() and (permuted(4, 50, levels, features)[0] != own_levels).any()
    assert permuted(3, 50, None, None) == (None, None)


def test_the_curriculum_of_the_permuted_control_sees_other_levels(monkeypatch):
    seen = {}

    class Spy:
        def __init__(self, config, ids, levels, features):
            seen.update(levels=levels, features=features)

    levels, features = np.arange(20), np.arange(40.0).reshape(20, 2)
    monkeypatch.setattr("benchmarks.inprocess.engine.Curriculum", Spy)
    monkeypatch.setattr(
        "benchmarks.inprocess.engine.curriculum_columns", lambda config, table: (np.arange(20), levels, features)
    )
    config = arm_config("default", task="chain", variant="T", seed=0, budget=256, base="base", run_dir="run", extra={})
    inputs = argparse.Namespace(train=None)
    make_curriculum(config, inputs, permute=True)
    assert (seen["levels"] != levels).any() and (seen["features"][:, 0] == 2 * seen["levels"]).all()
    make_curriculum(config, inputs)
    assert (seen["levels"] == levels).all()
