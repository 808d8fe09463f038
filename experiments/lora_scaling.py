"""How do rank, alpha, target modules, learning rate, batch size and schedule matter to LoRA, and to fine-tuning?

Serves the section «Training Presets» of THEORY.md (seed 000), and those on the lecture (seed 002) and on classic
fine-tuning (seed 004).

Design. A star: around a centre (r = 16, alpha = 2r on q, k, v, o; batches of 8; 10 % warm-up, cosine) each arm changes
one thing. An arm is never judged at somebody else's learning rate: it is trained at rates a quarter of a decade apart,
from the rate of its method times √(batch size / 8) (arXiv:2205.10287) on, until the best one on validation has a worse
one on either side; its *tuned* outcome is the test outcome at that rate, and where none was enclosed there is none.
Arms whose learning-rate curve is of interest are trained on a long grid too, which SFT and LoRA share. A trial is one
arm with all its rates. Runs of a seed share weights, head, data order and dropout masks, and
see the same number of examples whatever the batch size; on other target modules than q, k, v, o the rank is the one
with which as many parameters train. The *usable band* is the interval of learning rates around the best one with a test
loss at most 5 % above the best, between grid points by linear interpolation in log10(rate). At ``cpu`` a batch of 128
leaves six steps: what large batches lose there is mostly what few steps lose, in SFT and LoRA alike.

Version 1 chose among three rates half a decade apart and was stopped at 58 of 100 trials: the best was often at an end.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from experiments.harness.causal_lm import CausalLMRun
from experiments.harness.claims import (
    ArgBestShift,
    Claim,
    Estimand,
    Interaction,
    Rate,
    Ratio,
    Region,
    Regret,
    RelativeReduction,
    SelectedReduction,
    Selector,
)
from experiments.harness.classification import ClassificationRun
from experiments.harness.experiment import Experiment, TrialContext, UserError
from experiments.harness.lora import LoraArm, Targets
from experiments.harness.rate_curve import (
    HIGHEST_USABLE,
    NO_GAIN,
    TUNED_ACCURACY,
    TUNED_LOSS,
    USABLE_DECADES,
    Arm,
    RateRun,
    begin,
    enclose,
    loss_without_skill,
    observe_curve,
    train_at,
)
from experiments.harness.record import EVAL_LOSS, Measurements, TrialSpec

SENTIMENT, LM = "classification", "language_modelling"
CENTRE, NO_WARMUP = "centre", "no_warmup"
METHODS = ("full", "lora")


@dataclass(frozen=True)
class Sentiment(ClassificationRun):
    """Fine-tuning of an encoder with a head of random weights."""

    learning_rate: float = 1e-4
    """Where the search begins when all weights train."""
    lora_learning_rate: float = 1.8e-3
    """Where the search begins for LoRA and the head beside it."""
    examples: int = 768
    """Training examples that every run sees, whatever its batch size."""
    batch_size: int = 8
    """Examples per optimizer step in the centre."""
    sequence_length: int = 32
    """Tokens of an example at most, special tokens among them."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast over fp32 weights."""
    validation_examples: int = 200
    """Examples on which the learning rate is chosen, the same for every seed."""
    test_examples: int = 400
    """Examples of the final evaluation (at most all), the same for every seed."""


@dataclass(frozen=True)
class LanguageModelling(CausalLMRun):
    """Fine-tuning of a language model on one domain."""

    learning_rate: float = 1e-4
    """Where the search begins when all weights train."""
    lora_learning_rate: float = 1e-3
    """Where the search begins for LoRA."""
    examples: int = 1_536
    """Training blocks that every run sees, whatever its batch size."""
    batch_size: int = 8
    """Blocks per optimizer step in the centre."""
    validation_blocks: int = 32
    """Blocks on which the learning rate is chosen."""


Run = Sentiment | LanguageModelling


@dataclass(frozen=True)
class Settings:
    """Options of one campaign."""

    seeds: int
    """Training seeds, the unit of replication."""
    classification: Sentiment
    """The classifier."""
    language_modelling: LanguageModelling | None = None
    """The language model, where it is trained too."""
    ranks: tuple[int, ...] = (1, 4, 64)
    """Ranks beside the centre's 16."""
    batch_sizes: tuple[int, ...] = (4, 128)
    """Batch sizes beside the centre's."""
    learning_rates: tuple[float, ...] = (1e-5, 3.2e-5, 1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2)
    """The long grid, of SFT and LoRA alike."""
    rate_factor: float = 10**0.25
    """Between neighbours in the search for an arm's learning rate."""
    most_rates: int = 9
    """How many rates a search tries at most."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise UserError(f"seeds must be at least 1, got {self.seeds}")
        for name in ("ranks", "batch_sizes", "learning_rates"):
            levels = getattr(self, name)
            if not all(level > 0 for level in levels) or len(set(levels)) < len(levels):
                raise UserError(f"{name} must be positive and differ, got {' '.join(map(str, levels))}")
        if len(self.learning_rates) < 2:
            raise UserError(f"learning_rates must be at least 2, got {len(self.learning_rates)}")
        if not self.rate_factor >= 1.2:
            raise UserError(f"rate_factor must be at least 1.2, got {self.rate_factor}; rates have two digits")
        if self.most_rates < 3:
            raise UserError(f"most_rates must be at least 3 (a best rate and its neighbours), got {self.most_rates}")
        if LoraArm.rank in self.ranks:
            raise UserError(f"ranks must not hold the centre's {LoraArm.rank}, which is always run; leave it out")
        for run in (self.classification, self.language_modelling):
            if run is not None:
                _check(run, self.batch_sizes)


def _check(run: Run, batch_sizes: Sequence[int]) -> None:
    if not run.lora_learning_rate > 0:
        raise UserError(f"lora_learning_rate must be positive, got {run.lora_learning_rate}")
    if run.method != "full":
        raise UserError(f"method must be full (every arm has its own), got {run.method}; leave --method out")
    if run.batch_size in batch_sizes:
        raise UserError(f"batch_sizes must not hold the centre's {run.batch_size}, which is always run; leave it out")
    for size in (run.batch_size, *batch_sizes):
        if run.examples < size or run.examples % size:
            raise UserError(f"examples must be a multiple of every batch size, got {run.examples} and {size}")


SCALES = {
    "smoke": Settings(
        seeds=1,
        classification=Sentiment(
            model="tiny-random-encoder", random_init=True, sequence_length=16, examples=8, batch_size=4,
            train_examples=16, validation_examples=4, test_examples=8,
        ),
        ranks=(1, 64),
        batch_sizes=(8,),
        learning_rates=(1e-4, 1e-2),
        rate_factor=10.0,
    ),
    "laptop": Settings(
        seeds=2,
        classification=Sentiment(examples=384, test_examples=200),
        ranks=(1, 64),
        rate_factor=10**0.5,
    ),
    "cpu": Settings(seeds=5, classification=Sentiment()),
    "gpu": Settings(
        seeds=8,
        classification=Sentiment(examples=8_192, sequence_length=64, validation_examples=500, test_examples=1_000),
        language_modelling=LanguageModelling(),
        batch_sizes=(4, 16, 32, 64, 128),
        ranks=(1, 2, 4, 8, 32, 64),
        learning_rates=(1e-6, 3.2e-6, 1e-5, 3.2e-5, 1e-4, 3.2e-4, 1e-3, 3.2e-3, 1e-2),
    ),
}  # fmt: skip

COST = {
    "smoke": "about 20 s on 1 core, no download",
    "laptop": "planned for 40 core-min; not yet measured",
    "cpu": "about 3.4 core-h (--workers 2 on 2 cores: 1 h 40 min)",
    "gpu": "planned for 15 h on one 80 GB GPU, less with --workers 4; not yet measured",
}


def arms_of(method: str, settings: Settings, run: Run) -> dict[str, Arm]:
    """The arms of a method by the name of what they change."""
    centre = Arm(LoraArm() if method == "lora" else None, run.batch_size, long_grid=True)
    off_centre = dataclasses.replace(centre, long_grid=False)
    changes: dict[str, dict[str, Any]] = {f"batch_{size}": {"batch_size": size} for size in settings.batch_sizes}
    if method == "lora":
        changes |= {f"rank_{rank}": {"lora": LoraArm(rank=rank)} for rank in settings.ranks}
        changes |= {f"alpha_{ratio}r": {"lora": LoraArm(alpha_ratio=ratio)} for ratio in (1, 4)}
        others = [targets for targets in get_args(Targets) if targets != LoraArm.targets]
        changes |= {f"targets_{targets}": {"lora": LoraArm(targets=targets)} for targets in others}
    else:
        changes |= {schedule: {"schedule": schedule} for schedule in ("constant", "linear")}
        changes[NO_WARMUP] = {"warmup_ratio": 0.0, "long_grid": True}
    return {CENTRE: centre} | {name: dataclasses.replace(off_centre, **change) for name, change in changes.items()}


def first_rate(method: str, arm: Arm, run: Run) -> float:
    """The learning rate with which the search for an arm's begins."""
    middle = run.lora_learning_rate if method == "lora" else run.learning_rate
    return middle * math.sqrt(arm.batch_size / run.batch_size)


def trials(settings: Settings, scale: str) -> list[TrialSpec]:
    """Every arm of every track and method, seed by seed."""
    shared = dataclasses.asdict(settings)
    del shared["seeds"]
    tracks = {SENTIMENT: settings.classification, LM: settings.language_modelling}
    return [
        EXPERIMENT.spec(scale, seed, {"track": track, "method": method, "variant": variant}, shared)
        for seed in range(settings.seeds)
        for track, run in tracks.items()
        if run is not None
        for method in METHODS
        for variant in arms_of(method, settings, run)
    ]


def _settings_of(spec: TrialSpec) -> tuple[Settings, Run]:
    """The settings of a campaign and the run of a trial's track."""
    language_model = spec.settings[LM]
    runs = {
        SENTIMENT: Sentiment(**spec.settings[SENTIMENT]),
        LM: None if language_model is None else LanguageModelling(**language_model),
    }
    search = {name: spec.settings[name] for name in ("rate_factor", "most_rates")}
    search |= {name: tuple(spec.settings[name]) for name in ("ranks", "batch_sizes", "learning_rates")}
    settings = Settings(seeds=1, **runs, **search)  # type: ignore[arg-type]
    run: Run = getattr(settings, str(spec.factors["track"]))
    return settings, run


def run_trial(spec: TrialSpec, context: TrialContext) -> Measurements:
    """Train one arm at each of its learning rates, and say what it is worth at the one that validation chooses."""
    from experiments.harness.cost import stop_between_parts
    from experiments.harness.tuning import read_runs, write_runs

    began = time.monotonic()
    settings, run = _settings_of(spec)
    method = str(spec.factors["method"])
    arm = arms_of(method, settings, run)[str(spec.factors["variant"])]
    into = Measurements(seconds={"training": 0.0, "evaluation": 0.0})
    ingredients = begin(into, run, arm, spec.seed)
    if run.examples > len(ingredients.train):
        raise UserError(
            f"examples must be at most {len(ingredients.train)} (one pass over {run.dataset}), got {run.examples}"
        )
    steps, finished = run.examples // arm.batch_size, context.work_dir / "runs.json"
    runs = {each["learning_rate"]: RateRun(**each) for each in read_runs(finished)}

    def loss_at(rate: float) -> float:
        if rate not in runs:
            stop_between_parts(context)
            context.report(len(runs), settings.most_rates, phase=f"learning rate {rate:g}")
            runs[rate] = train_at(rate, run, arm, steps, ingredients, spec.seed, context.work_dir / f"rate_{rate:g}")
            write_runs(finished, list(runs.values()))
        return runs[rate].loss("validation")

    tried = enclose(loss_at, first_rate(method, arm, run), settings.rate_factor, settings.most_rates)
    long_grid = settings.learning_rates if arm.long_grid else ()
    for rate in long_grid:
        loss_at(rate)
    rising = [runs[rate] for rate in sorted(runs)]
    observe_curve(into, run, arm, steps, rising, tried, long_grid, loss_without_skill(run, ingredients))
    into.tokens = round(len(runs) * run.examples * ingredients.train.tokens / len(ingredients.train))
    into.seconds["overhead"] = max(0.0, time.monotonic() - began - sum(into.seconds.values()))
    return into


_TEST: Selector = {"split": "test", "track": SENTIMENT}
_SFT, _LORA = {"method": "full", "variant": CENTRE}, {"method": "lora", "variant": CENTRE}
_TASKS = {SENTIMENT: "классификация", LM: "языковое моделирование"}
_TUNED = "learning rate подобран для каждого варианта"
_LOWER, _HIGHER = Region(low=0.0), Region(high=0.0)
_BAND = "seed 002, «Обучение LoRA устойчиво при большем LR, чем SFT»"
_LARGE = "seed 002, «При больших batch size точность немного снижается»"
_HARD = "seed 002, «LoRA хорошо при умеренном размере и достаточном r. Но на сложных задачах SFT лучше»"
_TOO_HIGH = "seed 004, «Слишком высокий LR может привести к дестабилизации весов и снижению качества»"


def _claim(id: str, statement: str, source: str, estimand: Estimand, region: Region, condition: str = _TUNED) -> Claim:
    return Claim(f"lora-{id.replace('_', '-')}", statement, "", source, estimand, region, condition=condition)


def _lora(variant: str) -> Selector:
    return {"method": "lora", "variant": variant}


def _full(variant: str) -> Selector:
    return {"method": "full", "variant": variant}


def _tuned(treatment: Selector, control: Selector, where: Selector = _TEST) -> RelativeReduction:
    return RelativeReduction(TUNED_LOSS.name, treatment, control, where)


def _preset_claims() -> Iterator[Claim]:
    for ratio in (1, 4):
        yield _claim(
            f"alpha-2r-not-worse-than-{ratio}r",
            f"alpha = 2r не хуже, чем alpha = {ratio}r (loss больше не более чем на 1 %)",
            "seed 000, «lora_alpha=32: рекомендуемый alpha=2*r»", _tuned(_LORA, _lora(f"alpha_{ratio}r")),
            Region(low=-0.01),
        )  # fmt: skip
    yield _claim(
        "alpha-does-not-matter",
        "Если learning rate подобран, alpha не важна: alpha = r и alpha = 4r дают одинаковый loss (±2 %)",
        "собственное утверждение: alpha и learning rate действуют вместе", _tuned(_lora("alpha_4r"), _lora("alpha_1r")),
        Region(low=-0.02, high=0.02),
    )  # fmt: skip
    for targets, words in (("qv", "на q,v"), ("mlp", "на MLP"), ("all", "на всех линейных слоях")):
        yield _claim(
            f"attention-beats-{targets}",
            f"LoRA на q,k,v,o даёт максимальный эффект: loss меньше, чем {words} при равном числе параметров",
            "seed 000, «target_modules: q,k,v,o projections (максимальный эффект)»",
            _tuned(_LORA, _lora(f"targets_{targets}")), _LOWER,
        )  # fmt: skip
    ranks = tuple(_lora(f"rank_{rank}") for rank in SCALES["cpu"].ranks)
    yield _claim(
        "rank-16-near-best", "r = 16 — баланс: loss не более чем на 5 % хуже лучшего из рангов 1–64",
        "seed 000, «r=16: баланс качество/эффективность»", Regret(TUNED_LOSS.name, _LORA, ranks, _TEST),
        Region(high=0.05),
    )  # fmt: skip
    yield _claim(
        "rank-64-gains-little", "r = 16 — баланс: r = 64 уменьшает loss не более чем на 2 %",
        "seed 000, «r=16: баланс качество/эффективность»", _tuned(_lora("rank_64"), _LORA), Region(high=0.02),
    )  # fmt: skip


def _schedule_claims() -> Iterator[Claim]:
    for schedule, word in (("constant", "постоянного"), ("linear", "линейного")):
        yield _claim(
            f"cosine-beats-{schedule}", f"Cosine schedule лучше {word}: loss меньше",
            "seed 000, «Cosine schedule (постепенное снижение lr)»", _tuned(_SFT, _full(schedule)), _LOWER,
            f"SFT, {_TUNED}",
        )  # fmt: skip
    warmup = "seed 000, «Warmup: 10% (предотвращает destabilization в начале)»"
    yield _claim(
        "warmup-raises-usable-rate", "С warmup 10 % обучение выдерживает больший learning rate, чем без него", warmup,
        Ratio(HIGHEST_USABLE.name, _SFT, _full(NO_WARMUP), _TEST), Region(low=1.0),
        "SFT, наибольший learning rate с loss не более чем на 5 % хуже лучшего",
    )  # fmt: skip
    yield _claim(
        "warmup-lowers-loss-at-high-rate", "При высоком learning rate (1e-3) warmup 10 % уменьшает loss", warmup,
        RelativeReduction(EVAL_LOSS.name, _SFT, _full(NO_WARMUP), {**_TEST, "learning_rate": 1e-3}), _LOWER, "SFT",
    )  # fmt: skip


def _mlp_claims() -> Iterator[Claim]:
    for targets, words in (("mlp", "на MLP"), ("all", "на всех линейных слоях")):
        for task in _TASKS if targets == "all" else (SENTIMENT,):
            yield _claim(
                f"{targets}-beats-attention-{task}",
                f"LoRA полезна и для MLP: {words} loss меньше, чем на q,k,v,o при равном числе параметров",
                "seed 002, «LoRA полезна не только для Attention (W_q, W_v), но и для MLP-слоёв»",
                _tuned(_lora(f"targets_{targets}"), _LORA, {**_TEST, "track": task}), _LOWER,
                f"{_TASKS[task]}, {_TUNED}",
            )  # fmt: skip


def _rate_claims() -> Iterator[Claim]:
    for task in _TASKS:
        where: Selector = {**_TEST, "track": task, "grid": "long"}
        yield _claim(
            f"best-rate-above-sft-{task}",
            "Лучший learning rate у LoRA больше, чем у SFT, не менее чем в 3 раза", _BAND,
            ArgBestShift(EVAL_LOSS.name, "learning_rate", _SFT, _LORA, where), Region(low=math.log10(3)), _TASKS[task],
        )  # fmt: skip
    yield _claim(
        "usable-rate-above-sft", "LoRA обучается устойчиво при большем learning rate, чем SFT", _BAND,
        Ratio(HIGHEST_USABLE.name, _LORA, _SFT, _TEST), Region(low=1.0),
        "наибольший learning rate с loss не более чем на 5 % хуже лучшего",
    )  # fmt: skip
    yield _claim(
        "usable-band-wider-than-sft",
        "Полоса пригодных learning rate (loss не более чем на 5 % хуже лучшего) у LoRA шире, чем у SFT", _BAND,
        Ratio(USABLE_DECADES.name, _LORA, _SFT, _TEST), Region(low=1.0), "в декадах",
    )  # fmt: skip


def _rank_claims() -> Iterator[Claim]:
    for task in _TASKS:
        yield _claim(
            f"rank-1-behind-sft-{task}", "При недостаточном r LoRA отстаёт: с r = 1 loss больше, чем у SFT", _HARD,
            _tuned(_lora("rank_1"), _SFT, {**_TEST, "track": task}), _HIGHER, f"{_TASKS[task]}, {_TUNED}",
        )  # fmt: skip
    yield _claim(
        "rank-1-behind-rank-16", "LoRA нужен достаточный r: с r = 1 loss больше, чем с r = 16", _HARD,
        _tuned(_lora("rank_1"), _LORA), _HIGHER,
    )  # fmt: skip
    yield _claim(
        "rank-64-not-behind-sft",
        "При достаточном r LoRA хороша: с r = 64 loss больше, чем у SFT, не более чем на 2 %", _HARD,
        _tuned(_lora("rank_64"), _SFT), Region(low=-0.02),
    )  # fmt: skip
    gain = RelativeReduction(TUNED_LOSS.name, _LORA, _SFT, {"split": "test"})
    yield _claim(
        "behind-on-harder-task", "На сложной задаче LoRA отстаёт от SFT больше, чем на простой", _HARD,
        Interaction(gain, {"track": LM}, {"track": SENTIMENT}), _HIGHER,
        f"языковое моделирование против классификации, r = 16, {_TUNED}",
    )  # fmt: skip


def _batch_claims() -> Iterator[Claim]:
    large, small = {"variant": "batch_128"}, {"variant": "batch_4"}
    condition = f"128 против 4 примеров при равном их числе, {_TUNED}"
    yield _claim(
        "accuracy-falls-a-little-at-large-batch", "При большом batch точность LoRA немного снижается: на 0–5 %", _LARGE,
        RelativeReduction(TUNED_ACCURACY.name, large, small, {**_TEST, "method": "lora"}), Region(low=0.0, high=0.05),
        condition,
    )  # fmt: skip
    yield _claim(
        "loses-more-at-large-batch", "При большом batch LoRA теряет больше, чем SFT",
        f"{_LARGE[:-1]} (эффект усреднения градиентов на малом числе параметров)»",
        Interaction(_tuned(large, small), {"method": "lora"}, {"method": "full"}), _HIGHER, condition,
    )  # fmt: skip


def _classic_claims() -> Iterator[Claim]:
    where = {**_TEST, **_SFT}
    rates: tuple[Selector, ...] = tuple({"learning_rate": rate} for rate in SCALES["cpu"].learning_rates)
    too_high, usual = {"learning_rate": 1e-2}, {"learning_rate": 3.2e-5}
    yield _claim(
        "sft-too-high-rate-loses",
        "Слишком высокий learning rate (1e-2) снижает качество: loss не менее чем на 5 % больше, чем при подобранном",
        _TOO_HIGH, SelectedReduction(EVAL_LOSS.name, (too_high,), rates, {"track": SENTIMENT, **_SFT}),
        Region(high=-0.05), "SFT",
    )  # fmt: skip
    yield _claim(
        "sft-too-high-rate-destabilises",
        "Слишком высокий learning rate (1e-2) может дестабилизировать: не менее чем в 10 % случаев модель после "
        "обучения не лучше постоянного ответа",
        _TOO_HIGH, Rate(NO_GAIN.name, {**where, **too_high}), Region(low=0.1), "SFT",
    )  # fmt: skip
    yield _claim(
        "sft-usual-rate-near-best",
        "Типичный learning rate 2e-5 — 5e-5 подходит: при 3,2e-5 loss не более чем на 5 % хуже лучшего",
        "seed 004, «learning_rate: 2e-5 — 5e-5 (иногда меньше)»",
        Regret(EVAL_LOSS.name, usual, tuple(r for r in rates if r != usual), where), Region(high=0.05), "SFT",
    )  # fmt: skip


_SECTIONS = {
    "presets": (_preset_claims, _schedule_claims),
    "lecture": (_mlp_claims, _rate_claims, _rank_claims, _batch_claims),
    "classic": (_classic_claims,),
}
CLAIMS = tuple(
    dataclasses.replace(claim, section=section)
    for section, groups in _SECTIONS.items()
    for g in groups
    for claim in g()
)

EXPERIMENT = Experiment(
    name="lora_scaling",
    version=2,
    question="What do rank, alpha, targets, learning rate, batch size and schedule do to LoRA and fine-tuning?",
    claims=CLAIMS,
    scales=SCALES,
    trials=trials,
    run_trial=run_trial,
    cost=COST,
)
