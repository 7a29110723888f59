"""Plant faults one by one, and show that the tests see each: python tests/mutants.py [NAME …]

A fault is a small patch: in a file of the project, one text in place of another. It is planted in a
copy, where the tests beside it are run: they must pass before, and one must fail after.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "runs", "build", "*.egg-info")
TRAINING, EVIDENCE = "sdaug_utils/training", "sdaug_utils/evidence"
GENERATION = "sdaug_utils/generation"


class Fault(NamedTuple):
    what: str
    file: str
    before: str
    after: str
    tests: str  # of tests/test_faults.py, or a file and a test


FAULTS = (
    Fault(
        "no normalisation in normalise",
        f"{TRAINING}/features.py",
        "return (pixels - mean) / std",
        "return pixels",
        "pixels_are_normalised",
    ),
    Fault(
        "one view instead of several",
        "sdaug_utils/params.py",
        "return max(fewest, -(-self.num_augmented // num_images))",
        "return 1",
        "several_views",
    ),
    Fault(
        "all seeds equal",
        f"{TRAINING}/runs.py",
        "return 1000 * run.draw + run.seed",
        "return 0",
        "seed_of_its_own",
    ),
    Fault(
        "the segmenter keeps the last instead of the best weights",
        f"{TRAINING}/segmenter.py",
        "head.load_state_dict(best)",
        "pass",
        "best_weights",
    ),
    Fault(
        "a segmenter's patience with the wrong sign",
        f"{TRAINING}/segmenter.py",
        "elif not controlled and step - best_step >= settings.patience * epoch:",
        "elif not controlled and step - best_step <= settings.patience * epoch:",
        "segmenters_patience",
    ),
    Fault(
        "a classifier's patience with the wrong sign",
        f"{TRAINING}/classifier.py",
        "elif epoch - best_epoch >= settings.patience:",
        "elif epoch - best_epoch <= settings.patience:",
        "test_classifier.py::test_published_training_equals_a_plain_loop",
    ),
    Fault(
        "synthetic images with another image's trimap",
        f"{TRAINING}/trainer.py",
        "[row for pool in self.pools_of(run) for row in pool.source_rows]",
        "[row for pool in self.pools_of(run) for row in pool.source_rows[::-1]]",
        "trimap_that_it_follows",
    ),
    Fault(
        "latents not scaled",
        f"{GENERATION}/personalisation.py",
        "latents = self.scale * (",
        "latents = (",
        "latents_are_scaled",
    ),
    Fault(
        "epsilon models trained on the wrong target",
        f"{GENERATION}/personalisation.py",
        'if config.prediction_type == "v_prediction":',
        "if True:",
        "target_is_what",
    ),
    Fault(
        "a claim reads the baseline at 10 % for the one at 5 %",
        f"{EVIDENCE}/tables/claims.yaml",
        "first: {arm: stable-diffusion-prompt, real_percent: 5}\n"
        "  second: {arm: baseline, real_percent: 5}",
        "first: {arm: stable-diffusion-prompt, real_percent: 5}\n"
        "  second: {arm: baseline, real_percent: 10}",
        "own_percentage",
    ),
    Fault(
        "the draws' variance not corrected for their small number",
        f"{EVIDENCE}/metrics.py",
        "return Spread(float(draws.var(ddof=1)), 0.0)",
        "return Spread(float(draws.var()), 0.0)",
        "wider_interval",
    ),
    Fault(
        "Holm without its order",
        f"{EVIDENCE}/claims.py",
        "enumerate(sorted(p_values, key=p_values.__getitem__))",
        "enumerate(p_values)",
        "test_claims.py::holm",
    ),
    Fault(
        "another AutoAugment policy",
        "sdaug_utils/data/augment.py",
        "v2.AutoAugmentPolicy.IMAGENET",
        "v2.AutoAugmentPolicy.CIFAR10",
        "policy_for_imagenet",
    ),
    Fault(
        "pools left out of a run's key",
        f"{TRAINING}/runs.py",
        "return _pool_keys(own, run.technique, run.draw, pool_percent(own, run))",
        "return []",
        "a_key_knows",
    ),
    Fault(
        "max_train_steps left out of a model's key",
        f"{GENERATION}/personalisation.py",
        '    "subjects_at_once",\n',
        '    "subjects_at_once",\n    "max_train_steps",\n',
        "a_key_knows",
    ),
    Fault(
        "chance not subtracted",
        f"{EVIDENCE}/subjects.py",
        "            - len(subject.labels) / len(self.kind_of_class),",
        "            + 0.0,",
        "chance_is_nothing",
    ),
    Fault(
        "the real subset of another draw",
        f"{TRAINING}/runs.py",
        "return _subset(study.data, run.real_percent, run.draw)",
        "return _subset(study.data, run.real_percent, 0)",
        "draws_subset",
    ),
    Fault(
        "validation images among the training images",
        f"{TRAINING}/trainer.py",
        'real = self.features_of("train")[real_rows(self.study, run)]',
        'real = self.features_of("validation")[:4]',
        "draws_subset",
    ),
    Fault(
        "labels shuffled",
        f"{TRAINING}/trainer.py",
        "labels = np.repeat(np.arange(self.num_classes), run.synthetic_per_class)",
        "labels = np.tile(np.arange(self.num_classes), run.synthetic_per_class)",
        "draws_subset",
    ),
    Fault(
        "copies that are not copies",
        f"{GENERATION}/techniques/copies.py",
        "images(request.source_rows(first))",
        "images(first)",
        "test_techniques.py::test_copies_are_the_subset_again_and_nothing_else",
    ),
    Fault(
        "splits that overlap count as independent",
        f"{EVIDENCE}/metrics.py",
        "(1 / len(gains) + 1)",
        "(1 / len(gains))",
        "test_metrics.py::test_gains_over_splits_that_overlap_have_the_corrected_interval",
    ),
    Fault(
        "a claim that averages what differs",
        f"{EVIDENCE}/tables/claims.yaml",
        "      first: {arm: textual-inversion, real_percent: each}\n",
        "      first: {arm: textual-inversion, real_percent: [25, 50, 100]}\n",
        "test_claims.py::test_settings_that_differ_have_a_row_each",
    ),
    Fault(
        "guidance ignored",
        f"{GENERATION}/pools.py",
        "guidance_scale=sampling.guidance_scale,",
        "guidance_scale=1.0,",
        "guidance_and_words",
    ),
    Fault(
        "all images follow one control",
        f"{GENERATION}/techniques/controlnet.py",
        "for row in request.source_rows(indices)]",
        "for row in request.source_rows([0] * len(indices))]",
        "take_turns",
    ),
    Fault(
        "ControlNet's condition ignored",
        f"{GENERATION}/techniques/controlnet.py",
        '"controlnet_conditioning_scale": scale',
        '"controlnet_conditioning_scale": 0.0',
        "test_pools.py::test_images_follow_their_control",
    ),
    Fault(
        "weights chosen on test images",
        f"{TRAINING}/trainer.py",
        '(held_out("validation")[:, 0], self.splits["validation"].labels)',
        '(held_out("test")[:, 0], self.splits["test"].labels)',
        "chosen_on_validation",
    ),
    Fault(
        "a published value mistyped",
        f"{EVIDENCE}/tables/published_results.csv",
        "03-training-percentage,035,oxford-iiit-pet,classification,textual-inversion,5,1000,50,"
        "accuracy,0.743059",
        "03-training-percentage,035,oxford-iiit-pet,classification,textual-inversion,5,1000,50,"
        "accuracy,0.734059",
        "mistyped",
    ),
)


def passes(copy: Path, tests: str) -> bool:
    """Whether some tests pass in a copy of the project."""
    file, name = tests.split("::") if "::" in tests else ("test_faults.py", tests)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [*command, f"tests/{file}", "-k", name], cwd=copy, capture_output=True, text=True
    )
    if result.returncode not in (0, 1):
        raise RuntimeError(result.stdout + result.stderr)
    return result.returncode == 0


def main() -> int:
    chosen = [fault for fault in FAULTS if not sys.argv[1:] or fault.what in sys.argv[1:]]
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        sound = {tests: passes(copy, tests) for tests in {fault.tests for fault in chosen}}
        for fault in chosen:
            file = copy / fault.file
            text = file.read_text()
            if text.count(fault.before) != 1:
                raise ValueError(f"{fault.what}: {fault.file} has the text not exactly once")
            file.write_text(text.replace(fault.before, fault.after))
            seen = sound[fault.tests] and not passes(copy, fault.tests)
            file.write_text(text)
            survived += not seen
            print(f"{'seen' if seen else 'SURVIVED':<9} {fault.what}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} faults are seen")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
