"""What a training will cost in time, measured before it starts."""

import copy

from utils import speed
from utils.interruptions import explain_errors

MEASURE_SECONDS = 1


def seconds_per_item(trainer, compute_loss, batch):
    """About how long a training step takes for each row of a batch: compute_loss(model, *batch) → a loss."""
    model = copy.deepcopy(trainer.model)            # so that the trainer's does not change
    with explain_errors(trainer.out_of_memory):
        [seconds] = speed.measure_step_seconds(lambda: compute_loss(model, *batch), trainer.args.device,
                                               [trainer.bfloat16], seconds=MEASURE_SECONDS, min_rounds=1)
    return seconds / len(batch[0])


def duration(seconds):
    """Such as "50 seconds", "7 minutes" or "2.5 hours"."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} hours"
    if seconds >= 2 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{max(2, seconds):.0f} seconds"
