"""Renders the conversations of templates/conversations.json with transformers: templates/expected-NAME.json.

Usage: python tests/vectors/make_templates.py SHARED (the folder of reference data), with transformers installed. The clock of
the templates stands still at NOW. A case that a template refuses is recorded as {"error": message}.
"""

import json
import os
import sys
from datetime import datetime
from pathlib import Path

NOW = datetime(2026, 3, 4, 5, 6, 7)
HERE = Path(__file__).parent / "templates"


class Clock:
    """Stands in for `datetime` in transformers' module."""

    @staticmethod
    def now() -> datetime:
        return NOW


def main(shared: Path) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer
    from transformers.utils import chat_template_utils

    chat_template_utils.datetime = Clock
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "tiny" / "hub-tiny")
    tokenizer.bos_token = "<|endoftext|>"
    cases = json.loads((HERE / "conversations.json").read_text(encoding="utf-8"))
    for path in sorted([*(shared / "data" / "templates").glob("*.jinja"), *HERE.glob("*.jinja")]):
        template = path.read_text(encoding="utf-8")
        expected = {}
        for name, case in cases.items():
            arguments = {"add_generation_prompt": True, **case}
            messages = arguments.pop("messages")
            try:
                text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **arguments)
            except Exception as error:
                text = {"error": str(error)}
            expected[name] = text
        out = HERE / f"expected-{path.stem}.json"
        out.write_text(json.dumps(expected, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        refused = [name for name, text in expected.items() if isinstance(text, dict)]
        print(f"{out.name}: {len(expected)} cases, refused: {refused}", file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
