"""Write a data set's codes to a file: python3 codes.py [--model models/NAME/best.pt] --output codes.npz ...

And back: python3 codes.py --decode codes.npz --output images.npz decodes them. Without --model it uses the shipped one.
"""

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import arguments, cli


def get_parser():
    parser = cli.Parser(check_arguments, description=__doc__)
    shown = "(default: %(default)s)"
    cli.add_model_arguments(parser)
    parser.add_argument("--part", type=arguments.one_of("train", "test"), default="train", metavar="WHICH",
                        help=f"train or test: which images of the data set to encode {shown}")
    parser.add_argument("--decode", type=arguments.file_name, metavar="FILE",
                        help="decode this file of codes (default: encode the data set)")
    parser.add_argument("--output", type=arguments.file_name, required=True, metavar="FILE",
                        help="the file to write, in NumPy's .npz format; its folders are created (required)")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace such a file at --output (default: leave it unchanged and stop)")
    return parser


def check_arguments(parser, args):
    """End with an error if arguments contradict each other."""
    if args.decode:
        parser.check_unused(args, ("dataset", "data_folder", "num_workers", "part"),
                            "is used only to encode, leave out --decode")


if __name__ == "__main__":
    get_parser().parse_args()       # --help and mistakes are answered before torch is imported, which takes seconds

import io
import math
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from data import code_maps
from utils import files, inputs
from utils.memory import images_that_fit

MAX_UNPACKED = 2**32        # bytes, of a file of codes and of the images that it decodes to
# In a file of codes.
ARRAYS = ("indices", "labels", "num_codes", "image_shape", "dataset", "class_names", "part", "model_sha256")


# ---------------------------------------------------------------- files

def holds(array, path):
    """Whether the file at path is one of this script's, with `array` in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {f"{array}.npy", "model_sha256.npy"} <= set(archive.namelist())
    except OSError:
        raise
    except Exception:                               # a damaged file can make zipfile raise anything
        return False


def packed(arrays):
    """Arrays as the bytes of an .npz file."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getbuffer()


def read_codes(path, model, sha256):
    """All of ARRAYS from a file of codes. sha256: of the model's file.

    Raises OSError if it cannot be opened, ValueError if it is not such a file, or its codes are another model's.
    """
    contents = files.read_file(path)                # outside the try, so that an OSError passes
    try:
        with zipfile.ZipFile(io.BytesIO(contents)) as archive:
            unpacked = sum(part.file_size for part in archive.infolist())
    except Exception:                               # np.load() says what it is
        unpacked = 0
    if unpacked > MAX_UNPACKED:
        raise ValueError(f"it unpacks to {unpacked:,} bytes: decode {MAX_UNPACKED:,} at a time")
    try:
        with np.load(io.BytesIO(contents), allow_pickle=False) as file:
            arrays = {name: file[name] for name in ARRAYS}
        indices, labels, shape = arrays["indices"], arrays["labels"], arrays["image_shape"].tolist()
        C, H, W = shape
        fits = (indices.dtype.kind == labels.dtype.kind == "u" and indices.ndim == 3 and indices.size > 0
                and indices.shape == (*labels.shape, *model.map_size(H, W)) and model.channels == C
                and labels.max() < 2**31 and arrays["num_codes"].tolist() == model.quantizer.num_codes)
    except Exception as error:                      # a damaged file can make numpy raise anything
        raise ValueError("not a file of codes: it is damaged or of another kind") from error
    if str(arrays["model_sha256"]) != sha256:
        raise ValueError("its codes belong to another model: give the path of theirs with --model")
    if fits and len(indices) * C * H * W > MAX_UNPACKED:
        raise ValueError(f"its {len(indices):,} images of {C}×{H}×{W} are more than {MAX_UNPACKED:,} bytes: decode "
                         "fewer at a time")
    if not fits or indices.max() >= model.quantizer.num_codes:
        raise ValueError(f"its codes {indices.dtype} {indices.shape}, for images {shape}, do not fit the model: "
                         "the file is damaged")
    return arrays


# ---------------------------------------------------------------- from images to codes and back

def encode(model, dataset, args):
    """A data set → its codes (N, h, w) and labels (N,), in the smallest unsigned types that hold them."""
    batch_size = images_that_fit(*dataset.shape[1:], model.quantizer.dim)
    batches = data.batches(dataset, batch_size, None, args.num_workers)
    with tqdm(total=len(dataset), desc="encoding", unit="img", unit_scale=True, leave=False, disable=None) as bar:
        maps = code_maps.encode(model, batches, args.device, bar)
    return (maps.numpy().astype(np.min_scalar_type(model.quantizer.num_codes - 1)),
            dataset.labels.numpy().astype(np.min_scalar_type(dataset.labels.max().item())))


@torch.no_grad()
def decode(model, indices):
    """Codes (N, h, w) of any integer type → uint8 images (N, C, H, W)."""
    images = []
    maps = torch.from_numpy(indices.astype(np.int32)).to(code_maps.smallest_dtype(model.quantizer.num_codes))
    with tqdm(total=len(indices), desc="decoding", unit="img", unit_scale=True, leave=False, disable=None) as bar:
        for batch in code_maps.decode_batches(model, maps):
            images.append(data.to_uint8(batch).numpy())
            bar.update(len(batch))
    return np.concatenate(images)


def run(args):
    args.device = inputs.find_device(args.device)
    array = "images" if args.decode else "indices"
    output = files.OutputFile(Path(args.output), args.overwrite, f"a file of {array}", partial(holds, array))
    with cli.errors_name_flag("--output", output.path):
        output.check()
    model, contents, path = inputs.open_model(args)
    if args.decode:
        with cli.errors_name_flag("--decode", args.decode):
            arrays = read_codes(args.decode, model, contents["sha256"])
        arrays = {"images": decode(model, arrays["indices"]), "labels": arrays["labels"],
                  "model_sha256": contents["sha256"]}
        summary = f"{len(arrays['images']):,} images"
    else:
        name, *parts = inputs.open_data(args, contents)
        dataset = parts[args.part == "test"]
        with cli.errors_name_flag(f"--model {path} --dataset", name):
            indices, labels = encode(model, dataset, args)
        K, (h, w) = model.quantizer.num_codes, indices.shape[1:]
        arrays = {"indices": indices, "labels": labels, "num_codes": K, "image_shape": dataset.shape,
                  "dataset": name, "class_names": dataset.classes, "part": args.part,
                  "model_sha256": contents["sha256"]}
        summary = (f"{len(indices):,} maps of {h}×{w} codes, at log2 {K} = {math.log2(K):.2f} bits each "
                   f"{math.ceil(indices.size * math.log2(K) / 8):,} bytes")
    contents = packed(arrays)
    with cli.errors_name_flag("--output", output.path):
        output.write(contents)
    print(f"{output.path}: {len(contents):,} bytes, {summary}")


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
