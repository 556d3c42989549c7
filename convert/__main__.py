"""`python -m convert` and `rgpu convert`: what the user asked for, which of the conversions that is, and how it ended.

Owns arguments, exit codes and signals; the work is in hub.py (checkpoints) and stock.py (GGUF).
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

from rgpu.errors import ConvertError, RgpuError, line

DEFAULT_TYPE = "Q4_K_M"  # of hub folders
INTERRUPTED = 128  # plus the number of the signal: what a shell reports

DESCRIPTION = """\
Makes one GGUF whose experts are separate, page-aligned records, from a model folder of the hub (config.json, .safetensors,
tokenizer.json) or from a stock GGUF (any file of a split one). A stock GGUF's blocks are copied unchanged, unless it holds
floats and --type asks for blocks. With --stock, goes back: SRC is a file made here, OUT the GGUF that other programs read.
"""


def parser() -> argparse.ArgumentParser:
    from rgpu.gguf.mix import MIXES

    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="python -m convert", description=DESCRIPTION, formatter_class=raw)
    p.add_argument("source", metavar="SRC", type=Path, help="model folder or GGUF")
    p.add_argument("out", metavar="OUT", type=Path, help="the GGUF to write")
    kinds = ", ".join(MIXES)
    p.add_argument(
        "--type", metavar="TYPE", type=str.upper, choices=MIXES,
        help=f"what to store weights as: {kinds} (default: {DEFAULT_TYPE} for a model folder, unchanged for a GGUF)",
    )  # fmt: skip
    p.add_argument("--stock", action="store_true", help="restore the stock GGUF from a per-expert one")
    p.add_argument("--no-mtp", action="store_true", help="leave out the multi-token-prediction block of a model folder")
    p.add_argument("--force", action="store_true", help="replace OUT if it exists")
    p.add_argument("--threads", type=int, default=_cores(), metavar="N", help="threads that quantise (default: %(default)s)")
    return p


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: list[str] | None = None) -> int:
    """Runs one conversion; returns the exit code, after one line on stderr if it failed."""
    args = parser().parse_args(argv)
    try:
        with _termination_raises():
            convert(args)
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return INTERRUPTED + signal.SIGINT
    except (RgpuError, OSError) as error:
        print(line(error), file=sys.stderr)
        return 1
    return 0


@contextlib.contextmanager
def _termination_raises():
    """SIGTERM and SIGHUP end the process by an exception, so that the unfinished file is deleted on the way out."""

    def leave(number, frame):
        raise SystemExit(INTERRUPTED + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        names = []  # only the main thread may choose what signals do
    before = {name: signal.signal(getattr(signal, name), leave) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def convert(args: argparse.Namespace) -> None:
    if args.threads < 1:
        raise ConvertError(f"--threads {args.threads}: at least one thread is needed")
    if args.stock:
        _restore(args)
    elif args.source.is_dir():
        from . import hub

        kind = args.type or DEFAULT_TYPE
        hub.to_per_expert(args.source, args.out, kind, force=args.force, threads=args.threads, mtp=not args.no_mtp)
    else:
        _convert_gguf(args)


def _restore(args: argparse.Namespace) -> None:
    from . import stock

    if args.type or args.no_mtp:
        raise ConvertError("--stock restores blocks as they are: it goes with neither --type nor --no-mtp")
    with _open(args.source) as file:
        if not stock.to_stock(file, args.out, force=args.force):
            print("note: metadata or tensors were edited since the conversion, so this is not the source itself", file=sys.stderr)


def _convert_gguf(args: argparse.Namespace) -> None:
    from . import stock

    if args.no_mtp:
        raise ConvertError("--no-mtp is for model folders: a GGUF is converted with all of its tensors")
    with _open(args.source) as file:
        if args.type:
            stock.quantise(file, args.out, args.type, force=args.force, threads=args.threads)
        else:
            stock.to_per_expert(file, args.out, force=args.force)


def _open(path: Path):
    from rgpu.gguf import GGUFFile

    if not path.exists():
        raise ConvertError(f"{path} does not exist; SRC is a model folder or a GGUF")
    return GGUFFile(path)


if __name__ == "__main__":
    sys.exit(main())
