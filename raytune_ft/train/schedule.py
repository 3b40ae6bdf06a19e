"""The learning rate as a pure function of the step."""

import math

from raytune_ft.spec import ScheduleSpec


def learning_rate(step: int, total_steps: int, spec: ScheduleSpec, peak: float) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total_steps`.

    Rises linearly over the first ⌈warmup · total⌉ steps, the first of which is not wasted at zero, then
    follows `decay`: cosine (Loshchilov and Hutter 2017, no restarts) or linear towards zero, or constant.
    Where the total was estimated the data may last longer: then the last rate stays.

    >>> [learning_rate(s, 4, ScheduleSpec(warmup=0.5, decay="linear"), 1.0) for s in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    step = min(step, total_steps - 1)
    warmup_steps = math.ceil(spec.warmup * total_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    match spec.decay:
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))
        case "linear":
            return peak * (1 - progress)
        case "constant":
            return peak
