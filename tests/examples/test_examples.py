"""The guides' scripts run from end to end on a tiny model, and do what they say."""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))

GUIDE_NAMES = {
    "train_with_forge": """AutoModelForCausalLM AutoTokenizer DATASET_NAME EMACallback MODEL_NAME MonitorCallback
        OUTPUT_DIR Trainer apply_ema args batched callbacks check_gradients dataset decay device_map ema_callback
        eos_token eval_dataset example freeze_ratio from_pretrained get get_bnb_config get_lora_config get_peft_model
        get_preset get_training_args learning_rate load_dataset lora_alpha lora_r map max_length model monitor_callback
        num_train_epochs output_dir pad_token padding prepare_model_for_kbit_training preset print print_info
        print_model_info quantization_config save_pretrained setup_lp_lora_style tokenize tokenizer train train_dataset
        trainer training_args truncation""",
    "ema_guide": """EMACallback EMAModel Trainer TrainingArguments apply_ema args backward batch callbacks checkpoint
        compute_optimal_decay dataloader dataset decay ema ema_callback ema_state epoch eval_dataset eval_results
        evaluate get_ema_state load load_ema_state load_state_dict loss model num_train_epochs optimizer output_dir
        outputs per_device_train_batch_size print range save save_pretrained state_dict step torch total_steps train
        train_dataset trainer update use_ema zero_grad""",
    "classic_finetuning": """AutoModelForCausalLM AutoTokenizer Trainer TrainingArguments args from_pretrained
        logging_dir model num_train_epochs output_dir padding per_device_train_batch_size tokenizer train train_dataset
        train_encodings train_texts trainer training_args truncation""",
}
"""Every name, attribute and keyword in the guide's code."""

REPLACED = {
    "load_dataset": "the embedded text: load_corpus, which reads hub data sets too",
    "logging_dir": "gone from transformers 5",
}


def names_in(code: str) -> set[str]:
    """Names, attributes, imports, keywords and functions."""
    fields = {"Name": "id", "Attribute": "attr", "alias": "name", "keyword": "arg", "FunctionDef": "name"}
    nodes = ast.walk(ast.parse(code))
    return {getattr(node, fields[type(node).__name__]) for node in nodes if type(node).__name__ in fields}


def command_line(name: str, folder: Path, output: Path, *more: str) -> list[str]:
    return [f"examples/{name}.py", "--model", str(folder), "--output-dir", str(output), "--max-length", "64", *more]


@pytest.fixture
def run_here(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run an example in this process and return its variables; its output goes to ``tmp_path``."""

    def run(name: str, *more: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", command_line(name, model_folder, tmp_path, *more))
        return runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="example")

    return run


def run_alone(*arguments: str, timeout_sec: int = 600) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_sec, check=False
    )


def messages(stderr: str) -> list[str]:
    """Lines on standard error that are no progress bar."""
    lines = re.split(r"[\r\n]+", stderr)
    return [line for line in lines if line.strip() and not re.search(r"\d+%\||it/s|s/it", line)]


def test_every_example_is_here() -> None:
    assert set(EXAMPLES) == set(GUIDE_NAMES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_name_of_the_guide_is_lost(name: str) -> None:
    lost = set(GUIDE_NAMES[name].split()) - names_in((ROOT / "examples" / f"{name}.py").read_text())
    assert lost <= set(REPLACED)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_readme_names_every_example(name: str) -> None:
    assert f"{name}.py" in (ROOT / "examples" / "README.md").read_text()


def test_classic_finetuning_alone(model_folder: Path, tmp_path: Path) -> None:
    """As a user runs it: a process of its own, exit code 0, no storm of warnings."""
    done = run_alone(*command_line("classic_finetuning", model_folder, tmp_path, "--max-steps", "6"))
    assert done.returncode == 0, done.stderr
    assert "6 steps on moby_dick, not evidence" in done.stdout
    before, after = map(float, re.findall(r"(?:before|after) (\d+\.\d+)", done.stdout))
    assert after < before
    assert len(messages(done.stderr)) <= 8, done.stderr
    trained, raw = (load_file(path / "model.safetensors") for path in (tmp_path / "checkpoint-6", model_folder))
    assert all(tensor.dtype == torch.float32 for tensor in trained.values())
    assert not any(torch.equal(trained[name], raw[name]) for name in raw)


def test_ema_guide(run_here: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = run_here("ema_guide", "--max-steps", "6")
    out = capsys.readouterr().out
    assert "two runs of 6 steps" in out and "99% of the average is still the initial weights" in out
    assert out.count("Epoch ") == 3 and "0.9993" in out
    assert left["ema"].step == 6

    best = load_file(tmp_path / "best_model" / "model.safetensors")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert checkpoint["ema"]["step"] == 6
    for name, average in checkpoint["ema"]["averages"]["0.999"].items():
        assert torch.equal(average, best[name])
        assert not torch.equal(checkpoint["model"][name], best[name])


def test_train_with_forge(run_here: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = run_here("train_with_forge", "--max-steps", "2", "--dataset", "movie_sentiment")
    out = capsys.readouterr().out
    assert "2 steps on movie_sentiment, not evidence" in out and "qlora" in out and "✅ Done!" in out
    saved = load_file(tmp_path / "final_model" / "adapter_model.safetensors")
    assert (tmp_path / "final_model" / "tokenizer.json").is_file()

    averages = {name.replace(".default", ""): t for name, t in left["ema_callback"].ema.averages().items()}
    assert averages and all(".layers.1." in name and "lora_" in name for name in averages)
    assert all(torch.equal(saved[name], average) for name, average in averages.items())
    frozen = {name: t for name, t in saved.items() if ".layers.0." in name and "lora_B" in name}
    assert frozen and not any(t.any() for t in frozen.values())
    assert any(t.any() for name, t in averages.items() if "lora_B" in name)
    assert [record.step for record in left["monitor_callback"].history] == [1, 2]

    rows = left["dataset"]["train"].remove_columns("text").select(range(40))
    batch = left["trainer"].data_collator(list(rows))
    assert batch["input_ids"].shape == (40, 64)
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert (batch["labels"] == -100).any() and (batch["labels"][:, 0] != -100).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_with_the_embedded_defaults(name: str, tmp_path: Path) -> None:
    """SmolLM2-135M, as ``make examples`` runs it."""
    done = run_alone(f"examples/{name}.py", "--output-dir", str(tmp_path), timeout_sec=900)
    assert done.returncode == 0, done.stderr
    assert "not evidence" in done.stdout
    assert len(messages(done.stderr)) <= 12, done.stderr
