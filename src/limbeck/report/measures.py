"""What the numbers of runs of generators, data sets and language models mean: name, unit, direction, and an explanation for the reader of a report."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Direction = Literal["lower", "higher", "none"]
Unit = Literal["number", "percent", "seconds", "whole", "bytes"]
ARROWS = {"lower": "\u00a0↓", "higher": "\u00a0↑", "none": ""}


@dataclass(frozen=True)
class Measure:
    """One measure: its key in `Outcome.measures`, its name in tables, which way is better, how it is written, what it is in a sentence.

    digits: significant digits, of a percentage those after the point. factor: what a value is multiplied by before it is shown (the label says so).
    explanation: "" where nothing is known of the measure.
    """

    key: str
    label: str
    better: Direction
    explanation: str = ""
    unit: Unit = "number"
    digits: int = 3
    factor: float = 1.0

    @property
    def heading(self) -> str:
        """The name with an arrow towards the better values."""
        return self.label + ARROWS[self.better]

    @property
    def name(self) -> str:
        """The name inside a sentence: a capital that begins an abbreviation stays."""
        return self.label if self.label[1:2].isupper() else self.label[:1].lower() + self.label[1:]

    def improvement(self, difference: float) -> float:
        """What a difference (mine − other's) is worth: positive where mine is better, 0 where neither direction is."""
        return {"lower": -difference, "higher": difference, "none": 0.0}[self.better]


CALLS, SECONDS = "calls", "seconds_per_sample"
MEASURES = {
    measure.key: measure
    for measure in (
        Measure("fid", "FID", "lower", "Fréchet distance between the Gaussians fitted to features of generated and of real images; 0: the same."),
        Measure("kid", "KID (×10³)", "lower", "Squared maximum mean discrepancy of image features, cubic kernel, unbiased; around 0: the same.", factor=1000),
        Measure("mmd2", "MMD² (×10³)", "lower", "Squared maximum mean discrepancy of generated and real samples, unbiased; around 0: the same.", factor=1000),
        Measure("sliced_wasserstein", "Sliced Wasserstein distance", "lower", "Wasserstein distance between projections on lines, over random lines."),
        Measure("energy_distance", "Energy distance", "lower", "2 E|x − y| − E|x − x′| − E|y − y′| of generated and real samples; 0: the same."),
        Measure("precision", "Precision", "higher", "Share of the generated samples that lie in a neighbourhood of a real one.", "percent", 1),
        Measure("recall", "Recall", "higher", "Share of the real samples that lie in a neighbourhood of a generated one.", "percent", 1),
        Measure("density", "Density", "higher", "In how many neighbourhoods of real samples a generated one lies, over what is expected; about 1: the same."),
        Measure("coverage", "Coverage", "higher", "Share of the real samples that have a generated one in their neighbourhood.", "percent", 1),
        Measure("modes_covered", "Modes covered", "higher", "Components of the mixture behind the data that hold a fifth of their due or more.", "whole"),
        Measure("outliers", "Outliers", "lower", "Share of the generated samples more than 4 standard deviations from every component.", "percent", 2),
        Measure("frequency_tv", "Error of mode frequencies", "lower", "Half the sum of the differences to the components’ weights; 0: the same, 1: apart."),
        Measure("histogram_l1", "Histogram distance", "lower", "Sum of the differences of both histograms’ shares; 0: the same, 2: apart."),
        Measure("paired_rmse", "RMSE to the teacher", "lower", "Root mean square difference to what the teacher makes of the same noise."),
        Measure("accuracy", "Accuracy", "higher", "Of fresh networks trained on the set, at their last epoch, on the test data; the mean.", "percent", 1),
        Measure("accuracy_std", "Spread of networks", "lower", "Standard deviation of the accuracy over the fresh networks.", "percent", 1),
        Measure("accuracy_low", "Accuracy, lower end", "higher", "Of the 95 % interval of the mean over networks (Student’s t).", "percent", 1),
        Measure("accuracy_high", "Accuracy, upper end", "higher", "Of the same interval.", "percent", 1),
        Measure(
            "bytes",
            "Bytes",
            "lower",
            "Images and shared patterns as float32, labels and step size; without preprocessing and teachers.",
            "bytes",
        ),
        Measure("compression", "Share of the real data", "lower", "Bytes over those of the real training images as float32.", "percent", 2),
        Measure("images_per_class", "Images a class", "lower", "Stored images and shared patterns over classes.", "number", 3),
        Measure("improvement_over_random", "Gain over random images", "higher", "Accuracy minus that of as many random real images.", "percent", 1),
        Measure("hard_label_recovery", "Gap to all real data", "lower", "Accuracy on all real data minus that on the set with hard labels.", "percent", 1),
        Measure("label_robust_score", "Label-robust score (×100)", "higher", "DD-Ranking’s; 26.9: no better than random, no gap.", factor=100),
        Measure("label_robust_low", "Label-robust score, lower end (×100)", "higher", "Of its 95 % interval over networks.", factor=100),
        Measure("label_robust_high", "Label-robust score, upper end (×100)", "higher", "Of the same interval.", factor=100),
        Measure("learning_rate", "Learning rate", "lower", "Where the networks’ training begins: learned, chosen on validation data, or the recipe’s."),
        Measure("cross_drop", "Loss on other architectures", "lower", "Accuracy minus the mean of the other architectures’.", "percent", 1),
        Measure("random_cross_drop", "The same of random images", "lower", "What as many random real images lose on the other architectures.", "percent", 1),
        Measure("ridge_loss", "Ridge loss", "lower", "Mean squared error of the teacher’s answers to test images, by ridge regression on the pairs."),
        Measure("evaluation_seconds", "Time to judge", "lower", "Seconds for all networks that were trained on the set.", "seconds"),
        Measure("nll", "Loss a token", "lower", "Negative log-likelihood of the held-out text, nats a token."),
        Measure("perplexity", "Perplexity", "lower", "exp of the loss a token; comparable between models of one tokenizer only."),
        Measure("bits_per_byte", "Bits a byte", "lower", "Negative log-likelihood of the held-out text over its UTF-8 bytes; comparable between tokenizers."),
        Measure("next_token_accuracy", "Next-token accuracy", "higher", "Share of the tokens that the model ranks first.", "percent", 1),
        Measure("kl_to_teacher", "KL to the teacher", "lower", "KL(teacher ‖ student) of the next token, nats, the mean over the held-out text; 0: the same."),
        Measure(
            "kl_to_teacher_kept", "KL to the teacher, kept entries", "lower", "The same over the recorded entries and the rest as one outcome; it is never more."
        ),
        Measure("agreement", "Agreement", "higher", "Share of the tokens where student and teacher rank the same token first.", "percent", 1),
        Measure("acceptance", "Acceptance", "higher", "Σ min(p, q): the share of the student’s tokens that speculative decoding would accept.", "percent", 1),
        Measure("ece", "Calibration error", "lower", "Expected calibration error of the first-ranked token, ten bins.", "percent", 1),
        Measure("training_tokens", "Training tokens", "none", "Positions that the student was trained on.", "whole"),
        Measure("training_tokens_per_second", "Training speed", "higher", "Positions a second, teacher and record included.", "number", 4),
        Measure(CALLS, "Network calls a sample", "lower", "How often a network is run for one sample; guidance runs it twice.", "whole"),
        Measure(SECONDS, "Time a sample", "lower", "Wall-clock time of a batch divided by its size; all arms on one machine.", "seconds"),
    )
}
"""The measures that a report knows, by key, in the order in which tables show them."""

PREFIXES = {"cross/": "Accuracy of", "transfer/": "Accuracy on"}
"""Measures of which there are many, by what their keys begin with: of other architectures, on other tasks."""


def measure_of(key: str) -> Measure:
    """The measure of this key; one that is not in `MEASURES` is named by its key and has neither direction nor explanation."""
    for prefix, words in PREFIXES.items():
        if key.startswith(prefix):
            return Measure(key, f"{words} {key.removeprefix(prefix)}", "higher", "", "percent", 1)
    return MEASURES.get(key) or Measure(key, (key[:1].upper() + key[1:]).replace("_", " "), "none")


def in_order(keys: Iterable[str]) -> list[str]:
    """The keys, each once: known ones in the order of `MEASURES`, then the others as they come."""
    given = dict.fromkeys(keys)
    return [key for key in MEASURES if key in given] + [key for key in given if key not in MEASURES]
