"""Records of any fields become a prompt and a response, by two Jinja templates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import CliError


def pair(prompt: str | None, response: str | None) -> Callable[[Any, str], Any] | None:
    """What turns a record, and the name of its place, into ``{"prompt": ..., "response": ...}``; None
    without templates.

    Templates are run in Jinja's sandbox. A field that is not there, and a value that is neither text nor a
    number, is an error rather than an empty string.

    Raises:
        CliError: one template without the other; one that Jinja cannot read. The returned function: a record
            that does not fit, with its place and its fields.
    """
    if prompt is None and response is None:
        return None
    if prompt is None or response is None:
        raise CliError("--prompt and --response need each other")
    filled = {"prompt": _compile("--prompt", prompt), "response": _compile("--response", response)}

    def fill(row: Any, where: str) -> Any:
        if not isinstance(row, dict):
            return row  # the reader of records says what is wrong with it
        return {field: _render(template, field, row, where) for field, template in filled.items()}

    return fill


def _compile(flag: str, text: str) -> Any:
    try:
        from jinja2 import StrictUndefined, TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise CliError(f"{flag} needs the package jinja2: pip install jinja2") from error

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=_printable, keep_trailing_newline=True
    )
    try:
        return environment.from_string(text)
    except TemplateSyntaxError as error:
        raise CliError(f"{flag} {text!r}: {error}") from error


def _printable(value: Any) -> Any:
    from jinja2 import Undefined

    if isinstance(value, (str, int, float, Undefined)):
        return value
    raise TypeError(f"{type(value).__name__} where text or a number is expected")


def _render(template: Any, field: str, row: dict[str, Any], where: str) -> str:
    try:
        return str(template.render(row))
    except Exception as error:  # whatever an expression over these values may raise
        raise CliError(
            f"{where}: --{field}: {error}; the fields are {', '.join(map(str, row)) or 'none'}"
        ) from error
