"""Chat templates that attack: each is refused, or gives a harmless text, within 2 s of processor time and 200 MB.

    python tests/hostile/template_attacks.py     writes TEMPLATES.md; fails where a bound does not hold

The worst of each kind are in the suite as well (tests/generate/chat_template_test.py); this is the long list.
"""

from __future__ import annotations

import os
import pathlib
import platform
import re
import resource
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from apr_jax.converters.errors import RefusedError, UsageError
from apr_jax.generate import chat_template

ROOT = pathlib.Path(__file__).resolve().parents[2]

USER = [{"role": "user", "content": "Hi"}]
SECONDS, MEGABYTES = 2.0, 200.0
LOOP, END = "{% for i in range(99999) %}", "{% endfor %}"
ATTACKS = {
    # attributes
    "class of a text": "{{ ''.__class__ }}",
    "class by key": "{{ ''['__class__'] }}",
    "class by |attr": "{{ ''|attr('__class__') }}",
    "class by |attr of pieces": "{{ ''|attr('__cl' ~ 'ass__') }}",
    "class by |map": "{{ [''] | map(attribute='__class__') | list }}",
    "class by |groupby": "{{ [''] | groupby('__class__') }}",
    "class by |sum": "{{ [''] | sum(attribute='__class__', start='') }}",
    "class by |selectattr": "{{ [''] | selectattr('__class__') | list }}",
    "class by format": "{{ '{0.__class__}'.format('') }}",
    "class by format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "class by a format in |map": "{{ ['{0.__class__}'] | map('format', '') | list }}",
    "globals of lipsum": "{{ lipsum.__globals__ }}",
    "globals of cycler": "{{ cycler.__init__.__globals__ }}",
    "globals of joiner": "{{ joiner.__init__.__globals__.os }}",
    "globals of namespace": "{{ namespace.__init__.__globals__ }}",
    "globals of raise_exception": "{{ raise_exception.__globals__ }}",
    "frames of a generator": "{{ (messages|map('upper')).gi_frame }}",
    "code of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "self": "{{ self.__init__ }}{{ self._TemplateReference__context }}",
    "the environment": "{{ self._TemplateReference__context.environment.globals }}",
    "a loop's parts": "{% for i in [1] %}{{ loop.__class__ }}{{ loop._iterable }}{% endfor %}",
    "mutation of a list": "{% set _ = messages.append(1) %}",
    "mutation of a mapping": "{% set _ = messages[0].update({'a': 1}) %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'x' as x %}",
    "extends": "{% extends 'x' %}",
    # time
    "range(10**9)": "{{ range(10**9)|list }}",
    "nested loops": LOOP * 3 + END * 3,
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "two macros in a cycle": "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
    "a recursive loop": "{% for i in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "a caller of itself": "{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}",
    "a power": "{{ 9 ** 9 ** 9 }}",
    "a long division": "{{ (10 ** 100000) // 7 ** 5 }}" * 200,
    "sorting": LOOP + "{% set x = range(99999)|sort(reverse=true) %}" + END,
    "unique": LOOP + "{{ range(99999)|unique|list|length }}" + END,
    "|urlize": "{{ ('www.' * 300000)|urlize }}",
    "|striptags": "{{ ('<' * 300000)|striptags }}",
    "|wordcount": LOOP + "{{ ('a ' * 99999)|wordcount }}" + END,
    "|random without end": LOOP + LOOP + "{{ range(9)|random }}" + END + END,
    "a number of 10^5 digits": "{{ " + "9" * 100_000 + " }}",
    "10,000 filters": "{{ 'a'" + "|upper" * 10_000 + " }}",
    "10,000 additions": "{{ 1" + "+1" * 10_000 + " }}",
    "10,000 brackets": "{{ " + "[" * 10_000 + "]" * 10_000 + " }}",
    "10,000 not": "{{ " + "not " * 10_000 + "1 }}",
    "1 MB of braces": "{{" * 500_000,
    "1 MB of comments": "{#" * 500_000,
    # memory
    "a repetition": "{{ 'a' * 10**9 }}",
    "a repetition that is multiplied": "{{ ('a' * 10**5) * 10**5 }}",
    "a list": "{{ [0] * 10**9 }}",
    "a tuple": "{{ (0,) * 10**9 }}",
    "|center": "{{ 'a'|center(10**9) }}",
    "|indent": "{{ ('a\\n' * 9999)|indent(10**9) }}",
    "|batch": "{{ [1]|batch(10**9, 'x')|list }}",
    "|slice": "{{ [1]|slice(10**9, 'x')|list }}",
    "|format": "{{ '%1000000000d'|format(1) }}",
    "%": "{{ '%1000000000d' % 1 }}",
    "% with a star": "{{ '%*d' % (10**9, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format within format": "{{ '{:{}}'.format(1, 10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "encode": "{{ ('a' * 10**8).encode('utf-32') }}",
    "translate": "{{ ('a' * 10**7).translate({97: 'b' * 1000}) }}",
    "|replace": "{{ ('a' * 10**6)|replace('a', 'b' * 10**4) }}",
    "|join": "{{ range(99999)|join('a' * 10**6) }}",
    "|wordwrap": "{{ ('a' * 10**7)|wordwrap(1) }}",
    "|xmlattr": "{{ {'a': 'x' * 10**8}|xmlattr }}",
    "|pprint": "{{ (range(99999)|list)|pprint }}" * 99,
    "|tojson": "{{ [messages] | tojson(indent=10**9) }}",
    "a cycle in a namespace": "{% set n = namespace() %}{% set n.a = n %}{{ n|tojson }}{{ n }}",
    "doubling": "{% set n = namespace(x='a') %}" + LOOP + "{% set n.x = n.x ~ n.x %}" + END,
    "doubling of lists": "{% set n = namespace(x=[1]) %}" + LOOP + "{% set n.x = n.x + n.x %}" + END,
    "a text that grows": "{% set n = namespace(x='') %}" + LOOP + "{% set n.x = n.x ~ 'a' * 99999 %}" + END,
    "output": LOOP + "{{ 'a' * 99999 }}" + END,
    "lipsum": "{{ lipsum(n=99999) }}",
    "lipsum of long paragraphs": "{{ lipsum(n=1, min=10**8, max=10**8 + 1) }}",
    "cycler": "{{ cycler(*range(10**8)) }}",
    "joiner": "{{ joiner('a' * 10**9)() }}",
    "dict": "{{ dict.fromkeys(range(10**9)) }}",
    "dates": "{{ strftime_now('%c' * 10**7) }}",
    "an exception of 1 GB": "{{ raise_exception('a' * 10**9) }}",
    "an exception of 10 MB": "{{ raise_exception('\\x1b' * 10**7) }}",
}  # fmt: skip
LEAKS = re.compile(r"<(class|module|function|bound method|built-in)|object at 0x|root:|Environment")


def rendered(template: str) -> tuple[str, float, float]:
    """Renders a template here; returns the outcome, and what the child took beyond what it takes anyway."""
    earlier = resource.getrusage(resource.RUSAGE_CHILDREN)
    chat_template.render("warm", USER, True, {})
    held = resource.getrusage(resource.RUSAGE_SELF)
    begun = time.process_time()
    child = chat_template._templates()._child
    assert child is not None
    before = _used(child.pid)
    try:
        text = chat_template.render(template, USER, True, {}).text
        outcome = f"LEAK {text[:80]!a}" if LEAKS.search(text) else f"a text of {len(text)} characters"
    except RefusedError as error:
        outcome = f"refused: {error.message[:90]!a}"
    except UsageError as error:
        outcome = f"refuses the messages, {len(str(error))} characters"
    chat_template._templates().close()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime - earlier.ru_utime - earlier.ru_stime - before + time.process_time() - begun
    return outcome, seconds, max(used.ru_maxrss, own.ru_maxrss - held.ru_maxrss) / 1024


def _used(pid: int) -> float:
    """Returns the processor seconds that a process has had."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    lines, broken = [], []
    worst_seconds = worst_memory = 0.0
    for name, template in ATTACKS.items():
        outcome, seconds, megabytes = rendered(template)
        worst_seconds, worst_memory = max(worst_seconds, seconds), max(worst_memory, megabytes)
        if seconds > SECONDS or megabytes > MEGABYTES or outcome.startswith("LEAK"):
            broken.append(name)
        lines.append(f"| {name.replace('|', chr(92) + '|')} | {outcome.replace('|', chr(92) + '|')} | {seconds:.2f} |")
        print(lines[-1], flush=True)
    head = (
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}: {len(ATTACKS)} attacks; "
        f"at most {worst_seconds:.2f} s of "
        f"processor time (bound {SECONDS:.0f}) and {worst_memory:.0f} MB in a child (bound {MEGABYTES:.0f}); "
        f"beyond a bound: {', '.join(broken) or 'none'}.\n\n| attack | outcome | seconds |\n| --- | --- | --- |\n"
    )
    (ROOT / "tests" / "hostile" / "TEMPLATES.md").write_text(head + "\n".join(lines) + "\n")
    print(head)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
