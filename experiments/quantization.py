"""What do four bits cost: NF4, FP4 or INT4, with and without double quantisation, and in which compute dtype?

Serves the section «Quantization» of THEORY.md: QLoRA's formats (seeds 000 and 002). The order to reproduce is QLoRA's
Table 2 (arXiv:2305.14314), mean perplexity of pretrained language models: Int4 34.34, FP4 E2M1 31.07, FP4 E3M0 29.48,
NF4 with double quantisation 27.41.

Design. Nothing is trained in four bits: every format quantises the same weights (all linear layers but the head, blocks
of 64), which have not been quantised before. Track ``pretrained``, deterministic and so run once: relative error of the
weights, of every layer's output on its true inputs, and of the last hidden state on real text; bits that real
``Linear4bit`` layers store; the error that bf16 and fp16 compute of NF4 layers add to fp32 compute with the same codes
(PyTorch computes fp16 on any CPU). Track ``classifier``: fine-tuning once per seed, then the test cross-entropy of the
same trained weights in every format, paired within seed, evaluated in fp32 whatever the precision of training. Track
``language_model``, deterministic: loss of a pretrained language model on held-out text, as in the table; it needs
weights from the hub. INT4 is symmetric (−7…7); the FP4 of bitsandbytes is E2M1 but for its smallest magnitude, so E2M1
is measured beside it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from experiments.harness.causal_lm import CausalLMRun
from experiments.harness.claims import Claim, Estimand, Exact, ExactRatio, Region, RelativeReduction, Selector
from experiments.harness.classification import CLASSIFIER_LOSS, ClassificationRun
from experiments.harness.experiment import Experiment, Preempted, TrialContext, UserError
from experiments.harness.record import (
    EVAL_LOSS,
    PERPLEXITY,
    ManipulationCheck,
    Measurements,
    Metric,
    Observation,
    TrialSpec,
)
from experiments.harness.training_run import unprefixed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from experiments.harness.evaluation import HeldOutClasses

RELATIVE_ERROR = Metric("relative_error", "1", "minimize")
LAYER_WEIGHT_ERROR = Metric("layer_weight_error", "1", "minimize")
COMPUTE_ERROR = Metric("compute_error", "1", "minimize")
QUANTISED_PARAMS = Metric("quantised_params", "1", "none")
STORED_BITS = Metric("stored_bits", "bits", "minimize")
FILE_BITS = Metric("file_bits", "bits", "minimize")
SINGLE_BITS = Metric("bits_without_double_quantisation", "bits", "minimize")
SAVED_BITS = Metric("bits_saved_by_double_quantisation", "bits", "maximize")

QUANTISED_BEFORE = ("smollm2-135m",)
"""Embedded models whose weights come from a 4-bit file."""


@dataclass(frozen=True)
class Classifier(ClassificationRun):
    """Fine-tuning of a pretrained model, whose weights are quantised before and after it."""

    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    steps: int = 300
    """Optimizer steps."""
    activation_examples: int = 256
    """Test examples on which layer outputs and hidden states are compared (at most all)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least_one("steps", "activation_examples")


@dataclass(frozen=True)
class LanguageModel:
    """A pretrained causal language model that is evaluated and not trained."""

    model: str = "HuggingFaceTB/SmolLM2-135M"
    """Local folder or hub id of weights that have not been quantised; or tiny-random."""
    dataset: str = "moby_dick"
    """Embedded corpus (moby_dick, state_of_the_union, movie_sentiment), local file, or hub id."""
    random_init: bool = False
    """Build the model from its config alone, with random weights."""
    batch_size: int = 4
    """Blocks at a time."""
    sequence_length: int = 512
    """Tokens per block."""
    test_blocks: int = 230
    """Blocks of the evaluation (at most all)."""

    def __post_init__(self) -> None:
        self.run()

    def run(self) -> CausalLMRun:
        """As the harness knows it; checks the values."""
        return CausalLMRun(**dataclasses.asdict(self), precision="fp32")


@dataclass(frozen=True)
class Settings:
    """Options of one campaign; a scale is a set of defaults."""

    seeds: int
    """Number of fine-tuning seeds, the unit of replication."""
    classifier: Annotated[Classifier, unprefixed()]
    """The model of the tracks ``pretrained`` and ``classifier``."""
    language_model: LanguageModel | None = None
    """The model of the track ``language_model``, where it is run."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")
        for run in (self.classifier, self.language_model):
            if run is not None and run.model in QUANTISED_BEFORE and not run.random_init:
                raise UserError(
                    f"weights must not have been quantised before, and those of {run.model} come from a 4-bit file; "
                    "choose minilm-l6, a local folder or a hub id"
                )


SCALES = {
    "smoke": Settings(
        seeds=2,
        classifier=Classifier(
            model="tiny-random-encoder", random_init=True, steps=4, batch_size=4, sequence_length=32,
            learning_rate=1e-3, precision="fp32", test_examples=16, activation_examples=8,
        ),
        language_model=LanguageModel(model="tiny-random", random_init=True, sequence_length=32, test_blocks=4),
    ),
    "laptop": Settings(seeds=3, classifier=Classifier(steps=200, test_examples=500, activation_examples=64)),
    "cpu": Settings(seeds=8, classifier=Classifier()),
    "gpu": Settings(seeds=20, classifier=Classifier(steps=2_000), language_model=LanguageModel()),
    "paper": Settings(
        seeds=5,
        classifier=Classifier(
            model="mistralai/Mistral-7B-v0.1", method="lora", steps=1_000, learning_rate=2e-4, sequence_length=128
        ),
        language_model=LanguageModel(model="mistralai/Mistral-7B-v0.1", batch_size=2, sequence_length=1_024),
    ),
}  # fmt: skip

COST = {
    "smoke": "under 1 min on 2 cores, no download",
    "laptop": "about 4 min on 2 cores",
    "cpu": "about 15 min on 2 cores with --workers 2",
    "gpu": "planned for 30 min on one 80 GB GPU; not yet measured",
    "paper": "planned for a day on one 80 GB GPU; not yet measured",
}


def trials(settings: Settings, scale: str) -> list[TrialSpec]:
    """The deterministic tracks once each (seed 0 draws nothing but an unused head), then seed by seed."""
    run = settings.classifier
    shared = {**dataclasses.asdict(run), "language_model": dataclasses.asdict(settings)["language_model"]}
    plan = [(0, "pretrained")]
    plan += [(0, "language_model")] if settings.language_model is not None else []
    plan += [(seed, "classifier") for seed in range(settings.seeds)]
    return [EXPERIMENT.spec(scale, seed, {"track": track}, shared) for seed, track in plan]


def run_trial(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Measure one track."""
    began = time.monotonic()
    into = Measurements(seconds={"training": 0.0, "evaluation": 0.0})
    track = {"pretrained": _pretrained, "classifier": _classifier, "language_model": _language_model}
    track[str(spec.factors["track"])](spec, context, into)
    into.seconds["overhead"] = max(0.0, time.monotonic() - began - sum(into.seconds.values()))
    return into


def _run(spec: TrialSpec) -> Classifier:
    return Classifier(**{field.name: spec.settings[field.name] for field in dataclasses.fields(Classifier)})


def _pretrained(spec: TrialSpec, context: TrialContext, into: Measurements) -> None:
    """Errors of the weights, of layer outputs and of hidden states; compute dtypes; stored bits."""
    from experiments.harness.classification import prepare
    from experiments.worlds import quantised as q

    run = dataclasses.replace(_run(spec), method="full")
    ingredients = prepare(run, spec.seed)
    began = time.monotonic()
    model = ingredients.model.to(_device())
    linears = q.linears_of(model)
    batches = q.batches_of(ingredients.test, run.activation_examples, run.batch_size, next(model.parameters()).device)
    truth = q.hidden_states(model, batches)
    hidden: dict[str, Tensor] = {}
    for step, (arm, scheme) in enumerate(q.SCHEMES.items()):
        _proceed(context, step, len(q.SCHEMES), arm)
        with q.quantised(linears, scheme):
            hidden[arm] = q.hidden_states(model, batches)
        _observe_error(into, RELATIVE_ERROR, q.relative_error(hidden[arm], truth), arm=arm, quantity="hidden_state")
        if arm in q.COMPUTE:
            _observe_error(into, COMPUTE_ERROR, q.relative_error(hidden[arm], hidden["nf4"]), arm=arm)
            continue
        together, by_layer = q.weight_errors(linears, scheme)
        for layer, error in by_layer.items():
            _observe_error(into, LAYER_WEIGHT_ERROR, error, arm=arm, layer=layer)
        _observe_error(into, RELATIVE_ERROR, together, arm=arm, quantity="weights")
        output = q.layer_output_error(model, linears, batches, scheme)
        _observe_error(into, RELATIVE_ERROR, output, arm=arm, quantity="layer_outputs")
    _observe_bits(into, linears)
    into.digests = ingredients.digests
    into.checks += _checks(model, linears, ingredients.digests["model"])
    same = [arm for arm in q.COMPUTE if bool((hidden[arm] == hidden["nf4"]).all())]
    into.checks += ManipulationCheck.each(compute_dtypes_without_effect=([], same))
    into.seconds["evaluation"] = time.monotonic() - began


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _proceed(context: TrialContext, step: int, total: int, arm: str) -> None:
    """Progress of a track without training, which starts over when it is interrupted."""
    context.report(step, total, phase=f"evaluation of {arm}")
    if context.should_stop():
        raise Preempted


def _observe_error(into: Measurements, metric: Metric, value: float, step: int = 0, **conditions: str) -> None:
    """An error, or the note that it is not finite: activations can leave the range of fp16."""
    if math.isfinite(value):
        into.observations.append(Observation.of(metric, value, step, **conditions))
    else:
        into.diverged = into.diverged or f"{metric.name} is {value} at {conditions}"


def _observe_bits(into: Measurements, linears: dict[str, nn.Linear]) -> None:
    """What real NF4 layers store, with and without double quantisation, checked against the arithmetic."""
    from experiments.worlds.quantised import stored_bits

    stored = {"nf4": stored_bits(linears, double=False), "nf4_dq": stored_bits(linears, double=True)}
    for arm, each in stored.items():
        into.observations.append(Observation.of(STORED_BITS, each.bits, 0, arm=arm))
        into.observations.append(Observation.of(FILE_BITS, each.file_bits, 0, arm=arm))
        into.checks += ManipulationCheck.each(**{f"stored_bits_of_{arm}": (each.bits_by_arithmetic, each.bits)})
    single, double = stored.values()
    into.checks += ManipulationCheck.each(
        nested_layers=([0, len(linears)], [single.nested_layers, double.nested_layers])
    )
    weights = sum(linear.weight.numel() for linear in linears.values())
    figures = {QUANTISED_PARAMS: weights, SINGLE_BITS: single.bits, SAVED_BITS: single.bits - double.bits}
    into.observations += [Observation.of(metric, value, 0) for metric, value in figures.items()]


def _classifier(spec: TrialSpec, context: TrialContext, into: Measurements) -> None:
    """Fine-tune once; evaluate the trained weights in every format and compute dtype."""
    from experiments.harness import classification
    from experiments.harness.models import weights_sha256
    from experiments.harness.training import train
    from experiments.worlds.quantised import linears_of

    run = _run(spec)
    ingredients = classification.prepare(run, spec.seed)
    plan = run.plan(spec.seed, run.steps, "cosine")
    outcome = train(
        ingredients.model, ingredients.train, ingredients.validation, plan, context, collator=ingredients.collator
    )
    model: Any = ingredients.model
    trained = dataclasses.replace(ingredients, model=model.merge_and_unload() if run.method == "lora" else model)
    linears, before = linears_of(trained.model), weights_sha256(trained.model)
    context.report(run.steps, run.steps, phase="test evaluation")
    in_fp32 = dataclasses.replace(run, precision="fp32")
    outcomes, evaluation_sec = classification.outcomes_on_test(in_fp32, trained, _weights(linears))
    _observe_outcomes(into, outcomes, run.steps)
    into.tokens = round(run.steps * run.batch_size * ingredients.train.tokens / len(ingredients.train))
    into.digests = ingredients.digests
    into.checks += ManipulationCheck.each(
        optimizer_steps=(run.steps, outcome.trainer.state.global_step),
        training_moved_the_model=(True, before != ingredients.digests["model"]),
    )
    into.checks += _checks(trained.model, linears, before)
    into.seconds = {"training": outcome.training_sec, "evaluation": outcome.evaluation_sec + evaluation_sec}


def _weights(linears: dict[str, nn.Linear]) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Every arm's context, the unquantised weights first."""
    from experiments.worlds.quantised import SCHEMES, quantised

    return {"fp32": nullcontext, **{arm: partial(quantised, linears, scheme) for arm, scheme in SCHEMES.items()}}


def _observe_outcomes(into: Measurements, outcomes: Mapping[str, HeldOutClasses], step: int) -> None:
    """Test outcome of every arm, by example where claims name it most, and the relative error of its logits."""
    import numpy as np

    from experiments.harness.classification import observe

    truth = outcomes["fp32"].logits
    for arm, held_out in outcomes.items():
        observe(into, held_out, step, arm, per_example=(CLASSIFIER_LOSS,) if arm in _BY_EXAMPLE else ())
        error = float(np.linalg.norm(held_out.logits - truth) / np.linalg.norm(truth))
        _observe_error(into, RELATIVE_ERROR, error, step, arm=arm, quantity="logits")
    same = [arm for arm in outcomes if arm != "fp32" and np.array_equal(outcomes[arm].logits, truth)]
    into.checks += ManipulationCheck.each(arms_equal_to_fp32=([], same))


def _language_model(spec: TrialSpec, context: TrialContext, into: Measurements) -> None:
    """Loss and perplexity of a pretrained language model in every format."""
    from experiments.harness.causal_lm import losses_on_test, prepare
    from experiments.worlds import quantised as q

    run = LanguageModel(**spec.settings["language_model"]).run()
    ingredients = prepare(run, spec.seed)
    model = ingredients.model.to(_device())
    linears = q.linears_of(model)
    arms = _weights(linears)
    for step, (arm, weights) in enumerate(arms.items()):
        _proceed(context, step, len(arms), arm)
        losses, seconds = losses_on_test(run, ingredients, {arm: weights})
        into.seconds["evaluation"] += seconds
        loss = losses[arm].loss
        _observe_error(into, EVAL_LOSS, loss, split="test", arm=arm)
        error = 0.0 if arm == "fp32" else q.weight_errors(linears, q.SCHEMES[arm])[0]
        _observe_error(into, RELATIVE_ERROR, error, arm=arm, quantity="weights")
        if math.isfinite(loss):
            into.observations.append(Observation.of(PERPLEXITY, math.exp(loss), 0, split="test", arm=arm))
    into.digests = ingredients.digests
    into.checks += _checks(model, linears, ingredients.digests["model"])


def _checks(model: nn.Module, linears: dict[str, nn.Linear], before: str) -> list[ManipulationCheck]:
    """Weights that were never in four bits, are in four bits in every arm, and are themselves again after it."""
    import torch

    from experiments.harness.models import weights_sha256
    from experiments.worlds import quantised as q

    weights = [linear.weight.detach() for linear in linears.values()]
    unquantised = float(torch.cat([q.values_per_block(weight) for weight in weights]).float().median())
    most, apart, changed, doubled = 0, 0.0, [], []
    for weight in weights:
        stored = {arm: q.dequantised(weight, scheme) for arm, scheme in q.FORMAT_SCHEMES.items()}
        most = max(most, *(int(q.values_per_block(each).max()) for each in stored.values()))
        changed += [arm for arm, each in stored.items() if torch.equal(each, weight)]
        doubled += [name for name in q.FORMATS if torch.equal(stored[name], stored[f"{name}_dq"])]
        theirs = {
            arm: q.by_bitsandbytes(weight, s) for arm, s in q.FORMAT_SCHEMES.items() if s.name in q.IN_BITSANDBYTES
        }
        apart = max(apart, *(q.relative_error(each, stored[arm]) for arm, each in theirs.items()))
    return [
        _within("values_in_a_block_before", 33, q.BLOCK_WEIGHTS, unquantised),
        _within("values_in_a_block_of_four_bits", 2, 16, most),
        _within("relative_difference_to_bitsandbytes", 0, 1e-3, apart),
        *ManipulationCheck.each(
            layers_left_unquantised=([], changed),
            layers_without_effect_of_double_quantisation=([], doubled),
            weights_restored=(before, weights_sha256(model)),
        ),
    ]


def _within(name: str, low: float, high: float, value: float) -> ManipulationCheck:
    return ManipulationCheck(
        name=name, expected=f"{low:g} to {high:g}", observed=f"{value:.3g}", passed=low <= value <= high
    )


_TABLE_2 = "QLoRA (arXiv:2305.14314), таблица 2"
_ORDER = (
    ("nf4", "fp4", "NF4 точнее, чем FP4", _TABLE_2),
    ("nf4", "int4", "NF4 точнее, чем INT4", "seed 000, «NF4 quantization: лучше чем INT4 для weights»"),
    ("fp4", "int4", "FP4 точнее, чем INT4", _TABLE_2),
    ("e3m0", "e2m1", "FP4 с тремя битами порядка (E3M0) точнее, чем E2M1", _TABLE_2),
    ("nf4_dq", "e3m0", "NF4 с двойным квантованием точнее, чем FP4 (E3M0)", _TABLE_2),
)
"""Better arm, worse arm, the sentence and who says it."""
_BY_EXAMPLE = ("nf4", "fp4", "int4", "nf4_dq")
_BETTER = Region(low=0.01)
"""By at least 1 %: in nats, the steps of Table 2 are 1.5 to 3 % of the loss."""


def _by_quantity(better: Selector, worse: Selector) -> dict[str, tuple[str, Estimand]]:
    """By what a format is judged: slug of the id → condition in words, estimand."""

    def exact(metric: Metric, track: str, **where: str) -> Estimand:
        return Exact(RelativeReduction(metric.name, better, worse, {"track": track, **where}))

    task = RelativeReduction(CLASSIFIER_LOSS.name, better, worse, {"track": "classifier", "split": "test"})
    return {
        "weights": ("ошибка весов", exact(RELATIVE_ERROR, "pretrained", quantity="weights")),
        "activations": (
            "ошибка последнего скрытого состояния",
            exact(RELATIVE_ERROR, "pretrained", quantity="hidden_state"),
        ),
        "task": ("cross-entropy дообученного классификатора", task),
        "language-model": ("eval loss языковой модели", exact(EVAL_LOSS, "language_model", split="test")),
    }


def _claims(id: str, statement: str, source: str, region: Region, by: dict[str, tuple[str, Estimand]]) -> list[Claim]:
    """One sentence, judged by several quantities."""
    return [
        Claim(f"{id}-{slug}".replace("_", "-"), statement, "quantization", source, estimand, region, condition=words)
        for slug, (words, estimand) in by.items()
    ]


def _order_claims(better: str, worse: str, sentence: str, source: str) -> list[Claim]:
    told = f"{sentence} (меньше не менее чем на 1 %)"
    return _claims(
        f"quant-{better}-beats-{worse}", told, source, _BETTER, _by_quantity({"arm": better}, {"arm": worse})
    )


def _compute_claims() -> list[Claim]:
    bf16, fp16 = {"arm": "nf4_bf16"}, {"arm": "nf4_fp16"}
    exact = Exact(RelativeReduction(COMPUTE_ERROR.name, bf16, fp16, {"track": "pretrained"}))
    by = _by_quantity(bf16, fp16) | {"activations": ("отличие скрытого состояния от вычислений в fp32", exact)}
    del by["weights"]
    return _claims(
        "quant-bf16-beats-fp16",
        "Вычисления слоёв NF4 в BF16 точнее, чем в FP16 (меньше не менее чем на 1 %)",
        "seed 000, «BF16 compute: лучшая точность чем FP16»",
        _BETTER,
        by,
    )


def _memory_claim(id: str, statement: str, source: str, denominator: Metric, region: Region) -> Claim:
    estimand = ExactRatio(SAVED_BITS.name, denominator.name, {"track": "pretrained"})
    return Claim(id, statement, "quantization", source, estimand, region, condition="коды и масштабы весов")


CLAIMS = (
    *(claim for told in _ORDER for claim in _order_claims(*told)),
    *_claims(
        "quant-double-keeps",
        "Двойное квантование почти не меняет точности NF4 (не более чем на 1 % в обе стороны)",
        "seed 002, «при почти неизменной точности»",
        Region(low=-0.01, high=0.01),
        _by_quantity({"arm": "nf4_dq"}, {"arm": "nf4"}),
    ),
    _memory_claim(
        "quant-double-saves-0.37-bit",
        "Двойное квантование экономит 0,37 бита на параметр (0,365–0,375)",
        "QLoRA (arXiv:2305.14314), раздел 3; seed 000, «Double quantization: дополнительная экономия памяти»",
        QUANTISED_PARAMS,
        Region(low=0.365, high=0.375),
    ),
    _memory_claim(
        "quant-double-saves-20-to-30-percent",
        "Двойное квантование снижает память квантованных весов на 20–30 %",
        "seed 002, «Ещё больше снижает память (20–30%)»",
        SINGLE_BITS,
        Region(low=0.2, high=0.3),
    ),
    _memory_claim(
        "quant-double-saves-8-percent",
        "Двойное квантование снижает память квантованных весов примерно на 8 % (7,5–8,5 %)",
        "собственное утверждение: 0,373 бита из 4,5",
        SINGLE_BITS,
        Region(low=0.075, high=0.085),
    ),
    *_compute_claims(),
)

EXPERIMENT = Experiment(
    name="quantization",
    version=1,
    question="What do four bits cost: NF4, FP4 or INT4, doubly quantised or not, in which compute dtype?",
    claims=CLAIMS,
    scales=SCALES,
    trials=trials,
    run_trial=run_trial,
    cost=COST,
)
