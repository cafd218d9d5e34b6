"""Names that differ by their beginnings: which rules are recognised, and where none can be."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))

from absl.testing import absltest, parameterized

from apr_jax.converters.checkpoint.naming import recognise


class RecogniseTest(parameterized.TestCase):
    @parameterized.named_parameters(
        ("one_beginning", {"a.x.weight": "m.x.weight", "a.y.bias": "m.y.bias"}, {"a.": "m."}),
        ("an_exception_is_longer", {"a.x.w": "m.x.w", "a.y.w": "m.y.w", "a.z.w": "n.z.w"},
         {"a.": "m.", "a.z.": "n.z."}),
        ("eight_beginnings", {f"old{i}.x{i}.w": f"new{i}.x{i}.w" for i in range(8)},
         {f"old{i}.": f"new{i}." for i in range(8)}),
    )  # fmt: skip
    def test_rules(self, names, rules):
        naming = recognise(names, names.values())
        self.assertEqual({rule.before: rule.after for rule in naming.rules}, rules)
        self.assertEqual(naming.names, names)

    @parameterized.named_parameters(
        ("nine_beginnings", [f"old{i}.x{i}.w" for i in range(9)], [f"new{i}.x{i}.w" for i in range(9)]),
        ("seventeen_beginnings", [f"old{i}.x{i}.w" for i in range(17)], [f"new{i}.x{i}.w" for i in range(17)]),
        # What is over would be called as one that has its name.
        ("two_would_have_one_name", ["a.x.w", "a.y.b", "m.y.b"], ["m.x.w"]),
        # The rule for the one, of no beginning, catches the other.
        ("a_right_name_would_be_lost", ["w", "w.a"], ["a.w.a", "w"]),
        ("the_exception_is_at_the_end", ["x.a.b.c.d.e.w", "x.a.b.c.d.e.v"], ["y.a.b.c.d.e.w", "z.a.b.c.d.e.v"]),
    )
    def test_names_that_no_few_rules_lead_to(self, found, expected):
        self.assertIsNone(recognise(found, expected))

    def test_a_whole_name_is_a_beginning_where_nothing_less_tells_it_from_others(self):
        naming = recognise(["1.1.1", "1.1.w", "a.b"], ["1.1", "b.1.1.w"])
        self.assertEqual({rule.before: rule.after for rule in naming.rules}, {"1.1.1": "1.1", "": "b."})
        self.assertEqual(naming.names, {"1.1.1": "1.1", "1.1.w": "b.1.1.w", "a.b": "b.a.b"})


if __name__ == "__main__":
    absltest.main()
