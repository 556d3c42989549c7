"""`python -m rgpu.chat` and `rgpu chat`: talk to a model in the terminal, or ask it one question in a pipe.

Owns options, modes and commands. Asking and answering is in conversation.py; screen and keyboard are in terminal.py.
"""

import argparse
import json
import os
import re
import sys
import warnings
from pathlib import Path

from .cache import cache_dir
from .conversation import Conversation
from .errors import RgpuError
from .terminal import Terminal

DESCRIPTION = """\
Talk to a model: interactively, or with -p or piped standard input (both: the prompt, then the input) for one answer.
Standard output carries the answer and nothing else; thoughts are shown dimmed on standard error if that is a terminal.
"""
HELP = """\
/reset          forget the conversation, but not the system prompt
/system TEXT    set the system prompt; without TEXT: remove it
/save FILE      save the conversation
/load FILE      continue a saved conversation
/stats          the last answer in numbers
/exit           leave; so does Ctrl-D
Ctrl-C          stop the answer
A line that ends in \\ goes on in the next; \"\"\" begins and ends a message of several."""
# What a model's author recommends: key after "general.sampling." -> field of SamplingParams.
RECOMMENDED = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
}
INTERRUPTED, PIPE_CLOSED = 130, 141  # what a shell reports for SIGINT and SIGPIPE


def parser() -> argparse.ArgumentParser:
    """The options. Those not given are None: EngineConfig, the model's recommendation and SamplingParams have the defaults."""
    from .sampler import SamplingParams as Default

    p = argparse.ArgumentParser(prog="rgpu chat", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("-m", "--model", metavar="FILE", help="a GGUF, or any file of a split one (default: the built-in model)")
    p.add_argument("-p", "--prompt", metavar="TEXT", help="answer this and exit; a model without chat template continues it")
    p.add_argument("--system", metavar="TEXT", help="the system prompt")
    p.add_argument("--no-think", action="store_true", help="ask the model not to think, and show no thoughts")
    p.add_argument("--json", action="store_true", help="end standard output with one line of statistics; not interactively")

    engine = p.add_argument_group("the engine")
    engine.add_argument("--ctx", dest="n_ctx", type=int, metavar="N", help="tokens of context (default: 32768 or the model's)")
    engine.add_argument("--kv", type=str.lower, metavar="TYPE", help="type of the KV cache: f16 (default), f32, q8_0")
    engine.add_argument("--device", metavar="NAME", help="auto (default: a GPU if the model fits it), cuda, cpu, reference")
    engine.add_argument("--threads", type=int, metavar="N", help="(default: physical cores)")
    engine.add_argument("--ram", metavar="SIZE", help="most memory to use, e.g. 6G, for a file that is larger (default: no cap)")
    engine.add_argument("--policy", metavar="NAME", help="which experts stay in memory: rotary (default), lru, lfru, static")
    engine.add_argument("--trace", metavar="FILE", help="save which experts were used (.npz)")

    sampling = p.add_argument_group("sampling (default: what the model's file recommends, else the number given here)")
    number = {"type": float, "metavar": "X"}
    sampling.add_argument("--temp", dest="temperature", help=f"{Default.temperature}; 0: always the likeliest token", **number)
    sampling.add_argument("--top-k", type=int, metavar="N", help=f"{Default.top_k}; 0: off")
    sampling.add_argument("--top-p", help=f"{Default.top_p}; 1: off", **number)
    sampling.add_argument("--min-p", help=f"{Default.min_p}; 0: off", **number)
    sampling.add_argument("--repeat-penalty", help=f"{Default.repeat_penalty:g}; 1: off", **number)
    sampling.add_argument("--seed", type=int, metavar="N", help="equal seeds give equal answers (default: a new one each time)")
    sampling.add_argument("-n", "--max-tokens", type=int, metavar="N", help="the longest answer (default: what fits the context)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Runs the chat; returns the exit code: 1 after an error, in one line on stderr, 130 after Ctrl-C."""
    options = parser()
    args = options.parse_args(argv)
    terminal = Terminal()
    warnings.showwarning = lambda message, *_: terminal.note(f"note: {message}")
    interactive = args.prompt is None and terminal.stdin_tty
    if interactive and args.json:
        options.error("--json goes with -p or piped input")
    try:
        return converse(args, terminal) if interactive else answer_once(args, terminal)
    except KeyboardInterrupt:
        terminal.note()
        return INTERRUPTED
    except BrokenPipeError:  # | head: the reader has enough; what is still buffered must go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (RgpuError, OSError) as error:
        terminal.error(error)
        return 1


def open_engine(args: argparse.Namespace, terminal: Terminal):
    """The engine and the sampling parameters that the user, else the model, else SamplingParams wants."""
    from .sampler import SamplingParams

    given = {key: value for key, value in vars(args).items() if value is not None}
    wanted = {key: given[key] for key in SamplingParams.__dataclass_fields__ if key in given}
    SamplingParams(**wanted)  # mistakes are reported before the model is opened

    from .engine import Engine, EngineConfig, builtin_model

    fields = {key: given[key] for key in EngineConfig.__dataclass_fields__ if key in given}
    if args.model == "":
        raise RgpuError("-m is empty: name a GGUF, or leave the option out for the built-in model")
    if args.model and (Path(args.model) / "config.json").is_file():
        raise RgpuError(f"{args.model} is a model folder: convert it first, with rgpu convert {args.model} OUT.gguf")
    config = EngineConfig(args.model or builtin_model(), **fields)
    engine = Engine(config, terminal.progress)
    found = {field: engine.file.metadata.get(f"general.sampling.{key}") for key, field in RECOMMENDED.items()}
    recommended = {field: value for field, value in found.items() if value is not None}
    return engine, SamplingParams(**recommended | wanted)


def answer_once(args: argparse.Namespace, terminal: Terminal) -> int:
    """-p or piped input: one answer; with --json its statistics."""
    text = message_of(args.prompt, terminal)
    engine, params = open_engine(args, terminal)
    with engine:
        chat = Conversation(engine, params, terminal, thinking=not args.no_think)
        if str(engine.file.metadata.get("tokenizer.chat_template") or "").strip():
            chat.set_system(args.system or "")
            chat.ask(text)
        elif args.system:
            raise RgpuError("--system needs a model with a chat template: this one can only continue a text")
        else:
            terminal.note("note: this model has no chat template, so it continues the text instead of answering")
            chat.complete(text)
        if terminal.stderr_tty:
            terminal.note(chat.summary(), dim=True)
        if args.json:
            terminal.write(json.dumps(chat.statistics()) + "\n")
        return INTERRUPTED if chat.interrupted else 0


def message_of(prompt: str | None, terminal: Terminal) -> str:
    """The one message: the prompt, and what is piped into standard input."""
    piped = "" if terminal.stdin_tty else terminal.read_piped()
    text = "\n\n".join(part for part in (prompt, piped) if part)
    if not text.strip():
        raise RgpuError("there is no message: -p is empty" if prompt is not None else "standard input is empty")
    return text


def converse(args: argparse.Namespace, terminal: Terminal) -> int:
    """The interactive session, until /exit or Ctrl-D."""
    engine, params = open_engine(args, terminal)
    with engine:
        chat = Conversation(engine, params, terminal, thinking=not args.no_think)
        chat.set_system(args.system or "")
        _ = engine.template, engine.tokenizer  # what is wrong with them is better known now than after the first message
        terminal.remember_lines(cache_dir() / "history")
        terminal.note("\n".join(engine.plan), dim=True)
        terminal.note("/help lists commands\n", dim=True)
        while True:
            try:
                text = terminal.read_message()
                if text.strip() and not turn(chat, text):
                    return 0
            except EOFError:
                terminal.note()
                return 0
            except KeyboardInterrupt:  # at the prompt: a new line
                terminal.note()
            except BrokenPipeError:
                raise
            except (RgpuError, OSError) as error:
                terminal.error(error)


def turn(chat: Conversation, text: str) -> bool:
    """Obey a command or answer a message; False: leave."""
    terminal = chat.terminal
    found = re.fullmatch(r"\s*/([A-Za-z]+|\?)(?:\s+(.*?))?\s*", text, re.DOTALL)
    if not found:
        chat.ask(text)
        if terminal.stderr_tty:
            terminal.note(chat.summary() + "\n", dim=True)
        return True
    command, operand = found[1].lower(), found[2] or ""
    match command:
        case "exit" | "quit" | "bye":
            return False
        case "help" | "?":
            terminal.note(HELP)
        case "reset":
            chat.reset()
            terminal.note("the conversation is forgotten", dim=True)
        case "system":
            chat.set_system(operand)
            terminal.note(f"the system prompt is {'set' if operand else 'removed'}", dim=True)
        case "save" | "load" if not operand:
            raise RgpuError(f"/{command} needs the name of a file")
        case "save":
            chat.save(Path(operand).expanduser())
            terminal.note(f"saved {len(chat.messages)} messages", dim=True)
        case "load":
            chat.load(Path(operand).expanduser())
            terminal.note(f"loaded {len(chat.messages)} messages", dim=True)
        case "stats":
            terminal.note(chat.summary())
            used = len(chat.session.tokens)
            terminal.note(f"{len(chat.messages)} messages; {used} of {chat.engine.n_ctx} tokens in the context")
        case _:
            raise RgpuError(f"there is no command /{command}: /help lists them")
    return True


if __name__ == "__main__":
    sys.exit(main())
