"""docs/claims.md: computed, complete, and with no pattern that names no claim."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis import claims_page
from analysis.claims_page import PAGE, ROOT, SENTENCES, all_findings, matching, page

FINDINGS = all_findings(ROOT / "results")[0]


def test_the_committed_page_agrees_with_the_committed_results(tmp_path: Path) -> None:
    out = tmp_path / "docs" / "claims.md"
    assert claims_page.main(["--out", str(out)]) == 0
    assert out.read_bytes() == PAGE.read_bytes()


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda s: f"{s.seed}-{s.line}")
def test_every_pattern_names_a_claim(sentence: claims_page.Sentence) -> None:
    by_id = {finding.claim.id: finding for finding in FINDINGS}
    for pattern in sentence.claims:
        assert matching(claims_page.Sentence("", 0, "", (pattern,)), by_id), pattern
    assert not (sentence.claims and sentence.kind)


def test_every_claim_on_averaging_and_monitoring_belongs_to_a_sentence() -> None:
    """Or is a sentence of our own."""
    told = {
        finding.claim.id: finding
        for finding in FINDINGS
        if finding.claim.section in ("ema", "monitor") and not finding.claim.source.startswith("собственное")
    }
    of_sentences = {claim for sentence in SENTENCES for claim in matching(sentence, told)}
    assert set(told) == of_sentences


def test_without_evidence_all_claims_are_open() -> None:
    findings, _ = all_findings(Path("no-such-folder"))
    assert f"{len(findings)} claims: 0 have evidence, **{len(findings)} are open**." in page(findings)
