"""From a conversation to the prompt that a model was trained on, and from its answer back to thought, text and tool calls.

The prompt is made by the model's own Jinja template, in the environment of sandbox.py. Token ids are tokenizer.py's business.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .errors import TemplateError
from .gguf.reader import GGUFFile

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")  # names that clients use for one thing
OPEN, CLOSE = "<think>", "</think>"


class ChatTemplate:
    """A chat template. Compiled when made: a syntax error raises TemplateError with its line."""

    def __init__(self, source: str, bos: str = "", eos: str = ""):
        """`bos`, `eos`: the texts of these tokens, for templates that write them themselves."""
        from jinja2 import TemplateSyntaxError

        from .sandbox import compile_template

        self.source = source
        self._tokens = {name: text for name, text in (("bos_token", bos), ("eos_token", eos)) if text}
        try:
            self._compiled = compile_template(source)
        except TemplateSyntaxError as error:
            raise TemplateError(f"chat template, line {error.lineno}: {error.message}") from error
        except RecursionError as error:
            raise TemplateError("chat template: nested too deeply to be compiled") from error

    @classmethod
    def from_gguf(cls, file: GGUFFile) -> "ChatTemplate":
        """The template of an open GGUF file. Raises TemplateError if it has none."""
        source = file.metadata.get("tokenizer.chat_template")
        if not isinstance(source, str) or not source.strip():
            raise TemplateError(
                f"{file.path}: no chat template in this file (key tokenizer.chat_template). It may be a base model: give it plain"
                " text instead of messages, or convert it again with a chat_template.jinja in its folder"
            )
        texts = {}
        for name in ("bos", "eos"):
            id = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
            if id is not None and f"{name}_token" in source:  # the vocabulary is only decoded where it is needed
                tokens = file.metadata.get("tokenizer.ggml.tokens", [])
                texts[name] = tokens[id] if 0 <= id < len(tokens) else ""
        return cls(source, **texts)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt for a conversation, as transformers' `apply_chat_template` renders it.

        `messages`: dictionaries with `role`, `content` and whatever else the template knows (`tool_calls`,
        `reasoning_content`); `tools`: JSON schemas; `variables`: for the template, such as `enable_thinking`.
        Raises TemplateError with the template's line if it refuses the conversation, fails, or exceeds its limits.
        """
        from .sandbox import BUDGET, MAX_TEXT, Budget, Refusal

        values = {
            **self._tokens,
            **_plain(variables),
            "messages": [_message(message, index) for index, message in enumerate(messages)],
            "tools": _plain(tools),
            "documents": _plain(variables.get("documents")),
            "add_generation_prompt": add_generation_prompt,
            BUDGET: Budget(),
        }
        pieces, size = [], 0
        try:
            for piece in self._compiled.generate(values):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_TEXT:
                    raise TemplateError(f"chat template: the prompt exceeds {MAX_TEXT:,} characters")
        except TemplateError:
            raise
        except Refusal as error:
            raise TemplateError(f"the chat template refuses this conversation: {error}") from error
        except RecursionError as error:
            raise TemplateError(f"chat template{_line(error)}: endless recursion") from error
        except Exception as error:  # whatever Python raises in a template's expressions: it is the template's fault
            kind = "" if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: "
            raise TemplateError(f"chat template{_line(error)}: {kind}{error}") from error
        return "".join(pieces)


def _message(message: Mapping[str, Any], index: int) -> dict[str, Any]:
    """One message as templates expect it: absent rather than None, reasoning under both of its usual names."""
    if not isinstance(message, Mapping):
        raise TemplateError(f"message {index} is a {type(message).__name__}, not a dictionary with 'role' and 'content'")
    plain = {key: value for key, value in _plain(message).items() if value is not None}
    reasoning = next((plain[name] for name in REASONING_FIELDS if name in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """The value rebuilt from JSON's types: a template must not meet objects whose methods do things."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else [*map(_plain, value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    return None if value is None else f"<{type(value).__name__}>"


def _line(error: BaseException) -> str:
    """Where in the template an exception came from, for a message; Jinja has put the template's lines into the traceback."""
    line, trace = None, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return f", line {line}" if line else ""


class ThinkingSplitter:
    """Divides an answer, as it arrives, into what is thought and what is said; the tags themselves are dropped.

    `inside`: does the answer begin within a thought, because the prompt opened it (`starts_in_thinking`)?
    """

    def __init__(self, inside: bool, open: str = OPEN, close: str = CLOSE):
        self._inside = inside
        self._tags = {False: open, True: close}
        self._held = ""  # the beginning of what may become a tag

    def push(self, text: str) -> list[tuple[str, str]]:
        """Pieces ("think" or "text", text) that are now certain."""
        pieces, text = [], self._held + text
        while True:
            tag = self._tags[self._inside]
            before, found, after = text.partition(tag)
            if not found:
                break
            self._add(pieces, before)
            self._inside, text = not self._inside, after
        kept = next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
        self._held = text[len(text) - kept :]
        self._add(pieces, text[: len(text) - kept])
        return pieces

    def flush(self) -> list[tuple[str, str]]:
        """What was held back, at the end of the answer."""
        pieces: list[tuple[str, str]] = []
        self._add(pieces, self._held)
        self._held = ""
        return pieces

    def _add(self, pieces: list[tuple[str, str]], text: str) -> None:
        if text:
            pieces.append(("think" if self._inside else "text", text))


def starts_in_thinking(prompt: str, open: str = OPEN) -> bool:
    """Does an answer to this rendered prompt begin inside a thought? (The template has written the opening tag.)"""
    return prompt.rstrip().endswith(open)


CALL = re.compile(r"<tool_call>\s*")
CALL_END = re.compile(r"\s*(?:</tool_call>|\Z)")  # the end of a generation may swallow the closing tag
FUNCTION = re.compile(r"<function=([^>\n]+)>\s*")
FUNCTION_END = re.compile(r"\s*</function>")
# A value ends where the next parameter or the function's end follows: it may itself contain a closing tag.
PARAMETER = re.compile(r"\s*<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>(?=\s*(?:<parameter=|</function>))", re.DOTALL)


def parse_tool_calls(text: str, tools: Iterable[Mapping[str, Any]] | None = None) -> tuple[str, list[dict[str, Any]]]:
    """An answer (without its thought) as content and calls {"name": str, "arguments": dict}.

    Reads `<tool_call>` blocks in the JSON form of Qwen3 and the XML-like form of Qwen3.5 and Qwen3-Coder. The latter has no
    types: they come from the JSON schemas in `tools`; without one a value stays text unless it is a JSON object or array.
    What can't be read as a call stays in the content.
    """
    schemas = {}
    for tool in tools or ():
        function = tool.get("function", tool)
        schemas[function.get("name")] = (function.get("parameters") or {}).get("properties") or {}
    content, calls, position = "", [], 0
    while begin := CALL.search(text, position):
        read = _json_call if text.startswith("{", begin.end()) else _tagged_call
        call, end = read(text, begin.end(), schemas)
        closing = call and CALL_END.match(text, end)
        if closing:
            content += text[position : begin.start()]
            calls.append(call)
            position = closing.end()
        else:
            content += text[position : begin.end()]
            position = begin.end()
    return (content + text[position:]).strip(), calls


def _json_call(text: str, start: int, schemas: Mapping[str, Any]) -> tuple[dict[str, Any] | None, int]:
    try:
        value, end = json.JSONDecoder(strict=False).raw_decode(text, start)
        arguments = value.get("arguments", {})
        if isinstance(arguments, str):  # JSON within JSON, as OpenAI's interface has it
            arguments = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return None, start
    valid = isinstance(value.get("name"), str) and isinstance(arguments, dict)
    return ({"name": value["name"], "arguments": arguments}, end) if valid else (None, start)


def _tagged_call(text: str, start: int, schemas: Mapping[str, Any]) -> tuple[dict[str, Any] | None, int]:
    function = FUNCTION.match(text, start)
    if not function:
        return None, start
    name, arguments, position = function[1].strip(), {}, function.end()
    properties = schemas.get(name, {})
    while parameter := PARAMETER.match(text, position):
        key = parameter[1].strip()
        arguments[key] = _argument(parameter[2], properties.get(key))
        position = parameter.end()
    end = FUNCTION_END.match(text, position)
    return ({"name": name, "arguments": arguments}, end.end()) if end else (None, start)


def _argument(text: str, schema: Mapping[str, Any] | None) -> Any:
    """A parameter's value: by its schema's type where there is one, by its look otherwise."""
    kind = (schema or {}).get("type")
    kinds = kind if isinstance(kind, list) else [kind]
    if "string" in kinds or (kind is None and text.lstrip()[:1] not in ("{", "[")):
        return text
    literal = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)  # templates print Python's
    try:
        return json.loads(literal)
    except (ValueError, RecursionError):
        return text
