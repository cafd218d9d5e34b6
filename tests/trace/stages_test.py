"""Keys of a trace: the text that files hold, its parts, and that each is made and read in one way."""

import json
import pathlib
import pickle
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from absl.testing import absltest, parameterized

from apr_jax.trace import aprt, stages
from apr_jax.trace.stages import Key


class KeyTest(parameterized.TestCase):
    @parameterized.parameters(
        ("stage.embedding", None, "embedding"),
        ("stage.0.attn_norm", 0, "attn_norm"),
        ("stage.17.post_ffn_residual", 17, "post_ffn_residual"),
        ("stage.final_norm", None, "final_norm"),
        ("logits", None, "logits"),
        ("hidden.3", 3, "hidden"),
        ("hidden.final_norm", None, "hidden"),
    )
    def test_a_key_is_its_text_and_knows_its_parts(self, text, layer, stage):
        key = Key(text)
        self.assertEqual((key.layer, key.stage), (layer, stage))
        self.assertEqual(Key.of(layer, stage), text)
        self.assertEqual({text: 1}[key], {key: 1}[text])
        self.assertEqual(json.dumps({key: key}), json.dumps({text: text}))
        self.assertEqual(pickle.loads(pickle.dumps(key)), text)

    def test_kinds_of_keys(self):
        keys = [Key(text) for text in ("stage.embedding", "stage.1.attn_scores", "logits", "hidden.1")]
        self.assertEqual([key.is_inner for key in keys], [True, True, False, False])
        self.assertEqual([key.is_hidden for key in keys], [False, False, False, True])
        self.assertEqual([key.per_pair for key in keys], [False, True, False, False])

    @parameterized.parameters("", "lm_head", "stage.", "stage.one.ffn_up", "model.layers.0.mlp", "stage.²")
    def test_a_text_that_is_no_key_has_no_layer(self, text):
        self.assertIsNone(Key(text).layer)
        self.assertFalse(Key(text).is_hidden)

    def test_every_key_of_a_model_is_made_of_its_parts_and_has_a_file_of_its_own(self):
        keys = list(stages.trace_keys(12))
        self.assertLen(set(keys), 12 * len(stages.LAYER_STAGES) + 3)
        self.assertEqual([Key.of(key.layer, key.stage) for key in keys], keys)
        self.assertLen({aprt.path_of(key) for key in keys}, len(keys))
        hidden = stages.hidden_sources(12)
        self.assertEqual([Key.of(key.layer, key.stage) for key in map(Key, hidden)], list(hidden))
        self.assertLess(set(hidden.values()), set(keys))

    @parameterized.parameters("hidden.1", "hidden.final_norm", "lm_head")
    def test_what_is_no_stage_has_no_file_in_a_dump(self, text):
        with self.assertRaises(ValueError):
            aprt.path_of(text)


if __name__ == "__main__":
    absltest.main()
