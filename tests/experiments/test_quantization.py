"""Four bits: the quantiser against hand-worked blocks and bitsandbytes, and the experiment's own promises."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from analysis.estimands import per_seed_values
from analysis.load import load_campaigns
from experiments.harness.experiment import UserError
from experiments.harness.models import load_classifier
from experiments.harness.record import Measurements
from experiments.quantization import CLAIMS, EXPERIMENT, SCALES, Classifier, LanguageModel, Settings, _checks, trials
from experiments.run import main
from experiments.worlds import quantised as q
from experiments.worlds.quantised import Scheme, dequantised, levels_of

SMOKE = SCALES["smoke"]
TINY = SMOKE.classifier


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return load_classifier("tiny-random-encoder", 2)


@pytest.mark.parametrize(
    ("name", "magnitudes"),
    [
        ("e2m1", [0, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1]),
        ("fp4", [0, 1 / 192, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1]),
        ("e3m0", [0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]),
        ("int4", [level / 7 for level in range(8)]),
    ],
)
def test_levels_are_signed_magnitudes(name, magnitudes):
    expected = [-m for m in reversed(magnitudes[1:])] + magnitudes
    assert levels_of(name).tolist() == pytest.approx(expected, rel=1e-6)


def test_nf4_has_sixteen_levels_and_is_not_symmetric():
    levels = levels_of("nf4")
    assert len(levels) == 16 and (levels[0], levels[-1]) == (-1, 1) and 0 in levels
    assert (levels < 0).sum() == 7 and (levels > 0).sum() == 8


def test_an_unknown_format_is_refused():
    with pytest.raises(ValueError, match=r"format must be one of nf4, fp4, e2m1, e3m0, int4, got 'nf5'"):
        levels_of("nf5")


def test_a_block_by_hand():
    block = torch.zeros(64)
    block[:5] = torch.tensor([7.0, 3.4, -0.6, -6.6, 0.4])
    assert dequantised(block, Scheme("int4"))[:5].tolist() == pytest.approx([7, 3, -1, -7, 0], abs=1e-5)
    assert dequantised(block, Scheme("e3m0"))[:5].tolist() == pytest.approx([7, 3.5, -7 / 16, -7, 7 / 16])


@pytest.mark.parametrize("name", q.FORMATS)
def test_every_weight_goes_to_the_nearest_level_of_its_block(name):
    weight, levels = gaussian(10, 64), levels_of(name)
    scale = weight.abs().amax(dim=1, keepdim=True)
    errors = (weight / scale - dequantised(weight, Scheme(name)) / scale).abs()
    nearest = ((weight / scale)[..., None] - levels).abs().amin(dim=-1)
    torch.testing.assert_close(errors, nearest, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", q.FORMATS)
def test_what_is_in_four_bits_stays_as_it_is(name):
    once = dequantised(gaussian(32, 96), Scheme(name))
    assert torch.equal(dequantised(once, Scheme(name)), once)
    assert q.values_per_block(once).max() <= 16 < q.values_per_block(gaussian(32, 96)).min()


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", q.IN_BITSANDBYTES)
@pytest.mark.parametrize("shape", [(64, 64), (48, 176), (4, 5)])
def test_bitsandbytes_stores_the_same_weights(name, double, shape):
    weight, scheme = gaussian(*shape), Scheme(name, double)
    assert torch.equal(dequantised(weight, scheme), q.by_bitsandbytes(weight, scheme))


def test_uniform_weights_have_the_error_of_a_uniform_step():
    """A step of 1/7 of the largest magnitude has the standard deviation 1/(7·√12)."""
    weight = 2 * torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) - 1
    assert q.relative_error(dequantised(weight, Scheme("int4")), weight) == pytest.approx(
        3**0.5 / 7 / 12**0.5, rel=0.03
    )


def test_double_quantisation_changes_scales_a_little_and_codes_not_at_all():
    weight = gaussian(256, 256)
    single, double = (dequantised(weight, Scheme("nf4", d)).view(-1, 64) for d in (False, True))
    ratio = double.abs().amax(dim=1) / single.abs().amax(dim=1)
    assert 0 < (ratio - 1).abs().max() < 0.05
    torch.testing.assert_close(double, single * ratio[:, None])


@pytest.mark.parametrize("weight", [torch.zeros(64), torch.zeros(3, 100)])
def test_zero_weights_stay_zero(weight):
    for scheme in q.FORMAT_SCHEMES.values():
        assert torch.equal(dequantised(weight, dataclasses.replace(scheme, double=False)), weight)


def real_layer(linear, scheme):
    options = {"compress_statistics": scheme.double, "quant_type": scheme.name}
    layer = Linear4bit(linear.in_features, linear.out_features, compute_dtype=scheme.compute, device="meta", **options)
    layer.weight = Params4bit(linear.weight.data, requires_grad=False, **options)
    layer.bias = nn.Parameter(linear.bias.data.clone(), requires_grad=False)
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu").eval()


@pytest.mark.parametrize(
    "scheme", [*q.COMPUTE.values(), Scheme("nf4"), Scheme("nf4", double=True), Scheme("fp4", compute=torch.bfloat16)]
)
@torch.no_grad()
def test_layers_compute_as_linear4bit_does(scheme):
    torch.manual_seed(0)
    linear, inputs = nn.Linear(128, 64), gaussian(3, 5, 128)
    before = linear(inputs)
    with q.quantised({"": linear}, scheme):
        within = linear(inputs)
    assert torch.equal(within, real_layer(linear, scheme)(inputs)) and within.dtype == torch.float32
    assert not torch.equal(within, before) and torch.equal(linear(inputs), before)


def test_weights_return_after_an_error():
    linear = nn.Linear(64, 64)
    before = (linear.weight.data, linear.bias.data)
    with pytest.raises(RuntimeError, match="stop"), q.quantised({"": linear}, q.COMPUTE["nf4_fp16"]):
        assert linear.weight.dtype == torch.float16
        raise RuntimeError("stop")
    assert linear.weight.data is not None and linear.weight.data_ptr() == before[0].data_ptr()
    assert linear.bias.data_ptr() == before[1].data_ptr()
    assert not linear._forward_hooks and not linear._forward_pre_hooks


def test_all_linear_layers_but_the_head_are_quantised(encoder):
    names = set(q.linears_of(encoder))
    assert len(names) == 2 * 6 + 1 and "bert.pooler.dense" in names and "classifier" not in names


def test_a_model_without_linear_layers_is_refused():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    model = GPT2ForSequenceClassification(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=20))
    with pytest.raises(UserError, match=r"got none in GPT2ForSequenceClassification; choose another with --model"):
        q.linears_of(model)


@pytest.mark.parametrize(("double", "per_weight"), [(False, 4 + 32 / 64), (True, 4 + 8 / 64 + 32 / (64 * 256))])
def test_stored_bits_are_those_of_the_paper(double, per_weight):
    linears = {"a": nn.Linear(512, 256), "b": nn.Linear(256, 512)}
    stored, weights = q.stored_bits(linears, double=double), 2 * 512 * 256
    assert stored.bits == stored.bits_by_arithmetic == per_weight * weights + (2 * 32 if double else 0)
    assert stored.nested_layers == (2 if double else 0)
    assert stored.file_bits > stored.bits


def test_layer_outputs_are_compared_on_the_inputs_of_the_unquantised_model(encoder):
    scheme, ids = Scheme("int4"), torch.arange(12).view(2, 6)
    linears = q.linears_of(encoder)
    ((name, first),) = list(linears.items())[:1]
    inputs = []
    hook = first.register_forward_hook(lambda _, given, __: inputs.append(given[0]))
    encoder.eval()
    with torch.no_grad():
        encoder.base_model(ids)
    hook.remove()
    with torch.no_grad():
        truth = first(inputs[0])
        with q.quantised({name: first}, scheme):
            expected = q.relative_error(first(inputs[0]), truth)
    assert q.layer_output_error(encoder, {name: first}, [ids], scheme) == pytest.approx(expected, rel=1e-4)
    together, by_layer = q.weight_errors(linears, scheme)
    assert min(by_layer.values()) < together < max(by_layer.values()) and set(by_layer) == set(linears)
    assert by_layer[name] == pytest.approx(q.relative_error(dequantised(first.weight.data, scheme), first.weight.data))


def test_batches_hold_every_token_once_and_no_padding():
    from experiments.harness.data import Examples

    texts = ([1], [2, 3], [4], [5, 6], [7], [8, 9, 10])
    examples = Examples(texts, torch.zeros(6).numpy(), tuple("abcdef"))
    batches = q.batches_of(examples, 5, 2, torch.device("cpu"))
    assert [batch.tolist() for batch in batches] == [[[1], [4]], [[7]], [[2, 3], [5, 6]]]


@pytest.mark.parametrize(
    ("scale", "count"), [("smoke", 1 + 1 + 2), ("laptop", 1 + 3), ("cpu", 1 + 8), ("gpu", 22), ("paper", 7)]
)
def test_the_deterministic_tracks_are_run_once(scale, count):
    plan = trials(SCALES[scale], scale)
    assert len({spec.trial_id for spec in plan}) == len(plan) == count
    assert len({spec.campaign_id for spec in plan}) == 1 and plan[0].factors == {"track": "pretrained"}
    more = trials(dataclasses.replace(SCALES[scale], seeds=SCALES[scale].seeds + 1), scale)
    assert [spec.trial_id for spec in more][:count] == [spec.trial_id for spec in plan]


def test_claims_are_named_for_their_section():
    assert all(claim.id.startswith("quant-") and claim.section == "quantization" for claim in CLAIMS)
    assert len(CLAIMS) == 5 * 4 + 4 + 3 + 3 and {claim.estimand.where["track"] for claim in CLAIMS} == {
        "pretrained", "classifier", "language_model",
    }  # fmt: skip


class Context:
    def __init__(self, work_dir):
        self.work_dir = work_dir

    def report(self, step, total, **figures):
        return None

    def should_stop(self):
        return False

    def wandb_run_id(self):
        return None


@pytest.fixture(scope="module")
def measure(tmp_path_factory):
    def run(track, **changes) -> Measurements:
        settings = dataclasses.replace(SMOKE, seeds=1, classifier=dataclasses.replace(TINY, **changes))
        (spec,) = [spec for spec in trials(settings, "smoke") if spec.factors["track"] == track]
        return EXPERIMENT.run_trial(spec, Context(tmp_path_factory.mktemp("work")))

    return run


@pytest.fixture(scope="module")
def pretrained(measure):
    return measure("pretrained")


def values(measurements, metric, **conditions):
    rows = [o.model_dump() for o in measurements.observations if o.metric == metric]
    return {
        row.get("arm"): row["value"] for row in rows if all(row.get(key) == level for key, level in conditions.items())
    }


def test_the_pretrained_track_measures_every_arm(pretrained):
    for quantity, arms in (
        ("weights", q.FORMAT_SCHEMES),
        ("layer_outputs", q.FORMAT_SCHEMES),
        ("hidden_state", q.SCHEMES),
    ):
        errors = values(pretrained, "relative_error", quantity=quantity)
        assert set(errors) == set(arms) and all(0 < error < 1 for error in errors.values())
    assert set(values(pretrained, "compute_error")) == set(q.COMPUTE)
    layers = {o.layer for o in pretrained.observations if o.metric == "layer_weight_error"}
    assert len(layers) == 13
    assert all(check.passed for check in pretrained.checks) and pretrained.diverged is None


def test_bits_of_the_tiny_encoder_follow_from_its_shapes(pretrained):
    shapes = 2 * [4096, 4096, 4096, 4096, 64 * 176, 176 * 64] + [4096]
    single = sum(4.5 * n for n in shapes)
    double = sum(4 * n + 8 * n / 64 + 32 * math.ceil(n / 64 / 256) + 32 for n in shapes)
    assert values(pretrained, "stored_bits") == {"nf4": single, "nf4_dq": double}
    assert values(pretrained, "bits_saved_by_double_quantisation") == {None: single - double}
    assert values(pretrained, "quantised_params") == {None: sum(shapes)}


def test_the_classifier_track_is_paired_and_repeats_bitwise(measure):
    first, second = measure("classifier"), measure("classifier")
    for part in ("observations", "examples", "checks", "digests", "tokens"):
        assert getattr(first, part) == getattr(second, part)
    loss, error = values(first, "eval_loss", split="test"), values(first, "relative_error", quantity="logits")
    assert set(loss) == set(error) == {"fp32", *q.SCHEMES} and error["fp32"] == 0 < min(set(error.values()) - {0})
    assert all(check.passed for check in first.checks)
    by_example = [e.value for e in first.examples if e.arm == "nf4"]
    assert sum(by_example) / len(by_example) == pytest.approx(loss["nf4"], rel=1e-12)


def test_adapters_are_merged_before_weights_are_quantised(measure):
    measured = measure("classifier", method="lora")
    assert all(check.passed for check in measured.checks) and measured.diverged is None


def failed(model, before=None):
    from experiments.harness.models import weights_sha256

    checks = _checks(model, q.linears_of(model), before or weights_sha256(model))
    return {check.name for check in checks if not check.passed}


def test_checks_notice_weights_that_were_quantised_before(encoder):
    assert failed(encoder) == set()
    for linear in q.linears_of(encoder).values():
        linear.weight.data = dequantised(linear.weight, Scheme("nf4"))
    assert failed(encoder) == {"values_in_a_block_before", "layers_left_unquantised"}


def test_checks_notice_a_treatment_without_effect(encoder, monkeypatch):
    real = q.dequantised
    assert failed(encoder, before="another") == {"weights_restored"}
    monkeypatch.setattr(q, "dequantised", lambda w, s: real(w, Scheme(s.name)))
    assert "layers_without_effect_of_double_quantisation" in failed(encoder)
    monkeypatch.setattr(q, "dequantised", lambda w, s: w.detach().clone())
    assert {"layers_left_unquantised", "values_in_a_block_of_four_bits"} <= failed(encoder)


def test_an_overflow_is_a_divergence_on_record(measure, monkeypatch):
    real = q.hidden_states
    monkeypatch.setattr(q, "hidden_states", lambda model, batches: real(model, batches) * math.inf)
    assert "relative_error is nan at {'arm': 'nf4'" in measure("pretrained").diverged


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Settings(seeds=0, classifier=TINY), "seeds must be at least 1, got 0"),
        (
            lambda: Settings(seeds=1, classifier=Classifier(model="smollm2-135m")),
            "weights must not have been quantised before, and those of smollm2-135m come from a 4-bit file; choose",
        ),
        (
            lambda: Settings(seeds=1, classifier=TINY, language_model=LanguageModel(model="smollm2-135m")),
            "weights must not have been quantised before",
        ),
        (lambda: Classifier(activation_examples=0), "activation_examples must be at least 1, got 0"),
        (lambda: Classifier(steps=0), "steps must be at least 1, got 0"),
        (lambda: LanguageModel(test_blocks=0), "test_blocks must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(build, words):
    with pytest.raises(UserError) as error:
        build()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_model_is_one_line_on_the_command_line(capsys, tmp_path):
    places = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    assert main(["quantization", "--scale", "cpu", "--model", "smollm2-135m", *places]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: weights must not have been quantised before") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_claims_can_be_estimated_from_smoke_records(inline_cli, tmp_path):
    assert inline_cli("quantization", "--scale", "smoke", "--wandb", "disabled") == 0
    ((campaign,), problems) = load_campaigns(tmp_path / "results")
    assert problems == [] and len(campaign.ok_records) == campaign.n_planned == 4
    for claim in CLAIMS:
        estimates = per_seed_values(claim.estimand, campaign.observations)
        assert len(estimates) == (2 if claim.estimand.where["track"] == "classifier" else 1), claim.id
