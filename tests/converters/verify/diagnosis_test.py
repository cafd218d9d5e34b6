"""The search for causes where it is easily led astray; the planted-damage battery covers the plain cases."""

import pathlib
import sys
import time
from collections.abc import Mapping

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.formats import dtypes
from apr_jax.converters.verify.diagnosis.causes import Cause
from apr_jax.converters.verify.diagnosis.context import Context
from apr_jax.converters.verify.diagnosis.missing import Match, diagnose_missing
from apr_jax.converters.verify.diagnosis.pair import Pair, bits_of
from apr_jax.converters.verify.diagnosis.search import diagnose
from tests.battery.damage_battery import KB, QB, VB, Q, Stored, from_bits, stored, write
from tests.paths import DATA

NAME = "model.layers.0.mlp.gate_proj.weight"
NORM = "model.norm.weight"


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype("<f4")


class DiagnosisTest(parameterized.TestCase):
    def diagnose(self, before: Stored, after: Stored, name: str = NAME) -> list[Cause]:
        return self.diagnose_all({name: before}, {name: after})[name]

    def diagnose_all(self, before: Mapping[str, Stored], after: Mapping[str, Stored]) -> dict[str, list[Cause]]:
        folder = pathlib.Path(self.create_tempdir().full_path)
        write(folder / "a", before)
        write(folder / "b", after)
        with open_checkpoint(folder / "a") as a, open_checkpoint(folder / "b") as b:
            context = Context(a, b)
            return {name: diagnose(a.tensors[name], b.tensors[name], context) for name in before if name in after}

    def matches(self, before: Mapping[str, Stored], after: Mapping[str, Stored]) -> list[Match]:
        folder = pathlib.Path(self.create_tempdir().full_path)
        write(folder / "a", before)
        write(folder / "b", after)
        with open_checkpoint(folder / "a") as a, open_checkpoint(folder / "b") as b:
            only_a = [name for name in before if name not in after]
            only_b = [name for name in after if name not in before]
            return diagnose_missing(only_a, only_b, Context(a, b))

    @parameterized.parameters((0.55, False), (0.75, False), (0.9, False), (0.98, True))
    def test_a_shift_is_named_only_where_nearly_all_elements_moved(self, share, named):
        before = _random(64, 64)
        after = np.concatenate([np.zeros(5, "<f4"), before.ravel()[:-5]])
        replaced = round((1 - share) * after.size)
        after[-replaced:] = _random(replaced, seed=1)
        (first, *_) = self.diagnose(stored(before), stored(after.reshape(64, 64)))
        self.assertEqual(first.cause == "shifted", named, first)
        if named:
            self.assertEqual(first.parameters, {"by": 5, "unit": "elements", "fill": "zero"})
            self.assertAlmostEqual(first.explained, share, 2)

    def test_values_are_rounded_to_bf16_as_ml_dtypes_does_ties_included(self):
        # Each sign, exponent and fraction of bf16, with what lies below a tie, on it and above it.
        high = np.arange(1 << 16, dtype="<u4")[:, None] << np.uint32(16)
        values = (high | np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], "<u4")).view("<f4")
        values = values[np.isfinite(values)]
        with np.errstate(over="ignore"):
            expected = values.astype(ml_dtypes.bfloat16).view("<u2")
        np.testing.assert_array_equal(bits_of(values, "bf16"), expected)

    def test_equal_tensors_have_no_cause(self):
        same = stored(_random(8, 8))
        self.assertEqual(self.diagnose(same, same), [])

    def test_the_same_bytes_under_another_type_are_wholly_explained_by_that(self):
        before = stored(_random(8, 8), "BF16")
        (first,) = self.diagnose(before, Stored("F16", before.shape, before.data))
        self.assertEqual((first.cause, first.explained), ("relabelled-dtype", 1.0))

    # --- many equal values

    @parameterized.parameters("BF16", "F16", "F32")
    def test_norm_of_ones_plus_one_is_an_offset_and_might_be_a_factor(self, code):
        (first, *_) = self.diagnose(stored(np.ones(64), code), stored(np.full(64, 2.0), code), NORM)
        self.assertEqual((first.cause, first.parameters), ("offset", {"constant": 1.0}))
        self.assertEqual(first.explained, 1.0)
        self.assertEqual(first.alternatives, ("scaled",))

    def test_zeros_that_became_a_constant_are_an_offset_and_no_factor(self):
        (first,) = self.diagnose(stored(np.zeros(32), "BF16"), stored(np.full(32, 0.5), "BF16"), KB)
        self.assertEqual((first.cause, first.parameters, first.alternatives), ("offset", {"constant": 0.5}, ()))

    def test_norm_of_ones_replaced_by_noise_is_no_offset(self):
        noise = 1 + np.random.default_rng(0).normal(0, 0.3, 64)
        (first,) = self.diagnose(stored(np.ones(64), "BF16"), stored(noise, "BF16"), NORM)
        self.assertEqual((first.cause, first.parameters["kind"]), ("different-weights", "replaced"))

    def test_a_replaced_norm_is_no_fine_tuned_one_though_it_lies_near(self):
        before, after = (7.46 + 30 * _random(64, seed=seed) for seed in (1, 2))
        self.assertLess(np.linalg.norm(after - before) / np.linalg.norm(before), 0.2)
        (first,) = self.diagnose(stored(before, "BF16"), stored(after, "BF16"), NORM)
        self.assertEqual((first.cause, first.parameters["kind"]), ("different-weights", "replaced"))

    def test_norm_reset_to_ones_is_different_weights(self):
        (first,) = self.diagnose(stored(1 + _random(64), "BF16"), stored(np.ones(64), "BF16"), NORM)
        self.assertEqual(first.cause, "different-weights")

    def test_one_element_of_a_norm_of_ones_that_moved_on_is_told_with_its_alternatives(self):
        before, after = np.ones(64), np.ones(64)
        before[10] = after[11] = 1.5
        (first, *_) = self.diagnose(stored(before, "F32"), stored(after, "F32"), NORM)
        self.assertEqual(first.cause, "rows-permuted")
        self.assertIn("bit-flips", first.alternatives)

    def test_rows_are_found_among_many_equal_ones(self):
        before = _random(300, 16)
        before[50:200] = 0
        (first,) = self.diagnose(stored(before), stored(before[::-1]))
        self.assertEqual((first.cause, first.parameters), ("rows-permuted", {"permutation": "reversed"}))

    def test_exchange_with_zeros_is_an_exchange_and_might_be_wiped_out(self):
        key, zeros = stored(_random(32), "BF16"), stored(np.zeros(32), "BF16")
        found = self.diagnose_all({KB: key, VB: zeros}, {KB: zeros, VB: key})
        pair = {"exchanged": ["self_attn.k_proj.bias", "self_attn.v_proj.bias"]}
        for name in (KB, VB):
            self.assertEqual((found[name][0].cause, found[name][0].parameters), ("swapped-tensors", pair))
        self.assertEqual(found[KB][0].alternatives, ("zeroed",))

    # --- small ones

    @parameterized.parameters("BF16", "F32")
    def test_sixteen_replaced_elements_are_not_explained_by_chance(self, code):
        for seed in range(60):
            before, after = _random(16, seed=seed), _random(16, seed=seed + 1000)
            (first,) = self.diagnose(stored(before, code), stored(after, code), QB)
            self.assertEqual((first.cause, first.parameters["kind"]), ("different-weights", "replaced"), seed)

    @parameterized.parameters(1, 2, 3)
    def test_hardly_any_elements_replaced_is_different_weights(self, count):
        for seed in range(60):
            before, after = _random(count, seed=seed), _random(count, seed=seed + 1000)
            (first,) = self.diagnose(stored(before), stored(after), QB)
            self.assertEqual(first.cause, "different-weights", seed)

    def test_sixteen_elements_rotated_flipped_scaled_are_named(self):
        before = stored(_random(16), "BF16")
        flipped = before.bits.copy()
        flipped[3] ^= 1 << 9
        for after, cause, parameters in (
            (from_bits(np.roll(before.bits, 2), "BF16"), "rows-permuted", {"permutation": "rotated by 2"}),
            (from_bits(flipped, "BF16"), "bit-flips", {"bits": [9], "flips": 1, "at": [[3]]}),
            (stored(before.f32 * 4, "BF16"), "scaled", {"factor": 4.0}),
        ):
            (first, *_) = self.diagnose(before, after, NORM)
            self.assertEqual((first.cause, first.parameters, first.alternatives), (cause, parameters, ()))

    def test_four_elements_are_enough_for_a_shift(self):
        before = _random(4)
        (first, *_) = self.diagnose(stored(before), stored(np.concatenate([[0], before[:-1]]).astype("<f4")), QB)
        self.assertEqual((first.cause, first.parameters), ("shifted", {"by": 1, "unit": "elements", "fill": "zero"}))

    def test_a_few_wiped_or_infinite_elements_are_counted(self):
        before = _random(16, 16)
        places = (3, 5, 8), (2, 9, 1)
        for value, cause, parameters in (
            (0.0, "zeroed", {"elements": 3, "first": 3 * 16 + 2}),
            (-np.inf, "non-finite", {"-inf": 3, "first": [3, 2]}),
        ):
            after = before.copy()
            after[places] = value
            (first, *_) = self.diagnose(stored(before), stored(after))
            self.assertEqual((first.cause, first.parameters, first.explained), (cause, parameters, 1.0))

    @parameterized.parameters("U8", "I8", "BOOL", "I32", "U64", "F8_E4M3", "F8_E5M2", "F64")
    def test_tensors_of_any_type_and_shape_are_looked_at(self, code):
        width = {"I32": 4, "U64": 8, "F64": 8}.get(code, 1)
        random = np.random.default_rng(0)
        for shape in ((), (1,), (7,), (64, 48), (6, 4, 2)):
            count = int(np.prod(shape, dtype=int))
            before = random.integers(0, 2 if code == "BOOL" else 100, count * width, np.uint8)
            after = before.copy()
            after[: max(1, count // 2)] ^= 1
            pair = [Stored(code, shape, data.tobytes()) for data in (before, after)]
            self.assertNotEmpty(self.diagnose(*pair), shape)
            for other in ("F32", "BF16", "U8"):
                size = {"F32": 4, "BF16": 2, "U8": 1}[other]
                values = Stored(other, shape, random.integers(0, 100, count * size, np.uint8).tobytes())
                if other != code:
                    self.assertNotEmpty(self.diagnose(pair[0], values), (shape, other))
                    self.assertNotEmpty(self.diagnose(values, pair[0]), (shape, other))

    def test_scalars_and_empty_tensors_are_no_trouble(self):
        (first,) = self.diagnose(stored(np.float32(2.5)), stored(np.float32(-1.25)))
        self.assertEqual(first.cause, "different-weights")
        self.assertEqual(self.diagnose(stored(np.zeros((0, 4), "<f4")), stored(np.zeros((0, 4), "<f4"))), [])

    def test_the_value_pairs_of_the_report_are_different_weights(self):
        before = np.array([7.5625, 8.0, 7.21875, 7.3125, 7.46875, 7.375])
        after = np.array([7.0625, 7.125, 7.0, 7.0625, 6.75, 6.875])
        for source in ("BF16", "F16"):
            for target in ("BF16", "F16", "F32"):
                (first,) = self.diagnose(stored(before, source), stored(after, target), NORM)
                self.assertEqual(first.cause, "different-weights", (source, target))

    # --- square and symmetric matrices

    def test_a_square_transpose_is_no_permutation(self):
        before = stored(_random(48, 48), "BF16")
        (first,) = self.diagnose(before, from_bits(before.bits.T, "BF16"))
        self.assertEqual((first.cause, first.parameters), ("transposed", {"data": "transposed", "shape": "kept"}))

    def test_reversed_rows_of_a_symmetric_matrix_name_the_columns_too(self):
        half = _random(24, 24)
        symmetric = half + half.T
        (first, *_) = self.diagnose(stored(symmetric), stored(symmetric[::-1]))
        self.assertEqual((first.cause, first.parameters), ("rows-permuted", {"permutation": "reversed"}))

    # --- values at the edges

    def test_infinities_and_nan_of_the_original_are_not_introduced_ones(self):
        before = _random(32, 32)
        before[0, :3] = np.inf, -np.inf, np.nan
        before[1, 0] = np.float32(-0.0)
        (first,) = self.diagnose(stored(before), stored(before * np.float32(0.5)))
        self.assertEqual((first.cause, first.parameters), ("scaled", {"factor": 0.5}))
        self.assertEqual(first.explained, 1.0)
        (first,) = self.diagnose(stored(before), stored(before[::-1]))
        self.assertEqual(first.cause, "rows-permuted")
        (first,) = self.diagnose(stored(before), stored(before, "F64"))
        self.assertEqual(first.cause, "exact-cast")

    def test_an_overflowing_cast_is_a_rounded_cast(self):
        before = _random(32, 32) * 1e6
        before[0, 0] = 7e4
        (first, *_) = self.diagnose(stored(before), stored(before, "F16"))
        self.assertEqual((first.cause, first.parameters["rounding"]), ("rounded-cast", "nearest-even"))

    def test_everything_nan_is_non_finite(self):
        (first, *_) = self.diagnose(stored(_random(16, 16)), stored(np.full((16, 16), np.nan, "<f4")))
        self.assertEqual((first.cause, first.parameters), ("non-finite", {"nan": 256, "first": [0, 0]}))

    @parameterized.parameters(np.nan, np.inf, 3e38)
    def test_a_change_beside_nan_infinities_and_huge_values_is_looked_for_all_the_same(self, value):
        before = _random(64, 48)
        after = before + np.outer(_random(64, seed=1), _random(48, seed=2))
        before[3, 4] = after[3, 4] = value
        after[5, 6] = np.nan
        (first, *_) = self.diagnose(stored(before), stored(after))
        # Each element that is out of line may count as a rank of its own.
        self.assertEqual(first.cause, "low-rank")
        self.assertLessEqual(first.parameters["rank"], 3)
        (first, *_) = self.diagnose(stored(before), stored(before + _random(64, 48, seed=3)))
        self.assertEqual(first.cause, "different-weights")

    # --- two things at once in one tensor, and casts along the way

    @parameterized.parameters(("lora", "low-rank"), ("negative", "scaled"), ("two bits", "quantised"))
    def test_what_leaves_little_of_the_original_is_still_related_to_it(self, change, cause):
        """Five times as much added as there was, all signs turned round, two bits left."""
        before, random = _random(160, 128), np.random.default_rng(3)
        added = random.normal(0, 0.05, (160, 4)) @ random.normal(0, 1, (4, 128))
        step = np.abs(before).max(1, keepdims=True) / 2
        after = {
            "lora": (before + added).astype("<f4"),
            "negative": before * np.float32(-0.5),
            "two bits": (np.clip(np.rint(before / step), -2, 1) * step).astype("<f4"),
        }[change]
        (first, *_) = self.diagnose(stored(before), stored(after))
        self.assertEqual(first.cause, cause)

    def test_unrelated_are_only_weights_of_which_nothing_is_left(self):
        before, other = _random(160, 128), _random(160, 128, seed=1)
        huge = before.copy()
        huge[::5, 7] = 3e38
        folder = pathlib.Path(self.create_tempdir().full_path)
        cases = {
            "other weights": (other, True),
            "some others among few": (other[:4], False),
            "trained on": (before + other / 10, False),
            "a thirtieth of it is left": (before + 30 * other, True),
            "huge values": (huge + other / 10, False),
        }
        for name, (after, unrelated) in cases.items():
            write(folder / name / "a", {NAME: stored(before[: len(after)])})
            write(folder / name / "b", {NAME: stored(after)})
            with open_checkpoint(folder / name / "a") as a, open_checkpoint(folder / name / "b") as b:
                self.assertEqual(Pair(a.tensors[NAME], b.tensors[NAME]).unrelated, unrelated, name)

    def test_a_copy_is_found_whatever_type_either_side_has(self):
        """Fingerprints of two types are compared as they are rounded."""
        names = [NAME.replace("0", str(layer)) for layer in range(3)]
        for code, other in (("F32", "BF16"), ("BF16", "F16"), ("F64", "F32")):
            before = {name: stored(_random(32, 32, seed=seed), code) for seed, name in enumerate(names)}
            wanted = before[names[2]].array.astype("<f4")
            after = {name: stored(before[name].array.astype("<f4"), other) for name in names[:2]}
            after |= {names[0]: stored(wanted, other), names[2]: stored(wanted, other)}
            (first, *_) = self.diagnose_all(before, after)[names[0]]
            self.assertEqual(first.parameters, {"layer": 0, "copy_of_layer": 2}, (code, other, first))

    def test_a_transpose_is_found_behind_a_cast(self):
        before = stored(_random(40, 24), "BF16")
        (first,) = self.diagnose(before, stored(before.f32.T.reshape(40, 24), "F32"))
        self.assertEqual((first.cause, first.explained), ("transposed", 1.0))

    def test_explained_is_the_measured_share(self):
        before = stored(_random(64, 32))
        bits = before.bits[::-1].copy()
        bits[5, 5:9] ^= 1
        (first, *_) = self.diagnose(before, from_bits(bits, "F32"))
        self.assertEqual(first.cause, "different-weights")
        bits = before.bits.T.reshape(64, 32).copy()
        bits[5, 5:9] ^= 1
        (first, *_) = self.diagnose(before, from_bits(bits, "F32"))
        differing = np.count_nonzero(bits != before.bits)
        self.assertEqual((first.cause, first.explained), ("transposed", (differing - 4) / differing))

    # --- quantised files

    @parameterized.parameters(
        (
            lambda data: data[:1000] + bytes([data[1000] ^ 4]) + data[1001:],
            "bit-flips",
            {"bits": [2], "flips": 1, "at": [[1000]]},
        ),
        (lambda data: bytes(3) + data[:-3], "shifted", {"by": 3, "unit": "bytes", "fill": "zero"}),
        (lambda data: data[:-700] + bytes(700), "truncated", {"zero_elements": 700}),
    )
    def test_damage_to_the_bytes_of_blocks_is_found(self, damage, cause, parameters):
        file = DATA / "apr" / "tiny_f32_tied-int4.apr"
        name = "model.embed_tokens.weight"
        with open_checkpoint(file) as original:
            tensor = original.tensors[name]
            self.assertEqual(tensor.dtype.name, "apr_q4")
            whole = bytearray(file.read_bytes())
            data = bytes(whole[tensor.offset : tensor.offset + tensor.nbytes])
            whole[tensor.offset : tensor.offset + tensor.nbytes] = damage(data)
            damaged = pathlib.Path(self.create_tempdir().full_path) / "damaged.apr"
            damaged.write_bytes(whole)
            with open_checkpoint(damaged) as suspect:
                context = Context(original, suspect)
                (first, *_) = diagnose(tensor, suspect.tensors[name], context)
        self.assertEqual((first.cause, first.parameters), (cause, parameters))

    @parameterized.parameters("F32", "BF16")
    def test_sixteen_steps_from_the_smallest_value_are_int4_by_whichever_quantiser(self, code):
        # Rounded down and not to the nearest, as none of the quantisers that are tried again does it; q4_k's scales
        # would be multiples of one in each 256.
        before = stored(_random(16, 256), code)
        blocks = before.f32.reshape(-1, 32)
        low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
        step = (high - low) / 15
        after = stored((low + np.floor((blocks - low) / step + 1e-4) * step).reshape(16, 256), code)
        (first,) = self.diagnose(before, after)
        self.assertEqual(first.parameters, {"type": "int4", "scheme": "asymmetric", "group": 32})

    def test_a_quantised_type_is_told_where_the_filling_of_its_rows_was_read_as_values(self):
        """Every row but the first is another one's: what is left looks unrelated but for that."""
        before = stored(_random(64, 200), "F32")
        filled = np.zeros((64, 256), np.float32)
        filled[:, :200] = before.f32
        codec = dtypes.TYPES["q4_k"].codec
        values = np.empty(filled.size, np.float32)
        codec.decode(codec.encode(filled.reshape(-1)), values)
        (first,) = self.diagnose(before, stored(values[: 64 * 200].reshape(64, 200), "F32"))
        self.assertEqual((first.cause, first.parameters["type"]), ("quantised", "q4_k"))
        self.assertEqual(first.parameters["padding"], "read as values")

    # --- sizes

    def test_permuted_rows_of_a_tall_matrix_take_no_quadratic_time(self):
        before = stored(_random(60000, 8), "BF16")
        order = np.random.default_rng(1).permutation(60000)
        start = time.process_time()
        (first,) = self.diagnose(before, from_bits(before.bits[order], "BF16"), "model.embed_tokens.weight")
        self.assertEqual(first.cause, "rows-permuted")
        self.assertLess(time.process_time() - start, 5)

    @parameterized.parameters(False, True)
    def test_permuted_columns_of_a_tall_matrix_are_named_though_a_part_of_the_rows_is_alike(self, alike):
        before = _random(2048, 16)
        if alike:
            before[::2] = 1.0
        (first,) = self.diagnose(stored(before), stored(before[:, ::-1]))
        self.assertEqual((first.cause, first.parameters), ("columns-permuted", {"permutation": "reversed"}))

    def test_fewer_or_more_elements_are_different_weights(self):
        before = stored(_random(32, 16))
        for shape in ((31, 16), (33, 16)):
            (first,) = self.diagnose(before, stored(_random(*shape, seed=3)))
            self.assertEqual((first.cause, first.parameters["kind"]), ("different-weights", "other shape"))

    # --- tensors that one side lacks

    def test_fused_and_separate_qkv_belong_together(self):
        parts = {
            role: stored(_random(rows, 64, seed=rows + ord(role)), "BF16")
            for role, rows in (("q", 64), ("k", 32), ("v", 32))
        }
        separate = {Q.replace("q_proj", f"{role}_proj"): part for role, part in parts.items()}
        name = Q.replace("q_proj", "qkv_proj")
        for order in ("qkv", "kqv"):
            fused = {name: from_bits(np.concatenate([parts[role].bits for role in order]), "BF16")}
            (match,) = self.matches(separate, fused)
            self.assertEqual((match.only_in_a, match.only_in_b), (tuple(separate), (name,)))
            self.assertEqual((match.cause.cause, match.cause.parameters["to"]), ("qkv-order", ",".join(order)))
            (match,) = self.matches(fused, separate)
            self.assertEqual(match.cause.parameters, {"from": ",".join(order), "to": "separate"})

    def test_a_tensor_under_another_name_is_found(self):
        weights, other = stored(_random(16, 16)), stored(_random(16, 16, seed=1))
        (match,) = self.matches({"a.weight": weights, "b.weight": other}, {"c.weight": weights})
        self.assertEqual((match.only_in_a, match.only_in_b, match.cause), (("a.weight",), ("c.weight",), None))

    def test_a_copy_of_a_tensor_that_both_have_and_one_of_another_shape_are_no_other_names(self):
        weights, other = _random(6, 4), stored(_random(6, 4, seed=1))
        both = {"both.weight": stored(weights)}
        self.assertEqual(self.matches(both | {"a.weight": other}, both | {"c.weight": stored(weights)}), [])
        self.assertEqual(self.matches({"a.weight": stored(weights)}, {"c.weight": stored(weights.reshape(4, 6))}), [])


if __name__ == "__main__":
    absltest.main()
