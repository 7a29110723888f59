import json
import sys

import nbformat
import pytest

import run_all
from sdaug_utils import params

NAME = "03-training-percentage"


def call(monkeypatch, capsys, *arguments):
    """Exit code and stderr of the runner, run in this process."""
    monkeypatch.setattr(sys, "argv", ["run_all.py", *map(str, arguments)])
    code = run_all.main()
    return code, capsys.readouterr().err


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr(run_all, "execute", lambda *_: pytest.fail("work was started"))


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "huge"], "profile 'huge' is unknown: choose from miniature"),
        (["--only", "77"], "no notebook begins with '77': choose from"),
        (["--output", "README.md/runs"], "cannot write"),
    ],
)
def test_bad_arguments_cost_a_second(monkeypatch, capsys, arguments, message):
    code, error = call(monkeypatch, capsys, *arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("synthetic_per_class: 3", "synthetic_per_clas: 3", "synthetic_per_clas: unknown; valid"),
        ("[100, 50, 25, 10]", "[100, 1]", "1 % of 20 images leaves class 0 empty"),
        ("[trouser, bag]", "[trouser, hat]", "class 'hat' is unknown: choose from t-shirt"),
        ("[100, 50, 25, 10]", "[100, 5]", "num_input_images: 2, but the smallest real subset"),
        ("foundation: miniature", "foundation: nowhere", "'nowhere' is neither 'miniature' nor"),
        ("num_draws: 2", "num_draws: many", "num_draws: Input should be a valid integer"),
    ],
)
def test_bad_profiles_cost_a_second(monkeypatch, capsys, tmp_path, old, new, message):
    text = (params.PARAMS_FOLDER / "smoke.yaml").read_text()
    assert old in text
    monkeypatch.setattr(params, "PARAMS_FOLDER", tmp_path)
    (tmp_path / "spoilt.yaml").write_text(text.replace(old, new, 1))
    code, error = call(monkeypatch, capsys, "--profile", "spoilt", "--output", tmp_path / "runs")
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def notebook(folder, name, source):
    book = nbformat.v4.new_notebook()
    template = nbformat.read(run_all.NOTEBOOKS / f"{NAME}.ipynb", as_version=4)
    parameters = next(c for c in template.cells if "parameters" in c.metadata.get("tags", []))
    parameters.outputs, parameters.execution_count = [], None
    few = parameters.source.replace("10, 5]", "10]")  # of the smoke profile's 20 images
    parameters.source = few.replace("protocols_at_percent = 5", "protocols_at_percent = 10")
    book.cells = [parameters, nbformat.v4.new_code_cell(source)]
    book.metadata = {"kernelspec": template.metadata.kernelspec}
    nbformat.write(book, folder / name)


def test_tidy_keeps_the_last_state_of_progress_bars_and_no_paths(tmp_path):
    book = nbformat.v4.new_notebook(metadata={"papermill": {"input_path": "/somewhere"}})
    cell = nbformat.v4.new_code_cell("work()", metadata={"papermill": {}, "tags": ["kept"]})
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="\r  0%"),
        nbformat.v4.new_output("stream", name="stderr", text="\r100%\n"),
        nbformat.v4.new_output("stream", name="stdout", text="one\ntwo\n"),
        nbformat.v4.new_output("display_data", data={"text/plain": "picture"}),
    ]
    book.cells = [cell]
    nbformat.write(book, tmp_path / "book.ipynb")
    run_all.tidy(tmp_path / "book.ipynb")
    tidied = nbformat.read(tmp_path / "book.ipynb", as_version=4)
    assert tidied.metadata == {}
    assert tidied.cells[0].metadata == {"tags": ["kept"]}
    assert [output.get("text") for output in tidied.cells[0].outputs] == [
        "100%\n",
        "one\ntwo\n",
        None,
    ]


def test_a_failing_notebook_does_not_stop_the_others(monkeypatch, capsys, tmp_path):
    books = tmp_path / "notebooks"
    books.mkdir()
    failing, passing = "03-training-percentage", "04-passes"
    notebook(books, f"{failing}.ipynb", "print(profile)\nraise OSError('disk full')")
    notebook(books, f"{passing}.ipynb", "print(profile, synthetic_per_class)")
    monkeypatch.setattr(run_all, "NOTEBOOKS", books)
    model = params.EXPERIMENTS[failing]
    monkeypatch.setitem(params.EXPERIMENTS, passing, model)
    output = tmp_path / "runs"
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--profile", "smoke", "--output", str(output)])
    assert run_all.main() == 1
    summary = capsys.readouterr().out
    assert "failed in cell 2: OSError: disk full" in summary
    assert any(line.startswith(passing) and line.endswith("  ok") for line in summary.splitlines())
    partial = json.loads((output / f"{failing}.ipynb").read_text())
    assert any(o.get("ename") == "OSError" for c in partial["cells"] for o in c.get("outputs", []))
    executed = (output / f"{passing}.ipynb").read_text()
    assert "smoke 50" in executed
