"""Malformed command lines and parameters: each is one line, exit code 2, and costs a moment."""

import sys
import time

import pytest

import run_all
from sdaug_utils import make

S, D, T, C = "common.sampling", "common.dreambooth", "common.textual_inversion", "common.classifier"
G, N = "common.segmenter", "common.controlnet"
TYPE, SOME, UNKNOWN = "valid", "greater than", "unknown; valid keys are"
VALUES = [
    (f"{S}.guidance_scale", ".inf", "finite"),
    (f"{S}.guidance_scale", ".nan", "finite"),
    (f"{S}.guidance_scale", "0.5", SOME),
    (f"{S}.guidance_scale", "strong", TYPE),
    (f"{S}.num_inference_steps", "0", SOME),
    (f"{S}.num_inference_steps", "2.5", TYPE),
    (f"{S}.num_inference_steps", "[2]", TYPE),
    (f"{S}.scheduler", "euler", "Input should be 'default'"),
    (f"{S}.resolution", "36", "is no multiple of 8"),
    (f"{S}.resolution", "4", SOME),
    (f"{S}.batch_size", "-1", SOME),
    (f"{S}.max_attempts", "0", SOME),
    (f"{S}.safety_checker", "maybe", TYPE),
    (f"{S}.prompt", "a photo", "pattern"),
    (f"{S}.prompt", "7", TYPE),
    (f"{S}.prompts", "a {}", UNKNOWN),
    (f"{S}", "fast", TYPE),
    (f"{N}.guidance_scale", ".inf", "finite"),
    (f"{N}.num_inference_steps", "0", SOME),
    (f"{N}.conditioning_scale", ".nan", "finite"),
    (f"{N}.canny", "nowhere", "is neither 'miniature' nor"),
    (f"{N}.palette", "ade20k", "Input should be"),
    (f"{N}.scheduler", "none", "Input should be"),
    (f"{D}.max_train_steps", "0", SOME),
    (f"{D}.learning_rate", "0", SOME),
    (f"{D}.learning_rate", ".inf", "finite"),
    (f"{D}.train_batch_size", "0", SOME),
    (f"{D}.num_input_images", "0", SOME),
    (f"{D}.optimizer", "sgd", "Input should be"),
    (f"{D}.prior_loss_weight", "-1", SOME),
    (f"{D}.keep_models", "perhaps", TYPE),
    (f"{D}.steps", "3", UNKNOWN),
    (f"{T}.initializer_token", "unpronounceable", "not a single token"),
    (f"{T}.placeholder_token", "bag", "is a word already"),
    (f"{T}.learnable_property", "shape", "Input should be"),
    (f"{T}.max_train_steps", "0", SOME),
    (f"{T}.learning_rate", "quick", TYPE),
    (f"{T}.subjects_at_once", "0", SOME),
    (f"{T}.gradient_accumulation_steps", "0", SOME),
    (f"{C}.backbone", "vgg", "Input should be 'efficientnet-lite0'"),
    (f"{C}.image_size", "16", SOME),
    (f"{C}.controlled.learning_rate", "-0.1", SOME),
    (f"{C}.controlled.batch_size", "0", SOME),
    (f"{C}.controlled.max_train_steps", "0", SOME),
    (f"{C}.controlled.min_views", "0", SOME),
    (f"{C}.controlled.epochs", "9", UNKNOWN),
    (f"{C}.published.patience", "0", SOME),
    (f"{C}.published.max_epochs", "-3", SOME),
    (f"{C}.published.passes_per_epoch", "0", SOME),
    (f"{G}.output_stride", "12", "Input should be"),
    (f"{G}.atrous_rates", "[]", "at least 1 item"),
    (f"{G}.atrous_rates", "[2, 2]", "comes twice"),
    (f"{G}.channels", "1", SOME),
    (f"{G}.label_size", "1", SOME),
    ("common.device", "tpu", "Input should be 'auto'"),
    ("common.device", "cuda", "there is no 'cuda' here"),
    ("common.device", "mps", "there is no 'mps' here"),
    ("common.precision", "int8", "Input should be 'auto'"),
    ("common.attention", "xformers", "xformers does not load here"),
    ("common.training_precision", "half", "Input should be"),
    ("common.foundation", "nowhere", "is neither 'miniature' nor"),
    ("common.foundations", "miniature", UNKNOWN),
    ("common.data.main.name", "cifar", "Input should be"),
    ("common.data.main.classes", "[bag]", "at least 2 items"),
    ("common.data.main.classes", "[bag, hat]", "class 'hat' is unknown"),
    ("common.data.main.folder", "somewhere", "needed for data sets of photographs"),
    ("common.data.main.max_images_per_class", "{dev: 3}", "'dev' is unknown"),
    ("common.data.third", "{name: digits}", "Input should be 'main'"),
    ("01.num_subjects", "1", SOME),
    ("01.num_subjects", "50", "choose at most that many"),
    ("01.numbers_of_images", "[]", "at least 1 item"),
    ("01.images_per_prompt", "1", SOME),
    ("01.prompts", "{a photo: null}", "has no {} for the subject"),
    ("01.techniques", "[stable-diffusion-prompt]", "Input should be"),
    ("02.kinds", "[[trouser, bag], [bag]]", "is of two kinds"),
    ("02.bare_technique", "real-guidance", "Input should be 'stable-diffusion-prompt'"),
    ("02.bare_technique", "retrieval", "Input should be 'stable-diffusion-prompt'"),
    ("02.bare_technique", "dreambooth", "Input should be 'stable-diffusion-prompt'"),
    (f"{G}.batch_size", "1", SOME),
    ("common.dreambooth.instance_prompt", "a {} of mine", "String should match"),
    ("03.real_percents", "[100, 0]", SOME),
    ("03.real_percents", "[100, 120]", "less than or equal to 100"),
    ("03.real_percents", "all", TYPE),
    ("03.num_draws", "1", SOME),
    ("03.num_seeds", "0", SOME),
    ("03.augmentations", "[custom]", "'none' must be among them"),
    ("03.augmentations", "[none, jitter]", "Input should be"),
    ("03.techniques", "[deep-dream]", "Input should be"),
    ("03.protocol", "loose", "Input should be"),
    ("04.synthetic_per_class", "{100: [0]}", SOME),
    ("04.synthetic_per_class", "{}", "at least 1 item"),
    ("05.reference_percents", "[]", "at least 1 item"),
    ("06.outside_at_percent", "33", "is not among"),
    ("07.rows", "[[dreambooth, 50]]", "Field required"),
    ("08.update_numbers", "[0]", SOME),
    ("09.num_draws", "two", TYPE),
    ("03.nonsense", "1", UNKNOWN),
    ("33.num_draws", "3", "sections are common, 01"),
    ("common", "3", "write SECTION.KEY"),
    ("03.num_draws", "[", "not YAML"),
]
LINES = [
    (["--only", "77"], "no notebook begins with '77'"),
    (["--only", "77", "--dry-run"], "no notebook begins with '77'"),
    (["--profile", "huge"], "profile 'huge' is unknown"),
    (["--profile", ""], "profile '' is unknown"),
    (["--dataset", "nowhere"], "needs a folder for each"),
    (["--output", "README.md/runs"], "cannot write"),
    (["--cluster", "lsf"], "--cluster lsf: there is no command 'bsub' here"),
    (["--scheduler", "nowhere:1"], "--scheduler nowhere:1: nothing answers there"),
    (["--scheduler", "tls://127.0.0.1"], "--scheduler tls://127.0.0.1: nothing answers there"),
]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(make, "make_all", lambda *_: pytest.fail("work was started"))

    def run(*arguments):
        line = ["run_all.py", "--profile", "smoke", "--output", str(tmp_path / "runs"), *arguments]
        monkeypatch.setattr(sys, "argv", line)
        began = time.perf_counter()
        code = run_all.main()
        assert time.perf_counter() - began < 2
        return code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(("key", "value", "message"), VALUES)
def test_a_bad_value_is_one_line(call, key, value, message):
    code, error = call("-p", key, value)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1, error


@pytest.mark.parametrize(("arguments", "message"), LINES)
def test_a_bad_command_line_is_one_line(call, arguments, message):
    code, error = call(*arguments)
    assert code == 2
    assert message in error
    assert error.count("\n") == 1, error


@pytest.mark.parametrize(
    "arguments",
    [
        *(["--workers", "0"], ["--workers", "many"], ["--timeout", "-3"], ["--gpus", "0"]),
        *(["--parameter", "03.x"], ["--protocol", "loose"], ["--nonsense"], ["--scheduler"]),
        ["--cluster", "night"],
    ],
)
def test_what_argparse_refuses(call, capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("run_all.py: error: argument") or (
        "unrecognized" in str(arguments) or arguments == ["--nonsense"]
    )
