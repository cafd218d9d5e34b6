"""What is tried at a stage: a slight difference is no other matrix, and a large one is no rounding."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.parity.hypotheses import hypotheses
from apr_jax.parity.localise import localise
from apr_jax.parity.replay import Replay
from apr_jax.parity.search import Search
from apr_jax.trace.positions import complete
from tests.battery.faulty_forward import Planted
from tests.battery.parity_battery import Bench

OTHER_MATRIX = {"o-proj-transposed", "weights-from-another-layer", "weights-relabelled"}
ROUNDING = {"tf32-dots", "bf16-accumulation"}


class SizeTest(parameterized.TestCase):
    @parameterized.parameters(
        (Planted("tf32-dots", None, {"mode": "round"}), ROUNDING, OTHER_MATRIX),
        (Planted("o-proj-transposed"), OTHER_MATRIX, ROUNDING),
    )
    def test_only_what_is_of_the_size_of_the_difference_is_tried_alone(self, planted, tried, left_out):
        bench = Bench.of("gqa_tied_bf16")
        located = localise(bench.exact, bench.same, bench.inputs, complete(bench.dump([planted]), bench.inputs))
        site = next(site for site in located.sites if site.key == "stage.0.attn_out")
        replay = Replay(bench.exact.config, bench.exact.parameters, bench.inputs, located.theirs)
        question = Search(replay, site, located)._question()
        alone = {stack[0].name for stack in hypotheses(question, {}) if len(stack) == 1}
        self.assertLessEqual(tried, alone)
        self.assertFalse(left_out & alone)


if __name__ == "__main__":
    absltest.main()
