"""Structured tasks over real lines of Python, each with one right answer.

signature    def get(self, key, default: int = 3, *args, **kw) -> str:     ->  self key [default] *args **kw
imports      from os.path import join, split as cut                        ->  import os.path; join = os.path.join; ...
order        def get(self, key, default: int = 3, *args, **kw) -> str:     ->  args default key kw self
parens       if not a and b.c(d) - 1 < e:                                  ->  ((not a) and ((b.c(d) - 1) < e))

The last two are harder: nearly every answer to the first two is right after tuning.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

ARROW = "\n=> "
SHORTEST, LONGEST = 16, 120  # characters of a prompt and at most of an answer


def signatures(text: str) -> Iterator[tuple[str, str]]:
    """A function's first line -> its parameters' names: those with a default in brackets, no annotations."""
    for line, a in _functions(text):
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


def order(text: str) -> Iterator[tuple[str, str]]:
    """A function's first line -> its parameters' names in the order of their code points."""
    for line, a in _functions(text):
        plain = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        if len(plain) > 2:
            yield line, " ".join(sorted(p.arg for p in plain))


def _functions(text: str) -> Iterator[tuple[str, ast.arguments]]:
    for line in re.findall(r"^[ \t]*(def \w+\(.+\).*:)[ \t]*$", text, re.MULTILINE):
        if parsed := _parse(line + " pass", ast.FunctionDef):
            yield line, parsed.args


def parens(text: str) -> Iterator[tuple[str, str]]:
    """A condition, a returned or an assigned value of two operators or more -> a pair of parentheses around what each
    of them makes; what has no operator stays as it is written."""
    lines = r"^[ \t]*(if .+:|return .+|\w+ = .+)[ \t]*$"
    for line in re.findall(lines, text, re.MULTILINE):
        parsed = _parse(line + " pass" if line.endswith(":") else line, ast.stmt)
        value = getattr(parsed, "test", None) or getattr(parsed, "value", None)
        if isinstance(value, ast.expr) and value.end_lineno == 1:  # a lone \r ends a line too
            answer, operators = _explicit(value, line)
            if operators > 1:
                yield line, answer


def _explicit(node: ast.expr, line: str) -> tuple[str, int]:
    """An expression with all its parentheses, and how many operators it has."""
    match node:
        case ast.BoolOp(op=op, values=parts):
            words = [WORDS[type(op)]] * (len(parts) - 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in WORDS:
            parts, words = [left, right], [WORDS[type(op)]]
        case ast.Compare(left=left, ops=ops, comparators=others):
            parts, words = [left, *others], [WORDS[type(op)] for op in ops]
        case ast.UnaryOp(op=op, operand=operand):
            inner, count = _explicit(operand, line)
            return f"({WORDS[type(op)]}{inner})", count + 1
        case _:
            # offsets are of UTF-8; ast.get_source_segment would split the line anew for each
            return line.encode()[node.col_offset : node.end_col_offset].decode(), 0
    found = [_explicit(part, line) for part in parts]
    pieces = [found[0][0], *(f"{w} {p}" for w, (p, _) in zip(words, found[1:], strict=True))]
    return f"({' '.join(pieces)})", len(words) + sum(count for _, count in found)


WORDS: dict[type[ast.AST], str] = {
    **{ast.And: "and", ast.Or: "or", ast.Not: "not ", ast.USub: "-", ast.UAdd: "+", ast.Invert: "~"},
    **{ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%"},
    **{ast.Pow: "**", ast.MatMult: "@", ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^"},
    **{ast.LShift: "<<", ast.RShift: ">>", ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<="},
    **{ast.Gt: ">", ast.GtE: ">=", ast.Is: "is", ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in"},
}  # fmt: skip


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


TASKS = {"signature": signatures, "imports": imports, "order": order, "parens": parens}


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
