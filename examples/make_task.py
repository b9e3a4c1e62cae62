"""Make the example task: a line of reStructuredText from Python's documentation -> Markdown.

    python examples/make_task.py --docs DIR --out examples/rst-to-markdown

`DIR` holds the sources of Python's documentation, `**/*.rst` or `**/*.rst.txt`. A third of them,
chosen by a hash of the name, belongs to the task (`make_base_model.py` leaves these out); a tenth
of that third is the test set, so no document is in both. Each output line is
`{"prompt": ..., "response": ...}`. The same sources always give the same files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

PROMPT = "reST:\n{rst}\nMarkdown:\n"
MIN_CHARS, MAX_CHARS = 24, 110  # of one reST example
MAX_PER_DOCUMENT = 40
MAX_SIGNATURES = 4  # of those 40: there are many, all alike

CALLS = {"func", "meth", "c:func", "cfunction"}
NAMES = set(  # Sphinx cross-references: `!` suppresses the link, `~` shows the last part only
    "class exc mod attr data const type member macro envvar option keyword token opcode"
    " c:type c:macro c:data c:member c:struct c:identifier".split()
)
CODE = set("file samp command kbd mimetype makevar pdbcmd c:expr regexp newsgroup".split())
STRONG = {"program", "guilabel", "menuselection", "strong"}
EMPHASIS = {"term", "dfn", "manpage", "emphasis", "abbr"}
LINKS = {
    "pep": ("PEP {0}", "https://peps.python.org/pep-{0:0>4}"),
    "rfc": ("RFC {0}", "https://www.rfc-editor.org/rfc/rfc{0}"),
    "issue": ("bpo-{0}", "https://bugs.python.org/issue{0}"),
    "source": ("{0}", "https://github.com/python/cpython/blob/3.11/{0}"),
}
ADMONITIONS = {
    "note": "Note",
    "warning": "Warning",
    "seealso": "See also",
    "important": "Important",
    "tip": "Tip",
}
VERSIONS = {"versionadded": "Added", "versionchanged": "Changed", "deprecated": "Deprecated"}
OBJECTS = {
    "function",
    "method",
    "class",
    "data",
    "attribute",
    "exception",
    "decorator",
    "classmethod",
    "staticmethod",
}
C_OBJECTS = {"c:function", "c:macro", "c:type", "c:var", "c:member"}
HEADINGS = {"*": "#", "=": "#", "-": "##", "^": "###", "~": "###", '"': "####"}


class Unconvertible(ValueError):
    """The text has unknown markup, or characters that Markdown would need escaped."""


def code(text: str) -> str:
    if not text or "`" in text or text != text.strip():
        raise Unconvertible(text)
    return f"`{text}`"


def role(name: str, content: str) -> str:
    """Markdown of ``:name:`content` ``."""
    name = name.removeprefix("py:")
    titled = re.fullmatch(r"(.*?)\s*<([^<>]+)>", content)
    title, target = titled.groups() if titled else (None, content)
    if title == "" or "\\" in content:
        raise Unconvertible(content)
    if name in LINKS:
        text, url = LINKS[name]
        if name != "source" and not target.isdigit():
            raise Unconvertible(content)
        return f"[{title or text.format(target)}]({url.format(target)})"
    if name == "ref":
        return f"[{title or target}](#{target})"
    if name == "doc":
        return f"[{title or target}]({target}.md)"
    if name in STRONG:
        return f"**{title or target}**"
    if name in EMPHASIS:
        return f"*{title or target}*"
    if name in CODE:
        braces = "{}" if name in {"file", "samp"} else ""  # these mark what varies
        return code("".join(c for c in content if c not in braces))
    if name not in CALLS | NAMES:
        raise Unconvertible(name)
    if title is not None:
        return code(title)
    shown = content.removeprefix("!")
    if shown.startswith("~"):
        shown = shown[1:].rsplit(".", 1)[-1]
    return code(shown.removesuffix("()") + "()" if name in CALLS else shown)


INLINE = re.compile(
    r"``(?P<literal>\S(?:.*?\S)?)``"
    r"|:(?P<role>[a-z:]+):`(?P<content>[^`]+)`"
    r"|`(?P<text>[^`<]+?)\s*<(?P<url>https?://[^`>\s]+)>`__?"
    r"|\*\*(?P<strong>[^*`\s](?:[^*`]*[^*`\s])?)\*\*"
    r"|(?<![\w*])\*(?P<emphasis>[^*`\s](?:[^*`]*[^*`\s])?)\*(?![\w*])"
    r"|(?P<bare>https?://[^\s<>`)]+[\w/])"
)


def plain(text: str) -> str:
    """Text between markup: smart dashes; refuses what would mean something else in Markdown."""
    if re.search(r"[`*_<>|\\\[\]{}#$~]", text):
        raise Unconvertible(text)
    return text.replace(" --- ", " — ").replace(" -- ", " – ")


def inline(text: str) -> str:
    """Markdown of one paragraph's inline reStructuredText."""
    if text.startswith(".. "):
        raise Unconvertible(text)
    text = text[:-1] if text.endswith("::") else text  # a literal block follows
    out, at = [], 0
    for m in INLINE.finditer(text):
        out.append(plain(text[at : m.start()]))
        at = m.end()
        if m["literal"]:
            out.append(code(m["literal"]))
        elif m["role"]:
            out.append(role(m["role"], m["content"]))
        elif m["text"]:
            out.append(f"[{plain(m['text'])}]({m['url']})")
        elif m["strong"] or m["emphasis"]:
            out.append(m[0])
        else:
            out.append(f"<{m['bare']}>")
    out.append(plain(text[at:]))
    return "".join(out)


def convert(rst: str) -> str:
    """Markdown of one example: a title, a directive, a list item or a paragraph.

    Raises Unconvertible for markup it does not know, so that what it returns can be trusted.
    """
    lines = rst.split("\n")
    if len(lines) == 2 and re.fullmatch(r"([*=^~\"-])\1{2,}", lines[1]):
        return f"{HEADINGS[lines[1][0]]} {inline(lines[0])}"
    if m := re.fullmatch(r"\.\. ([a-z:]+)::\s*(.*)", lines[0]):
        name, argument = m.groups()
        body = inline(" ".join(line.strip() for line in lines[1:]))
        if name in VERSIONS:
            return f"> **{VERSIONS[name]} in {argument}.**" + (f" {body}" if body else "")
        if name in ADMONITIONS and not body:
            return f"> **{ADMONITIONS[name]}:** {inline(argument)}"
        if name in OBJECTS | C_OBJECTS and not body and "\\" not in argument:
            return f"### {name.removeprefix('c:')} {code(argument)}"
        raise Unconvertible(name)
    if len(lines) > 1:
        raise Unconvertible(rst)
    if m := re.fullmatch(r"([*-]|#\.) (.*)", rst):
        return ("1. " if m[1] == "#." else "- ") + inline(m[2])
    return inline(rst)


def sentences(text: str) -> Iterator[str]:
    """The whole text if it is short, else its sentences."""
    if len(text) <= MAX_CHARS:
        yield text
    else:
        yield from re.split(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z`:*])", text)


def candidates(document: str) -> Iterator[str]:
    """Titles, known directives, list items and sentences of a document; the rest is skipped."""
    skip: int | None = None  # blocks indented more than this belong to something skipped
    admonition: str | None = None  # an admonition whose text is the next block
    for block in re.split(r"\n\s*\n", document.expandtabs().strip("\n")):
        lines = [line.rstrip() for line in block.strip("\n").split("\n")]
        indents = [len(line) - len(line.lstrip()) for line in lines]
        depth, lines = indents[0], [re.sub(" +", " ", line.strip()) for line in lines]
        text = " ".join(lines)
        if skip is not None and depth > skip:
            continue
        skip, opened, admonition = None, admonition, None
        if lines[0].startswith(".. "):
            m = re.fullmatch(r"\.\. ([a-z:]+)::\s*(.*)", lines[0])
            name = m[1] if m else ""
            if name in VERSIONS:
                first = next(sentences(" ".join(lines[1:])))
                yield lines[0] + (f"\n   {first}" if first else "")
            elif m and name in ADMONITIONS:
                if rest := " ".join([m[2], *lines[1:]]).strip():
                    yield f".. {name}:: {next(sentences(rest))}"
                admonition = None if rest else f".. {name}::"
            elif name in OBJECTS | C_OBJECTS and not (
                len(lines) > 1 and not lines[1].startswith(":")
            ):
                yield lines[0]
            elif name not in OBJECTS | C_OBJECTS:
                skip = depth
        elif (
            len(lines) == 2 and lines[1][0] in HEADINGS and lines[1] == lines[1][0] * len(lines[1])
        ):
            yield "\n".join(lines)
        elif re.match(r"[*-] |#\. ", lines[0]):
            for item in re.split(r"\n(?=[*-] |#\. )", "\n".join(lines)):
                item = item.replace("\n", " ")
                if len(item) <= MAX_CHARS:
                    yield item
        elif len(set(indents)) == 1 and not re.match(
            r">>>|[+=|]|\.\.\.|:[a-z]+:(?!`)|__", lines[0]
        ):
            for i, sentence in enumerate(sentences(text)):
                yield f"{opened} {sentence}" if opened and i == 0 else sentence
        if text.endswith("::") and not text.startswith(".. "):
            skip = depth


def examples(document: str) -> Iterator[tuple[str, str]]:
    """(reST, Markdown) pairs of one document, those whose Markdown differs."""
    for rst in candidates(document):
        if MIN_CHARS <= len(rst) <= MAX_CHARS:
            try:
                markdown = convert(rst)
            except Unconvertible:
                continue
            if markdown != rst:
                yield rst, markdown


def rank(name: str, salt: str = "") -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256((salt + name).encode()).digest()[:6], "big") / 2**48


def documents(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, text) of every source under `folder`; the name is its path without the suffix."""
    found = {
        str(p.relative_to(folder)).split(".rst")[0]: p
        for p in [*folder.rglob("*.rst"), *folder.rglob("*.rst.txt")]
    }
    if not found:
        raise SystemExit(
            f"no *.rst or *.rst.txt under {folder}: give the sources of Python's documentation"
        )
    for name in sorted(found):
        yield name, found[name].read_text(encoding="utf-8")


def is_task_document(name: str) -> bool:
    """Whether the source `name` belongs to the task, and so not to the base model's corpus."""
    return rank(name, "task") < 1 / 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--docs", type=Path, required=True, help="folder of Python's documentation sources"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "rst-to-markdown")
    args = parser.parse_args()

    seen: set[str] = set()
    splits: dict[str, list[tuple[str, str]]] = {"test": [], "train": []}
    names = [(name, text) for name, text in documents(args.docs) if is_task_document(name)]
    for split, rows in splits.items():  # test first: what is in both splits' documents stays there
        for name, text in names:
            if (rank(name, "test") < 0.1) == (split == "test"):
                pairs = [pair for pair in dict.fromkeys(examples(text)) if pair[0] not in seen]
                pairs.sort(key=lambda pair: rank(pair[0]))
                signatures = [pair for pair in pairs if pair[1].startswith("### ")]
                surplus = set(signatures[MAX_SIGNATURES:])
                kept = [pair for pair in pairs if pair not in surplus][:MAX_PER_DOCUMENT]
                seen.update(rst for rst, _ in kept)
                rows += kept
        rows.sort(key=lambda pair: rank(pair[0], "order"))
    args.out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with open(args.out / f"{split}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for rst, markdown in rows:
                row = {"prompt": PROMPT.format(rst=rst), "response": markdown}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(f"{split}: {len(rows)} examples")


if __name__ == "__main__":
    main()
