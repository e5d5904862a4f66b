"""An interactive demo in the browser: python3 demo.py [--model models/NAME/best.pt] [--prior models/NAME/prior.pt] ...

Draw a digit and see its codes, change a code and see the picture follow, and have the prior draw new digits or finish
yours. The page is at http://127.0.0.1:7860 and is served by this machine alone. Without --model it shows the shipped
one. Needs gradio: pip install -r requirements-demo.txt. In a notebook, build(PATH).launch() shows it in the cell.
"""

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

import argparse
import ipaddress
import re

from utils import arguments, cli

PORT, HOST = 7860, "127.0.0.1"
INSTALL = "the page needs gradio: pip install -r requirements-demo.txt"


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"
    parser.add_argument("--model", type=arguments.file_name, metavar="PATH",
                        help="checkpoint of VQ-VAE.py, or a state_dict of the published network "
                             "(default: the shipped model, pretrained/vqvae.pt)")
    parser.add_argument("--prior", type=arguments.file_name, metavar="PATH",
                        help="checkpoint of train_prior.py (default: prior.pt beside the model, if it is of this "
                             "model; else the page has no samples)")
    parser.add_argument("--device", type=arguments.device, default="cpu", metavar="NAME",
                        help=f"{arguments.DEVICES} {shown}")
    parser.add_argument("--port", type=arguments.integer(1, 65535), default=PORT, metavar="N",
                        help=f"port of the page {shown}")
    parser.add_argument("--host", type=host, default=HOST, metavar="ADDRESS",
                        help=f"address to listen on; 0.0.0.0 lets every machine of the network open the page {shown}")
    return parser


def host(text):
    """A type for --host: an IP address, or a name."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,250}[A-Za-z0-9])?", text):
            return text
        raise argparse.ArgumentTypeError(f"{text!r} is not an address: give one such as 127.0.0.1 or 0.0.0.0") from None


if __name__ == "__main__":
    get_parser().parse_args()       # --help and mistakes are answered before torch is imported, which takes seconds

import functools
import os
import random
import socket
import threading
from pathlib import Path

import torch

import checkpoint
import data
from utils import files, inputs, speed
from utils.demo_session import ANY, Demo

try:
    import gradio as gr
except ImportError:             # main() says what to install
    gr = None

CSS, PAD = (Path(__file__).with_name("utils") / name for name in ("demo_page.css", "demo_pad.js"))
PAD_HTML = '<div class="pad"><canvas width="300" height="300"></canvas><button type="button">Clear</button></div>'
CLEAR_PAD = """(...values) => {
    document.querySelector(".pad canvas")?.dispatchEvent(new Event("clear"));
    return values;
}"""
# A click on a tile says which one it was. The listener stays when the tiles are replaced.
CHOOSE = """element.addEventListener("click", (event) => {
    const tile = event.target.closest("button.tile");
    if (tile) trigger("select", {place: tile.dataset.place, code: tile.dataset.code});
});"""
FONTS = "system-ui", "sans-serif"           # no fonts of another host
MAX_UPLOAD = "50mb"
UPLOAD_SECONDS = 3600           # after which a file that was uploaded is removed
# Of a visitor's events of one kind that come while one is answered, the last one is answered next.
QUICK = {"show_progress": "hidden", "trigger_mode": "always_last"}
AT_ONCE = 4                     # requests answered at the same time
# Gradio recomputes statistics of its last 10,000 events after every event, which takes longer than most requests here:
# of 100 events, after every 1,000.
QUEUE_STATISTICS = {"GRADIO_ANALYTICS_MAX_EVENTS": "100", "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000"}

INTRODUCTION = """# What a VQ-VAE does
An image of {C}×{H}×{W} values becomes a map of {h}×{w} numbers, each the index of one of {K:,} codes, and the map
becomes an image again ([van den Oord et al. 2017](https://arxiv.org/abs/1711.00937))."""
DRAW = """The encoder computes {count} vectors, and each is replaced by its nearest code (eq. 1, section 3.1); the
decoder sees only these codes. Look for what is lost, such as thin lines and sharp edges. The error is the first term of
the loss (eq. 3); in training its gradient passes the choice of the codes unchanged (section 3.2)."""
DRAW_ON_PAD = """ A drawing is scaled to a box of 20×20 of 28×28 pixels, and its centre of mass is moved to the middle,
as MNIST's digits are."""
CHANGE = """The decoder looks each number up in the codebook (eq. 2, section 3.1). Put another code at a place: the
image changes there and a little around it, since the decoder also sees the neighbours. Look for codes that change
little: those at a small distance, and those that the prior finds probable (section 3.3)."""
SAMPLE = """The prior draws one code after the other, from left to right and from top to bottom, each given the codes
before it (section 3.3). Look how early the image is decided, and how a low temperature makes the samples alike."""
COMPLETE = """The codes of the upper rows are kept, and the prior draws the others ten times (section 3.3). Look for
lines that go on where the kept rows end: the prior knows only the codes above, not the pixels."""
NO_PRIOR = """This model has no prior yet, so there is nothing to draw codes from. Train one, then start the page again:
`{command}`"""


# ---------------------------------------------------------------- the page

def build(model=checkpoint.PRETRAINED, prior=None, device="cpu"):
    """The page of a model, from the paths of its file and of its prior's, as a gradio.Blocks: launch() shows it.

    Without a prior, the one beside the model is used if it is of this model. Raises ImportError without gradio, OSError
    or ValueError if a file cannot be read, or the prior is of another model.
    """
    if gr is None:
        raise ImportError(INSTALL)
    for name, value in QUEUE_STATISTICS.items():
        os.environ.setdefault(name, value)
    with cli.errors_name_flag("--model", model):
        network, contents = checkpoint.load_model(model, device)
        demo = Demo(network, contents, *inputs.open_prior_if_any(prior, network, contents, device))
    with gr.Blocks(title="VQ-VAE", analytics_enabled=False, delete_cache=(UPLOAD_SECONDS, UPLOAD_SECONDS)) as page:
        add_tabs(demo)
    page.queue(default_concurrency_limit=AT_ONCE)
    # Gradio takes these when it launches; in a notebook that is a line of its own. A style in the head is there before
    # the tabs are measured, which hides some where they are too wide.
    theme = gr.themes.Default(primary_hue="blue", font=FONTS, font_mono=FONTS)
    page.launch = functools.partial(page.launch, head=f"<style>{CSS.read_text()}</style>", theme=theme, share=False,
                                    footer_links=[], ssr_mode=False, max_file_size=MAX_UPLOAD)
    return page


def add_tabs(demo):
    """Everything on the page. One visitor's Session is in a gr.State, and all tabs show it."""
    (C, H, W), (h, w) = demo.shape, demo.map_size
    sizes = {"C": C, "H": H, "W": W, "h": h, "w": w, "K": demo.num_codes, "count": h * w}
    start = demo.start()
    session = gr.State(start)           # kept for an hour after the page is closed
    gr.Markdown(INTRODUCTION.format(**sizes))
    with gr.Tab("Draw" if demo.can_draw else "Encode"):
        gr.Markdown((DRAW + DRAW_ON_PAD * demo.can_draw).format(**sizes))
        with gr.Row(equal_height=False):
            if demo.can_draw:
                with gr.Column(scale=2, min_width=280):
                    pad = gr.HTML(html_template=PAD_HTML, js_on_load=PAD.read_text(), apply_default_css=False,
                                  elem_id="pad")
            with gr.Column(scale=5, min_width=300):
                picture = gr.HTML(demo.show_picture(start), apply_default_css=False, elem_id="drawn")
        sources = add_sources(demo, session)
    with gr.Tab("Change a code"):
        gr.Markdown(CHANGE)
        changing = add_changing(demo, session, start)
    with gr.Tab("New digits" if demo.classes == list(data.DIGITS) else "New images"):
        gr.Markdown(SAMPLE)
        add_sampling(demo)
    with gr.Tab("Finish it"):
        gr.Markdown(COMPLETE)
        rows, kept = add_completing(demo, session, start)

    def show(opened, rows):
        """All that shows a visitor's picture, when there is another one."""
        return (opened, demo.show_picture(opened), demo.show_changed_map(opened), demo.show_changed_picture(opened),
                demo.show_palette(opened, ANY), demo.show_kept(opened, rows))

    if demo.can_draw:
        sources.append((pad.input, demo.draw, [], "strokes"))
    shown = [session, picture, *changing, kept]
    for event, handler, values, key in sources:
        event(on_page(lambda rows, *given, handler=handler: show(handler(*given), rows), key), [rows, *values], shown,
              js=None if key == "strokes" else CLEAR_PAD, **QUICK)


def on_page(handler, key=None):
    """A handler of Gradio's: what is wrong with the input is said in a sentence, and the page stays as it is.

    key names the part of the event's data that the handler takes as its last argument.
    """
    def answer(event: "gr.EventData", *values):
        try:
            return handler(*values, *([(event._data or {}).get(key)] if key else ()))
        except (OSError, ValueError, MemoryError) as error:
            gr.Warning(cli.printable(cli.describe_error(error)) or "there is not enough memory for it", title="")
            return gr.skip()
    return answer


def add_sources(demo, session):
    """What a picture can come from, but a drawing. → (event, handler, its inputs, key of its event data) for each."""
    sources = []
    if demo.digits_note:
        gr.Markdown(demo.digits_note)
    with gr.Row(equal_height=False):
        if demo.digits is not None:
            last = len(demo.digits) - 1
            number = gr.Number(0, label=f"or one of the bundled digits, 0 to {last}", precision=0, minimum=0,
                               maximum=last, min_width=240, elem_id="number")
            # An empty field is one that is being typed in.
            sources.append((number.change, lambda number: demo.bundled_digit(number or 0), [number], None))
        with gr.Column(min_width=240):
            if demo.digits is not None:
                another = gr.Button("Another digit", size="sm")
                another.click(lambda: random.randint(0, last), None, number, show_progress="hidden")
            upload = gr.UploadButton("A picture from a file", size="sm", elem_id="upload")
            invert = gr.Button("Swap dark and light", size="sm")
    sources.append((upload.upload, demo.read, [upload], None))
    sources.append((invert.click, demo.invert, [session], None))
    return sources


def add_changing(demo, session, start):
    """The map as buttons, the picture before and after, and the palette. → the parts that show another picture."""
    with gr.Row(equal_height=False):
        with gr.Column(min_width=300):
            places = gr.HTML(demo.show_changed_map(start), js_on_load=CHOOSE, apply_default_css=False, elem_id="places")
            with gr.Row():
                undo = gr.Button("Undo", size="sm", min_width=80)
                reset = gr.Button("Reset", size="sm", min_width=80)
        with gr.Column(min_width=300, elem_classes="sticky"):
            pictures = gr.HTML(demo.show_changed_picture(start), apply_default_css=False, elem_id="changed")
        with gr.Column(min_width=1000):         # below both
            label = add_label(demo, "class, for the prior's favourites", visible=demo.prior is not None)
            palette = gr.HTML(demo.show_palette(start, ANY), js_on_load=CHOOSE, apply_default_css=False,
                              elem_id="palette")

    def show_place(session, label):
        return session, demo.show_changed_map(session), demo.show_palette(session, label)

    def show_code(session):
        return session, demo.show_changed_map(session), demo.show_changed_picture(session)

    def undo_code(session, label):
        """The palette stays as it is if it is of the same place, as it does when a code is chosen."""
        undone = demo.undo(session)
        same = undone.place == session.place
        return *show_code(undone), gr.skip() if same else demo.show_palette(undone, label)

    places.select(on_page(lambda session, label, place: show_place(demo.choose_place(session, place), label), "place"),
                  [session, label], [session, places, palette], **QUICK)
    palette.select(on_page(lambda session, code: show_code(demo.choose_code(session, code)), "code"), session,
                   [session, places, pictures], **QUICK)
    label.change(on_page(demo.show_palette), [session, label], palette, **QUICK)
    undo.click(on_page(undo_code), [session, label], [session, places, pictures, palette], **QUICK)
    reset.click(on_page(lambda session: show_code(demo.reset(session))), session, [session, places, pictures], **QUICK)
    return places, pictures, palette


def add_sampling(demo):
    """A new map, code by code."""
    if demo.prior is None:
        gr.Markdown(NO_PRIOR.format(command=demo.train_command))
        return
    with gr.Row():
        label = add_label(demo, "class", value=0)               # guidance needs one
        seed = gr.Number(0, label="seed", precision=0, minimum=0)
    with gr.Row():
        temperature = gr.Slider(0.1, 2, 1, step=0.05, label="temperature", min_width=240)
        top_k = gr.Slider(1, demo.num_codes, demo.num_codes, step=1, label="top-k", min_width=240)
        guidance = gr.Slider(0, 4, 1, step=0.1, label="guidance", min_width=240, visible=bool(demo.prior.drop_label))
    new = gr.Button("Draw a new one", variant="primary")
    sample = gr.HTML(apply_default_css=False, elem_id="sample")

    def frames(*values):
        try:
            yield from demo.sample(*values)
        except ValueError as error:
            gr.Warning(cli.printable(str(error)), title="")
            yield gr.skip()

    new.click(frames, [label, temperature, top_k, guidance, seed], sample, show_progress="hidden").then(
        lambda seed: (seed or 0) + 1, seed, seed, show_progress="hidden")      # the next one is another


def add_completing(demo, session, start):
    """The upper rows of a picture's codes, and ten ways to go on. → the slider of rows, the part that shows them."""
    (h, _), has_prior = demo.map_size, demo.prior is not None
    if not has_prior:
        gr.Markdown(NO_PRIOR.format(command=demo.train_command))
    with gr.Row(visible=has_prior):
        rows = gr.Slider(0, h, h // 2, step=1, label="rows of codes that are kept", min_width=240)
        label = add_label(demo, "class")
        seed = gr.Number(0, label="seed", precision=0, minimum=0)
    finish = gr.Button("Finish it ten times", variant="primary", visible=has_prior)
    kept = gr.HTML(demo.show_kept(start, h // 2), apply_default_css=False, elem_id="kept", visible=has_prior)
    finish.click(on_page(lambda session, rows, label, seed: demo.show_kept(
        session, rows, demo.complete(session, rows, label, seed))), [session, rows, label, seed], kept,
        show_progress="minimal")
    rows.release(on_page(demo.show_kept), [session, rows], kept, show_progress="hidden")
    return rows, kept


def add_label(demo, label, visible=True, value=ANY):
    """A menu of the prior's classes; with none, if it has learned images without a class. value: chosen at first."""
    choices = [(name, i) for i, name in enumerate(demo.classes)]
    if demo.prior is None or demo.prior.drop_label:
        choices.insert(0, ("none", ANY))
    value = value if value in dict(choices).values() else choices[0][1]
    return gr.Dropdown(choices, value=value, label=label, visible=visible)


# ---------------------------------------------------------------- the command

def check_port(address, port):
    """Raise ValueError if nothing can listen there."""
    with cli.errors_name_flag(f"--host {address} --port", port):
        try:
            family, kind, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as server:
                if os.name == "posix":          # a port of a page that has just ended is free
                    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.bind(place)
        except OSError as error:
            raise ValueError(f"{error.strerror}: choose another one") from error


def serve(args):
    """Show the page until Ctrl-C."""
    if gr is None:
        raise ValueError(INSTALL)
    check_port(args.host, args.port)
    device = inputs.find_device(args.device)
    if device == "cpu":
        torch.set_num_threads(1)        # several visitors are answered at once, each on a core
    speed.share_freed_memory()
    page = build(args.model or files.typed_path(checkpoint.PRETRAINED), args.prior, device)
    # Gradio asks its own server for a page, which no proxy would find.
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), args.host, "127.0.0.1", "localhost"]))
    page.launch(server_name=args.host, server_port=args.port, quiet=True, prevent_thread_lock=True)
    try:
        print(f"The page is at http://{f'[{args.host}]' if ':' in args.host else args.host}:{args.port} "
              "(Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        serve(args)


if __name__ == "__main__":
    main()
