"""`python -m bench.ram MODEL`: decode with a part of the experts in memory (--ram), beside the mapped file.

Both generate under the same routing (a generated trace, forced) in processes of their own; their tokens must be identical and the
peak of resident memory below the cap. A row, with what the plan predicts, goes to bench/results/ram.csv; the last line is JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rgpu import sizes
from rgpu.engine import Engine, EngineConfig
from rgpu.errors import RgpuError, line
from rgpu.gguf import GGUFFile
from rgpu.machine import physical_cores, this_machine
from rgpu.residency.budget import Budget, Wishes, plan
from rgpu.residency.trace import SETS, RoutingTrace
from rgpu.shapes import from_gguf

from . import machine
from .compare import RESULTS, append

START = 1  # the token before the first


def generate(path: str, ram: str | None, trace: str, n_tokens: int, warm: int) -> dict:
    """Greedy tokens of one run, and its figures over the tokens behind the first `warm`."""
    with Engine(EngineConfig(path, n_ctx=n_tokens + warm + 1, ram=ram, replay_trace=trace)) as engine:
        session, tokens = engine.session(), [START]
        for count in range(warm + n_tokens):
            if count == warm:
                began, before = time.perf_counter(), engine.residency
            tokens.append(int(session.forward(tokens[-1:]).argmax()))
        seconds = time.perf_counter() - began
        found = {"tokens": tokens, "tok_s": n_tokens / seconds, "peak": machine.peak_resident()}
        if after := engine.residency:
            found |= {
                "hit_rate": 1 - (after.missed - before.missed) / (after.used - before.used),
                "swaps": (after.swaps - before.swaps) / n_tokens,
                "read": (after.read_bytes - before.read_bytes) / n_tokens,
                "slots": after.slots_per_layer,
            }
        return found


def in_a_process(*arguments) -> dict:
    code = "import sys, json; from bench.ram import generate; print(json.dumps(generate(*json.loads(sys.argv[1]))))"
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=machine.ROOT)
    if done.returncode:
        raise RgpuError(f"the run with ram = {arguments[1]} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def predicted(path: Path, ram: int, n_ctx: int) -> Budget:
    """What the plan says, from rates that are measured now."""
    with GGUFFile(path) as file:
        here = this_machine(physical_cores(), path, again=True)
        return plan(from_gguf(file), here, Wishes(n_ctx, ram=ram))


def main(argv=None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.ram", description=__doc__.split("\n\n")[0])
    p.add_argument("model", type=Path)
    p.add_argument("--ram", required=True, metavar="SIZE", help="the cap, e.g. 2.2G")
    p.add_argument("--tokens", type=int, default=200, help="timed tokens (default 200)")
    p.add_argument("--warm", type=int, default=100, help="tokens before, in which slots fill (default 100)")
    p.add_argument("--set", choices=SETS, default="B", help="locality of the routing (default B)")
    p.add_argument("--seed", type=int, default=time.time_ns() % 10000, help="of the routing (default: another each time)")
    args = p.parse_args(argv)
    try:
        row = measured(args)
    except (RgpuError, OSError) as error:
        print(line(error), file=sys.stderr)
        return 1
    append(row, RESULTS / "ram.csv")
    held = row["peak_gb"] <= row["ram_gb"]
    plan_says = f"the plan says {row['plan_tok_s']} at {row['plan_hit_rate']:.1%}: {row['of_plan']:.0%} of it"
    lines = [
        f"{row['slots_per_layer']:.0f} slots per layer, hits {row['hit_rate']:.1%}, {row['read_mb_per_token']} MB read per token",
        f"{row['tok_s']} tok/s (mapped {row['mapped_tok_s']}; {plan_says})",
        f"resident at most {row['peak_gb']} GB of {row['ram_gb']}: {'held' if held else 'EXCEEDED'}",
        f"tokens {'identical' if row['identical'] else 'DIFFERENT'}",
    ]
    print("\n".join(lines), file=sys.stderr)
    print(json.dumps(row))
    return 0 if held and row["identical"] else 1


def measured(args: argparse.Namespace) -> dict:
    """The row of both runs and of the plan. Raises RgpuError, OSError."""
    cap, n_tokens, path = sizes.nbytes(args.ram, "--ram"), args.tokens + args.warm, str(args.model.resolve())
    with Engine(EngineConfig(args.model, n_ctx=1)) as engine:
        hp = engine.hparams
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.npz"
        RoutingTrace.generate(n_tokens, hp.n_layer, hp.n_expert, hp.n_expert_used, args.set, args.seed).save(trace)
        whole = in_a_process(path, None, str(trace), args.tokens, args.warm)
        budget = predicted(args.model, cap, n_tokens + 1)
        capped = in_a_process(path, args.ram, str(trace), args.tokens, args.warm)
    row = {"date": time.strftime("%Y-%m-%d"), "machine": machine.name(), "commit": machine.commit(), "model": args.model.name}
    row |= {"ram_gb": cap / 1e9, "peak_gb": round(capped["peak"] / 1e9, 3), "slots_per_layer": capped["slots"]}
    row |= {"set": args.set, "seed": args.seed, "tokens": args.tokens, "warm": args.warm}
    row |= {"tok_s": round(capped["tok_s"], 2), "mapped_tok_s": round(whole["tok_s"], 2)}
    row |= {"identical": whole["tokens"] == capped["tokens"], "hit_rate": round(capped["hit_rate"], 4)}
    row |= {"swaps_per_token": round(capped["swaps"], 2), "read_mb_per_token": round(capped["read"] / 1e6, 2)}
    row |= {"plan_tok_s": round(budget.decode_tok_s, 2), "plan_hit_rate": round(budget.hit_rate, 4)}
    row |= {"disk_gb_s": round(budget.machine.disk_gb_s, 2), "of_plan": round(capped["tok_s"] / budget.decode_tok_s, 3)}
    return row


if __name__ == "__main__":
    sys.exit(main())
