"""The shape of the package: what nnU-Net finds, what may import what, what the wheel holds."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from running import PYTHON

from nnunet_diffusion import installation
from nnunet_diffusion.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parent.parent
PLUG_INS = ("trainers", "planners", "dataset_conversion")
LIBRARY = sorted((ROOT / "nnunet_diffusion").rglob("*.py"))
PLUG_IN_FILES = sorted(file for folder in PLUG_INS for file in (ROOT / folder).glob("[!_]*.py"))


def imports(path: Path) -> set[str]:
    """The dotted names that a file imports anywhere, `from a import b` as `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"  # breaks in nnU-Net's flat search
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def classes(path: Path) -> list[str]:
    """The names of what a file defines, beside imports and constants."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, kinds)]


@pytest.mark.parametrize("path", sorted((ROOT / "trainers").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_trainer_file_defines_its_namesake_alone(path):
    assert classes(path) == [path.stem]
    assert path.stem.endswith("Trainer")


def test_plug_in_folders_are_flat():
    assert [p for folder in PLUG_INS for p in (ROOT / folder).iterdir() if p.is_dir() and p.name != "__pycache__"] == []


def test_nnunet_finds_every_trainer_and_has_none_of_these_names(probe):
    assert probe["errors"] == {}
    assert probe["trainers"] == dict.fromkeys(installation.trainer_names(), installation.trainers_folder())


@pytest.mark.parametrize("path", PLUG_IN_FILES, ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_plug_in_imports_by_its_package_name(path):
    module = importlib.import_module(f"nnunet_diffusion.{path.parent.name}.{path.stem}")
    assert os.path.samefile(module.__file__, path)


def dynamic_imports(path: Path) -> set[str]:
    """What a file gives to import_module; `*` stands for what an f-string fills in."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
            names.add("".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts))
    return names


def room(path: Path) -> str:
    """The folder of a file, as the package calls it; a module of the library's root is a room of its own."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[0] if parts[0] in PLUG_INS else parts[1]


def rooms_that_are_imported() -> dict[str, dict[str, str]]:
    """{room: {room that it imports: an example}}, of every import, wherever it stands and however it is written."""
    found = {}
    for path in (*LIBRARY, *PLUG_IN_FILES, *(ROOT / folder / "__init__.py" for folder in PLUG_INS)):
        known = found.setdefault(room(path), {})
        for name in (*imports(path), *dynamic_imports(path)):
            if name == "*" and path.name == "checkup.py":
                continue  # torch, torchvision and nnunetv2, to see whether they can be imported
            assert name != "*", f"{path}: import_module of a name that cannot be read"
            if name.startswith("nnunet_diffusion.") and name.split(".")[1] not in (room(path), "__version__"):
                known[name.split(".")[1]] = f"{path.relative_to(ROOT)} imports {name}"
    return found


def test_rooms_import_no_circle():
    graph = rooms_that_are_imported()
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = error.args[1]  # from what is imported to what imports it
        steps = [graph[after][before] for before, after in zip(circle, circle[1:], strict=False)]
        pytest.fail("a circle of rooms:\n" + "\n".join(steps))


def test_no_arrow_points_up():
    """Commands on top, then plug-ins, then the library, of which rooms may import its root, never the other way."""
    graph = rooms_that_are_imported()
    rooms = [path.name for path in (ROOT / "nnunet_diffusion").iterdir() if path.is_dir()]
    level = dict.fromkeys(rooms, 1) | dict.fromkeys(PLUG_INS, 2) | {"cli": 3}
    up = [said for name in graph for other, said in graph[name].items() if level.get(other, 0) > level.get(name, 0)]
    up += [said for name in PLUG_INS for other, said in graph[name].items() if other in PLUG_INS and other != name]
    assert up == []


def test_a_circle_is_told_with_its_path(monkeypatch):
    graph = {"a": {"b": "a/x.py imports b.y"}, "b": {"a": "b/y.py imports a.x"}}
    monkeypatch.setitem(globals(), "rooms_that_are_imported", lambda: graph)
    with pytest.raises(pytest.fail.Exception, match="(?s)a circle of rooms.*imports"):
        test_rooms_import_no_circle()


# What removes, moves or replaces files: {file: functions}. A new one must be added here, by somebody who has made sure
# that it never touches what this program did not make and mark.
REMOVES = {
    "nnunet_diffusion/commands.py": {"link"},
    "nnunet_diffusion/files.py": {"atomic", "atomic_folder"},
    "nnunet_diffusion/marks.py": {"remove_marked"},
    "nnunet_diffusion/preprocessing/planning.py": {"make_plan"},
    "nnunet_diffusion/preprocessing/preprocess.py": {"_collect", 
        "_preprocess", "_remove_unlisted", "preprocess_case",
    },
    "nnunet_diffusion/preprocessing/replacement.py": {"_finish_replacing", "replace"},
    "nnunet_diffusion/rounds/outcome.py": {"copy_fold"},
    "nnunet_diffusion/rounds/pseudo_labels.py": {"remove_pseudo_labels"},
    "nnunet_diffusion/rounds/stale.py": {"remove_stale"},
}  # fmt: skip


def removals(path: Path) -> set[str]:
    """The functions of a file, `Class.method` without the class, that call anything which removes or moves files."""
    calls = {"rmtree", "remove", "unlink", "rename", "replace", "move", "rmdir", "removedirs", "renames"}
    found = set()

    def walk(node: ast.AST, function: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
            if isinstance(child, ast.Call):
                name = getattr(child.func, "attr", getattr(child.func, "id", ""))
                owner = getattr(getattr(child.func, "value", None), "id", "")
                if name in calls and (owner in ("os", "shutil") or name in ("rmtree", "unlink", "rmdir", "rename")):
                    found.add(inner)
            walk(child, inner)

    walk(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def test_every_removal_is_known():
    found = {str(path.relative_to(ROOT)): removals(path) for path in (*LIBRARY, *PLUG_IN_FILES)}
    assert {path: names for path, names in found.items() if names} == REMOVES


def test_every_package_that_we_import_is_a_dependency():
    calls = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)]
    (setup,) = (call for call in calls if getattr(call.func, "id", "") == "setup")
    given = {word.arg: word.value for word in setup.keywords}
    required = {re.match("[A-Za-z0-9_-]+", text)[0].lower() for text in ast.literal_eval(given["install_requires"])}
    top_level = {name.partition(".")[0] for file in (*LIBRARY, *PLUG_IN_FILES) for name in imports(file)}
    distributions = importlib.metadata.packages_distributions()
    others = top_level - sys.stdlib_module_names - {"nnunet_diffusion", "distributed", "dask_jobqueue"}
    (cluster,) = re.findall('"cluster": (.*),', (ROOT / "setup.py").read_text())
    assert ast.literal_eval(cluster) == ["dask[distributed]", "dask-jobqueue"]
    assert {name for name in others if not {d.lower() for d in distributions[name]} & required} == set()
    assert ast.literal_eval(given["python_requires"]) == ">=3.10,<3.14"  # as the classifiers and README.md say


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    out = capsys.readouterr().out
    assert "example" in out
    assert f"nnunet_diffusion {command}" in out.split("example")[1]


def test_help_and_env_are_instant():
    """No test of time on a shared machine: what would make them slow must not be imported."""
    code = (
        "import sys, contextlib\nfrom nnunet_diffusion.cli import COMMANDS, main\n"
        "for argv in (*([c, '--help'] for c in COMMANDS), ['--help']):\n"
        "    with contextlib.suppress(SystemExit):\n        main(argv)\n"
        "main(['env'])\n"
        "print('heavy:', *{'torch', 'nnunetv2', 'numpy', 'SimpleITK', 'matplotlib', 'tqdm'} & set(sys.modules))"
    )
    out = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "heavy:"


def test_usage_errors_exit_with_2_and_interrupts_with_130(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["no_such_command"])
    monkeypatch.setattr(installation, "with_our_trainers", interrupt)
    assert main(["env"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "nnunet_diffusion: interrupted"


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_wheel_holds_and_imports_the_plug_ins(tmp_path):
    source, wheels, target = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "*_demo"))
    pip = [PYTHON, "-m", "pip", "--disable-pip-version-check", "--no-input"]
    # No build isolation, no dependencies: no network.
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "-t", target, *wheels.glob("*.whl")], check=True)
    code = (
        "import importlib, nnunet_diffusion\nfrom nnunet_diffusion import installation\n"
        "for name in ('trainers', 'planners', 'dataset_conversion'):\n"
        "    print(importlib.import_module('nnunet_diffusion.' + name).__path__[0])\n"
        "print(*installation.trainer_names())"
    )
    # -S and PYTHONPATH would still let an editable install's finder in; -I -S does not.
    run = [PYTHON, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(target)!r})\n{code}"]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[:3] == [str(target / "nnunet_diffusion" / name) for name in PLUG_INS]
    assert out[3].split() == installation.trainer_names()
    assert (target / "bin" / "nnunet_diffusion").exists()
    assert (target / "nnunet_diffusion" / "dataset_conversion" / "abdomen.json").is_file()
    pages = (target / "nnunet_diffusion" / "report").glob("page.*")
    assert {path.suffix for path in pages} == {".css", ".html", ".js"}
    top_level = {path.name for path in target.iterdir()} - {"bin", "nnunet_diffusion"}
    assert all(name.startswith("nnunet_diffusion-") for name in top_level), f"litters site-packages: {top_level}"
