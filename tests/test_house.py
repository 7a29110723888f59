"""The house: a file imports only what stands above it, and a technique is known by its own file."""

import ast
from pathlib import Path

import pytest

from sdaug_utils.registry import techniques

MODULE = Path(__file__).parents[1] / "sdaug_utils"
FLOW = [
    *("errors", "lazy", "registry", "params", "compute", "store"),
    *(
        f"data.{room}"
        for room in ("control", "images", "augment", "photos", "datasets", "corpus", "shifts")
    ),
    "study",
    *(
        f"generation.{room}"
        for room in ("foundation", "technique", "personalisation", "pool_files", "pools")
    ),
    "generation.techniques",
    *(
        f"training.{room}"
        for room in (
            "features",
            "classifier",
            "segmenter",
            "mixing",
            "selection",
            "runs",
            "trainer",
        )
    ),
    *(
        f"evidence.{room}"
        for room in ("records", "metrics", "subjects", "likeness", "claims", "figures")
    ),
    *(f"evidence.{room}" for room in ("gallery", "prose", "report")),
    *(
        "experiments.base",
        "experiments",
        "rates",
        "units",
        "plan",
        "make",
        "export",
        "notebooks",
        "summary",
    ),
    *("site.gallery", "site.pages", "__main__"),
]
FILES = {
    ".".join(path.relative_to(MODULE).with_suffix("").parts): path
    for path in sorted(MODULE.rglob("*.py"))
    if path.name != "__init__.py"
}


def place(name):
    """Where a file stands in the flow: techniques stand side by side."""
    room = name if name in FLOW else name.rpartition(".")[0]
    return FLOW.index(room)


def imported(path):
    """The project's files that a file imports, at its top or further down."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdaug_utils"):
            base = node.module.removeprefix("sdaug_utils").lstrip(".")
            names = [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
            yield from {name if name in FILES else base for name in names}
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("sdaug_utils") for alias in node.names)


@pytest.mark.parametrize("name", FILES)
def test_imports_run_downstream(name):
    for other in imported(FILES[name]):
        assert other in FILES, f"{name} imports {other}, which is no file"
        beside = "techniques" in name and "techniques" in other
        assert place(other) < place(name) or beside, f"{name} imports {other}, which stands below"
        assert name not in imported(FILES[other]), f"{name} and {other} import each other"


ABOUT_THEM = {
    "controlnet-canny": {"experiments.controlnet", "evidence.claims"},
    "controlnet-segmentation": {"experiments.segmentation", "evidence.claims"},
    "copies": {
        *("experiments.training_percentage", "experiments.generation_percentage"),
        "evidence.likeness",  # a measure of that name
    },
    "stable-diffusion-prompt": {"experiments.training_percentage"},  # it compares protocols
}


@pytest.mark.parametrize("technique", techniques().values(), ids=lambda known: known.name)
def test_a_technique_is_named_in_its_own_file_only(technique):
    section = technique.section[0] if technique.section else technique.name
    own = type(technique).__module__.removeprefix("sdaug_utils.")
    allowed = {own, *ABOUT_THEM.get(technique.name, ())}
    for name, path in FILES.items():
        if "techniques" in name or name in allowed:
            continue  # a technique may build on another
        strings = [
            node.value
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        attributes = [
            node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute)
        ]
        assert technique.name not in strings, f"{name} names {technique.name}"
        assert section not in (*strings, *attributes), f"{name} knows {technique.name}'s section"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_short(name):
    text = FILES[name].read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{name}: {node.name}"
