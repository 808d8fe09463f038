"""From committed trial records to estimates, verdicts, tables and THEORY.md; never trains, never imports torch."""
