"""The Anti-Collapse page: claims on made-up sweeps, and the page of their file."""

from claims import collapse_findings
from experiments_cases import CLEAR, made_up
from report import page_with_report, report

from fewshot_ext.experiments.collapse import write_collapse

HEAD = {"data": {"name": "digits", "sha256": "0"}, "versions": {"torch": "2"}}


def test_claims_are_shown_contradicted_or_left_open():
    verdicts = {finding.claim: finding.verdict for finding in collapse_findings({"rows": made_up(CLEAR)})}
    assert len(verdicts) == 8
    assert verdicts["Recall@1 on unseen classes rises (triplet, pair 0.1)"] == "shown"
    assert verdicts["Recall@1 on unseen classes rises (ProxyAnchor, batch_proxy 1)"] == "contradicted"
    open_question = dict(CLEAR) | {("triplet", 0.1, 0): 0.1}
    verdicts = {finding.claim: finding.verdict for finding in collapse_findings({"rows": made_up(open_question)})}
    assert verdicts["Recall@1 on unseen classes rises (triplet, pair 0.1)"] == "not shown"
    (finding,) = (
        finding
        for finding in collapse_findings({"rows": made_up(CLEAR)})
        if finding.claim.startswith("Recall@1 on unseen classes rises (triplet")
    )
    assert finding.measured.startswith("Recall@1 (%) +10.67 ± 1.43 (by seed +10.00, +11.00, +11.00)")


def test_the_page_of_a_sweep(tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    write_collapse(folder, made_up(CLEAR), **HEAD)
    page = page_with_report([folder], tmp_path / "page.md", "anti_collapse")
    assert "| ProxyAnchor, without |" in page
    assert "| abstract | Recall@1 on unseen classes rises (triplet, pair 0.1) |" in page
    assert "](digits/collapse.png)" in page
    assert "Not yet measured" not in page
    # The other paper's page knows nothing of it.
    assert "collapse" not in report([], tmp_path)


def test_a_page_without_results_says_what_is_missing(tmp_path):
    assert "- `fewshot-ext analyze collapse --data DATA --output OUTPUT`" in report([], tmp_path, "anti_collapse")
