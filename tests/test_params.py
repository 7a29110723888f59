from pathlib import Path

import pytest

from sdaug_utils import params
from sdaug_utils.errors import InputError
from sdaug_utils.registry import experiments
from sdaug_utils.study import write_config

NOTEBOOKS = params.PARAMS_FOLDER.parent / "notebooks"
NAME = "03-training-percentage"


@pytest.fixture
def profile_folder(tmp_path, monkeypatch):
    """A params folder with a copy of the smoke profile that a test may spoil."""
    text = (params.PARAMS_FOLDER / "smoke.yaml").read_text()
    monkeypatch.setattr(params, "PARAMS_FOLDER", tmp_path)

    def write(old="", new=""):
        assert old in text
        (tmp_path / "spoilt.yaml").write_text(text.replace(old, new, 1))

    return write


@pytest.mark.parametrize("profile", ["smoke", "miniature", "thesis", "thesis-fast"])
@pytest.mark.parametrize("notebook", list(experiments()))
def test_every_profile_fits_every_notebook(profile, notebook):
    params.load_settings(profile)
    values = params.parameters_cell(NOTEBOOKS / f"{notebook}.ipynb")
    checked = params.check_notebook(notebook, values | params.notebook_section(profile, notebook))
    assert checked.profile == "miniature"


def test_a_profile_is_its_base_but_for_what_it_sets(profile_folder):
    profile_folder()
    heir = params.PARAMS_FOLDER / "heir.yaml"
    heir.write_text(
        f"base: spoilt\ncommon: {{sampling: {{batch_size: 3}}}}\n{NAME}: {{num_draws: 9}}"
    )
    base, own = params.load_settings("spoilt"), params.load_settings("heir")
    assert own.sampling.batch_size == 3 != base.sampling.batch_size
    assert own.model_copy(update={"sampling": base.sampling}) == base
    set_by_base = params.notebook_section("spoilt", NAME)
    assert params.notebook_section("heir", NAME) == set_by_base | {"num_draws": 9}

    heir.write_text("base: heir")
    with pytest.raises(InputError, match=r"heir\.yaml: base: 'heir' is based on itself"):
        params.load_settings("heir")
    heir.write_text("base: nobody")
    with pytest.raises(InputError, match="profile 'nobody' is unknown"):
        params.load_settings("heir")


def test_what_is_asked_for_is_a_profile_in_a_file(tmp_path):
    changes = [(["common", "sampling", "batch_size"], 3), ([NAME, "num_draws"], 9)]
    changed, folder = write_config("smoke", changes=changes, protocol="published")
    assert Path(changed) == folder / "config.yaml"
    assert params.load_settings(changed).sampling.batch_size == 3
    own = params.notebook_section(changed, NAME)
    assert (own["num_draws"], own["protocol"]) == (9, "published")
    assert "protocol" not in params.notebook_section(changed, "01-number-of-images")
    assert params.invocation_of(changed).name == folder.name != "smoke-published"
    assert write_config("smoke") == ("smoke", folder.parent / "smoke")  # nothing is changed
    with pytest.raises(InputError, match=r"smoke\.yaml: sampling\.batch_size: Input should be"):
        write_config("smoke", changes=[(["common", "sampling", "batch_size"], "many")])


def test_a_file_is_a_profile_like_any_other():
    changed, folder = write_config("smoke", changes=[([NAME, "num_draws"], 9)])
    shipped, same = write_config(changed, from_results=True, file="from-results.yaml")
    assert same == folder
    assert params.invocation_of(shipped).from_results
    assert not params.invocation_of(changed).from_results
    further, other = write_config(changed, protocol="published")
    assert other.name == f"{folder.name}-published"
    assert params.notebook_section(further, NAME)["num_draws"] == 9
    plain = str(params.PARAMS_FOLDER / "smoke.yaml")
    assert write_config(plain)[1].name == params.invocation_of(plain).name == "smoke"


def test_the_fast_profile_differs_from_the_thesis_in_what_its_treatment_says():
    thesis, fast = (params.load_settings(name) for name in ("thesis", "thesis-fast"))
    assert (thesis.treatment, fast.treatment) == (
        "",
        "20 steps of DPM-Solver++, DreamBooth by LoRA",
    )
    drawn = {"num_inference_steps": 20, "scheduler": "dpmsolver++"}
    assert fast == thesis.model_copy(
        update={
            "treatment": fast.treatment,
            "sampling": thesis.sampling.model_copy(update=drawn),
            "controlnet": thesis.controlnet.model_copy(update=drawn),
        }
    )
    for notebook in experiments():
        values = params.parameters_cell(NOTEBOOKS / f"{notebook}.ipynb")
        slow, own = (
            params.check_notebook(
                notebook, values | params.notebook_section(name, notebook)
            ).model_dump()
            for name in ("thesis", "thesis-fast")
        )
        assert "'dreambooth'" not in str(own)
        changed = {key for key, value in own.items() if value != slow[key]}
        assert changed <= {"num_draws", "techniques", "rivals", "rows"}
        if "num_draws" in own:
            assert own["num_draws"] == slow["num_draws"] + 1


def test_an_unknown_profile_lists_the_known():
    with pytest.raises(InputError, match="'huge' is unknown: choose from miniature, smoke"):
        params.load_settings("huge")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  foundation:", "  foundatoin:", r"spoilt\.yaml: foundatio.*"),
        ("learning_rate: 0.01\n", "learning_rate: fast\n", r"learning_rate: .*valid number"),
        (
            "num_inference_steps: 2",
            "num_inference_steps: 0",
            r"num_inference_steps: .*greater than",
        ),
        ("backbone: efficientnet-lite0", "backbone: vgg", "Input should be 'efficientnet-lite0'"),
        ("num_input_images: 2", "num_inputs: 2", "num_input"),
        ("03-training-percentage:", "03-trainings:", "section '03-trainings' is unknown"),
        ("common:", "common: [", "not YAML"),
        ("common:", "others:", "needs a section 'common'"),
        ("num_class_images: 4", "num_class_images: 0", "num_class_images must be positive"),
        ("train: 20", "train: 0", "train: Input should be greater than or equal to 1"),
        ("guidance_scale: 2.0", "guidance_scale: .inf", "guidance_scale: .*finite number"),
        ("[trouser, bag]", "[bag, bag]", "classes: .*a value comes twice"),
        (
            "      classes:",
            "      x: 1\n      classes:",
            r"data\.main\.x: unknown; valid keys are name",
        ),
    ],
)
def test_bad_profiles_are_refused_in_one_line(profile_folder, old, new, message):
    profile_folder(old, new)
    with pytest.raises(InputError, match=message) as caught:
        params.load_settings("spoilt")
    assert "\n" not in str(caught.value)


def test_an_unknown_key_lists_the_valid_ones():
    values = params.parameters_cell(NOTEBOOKS / f"{NAME}.ipynb")
    with pytest.raises(InputError, match="real_percent: unknown; valid keys are profile, protocol"):
        params.check_notebook(NAME, values | {"real_percent": 5})
    with pytest.raises(InputError, match=r"Input should be .*'stable-diffusion-prompt'"):
        params.check_notebook(NAME, values | {"techniques": ["deep-dream"]})
    with pytest.raises(InputError, match="less than or equal to 100"):
        params.check_notebook(NAME, values | {"real_percents": [120]})
    with pytest.raises(InputError, match=r"real_percents: .*comes twice"):
        params.check_notebook(NAME, values | {"real_percents": [5, 5]})
    with pytest.raises(InputError, match="num_draws: Input should be greater than or equal to 2"):
        params.check_notebook(NAME, values | {"num_draws": 1})
    with pytest.raises(InputError, match="'none' must be among them"):
        params.check_notebook(NAME, values | {"augmentations": ["custom"]})


def test_a_notebook_collects_its_own_parameters():
    values = params.parameters_cell(NOTEBOOKS / f"{NAME}.ipynb")
    namespace = {**values, "_": 1, "In": [""], "Out": {}, "pd": params, "exit": print}
    assert params.from_notebook(NAME, namespace).model_dump() == values
    later = {**namespace, "draw": 1, "seen": []}  # what the notebook itself defines further down
    assert params.from_notebook(NAME, later).model_dump() == values
    injected = {**namespace, "In": ["", "# Parameters\nnum_drawz = 3\n"]}
    with pytest.raises(InputError, match="num_drawz: unknown"):
        params.from_notebook(NAME, injected)
    misspelt = {**namespace, "In": ["", 'profile = "miniature"\nnum_draw = 5\n']}
    with pytest.raises(InputError, match="num_draw: unknown"):
        params.from_notebook(NAME, misspelt)


def test_a_mistyped_parameter_is_forgotten_once_it_is_put_right():
    values = params.parameters_cell(NOTEBOOKS / f"{NAME}.ipynb")
    wrong = '# my own note\nprofile = "miniature"\nnum_draw = 5\n'
    right = 'profile = "miniature"\nnum_draws = 3\n'
    injected = "# Parameters\nnum_drawz = 3\n"
    with pytest.raises(InputError, match="num_draw: unknown"):
        params.from_notebook(NAME, {**values, "num_draw": 5, "In": ["", wrong]})
    live = {**values, "num_draw": 5, "num_drawz": 3}
    for cells in (
        [wrong, "p = params.from_notebook(...)", right],
        [right, injected, "%matplotlib inline", "# Parameters\nnum_draws = 3\n"],
        [right, injected, right],
    ):
        assert params.from_notebook(NAME, {**live, "In": ["", *cells]}).model_dump() == values
    with pytest.raises(InputError, match="num_drawz: unknown"):
        params.from_notebook(NAME, {**live, "In": ["", right, injected]})


def test_a_parameters_cell_holds_assignments_only(tmp_path):
    notebook = tmp_path / "notebook.ipynb"
    cell = '{"cells": [{"metadata": {"tags": ["parameters"]}, "source": ["%s"]}]}'
    notebook.write_text(cell % "a = [1, 2]\\n" + "\n")
    assert params.parameters_cell(notebook) == {"a": [1, 2]}
    notebook.write_text(cell % "a = open('x')")
    with pytest.raises(InputError, match="parameters cell"):
        params.parameters_cell(notebook)
    notebook.write_text('{"cells": []}')
    with pytest.raises(InputError, match="no cell is tagged"):
        params.parameters_cell(notebook)


def test_the_fewer_images_the_more_views_of_each():
    controlled = params.load_settings("smoke").classifier.controlled
    assert controlled.num_views(1) == 12
    assert controlled.num_views(5) == 3
    assert controlled.num_views(100) == 2
    assert controlled.num_views(100, synthetic=True) == 1
