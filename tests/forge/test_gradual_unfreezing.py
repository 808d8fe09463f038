"""GradualUnfreezing in the Trainer and in two processes; the page and the benchmark (section «Layer Freezing»)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.training_args import ParallelMode

from forge.freezing import GradualUnfreezing, _check_parallel, setup_lp_lora_style
from tests.forge import freezing_process
from tests.forge.freezing_process import make_model, make_trainer
from tests.forge.processes import ROOT, run_python, succeeded, torchrun
from tests.forge.tensors import same, weights_of


class Watch(TrainerCallback):
    """Before and after each step: what is trainable, the weights, and how many parameters have optimizer state."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.trainable: list[set[str]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.states: list[int] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.trainable.append({n for n, p in kw["model"].named_parameters() if p.requires_grad})
        if not self.weights:
            self.weights.append(weights_of(kw["model"]))

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.weights.append(weights_of(kw["model"]))
        self.states.append(len(kw["optimizer"].state))
        if state.global_step == self.stop_at:
            control.should_training_stop = control.should_save = True

    def moved(self, step: int) -> set[str]:
        """Names of what step ``step`` (from 0) has changed."""
        before, after = self.weights[step : step + 2]
        return {name for name in before if not torch.equal(before[name], after[name])}


def layers_in(names: set[str]) -> list[int]:
    return sorted({int(found[1]) for name in names if (found := re.search(r"\.(?:layers|h)\.(\d+)\.", name))})


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    ("options", "frozen_per_step"),
    [
        ({}, [3, 3, 3, 2, 2, 2, 1, 1, 1]),
        ({"top_layers": 2, "every": 2, "unit": "step"}, [2, 2, 1, 1, 0, 0, 0, 0, 0]),
        ({"every": 2}, [3, 3, 3, 3, 3, 3, 2, 2, 2]),
        ({"layers_per_stage": 3}, [3, 3, 3, 0, 0, 0, 0, 0, 0]),
    ],
)
def test_stages_move_exactly_the_layers_that_are_due(
    tmp_path: Path, options: dict[str, Any], frozen_per_step: list[int], accumulation: int
) -> None:
    watch, batch = Watch(), 4 // accumulation
    settings = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": batch}
    trainer = make_trainer(tmp_path, GradualUnfreezing(**options), watch, **settings)
    everything = {name for name, _ in trainer.model.named_parameters()}
    trainer.train()
    for step, frozen in enumerate(frozen_per_step):
        upper = list(range(frozen, 4))
        assert layers_in(watch.trainable[step]) == layers_in(watch.moved(step)) == upper, step
        assert watch.moved(step) == watch.trainable[step]
        assert watch.states[step] == len(watch.trainable[step])
        assert {"lm_head.weight", "model.norm.weight"} <= watch.moved(step)
        if frozen:
            assert "model.embed_tokens.weight" not in watch.moved(step)
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == everything


def test_embeddings_come_last_and_take_a_tied_head_along(tmp_path: Path) -> None:
    watch = Watch()
    make_trainer(tmp_path, GradualUnfreezing(3, every=3, unit="step"), watch, model=make_model("gpt2")).train()
    assert [layers_in(names) for names in watch.trainable[::3]] == [[1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert ["transformer.wte.weight" in names for names in watch.trainable[::3]] == [False, False, True]
    assert ["transformer.wpe.weight" in names for names in watch.trainable[::3]] == [False, False, True]


def test_a_stage_trains_as_the_trainer_does_with_the_same_parameters_frozen(tmp_path: Path) -> None:
    watch, gradual = Watch(), GradualUnfreezing(4, every=100, unit="step")
    make_trainer(tmp_path, gradual, watch).train()
    plain = Watch()
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    make_trainer(tmp_path, plain, model=model).train()
    assert all(same(left, right) for left, right in zip(watch.weights, plain.weights, strict=True))


@pytest.mark.parametrize(
    ("unit", "family", "stop_at"),
    [("step", "llama", 3), ("step", "gpt2", 4), ("epoch", "llama", 3), ("epoch", "gpt2", 5)],
)
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path, unit: Any, stop_at: int, family: str) -> None:
    def run(folder: str, *callbacks: TrainerCallback, **resume: Any) -> Any:
        gradual = GradualUnfreezing(2, every=2 if unit == "step" else 1, unit=unit)
        trainer = make_trainer(tmp_path / folder, gradual, *callbacks, model=make_model(family))
        trainer.train(**resume)
        return trainer

    whole = run("whole")
    run("parts", Watch(stop_at))
    watch = Watch()
    resumed = run("parts", watch, resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{stop_at}"))
    assert len(watch.states) == 9 - stop_at
    assert same(weights_of(whole.model), weights_of(resumed.model))
    left, right = (t.optimizer.state_dict()["state"] for t in (whole, resumed))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[p]["exp_avg_sq"], right[p]["exp_avg_sq"]) for p in left)


def test_peft_models_unfreeze_adapters_only(tmp_path: Path) -> None:
    watch = Watch()
    model = get_peft_model(make_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer(tmp_path, GradualUnfreezing(1, every=3, unit="step"), watch, model=model)
    trainer.train()
    assert [layers_in(names) for names in watch.trainable[::3]] == [[3], [2, 3], [1, 2, 3]]
    assert all(names <= adapters for names in watch.trainable)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapters


def test_what_two_layers_share_joins_with_the_lower_one(tmp_path: Path) -> None:
    """As in Zamba, whose blocks share their attention."""
    model, watch = make_model(), Watch()
    model.model.layers[2].mlp = model.model.layers[0].mlp
    make_trainer(tmp_path, GradualUnfreezing(2, every=3, unit="step"), watch, model=model).train()
    assert [layers_in(names) for names in watch.trainable[::3]] == [[2, 3], [1, 2, 3], [0, 1, 2, 3]]
    shared = {f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")}
    assert [shared <= names for names in watch.trainable[::3]] == [False, False, True]


def test_what_was_frozen_before_stays_frozen_and_takes_no_stage(tmp_path: Path) -> None:
    model, watch = make_model(), Watch()
    setup_lp_lora_style(model, 0.5)
    make_trainer(tmp_path, GradualUnfreezing(), watch, model=model).train()
    assert [layers_in(names) for names in watch.trainable[::3]] == [[3], [2, 3], [2, 3]]


@pytest.mark.parametrize("kind", [True, False])
def test_checkpointing_changes_nothing(tmp_path: Path, kind: bool) -> None:
    plain, watch = Watch(), Watch()
    make_trainer(tmp_path, GradualUnfreezing(), plain).train()
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": kind}}
    make_trainer(tmp_path, GradualUnfreezing(), watch, **options).train()
    assert [watch.moved(step) for step in range(9)] == [plain.moved(step) for step in range(9)]
    for name, weight in plain.weights[-1].items():
        torch.testing.assert_close(watch.weights[-1][name], weight)


def test_a_second_training_starts_from_the_top_again_also_after_an_error(tmp_path: Path) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
            raise RuntimeError("failed here")

    gradual, watch, fail = GradualUnfreezing(), Watch(), Fail()
    trainer = make_trainer(tmp_path, gradual, watch, fail)
    with pytest.raises(RuntimeError, match="failed here"):
        trainer.train()
    trainer.remove_callback(fail)
    trainer.train()
    assert [layers_in(names) for names in watch.trainable[:2]] == [[3], [3]]
    assert gradual.frozen_levels == 0 and all(p.requires_grad for p in trainer.model.parameters())


# Processes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [[], pytest.param(["checkpointing"], marks=pytest.mark.slow)])
def test_two_processes_train_as_one(tmp_path: Path, checkpointing: list[str]) -> None:
    succeeded(torchrun(freezing_process.__file__, tmp_path, 2, *checkpointing))
    first, second = (torch.load(tmp_path / f"weights-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert same(first, second)
    freezing_process.train(tmp_path, 4)
    for name, weight in torch.load(tmp_path / "weights-0.pt", weights_only=True).items():
        torch.testing.assert_close(first[name], weight, rtol=1e-3, atol=1e-4)


# Bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["top_layers", "every", "layers_per_stage"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1"])
def test_numbers_that_are_none_are_refused(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option} must be a whole number of at least 1, got {value!r}"):
        GradualUnfreezing(**{option: value})


def test_another_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="unit must be 'epoch' or 'step', got 'steps'"):
        GradualUnfreezing(unit="steps")  # type: ignore[arg-type]


@pytest.mark.parametrize("top_layers", [5, 12])
def test_nothing_to_unfreeze_is_refused(tmp_path: Path, top_layers: int) -> None:
    trainer = make_trainer(tmp_path, GradualUnfreezing(top_layers))
    with pytest.raises(ValueError, match=rf"less than the 5 layers that train .* got {top_layers}; leave Gradual"):
        trainer.train()


def test_an_optimizer_that_lacks_parameters_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, GradualUnfreezing())
    trainer.optimizer = torch.optim.SGD(trainer.model.lm_head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer must hold every parameter that is to be unfrozen"):
        trainer.train()


def test_adalora_is_refused(tmp_path: Path) -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], total_step=10, init_r=4, target_r=2, tfinal=2)
    trainer = make_trainer(tmp_path, GradualUnfreezing(), model=get_peft_model(make_model(), config))
    with pytest.raises(ValueError, match="every adapter must train under AdaLoRA"):
        trainer.train()


def test_ddp_that_does_not_look_for_unused_parameters_is_refused() -> None:
    settings = {"deepspeed": None, "fsdp": [], "ddp_find_unused_parameters": None}
    args: Any = SimpleNamespace(parallel_mode=ParallelMode.DISTRIBUTED, **settings)
    model = make_model()
    _check_parallel(args, model)
    model.activation_checkpointing_enable()
    with pytest.raises(NotImplementedError, match="needs ddp_find_unused_parameters=True, got False"):
        _check_parallel(args, model)
    args.fsdp = ["full_shard"]
    with pytest.raises(NotImplementedError, match="needs whole parameters, got sharded"):
        _check_parallel(args, model)


# The page and the benchmark -------------------------------------------------------------------------------------------


def test_the_snippets_of_the_page_run_and_print_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "freezing.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(snippets) == 4
    namespace: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, namespace)
    said = re.search(r"print\(report\)  # (.*)", snippets[0])
    assert said and said[1] in capsys.readouterr().out


def test_what_the_page_says_of_smollm2() -> None:
    with torch.device("meta"):
        sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49_152}
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
        models = [LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=True)) for _ in range(2)]
    total = sum(p.numel() for p in models[0].parameters())
    assert round(100 * models[0].lm_head.weight.numel() / total) == 21
    layers = setup_lp_lora_style(models[0], freeze_embeddings=False).frozen_params
    both = setup_lp_lora_style(models[1]).frozen_params
    assert (round(100 * layers / total), round(100 * both / total)) == (39, 61)


def test_the_benchmark_runs(tmp_path: Path) -> None:
    options = ["--model-size", "tiny", "--rounds", "6", "--sequence-length", "8", "--json", tmp_path / "ms.json"]
    succeeded(run_python(ROOT / "benchmarks" / "freezing.py", *options))
    figures = json.loads((tmp_path / "ms.json").read_text())
    assert [row["ratio"] for row in figures["rows"]] == [0.0, 0.5, 0.75]
    assert figures["rows"][0]["of_full_step"] == 1.0 and all(len(times) == 6 for times in figures["ms"].values())
