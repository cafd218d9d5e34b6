"""The page of `parity --html`: it holds what the JSON holds, refers to nothing, and text keeps its place in it."""

import contextlib
import io
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.commands import parity
from apr_jax.converters.errors import UsageError
from apr_jax.parity import formulas, web_page
from apr_jax.parity.backward import replay as backward
from apr_jax.parity.faults.record import Instead, fields
from apr_jax.parity.faults.table import FAULTS
from apr_jax.parity.findings import Finding
from apr_jax.parity.replay import FORMULAS
from apr_jax.testing.sample import SAMPLES
from apr_jax.trace.inputs import seeded
from tests import html_pages, oracle, paths
from tests.battery.faulty_forward import Planted, forward, write_aprt
from tests.battery.parity_battery import REAL_CASE
from tests.commands import parity_test

SAMPLE = paths.checkpoint("gqa_tied_bf16")
CONFIG = SAMPLES["qwen2_0.5b"].config


class Page(html_pages.Page):
    """A page of parity, with the cells of its map and the rows of its tables; scripts but our own cannot run."""

    def __init__(self, text):
        if "://" in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL):
            raise AssertionError("it refers to something")
        self.cells, self.rows, self._key = {}, {}, None
        super().__init__(text)

    def check(self, tag, attributes):
        if {"src", "href", "srcset", "action", "data", "style"} & attributes.keys() or any(
            name.startswith("on") for name in attributes
        ):
            raise AssertionError(f"refers to something, or runs: {tag} {attributes}")
        if "data-said" in attributes:
            self.cells[attributes["data-said"].partition(": ")[0]] = attributes
        if tag == "tr":
            self._key = attributes.get("data-key")

    def handle_data(self, data):
        super().handle_data(data)
        if data.strip() and self._key is not None and "td" in self.open:
            self.rows.setdefault(self._key, []).append(data.strip())


class PageTest(parity_test.ParityTestCase):
    clean: dict | None = None

    def clean_answer(self):
        """The answer on a right engine, computed once."""
        if PageTest.clean is None:
            PageTest.clean, _, _ = self.both("--right", self.dump(name="plain"), code=0)
        return PageTest.clean

    def dump(self, faults=(), name="dump", **changed):
        ids = seeded(288, 1, 80).input_ids
        values = forward(*oracle.load(SAMPLE), ids, faults=faults) | changed
        write_aprt(self.folder / name, values, ids)
        return self.folder / name

    def both(self, *args, code):
        """Runs the command; returns the answer in JSON and the page."""
        path = self.folder / "page.html"
        out, _ = self.ran(SAMPLE, *args, "--json", "--html", path, "--force", code=code)
        text = path.read_text("utf-8")
        return json.loads(out), Page(text), text

    def test_the_page_of_the_four_fold_case_holds_what_the_json_holds(self):
        answer, page, text = self.both("--right", self.dump(REAL_CASE), code=1)
        self.assertLen(answer["findings"], 4)
        for finding in answer["findings"]:
            self.assertIn(finding["sentence"], page.texts)
            self.assertIn(finding["formulas"]["right"], page.texts)
            self.assertIn(finding["formulas"]["theirs"], page.texts)
            self.assertIn(web_page.number(finding["residual_before"]), page.texts)
        self.assertNotEqual({f["formulas"]["right"] for f in answer["findings"]}, set())
        self.assertEqual(page.cells.keys(), {stage["key"] for stage in answer["stages"]})
        for stage in answer["stages"]:
            numbers = [stage[name] for name in ("share", "error", "allowed", "own", "budget", "norm")]
            shown = page.rows[stage["key"]]
            self.assertEqual(shown[1:-1], [f"{number:.4g}" for number in numbers])
            self.assertIn(stage["standing"], shown[0])
            self.assertIn(f"{stage['share']:.3g} times its budget", page.cells[stage["key"]]["aria-label"])
        for name in ("cosine_min", "kl_max", "sigma_min", "cpk_mean", "spearman_mean"):
            self.assertIn(f"{answer['logits'][name]:.4g}", page.texts)
        for side in answer["sides"].values():
            for value in side.values():
                self.assertIn(value, page.texts)
        self.assertEqual(page.tags.count("svg"), 2 + len(answer["worst_stage"]["curves"]))
        self.assertEqual([cell["tabindex"] for cell in page.cells.values()].count("0"), 1)
        self.assertEqual(answer["standing"], "beyond budget")
        self.assertIn("default-src 'none'", text)

    def test_curves_show_where_it_is(self):
        """One position of one head is doubled; the error of that head and position is the whole of the stage's."""
        values = forward(*oracle.load(SAMPLE), seeded(288, 1, 80).input_ids)
        wrong = values["stage.1.attention"].copy()
        head = wrong.shape[-1] // 4
        wrong[0, 37, 2 * head : 3 * head] *= 2
        answer, _, _ = self.both("--right", self.dump(**{"stage.1.attention": wrong}), code=1)
        self.assertEqual(answer["worst_stage"]["key"], "stage.1.attention")
        curves = {curve["over"]: curve for curve in answer["worst_stage"]["curves"]}
        self.assertEqual(int(np.argmax(curves["positions"]["theirs"])), 37)
        self.assertEqual(curves["heads"]["labels"][int(np.argmax(curves["heads"]["theirs"]))], "q 2")
        self.assertIn(int(np.argmax(curves["channels"]["theirs"])) // head, [2])
        right = values["stage.1.attention"]
        expected = np.linalg.norm((wrong - right)[0, 37]) / np.linalg.norm(right[0, 37])
        self.assertAlmostEqual(curves["positions"]["theirs"][37], expected, delta=1e-4 * expected)

    def test_a_clean_page_says_so_in_three_ways(self):
        answer = self.clean_answer()
        page = Page(web_page.render(answer).decode())
        self.assertEqual((answer["verdict"], answer["findings"], answer["widened"]), ("rounding", [], {}))
        self.assertNotIn("beyond budget", [stage["standing"] for stage in answer["stages"]])
        standings = {stage["standing"] for stage in answer["stages"]}
        self.assertEqual(answer["standing"], "within budget" if "within budget" in standings else standings.pop())
        for stage in answer["stages"]:
            right = stage["error"] <= stage["allowed"]
            self.assertEqual(stage["standing"] == "as right as the dtype allows", right)
            self.assertGreaterEqual(stage["allowed"], stage["own"] * 0.999)
        self.assertIn("✓ rounding", page.texts)

    def test_a_widened_budget_is_said_everywhere_and_passes_no_nan(self):
        slightly = Planted("rms-norm-eps", None, {"eps": 1.1e-6})
        dump = self.dump([slightly])
        answer, page, _ = self.both("--right", dump, "--budget", "1e6", "--budget", "logits=2", code=0)
        self.assertEqual((answer["widened"]["attn_norm"], answer["widened"]["logits"]), (1e6, 2.0))
        self.assertIn("! Budgets were changed by hand.", page.texts)
        # Its budget is exceeded, and what is exceeded is said in text as well.
        self.assertGreater(max(stage["error"] / stage["budget"] for stage in answer["stages"] if stage["budget"]), 1.0)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            parity._print(answer)
        self.assertIn("budgets applied 1e+06 times for most stages and 2 times for logits", out.getvalue())
        values = forward(*oracle.load(SAMPLE), seeded(288, 1, 80).input_ids)
        bad = values["stage.0.ffn_out"].copy()
        bad[0, 3, 4] = np.nan
        answer, page, _ = self.both(
            "--right", self.dump((), "nan", **{"stage.0.ffn_out": bad}), "--budget", "1e9", code=1
        )
        self.assertEqual(answer["findings"][0]["fault"], "non-finite")
        (stage,) = (stage for stage in answer["stages"] if stage["key"] == "stage.0.ffn_out")
        self.assertEqual((stage["standing"], stage["error"], stage["finite"]), ("beyond budget", None, False))
        self.assertIn("not finite", page.rows["stage.0.ffn_out"])

    @parameterized.parameters("0", "-1", "nan", "inf", "x", "no_stage=2", "logits=", "=2")
    def test_a_budget_that_is_none_is_refused(self, text):
        with self.assertRaisesRegex(UsageError, "--budget"):
            parity.parse(["parity.py", "model", "--right", "dump", "--budget", text])

    def test_a_page_is_replaced_only_with_force_and_never_the_dump(self):
        page = self.folder / "page.html"
        page.write_text("mine")
        dump = self.dump()
        _, err = self.ran(SAMPLE, "--right", dump, "--html", page, code=2)
        self.assertIn("exists", err)
        self.assertEqual(page.read_text(), "mine")
        source = dump / "token_ids.json"
        before = source.read_bytes()
        self.ran(SAMPLE, "--right", dump, "--html", source, "--force", code=2)
        self.assertEqual(source.read_bytes(), before)

    def test_text_from_strangers_cannot_leave_its_place(self):
        hostile = "</title><script>alert(1)</script>\x1b[2J\u202e\"><img src=x onerror=y> '--><svg/onload=z>{{ 7*7 }}"
        answer = self.clean_answer()
        page = Page(web_page.render(answer).decode())
        finding = {
            "fault": hostile,
            "layers": [0],
            "stage": hostile,
            "parameters": {hostile: [hostile]},
            "residual_before": 1.0,
            "residual_after": None,
            "alternatives": [hostile],
            "certainty": "certain",
            "sentence": hostile,
            "cannot_show": [hostile],
            "formulas": {"stage": hostile, "right": hostile, "theirs": hostile},
        }
        logits = answer["logits"] | {"worst_text": hostile, "worst_input_text": hostile}
        sides = {side: values | {hostile: hostile} for side, values in answer["sides"].items()}
        changed = {"findings": [finding], "notes": [hostile], "unexamined": [hostile], "logits": logits, "sides": sides}
        made = web_page.render(answer | changed).decode()
        other = Page(made)
        self.assertGreater(sum(text.count("alert(1)") for text in other.texts), 10)
        self.assertEqual(other.tags.count("script"), page.tags.count("script"))
        self.assertEqual(other.tags.count("img"), 0)
        self.assertEmpty({"\x1b", "\u202e"} & set(made))
        self.assertIn("\\x1b[2J\\u202e", made)

    def test_numbers_that_are_not_finite_are_said_to_be_so(self):
        answer = self.clean_answer()

        def without(value):
            if isinstance(value, dict):
                return {name: without(item) for name, item in value.items()}
            if isinstance(value, list):
                return list(map(without, value))
            return None if isinstance(value, float) else value

        page = Page(web_page.render(without(answer)).decode())
        self.assertGreater(page.texts.count("not finite"), 37 * 5)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            parity._print(without(answer))
        self.assertIn("cosine not finite or more", out.getvalue())

    def test_a_dump_of_numbers_has_a_page_too(self):
        from apr_jax.parity.summaries import numbers

        ids = seeded(288, 1, 80).input_ids
        values = forward(*oracle.load(SAMPLE), ids, faults=[Planted("rope-theta", None, {"theta": 1e4})])
        folder = self.folder / "numbers"
        folder.mkdir()
        entries = {key: {k: v for k, v in numbers(value).items() if k != "sum"} for key, value in values.items()}
        (folder / "dump.json").write_text(json.dumps({"input_ids": ids.tolist(), "stages": entries}))
        answer, page, _ = self.both("--right", folder, code=1)
        self.assertEqual(answer["first"][0]["key"], "stage.0.q_post_rope")
        self.assertIn("The first stage that differs", page.texts)
        for one in answer["first"]:
            self.assertIn(f"{one['theirs']:.4g}", page.texts)


class FormulasTest(parameterized.TestCase):
    def test_every_stage_has_its_formula_once(self):
        self.assertEqual(formulas.RIGHT.keys(), FORMULAS.keys())
        self.assertEqual(formulas.BACKWARD.keys(), backward.FORMULAS.keys() | backward.PARAMETERS.keys())

    @parameterized.parameters([name for name, f in FAULTS.items() if not f.unexplained and f.mistake])
    def test_a_mistake_has_another_formula_than_the_right_one(self, name):
        fault = FAULTS[name]
        forms = fault.formula
        forms = {"": forms} if isinstance(forms, str) else forms
        forms = list(forms.values()) if isinstance(forms, dict) else list(forms)
        self.assertNotEmpty(list(filter(None, forms)))
        known = {"right", "rms_norm_eps", "head_dim", "num_kv_heads", "group"}.union(*map(fields, fault.wordings))
        self.assertLessEqual(set().union(*map(fields, forms)), known)
        parameters = {field: 3 for wording in fault.wordings[:1] for field in fields(wording) if field != "be"}
        # What is seen behind a gap is made before it.
        stage = "post_ffn_residual"
        finding = Finding(name, "all", stage, parameters, 1.0, None, (), "certain", "")
        pair = formulas.pair(finding, CONFIG)
        self.assertNotEqual(pair.right, pair.theirs)
        self.assertNotRegex(pair.right + pair.theirs, r"[{}]")
        self.assertEqual(pair.stage == "", isinstance(fault.formula, Instead))


if __name__ == "__main__":
    absltest.main()
