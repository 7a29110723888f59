"""No number in prose is stale, rounded twice, or typed by hand."""

import io
import re

import nbformat
import pandas as pd
import pytest

from sdaug_utils.evidence import prose
from sdaug_utils.notebooks import NOTEBOOKS
from sdaug_utils.study import ROOT

NOTEBOOKS = sorted(NOTEBOOKS.glob("*.ipynb"))
TABLE = pd.DataFrame({"arm": ["a", "b"], "score": [0.6949, 0.5], "low": [0.1, 0.2]})
MARKED = '<!-- table; arm == "a"; {score:.2f} -->0.70<!-- / -->'


def test_a_marked_value_comes_from_the_table():
    text = f"It is {MARKED}, is it not?"
    assert prose.filled(text, lambda name: TABLE) == text.replace("0.70", "0.69")
    assert prose.emptied(text).count("0.70") == 0
    assert prose.emptied(text) == prose.emptied(prose.filled(text, lambda name: TABLE))


@pytest.mark.parametrize(
    ("value", "shown"), [(-0.04, "0.0"), (-0.06, "−0.1"), (-10.0, "−10.0"), (0.0, "0.0")]
)
def test_minus_signs_are_typeset_and_nothing_has_none(value, shown):
    table = TABLE.assign(score=value)
    assert f">{shown}<" in prose.filled(MARKED.replace(".2f", ".1f"), lambda name: table)


def test_text_without_marks_stays():
    text = "Nothing <!-- here --> is marked; 0.70."
    assert prose.filled(text, lambda name: TABLE) == prose.emptied(text) == text


@pytest.mark.parametrize("query", ["score > 0", "arm == 'c'", "nothing == 1"])
def test_a_mark_names_exactly_one_row(query):
    with pytest.raises(ValueError, match=re.escape(f"table; {query}")):
        prose.filled(MARKED.replace('arm == "a"', query), lambda name: TABLE)


def test_verdicts_have_their_differences_in_points():
    judged = pd.DataFrame({"difference": [0.0694], "low": [0.01], "high": [0.1]})
    shown = prose.filled(
        "<!-- claims; low > 0; {points:.1f} [{points_low:.1f}, {points_high:.1f}] --><!-- / -->",
        lambda name: prose.with_points(judged),
    )
    assert ">6.9 [1.0, 10.0]<" in shown


def texts(path):
    if path.suffix == ".md":
        return [path.read_text()]
    notebook = nbformat.read(path, as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


@pytest.mark.parametrize("path", [ROOT / "README.md", *NOTEBOOKS], ids=lambda x: x.stem)
def test_numbers_in_prose_are_those_of_the_results(path, contents):
    found = []
    for version in (0, -1):  # the tables as they are here, and as they are committed

        def read(name, version=version):
            content = contents(ROOT / "figures" / "miniature" / f"{name}.csv")[version]
            return prose.with_points(pd.read_csv(io.BytesIO(content)))

        found.append(all(prose.filled(text, read) == text for text in texts(path)))
    assert any(found), f"{path.name} is stale: 'make notebooks'"


def test_no_result_is_typed_by_hand_at_the_top_of_the_readme():
    [readme] = texts(ROOT / "README.md")
    top = re.sub(r"<!--.*?-->", "", prose.emptied(readme.split("## Notebooks")[0]))
    typed = re.sub(r"(Python|Diffusion|[Ff]igure) \d+\.\d+", "", top)
    assert not re.search(r"\d\.\d", typed), typed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda x: x.stem)
def test_no_result_is_typed_by_hand(path):
    [read, *_] = [text for text in texts(path) if text.startswith("**What to read in it.**")]
    assert prose.MARK.search(read), "no number at all"
    typed = re.sub(r"<!--.*?-->", "", prose.emptied(read))
    assert not re.search(r"\d\.\d", typed), typed
