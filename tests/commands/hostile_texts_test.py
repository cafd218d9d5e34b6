"""Texts in files that try to command a terminal or a browser: configurations, metadata, chat templates, dumps."""

import json
import pathlib
import shutil
import sys
import unicodedata

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest

from tests import paths, tool

SAMPLE = paths.checkpoint("gqa_tied_bf16")
# Erase, title, hyperlink, C1 controls; bidirectional marks and isolates; zero width; tags; separators of lines.
EVIL = (
    "\x1b[2J\x1b]0;t\x07\x1b]8;;http://x\x1b\\\x9b5m\x90q\x9c\b\r\x7f\u200b\u200c\u200d\u200e\u200f\u061c\u2028\u2029"
    "\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff\U000e0041<script>alert(1)</script>"
)


def unsafe(data: bytes) -> list[str]:
    """Returns the characters of an output that command a terminal or cannot be seen."""
    return [
        hex(ord(c))
        for c in data.decode()
        if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co")
    ]


class HostileTextsTest(absltest.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)
        self.model = self.folder / "model"
        shutil.copytree(SAMPLE, self.model)

    def printed(self, command: str, *args: object, codes: tuple[int, ...] = (0,)) -> str:
        done = tool.run(command, *args)
        self.assertIn(done.returncode, codes, done.stderr)
        self.assertEqual(unsafe((done.stdout + done.stderr).encode()), [])
        self.assertNotIn("Traceback", done.stderr)
        return done.stdout + done.stderr

    def written(self, name: str, **changed: object) -> None:
        path = self.model / name
        content = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps({**content, **changed}))

    def test_a_configuration_that_is_refused(self):
        self.written(
            "config.json", **{EVIL: 1, "hidden_act": EVIL, "model_type": EVIL, "rope_scaling": {"rope_type": EVIL}}
        )
        self.assertIn(r"\u202e", self.printed("generate", self.model, "--prompt", "a", codes=(5,)))
        # It is no matter of the files: verify says what it does not know and goes on.
        self.assertIn(r"\u202e", self.printed("verify", self.model))

    def test_a_configuration_that_is_kept_and_metadata(self):
        self.written("config.json", _name_or_path=EVIL, transformers_version=EVIL)
        whole = (self.model / "model.safetensors").read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header = json.dumps(
            {**json.loads(whole[8 : 8 + length]), "__metadata__": {EVIL: EVIL, "format": EVIL}}
        ).encode()
        (self.model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
        page = self.folder / "page.html"
        self.printed("show", self.model, "--html", page)
        self.assertEqual(unsafe(page.read_bytes()), [])
        self.assertNotIn(b"<script>alert", page.read_bytes())
        again = self.folder / "again.apr"
        self.printed("convert", self.model, "--to", "apr", "-o", again)
        self.printed("verify", self.model, again, "--json")
        self.printed("show", again, "--json")

    def test_a_chat_template_that_refuses(self):
        (self.model / "chat_template.jinja").write_text("{{ raise_exception(messages[0].content) }}")
        said = self.printed("generate", self.model, "--chat", EVIL.replace("\0", ""), codes=(2,))
        self.assertIn("the chat template refuses the messages", said)

    def test_a_map_of_a_dump(self):
        dump = self.folder / "dump"
        dump.mkdir()
        (dump / "dump.json").write_text(json.dumps({"stages": {EVIL: {"min": 1}}, "input_ids": [[1]]}))
        self.assertIn(r"\x1b", self.printed("parity", self.model, "--right", dump, codes=(5,)))


if __name__ == "__main__":
    absltest.main()
