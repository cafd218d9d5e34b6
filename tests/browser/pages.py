"""Our pages in a real browser: looked at, listened to, and walked with the keyboard.

    python tests/browser/pages.py AXE [--screenshots DIR]

makes the parity page of a right engine and of the real four-fold case, and the page of `show` of a sound and of a
damaged checkpoint, and opens each in headless Chromium at the width of a phone and of a desk, dark and light. Fails if
a page logs anything, asks for anything, moves sideways (on screen or on paper), or if axe-core finds anything; if the
heat map cannot be walked with the keyboard; and if a table of `show` hides a part of itself. AXE is axe.min.js of the
npm package axe-core; Chromium is `$CHROMIUM` or what is on the path.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
import safetensors.numpy

from apr_jax.commands import parity
from apr_jax.converters.commands import show
from apr_jax.trace.inputs import seeded
from tests import oracle, paths
from tests.battery.faulty_forward import forward, write_aprt
from tests.battery.four_fold import CHECKPOINT
from tests.battery.parity_battery import REAL_CASE

WIDTHS, SCHEMES = (390, 1400), ("light", "dark")
PAPER = 718
"""Pixels across an A4 page between margins of a centimetre, at 96 to the inch."""
LENGTH = 80
MOST_BYTES = 150_000
"""Of a screenshot that is committed."""
REPORTS = {"clean": (), "four-fold": REAL_CASE}


def write_pages(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Writes the pages; returns them by name."""
    # Pages say how their files were called: nothing of this machine is to stand in screenshots.
    os.chdir(folder)
    checkpoint = pathlib.Path(shutil.copytree(paths.checkpoint(CHECKPOINT), CHECKPOINT))
    weights, config = oracle.load(checkpoint)
    ids = seeded(config["vocab_size"], 1, LENGTH).input_ids
    pages = {}
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        for name, faults in REPORTS.items():
            dump, page = pathlib.Path(f"{name}-dump"), folder / f"parity-{name}.html"
            write_aprt(dump, forward(weights, config, ids, faults=faults), ids)
            command = ["parity.py", str(checkpoint), "--right", str(dump), "--html", str(page)]
            assert parity.main(parity.parse(command)) == bool(faults), name
            pages[page.stem] = page
        damage(pathlib.Path(shutil.copytree(checkpoint, "damaged")))
        for name in (str(checkpoint), "damaged"):
            page = folder / f"show-{'damaged' if name == 'damaged' else 'sound'}.html"
            show.main(show.parse(["show.py", name, "--html", str(page)]))
            pages[page.stem] = page
    return pages


def damage(checkpoint: pathlib.Path) -> None:
    """Makes checks of a checkpoint fail: a NaN, a weight of zeros, and a norm that is a hundred times too large."""
    path = checkpoint / "model.safetensors"
    tensors = {name: np.array(array) for name, array in safetensors.numpy.load_file(path).items()}
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = np.nan
    tensors["model.layers.1.self_attn.q_proj.weight"][:] = 0
    tensors["model.norm.weight"] *= 100
    safetensors.numpy.save_file(tensors, path, {"format": "pt"})


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Starts Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        sys.exit("needs playwright: pip install playwright")
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        sys.exit("needs Chromium: apt-get install chromium, or CHROMIUM=path")
    with sync_playwright() as engine:
        started = engine.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield started
        started.close()


class Visit:
    """One page at one width in one scheme, and what is wrong with it.

    Attributes:
      page: Playwright's.
      wrong: What was found.
    """

    def __init__(self, started: Any, address: str, width: int, scheme: str, own: str | None = None):
        """Opens the page, which may ask for nothing but itself and what begins with `own`."""
        self._context = started.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page = self._context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self.wrong.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("request", lambda request: self._asked(request.url, own or address))
        self.page.goto(address)

    def _asked(self, url: str, own: str) -> None:
        if not url.startswith(own):
            self.wrong.append(f"request: {url}")

    def close(self) -> None:
        self._context.close()

    def check_width(self) -> None:
        """No sideways move on screen, and nothing beyond the edge of an A4 page."""
        size = self.page.viewport_size
        for media, width in (("print", PAPER), ("screen", size["width"])):
            self.page.emulate_media(media=media)
            self.page.set_viewport_size({**size, "width": width})
            wide = self.page.evaluate("document.documentElement.scrollWidth")
            if wide > width:
                self.wrong.append(f"moves sideways ({media}): {wide} of {width} pixels")

    def check_axe(self, source: str) -> int:
        """All findings of axe-core; returns how many rules passed."""
        self.page.evaluate(source)
        found = self.page.evaluate("axe.run()")
        for violation in found["violations"]:
            places = "; ".join(node["html"][:120] for node in violation["nodes"][:3])
            self.wrong.append(f"axe, {violation['impact']}: {violation['id']} at {len(violation['nodes'])}: {places}")
        return len(found["passes"])

    def check_tables(self) -> None:
        """Every cell of a page of `show` is whole and within its table's box, without a scroll to the side."""
        hidden = self.page.evaluate(
            """() => [...document.querySelectorAll('.scroll td, .scroll tbody th')].filter(e => e.checkVisibility())
            .filter(e => { const box = e.closest('.scroll').getBoundingClientRect(), own = e.getBoundingClientRect();
            return own.right > box.right + 1 || own.left < box.left - 1 || e.scrollWidth > e.clientWidth + 1; })
            .map(e => e.textContent)"""
        )
        if hidden:
            self.wrong.append(f"hidden: {len(hidden)} cells, the first is {hidden[0]!r}")
        if (mains := self.page.locator("main").count()) != 1:
            self.wrong.append(f"{mains} <main>")

    def _here(self) -> dict[str, Any]:
        """What has the focus, and what the status line says."""
        return self.page.evaluate(
            """() => { const e = document.activeElement, s = getComputedStyle(e), m = document.getElementById('map');
            return {inside: m.contains(e), said: e.dataset?.said, status: document.getElementById('said').textContent,
            name: e.getAttribute('aria-label'), outline: s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2,
            stops: m.querySelectorAll('[tabindex="0"]').length,
            row: e.parentElement?.rowIndex, column: e.cellIndex}; }"""
        )

    def walk(self) -> int:
        """Walks the map with the keyboard; returns how many cells were visited."""
        for _ in range(40):
            self.page.keyboard.press("Tab")
            if self._here()["inside"]:
                break
        seen = [self._here()]
        for key in ("ArrowDown", "ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "End", "Home", "Control+End"):
            self.page.keyboard.press(key)
            seen.append(self._here())
        moves = [
            (after["row"] - before["row"], after["column"] - before["column"])
            for before, after in itertools.pairwise(seen)
        ]
        expected = [(1, 1), (0, 1), (1, 0), (0, -1), (-1, 0), (0, 1), (0, -1)]
        if moves[:7] != expected:
            self.wrong.append(f"keyboard: moved {moves[:7]}, expected {expected}")
        if (seen[0]["row"], seen[-1]["row"]) != (1, self.page.locator("#map tr").count() - 1):
            self.wrong.append("keyboard: the walk does not begin at the first stage or Control+End is not the last")
        for place in seen:
            if not (place["inside"] and place["outline"] and place["name"] and place["stops"] == 1):
                self.wrong.append(f"keyboard: {place}")
            elif place["said"] != place["status"]:
                self.wrong.append(f"keyboard: {place['said']!r} is not announced: {place['status']!r}")
        self.page.keyboard.press("Tab")
        if self._here()["inside"]:
            self.wrong.append("keyboard: Tab does not leave the map")
        self.page.hover("#map td[data-said] >> nth=5")
        hovered = self.page.locator("#map td[data-said]").nth(5).get_attribute("data-said")
        if self.page.locator("#said").text_content() != hovered:
            self.wrong.append("the pointer's stage is not said")
        return len(seen)


def shrunk(png: bytes) -> bytes:
    """Returns a screenshot with a palette of 256 colours."""
    from PIL import Image

    made = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(made, "PNG", optimize=True)
    return made.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axe", metavar="AXE", type=pathlib.Path, help="axe.min.js")
    parser.add_argument("--screenshots", metavar="DIR", type=pathlib.Path, help="where to put those of our pages")
    args = parser.parse_args(argv)
    source, failed = args.axe.read_text(), False
    screenshots = args.screenshots and args.screenshots.resolve()
    with tempfile.TemporaryDirectory() as scratch, browser() as started:
        for name, path in write_pages(pathlib.Path(scratch)).items():
            for width, scheme in itertools.product(WIDTHS, SCHEMES):
                visit = Visit(started, path.as_uri(), width, scheme)
                visit.check_width()
                if name.startswith("show-"):
                    visit.check_tables()
                if screenshots:
                    png = shrunk(visit.page.screenshot(full_page=True))
                    (screenshots / f"{name}-{width}-{scheme}.png").write_bytes(png)
                    visit.wrong += [f"screenshot of {len(png)} bytes"] if len(png) > MOST_BYTES else []
                rules = visit.check_axe(source)
                cells = visit.walk() if name.startswith("parity-") else 0
                visit.close()
                result = "; ".join(visit.wrong) or f"ok ({rules} rules of axe passed, {cells} cells walked)"
                print(f"{name} {width} {scheme}: {result}", flush=True)
                failed |= bool(visit.wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
