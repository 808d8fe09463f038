"""Experiments: one file per question, each a pre-registration (claims) and a design (trials, scales)."""
