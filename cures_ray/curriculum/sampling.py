"""Drawing prompts: rho*(x) = softmax(sqrt(p(1-p)) / tau) exactly, at a cost that does not grow with N (eq. 14).

A prompt's potential v = sqrt(p(1-p)) in [0, 1/2] is held as a 32-bit fixed-point code; its upper 13 bits name
one of 8192 buckets. Per bucket there are a member list and the power sums of its members' offsets from the
bucket's centre. Then, for *any* tau in [TAU_MIN, TAU_MAX]:

- the normaliser and the ESS are sums over buckets (the power series of exp converges: offsets / tau <= 0.31),
- a draw picks a bucket by (members x bound on the weight), a member uniformly, and accepts it with
  weight / bound >= 0.54: exact i.i.d. draws from rho*,
- a changed potential moves one member between two lists (swap-remove).

Weights are exp((v - 1/2) / tau) in (0, 1], scaled by the largest non-empty bucket while summing: neither
overflow nor, when all potentials collapse to 0, a normaliser of 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TAU_MIN, TAU_MAX = 1e-4, 1e4
BUCKETS = 2**13
ORDER = 8  # of the power series: relative error < 1e-10 of the normaliser, < 1e-7 of the ESS, at TAU_MIN

_SHIFT = 32 - 13
_HALF = 2.0 ** (_SHIFT - 1)  # codes in half a bucket
_UNIT = 0.5 / (2**32 - 1)  # potential per code
_CENTRE = ((np.arange(BUCKETS) << _SHIFT) + _HALF) * _UNIT
_NEGLIGIBLE = 60.0  # nats below the largest weight at which a bucket is left out
_CHUNK = 2**20
_SMALL = 2**19  # prompts up to which one indexed copy is faster than a copy for each bucket
_FACTORIAL = np.array([math.factorial(k) for k in range(ORDER + 1)], np.float64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """m draws with replacement, duplicates merged. k = distinct prompts, in the order first drawn."""

    index: np.ndarray  # int64 [k] rows
    multiplicity: np.ndarray  # int64 [k], sums to m
    rho: np.ndarray  # float64 [k], probability of the prompt in one draw
    tau: float
    ess: float  # 1 / sum rho^2, over all prompts


def potential(p: np.ndarray) -> np.ndarray:
    """sqrt(p (1 - p)), eq. 11 up to a constant."""
    return np.sqrt(np.maximum(p * (1.0 - p), 0.0))


def importance_weights(rho: np.ndarray, num_prompts: int, power: float) -> np.ndarray:
    """W = (1 / (|D| rho)) ** kappa of drawn prompts: 0 is the paper, 1 is unbiased (ALGORITHMS.md 3.5)."""
    return (num_prompts * rho) ** -power


def weight_ess(weights: np.ndarray, multiplicity: np.ndarray) -> float:
    """Effective sample size of importance weights [k] over the drawn batch, in draws."""
    return float((multiplicity * weights).sum() ** 2 / (multiplicity * weights**2).sum())


class PotentialSampler:
    """Draws rows of ``potential`` [N] from rho*. For a subset of prompts, build a sampler of the subset.

    State is the codes, the member lists, each prompt's place in its list, the power sums and the last tau:
    restored, it draws the same prompts from the same generator, bit for bit.
    """

    def __init__(self, potential: np.ndarray) -> None:
        """Takes O(N). Raises ValueError for potentials outside [0, 1/2] or NaN."""
        self.num_prompts = n = len(potential)
        if not 0 < n < 2**32:
            raise ValueError(f"needs at least one prompt, got {n}")
        self._code = np.empty(n, np.uint32)
        for i in range(0, n, _CHUNK):
            self._code[i : i + _CHUNK] = _encode(potential[i : i + _CHUNK])
        bucket = (self._code >> _SHIFT).astype(np.uint16)
        self._count = np.bincount(bucket, minlength=BUCKETS)
        lists = np.argsort(bucket, kind="stable")
        self._slot = np.empty(n, np.uint32)  # place in the bucket's list
        self._slot[lists] = _ranges(np.zeros(BUCKETS, np.int64), self._count)
        self._moments = np.zeros((ORDER + 1, BUCKETS))  # row k: sum of offset^k, offset in [-1, 1)
        for i in range(0, n, _CHUNK):
            powers = _powers(self._code[i : i + _CHUNK])
            for k in range(ORDER + 1):
                self._moments[k] += np.bincount(bucket[i : i + _CHUNK], powers[k], BUCKETS)
        self._pool = np.empty(2 * n + 8 * BUCKETS, np.uint32)  # all member lists, with room to grow
        self._lay_out(self._count, lists)
        self._tau = 0.0  # last solution of solve_tau; 0: none yet

    @classmethod
    def restored(cls, num_prompts: int, state: dict[str, np.ndarray]) -> PotentialSampler:
        """The sampler of a ``state_dict``, in about the time of copying it."""
        self = cls.__new__(cls)
        self.num_prompts = num_prompts
        self._pool = np.empty(2 * num_prompts + 8 * BUCKETS, np.uint32)
        self.load_state_dict(state)
        return self

    def update(self, index: np.ndarray | Sequence[int], potential: np.ndarray) -> None:
        """Set the potentials of rows ``index`` [k], in O(k). Of a row named twice the last value counts."""
        rows = np.asarray(index, np.int64)
        code = _encode(np.broadcast_to(np.asarray(potential, np.float64), rows.shape))
        if not np.all(rows[1:] > rows[:-1]):
            rows, last = np.unique(rows[::-1], return_index=True)
            code = code[::-1][last]
        changed = self._code[rows] != code
        rows, code = rows[changed], code[changed]
        if not len(rows):
            return
        before = self._code[rows]
        self._code[rows] = code
        source, target = (before >> _SHIFT).astype(np.int64), (code >> _SHIFT).astype(np.int64)
        powers = _powers(np.concatenate([before, code]))
        powers[:, : len(before)] *= -1
        flat = np.concatenate([source, target]) + BUCKETS * np.arange(ORDER + 1)[:, None]
        np.add.at(self._moments.reshape(-1), flat.reshape(-1), powers.reshape(-1))
        moved = source != target
        if moved.any():
            self._remove(rows[moved], source[moved])
            self._insert(rows[moved], target[moved])
            empty = source[self._count[source] == 0]
            self._moments[:, empty] = 0.0

    def draw(self, m: int, rng: np.random.Generator, tau: float) -> Draw:
        """m i.i.d. draws from rho*; all randomness comes from ``rng``. ``tau`` in [TAU_MIN, TAU_MAX]."""
        log_z, ess = self._sums(tau)
        span = self._span(tau)
        mass = np.cumsum(self._moments[0, span] * _relative_weight(span.start, span.stop, tau))
        kept: list[np.ndarray] = []
        missing = m
        while missing > 0:
            u = rng.random((3, 8 + int(missing * (1 + 2 * _HALF * _UNIT / tau))))
            bucket = np.minimum(np.searchsorted(mass, u[0] * mass[-1], side="right"), len(mass) - 1) + span.start
            member = np.minimum((u[1] * self._count[bucket]).astype(np.int64), self._count[bucket] - 1)
            row = self._pool[self._start[bucket] + member]
            below_top = (2 * _HALF - (self._code[row] & (2**_SHIFT - 1))) * _UNIT
            row = row[u[2] < np.exp(-below_top / tau)][:missing]
            kept.append(row)
            missing -= len(row)
        index, multiplicity = _merge(np.concatenate(kept).astype(np.int64) if kept else np.zeros(0, np.int64))
        rho = np.exp((self._code[index] * _UNIT - 0.5) / tau - log_z)
        return Draw(index=index, multiplicity=multiplicity, rho=rho, tau=tau, ess=ess)

    def ess(self, tau: float) -> float:
        """Effective sample size 1 / sum rho^2 in prompts, between 1 and N."""
        return self._sums(tau)[1]

    def log_z(self, tau: float) -> float:
        """log sum exp((v - 1/2) / tau) over all prompts."""
        return self._sums(tau)[0]

    def solve_tau(self, target_ess_fraction: float, tolerance: float = 1e-4) -> float:
        """The tau whose ESS is ``target_ess_fraction`` * N within relative ``tolerance``.

        The ESS rises with tau. Returns TAU_MIN where even that leaves more (collapse: all potentials alike),
        TAU_MAX where the target is out of reach. Starts from the last solution, which is part of the state.
        """
        goal = math.log(max(target_ess_fraction * self.num_prompts, 1.0))

        def excess(log_tau: float) -> float:
            return math.log(self.ess(min(max(math.exp(log_tau), TAU_MIN), TAU_MAX))) - goal

        low, high, blind = math.log(TAU_MIN), math.log(TAU_MAX), 6
        if self._tau > 0:
            last = math.log(self._tau)
            value = excess(last)
            if abs(value) <= tolerance:
                return self._tau
            other = last - math.copysign(0.05, value)
            beyond = excess(other)
            if value * beyond < 0:
                (low, below), (high, above) = sorted([(last, value), (other, beyond)])
                blind = 0
        if blind:
            below, above = excess(low), excess(high)
            if below >= 0:
                return TAU_MIN
            if above <= tolerance:
                return TAU_MAX
        for step in range(100):  # bisection, then regula falsi (Illinois) with a bisection now and then
            falsi = low + (high - low) * below / (below - above)
            middle = falsi if step >= blind and (step - blind) % 3 < 2 else 0.5 * (low + high)
            value = excess(middle)
            if abs(value) <= tolerance or high - low < 1e-12:
                break
            if value < 0:
                low, below, above = middle, value, above / 2
            else:
                high, above, below = middle, value, below / 2
        self._tau = math.exp(middle)
        return self._tau

    @property
    def nbytes(self) -> int:
        arrays = (self._code, self._slot, self._pool, self._moments, self._count, self._start, self._room)
        return sum(a.nbytes for a in arrays)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The arrays themselves where possible, not copies: write them out before the next change."""
        return {
            "code": self._code,
            "slot": self._slot,
            "lists": self._lists(),
            "moments": self._moments,
            "tau": np.array(self._tau),
        }

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Take over the arrays of ``state_dict`` (no copy when they are writable)."""
        for name in ("code", "slot", "lists"):
            if len(state[name]) != self.num_prompts:
                raise ValueError(f"sampler state has {len(state[name])} prompts, this sampler {self.num_prompts}")
        self._code = np.require(state["code"], np.uint32, "W")
        self._slot = np.require(state["slot"], np.uint32, "W")
        self._moments = np.require(state["moments"], np.float64, ["C", "W"]).reshape(ORDER + 1, BUCKETS)
        self._tau = float(state["tau"])
        self._count = np.rint(self._moments[0]).astype(np.int64)
        self._lay_out(self._count, state["lists"])

    def _span(self, tau: float) -> slice:
        """The buckets that can matter: from the highest non-empty one to 60 nats below it."""
        if not TAU_MIN <= tau <= TAU_MAX:
            raise ValueError(f"tau must be in [{TAU_MIN:g}, {TAU_MAX:g}], got {tau:g}")
        top = BUCKETS - 1 - int(np.argmax(self._count[::-1] > 0))
        return slice(max(0, top - int(_NEGLIGIBLE * tau / (2 * _HALF * _UNIT)) - 1), top + 1)

    def _sums(self, tau: float) -> tuple[float, float]:
        """(log of the normaliser, ESS) from the power sums."""
        span = self._span(tau)
        ratio = _HALF * _UNIT / tau
        series = np.array([[ratio], [2 * ratio]]) ** np.arange(ORDER + 1) / _FACTORIAL
        scale = _relative_weight(span.start, span.stop, tau)
        sums = series @ self._moments[:, span]
        z, z_sq = float(scale @ sums[0]), float(scale**2 @ sums[1])
        return math.log(z) + float(_CENTRE[span.stop - 1] - 0.5) / tau, min(max(z * z / z_sq, 1.0), self.num_prompts)

    def _remove(self, rows: np.ndarray, bucket: np.ndarray) -> None:
        """Take rows out of their lists; the last members of a list move into its holes."""
        place = np.sort(bucket << 32 | self._slot[rows])  # by bucket, then slot
        bucket, slot = place >> 32, place & 0xFFFFFFFF
        touched, removed = _runs(bucket)
        left = self._count[touched] - removed
        tail = self._pool[_ranges(self._start[touched] + left, removed)]  # members beyond the new ends
        offset = slot - np.repeat(left, removed)
        stays = np.ones(len(tail), bool)
        in_tail = offset >= 0
        stays[(np.repeat(np.cumsum(removed) - removed, removed) + offset)[in_tail]] = False
        hole, movers = slot[~in_tail], tail[stays]
        self._pool[self._start[bucket[~in_tail]] + hole] = movers
        self._slot[movers] = hole
        self._count[touched] = left

    def _insert(self, rows: np.ndarray, bucket: np.ndarray) -> None:
        """Append rows to their new lists, in row order."""
        place = np.sort(bucket << 32 | rows)
        bucket, rows = place >> 32, place & 0xFFFFFFFF
        touched, added = _runs(bucket)
        self._slot[rows] = _ranges(self._count[touched], added)
        self._reserve(touched, self._count[touched] + added)
        self._pool[self._start[bucket] + self._slot[rows]] = rows
        self._count[touched] += added

    def _reserve(self, bucket: np.ndarray, need: np.ndarray) -> None:
        """Make room for ``need`` members: a full list moves to the pool's end with twice the room."""
        full = need > self._room[bucket]
        if not full.any():
            return
        grown, room = bucket[full], 2 * need[full]
        if self._end + room.sum() > len(self._pool):
            counts = self._count.copy()
            counts[bucket] = need
            self._lay_out(counts, self._lists())
            return
        start = self._end + np.cumsum(room) - room
        self._pool[_ranges(start, self._count[grown])] = self._pool[_ranges(self._start[grown], self._count[grown])]
        self._start[grown], self._room[grown] = start, room
        self._end += int(room.sum())

    def _lists(self) -> np.ndarray:
        """All member lists, one after the other, uint32 [N]."""
        if self.num_prompts < _SMALL:
            return self._pool[_ranges(self._start, self._count)]
        return np.concatenate([self._pool[s : s + n] for s, n in zip(self._start, self._count, strict=True)])

    def _lay_out(self, counts: np.ndarray, lists: np.ndarray) -> None:
        """Spread ``lists`` over the pool, with room for a quarter and 4 more than ``counts``. O(N), and rare: at least
        N / 8 prompts change bucket between two of these."""
        self._room = counts + counts // 4 + 4
        self._start = np.cumsum(self._room) - self._room
        self._end = int(self._room.sum())
        if self.num_prompts < _SMALL:
            self._pool[_ranges(self._start, self._count)] = lists
            return
        ends = np.cumsum(self._count)
        for bucket in np.flatnonzero(self._count):
            start, n, end = self._start[bucket], self._count[bucket], ends[bucket]
            self._pool[start : start + n] = lists[end - n : end]


class UniformSampler:
    """Uniform draws with replacement."""

    def __init__(self, num_prompts: int) -> None:
        self.num_prompts = num_prompts

    def draw(self, m: int, rng: np.random.Generator, tau: float = math.inf) -> Draw:
        return _uniform(rng.integers(0, self.num_prompts, m), self.num_prompts)


class EpochSampler:
    """Each prompt once an epoch, in an order that follows from (seed, epoch). State is two integers."""

    def __init__(self, num_prompts: int, seed: int) -> None:
        self.num_prompts, self.seed = num_prompts, seed
        self.epoch = self.position = 0
        self._order: tuple[int, np.ndarray] | None = None  # (epoch, permutation)

    def draw(self, m: int, rng: np.random.Generator | None = None, tau: float = math.inf) -> Draw:
        """The next m prompts; ``rng`` is not used. A draw may cross into the next epoch."""
        parts: list[np.ndarray] = [np.zeros(0, np.int64)]
        while m > 0:
            part = self._permutation()[self.position : self.position + m]
            parts.append(part.astype(np.int64))
            self.position += len(part)
            m -= len(part)
            if self.position == self.num_prompts:
                self.epoch, self.position = self.epoch + 1, 0
        return _uniform(np.concatenate(parts), self.num_prompts)

    def state_dict(self) -> dict[str, np.ndarray]:
        return {"epoch_position": np.array([self.epoch, self.position], np.int64)}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        self.epoch, self.position = (int(v) for v in state["epoch_position"])

    def _permutation(self) -> np.ndarray:
        if self._order is None or self._order[0] != self.epoch:
            rng = np.random.Generator(np.random.Philox(key=[self.seed, self.epoch]))
            self._order = (self.epoch, rng.permutation(np.arange(self.num_prompts, dtype=np.uint32)))
        return self._order[1]


def _uniform(rows: np.ndarray, n: int) -> Draw:
    index, multiplicity = _merge(rows)
    rho = np.full(len(index), 1.0 / n)
    return Draw(index=index, multiplicity=multiplicity, rho=rho, tau=math.inf, ess=float(n))


def _merge(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows in the order first drawn, and how often each was drawn."""
    if not len(rows):
        return rows, rows.copy()
    place = np.sort(rows << 31 | np.arange(len(rows)))  # by row, then turn; rows have 32 bits
    distinct, count = _runs(place >> 31)
    order = np.argsort(place[np.cumsum(count) - count] & 0x7FFFFFFF)
    return distinct[order], count[order]


def _encode(potential: np.ndarray) -> np.ndarray:
    v = np.asarray(potential, np.float64)
    if len(v) and not (v.min() >= 0 and v.max() <= 0.5 + 1e-9):
        raise ValueError("potentials sqrt(p(1-p)) must be in [0, 1/2] and not NaN")
    return np.rint(np.minimum(v, 0.5) / _UNIT).astype(np.uint32)


def _powers(code: np.ndarray) -> np.ndarray:
    """offset ** (0..ORDER), float64 [ORDER + 1, k]; offset in [-1, 1) from the bucket's centre."""
    offset = ((code & np.uint32(2**_SHIFT - 1)).astype(np.float64) - _HALF) / _HALF
    powers = np.ones((ORDER + 1, len(code)))
    for k in range(ORDER):
        np.multiply(powers[k], offset, out=powers[k + 1])
    return powers


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values of a sorted array that is not empty, and how often each occurs."""
    edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    edges = np.concatenate([[0], edges, [len(ordered)]])
    return ordered[edges[:-1]], edges[1:] - edges[:-1]


@functools.lru_cache(maxsize=4)
def _relative_weight(first: int, end: int, tau: float) -> np.ndarray:
    """Weights at the centres of buckets first .. end - 1, that of the last one 1; read only."""
    weight = np.exp((_CENTRE[first:end] - _CENTRE[end - 1]) / tau)
    weight.flags.writeable = False
    return weight


def _ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """The concatenation of arange(start[i], start[i] + length[i])."""
    return np.repeat(start - (np.cumsum(length) - length), length) + np.arange(int(length.sum()))
