"""Takes the pictures of the console for the documentation, of the real demo: `python -m scripts.console_picture`.

Serves deploy_configs/local.yaml on ports of its own for four minutes, asks both models, and writes
docs/images/console_*.png.
"""

import io
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import yaml
from PIL import Image
from playwright.sync_api import Browser, FloatRect, expect

from tests.browser import DESKTOP, PHONE, Watched, chromium
from tests.cluster.serve_app_run import ServeAppRun, all_ready
from tests.demo_answers import QUESTIONS

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs/images"
DEMO = ROOT / "deploy_configs/local.yaml"
MODELS = ("tiny-pt", "tiny-vllm")
MOST_BYTES = 150_000
MARGIN = 16
# The lines of the last ten minutes have this many seconds of traffic.
TRAFFIC_S = 150.0


def main() -> None:
    """Takes them all."""
    run = ServeAppRun(yaml.safe_load(DEMO.read_text())["applications"], cpus=4)
    try:
        run.wait_until(lambda models: len(models) == len(MODELS) and all_ready(models))
        with traffic(run.url):
            time.sleep(TRAFFIC_S)
            with chromium() as browser:
                take_all(browser, run.url)
    finally:
        run.stop()
        run.clean_up()


def take_all(browser: Browser, url: str) -> None:
    """Takes the pictures that the documentation shows: sections in both colours, on a desktop and a phone."""
    with opened(browser, url, DESKTOP, "light") as watched:
        save(watched, "console_memory")
        watched.show("models")
        save(watched, "console_models")
        chat(watched, both=True)
        save(watched, "console_playground")
        plan(watched)
        save(watched, "console_what_if")
    with opened(browser, url, DESKTOP, "dark") as watched:
        save(watched, "console_memory_dark")
    with opened(browser, url, PHONE, "light") as watched:
        chat(watched, both=False)
        save(watched, "console_playground_phone")
    with opened(browser, url, PHONE, "dark") as watched:
        save(watched, "console_memory_phone_dark")


@contextmanager
def opened(browser: Browser, url: str, size: tuple[int, int], scheme: str) -> Iterator[Watched]:
    """Opens the page, on a desktop with the figures of one model."""
    watched = Watched(browser, url, size=size, scheme=scheme)
    page = watched.open()
    expect(page.get_by_text("Live", exact=True)).to_be_visible()
    if size == DESKTOP:
        page.locator("g.block[aria-label^='tiny-vllm']").last.click()
        page.mouse.move(0, 0)
    yield watched
    watched.close()


def chat(watched: Watched, both: bool) -> None:
    """Asks one model or both, and waits for the answers."""
    page = watched.page
    watched.show("playground")
    if both:
        page.get_by_role("button", name="Two side by side").click()
    for letter, name in zip("AB" if both else "A", MODELS, strict=False):
        page.get_by_label(f"Model {letter}").select_option(name)
    for question in QUESTIONS[:2]:
        page.locator("#draft").fill(question)
        page.keyboard.press("Enter")
        expect(page.get_by_role("button", name="Stop")).to_be_disabled(timeout=30_000)


def plan(watched: Watched) -> None:
    """Asks whether a third model would fit."""
    page = watched.page
    watched.show("what-if")
    page.get_by_label("Model: an id").fill("serve-app/demo")
    page.get_by_label("Backend").select_option("pt")
    page.get_by_label("Requests at once").fill("64")
    page.get_by_role("button", name="Plan", exact=True).click()
    page.locator(".verdict").wait_for(timeout=70_000)


def save(watched: Watched, name: str) -> None:
    """Writes what the window shows, in 256 colours, each of which is hardly another one."""
    time.sleep(1.5)  # A delta comes each second, and the page is drawn again.
    content = watched.page.screenshot(clip=shown_part(watched))
    picture = io.BytesIO()
    image = Image.open(io.BytesIO(content)).convert("RGB")
    few = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(picture, "PNG", optimize=True)
    if len(picture.getvalue()) > MOST_BYTES:
        raise SystemExit(f"{name}.png has {len(picture.getvalue())} bytes, and {MOST_BYTES} are allowed.")
    (IMAGES / f"{name}.png").write_bytes(picture.getvalue())
    print(f"docs/images/{name}.png: {len(picture.getvalue())} bytes")


def shown_part(watched: Watched) -> FloatRect:
    """What has something in it, of the window."""
    size = watched.page.viewport_size
    assert size is not None
    bottom = watched.page.evaluate(
        "Math.max(...[...document.querySelectorAll('main .panel')].map(each => each.getBoundingClientRect().bottom))"
    )
    return {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], round(bottom) + MARGIN)}


@contextmanager
def traffic(url: str) -> Iterator[None]:
    """Asks both models meanwhile, now more and now less."""
    is_over = threading.Event()
    draw = random.Random(7)

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not is_over.wait(draw.uniform(0.05, 0.8)):
                messages = [{"role": "user", "content": draw.choice(QUESTIONS)}]
                body = {"model": draw.choice(MODELS), "messages": messages, "stream": draw.random() < 0.7}
                client.post("/v1/chat/completions", json=body | {"max_tokens": draw.randint(8, 120)})

    clients = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        is_over.set()
        for client in clients:
            client.join(60)


if __name__ == "__main__":
    main()
