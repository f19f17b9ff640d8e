"""Values and gradients of each family against its paper's formula, written value by value in float64."""

from __future__ import annotations

import math
from statistics import mean, stdev

import pytest
import torch
from torch import Tensor

from lqkd.quantization.quantizers import QUANTIZERS, Quantizer

SIZE = 60


def run(quantizer: Quantizer, x: list[float], upstream: list[float]) -> tuple[list[float], list[float]]:
    """Value and input gradient; parameter gradients are left on the quantizer."""
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    out = quantizer(leaf)
    out.backward(torch.tensor(upstream, dtype=torch.float64))
    assert leaf.grad is not None
    return out.tolist(), leaf.grad.tolist()


def numbers(seed: int, spread: float = 1.0) -> list[float]:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(SIZE, generator=generator, dtype=torch.float64)).tolist()


def ready(name: str, bits: int, fit: Tensor | None = None, **arguments: object) -> Quantizer:
    quantizer = QUANTIZERS[name](bits, **arguments)
    quantizer.initialize(torch.ones(4) if fit is None else fit)
    return quantizer.double()


def close(got: object, expected: object) -> None:
    assert got == pytest.approx(expected, rel=1e-7, abs=1e-9)


def factor(qp: int) -> float:
    """LSQ's factor of a step's gradient for ``SIZE`` elements, as lqkd bounds it."""
    return min(1 / math.sqrt(SIZE * qp), 1 / qp**2)


def sign(value: float) -> float:
    return 1.0 if value >= 0 else -1.0


@pytest.mark.parametrize(("bits", "signed"), [(b, s) for b in range(1, 9) for s in (False, True) if b > 1 or not s])
def test_ewgs(bits: int, signed: bool) -> None:
    qn, qp = (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    s, delta = 0.375, 0.4
    x, g = numbers(bits, 0.4 * 2 ** (bits - 1)), numbers(100 + bits)
    quantizer = ready("lsq_ewgs", bits, signed=signed)
    quantizer.scale.data.fill_(s)
    quantizer.delta = delta
    values, gradients = run(quantizer, x, g)
    expected, slopes = [], []
    for v, up, value in zip(x, g, values, strict=True):
        r = v / s
        close(value, round(min(max(r, -qn), qp)) * s)
        inside = -qn < r < qp
        x_n, x_q = (r + qn) / (qp + qn), (round(r) + qn) / (qp + qn)
        expected.append(up * (1 + delta * math.copysign(1, up) * (x_n - x_q)) if inside else 0.0)
        slopes.append(up * (round(r) - r if inside else (-qn if r <= -qn else qp)))
    close(gradients, expected)
    close(quantizer.scale.grad.item(), sum(slopes) * factor(qp))


@pytest.mark.parametrize(("bits", "signed"), [(2, True), (4, False), (8, True)])
@pytest.mark.parametrize(("scale", "exponent"), [(0.354, -1), (0.353, -2), (-0.25, -2), (0.177, -2)])
def test_lsq_power_of_two(bits: int, signed: bool, scale: float, exponent: int) -> None:
    qn, qp = (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    x, g = numbers(bits, 0.2 * 2 ** (bits - 1)), numbers(100 + bits)
    quantizer = ready("lsq_power_of_two", bits, signed=signed)
    quantizer.scale.data.fill_(scale)
    values, gradients = run(quantizer, x, g)
    s = 2.0**exponent
    expected, slopes = [], []
    for v, up, value in zip(x, g, values, strict=True):
        r = v / s
        assert value == round(min(max(r, -qn), qp)) * s
        inside = -qn < r < qp
        expected.append(up if inside else 0.0)
        slopes.append(up * (round(r) - r if inside else (-qn if r <= -qn else qp)))
    close(gradients, expected)
    of_logarithm = s * math.log(2) * sum(slopes) * factor(qp)  # TQT, section 3.2, with LSQ's factor
    close(quantizer.scale.grad.item() * scale * math.log(2), of_logarithm)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("offset", [0.0, -0.3, -0.9])
def test_lsq_plus(bits: int, offset: float) -> None:
    qp = 2**bits - 1
    s = 1.7 / qp
    x, g = numbers(bits), numbers(200 + bits)
    quantizer = ready("lsq_plus", bits)
    quantizer.scale.data.fill_(s)
    quantizer.offset.data.fill_(offset)
    values, gradients = run(quantizer, x, g)
    beta = max(-qp, round(offset / s)) * s
    expected, slope_s, slope_b = [], 0.0, 0.0
    for v, up, value in zip(x, g, values, strict=True):
        r = (v - beta) / s
        close(value, round(min(max(v / s, beta / s), beta / s + qp)) * s)
        close(value, min(max((round(v / s) - round(beta / s)), 0), qp) * s + beta)
        inside = 0 < r < qp
        expected.append(up if inside else 0.0)
        slope_s += up * (round(v / s) - v / s if inside else (0.0 if r <= 0 else qp))
        slope_b += 0.0 if inside else up
    close(gradients, expected)
    close(quantizer.scale.grad.item(), slope_s * factor(qp))
    close(quantizer.offset.grad.item(), slope_b / math.sqrt(SIZE * qp))


def test_lsq_plus_weights_start_at_three_deviations() -> None:
    w = torch.randn(3, 200) + 0.1
    quantizer = QUANTIZERS["lsq_plus"](4, signed=True, channels=3)
    quantizer(w)
    for row, step in zip(w, quantizer.scale.tolist(), strict=True):
        mu, sigma = row.mean().item(), row.std(correction=0).item()
        assert step == pytest.approx(max(abs(mu - 3 * sigma), abs(mu + 3 * sigma)) / 8, rel=1e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pact(bits: int) -> None:
    alpha, n = 1.3, 2**bits - 1
    x, g = numbers(bits), numbers(300 + bits)
    quantizer = ready("pact", bits)
    quantizer.alpha.data.fill_(alpha)
    values, gradients = run(quantizer, x, g)
    for v, up, value, gradient in zip(x, g, values, gradients, strict=True):
        y = 0.5 * (abs(v) - abs(v - alpha) + alpha)
        close(value, round(y * n / alpha) * alpha / n)
        close(gradient, up if 0 < v < alpha else 0.0)
    close(quantizer.alpha.grad.item(), sum(up for v, up in zip(x, g, strict=True) if v >= alpha))


SYMMETRIC = [
    (name, bits, signed)
    for name in ("minmax", "mse", "lsq_plus")
    for bits in range(1, 9)
    for signed in (False, True)
    if not (bits == 1 and signed) and (signed or name != "lsq_plus")  # unsigned lsq_plus has an offset
]


@pytest.mark.parametrize(("name", "bits", "signed"), SYMMETRIC)
def test_symmetric_grids_pass_the_gradient_inside_and_cut_it_outside(name: str, bits: int, signed: bool) -> None:
    qn, qp = (2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    quantizer = ready(name, bits, signed=signed)
    quantizer.scale.data.fill_(1.6 / (qn + qp))
    s = quantizer.scale.item()
    x, g = numbers(bits), numbers(50 + bits)
    values, gradients = run(quantizer, x, g)
    regions, slope = set(), 0.0
    for v, up, value, gradient in zip(x, g, values, gradients, strict=True):
        r = v / s
        region = "below" if r <= -qn else "above" if r >= qp else "inside"
        regions.add(region)
        close(value, {"below": -qn, "above": qp, "inside": round(r)}[region] * s)
        close(gradient, up if region == "inside" else 0.0)
        slope += up * {"below": -qn, "above": qp, "inside": round(r) - r}[region]
    assert regions == {"below", "inside", "above"}
    if name == "lsq_plus":
        close(quantizer.scale.grad.item(), slope * factor(qp))


def test_minmax_takes_the_peak_and_mse_beats_it() -> None:
    x = torch.randn(2000)
    errors = {}
    for name in ("minmax", "mse"):
        quantizer = QUANTIZERS[name](3, signed=True)
        errors[name] = (quantizer(x) - x).square().mean().item()
    peak = QUANTIZERS["minmax"](3, signed=True)
    peak.initialize(x)
    assert peak.scale.item() == pytest.approx(x.abs().max().item() / 3)
    assert errors["mse"] < 0.7 * errors["minmax"]


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_activations(bits: int) -> None:
    n = 2**bits - 1
    x, g = numbers(bits), numbers(400 + bits)
    values, gradients = run(ready("dorefa", bits, batched=True), x, g)
    for v, up, value, gradient in zip(x, g, values, gradients, strict=True):
        close(value, round(n * min(max(v, 0), 1)) / n)
        close(gradient, up if 0 < v < 1 else 0.0)


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_weights(bits: int) -> None:
    n = 2**bits - 1
    x, g = numbers(bits, 0.7), numbers(500 + bits)
    values, gradients = run(ready("dorefa", bits), x, g)
    peak, magnitude = max(abs(math.tanh(v)) for v in x), mean(abs(v) for v in x)
    for v, up, value, gradient in zip(x, g, values, gradients, strict=True):
        if bits == 1:
            close(value, magnitude * sign(v))
            close(gradient, up)
        else:
            close(value, 2 * round(n * (math.tanh(v) / (2 * peak) + 0.5)) / n - 1)
            close(gradient, up * (1 - math.tanh(v) ** 2) / peak)


@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_irnet(progress: float) -> None:
    x, g = numbers(7, 0.05), numbers(8)
    quantizer = ready("irnet", 1)
    quantizer.progress = progress
    values, gradients = run(quantizer, x, g)
    mu, sigma = mean(x), stdev(x)
    z = [(v - mu) / sigma for v in x]
    scale = 2.0 ** round(math.log2(mean(abs(v) for v in z)))
    t = 10 ** (-1 + 2 * progress)
    k = max(1 / t, 1)
    close(values, [scale * sign(v) for v in z])
    upstream = [up * scale * k * t * (1 - math.tanh(t * v) ** 2) for up, v in zip(g, z, strict=True)]
    for i, gradient in enumerate(gradients):
        chain = 0.0
        for j, up in enumerate(upstream):
            chain += up * (((i == j) - 1 / SIZE) / sigma - z[j] * z[i] / ((SIZE - 1) * sigma))
        close(gradient, chain)


def test_react_activations() -> None:
    x, g, shift = numbers(9), numbers(10), 0.2
    quantizer = ready("react", 1, torch.randn(50), batched=True)
    assert quantizer.shift.item() == 0.0
    quantizer.shift.data.fill_(shift)
    values, gradients = run(quantizer, x, g)
    total = 0.0
    for v, up, value, gradient in zip(x, g, values, gradients, strict=True):
        m = v + shift
        slope = 2 + 2 * m if -1 <= m < 0 else 2 - 2 * m if 0 <= m < 1 else 0.0
        close(value, sign(m))
        close(gradient, up * slope)
        total += up * slope
    close(quantizer.shift.grad.item(), total)


def test_react_weights() -> None:
    x, g = numbers(11), numbers(12)
    values, gradients = run(ready("react", 1), x, g)
    magnitude = mean(abs(v) for v in x)
    close(values, [magnitude * sign(v) for v in x])
    close(gradients, [up if -1 <= v <= 1 else 0.0 for v, up in zip(x, g, strict=True)])


def test_twn() -> None:
    x, g = numbers(13), numbers(14)
    values, gradients = run(ready("twn", 2), x, g)
    delta = 0.7 * mean(abs(v) for v in x)
    alpha = mean(abs(v) for v in x if abs(v) > delta)
    close(values, [alpha * ((v > delta) - (v < -delta)) for v in x])
    close(gradients, g)


def test_ttq() -> None:
    x, g, w_p, w_n = numbers(15), numbers(16), 0.8, 1.3
    quantizer = ready("ttq", 2, torch.tensor(x))
    delta = 0.05 * max(abs(v) for v in x)
    assert quantizer.positive.item() == pytest.approx(mean(v for v in x if v > delta), rel=1e-5)
    assert quantizer.negative.item() == pytest.approx(mean(-v for v in x if v < -delta), rel=1e-5)
    quantizer.positive.data.fill_(w_p)
    quantizer.negative.data.fill_(w_n)
    values, gradients = run(quantizer, x, g)
    close(values, [w_p if v > delta else -w_n if v < -delta else 0.0 for v in x])
    factors = [w_p if v > delta else w_n if v < -delta else 1.0 for v in x]
    close(gradients, [up * factor for up, factor in zip(g, factors, strict=True)])
    close(quantizer.positive.grad.item(), sum(up for v, up in zip(x, g, strict=True) if v > delta))
    close(quantizer.negative.grad.item(), sum(-up for v, up in zip(x, g, strict=True) if v < -delta))


def sums(*sets: list[float]) -> list[float]:
    """Sums of one power of two, or nothing, of each set, divided by the largest."""
    found = [0.0]
    for exponents in sets:
        found = [value + term for value in found for term in (0.0, *(2.0**e for e in exponents))]
    return sorted(value / max(found) for value in found)


APOT = {  # from the authors' code
    1: [0, 1],
    2: [0, 0.25, 0.5, 1],
    3: [0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1],
    5: sums([-1, -3, -6], [-2, -4, -7], [-5]),
    6: sums([-1, -4, -7], [-2, -5, -8], [-3, -6, -9]),
    7: sums([-1, -4, -8], [-2, -5, -9], [-3, -6, -10], [-7]),  # their rule, which they stop at 6
    8: sums([-1, -5, -9], [-2, -6, -10], [-3, -7, -11], [-4, -8, -12]),
    4: [0, 1 / 48, 1 / 24, 1 / 16, 1 / 12, 1 / 8, 1 / 6, 3 / 16, 1 / 4, 1 / 3, 3 / 8, 1 / 2, 2 / 3, 11 / 16, 3 / 4, 1],
}


@pytest.mark.parametrize("bits", APOT)
def test_apot_activations(bits: int) -> None:
    alpha = 1.1
    x, g = numbers(bits), numbers(600 + bits)
    quantizer = ready("apot", bits, batched=True)
    quantizer.alpha.data.fill_(alpha)
    values, gradients = run(quantizer, x, g)
    total = 0.0
    for v, up, value, gradient in zip(x, g, values, gradients, strict=True):
        r = v / alpha
        q = min(APOT[bits], key=lambda level: abs(level - min(max(r, 0), 1)))
        inside = 0 < r < 1
        close(value, alpha * q)
        close(gradient, up if inside else 0.0)
        total += up * (q - r if inside else float(r >= 1))
    close(quantizer.alpha.grad.item(), total)


@pytest.mark.parametrize("bits", [bits + 1 for bits in APOT if bits < 8])
def test_apot_weights(bits: int) -> None:
    alpha = 1.2
    x, g = numbers(bits, 0.03), numbers(700 + bits)
    quantizer = ready("apot", bits)
    assert quantizer.alpha.item() == 3.0
    quantizer.alpha.data.fill_(alpha)
    values, gradients = run(quantizer, x, g)
    levels = [s * level for level in APOT[bits - 1] for s in (-1, 1)]
    mu, sigma = mean(x), stdev(x)
    total = 0.0
    for v, up, value, gradient in zip(x, g, values, gradients, strict=True):
        r = (v - mu) / sigma / alpha
        q = min(levels, key=lambda level: abs(level - min(max(r, -1), 1)))
        close(value, alpha * q)
        close(gradient, up / sigma if abs(r) < 1 else 0.0)
        total += up * (q - r if abs(r) < 1 else math.copysign(1, r))
    close(quantizer.alpha.grad.item(), total)


@pytest.mark.parametrize("bits", range(1, 9))
def test_apot_has_as_many_levels_as_codes(bits: int) -> None:
    levels = ready("apot", bits, batched=True).levels()
    assert len(levels.unique()) == 2**bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_n2uq_activations(bits: int) -> None:
    n = 2**bits - 1
    height = 2 / n
    quantizer = ready("n2uq", bits, batched=True)
    quantizer.scale.fill_(1.0)
    lengths = [height * (0.6 + 0.8 * ((7 * i) % 5) / 4) for i in range(n)]
    start, scale_in, scale_out = -0.2, 1.3, 0.9
    quantizer.lengths.data[:n] = torch.tensor(lengths, dtype=torch.float64)
    for parameter, value in (
        (quantizer.start, start),
        (quantizer.scale_in, scale_in),
        (quantizer.scale_out, scale_out),
    ):
        parameter.data.fill_(value)
    x, g = numbers(bits), numbers(800 + bits)
    values, gradients = run(quantizer, x, g)
    d_start = d_in = d_out = 0.0
    d_lengths = [0.0] * n
    for v, up, value, gradient in zip(x, g, values, gradients, strict=True):
        u, q, threshold = v * scale_in, 0, start
        for i in range(n):
            threshold += lengths[i] / 2 if i == 0 else (lengths[i - 1] + lengths[i]) / 2
            q += u > threshold
        close(value, scale_out * height * q)
        d_out += up * height * q
        slope, edge = 0.0, start
        for i in range(n):
            if edge < u <= edge + lengths[i]:
                slope = up * scale_out * height / lengths[i]
                for j in range(i):
                    d_lengths[j] -= slope
                d_lengths[i] -= slope * (u - edge) / lengths[i]
            edge += lengths[i]
        d_start -= slope
        d_in += slope * v
        close(gradient, slope * scale_in)
    close(quantizer.start.grad.item(), d_start)
    close(quantizer.scale_in.grad.item(), d_in)
    close(quantizer.scale_out.grad.item(), d_out)
    close(quantizer.lengths.grad[:n].tolist(), d_lengths)


@pytest.mark.parametrize("bits", range(1, 9))
def test_n2uq_weights(bits: int) -> None:
    n = 2**bits - 1
    x, g = numbers(bits, 0.1), numbers(900 + bits)
    values, gradients = run(ready("n2uq", bits), x, g)
    s = n / 2 ** (bits - 1) * mean(abs(v) for v in x)
    for v, up, value, gradient in zip(x, g, values, gradients, strict=True):
        close(value, s * (round((min(max(v / s, -1), 1) + 1) * n / 2) * 2 / n - 1))
        close(gradient, up / s)
