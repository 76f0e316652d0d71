"""Where the numbers of ``pyrovae.rewrites`` and ``native/*.cpp`` come from: minimax in the relative error.

tanh x = x P(x^2) / Q(x^2) on [0, 8], both polynomials of fourth degree, and 2^x on [-1/2, 1/2], of fifth: fitted in float64 at
Chebyshev points by least squares whose weights are raised where the error is large (Lawson's algorithm). Prints the
coefficients, and the error of the formulas as float32 computes them.

    python experiments/minimax.py
"""

from __future__ import annotations

import numpy as np

REACH, DEGREE, POWER_DEGREE, POINTS, ROUNDS = 8.0, 4, 5, 4000, 200


def main() -> None:
    above, below, error = fitted()
    print(f"TANH_ABOVE = {tuple(above.tolist())}\nTANH_BELOW = {tuple(below.tolist())}\nrelative error {error:.1e}")
    x = np.concatenate([np.linspace(-12, 12, 2_000_001), np.logspace(-8, 0, 100_001)])
    x = x[x != 0]
    exact, found = np.tanh(x), in_float32(x, above, below)
    print(f"in float32 {np.abs(found - exact).max():.1e}, relative {np.abs(found / exact - 1).max():.1e}")

    power, error = fitted_power()
    print(f"\npower of two {tuple(power.tolist())}\nrelative error {error:.1e}")
    x = np.linspace(-87, 0, 2_000_001)
    print(f"log(1 + e^x) in float32 {np.abs(np.log1p(exp_in_float32(x, power)) - np.log1p(np.exp(x))).max():.1e}")


def fitted() -> tuple[np.ndarray, np.ndarray, float]:
    nodes = (np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS) + 1) / 2 * REACH
    goal, square = np.tanh(nodes) / nodes, (nodes / REACH) ** 2
    powers = np.vander(square, DEGREE + 1, increasing=True)
    weight, q = np.ones(POINTS), np.ones(POINTS)
    best = (np.inf, np.zeros(0), np.zeros(0))
    for _ in range(ROUNDS):
        # P - goal Q = 0 with Q(0) = 1, divided by the last round's Q to make it the relative error of P / Q.
        scale = np.sqrt(weight) / (goal * q)
        system = np.hstack([powers, -goal[:, None] * powers[:, 1:]]) * scale[:, None]
        solution = np.linalg.lstsq(system, goal * scale, rcond=None)[0]
        above, below = solution[: DEGREE + 1], np.concatenate([[1.0], solution[DEGREE + 1 :]])
        q = powers @ below
        error = np.abs(powers @ above / q / goal - 1)
        if error.max() < best[0]:
            best = (error.max(), above, below)
        weight *= error / error.max() + 1e-3
        weight /= weight.mean()
    units = REACH ** (2 * np.arange(DEGREE + 1))
    return best[1] / units, best[2] / units, float(best[0])


def fitted_power() -> tuple[np.ndarray, float]:
    nodes = np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS) / 2
    powers = np.vander(nodes, POWER_DEGREE + 1, increasing=True) / np.exp2(nodes)[:, None]
    weight, best = np.ones(POINTS), (np.inf, np.zeros(0))
    for _ in range(ROUNDS):
        scale = np.sqrt(weight)
        solution = np.linalg.lstsq(powers * scale[:, None], scale, rcond=None)[0]
        error = np.abs(powers @ solution - 1)
        if error.max() < best[0]:
            best = (error.max(), solution)
        weight *= error / error.max() + 1e-3
        weight /= weight.mean()
    return best[1], float(best[0])


def exp_in_float32(x: np.ndarray, power: np.ndarray) -> np.ndarray:
    exponent = x.astype(np.float32) * np.float32(1.4426950408889634)
    whole = np.round(exponent)
    value = np.float32(power[-1])
    for coefficient in power[-2::-1]:
        value = value * (exponent - whole) + np.float32(coefficient)
    return np.ldexp(value.astype(np.float64), whole.astype(int))


def in_float32(x: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    x = np.clip(x.astype(np.float32), np.float32(-REACH), np.float32(REACH))
    square = x * x

    def polynomial(coefficients: np.ndarray) -> np.ndarray:
        value = np.float32(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            value = square * value + np.float32(coefficient)
        return value

    return x * polynomial(above) / polynomial(below)


if __name__ == "__main__":
    main()
