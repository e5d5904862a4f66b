"""metrics/copies.py: nearest training images against a brute-force search, and planted copies."""

import numpy as np
import pytest
import torch
from helpers import bundled_digits

import data
from metrics import copies


def digits(first, last):
    """Bundled digits (N, 1, 28, 28)."""
    return torch.from_numpy(bundled_digits()[0][first:last]).unsqueeze(1)


def batches(images, size=150):
    return [(batch, None) for batch in images.split(size)]


def brute_force(queries, training):
    """The distances (N, M) in NumPy: images halved by means of four pixels, training images moved by up to a pixel."""
    def halved(image):
        return image.reshape(14, 2, 14, 2).mean(axis=(1, 3)) / 255

    distances = np.full((len(queries), len(training)), np.inf)
    for column, image in enumerate(training):
        padded = np.pad(image, 1)
        for moved in (halved(padded[y:y + 28, x:x + 28]) for y in range(3) for x in range(3)):
            distances[:, column] = np.minimum(distances[:, column], [
                np.linalg.norm(halved(query) - moved) for query in queries])
    return distances


@pytest.mark.parametrize("items", [10**6, 7])
def test_nearest_images_match_a_brute_force_search(items, monkeypatch):
    monkeypatch.setattr(copies, "items_that_fit", lambda numbers: items)       # all at once, and in small blocks
    queries, training = digits(9000, 9012), digits(0, 100)
    queries[0] = training[70]                                                  # one of them is a training image
    expected = brute_force(*(images.squeeze(1).double().numpy() for images in (queries, training)))
    nearest = copies.nearest_images(queries, batches(training, 33))
    assert np.allclose(nearest.distances, np.sort(expected, axis=1)[:, :10], atol=5e-3)
    assert np.allclose(np.take_along_axis(expected, nearest.rows.numpy(), axis=1), nearest.distances, atol=5e-3)
    assert nearest.rows[0, 0] == 70 and copies.ratios(nearest)[0] < 5e-3
    expected.sort(axis=1)
    assert np.allclose(copies.ratios(nearest)[1:], expected[1:, 0] / expected[1:, 9], atol=1e-3)


def test_planted_copies_are_flagged_and_new_images_are_not():
    """Of 500 images 5 are training images moved by a pixel, with noise; 5 have a grey level more or less in each pixel;
    and 5 are, moved and with noise, of an image that occurs five times in the training set.
    """
    generator = torch.Generator().manual_seed(0)
    training, new, reference = digits(0, 3000), digits(9000, 9485), digits(9485, 10000)
    training[100:104] = training[99]
    planted = torch.tensor([7, 300, 1024, 2001, 2999] * 2 + [99, 100, 101, 102, 103])
    fakes = copies.noisy_shifted(training[planted], generator)
    noise = torch.randint(2, fakes[5:10].shape, generator=generator) * 2 - 1
    fakes[5:10] = (training[planted[5:10]].int() + noise).clamp(0, 255).byte()
    assert (fakes != training[planted]).flatten(1).any(dim=1).all()
    found = copies.nearest_images(torch.cat([fakes, new, reference]), batches(training))
    ratios = copies.ratios(found)
    threshold = ratios[500:].quantile(copies.QUANTILE)
    assert (ratios[:15] < threshold).all() and ratios[:15].max() < 0.5 * threshold
    assert (ratios[15:500] < threshold).double().mean() < 0.03
    assert torch.equal(training[found.rows[:15, 0]], training[planted])


def test_copies_are_planted_alike_in_parts(monkeypatch):
    images = digits(0, 50)
    whole = copies.noisy_shifted(images, torch.Generator().manual_seed(3))
    draw, drawn = torch.randn, []
    with monkeypatch.context() as patch:
        patch.setattr(copies, "items_that_fit", lambda numbers: 7)
        patch.setattr(torch, "randn", lambda shape, **options: drawn.append(shape[0]) or draw(shape, **options))
        assert torch.equal(copies.noisy_shifted(images, torch.Generator().manual_seed(3)), whole)
    assert drawn == [7] * 7 + [1]
    generator = torch.Generator().manual_seed(3)
    directions = torch.randint(1, len(copies.SHIFTS), (50,), generator=generator)
    noise = torch.randn(images.shape, generator=generator) * copies.NOISE
    for image, direction, one, planted in zip(images, directions, noise, whole):
        moved = np.pad(image[0].numpy(), 1)
        y, x = copies.SHIFTS[direction]
        moved = moved[1 - y:29 - y, 1 - x:29 - x]
        assert np.array_equal(planted[0].numpy(), np.clip(np.round(moved + one[0].numpy()), 0, 255))


def test_closest_pairs_show_each_image_above_its_original():
    training = digits(0, 500)
    images = torch.cat([digits(9000, 9030), training[[400]]])
    nearest = copies.nearest_images(images, batches(training))
    pairs = copies.closest_pairs(images, nearest, data.Images(training, torch.zeros(500, dtype=torch.int64)), 4)
    assert pairs.shape == (8, 1, 28, 28)
    assert torch.equal(pairs[0], training[400]) and torch.equal(pairs[4], training[400])
    order = copies.ratios(nearest).argsort()[:4]
    assert torch.equal(pairs[:4], images[order]) and torch.equal(pairs[4:], training[nearest.rows[order, 0]])


def test_copies_differ_from_their_originals_by_one_pixel_and_noise():
    images = digits(0, 20)
    made = copies.noisy_shifted(images, torch.Generator().manual_seed(0)).int()
    directions = set()
    for original, copy in zip(images.int(), made):
        errors = {(dy, dx): (torch.roll(original, (dy, dx), dims=(1, 2)) - copy).double().square().mean().sqrt().item()
                  for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
        best = min(errors, key=errors.get)
        assert best != (0, 0) and errors[best] < 6 and min(set(errors.values()) - {errors[best]}) > 15
        directions.add(best)
    assert len(directions) > 4


def test_images_of_any_shape_are_reduced_to_few_numbers():
    for C, H, W, side in ((1, 28, 28, 2), (3, 32, 32, 4), (3, 64, 128, 10), (1, 8, 8, 1)):
        images = torch.randint(256, (2, C, H, W), dtype=torch.uint8)
        rows = copies.reduced(images)
        assert rows.shape == (2, C * (H // side) * (W // side)) and rows.shape[1] <= copies.MAX_NUMBERS
        assert rows[1, -1] == pytest.approx(images[1, -1, (H // side - 1) * side:][:side, (W // side - 1) * side:][
            :, :side].double().mean().item() / 255)


def test_less_than_ten_training_images_are_enough():
    nearest = copies.nearest_images(digits(9000, 9003), batches(digits(0, 4)))
    assert nearest.distances.isfinite().all() and nearest.rows.max() == 3
    assert torch.equal(nearest.distances[:, 3], nearest.distances[:, 9])
    same = copies.nearest_images(digits(0, 1), batches(digits(0, 1).repeat(12, 1, 1, 1)))
    assert copies.ratios(same).isfinite().all()


def test_images_are_taken_evenly_from_the_classes():
    labels = torch.tensor([2, 0, 0, 0, 0, 2, 0, 7])
    assert copies.evenly(labels, 5).tolist() == [0, 1, 2, 5, 7]
    assert copies.evenly(labels, 100).tolist() == list(range(8))
    assert copies.evenly(labels, 3).tolist() == [0, 1, 7]
