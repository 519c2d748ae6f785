"""Language models: perplexity on held-out text, and how close the student's next-token distributions are to the teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from limbeck.contract import Data, Method
from limbeck.data import AugmentSpec, root
from limbeck.errors import InputError
from limbeck.evaluate.language import LanguageMetrics, evaluate_language
from limbeck.evaluate.predict import device_of
from limbeck.ingredients import Prepared
from limbeck.kinds.base import Kind, Measured
from limbeck.language.models import LanguageModel
from limbeck.language.sources import ModelSource
from limbeck.methods.language.next_token import NextToken
from limbeck.modes import evaluating
from limbeck.report.summary import Outcome
from limbeck.teachers.recorded import TokenRecordTeacher
from limbeck.train import TrainConfig, Trained

HEADLINE = ("perplexity", "bits_per_byte", "next_token_accuracy", "kl_to_teacher", "kl_to_teacher_kept", "agreement", "acceptance", "ece")
KEYS = {"accuracy": "next_token_accuracy"}
"""Names of `LanguageMetrics` that are other measures' names in reports."""


class LanguageModelKind(Kind):
    """Perplexity, bits a byte, KL to the teacher, agreement, acceptance, calibration. The reference is what answers for the teacher; None without one."""

    name = "language_model"
    trains_alone = True
    most_repeats: ClassVar[int | None] = 9
    labels = {"teacher": "teacher", "alone": "student on the text alone", "distilled": "student distilled", "live": "student distilled live"}  # noqa: RUF012

    def __init__(self, method: Method, evaluate: Any) -> None:
        super().__init__(method, evaluate)
        self._teachers: dict[int, Outcome] = {}

    def plain(self) -> Method:
        """The next token."""
        return NextToken()

    def headline(self, prepared: Prepared) -> tuple[str, ...]:
        """Perplexity first."""
        return HEADLINE

    def check(self, prepared: Prepared, train: TrainConfig, augment: AugmentSpec) -> None:
        """The data must be tokens, and stay what they are."""
        self._measurable(prepared)
        if augment != AugmentSpec():
            raise InputError("tokens are not augmented.", where="data.augment", fix="Leave it out.")

    def _measurable(self, prepared: Prepared) -> None:
        for data in (prepared.train, prepared.test):
            if getattr(root(data), "vocabulary", None) is None:
                raise InputError("a language model is made of text, and these data are no tokens.", where="data.source", fix="Use novels or text_file, say.")

    def fits(self, module: nn.Module, example: Tensor, prepared: Prepared, where: str) -> None:
        """A language model of the data's vocabulary that takes rows of their length."""
        if not isinstance(module, LanguageModel):
            raise InputError(
                f"the {where.split('.')[0]} is {type(module).__name__}, no language model.", where=f"{where}.model", fix="Use decoder or causal_lm, say."
            )
        if module.vocabulary < prepared.num_classes:
            raise InputError(
                f"it knows {module.vocabulary:,} tokens, the data's tokenizer has {prepared.num_classes:,}.",
                where=f"{where}.model",
                fix="Use the model's own tokenizer in data.source, or the method cross_tokenizer.",
            )
        try:
            with torch.no_grad(), evaluating(module):
                out = module(example[:1, :, :8].to(device_of(module)))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputError(f"it cannot take rows of tokens: {str(error).splitlines()[0]}", where=f"{where}.model") from error
        if out.dim() != 3:
            raise InputError(f"it gives {list(out.shape)}, not logits for every position.", where=f"{where}.model")

    def asked(self, teacher: Any) -> nn.Module:
        """The first network of several."""
        return teacher.models[0] if isinstance(teacher, ModelSource) else teacher

    def teacher(self, members: Sequence[nn.Module]) -> ModelSource:
        """One network, or several whose probabilities are averaged."""
        return ModelSource(members)

    def reference(self, teacher: Any, prepared: Prepared, place: Path | None) -> Any:
        """What answers for the teacher on the test text: networks, or a record that holds the test text; None where nothing does."""
        if isinstance(teacher, TokenRecordTeacher):
            return teacher.of_test(prepared.test)
        return teacher

    def measured(self, module: LanguageModel, data: Data, reference: Any = None) -> LanguageMetrics:
        """The numbers of one network on a text."""
        return evaluate_language(module, data, reference, batch_size=self.evaluate.batch_size)

    def curve(self, method: Method, data: Data) -> dict[str, float]:
        """The loss a token."""
        found = self.measured(_model(method.inference()), data)
        return {name: value for name, value in (("nll", found.nll), ("perplexity", found.perplexity)) if value is not None}

    def outcome(self, seed: int, module: nn.Module, prepared: Prepared, reference: Any) -> Outcome:
        """On the test text."""
        return _outcome(seed, self.measured(_model(module), prepared.test, reference))

    def trained(self, outcome: Outcome, trained: Trained, prepared: Prepared) -> Outcome:
        """Tokens a second of the training."""
        tokens = trained.samples * prepared.input_shape[-1]
        speed = tokens / trained.seconds if trained.seconds > 0 else None
        return replace(outcome, measures={**outcome.measures, "training_tokens": tokens, "training_tokens_per_second": speed})

    def teacher_arms(self, seed: int, teacher: Any, student: nn.Module, prepared: Prepared, reference: Any) -> list[Measured]:
        """The first member's own numbers, measured once a teacher; of a record there are none."""
        source = teacher if isinstance(teacher, ModelSource) else reference
        if not isinstance(source, ModelSource) or len(source.models) != 1:
            return []
        if id(source) not in self._teachers:
            found = _outcome(seed, self.measured(source.models[0], prepared.test))
            itself = {"kl_to_teacher": 0.0, "agreement": 1.0, "acceptance": 1.0}
            self._teachers = {id(source): replace(found, measures={**found.measures, **itself})}
        return [Measured("teacher", self.labels["teacher"], replace(self._teachers[id(source)], seed=seed))]

    def timed(self, role: str, module: Any) -> nn.Module | None:
        """The network itself."""
        return module if isinstance(module, LanguageModel | ModelSource) else None

    def example(self, prepared: Prepared) -> Tensor:
        """One row of the test text: what is timed is a forward pass over it."""
        return prepared.test.prepare(prepared.test.fetch(torch.zeros(1, dtype=torch.int64))[0])

    def metrics(self, outcome: Outcome) -> dict[str, float]:
        """Those that are known."""
        return {name: float(value) for name, value in outcome.measures.items() if value is not None and math.isfinite(value)}

    def evaluated(self, module: nn.Module, prepared: Prepared) -> dict[str, float]:
        """On the test text, without a teacher."""
        self._measurable(prepared)
        self.fits(module, self.example(prepared), prepared, "student")
        return self.metrics(_outcome(0, self.measured(_model(module), prepared.test)))


def _model(module: nn.Module) -> LanguageModel:
    assert isinstance(module, LanguageModel)
    return module


def _outcome(seed: int, found: LanguageMetrics) -> Outcome:
    """Metrics as measures of a report."""
    names = ("nll", "perplexity", "bits_per_byte", "accuracy", "ece", "kl_to_teacher", "kl_to_teacher_kept", "agreement", "acceptance")
    measures = {KEYS.get(name, name): getattr(found, name) for name in names}
    return Outcome(seed=seed, bins=found.bins, measures={name: value for name, value in measures.items() if value is not None})
