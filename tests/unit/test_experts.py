"""A prior that may be wrong: forecasts are judged before the evidence counts, and a useless expert costs nothing."""

import numpy as np
import pytest
from simulated import Run

from cures_ray.config_load import merged
from cures_ray.curriculum.belief import BeliefTable
from cures_ray.curriculum.experts import MEMORY, ExpertMixture
from cures_ray.curriculum.machine import Curriculum

INDEX = np.arange(4)
MIXTURE = {
    "prior_from": "mixture",
    "prior_scope": "all",
    "prior_strength": 4.0,
    "discount": 0.8,
    "prompts_per_step": 32,
    "allocation": "uniform",
    "sampling": "uniform",
}


def bimodal(count: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Accuracies near 0 and 1 that the features tell, those features, and the same permuted between prompts."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(count, 3)).astype(np.float32)
    accuracy = 1 / (1 + np.exp(-6 * features[:, 0]))
    return accuracy, features, features[rng.permutation(count)]


def run_of(accuracy, **options) -> Run:
    return Run(accuracy, algo={"advantage": "posterior_loo"}, **options)


def trained(features, accuracy, steps=40, **curriculum) -> Run:
    settings = merged({"curriculum": MIXTURE}, {"curriculum": curriculum})["curriculum"]
    run = run_of(accuracy, features=features, **settings)
    for _ in range(steps):
        run.step()
    return run


def value_error(run: Run) -> float:
    """Mean squared error of what is believed."""
    return float(np.square(run.curriculum.pool.belief.mean() - run.accuracy).mean())


def test_an_informative_predictor_gets_the_weight_and_the_belief_loses_nothing_to_it():
    accuracy, told, _ = bimodal()
    run = trained(told, accuracy)
    metrics = run.curriculum.status().metrics
    assert metrics["belief/weight_predictor"] > 0.99 and metrics["belief/skill_predictor"] > 0.1
    assert metrics["belief/logloss"] < metrics["belief/logloss_recent"] - 0.1
    assert value_error(run) < 1.05 * value_error(trained(told, accuracy, prior_from="predictor"))


def test_with_permuted_features_the_predictor_loses_its_weight_and_does_no_harm():
    accuracy, _, permuted = bimodal()
    run = trained(permuted, accuracy)
    metrics = run.curriculum.status().metrics
    assert metrics["belief/weight_recent"] > 0.9 and metrics["belief/skill_predictor"] < 0
    misled = trained(permuted, accuracy, prior_from="predictor")
    plain = trained(permuted, accuracy, prior_from="constant", prior_alpha=0.5, prior_beta=0.5)
    assert value_error(run) < value_error(misled)
    assert value_error(run) < value_error(plain) + 0.01
    assert metrics["belief/logloss"] < misled.curriculum.status().metrics["belief/logloss"] - 0.01


def test_every_expert_forecasts_before_the_evidence_is_counted():
    """By hand: one prompt, one success that nobody expected, forecast from counts and priors of before."""
    mixture, belief = ExpertMixture("mixture", 4, np.array([0, 0, 1, 1]), None, 4.0), BeliefTable(4)
    mixture.update(INDEX, np.array([0.0, 0.0, 8.0, 8.0]), np.full(4, 8.0))
    belief.observe([0], [1.0], [2.0])  # Beta(2, 3) from Beta(1, 1)
    recent, level = (16 + 1) / (32 + 2), (0 + 4 * 17 / 34) / (16 + 4)
    mixture.score(belief, np.array([0]), np.array([1.0]), np.array([0.0]))
    assert mixture.losses[0] == pytest.approx(-np.log((1 + recent) / 4))
    assert mixture.losses[1] == pytest.approx(-np.log((1 + 4 * level) / 7))
    assert mixture.losses[-1] == pytest.approx(-np.log(2 / 5))  # the belief itself
    mixture.score(belief, np.array([0]), np.array([1.0]), np.array([0.0]))
    assert mixture.losses[-1] == pytest.approx(-np.log(2 / 5) * (1 + np.exp(-1 / MEMORY)))


def test_the_prior_is_the_weighted_sum_of_the_experts_pseudo_counts():
    mixture = ExpertMixture("mixture", 4, np.array([0, 0, 1, 1]), None, 4.0)
    assert not mixture.ready
    mixture.update(INDEX, np.array([0.0, 0.0, 8.0, 8.0]), np.full(4, 8.0))
    mixture.losses[:3] = [0.0, np.log(2), np.log(2)]
    assert mixture.weights == pytest.approx([0.5, 0.25, 0.25])
    alpha, beta = mixture.prior(INDEX)
    means = [expert.mean(INDEX) for expert in mixture.experts.values()]
    assert alpha == pytest.approx(0.5 * means[0] + means[1] + means[2])
    assert alpha + beta == pytest.approx(0.5 * 1 + 0.25 * 4 + 0.25 * 4)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_each_rollout_is_forecast_once_whatever_the_staleness(staleness):
    """Drawing ahead counts evidence of batches that are not committed: no rollout is judged twice, or never."""
    accuracy, told, _ = bimodal(200)
    undiscounted = {key: value for key, value in MIXTURE.items() if key != "discount"}
    run = run_of(accuracy, features=told, staleness=staleness, **undiscounted, belief="none")
    judged, score = [], run.curriculum.pool.mixture.score

    def counting(belief, index, successes, failures):
        judged.append(float((successes + failures).sum()))
        score(belief, index, successes, failures)

    run.curriculum.pool.mixture.score = counting
    for version in range(20):
        while leases := run.curriculum.lease("worker", 10**6, version):  # as far ahead as may be
            for lease in leases:
                run.settle(lease)
        run.step()
    assert staleness == 0 or run.curriculum.batches
    _ = run.curriculum.pool.belief
    settled = run.accounting.trained + sum(h.lease.n for b in run.curriculum.batches.values() for h in b.leases)
    assert sum(judged) == settled > 600


def test_the_baseline_of_a_rollout_does_not_know_its_reward():
    accuracy, told, _ = bimodal(200)

    def beliefs(flipped: int) -> tuple[list[float], list[float]]:
        run = run_of(accuracy, features=told, **MIXTURE)
        for _ in range(5):
            run.step()
        own = run.rewards
        run.rewards = lambda lease: 1 - own(lease) if lease.lease_id == flipped else own(lease)
        now = [(e.lease.lease_id, e.lease.alpha) for e in run.step().entries]
        return now, [e.lease.alpha for e in run.step().entries]

    (one, later), (two, other) = beliefs(-1), beliefs(170)
    assert 170 in dict(one) and one == two  # the batch that has the rollout: its plan is the same
    assert later != other  # the next one has learned from it


def test_a_saved_curriculum_goes_on_exactly(tmp_path):
    accuracy, told, _ = bimodal(200)
    one = run_of(accuracy, features=told, staleness=1, **MIXTURE | {"sampling": "potential"})
    for _ in range(6):
        one.step()
    for lease in one.curriculum.lease("worker", 10**6, 6):
        one.settle(lease)
    one.curriculum.save(tmp_path)
    two = run_of(accuracy, features=told, staleness=1, **MIXTURE | {"sampling": "potential"})
    two.curriculum = Curriculum.load(tmp_path, two.config, two.ids, *two.columns)
    for _ in range(4):
        assert [e.lease for e in one.step().entries] == [e.lease for e in two.step().entries]
    assert one.curriculum.pool.mixture.scored[0] > 100
    for key, value in one.curriculum.pool.mixture.metrics().items():
        assert two.curriculum.pool.mixture.metrics()[key] == value, key


def test_drawn_prompts_of_a_pool_too_large_to_follow_have_the_newest_prior():
    accuracy, told, _ = bimodal(3000)
    small = {"prompts_per_step": 8, "rollouts_per_step": 32, "sampling": "potential"}
    run = run_of(accuracy, features=told, **MIXTURE | small)  # 3000 > 32 x 8: not every commit refreshes
    lagged = 0
    for _ in range(30):
        pool = run.curriculum.pool
        leases = run.curriculum.lease("worker", 10**6, run.curriculum.committed)
        lagged += pool._commits_since_refresh > 0
        index = np.array([lease.prompt_index for lease in leases])
        if pool.mixture.ready:
            own, prior = pool._belief.evidence(index)[0], pool.mixture.prior(index)[0]
            assert [lease.alpha for lease in leases] == pytest.approx(own + prior, rel=1e-4)
        for lease in leases:
            run.settle(lease)
        run.step()
    assert lagged > 10


def test_a_single_expert_is_that_expert():
    """``prior_from: predictor`` and ``level`` are mixtures of one: the whole weight, whatever the loss."""
    for prior_from in ("predictor", "level"):
        run = trained(None, np.full(60, 0.5), steps=5, prior_from=prior_from)
        assert run.curriculum.status().metrics[f"belief/weight_{prior_from}"] == 1.0
    plain = trained(None, [0.5], steps=3, prior_from="constant").curriculum.status().metrics
    assert "belief/logloss" in plain and not any("weight" in key for key in plain)
