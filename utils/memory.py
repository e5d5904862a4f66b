"""One budget of memory for all batches outside of training steps: evaluation, encoding, decoding, samples, pictures."""

import torch

from utils import startup

BUDGET = 39_680_000         # float32 numbers, 159 MB: what 500 maps take that are sampled from the shipped prior


def items_that_fit(numbers):
    """How many items to take at once, at least one, if each needs so many float32 numbers."""
    return max(1, BUDGET // numbers)


def images_that_fit(height, width, hidden_size):
    """How many images of so many pixels pass a network of this hidden size at once, without gradients."""
    return items_that_fit(height * width * (hidden_size + 10))       # measured at 512×512: 50 a pixel for D = 40


def maps_that_fit(prior):
    """How many code maps a CodePrior takes at once, without gradients: attention and perceptron hold 19·E a code."""
    return items_that_fit(19 * prior.positions.numel())


def samples_that_fit(prior, guided=False):
    """How many code maps are sampled at once: their keys and values in all blocks, and the scores of the next code.

    With guidance each map takes as much twice, with its class and without.
    """
    numbers = 2 * len(prior.blocks) * prior.positions.numel() + 8 * prior.num_codes
    return items_that_fit(2 * numbers if guided else numbers)


def is_out_of_memory(error):
    """Whether an exception says that memory has run out. torch raises a RuntimeError for that on a CPU."""
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in startup.OUT_OF_MEMORY_MESSAGES)
