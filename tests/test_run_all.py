import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest

import run_all
from sdaug_utils import notebooks, params, plan, summary
from sdaug_utils.evidence import gallery
from sdaug_utils.store import file_digest
from sdaug_utils.study import ROOT, figures_folder, write_config

NAME = "03-training-percentage"


def test_what_is_up_to_date_is_not_run_again(monkeypatch, capsys, tmp_path):
    books, output, name = tmp_path / "notebooks", tmp_path / "runs", "05-all-generated"
    books.mkdir()
    code = """
import pandas as pd
from sdaug_utils.evidence import figures
open(MARK, "a").write("x")
figures.save_table(profile, "table-x", pd.DataFrame({"a": [2]}))
""".replace("MARK", repr(str(tmp_path / "mark")))
    notebook(books, name, code)
    monkeypatch.setattr(notebooks, "NOTEBOOKS", books)
    made = tmp_path / "figures" / "smoke" / "table-x.csv"

    def run(*arguments):
        line = ["run_all.py", "--profile", "smoke", "--output", str(output), *arguments]
        monkeypatch.setattr(sys, "argv", line)
        assert run_all.main() == 0
        shown = capsys.readouterr().out
        [status] = [line.split()[-1] for line in shown.splitlines() if line.startswith(f"{name}  ")]
        return status, len((tmp_path / "mark").read_text())

    def job(profile="smoke"):
        [one] = notebooks.check(notebooks.chosen([name]), profile, output)
        return one

    assert run() == ("ok", 1)
    assert run() == ("date", 1)
    assert made.read_text() == "a\n2\n"
    [what] = plan.wanted(summary.asked_for([job()])).values()
    images = [tmp_path / "store" / "pools" / key / "00000.png" for key in what.images]
    assert len(images) > 2
    before = [image.read_bytes() for image in images]
    for image in images:
        image.write_bytes(image.read_bytes()[:100])  # damaged: made again as it was
    assert run() == ("date", 1)
    assert [image.read_bytes() for image in images] == before

    assert not job(write_config("smoke", changes=[([name, "num_seeds"], 1)])[0]).is_up_to_date()
    made.write_text("a\n3\n")  # not what it wrote
    assert not job().is_up_to_date()
    made.write_text("a\n2\n")
    assert job().is_up_to_date()
    with monkeypatch.context() as patched:
        patched.setattr(notebooks, "_module_digest", lambda: "of another version")
        assert not job().is_up_to_date()
    notebook(books, name, f"{code}\nprint('changed')")
    assert not job().is_up_to_date()
    assert run("--force") == ("ok", 2)
    made.unlink()
    assert not job().is_up_to_date()


def call(monkeypatch, capsys, *arguments):
    """Exit code and stderr of the runner, run in this process."""
    monkeypatch.setattr(sys, "argv", ["run_all.py", *map(str, arguments)])
    code = run_all.main()
    return code, capsys.readouterr().err


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr(notebooks, "execute_all", lambda *_: pytest.fail("work was started"))


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
        ("[100, 50, 25, 10]", "[100, 1]", "1 % of 20 real images leaves class 0 empty"),
        ("[trouser, bag]", "[trouser, hat]", "class 'hat' is unknown: choose from t-shirt"),
        ("[100, 50, 25, 10]", "[100, 5]", "learns from 2 images, but the smallest real subset"),
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
    """A notebook with the parameters of the one of its name, and a cell."""
    book = nbformat.v4.new_notebook()
    template = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    parameters = next(c for c in template.cells if "parameters" in c.metadata.get("tags", []))
    parameters.outputs, parameters.execution_count = [], None
    book.cells = [parameters, nbformat.v4.new_code_cell(source)]
    book.metadata = {"kernelspec": template.metadata.kernelspec}
    nbformat.write(book, folder / f"{name}.ipynb")


def test_tidy_keeps_the_last_state_of_progress_bars_and_no_paths(tmp_path):
    book = nbformat.v4.new_notebook(metadata={"papermill": {"input_path": "/somewhere"}})
    cell = nbformat.v4.new_code_cell("work()", metadata={"papermill": {}, "tags": ["kept"]})
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="\r  0%"),
        nbformat.v4.new_output("stream", name="stderr", text="\r100%\n"),
        nbformat.v4.new_output("stream", name="stdout", text="one\ntwo\n"),
        nbformat.v4.new_output(
            "display_data",
            data={"text/plain": "picture at 0x7", gallery.WIDGET: {"model_id": "1f"}},
        ),
        *(
            nbformat.v4.new_output(
                "execute_result", data={"text/html": f'<i id="{name}"><b id="{name}_row0">'}
            )
            for name in ("T_1a2b3", "T_fffff", "T_1a2b3")
        ),
    ]
    book.cells = [cell]
    nbformat.write(book, tmp_path / "book.ipynb")
    (tmp_path / "fig.csv").write_text("a\n1\n")
    notebooks.tidy(tmp_path / "book.ipynb", "smoke", [tmp_path / "fig.csv"], "of all this")
    tidied = nbformat.read(tmp_path / "book.ipynb", as_version=4)
    assert tidied.metadata == {
        "sdaug": {
            "code": notebooks.source_digest(book),
            "settings": notebooks.settings_digest("smoke", "book"),
            "numbers": {"fig.csv": file_digest(tmp_path / "fig.csv")},
            "files": ["fig.csv"],
            "key": "of all this",
        }
    }
    assert tidied.cells[0].metadata == {"tags": ["kept"]}
    assert [output.get("text") for output in tidied.cells[0].outputs] == [
        "100%\n",
        "one\ntwo\n",
        *[None] * 4,
    ]
    _, _, picture, *tables = (output.get("data") for output in tidied.cells[0].outputs)
    assert picture == {"text/plain": "picture"}
    assert [table["text/html"] for table in tables] == [
        f'<i id="T_0000{number}"><b id="T_0000{number}_row0">' for number in (0, 1, 0)
    ]


def test_the_code_of_a_notebook_has_a_digest_without_what_papermill_injects():
    book = nbformat.v4.new_notebook()
    book.cells = [nbformat.v4.new_code_cell("a = 1"), nbformat.v4.new_markdown_cell("text")]
    before = notebooks.source_digest(book)
    injected = nbformat.v4.new_code_cell("a = 2", metadata={"tags": ["injected-parameters"]})
    book.cells += [injected, nbformat.v4.new_markdown_cell("more")]
    assert notebooks.source_digest(book) == before
    book.cells[0].source = "a = 3"
    assert notebooks.source_digest(book) != before


def test_a_kernel_that_does_not_start_fails_its_notebook_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(notebooks, "running_kernel", lambda: 1 / 0)
    jobs = notebooks.check(notebooks.chosen(["01", "02"]), "smoke", tmp_path)
    reports = notebooks.execute_all(jobs, [], keep_going=True)
    failed = "failed: ZeroDivisionError: division by zero"
    assert [report.status for report in reports] == [failed] * 2
    assert len(notebooks.execute_all(jobs, [], keep_going=False)) == 1


def test_a_kernel_imports_the_module_of_its_runner(monkeypatch, tmp_path):
    """Whatever checkout the environment was installed from, and however long TMPDIR is."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / ("x" * (89 - len(str(tmp_path))))))
    Path(os.environ["TMPDIR"]).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", None)
    other = tmp_path / "other"
    shutil.copytree(notebooks.MODULE, other / "sdaug_utils")
    monkeypatch.setattr(notebooks, "ROOT", other)
    with notebooks.running_kernel() as kernel:
        imported = notebooks.ask(kernel, "__import__('sdaug_utils').__file__")
    assert Path(imported).is_relative_to(other)


@pytest.mark.usefixtures("nothing_runs")
def test_a_dry_run_counts_what_is_missing_and_starts_nothing(monkeypatch, capsys, tmp_path):
    arguments = ["run_all.py", "--profile", "smoke", "--only", "04", "05", "--dry-run"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--output", str(tmp_path / "runs")])
    assert run_all.main() == 0
    lines = capsys.readouterr().out.splitlines()
    [fourth] = [line for line in lines if line.startswith("04")]
    [fifth] = [line for line in lines if line.startswith("05")]
    # 3 techniques, 2 draws, 2 classes, 3 images, of plain prompts one more; 2 personalised
    # techniques, 2 draws, 2 classes
    # and 3 copies
    assert "52 / 52" in fourth
    assert "8 / 8" in fourth
    assert "36 / 36" in fourth
    assert "0 / 40" in fifth  # experiment 04 has made them
    assert "14 / 18" in fifth  # its baselines, too
    assert any("4.0 times as many" in line for line in lines)
    assert not list((tmp_path / "store").glob("pools/*"))


@pytest.mark.usefixtures("nothing_runs")
def test_a_dry_run_plans_every_notebook(monkeypatch, capsys, tmp_path):
    arguments = ["run_all.py", "--profile", "smoke", "--dry-run", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert run_all.main() == 0
    shown = capsys.readouterr().out
    assert all(path.stem in shown for path in notebooks.chosen(None))


@pytest.mark.usefixtures("nothing_runs")
def test_another_protocol_does_not_write_over_the_figures(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(notebooks, "check", lambda *a, **_: seen.append(a) or [])
    monkeypatch.setattr(summary, "print_plan", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--protocol", "published", "--dry-run"])
    assert run_all.main() == 0
    _, profile, output, _ = seen[0]
    assert figures_folder(profile) == tmp_path / "figures" / "miniature-published"
    assert output.name == "miniature-published"


def test_a_protocol_reaches_the_notebooks_that_have_one(tmp_path):
    paths = notebooks.chosen(["01", "05"])
    profile, _ = write_config("smoke", protocol="published")
    subjects, runs = notebooks.check(paths, profile, tmp_path)
    assert "protocol" not in subjects.overrides
    assert runs.parameters.protocol == "published"
    assert runs.overrides["protocol"] == "published"


def test_a_failing_notebook_does_not_stop_the_others(monkeypatch, capsys, tmp_path):
    books = tmp_path / "notebooks"
    books.mkdir()
    failing, passing = "03-training-percentage", "04-generation-percentage"
    notebook(books, failing, "print(profile)\nraise OSError('disk full')")
    notebook(books, passing, "print(profile, num_draws)")
    monkeypatch.setattr(notebooks, "NOTEBOOKS", books)
    output = tmp_path / "runs"
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--profile", "smoke", "--output", str(output)])
    assert run_all.main() == 1
    assert (tmp_path / "figures" / "smoke" / "table-b-1-software.csv").exists()
    shown = capsys.readouterr().out
    assert "failed in cell 2: OSError: disk full" in shown
    assert any(line.startswith(passing) and line.endswith("  ok") for line in shown.splitlines())
    partial = json.loads((output / f"{failing}.ipynb").read_text())
    assert any(o.get("ename") == "OSError" for c in partial["cells"] for o in c.get("outputs", []))
    executed = (output / f"{passing}.ipynb").read_text()
    assert "smoke 2" in executed
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--no-keep-going"])
    assert run_all.main() == 1
    assert passing not in capsys.readouterr().out
