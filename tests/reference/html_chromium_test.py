"""The page of `show --html` in headless chromium: nothing on the console, and not a single request to the network."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest

from tests.paths import DATA, NAMES, ROOT, checkpoint

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--disable-default-apps",
    # Browsers ask for updates of their own: nothing leaves this machine, and nobody is waited for.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=3000",
)


@absltest.skipUnless(BROWSER, "no chromium on the PATH")
class ChromiumTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def page(self, source):
        path = self.folder / "page.html"
        command = [sys.executable, ROOT / "tools" / "show.py", source, "--html", path, "--force"]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        return path

    def browse(self, path):
        """Returns the page's elements as chromium has them, the console's lines, and what was asked of the network."""
        log = self.folder / "net.json"
        command = [BROWSER, *FLAGS, f"--user-data-dir={tempfile.mkdtemp(dir=self.folder)}"]
        command += [f"--log-net-log={log}", "--dump-dom", path.as_uri()]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=True)
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        recorded = json.loads(log.read_text())
        begun = recorded["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
        asked = [event.get("params", {}) for event in recorded["events"] if event["type"] == begun]
        # The end of a request carries no URL; what the browser asks for by itself has no page as its origin.
        pages = [params["url"] for params in asked if params.get("initiator", "not an origin") != "not an origin"]
        return done.stdout, console, pages

    def test_pages_open_without_network_and_without_a_word_on_the_console(self):
        for source in (checkpoint(NAMES[0]), DATA / "apr" / "tiny_f32_tied-int4.apr"):
            path = self.page(source)
            dom, console, asked = self.browse(path)
            self.assertEmpty(console)
            self.assertEmpty(asked)
            self.assertIn("model.embed_tokens.weight", dom)
            self.assertGreaterEqual(dom.count("<svg"), 25)

    def test_scripts_in_names_and_metadata_do_not_run(self):
        run = "document.title='owned';console.log('owned');fetch('http://127.0.0.1:9/')"
        evil = [
            f"<script>{run}</script>",
            f'"><img src=x onerror="{run}">',
            f"'-{run}-'",
            f"</script><svg onload={run}>",
            "\u2039b\u203a&lt;b",
        ]
        names = {
            name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]} for n, name in enumerate(evil)
        }
        header = json.dumps({"__metadata__": {name: name for name in evil}, **names}).encode()
        model = self.folder / "<img src=x onerror=alert(1)>"
        model.mkdir()
        (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4 * len(evil)))
        config = json.loads((checkpoint(NAMES[0]) / "config.json").read_bytes())
        (model / "config.json").write_text(json.dumps({**config, "_name_or_path": evil[0], "architectures": [evil[1]]}))
        dom, console, asked = self.browse(self.page(model))
        self.assertEmpty(console)
        self.assertEmpty(asked)
        self.assertNotIn("<title>owned", dom)
        self.assertIn("&lt;script&gt;document.title='owned'", dom, "the names are shown")
        self.assertEqual(dom.count("<img"), 0)

    def test_a_page_that_asks_for_something_is_noticed(self):
        path = self.page(checkpoint(NAMES[0]))
        text = path.read_text()
        path.write_text(text.replace("<h1>", '<img src="http://127.0.0.1:9/x.png"><h1>'))
        _, console, _ = self.browse(path)
        self.assertNotEmpty(console, "the content security policy does not speak")
        policy = text[text.index("<meta http-equiv") : text.index("<title>")]
        path.write_text(text.replace(policy, "").replace("<h1>", '<img src="http://127.0.0.1:9/x.png"><h1>'))
        _, _, asked = self.browse(path)
        self.assertIn("http://127.0.0.1:9/x.png", asked)


if __name__ == "__main__":
    absltest.main()
