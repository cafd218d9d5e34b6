"""Findings in words."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.verify.diagnosis.causes import CAUSES
from apr_jax.converters.verify.findings import Finding

# A name of several lines in a file must not become several lines of a report, so sentences are one line; and they hold
# what decides: which types, which way, how much.
SAID = (
    ("exact-cast", {"from": "bf16", "to": "f32"}, "cast from bf16 to f32, every value exactly: no difference"),
    ("exact-cast", {"from": "q4_k", "to": "q4_k"}, "other q4_k bytes with the same values"),
    ("merged-adapter", {"rank": 8, "type": "bf16"}, "the adapter (rank 8) added to A, rounded to bf16: no difference"),
    (
        "relabelled-dtype",
        {"from": "bf16", "to": "f16", "values_converted": False},
        "bf16 bytes tagged f16: the bytes are the original's, the dtype is wrong",
    ),
    (
        "relabelled-dtype",
        {"from": "bf16", "to": "f16", "values_converted": True, "stored": "f32"},
        "bf16 bytes were read as f16, and the wrong values stored as f32",
    ),
    (
        "rounded-cast",
        {"from": "f32", "to": "bf16", "rounding": "truncated"},
        "rounded from f32 to bf16, by cutting bits off",
    ),
    (
        "rounded-cast",
        {"from": "f32", "to": "f32", "rounding": "nearest-even", "through": "f16"},
        "rounded from f32 through f16 to f32, to nearest, ties to even",
    ),
    ("byte-swapped", {"element_bytes": 2}, "the 2 bytes of every element are in the other order (big-endian)"),
    ("transposed", {"data": "transposed", "shape": "kept"}, "transposed, under the original shape"),
    ("transposed", {"data": "transposed", "shape": "swapped"}, "transposed, shape and data"),
    ("transposed", {"data": "unchanged", "shape": "swapped"}, "the bytes are the original's, under another shape"),
    ("rows-permuted", {"permutation": "reversed"}, "rows in another order: reversed"),
    ("columns-permuted", {"permutation": "rotated by 3"}, "columns in another order: rotated by 3"),
    (
        "head-permuted",
        {"convention": "split-half to adjacent-pair", "head_dim": 64},
        "rows of each head of 64 went from split-half to adjacent-pair order (the other RoPE convention)",
    ),
    ("head-permuted", {"heads": "reversed", "head_dim": 64}, "heads of 64 are in another order: reversed"),
    ("qkv-order", {"from": "separate", "to": "q,k,v"}, "q, k and v were fused, laid out as q,k,v"),
    ("qkv-order", {"from": "q,k,v", "to": "separate"}, "a fused q, k, v (q,k,v) was split"),
    ("qkv-order", {"from": "q,k,v", "to": "k,q,v"}, "fused q, k, v are laid out as k,q,v in place of q,k,v"),
    (
        "qkv-order",
        {"order": "k,q,v", "rows": {"q": [0, 64]}},
        "cut out of a fused q, k, v (k,q,v) at the wrong place: q holds rows 0 to 63",
    ),
    (
        "qkv-order",
        {"order": "q,k,v", "cut_as": "k,q,v"},
        "q, k and v were put together as q,k,v and cut up as k,q,v",
    ),
    (
        "shifted",
        {"by": 1, "unit": "rows", "from": 64, "fill": "zero"},
        "everything stands 1 row later than in the original, from",
    ),
    (
        "swapped-tensors",
        {"exchanged": ["mlp.gate_proj.weight", "mlp.up_proj.weight"]},
        "mlp.gate_proj.weight and mlp.up_proj.weight are exchanged",
    ),
    ("swapped-tensors", {"exchanged_layers": [0, 3]}, "layers 0 and 3 are exchanged"),
    ("swapped-tensors", {"layer": 1, "copy_of_layer": 0}, "a copy of layer 0 in place of layer 1"),
    ("swapped-tensors", {"copy_of": "x"}, "a copy of x"),
    ("shifted", {"by": 1, "unit": "rows", "fill": "zero"}, "everything stands 1 row later than in the original; the"),
    ("shifted", {"by": -3, "unit": "bytes", "fill": "wrapped"}, "everything stands 3 bytes earlier than in the"),
    ("shifted", {"by": 1, "unit": "elements a row"}, "rows were read with a stride that is 1 too long"),
    (
        "shifted",
        {"rows_filled_up_to_multiples_of": 256},
        "rows padded with zeros to multiples of 256 (as in Q4_K) were",
    ),
    ("truncated", {"zero_elements": 7}, "cut off: the last 7 elements are zero"),
    ("truncated", {"zero_elements": 1}, "cut off: the last element is zero"),
    ("truncated", {"zero_elements": 6, "zero_bytes": 13}, "cut off: the last 13 bytes are zero"),
    ("zeroed", {"elements": "all"}, "all zero"),
    ("zeroed", {"elements": 3, "first": 0}, "3 elements are zero, the others are right"),
    ("zeroed-rows", {"axis": 0, "rows": 3, "ranges": [[1, 2], [5, 5]]}, "3 rows zero (1-2, 5)"),
    ("zeroed-rows", {"axis": 1, "rows": 1, "ranges": [[4, 4]]}, "1 column zero (4)"),
    ("zeroed-rows", {"axis": 0, "rows": 30, "ranges": [[1, 2], [5, 5]]}, "30 rows zero (1-2, 5, ...)"),
    ("scaled", {"factor": 0.125}, "multiplied by 0.125"),
    ("offset", {"constant": 1.0}, "+1 added to every element"),
    ("quantised", {"type": "q4_k"}, "quantised to q4_k"),
    ("quantised", {"type": "q4_k", "padding": "read as values"}, "quantised to q4_k, and the values that pad each row"),
    ("quantised", {"type": "nf4", "group": 64}, "quantised to nf4 (bitsandbytes' NormalFloat), in groups of 64"),
    (
        "quantised",
        {"type": "fp8_e4m3", "group": "row"},
        "quantised to fp8_e4m3 (8 bits, 3 of them fraction), with",
    ),
    (
        "quantised",
        {"type": "int4", "scheme": "asymmetric", "group": 32},
        "quantised to int4 asymmetric, in groups of 32",
    ),
    (
        "quantised",
        {"type": "unknown grid", "values": 16, "group": 64},
        "quantised to a grid of no known type: at most 16 values in each group of 64 along the row",
    ),
    ("mantissa-cut", {"bits": 4, "rounding": "truncated"}, "mantissa cut to 4 bits"),
    ("mantissa-cut", {"bits": 4, "rounding": "nearest-even"}, "mantissa rounded (to nearest, ties to even) to 4 bits"),
    ("zero-signs", {"elements": 3}, "3 zeros have the other sign; every value is the same"),
    (
        "rows-added",
        {"first": [288, 64], "rows": 8, "holds": "zeros"},
        "the first 288 x 64 equal, 8 rows added, which hold zeros",
    ),
    ("rows-removed", {"first": [250, 64], "rows": 1}, "the first 250 x 64 equal, 1 row removed"),
    (
        "rows-removed",
        {"rows": 3, "ranges": [[3, 4], [100, 100]]},
        "3 rows left out, the others are equal and in order",
    ),
    (
        "columns-added",
        {"first": [64, 160], "columns": 32, "holds": "zeros", "relative_l2": 0.01},
        "the first 64 x 160 near the original (relative L2 0.01), 32 columns added, which hold zeros",
    ),
    ("columns-removed", {"first": [64, 100], "columns": 60}, "the first 64 x 100 equal, 60 columns removed"),
    (
        "heads-repeated",
        {"times": 2, "head_dim": 16, "order": "each beside itself"},
        "every head of 16 repeated 2 times, each beside itself",
    ),
    (
        "scaled-rows",
        {"axis": 0, "rows": 1, "ranges": [[17, 17]], "factor": 0.85},
        "1 row multiplied by 0.85 (17), the others are equal",
    ),
    ("changed-rows", {"axis": 1, "rows": 2, "ranges": [[3, 4]]}, "2 columns changed (3-4), the others are equal"),
    (
        "rescaled-channels",
        {"from": "input_layernorm", "into": ["q_proj", "k_proj"], "function": "unchanged"},
        "factors of channels moved from input_layernorm into q_proj, k_proj: the function is the same",
    ),
    (
        "rescaled-channels",
        {"moves": [{"from": "norm", "into": ["up"]}, {"from": "up", "into": ["down"]}], "function": "unchanged"},
        "factors of channels moved from norm into up, and from up into down: the function is the same",
    ),
    (
        "rescaled-channels",
        {"axis": "both", "function": "changed"},
        "each row and each column multiplied by a factor of its own; no",
    ),
    (
        "rescaled-channels",
        {"axis": 1, "function": "changed"},
        "each column multiplied by a factor of its own; no",
    ),
    ("low-rank", {"rank": 4}, "a change of rank 4, as merging an adapter (LoRA) makes it"),
    (
        "low-rank",
        {"rank": 1, "removes": "one direction of the output"},
        "a change of rank 1, which takes one",
    ),
    ("non-finite", {"nan": 2, "-inf": 1, "first": [0, 3]}, "2 NaN and 1 -inf where the original has numbers, first at"),
    ("bit-flips", {"bits": [14], "flips": 1, "at": [[0, 3]]}, "bit 14 flipped in one element, at [0, 3]"),
    ("bit-flips", {"bits": [1, 9], "flips": 20}, "bit 1, 9 flipped in each of 20 elements"),
    ("different-weights", {"kind": "fine-tuned"}, "different weights, near the original: fine-tuned, or otherwise"),
    ("different-weights", {"kind": "replaced"}, "different weights, without relation to the original"),
    ("different-weights", {"kind": "from zero"}, "different weights: the original is all zero, these were trained"),
    ("different-weights", {}, "different weights: no known damage explains them"),
)


class SentenceTest(parameterized.TestCase):
    @parameterized.parameters(*SAID)
    def test_says_what_happened_in_one_line(self, cause, parameters, words):
        said = Finding(cause, ("x",), parameters, 1.0).sentence
        self.assertTrue(said.startswith(f"x: {words}"), said)
        self.assertNotIn("\n", said)

    def test_every_cause_has_words_of_its_own(self):
        self.assertEqual({cause for cause, _, _ in SAID}, set(CAUSES))

    def test_several_tensors_are_counted_and_doubts_are_said(self):
        said = Finding("zeroed", ("x", "y"), {"elements": "all"}, 0.97512, ("scaled", "truncated")).sentence
        explained = "this explains 97.51 % of the differing elements"
        self.assertEqual(said, f"2 tensors: all zero; {explained}; it might as well be scaled or truncated")

    def test_unknown_causes_and_parameters_still_get_their_line(self):
        self.assertEqual(Finding("moved", ("x",), {"by": 2}, 1.0).sentence, "x: moved (by 2)")
        self.assertEqual(Finding("scaled", ("x",), {"by": 2}, 1.0).sentence, "x: scaled (by 2)")


if __name__ == "__main__":
    absltest.main()
