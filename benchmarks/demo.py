"""How fast the page of demo.py answers, and its memory: python3 benchmarks/demo.py [--visitors 20] ...

Starts demo.py, sends it the requests that a browser sends, first those of one visitor, then of all visitors at once,
and prints the median and the 95th percentile of the seconds from a request to its complete answer, and the server's
resident memory before and after. Needs gradio, as demo.py does; memory is read on Linux alone.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import arguments, cli


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"
    parser.add_argument("--visitors", type=arguments.integer(1, 200), default=20, metavar="N",
                        help=f"visitors at once {shown}")
    parser.add_argument("--requests", type=arguments.integer(10), default=1000, metavar="N",
                        help=f"requests of all visitors together, beside five each that finish a digit {shown}")
    parser.add_argument("--port", type=arguments.integer(1, 65535), default=7869, metavar="N",
                        help=f"port of the page {shown}")
    return parser


if __name__ == "__main__":
    get_parser().parse_args()

import itertools
import json
import random
import statistics
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

ACTIONS = "draw", "choose a place", "choose a code", "undo", "finish"
QUICK = ACTIONS[:-1]            # those of a visitor who tries codes: the last one samples 10 × 49 codes
THINKING = 1.0                  # seconds between two requests of a visitor, on average, where they take turns


class Page:
    """The server's address and its events, by what they do."""

    def __init__(self, url):
        self.url = f"{url}/gradio_api"
        with urlopen(f"{url}/config") as answer:
            config = json.load(answer)
        names = {part["id"]: part["props"].get("elem_id") or part["props"].get("value")
                 for part in config["components"]}
        events = {(names.get(target), event): dependency["id"] for dependency in config["dependencies"]
                  for target, event in dependency["targets"]}
        sources = (("pad", "input"), ("places", "select"), ("palette", "select"), ("Undo", "click"),
                   ("Finish it ten times", "click"))
        self.events = {action: events[source] for action, source in zip(ACTIONS, sources)}


class Visitor:
    """A browser's session, as the server sees it."""

    def __init__(self, page, seed):
        self.page, self.session, self.random = page, uuid.uuid4().hex, random.Random(seed)

    def request(self, action):
        """Send an action and wait for its complete answer. → seconds"""
        number = self.page.events[action]
        values = {"draw": [3], "choose a place": [None, -1], "undo": [None, -1],
                  "finish": [None, 3, -1, 0]}.get(action, [None])
        data = {"draw": {"strokes": self.stroke()}, "choose a place": {"place": self.random.randrange(49)},
                "choose a code": {"code": self.random.randrange(512)}}.get(action)
        body = {"data": values, "event_data": data, "fn_index": number, "session_hash": self.session}
        start = time.perf_counter()
        with urlopen(Request(f"{self.page.url}/queue/join", json.dumps(body).encode(),
                             {"Content-Type": "application/json"})) as answer:
            event = json.load(answer)["event_id"]
        with urlopen(f"{self.page.url}/queue/data?session_hash={self.session}") as stream:
            for line in stream:
                message = json.loads(line[5:]) if line.startswith(b"data:") else {}
                if message.get("event_id") == event and message["msg"] == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(f"{action}: {message['output']}")
                    return time.perf_counter() - start
        raise RuntimeError(f"{action}: no answer")

    def stroke(self):
        points = [[0.3, 0.2], [0.7, 0.2], [0.5, 0.9]]
        return [[[x + self.random.uniform(-0.1, 0.1), y + self.random.uniform(-0.1, 0.1)] for x, y in points]]


def resident_memory(process):
    """Of a process, in MB; None where /proc has no word on it."""
    try:
        line = next(line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
                    if line.startswith("VmRSS"))
    except OSError:
        return None
    return int(line.split()[1]) // 1000


def report(name, seconds):
    high = statistics.quantiles(seconds, n=20)[-1]
    print(f"{name:<32}{len(seconds):>8}{statistics.median(seconds):>10.3f}{high:>10.3f}{max(seconds):>10.3f}",
          flush=True)


def measure(page, process, args):
    print(f"{'seconds':<32}{'requests':>8}{'median':>10}{'95 %':>10}{'max':>10}")
    visitor = Visitor(page, 0)
    for action in ACTIONS:
        visitor.request(action)         # the first one of a kind is slower
        seconds = []
        for _ in range(20):
            if action == "undo":
                visitor.request("choose a code")
            seconds.append(visitor.request(action))
        report(f"1 visitor: {action}", seconds)
    visitors = [Visitor(page, seed + 1) for seed in range(args.visitors)]
    before = resident_memory(process)
    requests = (run_visitors(visitors, args.requests // 2, THINKING, "with pauses")
                + run_visitors(visitors, args.requests - args.requests // 2, 0, "without pauses")
                + run_visitors(visitors, 5 * args.visitors, 0, "finish", ["finish"]))
    print(f"memory: {before} MB before, {resident_memory(process)} MB after {requests:,} requests")


def run_visitors(visitors, requests, pause, name, actions=QUICK):
    """Requests of all visitors at once, each after a pause of `pause` seconds on average. → how many"""
    def visit(visitor):
        seconds = []
        for action in itertools.islice(itertools.cycle(actions), max(len(actions), requests // len(visitors))):
            time.sleep(visitor.random.uniform(0, 2 * pause))
            seconds.append(visitor.request(action))
        return seconds

    with ThreadPoolExecutor(len(visitors)) as pool:
        seconds = list(itertools.chain(*pool.map(visit, visitors)))
    report(f"{len(visitors)} visitors, {name}", seconds)
    return len(seconds)


def run(args):
    process = subprocess.Popen([sys.executable, str(ROOT / "demo.py"), "--port", str(args.port)],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line, printed = process.stdout.readline(), ""
        while line and "The page is at" not in line:        # a library may print something first
            printed, line = printed + line, process.stdout.readline()
        if not line:
            raise ValueError(printed or "demo.py has ended")
        measure(Page(f"http://127.0.0.1:{args.port}"), process, args)
    finally:
        process.terminate()
        process.wait()


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
