"""The order of the exchange between the blocks of `apr_jax/cuda/decode*.cu`, and of their ring: models to try all of.

    python tests/kernels/decode_exchange.py        prints what was tried

A model is some agents, each with a list of steps; a state is how far each has come. `explore` visits every state that
any interleaving reaches, and refuses one in which nobody can go on, a word is written that somebody has still to read,
or a warp takes out of the ring what it did not wait for. The steps below are those of the kernels, in their order:
whoever changes one changes the other. In decode_rows.cu no word is written twice, so that it can only deadlock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

S = TypeVar("S")


class Broken(AssertionError):
    """Some interleaving deadlocks, or reads what it should not."""


@dataclasses.dataclass(frozen=True)
class Poll:
    """Waits until a word of the board has a tag."""

    word: str
    tag: int


@dataclasses.dataclass(frozen=True)
class Publish:
    """Writes a word of the board."""

    word: str
    tag: int


@dataclasses.dataclass(frozen=True)
class Sync:
    """Waits for all warps of the block."""


Step = Poll | Publish | Sync


@dataclasses.dataclass(frozen=True)
class Shape:
    """A small launch, in which every block owns one word of each vector.

    Attributes:
      blocks: Of the grid.
      warps: Of a block; each polls for the words of every `warps`-th block alone, its columns.
      heads: Query heads, of each row; head h's q is block h's word of q, k, v. All heads share k and v, the words
        behind them. More heads than blocks are attended to one behind the other.
      splits: Blocks that attend for a head.
      layers: Of the model.
      rows: Whether it is decode_rows.cu, where each layer has words of its own.
    """

    blocks: int
    warps: int
    heads: int
    splits: int
    layers: int
    rows: bool = False


def exchange(shape: Shape, block: int, warp: int) -> list[Step]:
    """The steps of one warp: `compute`, `attention_half`, `attend` and `mlp_half` of decode.cu."""
    columns = range(warp, shape.blocks, shape.warps)
    first = warp == 0  # whose threads publish the block's rows
    steps: list[Step] = [Publish(f"end {block}", shape.layers + 1)] if first else []
    for tag in range(1, shape.layers + 1):
        before = tag - 1 if tag > 1 else shape.layers + 1
        steps += [Poll(f"end {other}", before) for other in columns]
        steps += [Sync(), *([Publish(f"qkv {block}", tag)] if first else []), Sync()]
        for part in range(block, shape.heads * shape.splits, shape.blocks):
            steps += _attention(shape, part, warp, tag)
        steps += [Poll(f"attended {head}", tag) for head in range(warp, shape.heads, shape.warps)]
        for vector, following in (("middle", "ffn"), ("ffn", "end")):
            steps += [Sync(), *([Publish(f"{vector} {block}", tag)] if first else []), Sync()]
            steps += [Poll(f"{vector} {other}", tag) for other in columns]
            last = following == "end" and tag == shape.layers
            if following == "end":
                steps += [Sync(), *([Publish(f"end {block}", tag)] if first and not last else []), Sync()]
    return [_own_word(step) for step in steps] if shape.rows else steps


def _own_word(step: Step) -> Step:
    """A step about a word that is the layer's own."""
    return step if isinstance(step, Sync) else dataclasses.replace(step, word=f"{step.word} of {step.tag}")


def _attention(shape: Shape, part: int, warp: int, tag: int) -> list[Step]:
    head, split = divmod(part, shape.splits)
    fresh = {head % shape.blocks, *range(shape.heads, shape.blocks)}  # q of the head, and k and v
    steps: list[Step] = [Poll(f"qkv {word}", tag) for word in sorted(fresh) if word % shape.warps == warp]
    steps += [Sync(), Sync(), Sync()]  # `rotate_fresh`, and behind the parts of the warps
    first = warp == 0
    if shape.splits > 1:
        steps += [Publish(f"part {part}", tag)] if first else []
        if split:
            return steps
        others = range(part, part + shape.splits)
        steps += [Sync(), *(Poll(f"part {other}", tag) for other in others if other % shape.warps == warp), Sync()]
    return [*steps, *([Publish(f"attended {head}", tag)] if first else [])]


def explore(programs: Sequence[Sequence[Step]], warps: int) -> int:
    """Visits all states of the warps' programs, `warps` neighbours a block; returns how many there are.

    Raises:
      Broken: In some state nobody can go on, or a word is overwritten that a program has still to read.
    """
    writer = {step.word: agent for agent, steps in enumerate(programs) for step in steps if isinstance(step, Publish)}
    ends = tuple(map(len, programs))
    written = [_tags(steps) for steps in programs]

    def left(state: tuple[int, ...]) -> list[Step]:
        return [programs[agent][at] for agent, at in enumerate(state) if at < ends[agent]]

    return _visit((0,) * len(programs), lambda state: _following(programs, warps, writer, written, state), left)


def _visit(start: S, following: Callable[[S], Iterable[S]], left: Callable[[S], object]) -> int:
    """Visits every state that is reached; refuses one that nothing follows though something is `left` to do."""
    seen, waiting = {start}, [start]
    while waiting:
        state = waiting.pop()
        reached = list(following(state))
        if not reached and left(state):
            raise Broken(f"nobody can go on: {left(state)}")
        waiting += (new := set(reached) - seen)
        seen |= new
    return len(seen)


def _tags(steps: Sequence[Step]) -> list[dict[str, int]]:
    """What the words of an agent hold before each of its steps, and behind the last one."""
    held: list[dict[str, int]] = [{}]
    for step in steps:
        held.append({**held[-1], step.word: step.tag} if isinstance(step, Publish) else held[-1])
    return held


def _following(
    programs: Sequence[Sequence[Step]],
    warps: int,
    writer: dict[str, int],
    written: Sequence[Sequence[dict[str, int]]],
    state: tuple[int, ...],
) -> Iterator[tuple[int, ...]]:
    for agent, at in enumerate(state):
        if at == len(programs[agent]):
            continue
        step = programs[agent][at]
        if isinstance(step, Sync):
            block = range(agent - agent % warps, agent - agent % warps + warps)
            here = [programs[other][state[other]] if state[other] < len(programs[other]) else None for other in block]
            if agent == block[0] and all(isinstance(other, Sync) for other in here):
                yield tuple(at + (other in block) for other, at in enumerate(state))
            continue
        if isinstance(step, Poll):
            owner = writer[step.word]
            if written[owner][state[owner]].get(step.word) != step.tag:
                continue
        else:
            _check_read(programs, written[agent][at].get(step.word), step.word, state)
        yield (*state[:agent], at + 1, *state[agent + 1 :])


def _check_read(programs: Sequence[Sequence[Step]], old: int | None, word: str, state: tuple[int, ...]) -> None:
    if old is None:
        return
    for agent, at in enumerate(state):
        if Poll(word, old) in programs[agent][at:]:
            raise Broken(f"warp {agent} has still to read {word} of layer {old}, which is overwritten")


def launch(shape: Shape) -> list[list[Step]]:
    """The programs of all warps, block by block."""
    return [exchange(shape, block, warp) for block in range(shape.blocks) for warp in range(shape.warps)]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The ring of weights: one thread asks for stage after stage, warps take some at a time and give them back.

    Attributes:
      stages: Of the ring.
      warps: That take.
      takes: How many stages each product takes at once, in order.
    """

    stages: int
    warps: int
    takes: tuple[int, ...]

    def explore(self) -> int:
        """As `explore`, for the barriers that are full or empty by turns.

        A state: items asked for, those that have arrived, and for each warp the items waited for and given back.
        """
        total = sum(self.takes)
        start = (0, frozenset[int](), ((0, 0),) * self.warps)

        def left(state: tuple[int, frozenset[int], tuple[tuple[int, int], ...]]) -> str:
            done = all(given == total for _, given in state[2])
            return "" if done else f"{self.stages} stages, {state}"

        return _visit(start, lambda state: self._following(state, total), left)

    def _following(
        self, state: tuple[int, frozenset[int], tuple[tuple[int, int], ...]], total: int
    ) -> Iterator[tuple[int, frozenset[int], tuple[tuple[int, int], ...]]]:
        asked, arrived, warps = state
        given = min(given for _, given in warps)
        if asked < total and asked - self.stages < given:  # the stage's barrier of `empty` has every warp's arrival
            yield asked + 1, arrived, warps
        for item in set(range(asked)) - arrived:  # copies end in any order
            yield asked, arrived | {item}, warps
        for index, (waited, done) in enumerate(warps):
            end = next(end for end in self._ends() if end > done) if done < total else done
            if waited < end and waited in arrived:
                if waited + self.stages < asked:
                    raise Broken(f"warp {index} takes stage {waited % self.stages}, which was filled again")
                yield asked, arrived, (*warps[:index], (waited + 1, done), *warps[index + 1 :])
            elif waited == end and done < end:
                yield asked, arrived, (*warps[:index], (waited, done + 1), *warps[index + 1 :])

    def _ends(self) -> list[int]:
        return [sum(self.takes[: index + 1]) for index in range(len(self.takes))]


SHAPES = (
    Shape(blocks=3, warps=2, heads=1, splits=1, layers=3),
    Shape(blocks=4, warps=1, heads=2, splits=1, layers=3),
    Shape(blocks=4, warps=1, heads=2, splits=2, layers=3),
    Shape(blocks=3, warps=2, heads=1, splits=2, layers=2),
    Shape(blocks=3, warps=1, heads=5, splits=1, layers=3, rows=True),
    Shape(blocks=3, warps=2, heads=4, splits=1, layers=2, rows=True),
    Shape(blocks=4, warps=1, heads=2, splits=2, layers=3, rows=True),
)
RINGS = (Ring(2, 2, (1, 1, 2, 1) * 2), Ring(3, 2, (1, 1, 2, 3) * 2), Ring(3, 3, (1, 1, 2, 1) * 2))


def main() -> None:
    for shape in SHAPES:
        print(f"{shape}: {explore(launch(shape), shape.warps)} states, none of them broken")
    for ring in RINGS:
        print(f"{ring}: {ring.explore()} states, none of them broken")


if __name__ == "__main__":
    main()
