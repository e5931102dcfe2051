"""Controls that are no configuration: coin-flip rewards, and beliefs that are the truth."""

from __future__ import annotations

import numpy as np

from cures_ray.curriculum import Curriculum

COIN = 0.5  # probability of a reward in the random-reward control: the most variance there is
CERTAINTY = 1000.0  # alpha + beta of an oracle's belief
