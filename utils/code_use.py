"""Pictures of a codebook for TensorBoard: how often its codes are used, and what each of them stands for.

Letters: B images, C channels, H×W pixels, K codes, n of them shown, f pixels that a code covers in each direction.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from data import to_model_range, to_uint8
from utils.memory import images_that_fit

CHART = 640, 360                # pixels, of the chart of shares, which TensorBoard shows at half of its size
MARGINS = 108, 42, 14, 50       # left, top, right, bottom
FONT_SIZE = 22
BLUE, RED, GREY = "#33638d", "#d1242f", "#808080"
# From rarely to often used, as equally spaced colours; and of a code that is not used.
SCALE = torch.tensor([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]])
UNUSED = torch.tensor([209, 36, 47])
MIN_SIDE, FRAME = 24, 2         # pixels, of a code's picture


def draw(counts):
    """A chart of K codes by how often each was chosen, counts (K,), the most used first: uint8 (3, height, width).

    Drawn with Pillow, since the scripts do without matplotlib. The shares are on a logarithmic axis; codes that were
    not used are marked red below it.
    """
    width, height = CHART
    left, top, right, bottom = MARGINS[0], MARGINS[1], width - MARGINS[2], height - MARGINS[3]
    picture = Image.new("RGB", CHART, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    shares = counts.double().sort(descending=True).values / max(1, int(counts.sum()))
    K, used = len(shares), int((shares > 0).sum())
    shares = shares.numpy()
    lowest, highest = (shares[used - 1], shares[0]) if used else (1 / K, 1 / K)
    first, last = np.floor(np.log10(min(lowest, 1 / (2 * K)))), min(0, np.ceil(np.log10(max(highest, 2 / K))))
    decades = range(int(first), int(last) + 1)

    def y(share):
        return bottom - (np.log10(share) - first) / (last - first) * (bottom - top)

    for decade in decades:
        pen.line([(left, y(10.0**decade)), (right, y(10.0**decade))], fill="#e0e0e0")
        pen.text((left - 6, y(10.0**decade)), f"{100 * 10.0**decade:g} %", fill="black", anchor="rm", font=font)
    for x in range(left, right):                # a code may be wider or narrower than a pixel
        rank = (x - left) * K // (right - left)
        if rank < used:
            pen.line([(x, y(shares[rank])), (x, bottom)], fill=BLUE)
        else:
            pen.line([(x, bottom - 8), (x, bottom)], fill=RED)
    for x in range(left, right, 16):
        pen.line([(x, y(1 / K)), (x + 8, y(1 / K))], fill=GREY, width=3)
    pen.text((right, y(1 / K) - 5), f"even use: {100 / K:.3g} %", fill=GREY, anchor="rb", font=font)
    unused = f", {K - used:,} not (red)" if used < K else ""
    pen.text((left, top - 14), f"{used:,} of {K:,} codes used{unused}", fill="black", anchor="lb", font=font)
    pen.text(((left + right) / 2, height - 6), "codes by their share of the test set, the largest first",
             fill="black", anchor="mb", font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@torch.no_grad()
def pictures_of_codes(model, codes, images):
    """What each of n codes (n,) stands for, in its usual surroundings: uint8 (n, C, 3f, 3f).

    The mean of the reconstructions around all places where uint8 images (B, C, H, W) have the code, f pixels more than
    its own on each side. A code that is nowhere in them is decoded between others of its own. Leaves the model in
    evaluation mode.
    """
    model.eval()
    f, n, device = model.downsample, len(codes), next(model.parameters()).device
    rows = torch.full((model.quantizer.num_codes,), n)          # of each code; the last row takes those not shown
    rows[codes] = torch.arange(n)
    sums, sizes = torch.zeros(n + 1, images.shape[1] * 9 * f**2), torch.zeros(n + 1)
    # The windows hold nine times the pixels.
    batch_size = images_that_fit(3 * images.shape[2], 3 * images.shape[3], model.quantizer.dim)
    for batch in images.split(batch_size):
        output = model(to_model_range(batch, device))
        padded = F.pad(output.reconstruction.float().cpu(), (f, f, f, f), value=-1)
        windows = F.unfold(padded, 3 * f, stride=f).transpose(1, 2).flatten(0, 1)             # (B·h·w, C·9f²)
        places = rows[output.indices.flatten().cpu()]                                         # (B·h·w,)
        sums.index_add_(0, places, windows)
        sizes.index_add_(0, places, torch.ones(len(places)))
    pictures = (sums / sizes.clamp(min=1).unsqueeze(1))[:n].view(n, -1, 3 * f, 3 * f)
    absent = torch.nonzero(sizes[:n] == 0).flatten()
    for batch in absent.split(images_that_fit(3 * f, 3 * f, model.quantizer.dim)):
        pictures[batch] = model.decode(codes[batch].view(-1, 1, 1).expand(-1, 3, 3)).cpu().float()
    return to_uint8(pictures)


def framed(pictures, counts):
    """uint8 pictures (n, C, s, s), enlarged to MIN_SIDE pixels and more, in frames of a colour for counts (n,).

    → uint8 (n, 3, S, S). The colour goes by rank among the counts above 0: SCALE from the lowest to the highest. Codes
    that are not used are UNUSED.
    """
    scale = -(-MIN_SIDE // pictures.shape[-1])
    large = pictures.expand(-1, 3, -1, -1).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    different, places = counts.clamp(min=1).unique(return_inverse=True)
    ranks = places.double() / max(1, len(different) - 1) * (len(SCALE) - 1)           # (n,), in [0, 4]
    lower = ranks.long().clamp(max=len(SCALE) - 2)
    colours = torch.lerp(SCALE[lower].double(), SCALE[lower + 1].double(), (ranks - lower).unsqueeze(1))
    colours[counts == 0] = UNUSED.double()
    S = large.shape[-1] + 2 * FRAME
    result = colours.round().byte().view(-1, 3, 1, 1).repeat(1, 1, S, S)
    result[:, :, FRAME:-FRAME, FRAME:-FRAME] = large
    return result
