"""The command `plan`: what it prints for people and for programs, that its advice holds, and one line for every mistake."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest

from rgpu import __main__ as rgpu
from rgpu import engine, machine, plan, shapes, sizes
from rgpu.catalogue import MODELS
from rgpu.gguf import GGUFFile
from rgpu.machine import GB, PROFILES, Machine
from rgpu.residency import profile
from rgpu.residency.profile import Profile
from tests.tiny import stock_gguf

LAPTOP = ("qwen3.6-35b-a3b", "--machine", "rtx4060-laptop", "--vram", "6.3G")
HERE = Machine("this one", ram=16 * GB, cpu_gb_s=30.0, cpu_gw_s=60.0, cpu_prefill_gw_s=200.0)


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """This machine, without measuring it; the calls are kept."""
    calls = []
    monkeypatch.setenv("RGPU_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "this_machine", lambda *args, **options: calls.append((args, options)) or HERE)
    return calls


@pytest.fixture
def run(capsys):
    """`run(options…)` -> the lines of stdout; nothing may be on stderr."""

    def run(*args: str) -> list[str]:
        assert plan.main(list(args)) == 0
        out, err = capsys.readouterr()
        assert not err
        return out.splitlines()

    return run


def figures(lines: list[str]) -> dict:
    return json.loads(lines[-1])


# ---- what it says ----


def test_the_table_and_the_figures_agree(run):
    *lines, last = run(*LAPTOP, "--json")
    found, text = json.loads(last), "\n".join(lines)
    total = next(line for line in lines if line.startswith("in all"))
    assert all(sizes.text(sum(found[f"{place}_bytes"].values())) in total for place in ("vram", "ram"))
    experts = next(line for line in lines if line.startswith("experts"))
    assert all(sizes.text(found[f"{place}_bytes"]["experts"]) in experts for place in ("vram", "ram"))
    at_once = max(found["ms"][lane] for lane in found["ms_at_once"])
    serial = sum(ms for lane, ms in found["ms"].items() if lane not in found["ms_at_once"])
    assert found["decode_tok_s"] == pytest.approx(1000 / (serial + at_once), rel=1e-3)
    decode = next(line for line in lines if line.startswith("decode"))
    speeds = [found["decode_tok_s"], found["decode_tok_s_full"]]
    assert [float(decode.split()[i]) for i in (1, 3)] == pytest.approx(speeds, rel=0.005)
    assert f"prefill  {found['prefill_tok_s']:,.0f} tok/s" in text and f"hits     {found['hit_rate']:.0%} of the routed" in text
    assert f"slots    {found['slots_per_layer']:.3g} of 256" in text and found["limit"] == "dense"
    assert found["fits"] and found["prefill_tok_s_by_batch"].keys() == {"512", "2048", "4096"}
    for proposal in found["proposals"][:4]:
        assert f"{proposal['what']}: {proposal['decode_tok_s']:.3g} tok/s" in text


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("pc", PROFILES)
def test_every_model_on_every_machine(run, name, pc):
    *lines, last = run(name, "--machine", pc, "--json")
    found = json.loads(last)
    assert found["fits"] == (found["decode_tok_s"] > 0) == (not found["problem"])
    assert all(len(line) <= 170 for line in lines), max(lines, key=len)
    assert found["proposals"] or found["fits"]


def test_rgpu_plan_is_the_same_command(run, capsys):
    lines = run(*LAPTOP)
    assert rgpu.main(["plan", *LAPTOP]) == 0
    assert capsys.readouterr().out.splitlines() == lines


def test_a_file_on_this_machine(run, tmp_path, here):
    path = stock_gguf(tmp_path / "x.gguf", "qwen3moe", "Q4_K")
    found = figures(run(str(path), "--json"))
    assert found["model"] == "tiny-qwen3moe" and found["machine"] == "this one" and found["n_ctx"] == 4096
    with GGUFFile(path) as file:
        experts = sum(info.nbytes for name, info in file.tensors.items() if "_exps" in name)
    assert found["ram_bytes"]["experts"] == experts and found["placement"] == "mapped"
    assert [(args[1], options) for args, options in here] == [(path, {"again": False})]
    run(str(path), "--measure", "--threads", "1")
    assert here[-1] == ((1, path), {"again": True})


def test_what_runs_have_measured_replaces_what_is_measured_at_rest(run, capsys, tmp_path):
    path = stock_gguf(tmp_path / "x.gguf", "qwen3moe")
    with GGUFFile(path) as file:
        key = profile.digest(file)
    slow = figures(run(str(path), "--json"))
    profile.save(Profile(key, machine.name(), np.zeros(3 * 8, np.float32), {"cpu_gb_s": 300.0, "cpu_gw_s": 600.0}))
    fast = figures(run(str(path), "--json"))
    assert fast["ms"]["dense"] == pytest.approx(slow["ms"]["dense"] / 10, abs=1e-4)
    assert figures(run(str(path), "--json", "--measure"))["ms"] == slow["ms"]
    kept = profile.path(key, machine.name())
    kept.write_bytes(kept.read_bytes()[:-1])
    assert plan.main([str(path)]) == 0
    assert capsys.readouterr().err.count("is damaged") == 1


def test_single_numbers_replace_the_machines(run):
    usual = figures(run(*LAPTOP, "--json"))
    for option, value, lane in (
        ("--gpu-gb-s", 400, "dense"), ("--cpu-gb-s", 100, "host"), ("--pcie-gb-s", 1, "pull"), ("--disk-gb-s", 5, "disk"),
    ):  # fmt: skip
        found = figures(run(*LAPTOP, option, str(value), "--json", *(["--ram", "8G"] if lane == "disk" else [])))
        assert found["ms"][lane] != usual["ms"][lane]
    larger = figures(run(*LAPTOP[:3], "--vram", "12GiB", "--json"))
    assert sum(larger["vram_bytes"].values()) > 11 * GB
    assert figures(run(*LAPTOP[:3], "--vram", "0", "--json"))["vram_bytes"] == {}
    described = run("qwen3.6-35b-a3b", "--vram", "8188MiB", "--gpu-gb-s", "200", "--pcie-gb-s", "12.5", "--json")
    assert figures(described)["ms"]["dense"] == usual["ms"]["dense"]


def test_options_of_the_session_and_the_type(run):
    usual, found = (figures(run(*LAPTOP, *more, "--json")) for more in ([], ["--ctx", "4096", "--kv", "f16", "--type", "iq4_xs"]))
    assert found["vram_bytes"]["kv"] == 4096 * 20480 and found["type"] == "IQ4_XS"
    assert found["vram_bytes"]["dense"] < usual["vram_bytes"]["dense"]
    batch = figures(run(*LAPTOP, "--batch", "1024", "--json"))
    assert usual["prefill_tok_s_by_batch"]["512"] < batch["prefill_tok_s"] < usual["prefill_tok_s"]


def test_notes_say_what_this_version_does_not_do(run):
    assert any("does not run gpt-oss" in line for line in run("gpt-oss-20b", "--machine", "cpu"))
    assert not any(line.startswith("note") for line in run("qwen3-30b-a3b", "--machine", "cpu"))
    assert any("uses a GPU for models that fit" in line for line in run(*LAPTOP))


def test_defaults_are_the_engines():
    """They are written down twice, because importing the engine takes as long as four plans."""
    assert plan.N_CTX == engine.N_CTX and set(shapes.KV_TYPES) == set(engine.KV_TYPES)
    assert plan.N_BATCH[False] == engine.EngineConfig("x").n_batch


# ---- advice ----


@pytest.mark.parametrize(
    "options, change",
    [
        (["glm-4.5-air", "--machine", "rtx4060-laptop"], "--ctx 16384"),
        (["qwen3-30b-a3b", "--machine", "rtx4060-laptop", "--vram", "3.2G"], "--ctx 16384"),
        (["qwen3-30b-a3b", "--machine", "cpu", "--ram", "6G", "--kv", "f32"], "--kv q8_0"),
    ],
)
def test_the_change_that_fits_fits(run, options, change):
    found = figures(run(*options, "--json"))
    gentle, memory = found["proposals"]
    assert not found["fits"] and gentle["what"] == change
    changed = figures(run(*options, *change.split(), "--json"))
    assert changed["fits"] and changed["decode_tok_s"] == pytest.approx(gentle["decode_tok_s"])
    amount = memory["what"].split()[-1] if memory["what"].startswith("--") else memory["what"].split()[0] + "G"
    place = "--ram" if "ram" in memory["what"].lower().replace("vram", "") else "--vram"
    rest = [each for i, each in enumerate(options) if each != place and options[i - 1] != place]
    assert figures(run(*rest, place, amount, "--json"))["fits"]


def test_what_helps_helps(run):
    """More memory, a smaller type, a shorter context: each as the plan with that change says."""
    found = figures(run(*LAPTOP, "--json"))
    by_what = {proposal["what"]: proposal["decode_tok_s"] for proposal in found["proposals"]}
    assert all(speed >= 1.03 * found["decode_tok_s"] for speed in by_what.values())
    assert by_what["no cap on memory"] == figures(run(*LAPTOP[:3], "--json"))["decode_tok_s"]
    long = figures(run(*LAPTOP, "--kv", "f16", "--json"))["proposals"]
    shorter = figures(run(*LAPTOP, "--kv", "f16", "--ctx", "8192", "--json"))["decode_tok_s"]
    assert next(each["decode_tok_s"] for each in long if each["what"] == "--ctx 8192") == shorter
    smaller = next(speed for what, speed in by_what.items() if what.startswith("type IQ4_XS"))
    assert smaller == figures(run(*LAPTOP, "--type", "IQ4_XS", "--json"))["decode_tok_s"]
    tight = figures(run(*LAPTOP[:3], "--ram", "12G", "--json"))
    assert tight["proposals"][0]["what"] == "16 GB of RAM" and tight["disk_rate"] > 0
    assert not figures(run("qwen3-30b-a3b", "--machine", "cpu", "--type", "Q2_K", "--json"))["proposals"]


# ---- the picture ----


def test_the_picture(run, tmp_path):
    for model, pc in (("gpt-oss-20b", "cpu"), ("glm-4.5-air", "gtx1060")):  # the second does not fit
        run(model, "--machine", pc, "--png", str(tmp_path / f"{model}.png"))
        assert (tmp_path / f"{model}.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_shows_the_plan():
    from matplotlib.figure import Figure

    from rgpu.picture import _memory, _time

    args = plan.parser().parse_args(LAPTOP)
    budget = plan.planned(args)
    memory, time = Figure().subplots(1, 2)
    _memory(memory, budget)
    _time(time, budget)
    bars = [patch.get_height() for patch in memory.patches]
    places = budget.placement.where.values()
    assert sum(bars) == pytest.approx(sum(sum(sizes.values()) for sizes in places) / 1e9)
    ends = [patch.get_x() + patch.get_width() for patch in time.patches]
    assert max(ends) == pytest.approx(budget.decode.total)


def test_a_picture_without_matplotlib_or_in_no_format(monkeypatch, capsys, tmp_path):
    assert plan.main([*LAPTOP, "--png", str(tmp_path / "x.abc")]) == 1
    assert "abc" in only_line(capsys)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plan.main([*LAPTOP, "--png", str(tmp_path / "x.png")]) == 1
    assert "needs matplotlib" in only_line(capsys)


# ---- mistakes ----


def only_line(capsys) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    "options, said",
    [
        ([], "known are: qwen3.6-35b-a3b, "),
        (["nothing"], "'nothing' is neither a file nor a known model; known are: qwen3.6-35b-a3b, "),
        ([*LAPTOP[:2], "rtx9999"], "no machine 'rtx9999' (there are: rtx4060-laptop, "),
        ([*LAPTOP, "--type", "Q9"], "--type is 'Q9', but there are: F32, "),
        ([*LAPTOP, "--kv", "q4"], "--kv is 'q4', but there are: f16, f32, q8_0"),
        ([*LAPTOP, "--ctx", "0"], "--ctx is 0, but must be from 1 to 262144"),
        ([*LAPTOP, "--ctx", "300000"], "--ctx is 300000"),
        ([*LAPTOP, "--batch", "0"], "--batch is 0"),
        ([*LAPTOP[:3], "--vram", "much"], "--vram is 'much'"),
        ([*LAPTOP[:3], "--vram=-3G"], "--vram is '-3G'"),
        ([*LAPTOP, "--ram", "0"], "--ram is '0'"),
        ([*LAPTOP, "--cpu-gb-s", "0"], "--cpu-gb-s is 0"),
        ([*LAPTOP, "--disk-gb-s", "-1"], "--disk-gb-s is -1"),
        ([*LAPTOP, "--pcie-gb-s", "nan"], "--pcie-gb-s is nan"),
        ([*LAPTOP, "--gpu-gb-s", "inf"], "--gpu-gb-s is inf"),
        ([*LAPTOP, "--measure"], "leave --machine out"),
        ([*LAPTOP, "--threads", "2"], "leave --machine out"),
        ([LAPTOP[0], "--threads", "0"], "--threads is 0"),
        ([LAPTOP[0], "--vram", "8G"], "has no GPU: describe one by --vram, --gpu-gb-s and --pcie-gb-s"),
        ([LAPTOP[0], "--gpu-gb-s", "200"], "has no GPU"),
        (["--params", "n_layer=3"], "--params lacks n_embd"),
        (["x.gguf", "--params", "n_layer=3"], "which 'x.gguf' is not"),
    ],
)
def test_mistakes_are_one_line(capsys, options, said):
    assert plan.main([str(option) for option in options]) == 1
    assert said in only_line(capsys)


def test_files_that_are_no_models(capsys, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF, not quite")
    assert plan.main([str(path)]) == 1
    assert "x.gguf" in only_line(capsys)
    assert plan.main([str(tmp_path)]) == 1
    assert str(tmp_path) in only_line(capsys)


def test_a_machine_without_memory_to_speak_of(run, monkeypatch):
    monkeypatch.setattr(plan, "this_machine", lambda *args, **options: replace(HERE, ram=GB))
    found = figures(run("qwen3-30b-a3b", "--json"))
    assert not found["fits"] and "of RAM are needed" in found["problem"] and "GB of RAM" in found["proposals"][-1]["what"]
