"""Generation token by token, with and without a KV cache: operations, time, and whether the logits are the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.harness.cost import timed, times_in_turn
from experiments.harness.experiment import TrialContext, UserError
from experiments.harness.mechanics import observe_difference
from experiments.harness.record import ManipulationCheck, Measurements, Metric, Observation, TrialSpec
from experiments.harness.tasks import Run

DECODING_FLOPS = Metric("decoding_flops", "FLOP", "minimize")
DECODING_TIME = Metric("decoding_time_sec", "s", "minimize")
CACHED, UNCACHED = "cached", "uncached"


class GenerationFlops:
    """Counts the operations of generating one token; the model has no weights, and nothing is computed.

    Args:
        config: of a causal language model with key-value heads.
    """

    def __init__(self, config: Any) -> None:
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            self._model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()

    def at(self, context: int, arm: str) -> dict[str, int]:
        """Operations of the ``attention`` (scores and their product with the values) and of the whole ``step``.

        Args:
            context: tokens of the text, the last of which is new.
            arm: ``cached`` (keys and values of all others are stored) or ``uncached``.
        """
        new = 1 if arm == CACHED else context
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            self._model(
                input_ids=torch.zeros(1, new, dtype=torch.long),
                attention_mask=torch.zeros(1, 1, new, context),  # a ready mask: none is derived from (absent) data
                past_key_values=self._cache(context - 1) if arm == CACHED else None,
                use_cache=arm == CACHED,
                logits_to_keep=1,
            )
        counts = counter.get_flop_counts()
        attention = [ops for name, ops in counts.items() if name.endswith(".self_attn")]
        return {
            "attention": sum(count for ops in attention for op, count in ops.items() if "bmm" in str(op)),
            "step": sum(counts["Global"].values()),
        }

    def _cache(self, length: int) -> Any:
        from transformers import DynamicCache

        config = self._model.config
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            stored = torch.empty(1, config.num_key_value_heads, length, _head_dim(config))
            cache.update(stored, stored, layer)
        return cache


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def observe_flops(into: Measurements, config: Any, longest: int) -> None:
    """Add the operations of a generation step at contexts up to ``longest``, and of all steps until there.

    Every context is counted; eight a decade are recorded, under ``part`` (attention, step) and ``span`` (one, all).
    The step of the observation is the context.
    """
    counter = GenerationFlops(config)
    recorded = {max(1, round(longest * 10 ** (-place / 8))) for place in range(17)}
    for arm in (CACHED, UNCACHED):
        total = {"attention": 0, "step": 0}
        for context in range(1, longest + 1):
            for part, flops in counter.at(context, arm).items():
                total[part] += flops
                if context in recorded:
                    for span, value in (("one", flops), ("all", total[part])):
                        into.observations.append(
                            Observation.of(DECODING_FLOPS, value, context, arm=arm, part=part, span=span)
                        )


def observe_decoding(into: Measurements, model: Any, text: Tensor, contexts: tuple[int, ...], rounds: int) -> None:
    """Add the time of a generation step with and without a cache, in turn, and how far their logits differ.

    Checks say that one token goes in with a cache, and that the cache has the bytes of keys and values:
    2 · layers · key-value heads · head dimension · tokens · bytes of a number.

    Args:
        into: gets observations and checks.
        model: causal language model in fp32.
        text: token ids, shape (1, tokens), at least as long as the longest context.
        contexts: tokens of the text when the step is taken, each at least 2.
        rounds: timed steps of each arm.
    """
    model.eval()
    for context in contexts:
        ids = text[:, :context].to(next(model.parameters()).device)
        with torch.no_grad():
            _observe_at(into, model, ids, rounds)


def _observe_at(into: Measurements, model: Any, ids: Tensor, rounds: int) -> None:
    context = ids.shape[1]
    cache = model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    with _tokens_in(model) as widths:
        cached = next_logits(model, ids, cache)
    into.checks += ManipulationCheck.each(
        **{
            f"cache_bytes {context}": (cache_bytes(model.config, context - 1), size),
            f"tokens_in {context}": ([1], widths),
        }
    )
    _forget_new(cache, context - 1)
    observe_difference(into, cached, next_logits(model, ids), arm=CACHED, context=context)
    work = {CACHED: partial(next_logits, model, ids, cache), UNCACHED: partial(next_logits, model, ids)}

    def piece(arm: str, _: int) -> float:
        seconds = timed(work[arm])
        _forget_new(cache, context - 1)
        return seconds

    seconds = times_in_turn(work, rounds, piece)
    for arm, value in seconds.items():
        into.observations.append(Observation.of(DECODING_TIME, value, 0, arm=arm, context=context))


def next_logits(model: Any, ids: Tensor, cache: Any = None) -> Tensor:
    """Logits of the token after ``ids``; with a cache of all but the last of them, only that one goes in."""
    if cache is None:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1]  # type: ignore[no-any-return]
    return model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]  # type: ignore[no-any-return]


def _forget_new(cache: Any, length: int) -> None:
    """Leave the first ``length`` tokens in the cache."""
    if cache.get_seq_length() > length:
        cache.crop(length - cache.get_seq_length())


def cache_bytes(config: Any, tokens: int, element_bytes: int = 4) -> int:
    """Bytes of keys and values of a text."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * _head_dim(config)
    return int(per_token * tokens * element_bytes)


@contextmanager
def _tokens_in(model: nn.Module) -> Iterator[list[int]]:
    """Tokens that each forward pass gets."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


def measure_generation_flops(
    spec: TrialSpec, context: TrialContext, run: Run, ingredients: Any, into: Measurements
) -> None:
    """Operations of generating a token at every length of the text."""
    observe_flops(into, ingredients.model.config, spec.settings["counted_context"])


def measure_generation(spec: TrialSpec, context: TrialContext, run: Run, ingredients: Any, into: Measurements) -> None:
    """Time and logits of generating a token, on a text that differs by seed."""
    contexts = tuple(spec.settings["timed_contexts"])
    longest, tokens = max(contexts), ingredients.train.input_ids.reshape(1, -1)
    if (spec.seed + 1) * longest > tokens.size:
        raise UserError(f"timed_contexts must fit into {tokens.size} tokens of {run.dataset}, got {longest} a seed")
    text = torch.from_numpy(tokens[:, spec.seed * longest : (spec.seed + 1) * longest])
    observe_decoding(into, ingredients.model, text, contexts, spec.settings["timed_rounds"])
