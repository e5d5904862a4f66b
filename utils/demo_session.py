"""What the page of demo.py does with a model: what it shows, and what it answers to a visitor. Has no Gradio in it.

Letters: C channels, H×W pixels, h×w codes of one map, p×p pixels of the patch of a code, K codes.
"""

import html
import math
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

import data
from data import code_maps, image_file
from metrics import code_counts
from utils import code_pictures, files
from utils.code_pictures import figure, tiles

ALL_CODES, NEAREST_CODES = 1024, 200        # a palette has the whole codebook up to so many codes, else the nearest
LARGEST_MAP, SMALL_TILES = 32, 16           # codes on a side: those of a larger map cannot be distinguished on the page
MAX_PIXELS = 64_000_000         # of a file: it takes 4 bytes for each to read one
MAX_HISTORY = 1000              # changes that can be undone
COMPLETIONS = 10
FRAMES, FRAME_SECONDS = 50, 0.04            # of a sample that fills up
ANY = -1                        # in the place of a class: none
HIDDEN = 64                     # grey level of pixels that are not decoded yet, or not kept
CHOOSE_PLACE = "<p class='message'>Choose a place of the map to see its palette.</p>"


class Session(NamedTuple):
    """What one visitor has before them. All that changes is in here; a Demo is shared by all visitors."""

    picture: torch.Tensor           # uint8 (C, H, W)
    codes: torch.Tensor             # (h, w) int64, as encoded
    changed: torch.Tensor           # the same with the visitor's changes
    history: tuple = ()             # (place, its former code), the latest change last
    place: int | None = None        # of the map, in raster order


class Demo:
    """A model, and a prior or None with its classes' names: what the page shows of them.

    Methods that answer a visitor raise ValueError, with a sentence, for what cannot be used. Raises ValueError if the
    model's maps are too large for the page.
    """

    def __init__(self, model, contents, prior=None, classes=()):
        self.model, self.prior, self.classes = model, prior, list(classes)
        self.train_command = files.command("train_prior.py", "--model", contents["path"])
        self.shape = tuple(contents["dataset"]["shape"])
        self.map_size, self.num_codes = model.map_size(*self.shape[1:]), model.quantizer.num_codes
        if max(self.map_size) > LARGEST_MAP:
            raise ValueError(f"its maps of {self.map_size[0]}×{self.map_size[1]} codes are too large for the page, "
                             f"which shows up to {LARGEST_MAP}×{LARGEST_MAP}: train one with a larger --downsample or "
                             "a smaller --image-size")
        self.device = next(model.parameters()).device
        trained_on, self.digits, self.digits_note = contents["dataset"]["name"], None, ""
        if self.shape == (1, 28, 28) and trained_on in data.MNIST_RELATIVES:
            self.digits = data.load("MNIST-10k", "")[1].images
            self.digits_note = data.seen_in_training(trained_on, "MNIST-10k")[1].replace("these", "the bundled")
        self.can_draw = self.shape[0] == 1
        self.counts = self.all_patches = None
        if self.digits is not None:
            with torch.no_grad():
                maps = [model.encode(data.to_model_range(batch, self.device)) for batch in self.digits.split(100)]
            self.counts = code_counts(torch.cat(maps), self.num_codes).tolist()
        if self.num_codes <= ALL_CODES:
            self.all_patches = self._patches(range(self.num_codes))

    # ---------------------------------------------------------------- pictures to start from

    def start(self):
        """The Session that a visitor begins with: a bundled digit, else a gradient of grey or colours."""
        if self.digits is not None:
            return self.open(self.digits[0])
        C, H, W = self.shape
        ramps = [torch.linspace(0, 255, W).expand(H, W), torch.linspace(255, 0, H)[:, None].expand(H, W),
                 torch.linspace(255, 0, W).expand(H, W)]
        return self.open(torch.stack(ramps[:C]).byte())

    def open(self, picture):
        """A Session for a picture, uint8 (C, H, W)."""
        codes = self._encode(picture)
        return Session(picture, codes, codes)

    def draw(self, strokes):
        """A Session for a drawing, a list of strokes of points."""
        return self.open(code_pictures.draw_strokes(strokes, *self.shape[1:]))

    def bundled_digit(self, number):
        """A Session for one of the bundled digits."""
        return self.open(self.digits[_integer(number, len(self.digits), "the number of a digit")])

    def invert(self, session):
        """A Session for the negative of the same picture."""
        return self.open(255 - session.picture)

    def read(self, path):
        """A Session for a picture in a file, cropped and resized to the model's size."""
        name, width, height = Path(path).name, 0, 0
        with suppress(Exception), Image.open(path) as image:          # what cannot be opened is reported below
            width, height = image.size
        if width * height > MAX_PIXELS:
            raise ValueError(f"{name} has {width:,}×{height:,} pixels, the page reads up to {MAX_PIXELS:,}: make it "
                             "smaller first")
        try:
            picture = image_file.read_image(path, *self.shape[1:], self.shape[0])
        except (OSError, ValueError) as error:
            raise ValueError(str(error).replace(str(path), name)) from error
        return self.open(picture)

    # ---------------------------------------------------------------- answers

    def choose_place(self, session, place):
        return session._replace(place=_integer(place, session.codes.numel(), "a place of the map"))

    def choose_code(self, session, code):
        """The Session with another code at its place."""
        code = _integer(code, self.num_codes, "a code")
        if session.place is None:
            raise ValueError("choose a place of the map first")
        changed = session.changed.clone()
        former = changed.view(-1)[session.place].item()
        changed.view(-1)[session.place] = code
        history = session.history if former == code else (*session.history, (session.place, former))[-MAX_HISTORY:]
        return session._replace(changed=changed, history=history)

    def undo(self, session):
        if not session.history:
            raise ValueError("there is nothing to undo")
        *history, (place, former) = session.history
        changed = session.changed.clone()
        changed.view(-1)[place] = former
        return session._replace(changed=changed, history=tuple(history), place=place)

    def reset(self, session):
        return session._replace(changed=session.codes, history=())

    def sample(self, label, temperature, top_k, guidance, seed):
        """HTML of a new map and its image as it fills up: yields a frame every few codes, not too fast to see."""
        sampling = {"temperature": _number(temperature, "a temperature"), "guidance": _number(guidance, "a guidance")}
        top_k = int(_number(top_k, "a number of codes"))
        sampling["top_k"] = None if top_k >= self.num_codes else top_k
        if label == ANY and sampling["guidance"] != 1:
            raise ValueError("guidance is towards a class: choose one, or set guidance to 1")
        total, codes, due = math.prod(self.map_size), [], time.monotonic()
        step = math.ceil(total / FRAMES)
        for code in self.prior.sample_in_order(self._labels(label, 1), **sampling, generator=_generator(seed)):
            codes.append(code.item())
            if len(codes) % step == 0 or len(codes) == total:
                yield self.show_sample(codes, int(seed))
                due += FRAME_SECONDS
                time.sleep(max(0, due - time.monotonic()))

    def complete(self, session, rows, label, seed):
        """Ten maps (10, h, w) that begin with the rows of codes of a drawing; the prior samples the others."""
        rows = _integer(rows, self.map_size[0] + 1, "a number of rows")
        given = session.codes[:rows].reshape(1, -1).expand(COMPLETIONS, -1)
        return self.prior.sample(self._labels(label, COMPLETIONS), generator=_generator(seed), given=given).cpu()

    # ---------------------------------------------------------------- what is shown, as HTML

    def show_picture(self, session):
        """The picture, its codes, the reconstruction and the error."""
        x, reconstruction = data.to_model_range(session.picture), self._decode(session.codes)
        mse = (reconstruction - x).square().mean().item()
        (h, w), (C, H, W) = self.map_size, self.shape
        size = f"{H}×{W} pixels" + ", in colour" * (C == 3)
        return "".join((
            '<div class="figures drawn">', figure(session.picture, f"what the encoder sees: {size}"),
            f"<div>{self.show_map(session.codes.flatten().tolist())}<p class='caption'>{h}×{w} codes of "
            f"{self.num_codes:,}, each number on the patch that its code decodes to</p></div>",
            figure(data.to_uint8(reconstruction), f"reconstruction from these {h * w} numbers<br>"
                   f"mean squared error on [−1, 1]: <b id='mse'>{mse:.4f}</b>"), "</div>"))

    def show_map(self, codes, marked=(), attribute=None):
        """The tiles of a map, from its codes in raster order; None where there is none yet."""
        w = self.map_size[1]
        titles = [f"row {i // w + 1}, column {i % w + 1}" + f": code {code}" * (code is not None)
                  for i, code in enumerate(codes)]
        patches = self._patches([0 if code is None else code for code in codes])
        return tiles(codes, patches, w, "map wide" if w > SMALL_TILES else "map", titles, None, marked, attribute)

    def show_changed_map(self, session):
        """The map with the visitor's changes, as buttons."""
        codes = session.changed.flatten().tolist()
        marked = () if session.place is None else (session.place,)
        count = (session.changed != session.codes).sum().item()
        note = f"{count} of {len(codes)} codes changed" if count else "Choose a place, then a code of the palette."
        return f"{self.show_map(codes, marked, 'place')}<p class='caption'>{note}</p>"

    def show_changed_picture(self, session):
        before, after = (data.to_uint8(self._decode(codes)) for codes in (session.codes, session.changed))
        return (f'<div class="figures">{figure(before, "before")}'
                f'{figure(after, "after", "after")}</div>')

    def show_palette(self, session, label):
        """The prior's favourites for the chosen place, and the other codes, the most similar to its own first."""
        if session.place is None:
            return CHOOSE_PLACE
        own = session.changed.flatten()[session.place].item()
        row, column = (position + 1 for position in divmod(session.place, self.map_size[1]))
        count = self.num_codes if self.all_patches is not None else NEAREST_CODES
        codes = code_pictures.similar_codes(self.model, own, count).tolist()
        parts, best = [], []
        if self.prior is not None:
            best, chances = code_pictures.favourites(self.prior, session.changed, session.place,
                                                     self._label(label))
            condition = "no class" if self._label(label) == len(self.classes) else html.escape(
                f"class {self.classes[self._label(label)]}")
            parts = ["<p class='message'>The prior's favourites here, given the codes before this place and "
                     f"{condition}:</p>",
                     tiles(best, self._patches(best), len(best), "best",
                           [f"code {code}, probability {chance:.1%}" for code, chance in zip(best, chances)],
                           [f"{chance:.1%}" for chance in chances], attribute="code")]
        titles, notes = [f"code {code}" for code in codes], None
        if self.counts is not None:
            notes = [f"{self.counts[code]:,}×" for code in codes]
            titles = [f"{title}, used {note}" for title, note in zip(titles, notes)]
        which = f"All {len(codes)} codes" if count == self.num_codes else (
            f"The {len(codes)} codes of {self.num_codes:,} that are most similar")
        text = f"{which}, by their distance to code {own}, which was at row {row}, column {column} and comes first."
        if self.counts is not None:
            text += (" Above each number, how often the code is used in 1,000 bundled digits. Many patches are dark, "
                     "since a code also describes what surrounds it.")
        if best:
            text += " The favourites are outlined."
        marked = {i for i, code in enumerate(codes) if code in best}
        return "".join((*parts, f"<p class='message'>{text}</p>",
                        tiles(codes, self._patches(codes), 32, "palette", titles, notes, marked, "code")))

    def show_sample(self, codes, seed):
        """A map of which only the first codes are there, and the image of these."""
        total = math.prod(self.map_size)
        filled = torch.tensor([*codes, *[codes[0]] * (total - len(codes))]).view(self.map_size)
        image = data.to_uint8(self._decode(filled))
        image[:, self._pixels(torch.arange(total).view(self.map_size) >= len(codes))] = HIDDEN
        shown = self.show_map([*codes, *[None] * (total - len(codes))])
        place = f"{len(codes)} of {total} codes, with seed {seed}"
        return (f'<div class="figures"><div>{shown}<p class="caption">{place}</p></div>'
                f'{figure(image, "what they decode to")}</div>')

    def show_kept(self, session, rows, maps=()):
        """The rows of a drawing that are kept, and its completions, maps (B, h, w)."""
        rows = _integer(rows, self.map_size[0] + 1, "a number of rows")
        image = data.to_uint8(self._decode(session.codes))
        hidden = (torch.arange(self.map_size[0]) >= rows).unsqueeze(1).expand(self.map_size)
        image[:, self._pixels(hidden)] = HIDDEN
        figures = [figure(image, "kept")]
        if len(maps):
            images = code_maps.decode(self.model, maps)
            figures += [figure(image, f"{i + 1}", "completion") for i, image in enumerate(images)]
        share = 100 * rows / self.map_size[0]
        return f'<div class="figures kept" style="--kept:{share:.4g}%">{"".join(figures)}</div>'

    # ---------------------------------------------------------------- the model

    @torch.no_grad()
    def _encode(self, picture):
        return self.model.encode(data.to_model_range(picture.unsqueeze(0), self.device))[0].cpu()

    @torch.no_grad()
    def _decode(self, codes):
        return self.model.decode(codes.unsqueeze(0))[0].cpu()

    def _patches(self, codes):
        """uint8 (n, C, p, p) of n codes."""
        codes = torch.as_tensor(list(codes))
        if self.all_patches is not None:
            return self.all_patches[codes]
        return data.to_uint8(code_pictures.code_patches(self.model, codes, *self.map_size))

    def _pixels(self, mask):
        """A mask (H, W) of pixels from one of codes (h, w)."""
        p = self.model.downsample
        return mask.repeat_interleave(p, dim=0).repeat_interleave(p, dim=1)

    def _label(self, label):
        """A class as the prior takes it: for ANY the number after the last class, which means none."""
        if label == ANY:
            return len(self.classes)
        return _integer(label, len(self.classes), "a class")

    def _labels(self, label, count):
        return torch.full((count,), self._label(label))


def _integer(value, size, what):
    """A number that a browser has sent, as an integer in [0, size). Raises ValueError if it is none."""
    with suppress(TypeError, ValueError, OverflowError):
        if int(value) == float(value) and 0 <= int(value) < size:
            return int(value)
    raise ValueError(f"{str(value)[:50]} is not {what}: give an integer from 0 to {size - 1:,}")


def _number(value, what):
    """A number that a browser has sent, as a float. Raises ValueError if it is none, or not finite."""
    with suppress(TypeError, ValueError, OverflowError):
        if math.isfinite(float(value)):
            return float(value)
    raise ValueError(f"{str(value)[:50]} is not {what}")


def _generator(seed):
    return torch.Generator().manual_seed(_integer(seed, 2**53, "a seed"))
