"""Code maps as pictures, for the page of demo.py and docs/figures.py: patches, tiles, palette, drawings, completions.

Letters: B images, C channels, H×W pixels, h×w codes of one map, p×p pixels of the patch of a code, K codes.
"""

import base64
import html
import math

import numpy as np
import torch
from PIL import Image, ImageDraw

from data import image_file
from utils.memory import images_that_fit

PATCH_SIDE = 9              # codes: farther away, none changes the middle patch of the decoder
BLOCK_CODES = 2**16         # of the codebook, compared at once
MNIST_SIDE, MNIST_BOX = 28, 20          # pixels of a digit of MNIST, and of the box that it is scaled to
PEN = 2.6                   # pixels of these 28: drawn digits are then about as bold as MNIST's
FINE = 10                   # a drawing has so many times the resolution until it is done
MAX_POINTS = 20_000         # of a drawing


# ---------------------------------------------------------------- codes

@torch.no_grad()
def code_patches(model, indices, height, width):
    """The patch that each code decodes to on its own: (..., C, p, p) in [-1, 1] from indices (...).

    It is the middle patch of the image that a map (height, width) of this code alone decodes to; of a larger map
    than PATCH_SIDE × PATCH_SIDE, those codes in the middle are enough.
    """
    height, width, device = min(height, PATCH_SIDE), min(width, PATCH_SIDE), next(model.parameters()).device
    codes, inverse = indices.unique(return_inverse=True)
    p, top, left = model.downsample, height // 2 * model.downsample, width // 2 * model.downsample
    batch_size = images_that_fit(*model.image_size(height, width), model.quantizer.dim)
    patches = torch.cat([model.decode(batch.view(-1, 1, 1).expand(-1, height, width))[..., top:top + p, left:left + p]
                         for batch in codes.to(device).split(batch_size)])                # (codes, C, p, p)
    return patches[inverse.to(device)]


@torch.no_grad()
def similar_codes(model, code, count):
    """Up to count codes by their Euclidean distance to one, nearest first, itself at the start: int64 (count,).

    Of equal distances the lower index comes first. Uses lookup() alone, which every quantizer has.
    """
    quantizer, device = model.quantizer, next(model.parameters()).device
    own = quantizer.lookup(torch.tensor([[[code]]], device=device)).view(1, -1)           # (1, D)
    distances = torch.cat([torch.cdist(own, quantizer.lookup(codes.view(1, 1, -1))[0, :, 0].T)[0].cpu()
                           for codes in torch.arange(quantizer.num_codes, device=device).split(BLOCK_CODES)])     # (K,)
    distances[code] = -1            # another may be equal to it
    return distances.sort(stable=True).indices[:count]


@torch.no_grad()
def favourites(prior, codes, place, label=None, count=5):
    """The prior's most probable codes for a place of a map (h, w), given the codes before it and perhaps a class.

    → codes and probabilities, as two lists, the most probable first.
    """
    labels = None if label is None else torch.tensor([label])
    probabilities = prior.logits_at(codes.unsqueeze(0), place, labels)[0].softmax(dim=0)          # (K,)
    best = probabilities.topk(min(count, len(probabilities)))
    return best.indices.tolist(), best.values.tolist()


# ---------------------------------------------------------------- drawings

def draw_strokes(strokes, height, width):
    """A drawing as uint8 (1, H, W), light on dark, centred and scaled as MNIST's digits are.

    strokes: lists of points [x, y], y downwards, in any unit. The drawing is scaled to a box of 20×20 of 28×28 pixels,
    the pen is always equally wide, and the centre of mass is moved to the middle. Raises ValueError if a stroke is no
    list of points.
    """
    lines = check_strokes(strokes)
    points = np.concatenate(lines)                                                        # (points, 2)
    scale, middle = FINE * min(height, width) / MNIST_SIDE, np.array([width, height]) * FINE / 2
    extent = np.ptp(points, axis=0).max()
    unit = (MNIST_BOX - PEN) * scale / extent if extent else 1
    corner = (points.min(axis=0) + points.max(axis=0)) / 2
    lines = [(line - corner) * unit + middle for line in lines]
    pixels = _pen(lines, PEN * scale, height * FINE, width * FINE)
    mass = pixels.sum(dtype=np.float64)
    centre = np.array([(pixels.sum(axis=axis, dtype=np.float64) * (np.arange(pixels.shape[1 - axis]) + 0.5)).sum()
                       for axis in (0, 1)]) / mass                                        # x, y
    pixels = _pen([line + middle - centre for line in lines], PEN * scale, height * FINE, width * FINE)
    shrunk = Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)
    return torch.from_numpy(np.array(shrunk)).unsqueeze(0)


def check_strokes(strokes):
    """The strokes as float64 arrays (points, 2). Raises ValueError if they are not lists of points."""
    try:
        lines = [np.asarray(stroke, dtype=np.float64).reshape(-1, 2) for stroke in strokes if len(stroke)]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("the drawing is not a list of strokes") from error
    if not lines:
        raise ValueError("draw something first")
    if sum(map(len, lines)) > MAX_POINTS or not all(np.abs(line).max() < 1e6 for line in lines):
        raise ValueError(f"the drawing has more than {MAX_POINTS:,} points, or some that are far away")
    return lines


def _pen(lines, pen, height, width):
    """Lines (points, 2) of a round pen, white on black: uint8 (height, width)."""
    image = Image.new("L", (width, height))
    drawing, radius = ImageDraw.Draw(image), pen / 2
    for line in lines:
        drawing.line([tuple(point) for point in line], fill=255, width=round(pen))
        for x, y in line:           # joints and ends are round
            drawing.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return np.array(image)


# ---------------------------------------------------------------- HTML

def png(image):
    """uint8 (C, H, W) as the URI of a PNG image, which needs no file."""
    return "data:image/png;base64," + base64.b64encode(image_file.as_png(image.cpu())).decode()


def figure(image, caption, style=""):
    """A picture, uint8 (C, H, W), enlarged without smoothing, with a line of HTML below it."""
    text = html.escape(caption.partition("<")[0], quote=True)
    return (f'<figure class="picture {style}"><div><img src="{png(image)}" alt="{text}"></div>'
            f"<figcaption>{caption}</figcaption></figure>")


def tiles(codes, patches, columns, style, titles, notes=None, marked=(), attribute=None):
    """Codes as tiles in rows, each with its patch, enlarged, and its number on it; buttons if they can be chosen.

    codes: list of n; None is a place without a code. patches: uint8 (n, C, p, p). titles: what a tile's tooltip says.
    notes: a second line on each. marked: positions that are outlined. attribute: what a button
    says of itself, "place" for its position or "code" for its code; None makes no buttons.
    """
    n, rows = len(codes), math.ceil(len(codes) / columns)
    cells = torch.cat([patches, patches[:1].expand(rows * columns - n, -1, -1, -1)])      # a full last row
    sheet = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    tag, parts = "button" if attribute else "span", []
    for i, code in enumerate(codes):
        x, y = 100 * (i % columns) / max(1, columns - 1), 100 * (i // columns) / max(1, rows - 1)
        classes = " ".join(["tile"] + ["empty"] * (code is None) + ["marked"] * (i in marked))
        data = f' type="button" data-{attribute}="{i if attribute == "place" else code}"' if attribute else ""
        number = "" if code is None else f"<b>{code}</b>"
        note = f"<small>{notes[i]}</small>" if notes else ""
        title = html.escape(titles[i], quote=True)
        parts.append(f'<{tag} class="{classes}"{data} title="{title}" aria-label="{title}" '
                     f'style="background-position:{x:.4g}% {y:.4g}%">{number}{note}</{tag}>')
    return (f'<div class="tiles {style}" style="--columns:{columns};--rows:{rows};--patches:url({png(sheet)})">'
            + "".join(parts) + "</div>")
