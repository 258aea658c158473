"""What may import what, what the lock pins, and what never enters the repository."""

import ast
import dataclasses
import functools
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("moe", "partitioning", "tasks", "configs", "launch")
FOLDERS = (*PACKAGES, "tests", "benchmarks")

# What each folder may import from the others. Nobody but the tests and the
# benchmarks imports launch; nobody imports the tests.
ARROWS = {
    "configs": set(),
    "partitioning": set(),
    "moe": {"partitioning"},
    "tasks": {"partitioning", "configs"},
    "launch": {"partitioning", "moe", "tasks", "configs"},
    "benchmarks": set(FOLDERS),
    "tests": set(FOLDERS),
}
# What a run's configuration is made of, and what a command line needs before jax.
SETTINGS = (
    "moe/layers.py",
    "moe/settings/__init__.py",
    "partitioning/settings.py",
    "tasks/settings.py",
    "launch/config/settings.py",
)
# Rooms of `launch`, from the ground up: each may import those before it, and of those
# beside it, in the same line, none.
ROOMS = (
    ("errors",),
    ("terminal", "config"),
    ("job", "records"),
    ("data",),
    ("run",),
    ("checkpoints",),
    ("evaluation", "exchange", "planning", "verification", "doctor"),
    ("report",),
    ("training",),
)
STARTS = ("launch/cli.py", "launch/training/start.py", "launch/training/loop.py")
# Seconds to import and 800 MB, and often missing beside an accelerator.
HEAVY = {"seqio", "tensorflow", "tensorflow_text", "tensorflow_datasets", "apache_beam"}


@dataclasses.dataclass(frozen=True)
class Import:
    """One imported module, or name in a module, and where it stands."""

    name: str
    line: int
    at_top: bool  # runs when the file is imported, not when a function is called

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]


def test_each_package_is_the_one_of_this_checkout(tmp_path):
    # From another folder: there, a foreign package of the same name could win.
    program = (
        "import importlib.util, sys\n"
        "for name in sys.argv[1:]: print(importlib.util.find_spec(name).origin)\n"
    )
    found = subprocess.run(
        [sys.executable, "-I", "-c", program, *PACKAGES],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert [Path(file).resolve() for file in found] == [
        ROOT / name / "__init__.py" for name in PACKAGES
    ]


@pytest.mark.parametrize("folder", ARROWS)
def test_imports_between_folders_go_one_way(folder):
    allowed = ARROWS[folder] | {folder}
    assert not [
        f"{where} imports {imported.name}"
        for where, imported in imports_in(folder)
        if imported.package in FOLDERS and imported.package not in allowed
    ]


def test_imports_between_rooms_go_down():
    place = {room: floor for floor, rooms in enumerate(ROOMS) for room in rooms}
    found = []
    for where, imported in imports_in("launch"):
        room = where.split("/")[1].removesuffix(".py").partition(".py:")[0]
        other = [*imported.name.split("."), ""][1]
        if imported.package != "launch" or room not in place or room == other:
            continue
        assert other in place or other == "commands", where
        if other not in place or place[other] >= place[room]:
            found.append(f"{where} imports {imported.name}")
    assert not found


def test_every_room_has_a_place():
    there = {path.stem for path in (ROOT / "launch").iterdir() if path.stem[0] != "_"}
    assert there - {"cli", "commands"} == {room for rooms in ROOMS for room in rooms}


def test_only_one_file_imports_gin():
    users = {
        where.partition(":")[0]
        for folder in FOLDERS
        for where, imported in imports_in(folder)
        if imported.package == "gin"
    }
    assert users == {"launch/config/syntax.py"}


@pytest.mark.parametrize("folder", ["moe", "partitioning", "launch"])
def test_only_tasks_imports_seqio_and_tensorflow(folder):
    assert not [
        f"{where} imports {imported.name}"
        for where, imported in imports_in(folder)
        if imported.package in HEAVY and (imported.at_top or folder != "launch")
    ]


@pytest.mark.parametrize("name", ["__init__", "store", "batches", "objectives"])
def test_reading_a_prepared_store_never_imports_seqio_or_tensorflow(name):
    file = ROOT / "tasks" / f"{name}.py"
    assert not [one for one in imports_of(file) if one.package in HEAVY]
    assert not {one.package for one in reached_from(file)} & HEAVY


@pytest.mark.parametrize("name", STARTS)
def test_training_starts_without_seqio_tensorflow_and_matplotlib(name):
    # Matplotlib takes a second to import, for the report at the very end.
    reached = {one.package for one in reached_from(ROOT / name)}
    assert not reached & (HEAVY | {"matplotlib"})


def test_the_report_is_what_imports_matplotlib():
    reached = {one.package for one in reached_from(ROOT / "launch/report/run.py")}
    assert "matplotlib" in reached  # so that the test above could fail


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_are_read_without_jax(name):
    # They decide on platform and simulated devices, which jax reads when imported.
    foreign = {one.package for one in reached_from(ROOT / name)} - set(FOLDERS)
    assert foreign <= sys.stdlib_module_names


@pytest.mark.parametrize(
    "file", sorted((ROOT / "launch" / "commands").rglob("*.py")), ids=lambda f: f.stem
)
def test_a_verb_imports_nothing_before_it_is_called(file):
    ours = {
        one.name for one in imports_of(file) if one.at_top and one.package in FOLDERS
    }
    allowed = ("launch.commands", "launch.errors", "launch.config.reader")
    assert all(name.startswith(allowed) for name in ours)


@pytest.mark.parametrize("folder", PACKAGES)
def test_importing_a_module_leaves_the_settings_of_jax_alone(folder):
    # They are part of what jit keys its programs by, and everybody's in the process.
    assert not [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line in settings_changed_on_import(file.read_text())
    ]


def test_the_check_of_settings_sees_every_form():
    for change in (
        "jax.config.update('a', 1)",
        "if jax:\n    config.update('a', 1)",
        "class M:\n    jax.config.a = 1",
        "jax.config.a, b = 1, 2",
    ):
        assert settings_changed_on_import(change), change
        late = "def late():\n" + "\n".join(f"    {one}" for one in change.split("\n"))
        assert not settings_changed_on_import(late)
    assert not settings_changed_on_import("known.update('a')\nx = jax.config.a")


def test_every_dependency_says_what_it_is_for():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for dependency in dependencies(
        "dependencies", "data", "quality", "tpu", "cuda", "dev"
    ):
        for line in lines:
            if f'"{dependency}"' in line:
                assert re.search(r"  # \w+.* \w+", line), f"no reason: {line.strip()}"


def test_the_lock_pins_every_dependency_within_its_range():
    pins = {}
    for requirement in locked():
        pin = Requirement(requirement.partition("--hash")[0])
        pins.setdefault(canonicalize_name(pin.name), []).append(pin.specifier)
    for dependency in dependencies("dependencies", "data", "dev"):
        wanted = Requirement(dependency)
        if wanted.marker and not wanted.marker.evaluate():
            continue
        versions = [
            str(specifier).removeprefix("==")
            for specifier in pins.get(canonicalize_name(wanted.name), ())
        ]
        assert any(version in wanted.specifier for version in versions), dependency


def test_every_locked_requirement_is_exact_and_hashed():
    requirements = locked()
    assert len(requirements) > 50
    form = re.compile(r"[\w.-]+==[\w.+!]+( ; [^;]+?)?( --hash=sha256:[0-9a-f]{64})+")
    assert not [one for one in requirements if not form.fullmatch(one)]


def test_the_lock_names_no_index():
    text = (ROOT / "requirements.lock").read_text()
    for word in ("://", "index-url", "find-links", "trusted-host", " @ "):
        assert word not in text


def test_no_file_names_a_home_directory_or_an_index():
    # Written with [brackets], so that this file does not match itself.
    home = r"(?<![\w.])/(hom[e]/\w|User[s]/\w|roo[t]/)"
    index = r"pypi[.]org|pythonhosted[.]org|://\S+/simpl[e]\b|index-ur[l][ =]\S*://"
    here = rf"(?<![\w.]){re.escape(str(ROOT))}/"
    if len(ROOT.parts) == 2 or ROOT.is_relative_to(tempfile.gettempdir()):
        here = "(?!)"  # in such places a document's example may be what is named
    forbidden = re.compile(f"{home}|{index}|{here}")
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True
    )
    assert listing.returncode == 0, f"needs a git checkout: {listing.stderr}"
    faults = []
    for name in listing.stdout.split("\0")[:-1]:
        file = ROOT / name
        if file.is_symlink() or not file.is_file():
            continue  # a link, or deleted but not yet committed
        text = file.read_bytes().decode(errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            faults += [f"{name}:{number}: {hit[0]}" for hit in forbidden.finditer(line)]
    assert not faults


def test_the_checks_of_imports_see_every_form(tmp_path):
    file = tmp_path / "sample.py"
    file.write_text(
        "import a.b, c as d\n"
        "from e.f import g\n"
        "try:\n    import h\nexcept ImportError:\n    import i\n"
        "def late():\n    import j\n    from importlib import import_module\n"
        "    import_module('k.l')\n"
        "class M:\n    import n\n"
        "if TYPE_CHECKING:\n    import o\n"
    )
    seen = {(one.name, one.at_top) for one in imports_of(file)}
    assert seen == {
        *[(name, True) for name in ("a.b", "c", "e.f.g", "h", "i", "n")],
        *[(name, False) for name in ("j", "importlib.import_module", "k.l")],
    }


def imports_in(folder: str) -> Iterator[tuple[str, Import]]:
    """Yields every import in a folder, with its place as file:line."""
    for file in sorted((ROOT / folder).rglob("*.py")):
        for imported in imports_of(file):
            yield f"{file.relative_to(ROOT)}:{imported.line}", imported


@functools.cache
def imports_of(file: Path) -> tuple[Import, ...]:
    """Returns every import of a file; names taken from a module are appended to it."""
    found = []

    def visit(node: ast.AST, at_top: bool) -> None:
        names: list[str] = []
        match node:
            case ast.Import():
                names = [alias.name for alias in node.names]
            case ast.ImportFrom():
                module = node.module or ""
                if node.level:
                    above = file.relative_to(ROOT).parents[node.level - 1]
                    module = ".".join(filter(None, (*above.parts, module)))
                names = [f"{module}.{alias.name}" for alias in node.names]
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                names = [name]
        found.extend(Import(name, node.lineno, at_top) for name in names)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return  # nothing of it runs
        function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not isinstance(node, function))

    visit(ast.parse(file.read_text()), at_top=True)
    return tuple(found)


def settings_changed_on_import(source: str) -> list[int]:
    """Returns the lines at top level that change a setting of jax."""
    found = []

    def visit(node: ast.AST) -> None:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                return
            case (
                ast.Call(func=ast.Attribute(attr="update", value=value))
                | ast.Attribute(ctx=ast.Store(), value=value)
            ) if ast.unparse(value).split(".")[-1] == "config":
                found.append(node.lineno)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return found


def reached_from(file: Path) -> set[Import]:
    """Returns what importing a file imports, through our own files, at top level."""
    reached, files, seen = set(), [file], set()
    while files:
        current = files.pop()
        if current in seen:
            continue
        seen.add(current)
        # A module brings the __init__.py of every package above it.
        above = [ROOT / p for p in current.relative_to(ROOT).parents if p.name]
        files += [i for p in above if (i := p / "__init__.py").exists()]
        for imported in imports_of(current):
            if imported.at_top:
                reached.add(imported)
                files += our_files(imported)
    return reached


def our_files(imported: Import) -> list[Path]:
    """Returns the files of ours that an import loads: `a.b.c` may end in a name."""
    if imported.package not in FOLDERS:
        return []
    path = ROOT.joinpath(*imported.name.split("."))
    candidates = [
        candidate
        for stem in (path, path.parent)
        for candidate in (stem.with_suffix(".py"), stem / "__init__.py")
    ]
    return [c for c in candidates if c.exists() and c.is_relative_to(ROOT)]


def dependencies(*groups: str) -> list[str]:
    """Returns the requirements of some groups of pyproject.toml, as written there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    table = {"dependencies": project["dependencies"]}
    table |= project["optional-dependencies"]
    assert not set(groups) - set(table)
    return [requirement for group in groups for requirement in table[group]]


def locked() -> list[str]:
    """Returns the requirements of the lock, one line each."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]
