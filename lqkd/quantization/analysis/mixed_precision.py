"""The best number of bits for every layer under a budget, from the sensitivity of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lqkd.errors import UsageError
from lqkd.quantization.analysis.budget import Budget
from lqkd.quantization.analysis.sensitivity import Candidate, SensitivityReport
from lqkd.quantization.recipe import Recipe, Rule, exactly


@dataclass(frozen=True)
class MixedPrecision:
    """What :func:`assign_bits` chose.

    Attributes:
        recipe: the recipe of the report with one more rule for every layer that has quantizers.
        chosen: one candidate for each group of the report, in its order.
        limit: the budget in bytes or bit operations.
        loss_increase: the sum over the chosen candidates, which the choice minimises: an estimate, since layers are
            quantised together and are trained.
        packed_bytes: size of the network with these bits.
        bit_operations: of one of its forward passes.

    Examples:
        >>> w8 = Candidate(("fc",), (8,), (8,), 0.001, 0.0, 0.0, packed_bytes=110, bit_operations=6400)
        >>> report = SensitivityReport(Recipe(), ("W8A8",), ((w8,),), 100, 0.5, 0.9, 400, 102_400)
        >>> assign_bits(report, Budget.parse("bops=10k")).bit_operations
        6400
    """

    recipe: Recipe
    chosen: tuple[Candidate, ...]
    limit: int
    loss_increase: float
    packed_bytes: int
    bit_operations: int


def assign_bits(report: SensitivityReport, budget: Budget) -> MixedPrecision:
    """Choose the bits of every layer so that the increases of the loss sum to the least that the budget allows.

    Args:
        report: what each layer loses with each number of bits.
        budget: the largest size or number of bit operations of the whole network.

    Raises:
        UsageError: when even the fewest bits everywhere are above the budget; it says the smallest that is not.

    Examples:
        >>> w8 = Candidate(("fc",), (8,), (8,), 0.001, 0.0, 0.0, packed_bytes=110, bit_operations=6400)
        >>> w2 = Candidate(("fc",), (2,), (2,), 0.3, 0.2, -0.1, packed_bytes=35, bit_operations=400)
        >>> report = SensitivityReport(Recipe(), ("W8A8", "W2A2"), ((w8, w2),), 100, 0.5, 0.9, 400, 102_400)
        >>> chosen = assign_bits(report, Budget.parse("size=25%"))
        >>> chosen.limit, chosen.packed_bytes, chosen.recipe.rules[-1].weight_bits
        (100, 35, 2)
    """
    base = report.packed_bytes if budget.quantity == "size" else report.bit_operations

    def change(candidate: Candidate) -> int:
        return (candidate.packed_bytes if budget.quantity == "size" else candidate.bit_operations) - base

    losses = [[candidate.loss_increase for candidate in group] for group in report.groups]
    changes = [[change(candidate) for candidate in group] for group in report.groups]
    limit = budget.limit(base)
    budget.check(base + sum(min(row) for row in changes), base)
    indices = allocate(losses, changes, limit - base)
    chosen = tuple(group[index] for group, index in zip(report.groups, indices, strict=True))
    rules = [
        Rule(exactly(name), weight, activation)
        for candidate in chosen
        for name, weight, activation in zip(
            candidate.layers, candidate.weight_bits, candidate.activation_bits, strict=True
        )
    ]
    return MixedPrecision(
        recipe=replace(report.recipe, rules=[*report.recipe.rules, *rules]),
        chosen=chosen,
        limit=limit,
        loss_increase=sum(candidate.loss_increase for candidate in chosen),
        packed_bytes=report.packed_bytes + sum(c.packed_bytes - report.packed_bytes for c in chosen),
        bit_operations=report.bit_operations + sum(c.bit_operations - report.bit_operations for c in chosen),
    )


def allocate(losses: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], budget: int) -> list[int]:
    """Choose one option for every layer: least summed loss, summed cost within the budget, exactly.

    The integer program of Hubara et al., "Accurate Post Training Quantization With Small Calibration Sets" (ICML 2021,
    arXiv 2006.10518), and of HAWQ-V3 (Yao et al., ICML 2021, arXiv 2011.10680)::

        minimise    sum_l sum_k loss[l][k] * x[l][k]
        subject to  sum_l sum_k cost[l][k] * x[l][k] <= budget
                    sum_k x[l][k] = 1 for every layer l,  x[l][k] in {0, 1}

    Args:
        losses: finite loss of each option of each layer.
        costs: integer cost of each, negative ones too.
        budget: largest sum of the costs.

    Returns:
        The index of the option of each layer.

    Raises:
        UsageError: when the cheapest options together are above the budget.

    Examples:
        >>> losses = [[0.0, 0.1, 0.9], [0.0, 0.3, 0.4]]  # of two layers with 8, 4 and 2 bits
        >>> allocate(losses, costs=[[8, 4, 2], [8, 4, 2]], budget=10)
        [0, 2]
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    # Costs count from each layer's cheapest option, in units of their common divisor; the solver gets them scaled, too,
    # since its tolerance is absolute.
    cheapest = [min(row) for row in costs]
    room = budget - sum(cheapest)
    if room < 0:
        raise UsageError(f"budget={budget} cannot be reached: the smallest possible is {sum(cheapest)}")
    above = [[cost - least for cost in row] for row, least in zip(costs, cheapest, strict=True)]
    unit = math.gcd(*(cost for row in above for cost in row)) or 1
    weights = [cost // unit for row in above for cost in row]
    room //= unit
    scale = max(1.0, max(weights) / 1e4)
    best = [min(row) for row in losses]
    objective = np.array([loss - least for row, least in zip(losses, best, strict=True) for loss in row])
    # The solver stops within an absolute gap of 1e-6: scaled so that it is nothing beside the largest difference.
    objective *= 1e4 / (objective.max() or 1.0)
    owner = np.repeat(np.arange(len(losses)), [len(row) for row in losses])
    one_each = LinearConstraint((owner == np.arange(len(losses))[:, None]).astype(float), 1, 1)
    within = [LinearConstraint(np.array([weights]) / scale, -np.inf, room / scale)]
    while True:
        solution = milp(
            objective,
            integrality=np.ones(len(objective)),
            bounds=Bounds(0, 1),
            constraints=[one_each, *within],
            options={"mip_rel_gap": 0.0},
        )
        assert solution.success, f"the cheapest options are within the budget, yet: {solution.message}"
        picked = solution.x > 0.5
        if sum(weight for weight, yes in zip(weights, picked, strict=True) if yes) <= room:
            break
        # The solver's tolerance let the sum be a little above: forbid this choice and look for the next best.
        within.append(LinearConstraint(picked[None].astype(float), -np.inf, len(losses) - 1))
    starts = np.searchsorted(owner, np.arange(len(losses)))
    return [int(index) for index in np.flatnonzero(picked) - starts]
