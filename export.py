"""Write a model as ONNX files and PyTorch programs: python3 export.py --output FOLDER [--model models/NAME/best.pt] ...

The encoder takes images to code indices, the decoder indices to images, and the prior, if there is one, indices and
classes to the logits of every code. Each is written as an .onnx file for ONNX Runtime and as a .pt2 file for
torch.export.load(), which need nothing of this repository. Without --model it exports the shipped model.
"""

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import arguments, cli

NEEDED = "onnx", "onnxruntime", "onnxscript"        # of requirements-export.txt


def get_parser():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--model", type=arguments.file_name, metavar="PATH",
                        help="checkpoint of VQ-VAE.py, or a state_dict of the published network "
                             "(default: the shipped model, pretrained/vqvae.pt)")
    parser.add_argument("--prior", type=arguments.file_name, metavar="PATH",
                        help="checkpoint of train_prior.py (default: prior.pt beside the model, if there is one)")
    parser.add_argument("--output", type=arguments.file_name, required=True, metavar="FOLDER",
                        help="the folder to write the files to; it is created (required)")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace the files of a former export there (default: leave them unchanged and stop)")
    parser.set_defaults(device="cpu", hidden_size=None, k=None)     # read by utils.inputs
    return parser


if __name__ == "__main__":
    get_parser().parse_args()       # --help and mistakes are answered before torch is imported, which takes seconds

import importlib.util
import io
import json
import logging
import warnings
import zipfile
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from utils import files, inputs
from utils.memory import images_that_fit, is_out_of_memory, items_that_fit, maps_that_fit

BATCH_SIZES = 1, 7, 100         # at which every file is checked
TOLERANCE = 1e-5                # times the largest value, if that is above 1
TIE = 1e-5                      # a latent that is moved by so much of its size may have another nearest code
METADATA = "metadata.json"      # the name of the metadata in both kinds of file


# Letters: B images, C channels, H×W pixels, h×w codes of one map, T = h·w, K codes, N = B·h·w latents, D their size.

class Encode(nn.Module):
    """Images (B, C, H, W) in [-1, 1] → code indices (B, h, w)."""

    def __init__(self, encoder, quantizer):
        super().__init__()
        self.encoder, self.quantizer = encoder, quantizer

    def forward(self, images):
        return self.quantizer.encode(self.encoder(images))


class Decode(nn.Module):
    """Code indices (B, h, w) → images (B, C, H, W) in [-1, 1]. The range of the indices is not checked."""

    def __init__(self, quantizer, decoder):
        super().__init__()
        self.quantizer, self.decoder = quantizer, decoder

    def forward(self, indices):
        return self.decoder(self.quantizer.lookup(indices))


def nearest_in_one_product(flat, codebook):
    """vector_quantizer._nearest() without its loop over blocks, whose number depends on the batch size.

    It is traced in place of the operator vector_quantizer::nearest, which a program could not load without that file.
    Latents and codes are shifted by the codebook's mean, a constant, for the same reason as there by the latents'.
    """
    offset = codebook.mean(dim=0)
    codes = codebook - offset                                         # (K, D)
    scores = codes.square().sum(dim=1) - 2 * (flat.float() - offset) @ codes.T        # (N, K)
    return scores.argmin(dim=1)


# Operators by what they are replaced with. ONNX shifts no signed integers.
DECOMPOSITIONS = {torch.ops.vector_quantizer.nearest.default: nearest_in_one_product,
                  torch.ops.aten.__lshift__.Tensor: lambda x, bits: x * 2**bits,
                  torch.ops.aten.__rshift__.Tensor: lambda x, bits: x // 2**bits}


class Part(NamedTuple):
    """One of the functions that are exported, and what it is checked on."""

    name: str
    module: nn.Module
    inputs: dict            # {name: tensor (up to 100, ...)}
    output: str             # its name
    tied: Callable = lambda *_: torch.tensor(False)     # (inputs, found) → which elements may differ from torch's
    tie: str = ""           # why they may


def tied_codes(model, given, found):
    """Which of the indices found (B, h, w) torch chooses as well if the latents are moved by a rounding error."""
    z_e = model.encoder(given[0])                                     # (B, D, h, w)
    generator, tied = torch.Generator().manual_seed(0), torch.zeros_like(found, dtype=torch.bool)
    for _ in range(32):
        noise = torch.randn(z_e.shape, generator=generator) * z_e.square().mean().sqrt() * TIE
        tied |= model.quantizer.encode(z_e + noise) == found
    return tied


def parts_of(model, prior, image_shape):
    """The Parts of a model, and of its prior if that is not None. They are checked on the images of random codes."""
    _, H, W = image_shape
    h, w = model.map_size(H, W)
    generator, batch_size = torch.Generator().manual_seed(0), images_that_fit(H, W, model.quantizer.dim)
    indices = torch.randint(model.quantizer.num_codes, (max(BATCH_SIZES), h, w), generator=generator)
    decode = Decode(model.quantizer, model.decoder).eval()
    images = torch.cat([decode(batch) for batch in indices.split(batch_size)])
    parts = [Part("encoder", Encode(model.encoder, model.quantizer).eval(),
                  {"images": images[:batch_size]}, "indices", partial(tied_codes, model),
                  "where two codes are equally near, up to rounding"),
             Part("decoder", decode, {"indices": indices[:batch_size]}, "images")]
    if prior:
        batch_size = min(maps_that_fit(prior), items_that_fit(8 * h * w * model.quantizer.num_codes))
        # Its logits (B, T, K) are calibrated, as CodePrior.sample() uses them.
        labels = torch.arange(len(indices)) % (prior.num_classes + 1)
        parts.append(Part("prior", prior, {"indices": indices[:batch_size], "labels": labels[:batch_size]}, "logits"))
    return parts


# ---------------------------------------------------------------- torch → program → ONNX

@contextmanager
def quiet():
    """Without what torch's exporters print, warn and log about their own code."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def describe_root_cause(error):
    """The first line of the message of an error's root cause, after which torch adds a page."""
    while error.__cause__:
        error = error.__cause__
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def trace(part):
    """A torch.export program of a Part, for any batch size. Raises ValueError if torch cannot trace it."""
    # Two of each input: 1 would be taken for a constant. Clones, because a view is saved with all that it is a view of.
    example = tuple(torch.cat([value[:1], value[:1]]) for value in part.inputs.values())
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.export.export(part.module, example, strict=True,
                                      dynamic_shapes=tuple({0: batch} for _ in example))
        program = program.run_decompositions(DECOMPOSITIONS)
    except Exception as error:              # a quantizer may do what torch cannot trace, with any kind of error
        if is_out_of_memory(error):
            raise
        raise ValueError(f"torch.export cannot trace its {part.name}: {describe_root_cause(error)}") from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)      # which names the folders of this machine
    return program


def as_pt2(program, metadata):
    """The bytes of a .pt2 file."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: metadata})
    return buffer.getvalue()


def as_onnx(program, part, metadata):
    """The bytes of an .onnx file. Raises ValueError if an operation has no equivalent in ONNX."""
    import onnx

    try:
        exported = torch.onnx.export(program, dynamo=True, verbose=False, external_data=False,
                                     input_names=list(part.inputs), output_names=[part.output])
    except Exception as error:              # of any kind, as in trace()
        if is_out_of_memory(error):
            raise
        raise ValueError(f"torch.onnx cannot convert its {part.name}: {describe_root_cause(error)}") from error
    proto = exported.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]          # where in the code it comes from, with the folders of this machine
        node.ClearField("doc_string")
    for value in (*proto.graph.input, *proto.graph.output):
        del value.metadata_props[:]
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del proto.graph.value_info[:]           # shapes of intermediate results, in terms of the former name of the batch
    onnx.helper.set_model_props(proto, {METADATA: metadata})
    return proto.SerializeToString()


def run_pt2(contents):
    """A function that runs a .pt2 file: tensors → tensor."""
    return torch.export.load(io.BytesIO(contents)).module()


def run_onnx(contents):
    """A function that runs an .onnx file: tensors → tensor."""
    import onnxruntime

    session = onnxruntime.InferenceSession(contents, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda *given: torch.from_numpy(session.run(None, dict(zip(names, (value.numpy() for value in given))))[0])


def check(part, run):
    """Compare a file's results with torch's, at all BATCH_SIZES that fit into memory. → what to say about them

    Raises ValueError if they differ by more than rounding.
    """
    fit, largest, elements, tied = len(next(iter(part.inputs.values()))), 0.0, 0, 0
    for size in sorted({min(size, fit) for size in BATCH_SIZES}):
        given = [value[:size] for value in part.inputs.values()]
        expected, found = part.module(*given), run(*given)
        if (found.shape, found.dtype) != (expected.shape, expected.dtype):
            raise ValueError(f"it returns {found.dtype} {tuple(found.shape)}, not {expected.dtype} "
                             f"{tuple(expected.shape)}")
        difference = (found.double() - expected.double()).abs()
        allowed = TOLERANCE * max(1, expected.abs().max().item()) if expected.is_floating_point() else 0
        differs = ~(difference <= allowed)                            # NaN too
        if differs.any():
            excused = differs & part.tied(given, found)
            if (differs & ~excused).any():
                raise ValueError(f"{int((differs & ~excused).sum()):,} of {differs.numel():,} of its {part.output} "
                                 f"differ from torch's, by up to {difference.max():.2g}")
            difference, tied = difference[~excused], tied + int(excused.sum())
        largest, elements = max(largest, difference.max().item()), elements + differs.numel()
    text = f"largest difference {largest:.1e}" if expected.is_floating_point() else "equal"
    return text + f", except {tied:,} of {elements:,} {part.output} {part.tie}" * bool(tied)


# ---------------------------------------------------------------- files

def describe(part, model, prior, contents, classes):
    """The metadata of a Part's files, as JSON."""
    shape = contents["dataset"]["shape"]
    about = {"part": part.name, "dataset": contents["dataset"]["name"], "image_shape": shape, "value_range": [-1, 1],
             "map_shape": list(model.map_size(*shape[1:])), "num_codes": model.quantizer.num_codes,
             "model_sha256": contents["sha256"]}
    if part.name == "prior":
        about |= {"classes": classes, "no_class": prior.num_classes if prior.drop_label else None}
    return json.dumps(about)


def is_export(path):
    """Whether the file at path is one that this script has written."""
    contents = files.read_file(path)                # outside the try, so that an OSError passes
    try:
        if path.suffix == ".onnx":
            import onnx

            text = {entry.key: entry.value for entry in onnx.load_from_string(contents).metadata_props}[METADATA]
        else:
            with zipfile.ZipFile(io.BytesIO(contents)) as archive:
                text = archive.read(next(name for name in archive.namelist() if name.endswith(f"extra/{METADATA}")))
        return "model_sha256" in json.loads(text)
    except Exception:                               # a damaged file can make onnx and zipfile raise anything
        return False


def open_outputs(folder, overwrite, parts):
    """{name: OutputFile} of all files to write. Raises ValueError if one of them must not be written."""
    names = [part + suffix for part in parts for suffix in (".onnx", ".pt2")]
    outputs = {name: files.OutputFile(folder / name, overwrite, "an exported model", is_export,
                                      " or choose another folder") for name in names}
    for output in outputs.values():
        output.check()
    former = next((path for path in (folder / "prior.onnx", folder / "prior.pt2")
                   if path.name not in outputs and path.exists()), None)
    if former:      # it would be taken for that of this model
        raise ValueError(f"{former}: exists, but there is no prior to export: remove it or choose another folder")
    return outputs


@torch.no_grad()
def export(args):
    model, contents, path = inputs.open_model(args)
    prior, classes = inputs.open_prior_if_any(args.prior, model, contents, args.device)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        requirements = files.typed_path("requirements-export.txt")
        raise ValueError(f"no {', '.join(missing)}: install what export.py needs with pip install -r {requirements}")
    folder = Path(args.output)
    with cli.errors_name_flag("--output", folder):
        outputs = open_outputs(folder, args.overwrite, ("encoder", "decoder", *(["prior"] if prior else [])))
    with cli.errors_name_flag("--model", path):
        written = make_files(model, prior, contents, classes)
    for name, (file, result) in written.items():
        with cli.errors_name_flag("--output", folder):
            outputs[name].write(file)
        print(f"{outputs[name].path}: {len(file):,} bytes, {result}")


def make_files(model, prior, contents, classes):
    """{name: (bytes, what check() says about them)} of all files, in memory: nothing is written if one is wrong."""
    parts, made = parts_of(model, prior, contents["dataset"]["shape"]), {}
    with tqdm(total=2 * len(parts), desc="exporting", unit="file", leave=False, disable=None) as bar:
        for part in parts:
            with quiet():
                metadata, program = describe(part, model, prior, contents, classes), trace(part)
                for suffix, file, run in ((".pt2", as_pt2(program, metadata), run_pt2),
                                          (".onnx", as_onnx(program, part, metadata), run_onnx)):
                    with cli.errors_name_flag("the exported file", part.name + suffix):
                        made[part.name + suffix] = file, check(part, run(file))
                    bar.update()
    return made


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        export(args)


if __name__ == "__main__":
    main()
