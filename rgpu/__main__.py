"""`rgpu COMMAND …` and `python -m rgpu COMMAND …`: hands the arguments to the command's own module."""

import sys
from importlib import import_module

from . import __version__

COMMANDS = {  # name -> (module with main(argv), what it does)
    "chat": ("rgpu.chat", "talk to a model in the terminal"),
    "plan": ("rgpu.plan", "say what goes where on a machine, and how fast a model will be"),
    "convert": ("convert.__main__", "make a GGUF with separate experts from a model folder or a stock GGUF"),
    "show": ("rgpu.show", "list what is in a GGUF"),
}
USAGE = "usage: rgpu COMMAND [OPTIONS]\n\n" + "".join(f"  {name:8} {about}\n" for name, (_, about) in COMMANDS.items())


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code, 2 if there is no such command."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if command in COMMANDS:
        return import_module(COMMANDS[command][0]).main(rest)
    if command in ("-h", "--help"):
        print(USAGE + "\nrgpu COMMAND --help lists a command's options.")
        return 0
    if command == "--version":
        print(f"rgpu {__version__}")
        return 0
    sys.stderr.write(USAGE)
    if command:
        sys.stderr.write(f"\nerror: there is no command '{command}'\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
