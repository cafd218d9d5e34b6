"""What all our HTML pages share: one self-contained file, its look, and how text from strangers gets into it.

Nothing comes from elsewhere (a content security policy in the page forbids it), so that a page can be mailed, archived
and opened without a network. A script runs only if its hash is in that policy.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable

from apr_jax.converters.errors import printable
from apr_jax.converters.storage import output
from apr_jax.converters.storage.temporaries import Notice


def text(value: object) -> str:
    """Returns a value as HTML text: control and bidirectional characters shown as escapes, markup disarmed."""
    return html.escape(printable(str(value)))


def document(title: str, body: str, style: str = "", script: str = "") -> bytes:
    """Returns a page as UTF-8.

    Args:
      title: Plain text; escaped here.
      body: HTML.
      style: CSS behind what all pages have.
      script: JavaScript that runs once the page is there; "" is none.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    parts = (
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        f"<title>{text(title)}</title>",
        f"<style>{STYLE}{style}</style>",
        "</head>",
        "<body>",
        "<main>",
        body,
        "</main>",
        *([f"<script>{script}</script>"] if script else []),
        "</body>",
        "</html>",
        "",
    )
    return "\n".join(parts).encode("utf-8", "backslashreplace")


def scrollable(content: str, label: str, kind: str = "scroll") -> str:
    """Returns what may be wider than a phone in a box that scrolls by touch and, once focused, by arrow keys."""
    return f'<div class="{kind}" role="region" aria-label="{text(label)}" tabindex="0">{content}</div>'


def write(path: str, content: bytes, *, force: bool, sources: Iterable[str], notice: Notice | None = None) -> None:
    """Writes a page, whole or not at all.

    Args:
      path: Where to.
      content: What `document` returned.
      force: Whether an existing file may be replaced.
      sources: Files that the page is about; none of them is replaced.
      notice: As for `output.atomic_file`.

    Raises:
      UsageError, MissingFileError: As `output.check_target`.
      StorageError: The operating system refused.
    """
    with output.atomic_file(path, len(content), force=force, sources=sources, notice=notice) as file:
        file.write_at(content, 0)


STYLE = """
:root{color-scheme:light dark;--bg:#fbfbf9;--fg:#1d2329;--dim:#56606a;--line:#dcdfe2;--card:#fff;--bar:#2c6fbb;
--band:#f2c14e55;--bad:#b3261e;--badbg:#fbe9e7;--note:#7a4f00;--notebg:#fdf3dc;--ok:#1e6b3a;--okbg:#e5f4ea;
--offbg:#eceef0;--hover:#f1f4f8;--focus:#0b57d0}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14181c;--fg:#e3e7ea;--dim:#a3adb7;--line:#2e353c;
--card:#1b2026;--bar:#74ace8;--band:#e0a83040;--bad:#ff8a80;--badbg:#4a1f1c;--note:#f3c969;--notebg:#40330f;--ok:#7fd3a0;
--okbg:#16351f;--offbg:#2a3037;--hover:#222931;--focus:#9cc4ff}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1560px;padding:24px 28px 48px;background:var(--bg);color:var(--fg);
font:14px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
h1{margin:0;font-size:24px;overflow-wrap:anywhere}
h2{margin:0 0 6px;font-size:16px}
p{margin:0}
.path{color:var(--dim);overflow-wrap:anywhere}
.lead{margin:0 0 10px;color:var(--dim);max-width:110ch}
section{margin-top:28px;min-width:0}
.tiles{display:flex;flex-wrap:wrap;gap:10px;margin:18px 0 0}
.tiles div{padding:10px 16px;background:var(--card);border:1px solid var(--line);border-radius:8px}
.tiles dt{color:var(--dim);font-size:12px}
.tiles dd{margin:0;font-size:18px;font-weight:600;font-variant-numeric:tabular-nums}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(380px,100%),1fr));gap:12px 28px;align-items:start}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:8px}
.tall{overflow:auto;max-height:82vh}
table{border-collapse:collapse;width:100%}
th,td{padding:4px 10px;text-align:left;white-space:nowrap;border-top:1px solid var(--line);font-weight:400;
vertical-align:middle}
tr:first-child>*{border-top:0}
thead th{background:var(--card);color:var(--dim);font-size:12px;font-weight:600}
tbody tr:hover>*{background:var(--hover)}
.n{text-align:right;font-variant-numeric:tabular-nums}
.words{white-space:normal;overflow-wrap:anywhere}
sup{line-height:0;font-size:.75em}
details{margin-top:10px}
summary{cursor:pointer;color:var(--dim);margin-bottom:6px}
:focus-visible{outline:3px solid var(--focus);outline-offset:1px}
b{display:inline-block;min-width:64px;padding:1px 8px;border-radius:9px;font-size:12px;font-weight:600;
text-align:center}
.failure{color:var(--bad);background:var(--badbg)}
.note{color:var(--note);background:var(--notebg)}
.ok{color:var(--ok);background:var(--okbg)}
.skipped{color:var(--dim);background:var(--offbg)}
.bad{color:var(--bad);font-weight:600}
@media (max-width:600px){body{padding:16px 12px 32px}th,td{padding:4px 6px}}
@media print{.scroll,.tall{overflow:visible;max-height:none}body{max-width:none;padding:0;font-size:11px}
th,td{padding:1px 4px;white-space:normal;overflow-wrap:anywhere}thead th{font-size:10px}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
