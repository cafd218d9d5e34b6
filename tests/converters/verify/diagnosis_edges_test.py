"""The edges of the search for causes: what a sample does not show, what hardly fits, what cannot be decoded."""

import json
import pathlib
import struct
import sys
import zlib
from collections.abc import Mapping
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

import gguf
import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.openers import open_checkpoint
from apr_jax.converters.formats import apr_format, dtypes
from apr_jax.converters.verify.comparison import Comparison, compare
from apr_jax.converters.verify.diagnosis import channels, column_groups, elementwise, replays, story
from apr_jax.converters.verify.diagnosis.causes import Cause
from apr_jax.converters.verify.diagnosis.context import Context
from apr_jax.converters.verify.diagnosis.groupings import groupings
from apr_jax.converters.verify.diagnosis.missing import diagnose_missing
from apr_jax.converters.verify.diagnosis.pair import Pair
from apr_jax.converters.verify.diagnosis.search import diagnose
from tests.battery.damage_battery import KB, VB, Stored, from_bits, stored, write

NAME = "model.layers.0.mlp.gate_proj.weight"
NORM, INPUT_NORM = "model.norm.weight", "model.layers.0.input_layernorm.weight"


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.02, shape).astype("<f4")


def write_quantised(path: pathlib.Path, kind: str, shape: tuple[int, ...], data: bytes) -> pathlib.Path:
    """Writes one tensor as an `.apr`, or as GGUF if that alone has the type."""
    dtype, name = dtypes.by_name(kind), NAME.encode()
    if dtype.apr_id is None:
        path = path.with_suffix(".gguf")
        head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", len(name)) + name
        head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), dtype.ggml, 0)
        path.write_bytes(head + bytes(-len(head) % 32) + data)
        return path
    path = path.with_suffix(".apr")
    content = apr_format.serialise_prologue({}, apr_format.lay_out([(NAME, dtype, shape, len(data))]))
    content += data + bytes(-len(data) % 64)
    path.write_bytes(content + apr_format.footer(zlib.crc32(content)))
    return path


class EdgesTestCase(parameterized.TestCase):
    def setUp(self):
        super().setUp()
        self.folder = pathlib.Path(self.create_tempdir().full_path)

    def diagnose(self, before: Stored, after: Stored, name: str = NAME) -> list[Cause]:
        return self.diagnose_all({name: before}, {name: after})[name]

    def diagnose_all(self, before: Mapping[str, Stored], after: Mapping[str, Stored]) -> dict[str, list[Cause]]:
        write(self.folder / "a", before)
        write(self.folder / "b", after)
        return self._diagnosed(self.folder / "a", self.folder / "b")

    def diagnose_quantised(self, before: tuple, after: tuple) -> list[Cause]:
        """Of tensors (type, shape, bytes)."""
        paths = [write_quantised(self.folder / side, *held) for side, held in (("a", before), ("b", after))]
        return self._diagnosed(*paths)[NAME]

    def _diagnosed(self, one: pathlib.Path, other: pathlib.Path) -> dict[str, list[Cause]]:
        with open_checkpoint(one) as a, open_checkpoint(other) as b:
            context = Context(a, b)
            return {name: diagnose(a.tensors[name], b.tensors[name], context) for name in a.tensors}

    def assert_cause(self, found: list[Cause], cause: str, **parameters: object) -> Cause:
        self.assertEqual(found[0].cause, cause, str(found))
        self.assertEqual({key: found[0].parameters.get(key) for key in parameters}, parameters, str(found[0]))
        return found[0]


class SampleTest(EdgesTestCase):
    """Of a large tensor where nearly all differs, the sampled elements are multiples of 16: the others decide."""

    @parameterized.named_parameters(
        ("rows", lambda x: x[::-1]),
        ("transposed", lambda x: np.ascontiguousarray(x.T)),
        ("scaled", lambda x: x * np.float32(3)),
        ("cast", lambda x: x.astype(np.float16).astype("<f4")),
        ("zeroed", np.zeros_like),
        ("not_finite", lambda x: np.full_like(x, np.nan)),
        ("bit_flipped", lambda x: (x.view("<u4") ^ np.uint32(1 << 20)).view("<f4")),
        ("stride", lambda x: np.resize(x.reshape(-1)[np.arange(256)[:, None] * 255 + np.arange(256)], x.shape)),
        ("shifted", lambda x: np.roll(x.reshape(-1), 7).reshape(x.shape)),
    )
    def test_what_it_promises_the_whole_has_to_keep(self, change):
        before = random(256, 256)
        after = np.array(change(before))
        (whole, *_) = self.diagnose(stored(before), stored(after))
        self.assertNotEqual(whole.cause, "different-weights")
        places = np.arange(before.size * 7 // 8, before.size)
        places = places[places % 16 != 0]
        after.reshape(-1)[places] = random(len(places), seed=2)
        (first, *_) = self.diagnose(stored(before), stored(after))
        self.assertFalse(first.cause == whole.cause and first.explained >= 0.95, first)

    def test_a_large_tensor_is_sampled_to_its_end(self):
        data = np.zeros(132 << 16, np.uint8)
        write(self.folder / "a", {NAME: Stored("U8", (132, 1 << 16), data.tobytes())})
        write(self.folder / "b", {NAME: Stored("U8", (132, 1 << 16), (data + 1).tobytes())})
        with open_checkpoint(self.folder / "a") as a, open_checkpoint(self.folder / "b") as b:
            sample = Pair(a.tensors[NAME], b.tensors[NAME]).sample
        self.assertBetween(len(sample), 2048, 4096)
        self.assertGreater(sample[-1], 130 << 16)

    def test_what_differs_in_a_later_part_only_is_found(self):
        before = random(256, 512)
        flipped, broken = before.view("<u4").copy(), before.copy()
        flipped[200, 3] ^= 1 << 22
        broken[200, 3] = np.nan
        self.assert_cause(self.diagnose(stored(before), from_bits(flipped, "F32")), "bit-flips", at=[[200, 3]])
        self.assert_cause(self.diagnose(stored(before), stored(broken)), "non-finite", first=[200, 3])


class RelocationTest(EdgesTestCase):
    def test_copies_and_exchanges_are_named_by_what_they_have_in_common(self):
        held = {name: stored(random(64, seed=seed)) for seed, name in enumerate((KB, VB, NORM, INPUT_NORM))}
        for changes, name, parameters in (
            ({VB: KB}, VB, {"copy_of": "self_attn.k_proj.bias", "in_place_of": "self_attn.v_proj.bias"}),
            ({NORM: INPUT_NORM}, NORM, {"copy_of": INPUT_NORM}),
            ({NORM: INPUT_NORM, INPUT_NORM: NORM}, NORM, {"exchanged": sorted((INPUT_NORM, NORM))}),
        ):
            after = held | {name: held[other] for name, other in changes.items()}
            (first, *_) = self.diagnose_all(held, after)[name]
            self.assertEqual((first.cause, first.parameters), ("swapped-tensors", parameters))

    def test_of_several_equal_ones_the_others_are_counted(self):
        same = stored(random(64, seed=1))
        held = {f"model.layers.{layer}.input_layernorm.weight": same for layer in (1, 2, 3)} | {
            INPUT_NORM: stored(random(64))
        }
        (first, *_) = self.diagnose_all(held, held | {INPUT_NORM: same})[INPUT_NORM]
        self.assertEqual(first.parameters, {"layer": 0, "copy_of_layer": 1})
        self.assertIn("equal to 2 more tensors", first.evidence)

    def test_what_looks_like_another_tensor_in_a_few_places_is_none(self):
        other, after = random(4096, seed=1), random(4096, seed=2)
        for start in np.unique(np.linspace(0, 4096 - 8, 12).astype(int)):
            after[start : start + 8] = other[start : start + 8]
        held = {NORM: stored(random(4096)), INPUT_NORM: stored(other)}
        self.assert_cause(self.diagnose_all(held, held | {NORM: stored(after)})[NORM], "different-weights")
        # 200 of half a byte beside 200 of a byte: zeros look like zeros.
        numbers = np.random.default_rng(0).integers(1, 100, 200, np.uint8).tobytes()
        held = {"x": Stored("U8", (200,), numbers), "y": Stored("F4", (200,), bytes(100))}
        self.assert_cause(self.diagnose_all(held, held | {"x": Stored("U8", (200,), bytes(200))})["x"], "zeroed")

    def test_tensors_of_half_bytes_are_compared_as_bytes(self):
        random_bytes = np.random.default_rng(0).integers(0, 256, (8, 32), np.uint8)
        moved = np.concatenate([np.zeros(3, np.uint8), random_bytes.reshape(-1)[:-3]])
        before, after = (Stored("F4", (8, 64), data.tobytes()) for data in (random_bytes, moved))
        self.assert_cause(self.diagnose(before, after), "shifted", fill="zero")
        held = {"x": before, "y": Stored("F4", (8, 64), random_bytes[::-1].tobytes()), "empty": stored(random(0, 4))}
        (first, *_) = self.diagnose_all(held, held | {"x": held["y"]})["x"]
        self.assertEqual(first.cause, "swapped-tensors")

    @parameterized.named_parameters(
        ("zero", lambda x: np.zeros(5, "<f4"), "zero"),
        ("unchanged", lambda x: x[:5], "unchanged"),
        ("wrapped", lambda x: x[-5:], "wrapped"),
        ("edge", lambda x: np.repeat(x[:1], 5), "edge repeated"),
        ("other", lambda x: random(5, seed=9), "other"),
    )
    def test_what_fills_the_gap_of_a_shift_is_told(self, gap, kind):
        before = random(32, 32)
        flat = before.reshape(-1)
        after = np.concatenate([gap(flat), flat[:-5]]).reshape(32, 32)
        self.assert_cause(self.diagnose(stored(before), stored(after)), "shifted", by=5, unit="elements", fill=kind)

    def test_a_shift_behind_a_cast_is_found_and_its_gap_has_no_neighbour(self):
        before = stored(random(32, 32))
        narrow = before.f32.astype(ml_dtypes.bfloat16).reshape(-1)
        after = np.concatenate([random(5, seed=9).astype(ml_dtypes.bfloat16), narrow[:-5]]).reshape(32, 32)
        self.assert_cause(self.diagnose(before, stored(after, "BF16")), "shifted", by=5, fill="other")

    def test_what_has_gone_too_far_is_no_shift(self):
        before = random(64, 64)
        after = np.concatenate([np.zeros(3400, "<f4"), before.reshape(-1)[:-3400]]).reshape(64, 64)
        self.assertNotEqual(self.diagnose(stored(before), stored(after))[0].cause, "shifted")

    def test_of_a_pattern_that_repeats_itself_the_nearest_place_counts(self):
        before = np.tile(random(16), 256)
        after = np.concatenate([np.zeros(5, "<f4"), before[:-5]])
        found = self.diagnose(*(stored(values.reshape(64, 64)) for values in (before, after)))
        self.assert_cause(found, "shifted", by=5, fill="zero")
        # Parts of it that went each its own way have no place together.
        turns = np.random.default_rng(1).integers(1, 16, 128)
        after = np.concatenate([np.tile(np.roll(before[:16], turn), 2) for turn in turns])
        found = self.diagnose(*(stored(values.reshape(64, 64)) for values in (before, after)))
        self.assertNotEqual(found[0].cause, "shifted")

    def test_what_only_fills_up_a_beginning_proves_no_shift(self):
        after = np.tile(random(16), 256)
        before = np.concatenate([random(6, seed=1), after[6:]])
        found = self.diagnose(*(stored(values.reshape(64, 64)) for values in (before, after)))
        self.assertNotEqual(found[0].cause, "shifted")

    def test_rows_that_were_filled_up_and_read_as_if_they_were_not(self):
        before = random(64, 200)
        filled = np.zeros((64, 256), "<f4")
        filled[:, :200] = before
        found = self.diagnose(stored(before), stored(filled.reshape(-1)[: 64 * 200].reshape(64, 200)))
        self.assert_cause(found, "shifted", rows_filled_up_to_multiples_of=256, padding="read as values")

    def test_a_beginning_that_went_to_the_end_explains_too_little(self):
        before = random(64, 64)
        after = np.concatenate([np.full(2400, 7, "<f4"), before.reshape(-1)[:-2400]]).reshape(64, 64)
        self.assertNotEqual(self.diagnose(stored(before), stored(after))[0].cause, "shifted")

    def test_the_same_bytes_with_another_count_of_elements_are_relabelled(self):
        held = random(8, 16).tobytes()
        found = self.diagnose(Stored("F32", (8, 16), held), Stored("BF16", (8, 32), held))
        self.assert_cause(found, "relabelled-dtype", **{"from": "f32", "to": "bf16"})
        found = self.diagnose(Stored("F4", (8, 64), held[:256]), Stored("U8", (8, 32), held[:256]))
        self.assert_cause(found, "relabelled-dtype", **{"from": "f4", "to": "u8"})

    def test_of_many_tensors_a_few_are_kept_in_memory(self):
        names = [f"{index:02}" for index in range(26)]
        write(self.folder / "a", {name: stored(random(4, seed=seed)) for seed, name in enumerate(names)})
        with open_checkpoint(self.folder / "a") as a:
            context = Context(a, a)
            loaded = [context.load(a.tensors[name]) for name in names]
            self.assertIs(context.load(a.tensors[names[-1]]), loaded[-1])
            again = context.load(a.tensors[names[0]])
        self.assertIsNot(again, loaded[0])
        np.testing.assert_array_equal(again.bits, loaded[0].bits)


class FittedTest(EdgesTestCase):
    def test_a_factor_of_what_is_looked_at_twice_is_not_one_of_the_whole(self):
        before = random(512, 512)
        after = before * np.float32(3)
        places = np.arange(before.size // 2, before.size)
        # Neither in the sample nor among every other element.
        places = places[places % 2 == 1]
        after.reshape(-1)[places] = random(len(places), seed=2)
        self.assertNotEqual(self.diagnose(stored(before), stored(after))[0].cause, "scaled")

    def test_a_factor_that_most_elements_do_not_feel_is_known_by_more_than_the_sample(self):
        before = stored(random(256, 512), "F16")
        after = stored(before.f32 * np.float32(1.0003), "F16")
        self.assert_cause(self.diagnose(before, after), "scaled", factor=1.0003)

    @parameterized.parameters((0.1, 0.3, 0.2), (2.4999, 2.5001, 2.5), (0.1 + 0.2, 0.1 + 0.2, 0.1 + 0.2))
    def test_the_simplest_number_between_two(self, low, high, expected):
        self.assertEqual(elementwise._simplest(low, high), expected)

    def test_lines_too_short_to_prove_a_factor_have_none(self):
        before = random(64, 4)
        factors = np.linspace(0.5, 2, 64, dtype=np.float32)[:, None]
        (first, *_) = self.diagnose(stored(before), stored(before * factors))
        self.assertNotEqual(first.cause, "rescaled-channels")

    def test_factors_of_the_probed_rows_alone_are_none_of_all(self):
        before, after = random(60, 64), random(60, 64, seed=1)
        for row in np.linspace(0, 59, 6).astype(int):
            after[row] = before[row] * np.float32(0.5 + row / 60)
        self.assert_cause(self.diagnose(stored(before), stored(after)), "different-weights")

    def test_factors_on_both_sides_of_a_part_are_none_of_the_whole(self):
        before = random(256, 256)
        after = random(256, 256, seed=1)
        some = np.unique(np.linspace(0, 255, 64).astype(int))
        rows, columns = (np.exp(random(64, seed=seed) * 20) for seed in (2, 3))
        for others in (slice(None), 0.0):
            if others == 0.0:
                after[:] = 0
            after[np.ix_(some, some)] = before[np.ix_(some, some)] * rows[:, None] * columns
            (first, *_) = self.diagnose(stored(before), stored(after))
            self.assertNotEqual(first.cause, "rescaled-channels")

    def test_a_change_of_low_rank_where_it_is_probed_alone_is_none(self):
        before = random(512, 256)
        after = before + random(512, 256, seed=1) / 5
        rank = random(512, 2, seed=2) @ random(2, 256, seed=3) * 50
        some = [np.unique(np.linspace(0, length - 1, most).astype(int)) for length, most in ((512, 288), (256, 96))]
        after[np.ix_(*some)] = (before + rank)[np.ix_(*some)]
        self.assertNotEqual(self.diagnose(stored(before), stored(after))[0].cause, "low-rank")

    def test_rows_of_zeros_tell_no_factors(self):
        before = random(64, 64)
        rows, columns = (np.exp(random(64, seed=seed) * 20) for seed in (2, 3))
        after = before * rows[:, None] * columns
        self.assert_cause(self.diagnose(stored(before), stored(after)), "rescaled-channels", axis="both")
        before[48:] = after[48:] = 0
        with mock.patch.multiple(channels, _FITTED=16 * 64, _PART=16):
            self.assertNotEqual(self.diagnose(stored(before), stored(after))[0].cause, "rescaled-channels")


class HeadsTest(EdgesTestCase):
    Q, FUSED = (f"model.layers.0.self_attn.{name}_proj.weight" for name in ("q", "qkv"))

    def diagnose_all(self, before: Mapping[str, Stored], after: Mapping[str, Stored]) -> dict[str, list[Cause]]:
        """As always, of a model whose configuration is not known."""
        for side, held in (("a", before), ("b", after)):
            write(self.folder / side, held)
            (self.folder / side / "config.json").unlink()
        return self._diagnosed(self.folder / "a", self.folder / "b")

    def test_a_convention_is_seen_without_a_configuration(self):
        before = random(64, 32)
        heads = before.reshape(4, 2, 8, 32)
        after = np.ascontiguousarray(heads.transpose(0, 2, 1, 3)).reshape(64, 32)
        (first, *_) = self.diagnose(stored(before), stored(after), self.Q)
        self.assertEqual((first.cause, first.parameters["head_dim"]), ("head-permuted", 16))

    def test_heads_that_do_not_repeat_are_another_shape(self):
        for name in (self.Q, self.Q.replace("q_proj", "k_proj")):
            found = self.diagnose(stored(random(32, 16)), stored(random(64, 16, seed=1)), name)
            self.assert_cause(found, "different-weights", kind="other shape")

    def test_fused_rows_in_an_order_that_nobody_writes_are_permuted_rows(self):
        for rows in (48, 50):
            before = random(rows, 32)
            order = np.random.default_rng(1).permutation(rows)
            found = self.diagnose(stored(before), stored(before[order]), self.FUSED)
            self.assert_cause(found, "rows-permuted")

    def test_fused_rows_are_told_by_nearly_all_their_elements(self):
        before = random(384, 256)
        after = np.concatenate([before[128:256], before[:128], before[256:]])
        (first, *_) = self.diagnose(stored(before), stored(after), self.FUSED)
        self.assertEqual((first.cause, first.parameters), ("qkv-order", {"from": "q,k,v", "to": "k,q,v"}))
        after[:, 1:120:2] = random(384, 60, seed=3)
        self.assertNotEqual(self.diagnose(stored(before), stored(after), self.FUSED)[0].cause, "qkv-order")


class ResizedTest(EdgesTestCase):
    @parameterized.parameters(
        ((4, 4), (8,)), ((2, 3, 4), (2, 3, 5)), ((0, 4), (4, 4)), ((4, 4), (0, 4)), ((1000, 8), (10, 8)),
    )  # fmt: skip
    def test_what_has_hardly_a_common_part_has_another_shape(self, one, other):
        found = self.diagnose(stored(random(*one)), stored(random(*other)))
        self.assert_cause(found, "different-weights", kind="other shape")

    def test_rows_of_a_neighbour_are_told_by_nearly_all_of_them(self):
        q, k, v = (f"model.layers.0.self_attn.{role}_proj.weight" for role in "qkv")
        held = {name: random(64, 32, seed=seed) for seed, name in enumerate((q, k, v))}
        # Cut out of q and k half a matrix further down.
        cut = np.concatenate([held[q][32:], held[k][:32]])
        before = {name: stored(values) for name, values in held.items()}
        (first, *_) = self.diagnose_all(before, before | {q: stored(cut)})[q]
        self.assertEqual(first.parameters, {"order": "q,k,v", "rows": {"q": [32, 96]}})
        # The rows that are looked at first are right, most others are not.
        kept = np.linspace(0, 63, 4).astype(int)
        cut[np.setdiff1d(np.arange(64), kept)] += 1
        self.assertNotEqual(self.diagnose_all(before, before | {q: stored(cut)})[q][0].cause, "qkv-order")
        # Nor is anything said of matrices of another type.
        before[k] = stored(held[k], "BF16")
        self.assertNotEqual(self.diagnose_all(before, before | {q: stored(cut)})[q][0].cause, "qkv-order")


class StoryTest(EdgesTestCase):
    """Whole checkpoints, of which no configuration is known."""

    V, O = (f"model.layers.0.self_attn.{role}_proj" for role in "vo")  # noqa: E741

    def compared(
        self, before: Mapping[str, Stored], after: Mapping[str, Stored], config: dict | None = None
    ) -> Comparison:
        for side, held in (("a", before), ("b", after)):
            write(self.folder / side, held)
            (self.folder / side / "config.json").unlink()
            if config is not None:
                (self.folder / side / "config.json").write_text(json.dumps(config))
        with open_checkpoint(self.folder / "a") as a, open_checkpoint(self.folder / "b") as b:
            return compare(a, b)

    def moved(self, bias: Stored | None, then: Stored | None, columns: int = 32, config: dict | None = None) -> str:
        """What is said of the function where factors went from the rows of V to the columns of O."""
        factor = np.exp(random(32, seed=5) * 20)
        before = {f"{self.V}.weight": random(32, 64), f"{self.O}.weight": random(64, columns, seed=1)}
        after = {
            f"{self.V}.weight": before[f"{self.V}.weight"] * factor[:, None],
            f"{self.O}.weight": before[f"{self.O}.weight"] / np.resize(factor, columns),
        }
        biases = ({f"{self.V}.bias": held} if held is not None else {} for held in (bias, then))
        one, other = ({name: stored(values) for name, values in side.items()} for side in (before, after))
        found = self.compared(*(side | more for side, more in zip((one, other), biases, strict=True)), config)
        (function,) = {
            finding.parameters["function"] for finding in found.findings if finding.cause == "rescaled-channels"
        }
        return function

    def test_whether_factors_cancel_is_seen_in_the_bias_too(self):
        factor = np.exp(random(32, seed=5) * 20)
        bias, zeros = random(32, seed=2), np.zeros(32, "<f4")
        self.assertEqual(self.moved(None, None), "unchanged")
        self.assertEqual(self.moved(stored(bias), stored(bias * factor)), "unchanged")
        self.assertEqual(self.moved(stored(zeros), stored(zeros)), "unchanged")

    def test_factors_do_not_cancel_where_the_bias_did_not_follow(self):
        bias, packed = random(32, seed=2), Stored("F4", (32,), bytes(range(16)))
        for one, other in (
            (stored(bias), stored(bias)),
            (stored(bias), None),
            (stored(bias), stored(bias[:16])),
            (stored(bias[:16]), stored(bias[:16])),
            (packed, packed),
        ):
            self.assertEqual(self.moved(one, other), "changed")

    def test_without_the_heads_it_is_not_known_which_columns_read_which_rows(self):
        self.assertEqual(self.moved(None, None, columns=64), "changed")
        config = {"model_type": "qwen2", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 8,
                  "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 24,
                  "rope_theta": 1e6, "rms_norm_eps": 1e-6}  # fmt: skip
        self.assertEqual(self.moved(None, None, columns=64, config=config), "changed")

    @parameterized.parameters(None, 0.0)
    def test_readers_whose_source_is_missing_or_zero_are_changed(self, norm):
        names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up")]
        factor = np.exp(random(64, seed=5) * 20)
        before = {name: random(32, 64, seed=seed) for seed, name in enumerate(names)}
        after = {name: values * factor for name, values in before.items()}
        one, other = ({name: stored(values) for name, values in side.items()} for side in (before, after))
        more = (
            {} if norm is None else {"model.layers.0.post_attention_layernorm.weight": stored(np.full(64, norm, "<f4"))}
        )
        (finding,) = self.compared(one | more, other | more).findings
        self.assertEqual((finding.cause, finding.parameters["function"]), ("rescaled-channels", "changed"))

    def test_a_fine_tuned_model_of_which_a_matrix_changed_in_some_rows_is_one_finding(self):
        names = [f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
        before = {name: random(64, 64, seed=seed) for seed, name in enumerate([*names, "model.embed_tokens.weight"])}
        after = {
            name: values + random(64, 64, seed=9 + seed) / 20 for seed, (name, values) in enumerate(before.items())
        }
        after["model.embed_tokens.weight"][8:] = before["model.embed_tokens.weight"][8:]
        one, other = ({name: stored(values) for name, values in side.items()} for side in (before, after))
        (finding,) = self.compared(one, other).findings
        self.assertEqual((finding.cause, finding.parameters), ("different-weights", {"kind": "fine-tuned"}))
        self.assertLen(finding.tensors, 4)

    def test_of_two_names_of_a_codec_the_one_that_other_tensors_have_counts(self):
        cause = Cause("quantised", {"type": "int4", "group": 32}, 1.0, ("q4_0",))
        others = [Cause("quantised", {"type": "q4_0"}, 1.0)] * 2
        agreed = [cause for _, cause in story._common_readings([(None, one) for one in (cause, *others)])]
        self.assertEqual({cause.parameters["type"] for cause in agreed}, {"q4_0"})

    def test_ranks_without_a_usual_one_stay_as_they_are(self):
        causes = [(None, Cause("low-rank", {"rank": rank}, 1.0)) for rank in (4, 4, 8, 8)]
        self.assertEqual(story._common_rank(causes), causes)
        causes += [(None, Cause("low-rank", {"rank": 8}, 1.0))] * 4
        self.assertEqual({cause.parameters["rank"] for _, cause in story._common_rank(causes)}, {8})


class MissingTest(EdgesTestCase):
    @parameterized.named_parameters(
        ("scalars", (), ()), ("other_rows", (4, 8), (13, 8)), ("other_columns", (4, 8), (12, 4)),
        ("empty", (0, 8), (0, 8)), ("in_no_order", (4, 8), (12, 8)),
    )  # fmt: skip
    def test_what_is_called_fused_and_is_not_made_of_its_parts(self, part, fused):
        names = [f"model.layers.0.self_attn.{role}_proj.weight" for role in "qkv"]
        write(self.folder / "a", {name: stored(random(*part, seed=seed)) for seed, name in enumerate(names)})
        name = "model.layers.0.self_attn.qkv_proj.weight"
        write(self.folder / "b", {name: stored(random(*fused, seed=9))})
        with open_checkpoint(self.folder / "a") as a, open_checkpoint(self.folder / "b") as b:
            self.assertEqual(diagnose_missing(names, [name], Context(a, b)), [])

    def test_scalars_called_fused(self):
        names = [f"model.layers.0.self_attn.{role}_proj.scale" for role in "qkv"]
        write(self.folder / "a", {name: Stored("F32", (), bytes(4)) for name in names})
        write(self.folder / "b", {"model.layers.0.self_attn.qkv_proj.scale": Stored("F32", (), b"abcd")})
        with open_checkpoint(self.folder / "a") as a, open_checkpoint(self.folder / "b") as b:
            self.assertEqual(diagnose_missing(names, list(b.tensors), Context(a, b)), [])

    def test_a_fused_name_without_its_parts_is_missing(self):
        write(self.folder / "a", {"a.q_proj.weight": stored(random(4, 8))})
        write(self.folder / "b", {"a.qkv_proj.weight": stored(random(12, 8, seed=1))})
        with open_checkpoint(self.folder / "a") as a, open_checkpoint(self.folder / "b") as b:
            self.assertEqual(diagnose_missing(a.tensors, b.tensors, Context(a, b)), [])


class BlocksTest(EdgesTestCase):
    """Tensors whose values are decoded, or cannot be."""

    def quantised(self, name: str, values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
        codec = dtypes.by_name(name).codec
        prefix = codec.prefix(np.float32(np.abs(values).max())) if name == "apr_q8" else b""
        return name, values.shape, prefix + bytes(codec.encode(values.reshape(-1), prefix))

    def plain(self, values: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
        return "f32", values.shape, values.tobytes()

    def test_equal_blocks_have_no_cause(self):
        same = self.quantised("apr_q4", random(5, 10))
        self.assertEqual(self.diagnose_quantised(same, same), [])

    def test_blocks_that_run_on_across_rows_have_bytes_all_the_same(self):
        before = self.quantised("apr_q4", random(5, 1000))
        data = bytes(3) + before[2][:-3]
        found = self.diagnose_quantised(before, (*before[:2], data))
        self.assert_cause(found, "shifted", by=3, unit="bytes", fill="zero")

    @parameterized.parameters(("q8_k", 256, 292), ("q1_0", 128, 18))
    def test_types_that_nothing_decodes_are_compared_as_bytes(self, name, elements, width):
        data = np.random.default_rng(0).integers(0, 256, 8 * width, np.uint8)
        flipped = data.copy()
        flipped[100] ^= 8
        before, after = ((name, (8, elements), held.tobytes()) for held in (data, flipped))
        self.assert_cause(self.diagnose_quantised(before, after), "bit-flips", bits=[3])
        replaced = (name, (8, elements), np.random.default_rng(1).integers(0, 256, 8 * width, np.uint8).tobytes())
        self.assert_cause(self.diagnose_quantised(before, replaced), "different-weights")
        values = ("f32", (8, elements), random(8, elements).tobytes())
        self.assert_cause(self.diagnose_quantised(before, values), "different-weights", kind="other shape")

    @parameterized.parameters("apr_q4", "q4_k", "apr_q8")
    def test_a_quantised_original_is_told_by_our_own_quantiser(self, name):
        values = random(8, 256)
        self.assert_cause(
            self.diagnose_quantised(self.plain(values), self.quantised(name, values)), "quantised", type=name
        )

    def test_a_quantised_original_that_was_trained_on_is_not_quantised_again(self):
        before = self.quantised("apr_q4", random(16, 256))
        values = np.empty(16 * 256, np.float32)
        dtypes.by_name("apr_q4").codec.decode(before[2], values)
        after = values.reshape(16, 256) + random(16, 256, seed=1) / 20
        self.assert_cause(self.diagnose_quantised(before, self.plain(after)), "different-weights")

    @parameterized.parameters("TQ1_0", "Q2_K")
    def test_a_type_of_no_known_steps_is_told_by_nobody(self, kind):
        values = random(8, 256)
        dtype = dtypes.by_name(kind.lower())
        data = np.random.default_rng(0).integers(0, 256, 8 * dtype.block_bytes, np.uint8)
        found = self.diagnose_quantised(self.plain(values), (dtype.name, values.shape, data.tobytes()))
        self.assertNotEqual(found[0].cause, "quantised")
        near = gguf.quants.quantize(values, gguf.GGMLQuantizationType.TQ1_0)
        found = self.diagnose_quantised(self.plain(values), ("tq1_0", values.shape, near.tobytes()))
        self.assert_cause(found, "different-weights")

    def through_q8_0(self, values: np.ndarray) -> np.ndarray:
        blocks = values.reshape(-1, 32)
        scale = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
        codes = np.rint(blocks * (np.float32(1) / scale))
        return (codes * scale.astype(np.float16).astype(np.float32)).reshape(values.shape)

    def test_a_replay_leaves_over_what_no_grid_explains_better(self):
        before = random(64, 256)
        after = self.through_q8_0(before)
        after.reshape(-1)[5::50] += np.float32(1e-4)
        self.assert_cause(self.diagnose(stored(before), stored(after)), "quantised", type="q8_0")

    def test_a_replay_that_was_cut_off_in_a_narrower_type_says_so(self):
        before = random(64, 256)
        cut = (self.through_q8_0(before).view("<u4") >> 16).astype("<u2")
        found = self.diagnose(stored(before), from_bits(cut, "BF16"))
        self.assert_cause(found, "quantised", type="q8_0", rounding="truncated")

    def test_of_a_large_tensor_a_part_is_replayed(self):
        before = random(64, 256)
        with mock.patch.multiple(replays, _REPLAYED=4096, _UNITS_ELEMENTS=256):
            first = self.assert_cause(self.diagnose(stored(before), stored(self.through_q8_0(before))), "quantised")
        self.assertRegex(first.evidence, r"tried on \d+% of the elements")

    def test_a_replay_that_holds_in_the_probed_groups_alone_is_none(self):
        before = random(64, 256)
        after = self.through_q8_0(before)
        after[1:] = before[1:] + random(63, 256, seed=1) / 20
        with mock.patch.object(replays, "_PROBED_GROUPS", 1):
            self.assertNotEqual(self.diagnose(stored(before), stored(after))[0].parameters.get("type"), "q8_0")

    def test_halves_for_scales_are_told_from_singles(self):
        before = random(24, 256)
        blocks = before.reshape(-1, 32)
        scales = np.abs(blocks).max(1, keepdims=True) / 7
        for kind, parameters in ((np.float16, {"type": "q4_0"}), (np.float32, {"type": "int4"})):
            rounded = scales.astype(kind).astype(np.float32)
            # Rounded as ggml does not, so that nothing is found by quantising again.
            codes = np.clip(np.rint(blocks / rounded + 0.1), -8, 7)
            after = (codes * rounded).astype(np.float32).reshape(before.shape)
            self.assert_cause(self.diagnose(stored(before), stored(after)), "quantised", **parameters)

    def four_bits(self, values: np.ndarray, *, alike: bool = False) -> np.ndarray:
        """Sixteen steps from the smallest value of each 32, rounded down; or from one for all."""
        blocks = values.reshape(-1, 32)
        low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
        if alike:
            low, high = np.full_like(low, low.min()), np.full_like(high, high.max())
        step = (high - low) / 15
        return (low + np.floor((blocks - low) / step + 1e-4) * step).reshape(values.shape).astype(np.float32)

    @parameterized.parameters(((2, 96), False), ((16, 256), True))
    def test_few_scales_or_equal_ones_are_none_that_are_quantised_themselves(self, shape, alike):
        before = random(*shape)
        (first, *_) = self.diagnose(stored(before), stored(self.four_bits(before, alike=alike)))
        self.assertEqual((first.cause, first.parameters["type"]), ("quantised", "int4"))

    def test_scales_that_hardly_vary_are_none_that_are_quantised_themselves(self):
        before = random(16, 256)
        groups = before.reshape(-1, 16)
        times = np.random.default_rng(0).choice((1, 1, 2), len(groups))[:, None]
        step = np.float32(np.abs(before).max() / 32) * times.astype(np.float32)
        low = -step * np.float32(32)
        codes = np.clip(np.floor((groups - low) / step + 0.6), 0, 63)
        after = (low + codes * step).astype(np.float32).reshape(before.shape)
        # All are whole numbers of one step.
        self.assert_cause(self.diagnose(stored(before), stored(after)), "quantised", type="int8", group="tensor")

    def test_what_others_were_quantised_to_is_searched_for_anew_where_it_leaves_something_over(self):
        names = [f"model.layers.{layer}.mlp.gate_proj.weight" for layer in (0, 1)]
        before = {name: random(32, 256, seed=seed) for seed, name in enumerate(names)}
        after = {name: self.four_bits(values) for name, values in before.items()}
        after[names[1]].reshape(-1, 32)[5:7] += random(2, 32, seed=5) / 50
        one, other = ({name: stored(values) for name, values in side.items()} for side in (before, after))
        found = self.diagnose_all(one, other)
        self.assertEqual([found[name][0].parameters["type"] for name in names], ["int4", "int4"])
        self.assertLess(found[names[1]][0].explained, 1)

    def test_the_groupings_of_what_is_no_matrix(self):
        labels = {shape: {grouping.label for grouping in groupings(shape)} for shape in ((1, 64), (64, 1), (64, 64))}
        self.assertEmpty({"tensor", "column", "128x128"} & labels[1, 64])
        self.assertEmpty({"column", "128x128"} & labels[64, 1])
        self.assertContainsSubset({"tensor", "column", "128x128", "row"}, labels[64, 64])

    def test_of_groups_of_columns_some_anchors_tell_nothing(self):
        told = [(0, np.arange(1, 13)), *((column, np.arange(0)) for column in range(13, 30))]
        with mock.patch.object(column_groups, "_members", side_effect=told) as members:
            (found,) = column_groups.column_groups((64, 256), mock.Mock())
        self.assertEqual((len(found), members.call_count), (12, 6))

    @parameterized.named_parameters(
        ("down", np.floor, "quantised", {"type": "q8_0"}),
        ("noise", lambda steps: np.rint(steps + 40 * random(*steps.shape, seed=3) / 0.02), "different-weights", {}),
    )
    def test_a_quantised_original_is_told_by_how_near_it_is_whoever_quantised_it(self, rounded, cause, parameters):
        values = random(8, 256)
        blocks = values.reshape(-1, 32)
        scales = (np.abs(blocks).max(1) / 127).astype(np.float16)
        codes = np.clip(rounded(blocks / scales[:, None].astype(np.float32)), -128, 127).astype(np.int8)
        packed = np.zeros(len(blocks), [("d", "<f2"), ("q", "i1", 32)])
        packed["d"], packed["q"] = scales, codes
        found = self.diagnose_quantised(self.plain(values), ("q8_0", values.shape, packed.tobytes()))
        self.assert_cause(found, cause, **parameters)


if __name__ == "__main__":
    absltest.main()
