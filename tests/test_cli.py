"""`rgpu COMMAND`: every command is found, and what is no command is an error."""

import subprocess
import sys
from pathlib import Path

import pytest

import rgpu
from rgpu import __main__ as cli
from rgpu import show
from tests import tiny

ROOT = Path(__file__).parent.parent


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"  {name} " in told for name in cli.COMMANDS)
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"rgpu {rgpu.__version__}\n"


def test_what_is_no_command(capsys):
    assert cli.main(["chatt"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("usage: rgpu COMMAND") and err.endswith("error: there is no command 'chatt'\n")
    assert cli.main([]) == 2
    assert capsys.readouterr().err.startswith("usage:")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as leaving:
        cli.main([name, "--help"])
    assert leaving.value.code == 0 and "usage:" in capsys.readouterr().out


def test_the_module_runs():
    done = subprocess.run([sys.executable, "-m", "rgpu", "chat", "--nope"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "unrecognized arguments: --nope" in done.stderr


def test_show_lists_a_file(tmp_path, capsys):
    keys = {"evil\x1b[31m": "x\x1by", "general.long": "z" * 500}
    path = tiny.stock_gguf(tmp_path / "m.gguf", "qwen3moe", "Q8_0", metadata=keys)
    assert cli.main(["show", str(path)]) == 0
    told = capsys.readouterr().out
    assert "  general.architecture = 'qwen3moe'\n" in told
    assert "  tokenizer.ggml.tokens = 520 values: '!', '\"', " in told
    assert "  qwen3moe.attention.layer_norm_rms_epsilon = 1e-06\n" in told
    assert "z" * 500 not in told and "\x1b" not in told
    with show.GGUFFile(path) as file:
        quantised = [info for info in file.tensors.values() if info.quant == "Q8_0"]
        assert f"{len(file.tensors)} tensors, {sum(info.nbytes for info in file.tensors.values()) / 1e6:,.1f} MB\n" in told
    assert f"  Q8_0     {len(quantised):6} tensors {sum(info.nbytes for info in quantised) / 1e6:12,.1f} MB\n" in told


def test_show_reports_a_bad_file_in_one_line(tmp_path, capsys):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert cli.main(["show", str(tmp_path / "x.gguf")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
