"""Transformers Forge: fine-tuning techniques for any Hugging Face model, as a library.

Nothing here knows of experiments. Submodules are imported by name (``from forge.ema import EMACallback``), so that
importing ``forge`` itself stays free of torch.
"""
