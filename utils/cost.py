"""What a training will cost in time, measured before it starts."""

import copy

from utils import distributed, speed

MEASURE_SECONDS = 1


def estimate_epoch_seconds(trainer, compute_loss, batch):
    """About how long the steps of an epoch take: compute_loss(model, *batch) → a loss, with some rows of a batch."""
    model = copy.deepcopy(trainer.model)            # so that the trainer's does not change
    [seconds] = speed.measure_step_seconds(lambda: compute_loss(model, *batch), trainer.args.device,
                                           [trainer.bfloat16], MEASURE_SECONDS)
    return seconds / len(batch[0]) * trainer.num_images / distributed.world_size()


def duration(seconds):
    """Such as "50 seconds", "7 minutes" or "2.5 hours"."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.1f} hours"
    if seconds >= 2 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds:.0f} seconds"
