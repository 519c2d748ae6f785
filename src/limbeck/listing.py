"""What `limbeck methods` and `limbeck new` print and write."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic_core import PydanticUndefined

from limbeck import files
from limbeck.components import import_object
from limbeck.contract import Frozen, Method
from limbeck.errors import InputError, suggestion
from limbeck.kinds import KINDS
from limbeck.methods import catalogue

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_ROOTS = (Path.cwd(), Path(__file__).resolve().parents[2])


def find(name: str) -> type[Method]:
    """A method's class by short name. Raises InputError with a suggestion."""
    known = catalogue()
    if name not in known:
        raise InputError(f"unknown method '{name}'.", fix=suggestion(name, known))
    found = import_object(known[name])
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(f"the entry point '{name}' ({known[name]}) is not a method.", fix="It must name a subclass of limbeck.Method.")
    return found


def state(name: str) -> str:
    """What the committed evidence says of a method; 'no claim run' without any."""
    for root in _ROOTS:
        path = root / "docs" / "evidence" / f"{name}.json"
        if path.is_file():
            try:
                return str(json.loads(path.read_text(encoding="utf-8"))["verdict"])
            except (OSError, ValueError, KeyError, TypeError):
                return "evidence unreadable"
    return "no claim run"


def print_methods() -> None:
    """The table of methods: name, paper, where, what comes out, state."""
    names = sorted(catalogue())
    table = _table("name", names, "paper", "source", "makes", "claim")
    for name in names:
        method = find(name)
        paper = method.paper
        source = f"arXiv {paper.arxiv}, {paper.published}" if paper.arxiv else paper.published
        table.add_row(name, paper.title + (" (partly reconstructed)" if paper.reconstructed else ""), source, method.produces, state(name))
    _console().print(table)


def _console() -> Console:
    """A console that is wide where no terminal says how wide it is, so that `limbeck methods | grep` finds things."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=200)


def _table(key: str, keys: Sequence[str], *columns: str) -> Table:
    """A table whose first column is never cut, the others fold."""
    from rich.table import Table

    table = Table()
    table.add_column(key, no_wrap=True, min_width=max(map(len, (key, *keys))))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def print_method(name: str) -> None:
    """One method: paper, knobs with type, default and meaning, state."""
    method = find(name)
    paper = method.paper
    console = _console()
    console.print(f"[bold]{name}[/bold]: {paper.title}", highlight=False)
    source = (f"arXiv {paper.arxiv}" if paper.arxiv else "", paper.published, paper.official_code)
    console.print(", ".join(x for x in source if x), highlight=False)
    if paper.reconstructed:
        console.print(f"Reconstructed: {paper.reconstructed}", highlight=False)
    console.print(f"Makes {_a(method.produces)}. Claim: {state(name)}.", highlight=False)
    table = _table("knob", list(method.Config.model_fields), "default", "meaning")
    for knob, default, meaning in knobs(method.Config):
        table.add_row(knob, default, meaning)
    console.print(table)


def knobs(config: type[Frozen]) -> Iterator[tuple[str, str, str]]:
    """Name, default as YAML, and meaning of each knob of a configuration."""
    for name, field in config.model_fields.items():
        default: Any = field.get_default(call_default_factory=True)
        shown = "(needed)" if default is PydanticUndefined else _inline(default)
        yield name, shown, field.description or ""


def _a(word: str) -> str:
    """The word with its article."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _inline(value: Any) -> str:
    """A value as YAML in one line; of a section only what differs from its own defaults."""
    plain = value.model_dump(mode="json", exclude_defaults=True) if hasattr(value, "model_dump") else list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=10_000).strip()
    return text.removesuffix("...").strip()


_TEMPLATE = """\
# {title}
# {source}
# Run it:   limbeck distill {file}
# Any field can be overridden:   limbeck distill {file} --set train.epochs=3
name: {name}
seeds: [0, 1, 2]                # every seed is trained and reported; means ± standard errors in the report

method:
  name: {name}
{knobs}
{teacher}student:
  model: {{name: cnn, widths: [8, 16]}}   # or {{target: my_package.models:build, args: {{...}}}}
  # weights: student.safetensors          # start from these
{pretrain}
data:
  source: {{name: digits}}      # digits, fashion_mnist, cifar10, cifar100, image_folder, huggingface, tensors
  validation: 200              # held out of the training data, for methods that choose knobs by it
  # train_size: 1000           # a class-balanced subset
{labelled}
{looks}

train:
  epochs: 20
  batch_size: 64
  optimiser: {{name: sgd, lr: 0.05, momentum: 0.9, weight_decay: 0.0005, schedule: {{name: cosine}}}}
  evaluate_every: 2            # epochs between points of the learning curve
  # precision: bf16            # no, bf16, fp16
  # accumulate: 4              # micro-batches a batch is cut into
  # workers: 2                 # loader processes; the result does not depend on them

compare:
  alone: true                  # also train the same student without a teacher
"""

_GENERATOR = """\
# {title}
# {source}
# Run it:   limbeck distill {file}
# Any field can be overridden:   limbeck distill {file} --set train.steps=300
name: {name}
seeds: [0]

method:
  name: {name}
{knobs}
{network}
data:
  source: {{name: two_moons}}    # two_moons, gaussian_grid, gaussian_ring, checkerboard; images: {{name: fashion_mnist, side: 14, scale: symmetric}}

train:
  steps: 2000
  batch_size: 256
  ema: 0.99                    # of the weights that come out
  optimiser: {{name: adam, lr: 0.0005}}   # sgd, adam, adamw, radam

evaluate:
  samples: 2000                # drawn from every arm and compared with as many real ones
  teacher_steps: [2, 4, 18]    # of the teacher's sampler; the most is its best
"""

_DENOISER_TEACHER = """
teacher:                       # without a 'student:' the student is built as the teacher is
  model: {model}
  method: denoising            # trained here on the data; or give weights: teacher.safetensors
  train: {{steps: 3000, batch_size: 512, ema: 0.99, optimiser: {{name: adam, lr: 0.001}}}}
"""

_DENOISER_STUDENT = """
student:
  model: {model}
"""

_TEACHER = """
teacher:                       # one, or a list (an ensemble)
  model: {name: cnn, widths: [32, 64, 128]}
  seed: 0                      # one teacher for all seeds
  train:                       # trained here; or give weights: teacher.safetensors
    epochs: 20
    batch_size: 64
    optimiser: {name: sgd, lr: 0.05, momentum: 0.9, weight_decay: 0.0005, schedule: {name: cosine}}

"""

_RECORDED = """
teacher:                       # off the disk; the recipe in `make` records it where there is no record yet
  record: records/{name}
  make: {make}

"""

_LABELLED = "  labelled: 100                # only so many training samples keep their label{why}"
_AUGMENT = "  augment: {crop: 1}           # crop (padding), flip, cutout (size), noise (sd), mixup, cutmix (alpha)"
_VIEWS = "  views: {kind: boxes, count: 8, scale: [0.5, 1.0]}  # random resized crops of each sample, the same in the record"

_RECORD = """\
# The teacher behind {file}: run once over every view, kept on disk.
# Run it:   limbeck record {make}
name: {name}
{teacher}data:
  source: {{name: digits}}
  validation: 200
{views}

record:
  codec: {{name: topk, k: 5}}    # full, half, log8, topk, topk8
"""

_PRETRAIN = """\
  train:                       # trained on the labels first: this method starts from a good student
    epochs: 20
    batch_size: 64
    optimiser: {name: sgd, lr: 0.05, momentum: 0.9, weight_decay: 0.0005, schedule: {name: cosine}}
"""


_DATASET = """\
# {title}
# {source}
# Run it:   limbeck distill {file}
# Any field can be overridden:   limbeck distill {file} --set train.steps=50
name: {name}
seeds: [0]

method:
  name: {name}
{knobs}
{teacher}
student:                       # what is trained on the set, and what judges it
  model: {student}

data:
  source: {{name: digits}}       # digits, fashion_mnist, cifar10, cifar100, image_folder, huggingface, tensors
  validation: 200              # held out of the training data, for what is chosen by it
  # whiten: true               # ZCA (colour images)

train:                         # of what is learned
{train}

evaluate:
  networks: 5                  # fresh ones, trained on the set and tested after their last epoch
{judged}
"""

_SEARCHED = "  search_rate: true            # the real images choose theirs, since the set learns its own"
_ARCHITECTURES = "  architectures: [{name: mlp, hidden: [64]}]   # others that are trained on the set"
_FULL = "  full_training: {epochs: 20, batch_size: 64}  # on all real data"
_BASELINES = "  baselines: [random, kmeans, full]            # real images: as many, drawn or nearest to centres; and all"
_HARD = f"  training: {{epochs: 300}}      # of a network on the set\n{_FULL}\n{_BASELINES}\n{_ARCHITECTURES}"
_CONVNET = "{name: convnet, depth: 2, width: 32, padding: 1}"
_EXPERTS = """
teacher:
  experts:                     # students trained on the real data, their weights kept after every epoch
    count: {count}
    epochs: {epochs}
    batch_size: 64
    lr: {lr}
    augment: null              # {{}}: all of DSA, as `method.augment`
{more}
  # folder: experts            # where they lie, to be shared by runs; else in the run's folder
"""
_FLAT = "    sharpness: {mode: gsam, rho: 0.01}         # towards flat minima"
_SMOOTH = """\
    momentum: 0.9
    weight_decay: 0.001
    loss_scale: {start: 0.5, step: 0.05}       # slow at first
    gradient_penalty: {weight: 2.0}            # smooth; about three times the time"""
_IMAGES = """\
  steps: {steps}
  batch_size: 1                # no real images are drawn
  optimiser: {{name: sgd, lr: {lr}, momentum: 0.5}}   # the gradients are small, the rates large"""
_WITH_NORM = """
teacher:                       # one, or a list: networks with batch norm
  model: {name: convnet, widths: [32, 32], norm: batch, padding: 1}
  train: {epochs: 20, batch_size: 64, optimiser: {name: adam, lr: 0.003, schedule: {name: cosine}}}
"""
_ENCODER = """
teacher:                       # any network that gives vectors, trained here or with weights
  model: {name: convnet, widths: [32, 64], norm: batch, padding: 1, num_classes: 64}   # 64 numbers a vector
  method: {name: barlow_twins, representation: outputs, projector: [], off_diagonal: 0.3, views: {crop: 1, cutout: 2}}
  train: {epochs: 30, batch_size: 128, drop_last: true, optimiser: {name: adam, lr: 0.002, schedule: {name: cosine}}}
"""
_TRANSFER = """\
  transfer:                    # pre-trained on the pairs, then tuned to a few labels
    labels_per_class: 10
    pretraining: {epochs: 300}
    fine_tuning: {steps: 200, augment: {crop: 1}}
  baselines: [random]          # real images with the teacher's vectors; and no pre-training
  # tasks: {other: {source: {name: digits}}}   # labelled data that it goes on to; else the run's own"""


_LANGUAGE = """\
# {title}
# {source}
# Run it:   limbeck distill {file}
# Any field can be overridden:   limbeck distill {file} --set train.steps=1000
name: {name}
seeds: [0]

method:
  name: {name}
{knobs}
{teacher}
student:
  model: {{name: decoder, layers: 2, width: 48, heads: 2}}   # decoder, causal_lm (a folder), smollm2 (layers: 15, keep: even)

data:
  source: {{name: python_manual, tokenizer: {tokenizer}, length: 64}}   # novels, text_file, prompts; tokenizers: bytes, characters, smollm2, a folder
  validation: 60               # rows held out of the training text

train:
  steps: 300
  batch_size: 16               # rows
  clip_norm: 1.0
  optimiser: {{name: adamw, lr: 0.002, schedule: {{name: cosine, warmup: 0.05}}}}
  # precision: bf16            # no, bf16, fp16

compare:
  alone: true                  # the same student on the text alone

evaluate:
  batch_size: 16
"""
_LANGUAGE_TEACHER = """
teacher:                       # one, or a list: the mean of their probabilities; or {{record: records/…, make: …}}
  model: {{name: decoder, layers: 3, width: 96, heads: 3}}
  train: {{steps: 600, batch_size: 16, clip_norm: 1.0, optimiser: {{name: adamw, lr: 0.003, schedule: {{name: cosine, warmup: 0.05}}}}}}
{data}"""
_FOREIGN_TEXT = "  data: {source: {name: python_manual, tokenizer: bytes, length: 64}}   # the same text in the teacher's own tokens\n"
_TEXT_CLASSIFIER = """\
# {title}
# {source}
# Run it:   limbeck distill {file}
# Any field can be overridden:   limbeck distill {file} --set train.epochs=3
name: {name}
seeds: [0, 1, 2]

method:
  name: {name}
{knobs}

teacher:                       # encoders: text_transformer, minilm (a package), encoder (a folder)
  model: {{name: text_transformer, layers: 4, width: 64, heads: 4}}
  train: {{epochs: 6, batch_size: 32, optimiser: {{name: adamw, lr: 0.001, schedule: {{name: cosine, warmup: 0.1}}}}}}

student:
  model: {{name: text_transformer, layers: 2, width: 32, heads: 2}}

data:
  source: {{name: python_manual_topics, length: 32}}   # text_classification: banking77, sst2, agnews, a parquet file of your own
  validation: 100

train:
  epochs: 6
  batch_size: 32
  drop_last: true
  optimiser: {{name: adamw, lr: 0.001, schedule: {{name: cosine, warmup: 0.1}}}}

compare:
  alone: true                  # also train the same student without a teacher
"""


@dataclasses.dataclass(frozen=True)
class _Example:
    """What `limbeck new` writes for a method that makes data sets: knobs that suit digits and a minute or two, and YAML for the sections."""

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    teacher: str = ""
    student: str = _CONVNET
    train: str = _IMAGES.format(steps=300, lr=10)
    judged: str = f"{_SEARCHED}\n{_HARD}"


_NETWORK_WITH_NORM = "{name: convnet, widths: [16, 32], norm: batch, padding: 1}"
_DATASETS = {
    "ftd": _Example(
        {"steps": 20, "latest_start": 5, "augment": None, "step_size": 0.02, "step_size_optimiser": {"lr": 1e-4, "momentum": 0.5}, "image_ema": 0.98},
        _EXPERTS.format(count=10, epochs=6, lr=0.05, more=_FLAT),
    ),
    "ast": _Example(
        {"steps": 9, "expert_epochs": 3, "latest_start": 8, "step_size": 0.03, "augment": None},
        _EXPERTS.format(count=6, epochs=12, lr=0.02, more=_SMOOTH),
        train=_IMAGES.format(steps=100, lr=1),
    ),
    "real_images": _Example(train="  steps: 1                     # nothing is learned", judged=_HARD),
    "krr_st": _Example(
        {"images": 50, "networks": 4, "life": 100},
        _ENCODER,
        _NETWORK_WITH_NORM,
        "  steps: 300\n  batch_size: 256\n  optimiser: {name: adamw, lr: 0.001, schedule: {name: linear, final: 0.001}}",
        _TRANSFER,
    ),
    "infer": _Example(
        {"shift": 1},
        _WITH_NORM,
        _NETWORK_WITH_NORM,
        "  steps: 100\n  batch_size: 1                # no other images are drawn",
        f"  # training:                # as the method says: AdamW, mixup, static soft labels at a high temperature\n{_FULL}\n{_BASELINES}\n{_ARCHITECTURES}",
    ),
}
"""By method. Third parties' get the defaults of `_Example`, and experts where they need them."""


def write_recipe(name: str, output: Path | None) -> Path:
    """Write a commented recipe that runs as it is.

    Raises:
        InputError: the method is unknown, it makes what no run makes alone, or the file exists.
    """
    method = find(name)
    if method.produces not in KINDS:
        users = sorted(other for other, example in _DATASETS.items() if f"name: {name}," in example.teacher)
        fix = f"`limbeck new {users[0]}` writes a recipe whose teacher it trains." if users else "Give it as the 'method' of a teacher."
        raise InputError(f"'{name}' makes {_a(method.produces)}, which no run makes alone.", fix=fix)
    path = output if output is not None else Path(f"{name}.yaml")
    if path.exists():
        raise InputError("the file exists already.", where=str(path), fix="Give another name with --output.")
    if not path.parent.is_dir():
        raise InputError("there is no such folder.", where=str(path.parent))
    lines, example = [], _DATASETS.get(name, _Example())
    for knob, default, meaning in knobs(method.Config):
        setting = f"  # {knob}: {default}"
        if knob in example.settings:
            setting, meaning = f"  {knob}: {_inline(example.settings[knob])}", f"(default: {default}) {meaning}"
        lines.append(f"{setting:31} # {' '.join(meaning.split())}" if meaning else setting)
    paper = method.paper
    made = path.with_name(f"{path.stem}_record.yaml")
    if method.needs_record and made.exists():
        raise InputError("the file exists already.", where=str(made), fix="Give another name with --output.")
    has_teacher = method.needs_teacher or "teacher" in vars(method).get("__annotations__", {})  # in some modes it needs one
    source = f"arXiv {paper.arxiv}, {paper.published}" if paper.arxiv else paper.published
    if method.produces == "generator":
        network = (_DENOISER_TEACHER if has_teacher else _DENOISER_STUDENT).format(model=method.example_model)
        text = _GENERATOR.format(
            title=paper.title, source=source, file=path, name=name, knobs="\n".join(lines), network=network
        )  # fmt: skip
        files.write_atomic(path, text)
        return path
    if method.produces == "dataset":
        shown = example.teacher or (_EXPERTS.format(count=10, epochs=22, lr=0.01, more="") if method.needs_experts else _TEACHER if has_teacher else "")
        text = _DATASET.format(
            title=paper.title, source=source, file=path, name=name, knobs="\n".join(lines), teacher=shown,
            student=example.student, train=example.train, judged=example.judged,
        )  # fmt: skip
        files.write_atomic(path, text)
        return path
    if method.produces == "language_model":
        foreign = method.foreign_teacher
        shown = _LANGUAGE_TEACHER.format(data=_FOREIGN_TEXT if foreign else "") if has_teacher else ""
        text = _LANGUAGE.format(
            title=paper.title, source=source, file=path, name=name, knobs="\n".join(lines), teacher=shown, tokenizer="characters" if foreign else "bytes"
        )  # fmt: skip
        files.write_atomic(path, text)
        return path
    if method.reads_text:
        files.write_atomic(path, _TEXT_CLASSIFIER.format(title=paper.title, source=source, file=path, name=name, knobs="\n".join(lines)))
        return path
    teacher = _RECORDED.format(name=name, make=made) if method.needs_record else _TEACHER if has_teacher else ""
    labelled = _LABELLED.format(why="; the others are chosen among" if method.needs_unlabelled else "")
    text = _TEMPLATE.format(
        title=paper.title,
        source=source,
        file=path,
        name=name,
        knobs="\n".join(lines),
        teacher=teacher,
        labelled=labelled if method.needs_unlabelled else labelled.replace("  labelled", "  # labelled").replace("100   ", "100 "),
        looks=_VIEWS if method.needs_record else _AUGMENT,
        pretrain=_PRETRAIN if method.starts_trained else "",
    )
    if method.needs_record:
        files.write_atomic(made, _RECORD.format(file=path, make=made, name=name, teacher=_TEACHER, views=_VIEWS))
    files.write_atomic(path, text)
    return path


__all__ = ["find", "knobs", "print_method", "print_methods", "state", "write_recipe"]
