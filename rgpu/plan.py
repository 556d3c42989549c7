"""`python -m rgpu.plan MODEL` and `rgpu plan`: will a model run on a machine, where does what go, how fast will it be?

Reads options and a file's directory; the arithmetic is in residency/budget.py. Nothing is loaded and no device is touched.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from .catalogue import MODELS, parse, shape
from .errors import RgpuError, line
from .gguf.mix import FILE_TYPES
from .gguf.reader import GGUFFile
from .machine import GB, PROFILES, Machine, name, physical_cores, this_machine
from .models import architectures
from .residency import profile
from .residency.advice import changes
from .residency.budget import Budget, Wishes, plan
from .residency.report import lines, proposals
from .shapes import KV_TYPES, ModelShape, from_gguf
from .sizes import nbytes

N_CTX = 32768  # tokens of context, if the model was trained for as many
TFLOPS_PER_GB_S = 0.15  # of a GPU that is described by numbers: what those known by name have
N_BATCH = {True: 2048, False: 512}  # tokens of a prompt that are computed together, with and without a GPU

DESCRIPTION = """\
Says what goes where and how fast a model will be, before it is loaded or even downloaded. MODEL is a GGUF, or one of:
{models}. MACHINE is this one, measured, or one of: {machines}.
Single numbers replace the machine's. Sizes are like 6.3G or 6GiB, rates are in 1e9 bytes per second.
"""


def parser() -> argparse.ArgumentParser:
    about = DESCRIPTION.format(models=", ".join(MODELS), machines=", ".join(PROFILES))
    p = argparse.ArgumentParser(prog="rgpu plan", description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", metavar="MODEL", nargs="?", help="a GGUF (or any file of a split one), or a name")
    p.add_argument("--type", metavar="TYPE", type=str.upper, help="the model in another mix of types: Q4_K_M, IQ4_XS …")
    p.add_argument("--params", metavar="KEY=N,…", help="hyperparameters of a model that has no name here, or changes to one")
    p.add_argument("--ctx", dest="n_ctx", metavar="N", type=int, help=f"tokens of context (default: {N_CTX} or the model's)")
    p.add_argument("--kv", metavar="TYPE", type=str.lower, help="type of the KV cache: f16, q8_0 (default with a GPU), f32")
    p.add_argument("--batch", metavar="N", type=int, help="tokens of a prompt that are computed together (512; with a GPU 2048)")
    p.add_argument("--json", action="store_true", help="end standard output with one line of figures")
    p.add_argument("--png", metavar="FILE", type=Path, help="draw memory and time (needs matplotlib: the extra `plot`)")

    machine = p.add_argument_group("the machine")
    machine.add_argument("--machine", metavar="NAME", type=str.lower, help="a machine known by name (default: this one)")
    machine.add_argument("--vram", metavar="SIZE", help="VRAM that may be used; 0: none")
    machine.add_argument("--ram", metavar="SIZE", help="RAM of the machine; without a GPU, what the process may take of it")
    for option, what in (("gpu", "the GPU's memory"), ("pcie", "PCIe"), ("cpu", "RAM, read by the CPU"), ("disk", "the disk")):
        machine.add_argument(f"--{option}-gb-s", metavar="X", type=float, help=f"rate of {what}")
    machine.add_argument("--threads", metavar="N", type=int, help="of this machine (default: its cores)")
    machine.add_argument("--measure", action="store_true", help="measure this machine again, which takes a second")
    return p


def main(argv: list[str] | None = None) -> int:
    """Prints the plan; returns the exit code: 1 after an error, in one line on stderr."""
    args = parser().parse_args(argv)
    sys.stdout.reconfigure(errors="replace")
    try:
        budget = planned(args)
        print("\n".join([*head(budget), "", *lines(budget), *proposals(budget)]))
        if args.png:
            from .picture import draw

            draw(budget, args.png)
        if args.json:
            print(json.dumps(figures(budget)))
        sys.stdout.flush()
    except BrokenPipeError:  # | head has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (RgpuError, OSError) as error:
        print(line(error), file=sys.stderr)
        return 1
    return 0


def planned(args: argparse.Namespace) -> Budget:
    """The budget that the options ask for."""
    model, file = _model(args)
    machine, caps = _machine(args, model, file)
    n_ctx = min(N_CTX, model.n_ctx_train) if args.n_ctx is None else args.n_ctx
    n_batch = N_BATCH[machine.vram > 0] if args.batch is None else args.batch
    if not 1 <= n_ctx <= model.n_ctx_train:
        raise RgpuError(f"--ctx is {n_ctx}, but must be from 1 to {model.n_ctx_train}, for which the model was trained")
    if n_batch < 1:
        raise RgpuError(f"--batch is {n_batch}, but must be at least 1")
    kv = args.kv or ("q8_0" if machine.vram else "f16")
    if kv not in KV_TYPES:
        raise RgpuError(f"--kv is '{kv}', but there are: {', '.join(KV_TYPES)}")
    return plan(model, machine, Wishes(n_ctx, kv, n_batch, **caps))


class File(NamedTuple):
    """The file that the model is in."""

    path: Path
    digest: str


def _model(args: argparse.Namespace) -> tuple[ModelShape, File | None]:
    """The model's shape, and its file if it has one."""
    known, found = (args.model or "").lower(), None
    if args.type and args.type not in FILE_TYPES:
        raise RgpuError(f"--type is '{args.type}', but there are: {', '.join(FILE_TYPES)}")
    if args.params is not None:
        if known and known not in MODELS:
            raise RgpuError(f"--params changes a model known by name, which '{args.model}' is not: {', '.join(MODELS)}")
        model = shape(args.model or "a model", parse(args.params, MODELS.get(known)))
    elif known in MODELS:
        model = shape(args.model, MODELS[known])
    elif known and os.path.exists(args.model):
        with GGUFFile(args.model) as file:
            model, found = from_gguf(file), File(file.path, profile.digest(file))
    else:
        missing = f"'{args.model}' is neither a file nor a known model" if known else "which model? Name a GGUF"
        raise RgpuError(f"{missing}; known are: {', '.join(MODELS)}; --params describes others")
    return model.as_type(args.type) if args.type else model, found


def _machine(args: argparse.Namespace, model: ModelShape, file: File | None) -> tuple[Machine, dict[str, int]]:
    """The machine with the numbers that are given, and the caps that they mean."""
    machine = _known(args, model, file)
    rates = {f"{each}_gb_s": getattr(args, f"{each}_gb_s") for each in ("gpu", "pcie", "cpu", "disk")}
    rates = {key: rate for key, rate in rates.items() if rate is not None}
    for key, rate in rates.items():
        if not 0 < rate < 1e5:
            raise RgpuError(f"--{key.replace('_', '-')} is {rate:g}, but must be more than 0 and less than 100,000")
    vram = 0 if args.vram == "0" else nbytes(args.vram, "--vram") if args.vram is not None else None
    ram = nbytes(args.ram, "--ram") if args.ram is not None else None
    if not machine.vram and (vram or {"gpu_gb_s", "pcie_gb_s"} & rates.keys()):
        if not vram or not {"gpu_gb_s", "pcie_gb_s"} <= rates.keys():
            raise RgpuError(f"{machine.name} has no GPU: describe one by --vram, --gpu-gb-s and --pcie-gb-s, or name a --machine")
        rates["gpu_tflops"] = TFLOPS_PER_GB_S * rates["gpu_gb_s"]
    machine, caps = replace(machine, **rates), {}
    if vram is not None and 0 < vram < machine.vram:
        caps["vram"] = vram
    elif vram is not None:
        machine = replace(machine, vram=vram)
    if ram is not None:
        machine = replace(machine, ram=ram)
        caps |= {} if machine.vram else {"ram": ram}
    return machine, caps


def _known(args: argparse.Namespace, model: ModelShape, file: File | None) -> Machine:
    """The machine that is named; or this one, with what runs of this file have measured."""
    if args.machine is not None:
        if args.machine not in PROFILES:
            raise RgpuError(f"there is no machine '{args.machine}' (there are: {', '.join(PROFILES)}; without it: this one)")
        if args.measure or args.threads is not None:
            raise RgpuError("--measure and --threads are about this machine: leave --machine out")
        return PROFILES[args.machine]
    cores = physical_cores()
    if args.threads is not None and not 1 <= args.threads <= 4 * cores:
        raise RgpuError(f"--threads is {args.threads}, but must be from 1 to {4 * cores}")
    machine = this_machine(args.threads or cores, file and file.path, again=args.measure)
    if file is None or args.measure:
        return machine
    learned, notice = profile.load(file.digest, name(), model.n_layer * model.n_expert)
    if notice:
        print(f"note: {notice}", file=sys.stderr)
    return replace(machine, **learned.rates) if learned else machine


# ---- what is said ----


def head(budget: Budget) -> list[str]:
    """The model and the machine."""
    shape, m = budget.shape, budget.machine
    gpu = f"VRAM {m.vram / GB:.2f} GB at {m.gpu_gb_s:.3g} GB/s, PCIe {m.pcie_gb_s:.3g} GB/s, " if m.vram else ""
    rows = [
        f"model    {shape.name}: {shape.arch or 'made up'}, {shape.mix}, {shape.file / GB:.3g} GB; {shape.n_layer} layers, "
        f"{shape.n_expert} experts, {shape.n_expert_used} used",
        f"machine  {m.name}: {gpu}RAM {m.ram / GB:.3g} GB at {m.cpu_gb_s:.3g} GB/s, disk {m.disk_gb_s:.2g} GB/s",
    ]
    if shape.arch not in architectures():
        rows.append(f"note     this version does not run {shape.arch or 'such a model'}: this is what its bytes allow")
    if m.vram and budget.placement.how != "all":
        rows.append("note     this version uses a GPU for models that fit into it: how experts rotate there is calculated")
    return rows


def figures(budget: Budget) -> dict:
    """The plan for programs. Sizes in bytes, times in ms."""
    placement, decode, prefill = budget.placement, budget.decode, budget.prefill[budget.wishes.n_batch]
    return {
        "model": budget.shape.name,
        "type": budget.shape.mix,
        "machine": budget.machine.name,
        "n_ctx": budget.wishes.n_ctx,
        "kv": budget.wishes.kv,
        "fits": not budget.problem,
        "problem": budget.problem,
        "placement": placement.how,
        **{f"{place}_bytes": sizes for place, sizes in placement.where.items()},
        "slots_per_layer": round(budget.slots_per_layer, 2),
        "slots": placement.slots,
        "slot_bytes": placement.sizes,
        "hit_rate": round(budget.hit_rate, 4),
        "disk_rate": round(budget.from_disk, 4),
        "decode_tok_s": round(budget.decode_tok_s, 2),
        "decode_tok_s_full": round(1000 / budget.decode_full.total, 2),
        "prefill_tok_s": round(budget.prefill_tok_s, 1),
        "prefill_tok_s_by_batch": {n: round(budget.prefill_of(n), 1) for n in budget.prefill},
        "ms": {lane: round(ms, 4) for lane, ms in decode.ms.items()},
        "ms_at_once": decode.at_once,
        "prefill_ms": {lane: round(ms, 2) for lane, ms in prefill.ms.items()},
        "limit": decode.limit,
        "prefill_limit": prefill.limit,
        "proposals": [
            {"what": what, "decode_tok_s": round(each.decode_tok_s, 2), "prefill_tok_s": round(each.prefill_tok_s, 1)}
            for what, each in changes(budget)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
