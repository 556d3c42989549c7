"""Guards on ourselves: who may import whom, how large things may grow, what the README promises.

Raise a cap by decision, with the reason beside it; never by drift.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for top in ("rgpu", "convert", "bench") for path in (ROOT / top).rglob("*.py"))
PARSED = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in SOURCES}

# A part of rgpu -> the parts it may import. Only downwards.
MAY_IMPORT = {
    "errors": set(),
    "cache": set(),
    "quants": {"cache"},
    "kernels": {"quants"},
    "gguf": {"errors", "quants"},
    "ops": {"errors", "kernels", "machine", "quants"},
    "state": {"gguf", "ops", "quants"},
    "sizes": {"errors"},
    "machine": {"cache", "gguf"},
    "shapes": {"errors", "gguf"},
    "catalogue": {"errors", "gguf", "shapes"},
    "residency": {"sizes", "cache", "errors", "gguf", "machine", "ops", "quants", "shapes"},
    "models": {"errors", "gguf", "ops", "state"},
    "executor": {"models", "ops", "residency", "state"},
    "load": {"errors", "gguf", "models", "ops", "quants", "residency"},
    "pretokenizers": set(),
    "tokenizer": {"errors", "gguf", "pretokenizers"},
    "sandbox": {"errors"},
    "template": {"errors", "gguf", "sandbox"},
    "sampler": {"errors"},
    "session": {"errors", "sampler", "state"},
    "backend": {"cache", "errors", "gguf", "ops", "shapes", "sizes"},
    "engine": {
        "backend", "errors", "executor", "gguf", "load", "machine", "ops", "quants", "residency", "sampler", "session",
        "shapes", "sizes", "state", "template", "tokenizer",
    },  # fmt: skip
    "show": {"errors", "gguf"},
    "terminal": {"errors"},
    "conversation": {"errors", "engine", "sampler", "session", "template", "terminal", "tokenizer"},
    "chat": {"cache", "conversation", "engine", "errors", "sampler", "session", "template", "terminal", "tokenizer"},
    "picture": {"errors", "residency"},
    "plan": {"catalogue", "errors", "gguf", "machine", "models", "picture", "residency", "shapes", "sizes"},
    "__main__": {"chat", "errors", "plan", "show"},
    "__init__": {"engine", "errors", "sampler", "session"},
}
# Packages that only some places may import.
CONFINED = {
    "numba": ("rgpu/quants/", "rgpu/kernels/", "convert/quantize.py"),
    "llvmlite": ("rgpu/quants/", "rgpu/kernels/"),
    "cupy": ("rgpu/ops/cupy_device.py", "bench/"),
    "torch": ("bench/demo/",),
    "transformers": ("bench/demo/",),
    "llama_cpp": ("bench/",),
    "jinja2": ("rgpu/sandbox.py", "rgpu/template.py"),
    "tokenizers": ("rgpu/tokenizer.py", "bench/demo/"),
}


def part_of(path: str) -> str:
    return path.split("/")[1].removesuffix(".py")


def imports(path: str, tree: ast.AST):
    """(module, line) of every import in a file, relative ones resolved: `from ..gguf import x` -> rgpu.gguf."""
    package = path.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def test_imports_go_downwards():
    wrong = []
    for path, tree in PARSED.items():
        if path.startswith("rgpu/"):
            me = part_of(path)
            assert me in MAY_IMPORT, f"{path}: say in MAY_IMPORT what the new part '{me}' may import"
            for module, line in imports(path, tree):
                names = module.split(".")
                other = names[1] if names[0] == "rgpu" and len(names) > 1 else None
                if names[0] in ("convert", "bench", "tests") and path != "rgpu/__main__.py":
                    wrong.append(f"{path}:{line} imports {module}")
                if other in MAY_IMPORT and other != me and other not in MAY_IMPORT[me]:
                    wrong.append(f"{path}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_models_do_not_see_each_other_or_a_backend():
    for path, tree in PARSED.items():
        if path.startswith("rgpu/models/"):
            for module, line in imports(path, tree):
                names = module.split(".")
                if names[:2] == ["rgpu", "ops"]:
                    assert len(names) == 2 or names[2] not in ("cpu", "reference", "cuda"), f"{path}:{line}: {module}"
                if names[:2] == ["rgpu", "models"] and len(names) > 2 and path != "rgpu/models/__init__.py":
                    assert names[2] in ("base", "blocks"), f"{path}:{line}: {module}"


def test_packages_stay_where_they_belong():
    for path, tree in PARSED.items():
        for module, line in imports(path, tree):
            places = CONFINED.get(module.split(".")[0])
            assert places is None or path.startswith(places), f"{path}:{line} imports {module}"


def test_every_verb_is_in_every_backend():
    from rgpu.ops import VERBS, check
    from rgpu.ops.cpu import CpuOps
    from rgpu.ops.reference import ReferenceOps

    assert len(VERBS) <= 26
    assert check(CpuOps) is CpuOps and check(ReferenceOps) is ReferenceOps


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", PARSED)
def test_sizes(path):
    tree, text = PARSED[path], (ROOT / path).read_text()
    assert text.count("\n") <= 400, f"{path} has {text.count(chr(10))} lines"
    # Kernels take addresses and sizes one by one: what would be an object elsewhere is a row of integers here.
    most_parameters = 17 if path.startswith("rgpu/kernels/") else 8
    for f in functions(tree):
        length = f.end_lineno - f.lineno + 1
        assert length <= 90, f"{path}:{f.lineno} {f.name} has {length} lines"
        names = [a.arg for a in (*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]
        assert len(names) <= most_parameters, f"{path}:{f.lineno} {f.name} has {len(names)} parameters"


@pytest.mark.parametrize("path", PARSED)
def test_every_module_says_what_it_owns(path):
    lines = (ast.get_docstring(PARSED[path]) or "").splitlines()
    assert lines, f"{path} begins without a docstring"


def test_environment_variables():
    """Two of our own; the others are standards of the platform."""
    used = set()
    for path, tree in PARSED.items():
        if path.startswith(("rgpu/", "convert/")):
            used |= {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                     and re.fullmatch(r"RGPU_[A-Z_]+", n.value)}  # fmt: skip
    assert used == {"RGPU_CACHE_DIR", "RGPU_DEBUG"}


def test_no_type_is_singled_out_outside_quants():
    """Behaviour by type belongs to the type's own file: no comparison with a type's name in the engine."""
    from rgpu.quants import TYPES

    for path, tree in PARSED.items():
        if path.startswith(("rgpu/engine", "rgpu/load", "rgpu/models/", "rgpu/ops/", "rgpu/kernels/", "rgpu/executor")):
            for node in ast.walk(tree):
                if isinstance(node, ast.Compare):
                    constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                    assert not constants & set(TYPES), f"{path}:{node.lineno} compares with a type's name"


def test_nothing_unfinished():
    for path in PARSED:
        found = re.search(r"raise NotImplementedError|\bTODO\b|\bFIXME\b|\bXXX\b", (ROOT / path).read_text())
        assert not found, f"{path}: {found.group()}"


def test_the_linter_is_content():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# ---- what the README promises ----


def readme() -> str:
    return (ROOT / "README.md").read_text()


def test_readme_tree():
    """Every file of rgpu/ and every folder at the top is in the README's tree, and nothing that does not exist."""
    block = re.search(r"```\n(rgpu/\n.*?)```", readme(), re.S).group(1)
    named = set(re.findall(r"[\w.]+(?:\.py|/)", block))
    real = {path.name for path in (ROOT / "rgpu").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    missing = {name for name in real if name not in named and f"{name}/" not in named}
    assert not missing, f"not in the README's tree: {sorted(missing)}"
    for name in named:
        places = [ROOT / name, ROOT / "rgpu" / name, *ROOT.glob(f"*/{name}"), *ROOT.glob(f"rgpu/*/{name}")]
        assert any(place.exists() for place in places), f"the README's tree names {name}, which does not exist"


def test_readme_commands_exist():
    """Every `python -m X` of the README is a module of the repository, and its long options are in that module's help."""
    commands = re.findall(r"python3? -m ((?:rgpu|convert|bench)[\w.]*)([^\n`]*)", readme())
    assert {"rgpu.chat", "convert"} <= {module for module, _ in commands}
    for module, rest in set(commands):
        done = subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"python -m {module}: {done.stderr}"
        for option in re.findall(r"(?<=\s)--?[a-z][\w-]*", rest):
            assert option in done.stdout, f"python -m {module} has no option {option}"


def test_readme_example(tmp_path):
    """The embedding example runs as it stands, and answers."""
    code = re.search(r"```python\n(.*?)```", readme(), re.S).group(1)
    assert len(code.strip().splitlines()) <= 15
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout


def test_extras_and_licence():
    text = (ROOT / "pyproject.toml").read_text()  # Python 3.10 has no TOML reader
    extras = set(re.findall(r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M))
    assert extras == {"cuda", "server", "plot", "test", "bench", "oracle"}
    assert 'license = "Apache-2.0"' in text and "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_repository_names_no_machine():
    folders = ("rgpu", "convert", "bench", "tests")
    for path in [*ROOT.glob("*.*"), ROOT / ".ci" / "run", *(p for folder in folders for p in (ROOT / folder).rglob("*"))]:
        if path.suffix in (".py", ".md", ".toml", ".json", ".csv") or path.name == "run":
            found = re.search(r"(?<![\w.])/(work|root|home)/\w", path.read_text())
            assert not found, f"{path.relative_to(ROOT)} holds a path of one machine: {found.group()}"
