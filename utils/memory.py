"""One budget of memory for all batches outside of training steps: evaluation, encoding, decoding, samples, pictures."""

BUDGET = 500 * 28**2 * 32       # float32 numbers, 50 MB: 500 images of MNIST, or as many of its code maps at K = 512
NUMBERS_PER_PIXEL = 32          # of an image in the largest layers of the network


def items_that_fit(pixels=0, scores=0):
    """How many items to take at once, at least one.

    pixels: H·W of an item that passes the encoder or the decoder; scores: the numbers that an item needs otherwise,
    such as the K logits of each of a map's codes.
    """
    return max(1, BUDGET // max(1, NUMBERS_PER_PIXEL * pixels, scores))
