"""What people really hold beside an original: whole checkpoints, and what `verify A B` has to say about them.

The cases are those of public reports, rebuilt small, and others of their kinds. What is done to the weights is done by
formulas of this file and of tests/battery/quantisers.py, which share nothing with the search for causes.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.verify.comparison import Comparison, compare
from apr_jax.converters.verify.diagnosis import column_groups, grids
from apr_jax.converters.verify.findings import Finding
from tests.battery import damage_battery, quantisers
from tests.battery.damage_battery import HEAD_DIM, Stored, Tensors, base, from_bits, stored, write

EMBEDDING = "model.embed_tokens.weight"
Q0, K0, V0 = (f"model.layers.0.self_attn.{role}_proj.weight" for role in "qkv")


def projections(tensors: Tensors) -> list[str]:
    return [name for name in tensors if "_proj.weight" in name]


class FieldTestCase(parameterized.TestCase):
    def verified(self, before: Tensors, changed: Tensors) -> Comparison:
        """Compares a checkpoint with what some of its tensors became."""
        folder = pathlib.Path(self.create_tempdir().full_path)
        write(folder / "a", before)
        write(folder / "b", before | changed)
        with open_checkpoint(folder / "a") as a, open_checkpoint(folder / "b") as b:
            return compare(a, b)

    def only(self, before: Tensors, changed: Tensors) -> Finding:
        """Returns the one finding, which is about all that was changed and nothing else."""
        found = self.verified(before, changed)
        self.assertLen(found.findings, 1, [finding.sentence for finding in found.findings])
        self.assertCountEqual(found.findings[0].tensors, changed)
        return found.findings[0]


class QuantisedTest(FieldTestCase):
    """Every projection through a codec: one finding, with the codec and its groups."""

    def through(self, quantiser, group, code="BF16", target=None):
        before = base(code)
        changed = {
            name: stored(quantisers.grouped(before[name].f32, group, quantiser), target or code)
            for name in projections(before)
        }
        finding = self.only(before, changed)
        self.assertEqual(finding.cause, "quantised")
        self.assertGreater(finding.explained, 0.99)
        self.assertEqual(finding.alternatives, ())
        return finding.parameters

    @parameterized.parameters(("BF16", 64), ("F32", 32), ("F16", 32))
    def test_field_nf4(self, code, group):
        """FIELD verify: projections through NF4 in groups of 32 or 64 -> quantised to nf4, that group"""
        parameters = self.through(quantisers.codes_of_absmax(quantisers.NF4), group, code)
        self.assertEqual(parameters, {"type": "nf4", "group": group})

    def test_field_nf4_with_quantised_scales(self):
        """FIELD verify: projections through NF4 with double quantisation -> quantised to nf4, group 64"""
        parameters = self.through(quantisers.codes_of_absmax(quantisers.NF4, double=True), 64)
        self.assertEqual(parameters, {"type": "nf4", "group": 64})

    def test_field_fp4(self):
        """FIELD verify: projections through bitsandbytes' FP4 -> quantised to fp4, group 64"""
        self.assertEqual(self.through(quantisers.codes_of_absmax(quantisers.FP4), 64), {"type": "fp4", "group": 64})

    @parameterized.parameters(
        ("e4m3", "row", "BF16"), ("e4m3", "tensor", "BF16"), ("e5m2", "row", "F32"), ("e5m2", "tensor", "BF16")
    )
    def test_field_fp8(self, name, group, code):
        """FIELD verify: projections through FP8, a scale per row or per tensor -> that type and that scale"""
        parameters = self.through(quantisers.float8(name), group, code)
        self.assertEqual(parameters, {"type": f"fp8_{name}", "group": group})

    @parameterized.parameters((4, 32, "BF16"), (4, 64, "BF16"), (3, 64, "BF16"), (4, 32, "F32"))
    def test_field_asymmetric_integers(self, bits, group, code):
        """FIELD verify: projections through int4 or int3 with zero points (AWQ-like) -> int4 asymmetric, that group"""
        parameters = self.through(quantisers.asymmetric(bits), group, code)
        self.assertEqual(parameters, {"type": f"int{bits}", "scheme": "asymmetric", "group": group})

    @parameterized.parameters("BF16", "F32")
    def test_field_real_zeros(self, code):
        """FIELD verify: projections through int4 from the smallest value up (HQQ-like) -> int4 asymmetric, group 64"""
        parameters = self.through(quantisers.real_zero(4), 64, code)
        self.assertEqual(parameters, {"type": "int4", "scheme": "asymmetric", "group": 64})

    @parameterized.parameters((4, "BF16"), (4, "F32"), (3, "BF16"), (8, "BF16"))
    def test_field_symmetric_integers(self, bits, code):
        """FIELD verify: projections through symmetric int4, int3 or int8 in groups of 64 -> symmetric, group 64"""
        parameters = self.through(quantisers.symmetric(bits), 64, code)
        self.assertEqual(parameters, {"type": f"int{bits}", "scheme": "symmetric", "group": 64})

    @parameterized.parameters("BF16", "F32")
    def test_field_int8_rows(self, code):
        """FIELD verify: projections through int8 with a scale per row -> int8 symmetric, per row"""
        parameters = self.through(quantisers.symmetric(8), "row", code)
        self.assertEqual(parameters, {"type": "int8", "scheme": "symmetric", "group": "row"})

    def test_field_int8_tensor_is_what_apr_calls_q8(self):
        """FIELD verify: projections through int8 with a scale per tensor -> int8, one scale (apr's q8 is that)"""
        before = base("BF16")
        changed = {
            name: stored(quantisers.grouped(before[name].f32, "tensor", quantisers.symmetric(8)), "BF16")
            for name in projections(before)
        }
        finding = self.only(before, changed)
        self.assertIn("int8 with one scale for the tensor", finding.sentence)

    @parameterized.parameters("mxfp4", "nvfp4")
    def test_field_microscaling(self, name):
        """FIELD verify: projections through MXFP4 or NVFP4 -> quantised to it, and to no other 4 bits"""
        size, quantiser = quantisers.FIXED[name]
        self.assertEqual(self.through(quantiser, size), {"type": name})

    def test_field_a_grid_that_nobody_knows(self):
        """FIELD verify: at most 16 values per group of 64 along the row, on no known grid -> said so"""
        parameters = self.through(quantisers.unknown(16), 64)
        self.assertEqual(parameters, {"type": "unknown grid", "values": 16, "group": 64})

    def test_field_gptq(self):
        """FIELD verify: int4 whose values are not the nearest to the original (GPTQ) -> int4 symmetric, group 64"""
        before = base("BF16")
        changed = {
            name: stored(quantisers.compensated(4, 64)(before[name].f32), "BF16")
            for name in projections(before)
            if before[name].shape[1] == 64
        }
        parameters = {"type": "int4", "scheme": "symmetric", "group": 64}
        self.assertEqual(self.only(before, changed).parameters, parameters)

    @parameterized.product(bits=(4, 8), code=("F32", "F16"), scheme=("symmetric", "asymmetric"))
    def test_field_act_order(self, bits, code, scheme):
        """FIELD verify: int4 and int8 by GPTQ with act-order, dense -> that type, group 64, columns no neighbours"""
        before = damage_battery.wide_trained(code)
        quantiser = getattr(quantisers, scheme)(bits)
        wanted = {"type": f"int{bits}", "scheme": scheme}
        changed = {}
        for name in before:
            changed |= damage_battery.in_any_order(quantiser, 64, wanted)(before, name).changed
        finding = self.only(before, changed)
        self.assertEqual(finding.parameters, wanted | {"group": 64, "order": "act-order"})
        self.assertIn("in groups of 64 columns, which are no neighbours (act-order)", finding.sentence)

    def test_columns_that_share_no_scale_are_no_groups(self):
        values = np.random.default_rng(0).normal(0, 0.02, (96, 512))
        for name in ("f32", "bf16"):
            stored_as = stored(values, {"f32": "F32", "bf16": "BF16"}[name]).f32.astype(float)

            def read(rows, columns, values=stored_as, name=name):
                some = values[np.ix_(rows, columns)]
                return some, grids.rounding_error(some, name, affine=False)

            self.assertEqual(column_groups.column_groups(values.shape, read), [])

    @parameterized.parameters((64, 32), (64, 128))
    def test_field_int4_of_int4(self, by, again):
        """FIELD verify: int4 with minima of what was so in other groups -> int4 asymmetric, the new groups"""
        before = {
            name: stored(quantisers.grouped(tensor.f32, by, quantisers.real_zero(4)), "F32")
            for name, tensor in damage_battery.wide_trained("F32").items()
        }
        changed = {
            name: stored(quantisers.grouped(tensor.f32, again, quantisers.real_zero(4)), "F32")
            for name, tensor in before.items()
        }
        wanted = {"type": "int4", "scheme": "asymmetric", "group": again}
        self.assertEqual(self.only(before, changed).parameters, wanted)


class ShapeTest(FieldTestCase):
    def setUp(self):
        super().setUp()
        self.before = base("BF16")

    def grown(self, *added):
        old = self.before[EMBEDDING]
        bits = np.concatenate([old.bits, *(np.asarray(part, np.uint16) for part in added)])
        return {EMBEDDING: from_bits(bits, "BF16")}

    def test_field_rows_appended(self):
        """FIELD verify: 8 rows appended to the embedding -> the first 288 rows equal, 8 added"""
        new = stored(np.random.default_rng(0).normal(0, 0.02, (8, 64)), "BF16").bits
        finding = self.only(self.before, self.grown(new))
        self.assertEqual((finding.cause, finding.explained), ("rows-added", 1.0))
        self.assertEqual(finding.parameters, {"first": [288, 64], "rows": 8, "holds": "values of their own"})
        self.assertIn("the first 288 x 64 equal, 8 rows added", finding.sentence)

    def test_field_rows_padded_with_zeros(self):
        """FIELD verify: the vocabulary padded with zero rows to a multiple of 64 -> 32 rows added, zeros"""
        finding = self.only(self.before, self.grown(np.zeros((32, 64))))
        self.assertEqual(finding.parameters, {"first": [288, 64], "rows": 32, "holds": "zeros"})

    def test_field_rows_cut(self):
        """FIELD verify: the vocabulary cut to its first 280 rows -> the first 280 equal, 8 removed"""
        finding = self.only(self.before, {EMBEDDING: from_bits(self.before[EMBEDDING].bits[:280], "BF16")})
        self.assertEqual((finding.cause, finding.parameters), ("rows-removed", {"first": [280, 64], "rows": 8}))

    def test_field_rows_left_out(self):
        """FIELD verify: unused tokens pruned from the vocabulary -> which rows were left out"""
        bits = np.delete(self.before[EMBEDDING].bits, [5, 6, 100], 0)
        finding = self.only(self.before, {EMBEDDING: from_bits(bits, "BF16")})
        self.assertEqual(finding.cause, "rows-removed")
        self.assertEqual(finding.parameters, {"rows": 3, "ranges": [[5, 6], [100, 100]]})

    def test_field_width_padded(self):
        """FIELD verify: the MLP padded to a multiple of 64 -> rows and columns of zeros added"""
        changed = {}
        for name, tensor in self.before.items():
            if "mlp" in name:
                pad = ((0, 0), (0, 32)) if "down" in name else ((0, 32), (0, 0))
                changed[name] = from_bits(np.pad(tensor.bits, pad), "BF16")
        findings = {finding.cause: finding for finding in self.verified(self.before, changed).findings}
        self.assertCountEqual(findings, ("rows-added", "columns-added"))
        self.assertEqual(findings["rows-added"].parameters, {"first": [160, 64], "rows": 32, "holds": "zeros"})
        self.assertEqual(findings["columns-added"].parameters, {"first": [64, 160], "columns": 32, "holds": "zeros"})

    @parameterized.product(beside=(True, False), times=(2, 4))
    def test_field_heads_repeated(self, beside, times):
        """FIELD verify: every KV head 2 or 4 times (tensor-parallel export), side by side or in sets -> said so"""
        changed = {}
        for name, tensor in self.before.items():
            if "k_proj" in name or "v_proj" in name:
                heads = tensor.bits.reshape(-1, HEAD_DIM, *tensor.shape[1:])
                bits = np.repeat(heads, times, 0) if beside else np.concatenate([heads] * times)
                changed[name] = from_bits(bits.reshape(-1, *tensor.shape[1:]), "BF16")
        finding = self.only(self.before, changed)
        self.assertEqual(finding.cause, "heads-repeated")
        order = "each beside itself" if beside else "one set after the other"
        self.assertEqual(finding.parameters, {"times": times, "head_dim": HEAD_DIM, "order": order})

    def test_field_grown_and_trained(self):
        """FIELD verify: rows added to an embedding that was trained on -> rows added, the common part near"""
        values = self.before[EMBEDDING].f32 + np.random.default_rng(1).normal(0, 1e-3, (288, 64))
        grown = np.concatenate([values, np.zeros((4, 64))])
        finding = self.only(self.before, {EMBEDDING: stored(grown, "BF16")})
        self.assertEqual((finding.cause, finding.parameters["rows"]), ("rows-added", 4))
        self.assertGreater(finding.parameters["relative_l2"], 0.01)


class AdapterTest(FieldTestCase):
    def merged(self, names, rank, code="BF16", scale=0.01):
        before = base(code)
        changed = {}
        for index, name in enumerate(names):
            random = np.random.default_rng(index)
            rows, columns = before[name].shape
            down, up = random.normal(0, 1, (rank, columns)), random.normal(0, 1, (rows, rank))
            changed[name] = stored(before[name].f32 + scale * up @ down / rank**0.5, code)
        return self.only(before, changed)

    @parameterized.parameters((1, "BF16"), (4, "BF16"), (8, "BF16"), (4, "F32"), (4, "F16"))
    def test_field_lora_merged(self, rank, code):
        """FIELD verify: a LoRA of rank 1, 4 or 8 merged into q and v -> a change of that rank, in these tensors"""
        names = [name for name in projections(base(code)) if "q_proj" in name or "v_proj" in name]
        finding = self.merged(names, rank, code)
        self.assertEqual((finding.cause, finding.parameters), ("low-rank", {"rank": rank}))
        self.assertIn("singular value", finding.sentence)

    def test_field_lora_whose_smallest_values_are_lost_in_rounding(self):
        """FIELD verify: a LoRA of rank 4, in one tensor of which rounding hides two -> one finding, rank 4"""
        before = base("BF16")
        names = sorted(name for name in projections(before) if "q_proj" in name or "o_proj" in name)
        changed = {}
        for index, name in enumerate(names):
            random = np.random.default_rng(index)
            left, _ = np.linalg.qr(random.normal(0, 1, (64, 4)))
            right, _ = np.linalg.qr(random.normal(0, 1, (64, 4)))
            sizes = [1, 0.8, 1e-5, 1e-5] if index == 0 else [1, 0.8, 0.6, 0.5]
            changed[name] = stored(before[name].f32 + left * sizes @ right.T, "BF16")
        self.assertEqual(self.only(before, changed).parameters, {"rank": 4})

    def test_field_lora_in_all_projections(self):
        """FIELD verify: a LoRA of rank 4 merged into every projection -> one finding over all of them"""
        self.assertEqual(self.merged(projections(base("BF16")), 4).parameters, {"rank": 4})

    def test_field_abliterated(self):
        """FIELD verify: one direction taken out of what o_proj and down_proj write -> rank 1, one direction removed"""
        before = base("BF16")
        direction = np.random.default_rng(3).normal(0, 1, 64)
        direction /= np.linalg.norm(direction)
        changed = {
            name: stored(tensor.f32 - np.outer(direction, direction @ tensor.f32), "BF16")
            for name, tensor in before.items()
            if "o_proj" in name or "down_proj" in name
        }
        finding = self.only(before, changed)
        self.assertEqual(finding.parameters, {"rank": 1, "removes": "one direction of the output"})


class ChannelsTest(FieldTestCase):
    def folded(self, code, norm, readers, to):
        """Moves the norm's weights into its readers; `to` stays behind."""
        before = base(code)
        changed = {}
        for layer in (0, 1):
            name = f"model.layers.{layer}.{norm}.weight"
            factor = before[name].f32 / to
            changed[name] = stored(np.full(64, to), code)
            for reader in readers:
                name = f"model.layers.{layer}.{reader}.weight"
                changed[name] = stored(before[name].f32 * factor, code)
        return self.only(before, changed)

    @parameterized.parameters("BF16", "F32", "F16")
    def test_field_norm_folded_into_attention(self, code):
        """FIELD verify: input_layernorm folded into q, k, v -> factors moved, the function is the same"""
        readers = [f"self_attn.{role}_proj" for role in "qkv"]
        finding = self.folded(code, "input_layernorm", readers, 1.0)
        self.assertEqual(finding.cause, "rescaled-channels")
        into = ["q_proj", "k_proj", "v_proj"]
        self.assertEqual(finding.parameters, {"from": "input_layernorm", "into": into, "function": "unchanged"})

    def test_field_norm_folded_into_mlp(self):
        """FIELD verify: post_attention_layernorm folded into gate and up -> factors moved, the function is the same"""
        finding = self.folded("BF16", "post_attention_layernorm", ["mlp.gate_proj", "mlp.up_proj"], 1.0)
        self.assertEqual(finding.parameters["into"], ["gate_proj", "up_proj"])
        self.assertEqual(finding.parameters["function"], "unchanged")

    @parameterized.parameters(("mlp.up_proj", "mlp.down_proj"), ("self_attn.v_proj", "self_attn.o_proj"))
    def test_field_smoothing_scales(self, source, reader):
        """FIELD verify: AWQ's scales between up and down, or v and o -> factors moved, the function is the same"""
        before = base("BF16")
        changed = {}
        for layer in (0, 1):
            front, back = (f"model.layers.{layer}.{name}.weight" for name in (source, reader))
            factor = np.exp(np.random.default_rng(layer).normal(0, 0.4, before[front].shape[0])).astype("<f4")
            changed[front] = stored(before[front].f32 * factor[:, None], "BF16")
            bias = front.replace("weight", "bias")
            if bias in before:
                changed[bias] = stored(before[bias].f32 * factor, "BF16")
            times = before[back].shape[1] // len(factor)
            behind = np.repeat(factor.reshape(-1, HEAD_DIM), times, 0).reshape(-1)
            changed[back] = stored(before[back].f32 / behind, "BF16")
        finding = self.only(before, changed)
        short = [name.rsplit(".", 1)[-1] for name in (source, reader)]
        self.assertEqual(finding.parameters, {"from": short[0], "into": short[1:], "function": "unchanged"})

    def folded_and_smoothed(self, code, readers, behind, times=1.0):
        """The norm goes into its readers, the last of which hands scales on to what reads it, all it holds `times`."""
        before = base(code)
        changed = {}
        for layer in (0, 1):
            names = {role: f"model.layers.{layer}.{role}" for role in (*readers, behind)}
            norm = names[readers[0]].rpartition(".")[0].replace("self_attn", "input_layernorm")
            norm = norm.replace("mlp", "post_attention_layernorm") + ".weight"
            for reader in readers:
                weight = f"{names[reader]}.weight"
                changed[weight] = stored(before[weight].f32 * before[norm].f32, code)
            changed[norm] = stored(np.ones(64), code)
            source, last = f"{names[readers[-1]]}.weight", f"{names[behind]}.weight"
            factor = np.exp(np.random.default_rng(layer).normal(0, 0.4, before[source].shape[0])).astype("<f4")
            values = before[source].f32 * before[norm].f32 * factor[:, None] * np.float32(times)
            changed[source] = stored(values, code)
            bias = source.replace("weight", "bias")
            if bias in before:
                changed[bias] = stored(before[bias].f32 * factor, code)
            repeated = np.repeat(factor.reshape(-1, HEAD_DIM), before[last].shape[1] // len(factor), 0).reshape(-1)
            changed[last] = stored(before[last].f32 / repeated, code)
        return before, changed

    @parameterized.product(
        code=("BF16", "F32", "F16"),
        at=(
            (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
            (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
        ),
    )
    def test_field_factors_on_both_sides(self, code, at):
        """FIELD verify: a norm folded in and scales handed on, in one matrix -> both moved, the function is the same"""
        finding = self.only(*self.folded_and_smoothed(code, *at))
        short = [name.rsplit(".", 1)[-1] for name in (*at[0], at[1])]
        norm = "post_attention_layernorm" if "mlp" in at[1] else "input_layernorm"
        moves = [{"from": norm, "into": short[:-1]}, {"from": short[-2], "into": short[-1:]}]
        self.assertEqual(finding.cause, "rescaled-channels")
        self.assertEqual(finding.parameters["function"], "unchanged")
        self.assertCountEqual(finding.parameters["moves"], moves)

    @parameterized.parameters("mlp", "self_attn")
    def test_factors_on_both_sides_whose_product_is_off_change_the_function(self, block):
        readers = ("gate", "up") if block == "mlp" else ("q", "k", "v")
        names = tuple(f"{block}.{role}_proj" for role in readers)
        behind = f"{block}.{'down' if block == 'mlp' else 'o'}_proj"
        found = self.verified(*self.folded_and_smoothed("BF16", names, behind, times=1.25)).findings
        said = {finding.parameters["function"] for finding in found if finding.cause == "rescaled-channels"}
        self.assertEqual(said, {"changed"})

    def test_field_factors_that_nothing_makes_up_for(self):
        """FIELD verify: q, k, v times a factor for each channel, the norm kept -> rescaled, the function changed"""
        before = base("BF16")
        factor = np.exp(np.random.default_rng(0).normal(0, 0.4, 64)).astype("<f4")
        changed = {name: stored(before[name].f32 * factor, "BF16") for name in (Q0, K0, V0)}
        finding = self.only(before, changed)
        self.assertEqual((finding.cause, finding.parameters["function"]), ("rescaled-channels", "changed"))

    @parameterized.parameters((0, 17, 0.85), (1, 17, 0.85), (0, 0, -2.0), (1, 63, 1.5))
    def test_field_one_line_scaled(self, axis, line, factor):
        """FIELD verify: one row or column of a matrix times 0.85 or -2 -> that row, that factor"""
        before = base("BF16")
        values = before[Q0].f32.copy()
        values[(slice(None),) * axis + (line,)] *= np.float32(factor)
        finding = self.only(before, {Q0: stored(values, "BF16")})
        wanted = {"axis": axis, "rows": 1, "ranges": [[line, line]], "factor": factor}
        self.assertEqual((finding.cause, finding.parameters), ("scaled-rows", wanted))

    def test_field_some_rows_changed(self):
        """FIELD verify: four rows of the embedding trained, the others equal -> these rows changed"""
        before = base("BF16")
        values = before[EMBEDDING].f32.copy()
        values[280:284] = np.random.default_rng(0).normal(0, 0.02, (4, 64))
        finding = self.only(before, {EMBEDDING: stored(values, "BF16")})
        self.assertEqual((finding.cause, finding.parameters["ranges"]), ("changed-rows", [[280, 283]]))


class PrecisionTest(FieldTestCase):
    @parameterized.parameters(
        ("BF16", 0xFFF8, 4),
        ("BF16", 0xFFFC, 5),
        ("F16", 0xFFC0, 4),
        ("F32", 0xFFFFF000, 11),
    )
    def test_field_mantissas_cut(self, code, mask, bits):
        """FIELD verify: low mantissa bits cut off -> mantissa cut to so many bits"""
        before = base(code)
        changed = {
            name: from_bits(before[name].bits & before[name].bits.dtype.type(mask), code)
            for name in projections(before)
        }
        finding = self.only(before, changed)
        self.assertEqual((finding.cause, finding.parameters), ("mantissa-cut", {"bits": bits, "rounding": "truncated"}))

    def test_field_mantissas_rounded(self):
        """FIELD verify: mantissas rounded to 4 bits, ties to even -> mantissa rounded to 4 bits"""
        before = base("F32")
        changed = {}
        for name in projections(before):
            fraction, exponent = np.frexp(before[name].f32.astype(np.float64))
            changed[name] = stored(np.ldexp(np.rint(fraction * 32) / 32, exponent), "F32")
        finding = self.only(before, changed)
        self.assertEqual(finding.parameters, {"bits": 4, "rounding": "nearest-even"})

    @parameterized.parameters(("bias", "BF16"), ("bias", "F32"), ("mlp.down_proj", "BF16"), ("o_proj", "F32"))
    def test_field_times_zero(self, part, code):
        """FIELD verify: biases (projections) times 0, with zeros of both signs -> zeroed"""
        before = base(code)
        changed = {name: stored(before[name].f32 * 0, code) for name in before if part in name}
        self.assertTrue(any(tensor.bits.any() for tensor in changed.values()))
        finding = self.only(before, changed)
        self.assertEqual((finding.cause, finding.parameters), ("zeroed", {"elements": "all"}))

    def test_field_signs_of_zeros(self):
        """FIELD verify: zeros that lost their sign, nothing else -> zeros of the other sign, every value the same"""
        before = base("BF16")
        values = before[Q0].f32.copy()
        values[::3, 5] = -0.0
        before[Q0] = stored(values, "BF16")
        finding = self.only(before, {Q0: stored(values + np.float32(0), "BF16")})
        self.assertEqual((finding.cause, finding.parameters), ("zero-signs", {"elements": len(values[::3])}))

    def test_field_zero_biases_trained(self):
        """FIELD verify: biases that were zero and were trained on -> said so, without an infinite distance"""
        before = base("BF16")
        names = [name for name in before if "bias" in name]
        before |= {name: stored(np.zeros(before[name].shape), "BF16") for name in names}
        changed = {
            name: stored(np.random.default_rng(len(name)).normal(0, 1e-3, before[name].shape), "BF16") for name in names
        }
        finding = self.only(before, changed)
        self.assertEqual((finding.cause, finding.parameters), ("different-weights", {"kind": "from zero"}))
        self.assertIn("the original is all zero", finding.sentence)
        self.assertNotIn("inf", finding.sentence)


def _grid(tensors: Tensors) -> Tensors:
    """Weights that lie on a quantisation grid already, as those of a dequantised file do."""
    return tensors | {
        name: stored(quantisers.q4_1(tensors[name].f32), tensors[name].code) for name in projections(tensors)
    }


class StoryTest(FieldTestCase):
    """A fine-tune, a merge or a replacement is one finding over its tensors."""

    def adamw(self, before, steps, rate, code):
        """AdamW's steps, a little over the rate in either direction for each element with a gradient."""
        changed: dict[str, Stored] = {}
        for index, (name, tensor) in enumerate(sorted(before.items())):
            random = np.random.default_rng(index)
            values = tensor.f32.astype(np.float64)
            drift = random.choice([-1.0, 1.0], values.shape) * random.uniform(0.2, 1, values.shape)
            for _ in range(steps):
                values = stored(values + rate * drift * random.uniform(0.5, 1.5, values.shape), code).f32
            if not np.array_equal(stored(values, code).bits, tensor.bits):
                changed[name] = stored(values, code)
        return changed

    @parameterized.parameters((True, 2e-5, "BF16"), (False, 2e-5, "BF16"), (True, 1e-4, "BF16"), (True, 1e-4, "F32"))
    def test_field_a_few_steps_of_training(self, grid, rate, code):
        """FIELD verify: 6 steps of AdamW, also on a base that lies on a quantisation grid -> fine-tuned, whole"""
        before = base(code)
        before = _grid(before) if grid else before
        finding = self.only(before, self.adamw(before, 6, rate, code))
        self.assertEqual((finding.cause, finding.parameters), ("different-weights", {"kind": "fine-tuned"}))

    @parameterized.parameters((True, 2e-5), (True, 2e-4), (False, 2e-4), (True, 2e-3))
    def test_field_noise(self, grid, size):
        """FIELD verify: noise of 2e-5 to 2e-3 on all tensors -> different weights, one finding, nothing quantised"""
        before = base("BF16")
        before = _grid(before) if grid else before
        random = np.random.default_rng(0)
        changed = {n: stored(t.f32 + random.normal(0, size, t.shape), "BF16") for n, t in sorted(before.items())}
        changed = {name: tensor for name, tensor in changed.items() if tensor.data != before[name].data}
        self.assertEqual(self.only(before, changed).parameters, {"kind": "fine-tuned"})

    @parameterized.parameters(0.2, 0.5, 0.8)
    def test_field_merge_with_another_model(self, share):
        """FIELD verify: a weighted mean with an unrelated model -> one finding: near or related or replaced"""
        before = base("BF16")
        random = np.random.default_rng(5)
        changed = {}
        for name, tensor in sorted(before.items()):
            other = tensor.f32.mean() + tensor.f32.std() * random.standard_normal(tensor.shape)
            changed[name] = stored((1 - share) * tensor.f32 + share * other, "BF16")
        finding = self.only(before, changed)
        self.assertEqual(finding.cause, "different-weights")
        self.assertEqual(finding.parameters["kind"], {0.2: "fine-tuned", 0.5: "related", 0.8: "replaced"}[share])

    @parameterized.parameters(*range(4))
    def test_field_another_model(self, seed):
        """FIELD verify: another model of the same shape, norms near 1 and biases near 0 -> replaced, whole"""
        before = base("BF16")
        random = np.random.default_rng(seed)
        changed = {}
        for name, tensor in sorted(before.items()):
            values = tensor.f32
            changed[name] = stored(random.normal(values.mean(), values.std(), values.shape), "BF16")
        self.assertEqual(self.only(before, changed).parameters, {"kind": "replaced"})

    def test_field_one_step_in_several_tensors(self):
        """FIELD verify: single elements one step of bf16 away in many tensors -> fine-tuned, no flipped bits"""
        before = base("BF16")
        changed = {}
        for index, name in enumerate(sorted(before)):
            bits = before[name].bits.copy()
            bits.reshape(-1)[index : index + 2] ^= 1
            changed[name] = from_bits(bits, "BF16")
        self.assertEqual(self.only(before, changed).parameters, {"kind": "fine-tuned"})

    def test_field_a_flipped_bit_in_a_fine_tuned_model(self):
        """FIELD verify: the top bit of an exponent flipped in an untrained tensor -> the flip is named"""
        before = base("BF16")
        changed = self.adamw(before, 6, 1e-4, "BF16")
        bits = before[Q0].bits.copy()
        bits[3, 4] ^= 1 << 14
        changed[Q0] = from_bits(bits, "BF16")
        found = self.verified(before, changed)
        flips = [finding for finding in found.findings if finding.cause == "bit-flips"]
        self.assertEqual([finding.tensors for finding in flips], [(Q0,)])
        self.assertLen(found.findings, 2)

    def test_field_trained_with_zero_biases(self):
        """FIELD verify: a fine-tune of a model whose biases were zero -> one finding, biases included"""
        before = base("BF16")
        before |= {n: stored(np.zeros(t.shape), "BF16") for n, t in before.items() if "bias" in n}
        finding = self.only(before, self.adamw(before, 6, 1e-4, "BF16"))
        self.assertEqual(finding.parameters, {"kind": "fine-tuned"})
        self.assertNotIn("inf", finding.sentence)


if __name__ == "__main__":
    absltest.main()
