"""The table of faults: every mistake is one record in it, and all else follows."""

import dataclasses
import pathlib
import re
import sys
import types
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.model.qwen2 import OPS, at_least_float32
from apr_jax.parity import round_numbers
from apr_jax.parity.backward import replay as backward_replay
from apr_jax.parity.faults import table
from apr_jax.parity.faults.outside import LAYOUT
from apr_jax.parity.faults.record import Fault, Grid
from apr_jax.parity.faults.table import BACKWARD, FAULTS
from apr_jax.parity.replay import FORMULAS, NORMS
from tests.battery import backward_engine, faulty_forward
from tests.battery.parity_battery import Bench
from tests.paths import ROOT

BACKWARD_FORMULAS = {**backward_replay.FORMULAS, **backward_replay.PARAMETERS}
INVISIBLE = {"norm-weight-before-cast"}
"""What the engine of the battery can do and no dump in float32 shows: in bfloat16 it is below every budget."""


class TableTest(parameterized.TestCase):
    def test_it_holds_what_the_engine_of_the_battery_can_plant(self):
        made = {name for name, fault in FAULTS.items() if not fault.unexplained and name not in BACKWARD} - {
            "upload",
            "rank-order",
            "all-reduce-missing",
            "ranks-apart",
        }
        self.assertEqual(made, set(faulty_forward.FAULTS) - INVISIBLE)
        self.assertEqual(set(BACKWARD), set(backward_engine.FAULTS))

    def test_the_docs_list_it(self):
        self.assertEqual((ROOT / "docs" / "faults.md").read_text(), table.listing() + "\n", "run `make fault-list`")

    def test_a_name_stands_in_the_table_and_nowhere_else_in_the_program(self):
        names = [name for name in FAULTS if "-" in name]
        found = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in names))
        for path in sorted((ROOT / "apr_jax").rglob("*.py")):
            # Losses and steps of an optimizer are judged in rooms of their own: the same mistakes have the same names.
            if not {"faults", "loss", "optimizer"} & set(path.parts):
                self.assertIsNone(found.search(path.read_text()), path)

    @parameterized.parameters(list(FAULTS))
    def test_every_change_is_to_a_step_of_a_stage_that_it_names(self, name):
        backward = name in BACKWARD
        path, stages = ("backward/replay.py", BACKWARD_FORMULAS) if backward else ("replay.py", FORMULAS)
        source = (ROOT / "apr_jax" / "parity" / path).read_text()
        fault = FAULTS[name]
        for step in fault.changes:
            self.assertIn(f'.step("{step}"', source)
        if not callable(fault.stages):
            self.assertLessEqual(set(fault.stages), set(stages))
        self.assertEqual(bool(fault.changes), bool(fault.stages), "what is made somewhere changes something")

    def test_a_wording_says_every_number_that_is_found(self):
        self.assertEqual(FAULTS["rope-theta"].said({"theta": 1e4}), "the RoPE base is 10000")
        self.assertEqual(FAULTS["rope-position"].said({"restart": 32}), "positions restart every 32")
        self.assertEqual(FAULTS["rope-position"].said({"shift": 3}), "positions are shifted by +3")
        long = FAULTS["weights-quantised"].said({"codec": "int8", "tensor": ["a", "b", "c", "d"]})
        self.assertEqual(long, "quantised (int8): 4 of them (a, ...)")
        self.assertFalse(LAYOUT.mistake)


class OneRecordTest(parameterized.TestCase):
    """What adding a mistake takes: one record, with one formula."""

    FOLDED = Fault(
        "norm-folded",
        "the norms lose their sign",
        tuple(NORMS),
        {"normed": lambda y, at: np.abs(y)},
    )
    RAISED = Fault(
        "silu-raised",
        "silu is raised by {offset:.3g}",
        ("ffn_silu",),
        {"activation": lambda silu, at, offset: lambda x: silu(x) + offset},
        solve=lambda question: [(OneRecordTest.RAISED.made(offset=OneRecordTest.offset(question)),)],
        grid=Grid("offset", (0.1, 0.2, 0.4, 0.6, 0.8, 1.0), round_numbers.near),
    )

    @staticmethod
    def offset(question):
        theirs, right = (x[question.tokens].astype(np.float64) for x in (question.theirs, question.right))
        return round(float((theirs - right).mean()), 3)

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.bench = Bench.of("gqa_tied_bf16")

    def dump(self, **ops):
        trace = self.bench.same.with_ops(dataclasses.replace(OPS, **ops)).trace(self.bench.inputs)
        return {key: np.asarray(value) for key, value in trace.items()}

    def findings(self, fault, dump):
        with mock.patch.dict(FAULTS, {fault.name: fault}):
            return self.bench.diagnose(dump).findings

    def folded(self):
        return self.dump(rms_norm=lambda x, weight, eps: jnp.abs(OPS.rms_norm(x, weight, eps)))

    def raised(self, offset):
        return self.dump(activation=lambda x: jnp.asarray(offset, x.dtype) + OPS.activation(at_least_float32(x)))

    def test_it_is_generated_named_and_worded(self):
        (finding,) = self.findings(self.FOLDED, self.folded())
        self.assertEqual((finding.fault, finding.layers, finding.certainty), ("norm-folded", "all", "certain"))
        self.assertIn("all layers, attn_norm: the norms lose their sign", finding.sentence)

    def test_without_its_record_it_is_unknown(self):
        self.assertEqual({finding.fault for finding in self.bench.diagnose(self.folded()).findings}, {"unknown"})

    def test_its_number_is_solved_for_where_the_stage_was_dumped_and_behind_a_gap(self):
        dump = self.raised(0.75)
        without = {key: value for key, value in dump.items() if not key.endswith(("ffn_silu", "ffn_swigl"))}
        for shown, stage in ((dump, "ffn_silu"), (without, "ffn_out")):
            (finding,) = self.findings(self.RAISED, shown)
            self.assertEqual((finding.fault, finding.layers, finding.stage), ("silu-raised", "all", stage))
            self.assertAlmostEqual(finding.parameters["offset"], 0.75, places=3)
            self.assertIn("silu is raised by 0.75", finding.sentence)

    def test_it_is_listed(self):
        family = types.ModuleType("apr_jax.parity.faults.new")
        family.FAULTS = (self.FOLDED,)
        with mock.patch.dict(table.FAMILIES, {"New": family}):
            self.assertIn(
                "| `norm-folded` | attn_norm, ffn_norm, final_norm | the norms lose their sign |", table.listing()
            )


if __name__ == "__main__":
    absltest.main()
