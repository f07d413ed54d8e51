"""Dormand-Prince's Runge-Kutta method of order 5 with an error estimate of order 4 (dopri5), each image with steps of its own.

A solver that controls the error of a whole batch makes an image depend on its neighbours. Here each row has its own time and step size,
rows that arrive leave the batch, and so the same image comes out whatever the batch (up to rounding).

Tableau and step control as in Hairer, Norsett, Wanner, "Solving Ordinary Differential Equations I", sections II.4 and II.5. A tolerance
means what it means to torchdiffeq, with which SiT and LightningDiT were measured; but that solver steps past the end and interpolates.
Shapes: B images, R rows that are still on the way.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from genvision.errors import UserError
from genvision.objectives.paths import over

NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""The last row is the solution of order 5, at which the last stage is evaluated: it is the first one of the next step."""
ERROR = (71 / 86400, 0.0, -142 / 50085, 71 / 2880, -17253 / 508800, 44 / 1575, -1 / 60)
"""Difference to the embedded solution of order 4 in Shampine's variant (1986), two thirds of the original one: what SiT's solver takes."""
SAFETY, SHRINK = 0.9, 0.2
GROW = 5.0
"""A small first step has an error below the rounding of a float32 network; larger growth would follow that rounding, and so the batch."""
SMALLEST_STEP = 1e-9

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x [R, ...], t float64 [R] on the CPU, which images the rows are int64 [R] on the CPU) -> dx / dt [R, ...]."""


def dopri5(velocity: Velocity, x: Tensor, begin: float, end: float, *, rtol: float, atol: float) -> Tensor:
    """x at time `end`, [B, ...].

    Args:
        velocity: called 2 times at the beginning of a row, and 6 times for each of its steps, rejected ones too.
        x: at time `begin`, [B, ...], float64 to reach small tolerances.
        rtol, atol: an error of root mean square atol + rtol |x| over an image is allowed in each step.

    Raises:
        UserError: an image needs impossibly small steps, as where the velocity is not finite.
    """
    result = x.clone()
    images = torch.arange(len(x))
    t = torch.full((len(x),), begin, dtype=torch.float64)
    first = velocity(x, t, images)
    step = _first_step(velocity, x, t, first, images, end, rtol, atol)
    low, high = min(begin, end), max(begin, end)
    while len(images):
        step = step.abs().minimum((end - t).abs()).copysign(end - t)
        stages = [first]
        for node, weights in zip(NODES, STAGES, strict=True):
            ahead = x + over(step.to(x.device, x.dtype), x) * sum(w * k for w, k in zip(weights, stages, strict=True) if w)
            stages.append(velocity(ahead, (t + node * step).clamp(low, high), images))
        error = over(step.to(x.device, x.dtype), x) * sum(w * k for w, k in zip(ERROR, stages, strict=True) if w)
        ratio = _norm(error / (atol + rtol * torch.maximum(x.abs(), ahead.abs())))
        accepted = ratio <= 1  # not where it is no number
        arrived = accepted & ((end - t - step).abs() < 1e-12)
        on_device = over(accepted.to(x.device), x).bool()
        x, first = torch.where(on_device, ahead, x), torch.where(on_device, stages[-1], first)
        t = torch.where(accepted, t + step, t)
        step = step * _factor(ratio, accepted)
        if bool((step.abs() < SMALLEST_STEP).logical_and(~arrived).any()):
            raise UserError(
                f"dopri5 gets nowhere at t = {t[step.abs().argmin()]:.4g}: the error stays above rtol {rtol:g}, atol {atol:g}; "
                "raise them, or take method heun, and check that the model's output is finite"
            )
        result[images[arrived].to(x.device)] = x[arrived.to(x.device)]
        left = (~arrived).nonzero().squeeze(1)
        if len(left) < len(images):
            x, first = x[left.to(x.device)], first[left.to(x.device)]
            images, t, step = images[left], t[left], step[left]
    return result


def _first_step(velocity: Velocity, x: Tensor, t: Tensor, first: Tensor, images: Tensor, end: float, rtol: float, atol: float) -> Tensor:
    """Size of the first step, float64 [B] (Hairer et al., section II.4, "Starting step size")."""
    scale = atol + rtol * x.abs()
    d0, d1 = _norm(x / scale), _norm(first / scale)
    guess = torch.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1).minimum((end - t).abs())
    signed = guess.copysign(end - t)
    second = velocity(x + over(signed.to(x.device, x.dtype), x) * first, t + signed, images)
    d2 = _norm((second - first) / scale) / guess
    largest = torch.maximum(d1, d2)
    better = torch.where(largest <= 1e-15, (guess * 1e-3).clamp(min=1e-6), (0.01 / largest) ** (1 / 5))
    return torch.minimum(100 * guess, better)


def _factor(ratio: Tensor, accepted: Tensor) -> Tensor:
    """By which a step size changes."""
    best = SAFETY * ratio.clamp(min=1e-12) ** (-1 / 5)
    return best.nan_to_num(SHRINK).clamp(max=GROW).maximum(torch.where(accepted, 1.0, SHRINK).to(best.dtype))


def _norm(x: Tensor) -> Tensor:
    """Root mean square of each row, float64 [R] on the CPU."""
    return x.flatten(1).double().square().mean(1).sqrt().cpu()
