"""What may be set: profiles and the parameters of each notebook; unknown keys are refused.

``params/<profile>.yaml`` has a section ``common`` (:class:`Settings`: data, models, training) and
one per notebook that overrides the values in its ``parameters`` cell; ``second-domain`` changes
``common`` for the second data set. A profile may be based on another.
``run_all.py`` writes what it was asked for into ``runs/<name>/config.yaml``: a profile with all
that its command line changed. Wherever a profile is named, such a file's path may stand.
"""

import ast
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import pydantic
import yaml
from pydantic import AfterValidator, BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError

from sdaug_utils.errors import InputError
from sdaug_utils.registry import experiments, techniques

SECOND = "second-domain"
PARAMS_FOLDER = Path(__file__).parents[1] / "params"


def known_technique(name: str, suits: Callable[[Any], bool] = lambda one: True) -> str:
    """Check that a technique of this name is registered and that ``suits(technique)`` is true."""
    names = [known for known, one in techniques().items() if suits(one)]
    if name not in names:
        listed = ", ".join(map(repr, names))
        raise PydanticCustomError("technique", "Input should be {names}", {"names": listed})
    return name


TechniqueName = Annotated[str, AfterValidator(known_technique)]
Attribute = Literal["dark", "bright", "plain", "patterned", "small", "large"]
Augmentation = Literal["none", "custom", "autoaugment", "randaugment", "mixup", "cutmix"]
Rule = Literal["chance", "confidence", "agreement", "nearness", "diversity", "distribution"]
Protocol = Literal["published", "controlled"]  # runs may also be on "pixels"
Domain = Literal["main", "second"]
Scheduler = Literal["default", "dpmsolver++", "dpmsolver++-karras", "unipc"]
Percent = Annotated[float, Field(gt=0, le=100)]
Count = Annotated[int, Field(ge=1)]


class Parameters(BaseModel):
    """A model that refuses unknown keys, and lists in which a value comes twice."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _without_duplicates(cls, value: Any) -> Any:
        for values in value.values() if isinstance(value, dict) else [value]:
            if isinstance(values, list) and len(set(map(str, values))) < len(values):
                raise ValueError("a value comes twice")
        return value


class Sampling(Parameters):
    """How images are drawn from the text-to-image model (thesis, section 4.2.3)."""

    prompt: str = Field(pattern=r"\{\}")
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=1)
    scheduler: Scheduler
    resolution: int = Field(ge=8)
    batch_size: int = Field(ge=1)
    max_attempts: int = Field(default=100, ge=1)  # at an image that is rejected
    safety_checker: bool  # used where the model has one


class Controlled(Parameters):
    """Training with the confounds removed: equal updates, best validation weights."""

    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    max_train_steps: int = Field(ge=1)
    validation_steps: int = Field(ge=1)
    min_views: int = Field(ge=1)  # per real image, if images are augmented
    min_synthetic_views: int = Field(ge=1)  # per synthetic image
    num_augmented: int = Field(ge=1)  # views of all images together, at least

    def num_views(self, num_images: int, synthetic: bool = False) -> int:
        """Augmented views per real (or synthetic) image, in a training set of ``num_images``."""
        fewest = self.min_synthetic_views if synthetic else self.min_views
        return max(fewest, -(-self.num_augmented // num_images))


class Published(Parameters):
    """Training as in the thesis's code, quirks included."""

    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    max_epochs: int = Field(ge=1)
    patience: int = Field(ge=1)  # epochs
    passes_per_epoch: int = Field(ge=1)  # over the training images; one in the thesis
    image_size: int = Field(ge=32)

    def max_updates(self, num_images: int) -> int:
        """How many updates there are at most with so many training images."""
        return self.max_epochs * self.passes_per_epoch * -(-num_images // self.batch_size)


class Classifier(Parameters):
    """A frozen backbone with a new linear head (thesis, section 4.2.2)."""

    backbone: Literal["efficientnet-lite0", "resnet34"]
    image_size: int = Field(ge=32)
    controlled: Controlled
    published: Published


class Segmenter(Parameters):
    """A DeepLabV3 head on the frozen backbone (thesis, section 4.2.2)."""

    backbone: Literal["efficientnet-lite0", "deeplabv3-resnet101"]
    keep_features: bool  # in memory: for small images only
    image_size: int = Field(ge=32)
    label_size: int = Field(ge=8)  # trimaps are compared at this size
    output_stride: Literal[8, 16]
    stage: int = Field(ge=1, le=4)  # of EfficientNet, whose maps are used; ignored for DeepLabV3
    channels: int = Field(ge=8)
    atrous_rates: list[Count] = Field(min_length=1)
    dropout: float = Field(ge=0, lt=1)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(ge=2)  # the pooling branch's BatchNorm needs two values
    max_train_steps: int = Field(ge=1)  # of the controlled protocol
    validation_steps: int = Field(ge=1)
    max_epochs: int = Field(ge=1)  # of the published one
    patience: int = Field(ge=1)


class Data(Parameters):
    """A data set, all of it or a part; photographs come from a folder, or are downloaded to it."""

    name: Literal["fashion-mnist", "digits", "oxford-iiit-pet", "food-101", "imagefolder"]
    classes: list[str] | None = Field(min_length=2)  # None: all
    max_images_per_class: dict[str, Count] | None  # by split; None: all
    folder: str | None = None
    download: bool = False

    @pydantic.model_validator(mode="after")
    def _photographs_have_a_folder(self) -> "Data":
        if (self.folder is None) != (self.name in ("fashion-mnist", "digits")):
            raise ValueError("folder: needed for data sets of photographs, and for them alone")
        return self


class Settings(Parameters):
    """Section ``common`` of a profile: what all notebooks share, and a section per technique."""

    data: dict[Domain, Data]
    foundation: str
    device: Literal["auto", "cpu", "cuda", "mps"]
    precision: Literal["auto", "float32", "float16", "bfloat16"]
    attention: Literal["auto", "sdpa", "xformers"]  # auto: PyTorch's own, sdpa
    compile: bool = False  # U-Net and ControlNet, by torch.compile; images differ by rounding
    training_precision: Literal["float32", "mixed"] = "float32"  # of personalisation
    treatment: str = ""  # how it deviates from the thesis: a column of every table
    cluster: dict[str, Any] = {}  # of a queue's jobs: what dask-jobqueue's classes take
    sampling: Sampling
    classifier: Classifier
    segmenter: Segmenter

    if TYPE_CHECKING:  # techniques' sections, known by registration

        def __getattr__(self, name: str) -> Any: ...

    @field_validator("data")
    @classmethod
    def _with_both_domains(cls, value: dict[str, Data]) -> dict[str, Data]:
        if set(value) != {"main", "second"}:
            raise ValueError("needs both 'main' and 'second'")
        return value


class Invocation(Parameters):
    """Section ``run`` of a ``config.yaml``: what a command line asks for besides parameters."""

    name: str  # of the folders in runs, figures and results
    from_results: bool = False  # shipped runs are read, nothing is made


def parse_parameter(key: str, text: str) -> tuple[list[str], Any]:
    """Parse ``-p SECTION.KEY VALUE`` into the path of the key and its value, which is YAML.

    A notebook's section may be named by its number. Raises InputError.
    """
    section, *path = key.split(".")
    named = [name for name in experiments() if section in (name, name[:2])]
    if not path or not (named or section == "common"):
        known = ", ".join(["common", *(name[:2] for name in experiments())])
        raise InputError(f"-p {key}: write SECTION.KEY; sections are {known}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"-p {key}: not YAML: {' '.join(str(error).split())}") from error
    return [*(named or ["common"]), *path], value


def configure(
    profile: str,
    changes: Sequence[tuple[list[str], Any]] = (),
    protocol: Protocol | None = None,
    dataset: Path | None = None,
    from_results: bool = False,
) -> dict[str, Any]:
    """The content of a ``config.yaml``: a profile with a command line's changes, checked.

    Raises InputError for an unknown profile and for an unknown, missing or ill-typed key.

    Args:
        changes: paths of keys and values, as :func:`parse_parameter` gives them.
        dataset: a folder of class folders that takes the place of the main data set.
    """
    sections, name = read_profile(profile), invocation_of(profile).name
    sections.pop("run", None)
    for (section, *keys), value in changes:
        _put(sections.setdefault(section, {}), keys, value)
    if protocol:
        name += f"-{protocol}"
        for notebook, experiment in experiments().items():
            if "protocol" in experiment.model_fields:
                sections.setdefault(notebook, {})["protocol"] = protocol
    if dataset:
        name += f"-{dataset.name}"
        own = {"name": "imagefolder", "folder": str(dataset), "classes": None}
        _put(sections, ["common", "data", "main"], {**own, "max_images_per_class": None})
    if dataset or changes:  # a hash, since different folders or values would give the same name
        asked = json.dumps([str(dataset), changes]).encode()
        name += f"-{hashlib.sha256(asked).hexdigest()[:8]}"
    for domain in get_args(Domain):
        _settings_of(sections, domain, str(_file(profile)))
    return {"run": {"name": name, "from_results": from_results}, **sections}


def invocation_of(profile: str) -> Invocation:
    """Section ``run`` of a ``config.yaml``; for a plain profile, only its name."""
    if not _is_file(profile):
        return Invocation(name=profile)
    given = read_profile(profile).get("run", {})
    return _checked(Invocation, {"name": Path(profile).stem, **given}, f"{profile}: run")


def _is_file(profile: str) -> bool:
    return profile.endswith(".yaml")


def _file(profile: str) -> Path:
    return Path(profile) if _is_file(profile) else PARAMS_FOLDER / f"{profile}.yaml"


def read_profile(profile: str, heirs: tuple[str, ...] = ()) -> dict[str, Any]:
    """The sections of a profile, unchecked but for their names, for which InputError is raised.

    A profile with a ``base`` inherits all values of that profile that it does not set itself.

    Args:
        profile: its name, or the path of a ``config.yaml`` that was made of one.
        heirs: profiles that inherit from this one, to detect a cycle.
    """
    path = _file(profile)
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in PARAMS_FOLDER.glob("*.yaml")))
        raise InputError(f"profile '{profile}' is unknown: choose from {known}")
    if profile in heirs:
        raise InputError(f"{path}: base: '{profile}' is based on itself")
    try:
        sections = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    base = sections.pop("base", None) if isinstance(sections, dict) else None
    valid = ["common", SECOND, *experiments(), *(["run"] if _is_file(profile) else [])]
    if not isinstance(sections, dict) or not (base or "common" in sections):
        raise InputError(f"{path}: needs a section 'common' and may have others of {valid[1:]}")
    for name, section in sections.items():
        if name not in valid:
            raise InputError(f"{path}: section '{name}' is unknown: choose from {valid}")
        if not isinstance(section, dict):
            raise InputError(f"{path}: section '{name}': must be a mapping of 'key: value'")
    return _merged(read_profile(base, (*heirs, profile)), sections) if base else sections


def load_settings(profile: str, domain: Domain = "main") -> Settings:
    """The section ``common`` of a profile, changed for the second domain by ``second-domain``.

    Raises InputError for an unknown profile and for an unknown, missing or ill-typed key.
    """
    return _settings_of(read_profile(profile), domain, str(_file(profile)))


def _settings_of(sections: dict[str, Any], domain: Domain, where: str) -> Settings:
    values = sections["common"]
    if domain == "second":
        values = _merged(values, sections.get(SECOND, {}))
    return _checked(_settings_class(), values, where)


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """Settings with other values, whose keys are as in ``classifier.controlled.learning_rate``.

    Raises InputError for an unknown key and for an ill-typed value.
    """
    values = settings.model_dump()
    for path, value in changes.items():
        _put(values, path.split("."), value)
    return _checked(type(settings), values, ", ".join(changes))


def _put(values: dict[str, Any], keys: list[str], value: Any) -> None:
    """Put a value in the place that keys lead to, whatever is there."""
    *path, last = keys
    for key in path:
        if not isinstance(values.get(key), dict):
            values[key] = {}
        values = values[key]
    values[last] = value


def _merged(values: Any, changes: Any) -> Any:
    if not (isinstance(values, dict) and isinstance(changes, dict)):
        return changes
    return values | {key: _merged(values.get(key), change) for key, change in changes.items()}


@cache
def _settings_class() -> type[Settings]:
    """:class:`Settings` and a section per technique, which needs no values that have defaults."""
    sections: dict[str, Any] = {}
    for technique in techniques().values():
        if technique.section:
            name, model = technique.section
            required = any(field.is_required() for field in model.model_fields.values())
            sections[name] = (model, ... if required else model())
    return pydantic.create_model("Settings", __base__=Settings, **sections)


def notebook_section(profile: str, notebook: str) -> dict[str, Any]:
    """A profile's section for a notebook."""
    return read_profile(profile).get(notebook, {})


def parameters_cell(path: Path) -> dict[str, Any]:
    """The values that a notebook's cell tagged ``parameters`` assigns, without running it.

    Raises InputError if there is no such cell or it holds more than plain assignments.
    """
    for cell in json.loads(path.read_text())["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            try:
                source: list[Any] = ast.parse("".join(cell["source"])).body
                return {line.targets[0].id: ast.literal_eval(line.value) for line in source}
            except (AttributeError, SyntaxError, ValueError) as error:
                message = f"{path}: parameters cell: only 'name = value': {error}"
                raise InputError(message) from error
    raise InputError(f"{path}: no cell is tagged 'parameters'")


def check_notebook(notebook: str, values: dict[str, Any]) -> Any:
    """The experiment that a notebook's ``parameters`` cell describes, if valid."""
    return _checked(experiments()[notebook], values, f"notebooks/{notebook}.ipynb")


def from_notebook(notebook: str, namespace: dict[str, Any]) -> Any:
    """Collect and check the parameters that a notebook has set, given its ``globals()``.

    Every name that the ``parameters`` cell or papermill's cell assigns is checked, so that a
    mistyped name is an error. Only the last execution of each cell counts.
    """
    parameters: set[str] = set()
    injected: set[str] = set()
    for source in namespace.get("In", []):
        names = set(_assigned(source))
        if source.startswith("# Parameters\n"):  # papermill's own mark
            injected = names
        elif "profile" in names:  # every parameters cell sets it, no other does
            parameters, injected = names, set()
    known = experiments()[notebook].model_fields
    chosen = parameters | injected | (known.keys() & namespace.keys())
    return check_notebook(notebook, {name: namespace.get(name) for name in chosen})


def _assigned(source: str) -> Iterator[str]:
    """The names that a cell assigns at its top level; none if it holds more than Python."""
    try:
        lines = ast.parse(source).body
    except SyntaxError:
        return
    for line in lines:
        if isinstance(line, ast.Assign):
            yield from (target.id for target in line.targets if isinstance(target, ast.Name))
        elif isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id


def _checked(model: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    try:
        return model.model_validate(values)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        location, message = [str(part) for part in first["loc"]], first["msg"]
        if first["type"] == "extra_forbidden":
            kind: Any = model  # ... whose key it is: follow the path to it
            for part in location[:-1]:
                by_name = get_args(kind)  # of a dictionary: the key's type and the value's
                kind = by_name[1] if by_name else kind.model_fields[part].annotation
            message = f"unknown; valid keys are {', '.join(kind.model_fields)}"
        raise InputError(f"{where}: {'.'.join(location)}: {message}") from error
