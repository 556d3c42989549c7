"""`rgpu show FILE`: the metadata of a GGUF and its tensors by type. Reads the directory only, never a weight."""

import argparse
import os
import sys
from collections import Counter

import numpy as np

from .errors import RgpuError, line
from .gguf.reader import GGUFFile

WIDTH = 100  # characters of a value that are shown


def main(argv: list[str] | None = None) -> int:
    """Prints the listing; returns the exit code."""
    p = argparse.ArgumentParser(prog="rgpu show", description="The metadata of a GGUF, and its tensors by type.")
    p.add_argument("file", metavar="FILE", help="a GGUF, or any file of a split one")
    args = p.parse_args(argv)
    sys.stdout.reconfigure(errors="replace")
    try:
        with GGUFFile(args.file) as file:
            print("\n".join(listing(file)), flush=True)
    except BrokenPipeError:  # | head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (RgpuError, OSError) as error:
        print(line(error), file=sys.stderr)
        return 1
    return 0


def listing(file: GGUFFile) -> list[str]:
    """The lines that main prints."""
    count, size = Counter(), Counter()
    for info in file.tensors.values():
        count[info.quant] += 1
        size[info.quant] += info.nbytes
    lines = [f"GGUF version {file.version}, alignment {file.alignment}, {len(file.paths)} file(s), {len(file.metadata)} keys"]
    lines += [f"  {repr(key)[1:-1]} = {_shown(file.metadata[key])}" for key in file.metadata]
    lines += [f"{len(file.tensors)} tensors, {size.total() / 1e6:,.1f} MB"]
    return lines + [f"  {quant:8} {count[quant]:6} tensors {size[quant] / 1e6:12,.1f} MB" for quant, _ in size.most_common()]


def _shown(value) -> str:
    """One line: texts quoted and cut, arrays by their beginning."""
    if isinstance(value, np.ndarray | list):
        return f"{len(value)} values: " + ", ".join(_shown(entry)[:20] for entry in value[:5]) + (", …" if len(value) > 5 else "")
    text = f"{value:.7g}" if isinstance(value, float | np.floating) else repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= WIDTH else f"{text[:WIDTH]}… ({len(value)} characters)"
