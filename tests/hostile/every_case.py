"""All hostile cases."""

from tests.hostile import cases, checkpoint_cases, dump_cases

CASES = [*cases.CASES, *checkpoint_cases.CASES, *dump_cases.CASES]
