"""The documentation as a site in a real browser: what axe-core finds, on a phone and at a desk, dark and light.

    python tests/browser/site.py AXE [SITE]

opens every page of SITE (build/site, as `make docs` builds it); fails if axe-core finds anything, or if a page logs an
error or asks for anything outside the site. AXE and Chromium are those of pages.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import http.server
import itertools
import pathlib
import sys
import threading
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.browser.pages import SCHEMES, WIDTHS, Visit, browser  # noqa: E402


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing of what was asked for."""


@contextlib.contextmanager
def served(site: pathlib.Path) -> Iterator[str]:
    """Serves a folder; yields its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def main() -> int:
    """Looks at all pages; returns 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axe", metavar="AXE", type=pathlib.Path, help="axe.min.js")
    parser.add_argument("site", metavar="SITE", type=pathlib.Path, nargs="?", default=ROOT / "build" / "site")
    args = parser.parse_args()
    site = args.site.resolve()
    pages = sorted(page for page in site.glob("*.html") if page.name != "404.html")
    if not pages:
        sys.exit(f"no page in {site}: `make docs` builds them")
    failed = rules = 0
    with browser() as started, served(site) as address:
        for page, width, scheme in itertools.product(pages, WIDTHS, SCHEMES):
            visit = Visit(started, f"{address}{page.name}", width, scheme, own=address)
            rules += visit.check_axe(args.axe.read_text())
            visit.close()
            for wrong in visit.wrong:
                failed += 1
                print(f"{page.name} {width} {scheme}: {wrong}")
    views = len(WIDTHS) * len(SCHEMES)
    print(f"{len(pages)} pages, {views} views of each: {rules} rules of axe passed, {failed} findings")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
