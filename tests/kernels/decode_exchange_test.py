"""All interleavings of the whole-token kernels' exchange and ring, in small; mistakes in their order are found."""

import math
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.cuda import decode_layers
from tests.kernels import decode_exchange
from tests.kernels.decode_exchange import Broken, Poll, Publish, Ring, Shape, Sync, explore, launch
from tests.kernels.fastest_ops_test import HALF_BILLION

SMALL = Shape(blocks=3, warps=1, heads=2, splits=1, layers=3)


def without(programs, *unwanted):
    return [[step for step in steps if getattr(step, "word", None) not in unwanted] for steps in programs]


def earlier(programs, word, tag, places):
    """The programs with one word published so many steps too early."""
    moved = []
    for steps in programs:
        steps = list(steps)
        if (step := Publish(word, tag)) in steps:
            at = steps.index(step)
            steps.insert(at - places, steps.pop(at))
        moved.append(steps)
    return moved


class DecodeExchangeTest(parameterized.TestCase):
    @parameterized.parameters(*decode_exchange.SHAPES)
    def test_no_interleaving_deadlocks_or_loses_a_word(self, shape):
        self.assertGreater(explore(launch(shape), shape.warps), 1000)

    @parameterized.parameters(*decode_exchange.RINGS)
    def test_no_interleaving_of_the_ring_deadlocks_or_takes_what_is_not_there(self, ring):
        self.assertGreater(ring.explore(), 100)

    def test_a_block_without_rows_is_left_behind_and_is_found(self):
        # Why every block must own rows of every matrix: nobody waits for one that contributes nothing.
        programs = without(launch(SMALL), "qkv 2", "middle 2", "ffn 2", "end 2")
        with self.assertRaisesRegex(Broken, "warp 2 has still to read"):
            explore(programs, 1)

    def test_a_word_published_before_others_have_read_the_last_is_found(self):
        with self.assertRaisesRegex(Broken, "still to read end 0 of layer 4"):
            explore(earlier(launch(SMALL), "end 0", 1, 14), 1)

    def test_a_word_that_nobody_publishes_is_a_deadlock(self):
        silent = [[step for step in steps if step != Publish("attended 1", 2)] for steps in launch(SMALL)]
        with self.assertRaisesRegex(Broken, "nobody can go on"):
            explore(silent, 1)

    def test_a_warp_that_does_not_wait_for_its_block_is_a_deadlock(self):
        shape = Shape(blocks=2, warps=2, heads=1, splits=1, layers=1)
        programs = launch(shape)
        programs[1].remove(Sync())
        with self.assertRaisesRegex(Broken, "nobody can go on"):
            explore(programs, 2)

    def test_a_ring_with_fewer_stages_than_a_product_takes_is_a_deadlock(self):
        with self.assertRaisesRegex(Broken, "nobody can go on: 2 stages"):
            Ring(2, 2, (1, 1, 2, 3)).explore()

    def test_a_row_that_is_not_attended_to_is_a_deadlock(self):
        # decode_rows.cu: a block leaves out the second of its pairs of a row and a head.
        shape = Shape(blocks=3, warps=1, heads=4, splits=1, layers=2, rows=True)
        silent = [[step for step in steps if step != Publish("attended 3 of 2", 2)] for steps in launch(shape)]
        silent.append([Publish("attended 3 of 2", 0)])  # nobody's, so that the word has a writer
        with self.assertRaisesRegex(Broken, "nobody can go on"):
            explore(silent, 1)

    @parameterized.parameters(1, 8)
    def test_the_shape_that_the_kernel_is_for_has_a_ring_for_every_product_and_rows_for_every_block(self, tokens):
        config, multiprocessors = HALF_BILLION, 132
        self.assertTrue(decode_layers.supports(config, multiprocessors, tokens))
        stage, stages, _ = decode_layers._shared_memory(config, multiprocessors, tokens)
        blocks = decode_layers.grid(config, multiprocessors)
        rows = math.ceil(config.hidden_size / blocks)
        self.assertLessEqual(math.ceil(rows / (stage // (2 * config.intermediate_size + 64))), stages)
        # What the model asks of a launch: a word of every block in every vector.
        widths = (config.hidden_size, config.intermediate_size, decode_layers._qkv_width(config))
        self.assertLessEqual(blocks, min(widths))

    def test_the_models_steps_are_those_of_the_kernel_of_rows(self):
        text = (pathlib.Path(decode_layers.__file__).parent / "decode_rows.cu").read_text(encoding="utf-8")
        body = text[text.index("__device__ void attention_half") : text.index("__device__ void compute")]
        order = ["product<D, 1, 2>", "publish(board + BOARD_QKV", "sync_compute()", "attend_to_all(", "product<Q_WIDTH"]
        order += ["add_to_residual(b, (bf16*)(board + BOARD_MIDDLE)", "sync_compute()", "product<D, FFN_TILES"]
        order += ["publish(words", "sync_compute()", "product<F", "add_to_residual(b, y", "sync_compute()"]
        at = 0
        for piece in order:
            at = body.index(piece, at) + len(piece)
        self.assertEqual(body.count("sync_compute()"), 4)
        one, rows = (decode_exchange.exchange(Shape(1, 1, 1, 1, 1, rows), 0, 0) for rows in (False, True))
        self.assertEqual([type(step) for step in one], [type(step) for step in rows])

    def test_the_models_steps_are_the_kernels(self):
        text = (pathlib.Path(decode_layers.__file__).parent / "decode.cu").read_text(encoding="utf-8")
        body = text[text.index("__device__ void attention_half") : text.index("__device__ void compute")]
        # In this order: product (polls and syncs), publish, sync; attention; product, publish, sync; and so on.
        order = ["product<D, 1, 2>", "publish(b.board + BOARD_QKV", "sync_compute()", "attend(token", "product<Q_WIDTH"]
        order += ["publish(b.board + BOARD_MIDDLE", "sync_compute()", "product<D, FFN_TILES", "publish_half("]
        order += ["sync_compute()", "await_ffn", "sync_compute()", "publish(b.board + BOARD_END", "sync_compute()"]
        at = 0
        for piece in order:
            at = body.index(piece, at) + len(piece)
        self.assertEqual(body.count("sync_compute()"), 5)
        steps = decode_exchange.exchange(Shape(1, 1, 0, 1, 1), 0, 0)
        kinds = [step.word.split()[0] if isinstance(step, Publish) else type(step).__name__ for step in steps]
        order = "end Poll Sync qkv Sync Sync middle Sync Poll Sync ffn Sync Poll Sync Sync"
        self.assertEqual(kinds, order.split())
        self.assertIsInstance(steps[1], Poll)


if __name__ == "__main__":
    absltest.main()
