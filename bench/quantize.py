"""Our encoders beside llama.cpp's: the error and the rate of every type, on seeded random weights or on those of a GGUF.

`python -m bench.quantize [FILE.gguf] [--threads 2]` prints a table and one JSON line; llama.cpp's figures appear where
llama_cpp is installed (extra `bench`). Errors are relative: rms(decoded - x) / rms(x); rates are weights per second.
"""

import argparse
import ctypes
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np

from convert.quantize import ENCODERS, quantize
from rgpu.gguf import GGUFFile
from rgpu.quants import TYPES

QUANTS = [name for name in ENCODERS if name not in ("F32", "F16", "BF16")]
N_TENSORS = 24  # of a file, spread over it
N_ROWS = 4096  # of each of them


def samples(rows: int = 64, columns: int = 2048) -> dict[str, np.ndarray]:
    """Weights of several distributions, float32 [rows, columns], each from a stream of its own."""
    shape = (rows, columns)
    draw = [np.random.default_rng([20, i]) for i in range(6)]
    scales = draw[3].lognormal(0, 0.5, (rows, 1)) * draw[3].lognormal(0, 0.3, (1, columns))
    outliers = np.where(draw[4].random(shape) < 2e-3, 20, 1)
    made = {
        "gaussian": draw[0].standard_normal(shape),
        "student-t 3": draw[1].standard_t(3, shape),
        "laplace": draw[2].laplace(size=shape),
        "scaled": scales * draw[3].standard_normal(shape),  # rows and columns of different size, as trained ones are
        "outliers": outliers * draw[4].standard_normal(shape),
        "one-sided": draw[5].gamma(2, 1, shape),
    }
    return {name: np.ascontiguousarray(0.02 * x, np.float32) for name, x in made.items()}


def file_samples(path: Path) -> dict[str, np.ndarray]:
    """The first rows of some matrices of an F32, F16 or BF16 file."""
    with GGUFFile(path) as file:
        names = [t.name for t in file.tensors.values() if len(t.shape) > 1 and t.shape[-1] % 256 == 0]
        chosen = names[:: -(-len(names) // N_TENSORS)]
        rows = {name: file.dequantize(name) for name in chosen}
        return {name: np.ascontiguousarray(x.reshape(-1, x.shape[-1])[:N_ROWS]) for name, x in rows.items()}


def llama_encoder() -> Callable[[np.ndarray, str], np.ndarray] | None:
    """llama.cpp's (x, quant) -> blocks without an importance matrix, out of llama_cpp's library; None where there is none."""
    found = importlib.util.find_spec("llama_cpp")
    libraries = sorted((Path(found.origin).parent / "lib").glob("*ggml-base*")) if found else []
    if not libraries:
        return None
    function = ctypes.CDLL(str(libraries[0])).ggml_quantize_chunk
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    function.restype = ctypes.c_size_t

    def encode(x, quant):
        tag = TYPES[quant]
        out = np.empty((len(x), x.shape[1] // tag.block * tag.nbytes), np.uint8)
        written = function(tag.id, x.ctypes.data, out.ctypes.data, 0, *x.shape, None)
        assert written == out.nbytes
        return out

    return encode


def error(x: np.ndarray, blocks: np.ndarray, quant: str) -> float:
    """Relative root mean square error of encoded rows."""
    decoded = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[quant])
    return float(np.sqrt(np.square(decoded - x, dtype=np.float64).mean() / np.square(x, dtype=np.float64).mean()))


def rate(encode: Callable[[np.ndarray], object], x: np.ndarray) -> float:
    """Weights per second, the best of five."""
    encode(x[:1])
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        encode(x)
        seconds.append(time.perf_counter() - start)
    return x.size / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quantize", description=__doc__.partition("\n")[0])
    parser.add_argument("file", nargs="?", type=Path, help="an F32, F16 or BF16 GGUF whose weights to encode")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    data = file_samples(args.file) if args.file else samples()
    timed = np.random.default_rng(1).standard_normal((2048, 2048), np.float32)
    theirs = llama_encoder()
    pool = ThreadPoolExecutor(args.threads)
    result = {}
    for quant in QUANTS:
        errors = {name: error(x, quantize(x, quant), quant) for name, x in data.items()}
        row = {"error": errors, "rate": rate(lambda x: quantize(x, quant, threads=args.threads), timed)}  # noqa: B023
        line = f"{quant:5s} {row['rate'] / 1e6:6.0f} M/s"
        if theirs:
            row["llama_error"] = {name: error(x, theirs(x, quant), quant) for name, x in data.items()}
            row["error_ratio"] = {name: errors[name] / row["llama_error"][name] for name in data}
            parts = np.array_split(timed, args.threads)
            row["llama_rate"] = rate(lambda x: list(pool.map(lambda part: theirs(part, quant), parts)), timed)  # noqa: B023
            row["rate_ratio"] = row["rate"] / row["llama_rate"]
            line += f" = {row['rate_ratio']:5.2f} x llama.cpp's"
        shown = row.get("error_ratio", errors)
        worst = max(shown, key=shown.get)
        line += f"; error{' ratio' if theirs else ''} {np.median(list(shown.values())):.4f}, at most {shown[worst]:.4f} ({worst})"
        print(line, file=sys.stderr)
        result[quant] = row
    print(json.dumps({"threads": args.threads, "types": result}))


if __name__ == "__main__":
    main()
