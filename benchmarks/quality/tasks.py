"""Two structured tasks over real lines of Python, each with one right answer.

signature    def get(self, key, default: int = 3, *args, **kw) -> str:     ->  self key [default] *args **kw
imports      from os.path import join, split as cut                        ->  import os.path; join = os.path.join; ...
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

ARROW = "\n=> "
SHORTEST, LONGEST = 16, 120  # characters of a prompt and at most of an answer


def signatures(text: str) -> Iterator[tuple[str, str]]:
    """A function's first line -> its parameters' names: those with a default in brackets, no annotations."""
    for line in re.findall(r"^[ \t]*(def \w+\(.+\).*:)[ \t]*$", text, re.MULTILINE):
        if not (parsed := _parse(line + " pass", ast.FunctionDef)):
            continue
        a = parsed.args
        plain = [*a.posonlyargs, *a.args]
        first = len(plain) - len(a.defaults)
        names = [f"[{p.arg}]" if k >= first else p.arg for k, p in enumerate(plain)]
        if a.vararg:
            names.append(f"*{a.vararg.arg}")
        pairs = zip(a.kwonlyargs, a.kw_defaults, strict=True)
        names += [f"{p.arg}=" if default is None else f"[{p.arg}]" for p, default in pairs]
        if a.kwarg:
            names.append(f"**{a.kwarg.arg}")
        if len(names) > 1:
            yield line, " ".join(names)


def imports(text: str) -> Iterator[tuple[str, str]]:
    """``from M import a, b as c`` -> ``import M; a = M.a; c = M.b``."""
    for line in re.findall(r"^[ \t]*(from [\w.]+ import [\w, ]+\w)[ \t]*$", text, re.MULTILINE):
        parsed = _parse(line, ast.ImportFrom)
        if parsed and parsed.level == 0 and parsed.module and parsed.module != "__future__":
            m = parsed.module
            names = [f"{n.asname or n.name} = {m}.{n.name}" for n in parsed.names]
            yield line, "; ".join([f"import {m}", *names])


def _parse(line: str, kind: type[ast.AST]) -> ast.AST | None:
    try:
        body = ast.parse(line).body
    except (SyntaxError, ValueError):
        return None
    return body[0] if len(body) == 1 and isinstance(body[0], kind) else None


TASKS = {"signature": signatures, "imports": imports}


def examples(
    task: str, texts: Iterable[str], longest: int, most: int, leave_out: Iterable[str] = ()
) -> dict[str, str]:
    """Up to ``most`` prompts and answers, no prompt twice and none of ``leave_out``; an example with its end
    has at most ``longest`` bytes."""
    found: dict[str, str] = {}
    known = set(leave_out)
    for text in texts:
        for line, answer in TASKS[task](text):
            prompt = line + ARROW
            size = len((prompt + answer).encode()) + 1
            fits = len(line) >= SHORTEST and size <= longest and len(answer) <= LONGEST
            if fits and prompt not in known:
                found.setdefault(prompt, answer)
            if len(found) == most:
                return found
    return found
