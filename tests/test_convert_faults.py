"""What a conversion refuses, in one line and with nothing left behind: bad sources, bad targets, full disks, signals."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from convert.__main__ import main
from convert.checkpoint import Checkpoint

from .gguf_forms import rewrite
from .tiny import stock_gguf
from .tiny_hub import hub_checkpoint, safetensors

ROOT = Path(__file__).parents[1]
# A conversion that has begun to write its data, says so and waits.
PAUSED = """
import sys, time
from convert import writer
def pause(*arguments, **options):
    print("writing", flush=True)
    time.sleep(60)
writer.Target.copy = pause
from convert.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    return stock_gguf(tmp_path_factory.mktemp("stock") / "stock.gguf", "qwen3moe", "Q8_0")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return hub_checkpoint(tmp_path_factory.mktemp("hub") / "model", "qwen35moe", nested=True, shards=2)


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A copy of the checkpoint to be spoilt."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


@pytest.fixture
def refuse(tmp_path, capfd):
    """Runs a conversion that must fail with one line that has all the words, and leave nothing."""

    def refused(*arguments, words=(), out=None):
        out = tmp_path / "out" / "out.gguf" if out is None else out
        (tmp_path / "out").mkdir(exist_ok=True)
        capfd.readouterr()
        assert main([*map(str, arguments[:1]), str(out), *map(str, arguments[1:])]) == 1
        stdout, stderr = capfd.readouterr()
        lines = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert stdout == "" and len(lines) == 1 and stderr.endswith(lines[0] + "\n"), stderr
        for word in words:
            assert str(word) in lines[0]
        assert list((tmp_path / "out").iterdir()) == []
        return lines[0]

    return refused


# ---- the target ----


def test_existing_out_is_kept_without_force(tmp_path, stock, refuse):
    out = tmp_path / "precious.gguf"
    out.write_bytes(b"precious")
    refuse(stock, out=out, words=["exists", "--force"])
    assert out.read_bytes() == b"precious"
    assert main([str(stock), str(out), "--force"]) == 0
    assert out.read_bytes()[:4] == b"GGUF"


def test_a_failed_run_with_force_keeps_the_old_file(tmp_path, folder, refuse):
    out = tmp_path / "precious.gguf"
    out.write_bytes(b"precious")
    (folder / "tokenizer.json").unlink()
    refuse(folder, "--force", out=out, words=["tokenizer"])
    assert out.read_bytes() == b"precious"


def test_out_may_not_be_the_source(tmp_path, stock, refuse):
    source = Path(shutil.copy(stock, tmp_path / "source.gguf"))
    (tmp_path / "link.gguf").symlink_to(source)
    for out in (source, tmp_path / "link.gguf"):
        refuse(source, "--force", out=out, words=["being converted"])
    assert source.read_bytes() == stock.read_bytes()


def test_out_may_not_be_a_shard_of_the_checkpoint(folder, refuse):
    shard = next(folder.glob("*.safetensors"))
    size = shard.stat().st_size
    refuse(folder, "--force", "--type", "F32", out=shard, words=["being converted"])
    assert shard.stat().st_size == size


def test_a_link_is_followed_not_replaced(tmp_path, stock):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "real.gguf").write_bytes(b"old")
    (tmp_path / "link.gguf").symlink_to(tmp_path / "far" / "real.gguf")
    assert main([str(stock), str(tmp_path / "link.gguf"), "--force"]) == 0
    assert (tmp_path / "link.gguf").is_symlink()
    assert (tmp_path / "far" / "real.gguf").read_bytes()[:4] == b"GGUF"


def test_out_in_a_missing_folder_a_folder_or_a_device_is_refused(tmp_path, stock, refuse):
    refuse(stock, out=tmp_path / "nowhere" / "out.gguf", words=["no folder", "nowhere"])
    refuse(stock, "--force", out=tmp_path, words=["not a regular file"])
    refuse(stock, "--force", out="/dev/null", words=["not a regular file"])


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path, stock, refuse):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    # Root may write everywhere but where the kernel itself refuses.
    refuse(stock, out=(closed if os.geteuid() else Path("/sys")) / "out.gguf", words=["cannot write", "out.gguf"])


def test_a_disk_without_room_is_refused_before_anything_is_written(stock, refuse, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 30, 1 << 30, 12_300_000))
    refuse(stock, words=["12.3 MB free", "needs"])


@pytest.mark.parametrize("source", ["stock", "checkpoint"])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, request, source):
    arguments = [request.getfixturevalue(source), tmp_path / "out.gguf", *(["--type", "F32"] if source == "checkpoint" else [])]
    limit = 200_000  # bytes a file may have: the directory and a part of the data
    done = subprocess.run(
        [sys.executable, "-m", "convert", *arguments], cwd=ROOT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: cannot write") and "File too large" in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


# ---- signals ----


def begin(stock: Path, out: Path) -> subprocess.Popen:
    """A conversion in the middle of its work."""
    command = [sys.executable, "-c", PAUSED, stock, out]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n", process.communicate()[1]
    assert [path.name for path in out.parent.iterdir()] == [f"out.gguf.partial-{process.pid}"]
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_cleans_up(tmp_path, stock, number, code):
    process = begin(stock, tmp_path / "out.gguf")
    process.send_signal(number)
    stderr = process.communicate(timeout=20)[1]
    assert process.returncode == code and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_no_out_and_the_next_one_clears_up(tmp_path, stock, capfd):
    out = tmp_path / "out.gguf"
    killed, alive = begin(stock, out), None
    killed.kill()
    killed.communicate(timeout=20)
    assert not out.exists() and len(list(tmp_path.iterdir())) == 1
    try:
        alive = subprocess.Popen([sys.executable, "-c", PAUSED, stock, out], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert alive.stdout.readline() == "writing\n"
        # The dead one's file is gone; a living one's is left alone.
        assert [path.name for path in tmp_path.iterdir()] == [f"out.gguf.partial-{alive.pid}"]
        assert main([str(stock), str(out)]) == 0
        assert {path.name for path in tmp_path.iterdir()} == {"out.gguf", f"out.gguf.partial-{alive.pid}"}
    finally:
        if alive:
            alive.kill()
            alive.communicate(timeout=20)


# ---- GGUF sources ----


def test_sources_that_are_not_stock_files(tmp_path, stock, refuse):
    expert, dense, odd = tmp_path / "expert.gguf", tmp_path / "dense.gguf", tmp_path / "odd.gguf"
    assert main([str(stock), str(expert)]) == 0
    refuse(expert, words=["per-expert file already"])
    refuse(expert, "--type", "Q8_0", words=["per-expert file already"])
    refuse(stock, "--stock", words=["no per-expert file"])
    refuse(stock, "--type", "Q4_K_M", words=["quantised already", "Q8_0"])
    refuse(stock, "--no-mtp", words=["--no-mtp"])
    refuse(expert, "--stock", "--type", "F16", words=["--stock"])
    refuse(stock, "--threads", "0", words=["--threads 0"])
    refuse(tmp_path / "nothing.gguf", words=["nothing.gguf", "does not exist"])
    odd.write_bytes(b"PK\x03\x04" + bytes(100))
    refuse(odd, words=["not a GGUF file"])
    content = stock.read_bytes()
    odd.write_bytes(content[: len(content) // 2])
    refuse(odd, words=["the file's end"])
    dense.write_bytes(content.replace(b"_exps.weight", b"_only.weight"))
    refuse(dense, words=["no expert tensors", "qwen3moe"])
    odd.write_bytes(content.replace(b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_xx_exps.weight"))
    refuse(odd, words=["blk.1.ffn_up_exps.weight"])


def test_a_damaged_per_expert_file_is_not_restored(tmp_path, stock, refuse):
    expert, damaged = tmp_path / "expert.gguf", tmp_path / "damaged.gguf"
    assert main([str(stock), str(expert)]) == 0
    content = expert.read_bytes()
    for old, new, word in (
        (b"rgpu.source.tensors", b"rgpu.source.tensorz", "rgpu.source.tensors"),
        (b"blk.2.ffn_up.7.weight", b"blk.2.ffn_xx.7.weight", "blk.2.ffn_up.7.weight"),
        (b"blk.1.attn_q.weight\x02", b"blk.1.attn_z.weight\x02", "blk.1.attn_q.weight"),
    ):
        assert content.count(old) == 1
        damaged.write_bytes(content.replace(old, new))
        refuse(damaged, "--stock", words=[word])
    aligned = rewrite(stock, tmp_path / "aligned.gguf", alignment=64)
    assert main([str(aligned), str(damaged), "--force"]) == 0
    content = damaged.read_bytes()
    at = content.index(b"rgpu.source.alignment") + len(b"rgpu.source.alignment") + 4
    damaged.write_bytes(content[:at] + b"\x00" + content[at + 1 :])
    refuse(damaged, "--stock", words=["rgpu.source.alignment", "power of two"])
    version = content.index(b"rgpu.layout.version") + len(b"rgpu.layout.version") + 4
    damaged.write_bytes(content[:version] + b"\x02" + content[version + 1 :])
    refuse(damaged, "--stock", words=["layout 2"])


# ---- checkpoints ----


def change(path: Path, **keys) -> None:
    content = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_folders_that_are_no_checkpoint(tmp_path, folder, refuse):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", words=["not a model folder", "config.json"])
    deep = "[" * 100_000
    for content, word in (("{", "not valid JSON"), ("[1]", "JSON object"), (deep, "not valid JSON"), ("{}", "model_type")):
        (folder / "config.json").write_text(content)
        refuse(folder, words=[word])


def test_configurations_that_cannot_be(folder, refuse):
    config = folder / "config.json"
    outer = json.loads(config.read_text())
    inner = outer["text_config"]
    change(config, model_type="llama")
    refuse(folder, words=["'llama'", "qwen3_5_moe", "qwen3_moe"])
    change(config, model_type="qwen3_5_moe", text_config=[1])
    refuse(folder, words=["text_config"])
    for wrong, word in (
        ({"hidden_size": "wide"}, "config.json"), ({"num_experts": -1}, "config.json"), ({"num_hidden_layers": 10**9}, "layers"),
        ({"num_experts": 10**9}, "experts"), ({"linear_num_key_heads": 0}, "0 key heads"),
        ({"linear_num_key_heads": 8, "linear_key_head_dim": 4}, "heads"),
    ):  # fmt: skip
        change(config, text_config=inner | wrong)
        refuse(folder, words=[word])
    del inner["moe_intermediate_size"]
    change(config, text_config=inner)
    refuse(folder, words=["moe_intermediate_size"])


def test_missing_files(folder, refuse):
    (folder / "model-00002-of-00002.safetensors").rename(folder / "elsewhere")
    refuse(folder, words=["1 of 2 files", "model-00002-of-00002.safetensors"])
    (folder / "elsewhere").rename(folder / "model-00002-of-00002.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for wrong, word in (
        ({}, "weight_map"), ({"a": 1}, "weight_map"), ({"a": "../../etc/passwd"}, "passwd"),
        (index["weight_map"] | {"ghost.weight": "model-00001-of-00002.safetensors"}, "ghost.weight"),
    ):  # fmt: skip
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": wrong}))
        refuse(folder, words=[word])
    for path in folder.glob("model*"):
        path.unlink()
    refuse(folder, words=["no .safetensors"])


def test_missing_or_broken_tokenizer(folder, refuse):
    (folder / "tokenizer.json").write_text("{")
    refuse(folder, words=["tokenizer.json"])
    (folder / "tokenizer.json").unlink()
    refuse(folder, words=["tokenizer.json"])


def spoil(folder: Path, changes) -> None:
    """Writes the checkpoint again as one file, its tensors changed."""
    found = Checkpoint(folder)
    tensors = {name: found.view(name) for name in found.tensors}
    changes(tensors)
    content = {name: np.array(x) for name, x in tensors.items()}
    for path in folder.glob("model*"):
        path.unlink()
    safetensors(folder / "model.safetensors", content)


P = "model.language_model.layers."


def test_every_missing_and_misshapen_tensor_is_told_at_once(folder, refuse):
    def changes(tensors):
        del tensors[P + "0.linear_attn.A_log"], tensors["lm_head.weight"], tensors[P + "2.mlp.experts.down_proj"]
        tensors[P + "3.self_attn.q_proj.weight"] = tensors[P + "3.self_attn.q_proj.weight"].T
        tensors[P + "1.mlp.experts.gate_up_proj"] = tensors[P + "1.mlp.experts.gate_up_proj"][:7]
        tensors[P + "1.linear_attn.conv1d.weight"] = tensors[P + "1.linear_attn.conv1d.weight"].transpose(0, 2, 1)
        tensors[P + "1.self_attn.q_proj.bias"] = np.ones(4, np.float32)

    spoil(folder, changes)
    words = ["lm_head.weight is missing", "A_log is missing", "2.mlp.experts.down_proj is missing", "q_proj.weight is [64, 256]"]
    words += ["gate_up_proj is [7, 64, 64], needs [8, 64, 64]", "conv1d.weight is [128, 4, 1]", "q_proj.bias [4] is not known"]
    line = refuse(folder, words=words)
    assert "8 tensors" in line  # gate and up are two


def test_the_list_of_problems_is_capped(folder, refuse):
    spoil(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name or "layers.2." in name])
    line = refuse(folder, words=["… and "])
    assert len(line) < 2000


def test_a_missing_expert_is_named(tmp_path, refuse):
    folder = hub_checkpoint(tmp_path / "single", "qwen3moe", experts="single")
    spoil(folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.5.up_proj.weight"))
    refuse(folder, words=["model.layers.1.mlp.experts.5.up_proj.weight is missing"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_numbers_name_their_tensor(folder, refuse, value):
    def changes(tensors):
        x = np.array(tensors[P + "2.mlp.experts.down_proj"])
        x[5, 1, 2] = value
        tensors[P + "2.mlp.experts.down_proj"] = x

    spoil(folder, changes)
    refuse(folder, "--type", "Q8_0", words=["blk.2.ffn_down_exps.weight", "not a number"])
