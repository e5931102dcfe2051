"""CurES: draws, allocation, subsets and pilots, priors, collapse; and what every method has to promise."""

import numpy as np
import pytest
from fakes import small_config
from simulated import Run, by_prompt, rollouts

from cures_ray.curriculum.allocation import apportion, sigma_bernoulli
from cures_ray.curriculum.methods import METHODS, allocate
from cures_ray.curriculum.pool import PromptPool
from cures_ray.curriculum.sampling import Draw
from cures_ray.learning.advantages import ADVANTAGES
from cures_ray.messages import GradientStatistics

MIXED = np.linspace(0.0, 1.0, 60)
PILOTS = {"pilot_rollouts": 4}


def run_of(method: str, accuracy=MIXED, **curriculum) -> Run:
    return Run(accuracy, method=method, **({"pilot_rollouts": 2} if method == "gvm" else {}) | curriculum)


def draw_of(index, multiplicity, rho=None, size=60) -> Draw:
    rho = np.full(len(index), 1 / size) if rho is None else np.array(rho)
    return Draw(index=np.array(index), multiplicity=np.array(multiplicity), rho=rho, tau=1.0, ess=1.0)


# -- every method ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["uniform", "cures", "mopps", "knapsack"])
def test_methods_of_one_round_spend_exactly_n_and_weights_sum_to_one(method):
    run = run_of(method)
    for _ in range(12):
        plan = run.step()
        assert rollouts(plan) == 32
        assert sum(e.lease.weight for e in plan.entries) == pytest.approx(1)
        assert all(e.keep.all() for e in plan.entries)
    assert run.accounting.trained == run.accounting.planned == 12 * 32 and run.accounting.in_flight == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accuracy", [[0.5], [0.0, 0.5, 1.0], [0.0] * 30, [1.0] * 30], ids=["1", "3", "all0", "all1"])
def test_no_method_dies_or_stalls_with_few_prompts_or_after_collapse(method, accuracy):
    run = run_of(method, accuracy)
    for _ in range(15):
        plan = run.step()
        assert all(np.isfinite(x) for x in plan.metrics.values())
        assert all(e.lease.n > 0 and np.isfinite(e.lease.weight) for e in plan.entries)
    accounting = run.accounting
    accounting.check()
    assert accounting.in_flight == 0 and accounting.planned == sum(lease.n for lease in run.leased)


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_follows_from_the_seed(method):
    one, two = (run_of(method) for _ in range(2))
    for _ in range(4):
        assert [e.lease for e in one.step().entries] == [e.lease for e in two.step().entries]
    assert len({lease.seed for lease in one.leased}) == len(one.leased)


# -- CurES: draws and allocation ------------------------------------------------------------------------------


def test_cures_holds_the_bounds_and_comes_to_draw_what_can_be_learned():
    accuracy = np.r_[np.zeros(40), np.full(20, 0.5)]
    run = Run(accuracy, target_ess_fraction=0.3, n_min=2, n_max=8, belief="none")
    plans = [run.step() for _ in range(40)]
    assert all(2 <= n <= 8 for plan in plans for n in by_prompt(plan).values())
    late = [i for plan in plans[25:] for i in by_prompt(plan)]
    assert np.mean(accuracy[late] == 0.5) > 0.8  # a third of the prompts
    assert plans[-1].metrics["ess_fraction"] == pytest.approx(0.3, rel=1e-2)
    assert {"tau", "ess", "distinct_prompts", "max_multiplicity"} <= plans[-1].metrics.keys()


def test_with_a_fixed_temperature_the_temperature_is_that():
    run = Run(MIXED, tau=0.07)
    run.step()
    assert run.step().metrics["tau"] == 0.07


def test_uniform_sampling_keeps_the_allocation_and_uniform_allocation_keeps_the_sampling():
    sampling, allocation = (
        Run(MIXED, allocation="uniform", belief="none"),
        Run(MIXED, sampling="uniform", belief="none"),
    )
    for run in (sampling, allocation):
        for _ in range(25):
            plan = run.step()
            assert rollouts(plan) == 32
    plan = sampling.step()  # N/m a draw, whatever is believed
    assert all(n % 4 == 0 for n in by_prompt(plan).values()) and "tau" in plan.metrics
    plan = allocation.step()
    assert "tau" not in plan.metrics and plan.metrics["ess_fraction"] == 1
    p = np.array([e.lease.alpha / (e.lease.alpha + e.lease.beta) for e in plan.entries])
    n = np.array([e.lease.n for e in plan.entries])
    assert np.corrcoef(sigma_bernoulli(p), n)[0, 1] > 0.8


def pool_of(accuracy=None, algo=None, **curriculum) -> PromptPool:
    """60 prompts whose belief is ``accuracy`` with the certainty of 1000 rollouts."""
    pool = PromptPool(small_config(curriculum={"n_max": 32} | curriculum, algo=algo or {}), 60)
    if accuracy is not None:
        p = np.clip(accuracy, 1e-3, 1 - 1e-3)
        pool.belief.set_prior(None, 1000 * p, 1000 * (1 - p))
    return pool


def test_rollouts_are_shared_by_sigma_times_multiplicity_over_the_drawn_batch():
    pool = pool_of(MIXED, n_max=320, rollouts_per_step=320)
    draw = draw_of([6, 30, 55], [2, 1, 5])
    p = pool.belief.mean(draw.index)
    n = allocate(pool, draw)
    assert n.tolist() == apportion(draw.multiplicity * sigma_bernoulli(p), 320, 2, 320).tolist()
    assert n.sum() == 320 and n[2] > 2 * n[1]


def test_importance_weights_enter_the_allocation_and_the_objective():
    """n_i ~ W_i c_i sigma_i with W = (1 / (|D| rho))^kappa (ALGORITHMS.md 3.5)."""
    rho = [0.04, 0.01, 0.02]
    pool = pool_of(np.full(60, 0.5), n_max=320, rollouts_per_step=320, importance_weight_power=1.0)
    n = allocate(pool, draw_of([1, 2, 3], [1, 1, 1], rho))
    assert n == pytest.approx(320 * (1 / np.array(rho)) / (1 / np.array(rho)).sum(), abs=1)


def test_n_max_is_per_draw_when_duplicates_leave_too_few_prompts():
    n = allocate(pool_of(MIXED, n_max=5), draw_of([30, 31], [7, 1]))
    assert n.sum() == 32 and (n <= [35, 5]).all()


def test_rloo_gain_spends_n_and_gives_uncertain_prompts_more():
    pool = pool_of(MIXED, allocation="rloo_gain")
    n = allocate(pool, draw_of([0, 30, 59], [1, 6, 1]))
    assert n.sum() == 32 and n.min() == 2 and n[1] == 28
    run = Run(MIXED, allocation="rloo_gain")
    assert all(rollouts(run.step()) == 32 for _ in range(5))


def test_expensive_prompts_get_fewer_rollouts():
    pool = pool_of(np.full(60, 0.5), allocation="cost_aware")
    for index, tokens in ((1, 100), (2, 1600)):
        pool.observe_cost(index, 4, 4 * tokens, 1.0, 0.0)
    n = allocate(pool, draw_of([1, 2], [4, 4]))
    assert n.sum() == 32 and n[0] == pytest.approx(4 * n[1], abs=2)


def test_verifier_seconds_are_a_cost_too():
    pool = pool_of(allocation="cost_aware")
    pool.observe_cost(0, 1, 100, 1.0, 0.0)  # 100 tokens a second
    pool.observe_cost(1, 1, 100, 1.0, 9.0)
    assert pool.costs(np.array([0, 1, 2])) == pytest.approx([100, 1000, np.nan], nan_ok=True)


def score(lease_id: int, plus: float, minus: float) -> GradientStatistics:
    return GradientStatistics(
        lease_id=lease_id, n_plus=1, n_minus=1, sum_sq_plus=plus, sum_sq_minus=minus, sq_sum_plus=plus,
        sq_sum_minus=minus, dot=0.0,
    )  # fmt: skip


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_measured_scores_move_the_allocation_for_every_advantage(advantage):
    pool = pool_of(
        np.full(60, 0.5),
        sigma="last_layer",
        algo={"advantage": advantage},
    )
    draw = draw_of([1, 2], [4, 4])
    assert allocate(pool, draw).tolist() == [16, 16]
    pool.observe_gradients([1, 2], [score(0, 9.0, 9.0), score(1, 1.0, 1.0)])
    n = allocate(pool, draw)
    assert n.sum() == 32 and n.tolist() == [24, 8]


def test_gradient_statistics_of_a_commit_reach_the_allocation():
    run = Run(np.full(20, 0.5), sigma="last_layer")
    plan = run.generate()
    big = plan.entries[0].lease.prompt_index
    run.step([score(e.lease.lease_id, *([100.0] * 2 if i == 0 else [1.0] * 2)) for i, e in enumerate(plan.entries)])
    assert run.curriculum.pool.belief.moments([big]).m_plus[0] == 100
    assert np.isfinite(run.step().metrics["max_n"])


def test_the_bernoulli_sigma_is_the_papers_for_every_advantage():
    draw = draw_of([3, 30], [4, 4])
    shares = {a: tuple(allocate(pool_of(MIXED, algo={"advantage": a}), draw)) for a in ADVANTAGES}
    assert len(set(shares.values())) == 1 and shares["grpo"][1] > shares["grpo"][0]


# -- beliefs that are drawn from ------------------------------------------------------------------------------


def test_thompson_draws_differ_from_those_of_the_mean_and_explore():
    mean, thompson = (
        Run(np.zeros(60), tau=0.02, belief="none"),
        Run(np.zeros(60), tau=0.02, belief="none", belief_draw="thompson"),
    )
    plans = [(mean.step(), thompson.step()) for _ in range(6)]
    first, explored = plans[0]  # nothing is known: the means are alike, samples of the posterior are not
    assert first.metrics["ess_fraction"] == pytest.approx(1) and explored.metrics["ess_fraction"] < 0.7
    # the same state draws anew in each batch, but the same from the same state
    again = Run(np.zeros(60), tau=0.02, belief="none", belief_draw="thompson")
    assert [by_prompt(again.step()) for _ in range(6)] == [by_prompt(b) for _, b in plans]


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_collapse_is_said_and_sampling_tends_to_uniform(accuracy):
    run = Run(np.full(12, accuracy), tau=0.1, belief="none")
    first = run.step()
    assert first.metrics["collapsed"] == 0
    for _ in range(60):
        plan = run.step()
    assert plan.metrics["collapsed"] == 1 and run.curriculum.status().metrics["collapsed"] == 1
    assert plan.metrics["ess_fraction"] > 0.95 and rollouts(plan) == 32


def test_collapse_of_the_subset_in_play_is_not_hidden_by_the_other_subsets():
    run = Run(np.zeros(40), belief="reset", subsets=4, subset_steps=4, pilot_rollouts=30)
    assert run.step().metrics["collapsed"] == 1
