"""The gradient estimators against exact enumeration on a softmax policy (ALGORITHMS.md 1, 3.1 - 3.5)."""

from itertools import product

import numpy as np
import pytest
from fakes import small_config

from cures_ray.curriculum.allocation import rloo_variance, rloo_zeta, sigma_for, sigma_gradient
from cures_ray.curriculum.belief import ScoreMoments, moments_from
from cures_ray.curriculum.planning import objective_weights
from cures_ray.curriculum.pool import PromptPool
from cures_ray.curriculum.sampling import Draw, PotentialSampler, potential
from cures_ray.learning.advantages import compute_advantages, token_weights
from cures_ray.messages import GradientStatistics

ALPHA, BETA = 3.0, 1.5  # a belief that is far from the accuracy


class Policy:
    """A softmax over ``k`` answers of one prompt: probability, reward and score of each answer."""

    def __init__(self, seed: int, k: int = 4, correct: int = 2) -> None:
        logits = np.random.default_rng(seed).normal(size=k)
        self.prob = np.exp(logits) / np.exp(logits).sum()
        self.reward = (np.arange(k) < correct).astype(float)
        self.score = np.eye(k) - self.prob  # d log pi(y) / d logits
        self.p = float(self.prob @ self.reward)
        self.gradient = (self.prob * self.reward) @ self.score  # of E[r]

    def moments(self) -> ScoreMoments:
        plus, minus = (self.prob * (self.reward == r) for r in (1, 0))
        square = (self.score**2).sum(1)
        mu_plus, mu_minus = plus @ self.score / plus.sum(), minus @ self.score / minus.sum()
        diff = mu_plus - mu_minus
        values = (plus @ square / plus.sum(), minus @ square / minus.sum(), diff @ diff, mu_plus @ mu_minus)
        return ScoreMoments(**dict(zip(ScoreMoments.__slots__, map(np.array, values), strict=True)))

    def groups(self, n: int):
        """Every group of n answers with its probability."""
        for answers in product(range(len(self.prob)), repeat=n):
            rows = list(answers)
            yield float(np.prod(self.prob[rows])), rows

    def estimate(self, advantage: str, rows: list[int]) -> np.ndarray:
        """(1/n) sum_j A_j s_j, what one prompt adds to the gradient of eq. 16."""
        alpha, beta = np.array([ALPHA]), np.array([BETA])
        (a,) = compute_advantages(advantage, [self.reward[rows]], alpha, beta)
        return a @ self.score[rows] / len(rows)

    def expectation(self, advantage: str, n: int) -> np.ndarray:
        return sum(q * self.estimate(advantage, rows) for q, rows in self.groups(n))

    def variance(self, advantage: str, n: int) -> float:
        mean = self.expectation(advantage, n)
        return sum(q * float(((self.estimate(advantage, rows) - mean) ** 2).sum()) for q, rows in self.groups(n))


POLICIES = [Policy(seed, correct=c) for seed, c in ((0, 1), (1, 2), (2, 3))]
policies = pytest.mark.parametrize("policy", POLICIES, ids=lambda x: f"p={x.p:.2f}")


@policies
@pytest.mark.parametrize("n", [2, 3, 4])
def test_rloo_is_unbiased(policy, n):
    assert policy.expectation("rloo", n) == pytest.approx(policy.gradient, abs=1e-12)


@policies
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_posterior_baseline_is_unbiased_with_one_rollout_too(policy, n):
    assert policy.expectation("posterior_loo", n) == pytest.approx(policy.gradient, abs=1e-12)


@policies
@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_group_mean_shrinks_the_gradient_by_n_minus_1_over_n(policy, n):
    assert policy.expectation("dr_grpo", n) == pytest.approx((n - 1) / n * policy.gradient, abs=1e-12)


def test_a_baseline_with_the_own_reward_would_be_biased():
    """What posterior_loo must not do: the posterior mean after the step as baseline."""
    policy, n = POLICIES[1], 3
    wrong = sum(
        q * ((r := policy.reward[rows]) - (ALPHA + r.sum()) / (ALPHA + BETA + n)) @ policy.score[rows] / n
        for q, rows in policy.groups(n)
    )
    assert np.abs(wrong - policy.gradient).max() > 0.1 * np.abs(policy.gradient).max()


@policies
def test_sigma_is_the_standard_deviation_of_one_rollouts_gradient(policy):
    """Eq. 21 at b = p, and its generalisation to any baseline (ALGORITHMS.md 3.4)."""
    for baseline in (policy.p, 0.0, 0.3, 1.0):
        terms = (policy.reward - baseline)[:, None] * policy.score
        mean = policy.prob @ terms
        exact = policy.prob @ (terms**2).sum(1) - mean @ mean
        assert sigma_gradient(np.array(policy.p), baseline, policy.moments()) ** 2 == pytest.approx(exact)


@policies
@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_variance_of_rloo_is_exact_for_every_n(policy, n):
    p, moments = np.array(policy.p), policy.moments()
    sigma_sq = sigma_gradient(p, p, moments) ** 2
    formula = rloo_variance(np.array(n), sigma_sq, rloo_zeta(p, moments))
    assert formula == pytest.approx(policy.variance("rloo", n))


@policies
def test_zeta_is_at_least_half_of_sigma_squared(policy):
    """So that V(n) is convex and the greedy allocation exact (Hoeffding)."""
    p, moments = np.array(policy.p), policy.moments()
    assert 2 * rloo_zeta(p, moments) >= sigma_gradient(p, p, moments) ** 2 - 1e-12


def test_sigma_of_raft_is_that_of_its_own_estimator():
    policy = POLICIES[0]
    moments = ScoreMoments(**{k: np.array([getattr(policy.moments(), k)]) for k in ScoreMoments.__slots__})
    assert sigma_for("raft_pp", np.array([policy.p]), moments)[0] ** 2 == pytest.approx(policy.variance("raft_pp", 1))


def statistics_of(policy: Policy, rows: list[int]) -> GradientStatistics:
    r, s = policy.reward[rows], policy.score[rows]
    plus, minus = s[r > 0.5], s[r <= 0.5]
    up, um = plus.sum(0), minus.sum(0)
    return GradientStatistics(
        lease_id=0, n_plus=len(plus), n_minus=len(minus), sum_sq_plus=float((plus**2).sum()),
        sum_sq_minus=float((minus**2).sum()), sq_sum_plus=float(up @ up), sq_sum_minus=float(um @ um),
        dot=float(up @ um),
    )  # fmt: skip


def test_the_cross_term_is_an_unbiased_u_statistic_and_not_a_difference_of_norms():
    """Averaged over all groups with 2 right and 2 wrong answers, each moment is the policy's."""
    policy = POLICIES[1]
    sums, total = np.zeros(4), 0.0
    for q, rows in policy.groups(4):
        if policy.reward[rows].sum() == 2:
            one = moments_from([statistics_of(policy, rows)])
            sums += q * np.array([one.m_plus[0], one.m_minus[0], one.diff_sq[0], one.dot[0]])
            total += q
    exact = policy.moments()
    assert sums / total == pytest.approx([float(getattr(exact, k)) for k in ScoreMoments.__slots__])


def test_moments_of_a_class_with_too_few_rollouts_are_unknown():
    right, wrong = 0, 3
    one = moments_from([statistics_of(POLICIES[1], [right, right, wrong])])
    assert np.isfinite([one.m_plus[0], one.m_minus[0], one.dot[0]]).all() and np.isnan(one.diff_sq[0])
    none = moments_from([statistics_of(POLICIES[1], [right, right])])
    assert np.isnan([none.m_minus[0], none.dot[0], none.diff_sq[0]]).all()


# -- many prompts: draws, duplicates, importance weights ------------------------------------------------


def every_draw(pool: PromptPool, rho: np.ndarray, m: int):
    """Every outcome of m draws with its probability, merged as the sampler merges it."""
    for rows in product(range(len(rho)), repeat=m):
        index, multiplicity = np.unique(rows, return_counts=True)
        draw = Draw(index=index, multiplicity=multiplicity, rho=rho[index], tau=1.0, ess=1.0)
        yield float(np.prod(rho[list(rows)])), draw


def expected_gradient(kappa: float, m: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """(E[sum_i weight_i grad_i], rho) over all draws of m from the real rho* of prompts of unequal accuracy."""
    config = small_config(curriculum={"importance_weight_power": kappa, "prompts_per_step": m})
    pool = PromptPool(config, len(POLICIES))
    sampler = PotentialSampler(potential(np.array([x.p for x in POLICIES])))
    drawn = sampler.draw(2000, np.random.default_rng(0), tau=0.2)
    rho = np.empty(len(POLICIES))
    rho[drawn.index] = drawn.rho
    gradients = np.array([x.gradient for x in POLICIES])
    total = np.zeros(gradients.shape[1])
    for q, draw in every_draw(pool, rho, m):
        weight, _ = objective_weights(pool, draw)
        total += q * weight @ gradients[draw.index]
    return total, rho


def test_the_papers_objective_is_the_mean_over_rho():
    total, rho = expected_gradient(kappa=0.0)
    gradients = np.array([x.gradient for x in POLICIES])
    assert total == pytest.approx(rho @ gradients)
    assert np.abs(total - gradients.mean(0)).max() > 1e-3  # and not the uniform one


def test_full_importance_weights_give_exactly_the_gradient_of_the_uniform_objective():
    total, rho = expected_gradient(kappa=1.0)
    assert rho.max() / rho.min() > 1.2
    assert total == pytest.approx(np.array([x.gradient for x in POLICIES]).mean(0), abs=1e-12)


def test_a_prompt_drawn_c_times_weighs_c_over_m():
    pool = PromptPool(small_config(curriculum={"prompts_per_step": 8}), 16)
    draw = Draw(index=np.array([3, 5]), multiplicity=np.array([6, 2]), rho=np.full(2, 1 / 16), tau=1.0, ess=1.0)
    weight, _ = objective_weights(pool, draw)
    assert weight == pytest.approx([6 / 8, 2 / 8])


@pytest.mark.parametrize(("advantage", "n"), [("rloo", (2, 4, 3)), ("posterior_loo", (1, 4, 2))])
def test_unequal_groups_leave_every_prompt_its_weight_in_the_gradient(advantage, n):
    """The batch of eq. 16 with unequal n_i, token weights included; a mean over all rollouts would be n_i-weighted."""
    weight, longest = np.array([0.5, 0.25, 0.25]), 10
    alpha, beta = np.full(3, ALPHA), np.full(3, BETA)
    total, lengths = np.zeros(4), [np.full(k, longest) for k in n]
    per_token = token_weights("constant", weight, lengths, longest)
    for i, policy in enumerate(POLICIES):  # prompts are independent: one at a time, the others held at one group
        rewards = [np.resize([1.0, 0.0], k) for k in n]
        for q, rows in policy.groups(n[i]):
            rewards[i] = policy.reward[rows]
            a = compute_advantages(advantage, rewards, alpha, beta)[i]
            total += q * longest * (per_token[i] * a) @ policy.score[rows]
    gradients = np.array([x.gradient for x in POLICIES])
    assert total == pytest.approx(weight @ gradients, abs=1e-12)
    assert np.abs(total - np.array(n) / sum(n) @ gradients).max() > 1e-2
