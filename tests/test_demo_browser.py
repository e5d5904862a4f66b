"""The page of demo.py in a real browser, without a window. With SCREENSHOTS=FOLDER its pictures are kept there."""

import os
import shutil
import socket
from pathlib import Path

import pytest
from helpers import ROOT, import_script
from PIL import Image
from test_demo import write_pictures

pytest.importorskip("gradio", reason="gradio is not installed")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if not CHROMIUM:
    pytest.skip("Chromium is not installed", allow_module_level=True)

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
TIMEOUT = 30_000            # ms
SEVEN = (0.25, 0.2), (0.75, 0.2), (0.45, 0.85)


@pytest.fixture(scope="module")
def url():
    """The address of a page of the shipped model, served by this process."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    page = import_script("demo.py").build(ROOT / "pretrained" / "vqvae.pt")
    page.launch(server_name="127.0.0.1", server_port=port, quiet=True, prevent_thread_lock=True)
    yield f"http://127.0.0.1:{port}/"
    page.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, url):
    """A function that opens the page in a window of its own. No page may fail, or load from another address."""
    contexts, faults = [], []

    def open_page(viewport, **settings):
        contexts.append(browser.new_context(viewport=viewport, **settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(TIMEOUT)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith((url, "data:", "blob:"))
                else faults.append(request.url))
        page.goto(url)
        page.wait_for_selector("#mse")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not faults


def draw_with_mouse(page, points):
    box = page.locator("#pad canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=8)
    page.mouse.up()


def draw_with_finger(page, points):
    box = page.locator("#pad canvas").bounding_box()
    client = page.context.new_cdp_session(page)
    for kind, point in (("touchStart", points[0]), *(("touchMove", point) for point in points[1:]), ("touchEnd", None)):
        touches = [{"x": box["x"] + point[0] * box["width"], "y": box["y"] + point[1] * box["height"]}] if point else []
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": touches})


def wait_for_change(page, selector, attribute, before):
    page.wait_for_function("([selector, attribute, before]) => document.querySelector(selector)[attribute] != before",
                           arg=[selector, attribute, before])


def wait_for_first_code(page, code):
    """Wait until a code is the first one of the palette."""
    page.wait_for_function("code => document.querySelector('#palette .palette .tile b')?.innerText == code",
                           arg=str(code))


def numbers(page, selector):
    return [int(text) for text in page.locator(f"{selector} .tile b").all_inner_texts()]


def open_tab(page, name):
    page.evaluate("scrollTo(0, 0)")
    page.get_by_role("tab", name=name).click()


def take_screenshot(page, folder, name):
    """Of the whole page, with few colours, which are enough for it."""
    folder = Path(os.environ.get("SCREENSHOTS", folder))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"demo-{name}.png"
    page.evaluate("scrollTo(0, 0)")
    page.screenshot(path=path, full_page=True)
    with Image.open(path) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def use_every_tab(page, draw, folder, prefix=""):
    """What a visitor does, from a drawing to its completions, with a screenshot of each tab."""
    mse, src = page.inner_text("#mse"), "() => document.querySelector('#changed .after img').src"
    first_codes = numbers(page, "#drawn .map")
    draw(page, SEVEN)
    wait_for_change(page, "#mse", "innerText", mse)
    assert float(page.inner_text("#mse")) < 0.02 and len(numbers(page, "#drawn .map")) == 49
    assert numbers(page, "#drawn .map") != first_codes
    take_screenshot(page, folder, f"{prefix}draw")

    open_tab(page, "Change a code")
    page.locator("#places button").nth(24).click()
    page.wait_for_selector("#palette .palette")
    before, codes = page.evaluate(src), numbers(page, "#places")
    palette = numbers(page, "#palette .palette")
    assert palette[0] == codes[24] and len(set(palette)) == 512 and len(numbers(page, "#palette .best")) == 5
    for tile in page.locator("#places button, #palette button").all()[::40]:
        assert "data:image/png" in tile.evaluate("tile => getComputedStyle(tile).backgroundImage")
    page.locator("#palette .palette button").last.click()
    wait_for_change(page, "#changed .after img", "src", before)
    changed = numbers(page, "#places")
    assert [i for i in range(49) if changed[i] != codes[i]] == [24] and changed[24] == palette[-1]
    page.evaluate("document.querySelector('#palette .palette').scrollTop = 0")
    take_screenshot(page, folder, f"{prefix}change")
    after = page.evaluate(src)
    page.get_by_role("button", name="Undo").click()
    wait_for_change(page, "#changed .after img", "src", after)
    assert page.evaluate(src) == before and numbers(page, "#places") == codes

    open_tab(page, "New digits")
    page.get_by_role("button", name="Draw a new one").click()
    page.wait_for_function("document.querySelectorAll('#sample .tile:not(.empty)').length >= 30")
    take_screenshot(page, folder, f"{prefix}new")
    page.wait_for_function("document.querySelectorAll('#sample .tile:not(.empty)').length == 49")

    open_tab(page, "Finish it")
    page.get_by_role("button", name="Finish it ten times").click()
    page.wait_for_selector("#kept .completion")
    assert page.locator("#kept .completion img").count() == 10
    page.wait_for_timeout(500)          # faded until then
    take_screenshot(page, folder, f"{prefix}finish")


def test_every_tab_works_with_a_mouse(open_page, tmp_path):
    use_every_tab(open_page(DESKTOP), draw_with_mouse, tmp_path)


def test_every_tab_works_on_a_phone(open_page, tmp_path):
    page = open_page(PHONE, has_touch=True, is_mobile=True)
    use_every_tab(page, draw_with_finger, tmp_path, "phone-")
    for name in ("Draw", "Change a code", "New digits", "Finish it"):
        open_tab(page, name)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_undo_shows_the_palette_of_its_place(open_page):
    page = open_page(DESKTOP)
    open_tab(page, "Change a code")
    codes, palettes, image = numbers(page, "#places"), [], "document.querySelector('#changed .after img').src"
    assert codes[24] != codes[3]
    for place in (24, 3):
        page.locator("#places button").nth(place).click()
        wait_for_first_code(page, codes[place])
        palettes.append(numbers(page, "#palette .palette"))
        before = page.evaluate(image)
        page.locator("#palette .palette button").last.click()
        wait_for_change(page, "#changed .after img", "src", before)
    for expected in palettes[::-1]:
        before = page.evaluate(image)
        page.get_by_role("button", name="Undo").click()
        wait_for_change(page, "#changed .after img", "src", before)
        wait_for_first_code(page, expected[0])
        assert numbers(page, "#palette .palette") == expected
    assert numbers(page, "#places") == codes


def test_no_stroke_is_lost_while_another_is_answered(open_page):
    page = open_page(DESKTOP)
    for corner in ((0.2, 0.2), (0.8, 0.2), (0.2, 0.8), (0.8, 0.8)):
        draw_with_mouse(page, [corner])
    page.wait_for_function("""() => {
        const image = document.querySelector("#drawn img"), canvas = document.createElement("canvas");
        canvas.width = canvas.height = 28;
        const context = canvas.getContext("2d");
        context.drawImage(image, 0, 0);
        const ink = [[5, 5], [5, 22], [22, 5], [22, 22]].map(([x, y]) => context.getImageData(x, y, 1, 1).data[0]);
        return ink.every((grey) => grey > 200);
    }""")


def test_files_and_test_digits_are_shown_and_odd_files_are_a_sentence(open_page, tmp_path):
    page = open_page(DESKTOP)
    mse = page.inner_text("#mse")
    page.locator("#number input").fill("7")
    wait_for_change(page, "#mse", "innerText", mse)
    for name, readable in write_pictures(tmp_path).items():
        source = page.locator("#drawn img").first.get_attribute("src")
        with page.expect_file_chooser() as chooser:
            page.locator("#upload").click()
        chooser.value.set_files(tmp_path / name)
        if readable:
            wait_for_change(page, "#drawn img", "src", source)
        else:
            page.wait_for_selector(f".toast-body:has-text('{name}')")
            assert page.locator("#drawn img").first.get_attribute("src") == source
            assert "Traceback" not in page.inner_text("body")
