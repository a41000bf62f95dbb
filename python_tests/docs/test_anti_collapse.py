"""The Anti-Collapse page: claims on made-up sweeps, and the page of their file."""

from anti_collapse import collapse_findings, collapse_markdown, sign_of_mean
from experiments_cases import CLEAR, made_up
from findings import findings, page_with_findings

from fewshot_ext.experiments.collapse import SeedMean, collapse_table, write_collapse

HEAD = {"data": {"name": "digits", "sha256": "0"}, "versions": {"torch": "2"}}


def test_claims_are_shown_contradicted_or_left_open():
    verdicts = {finding.claim: finding.verdict for finding in collapse_findings(made_up(CLEAR))}
    assert len(verdicts) == 8
    assert verdicts["Recall@1 on unseen classes rises (triplet, pair 0.1)"] == "shown"
    assert verdicts["Recall@1 on unseen classes rises (ProxyAnchor, batch_proxy 1)"] == "contradicted"
    open_question = dict(CLEAR) | {("triplet", 0.1, 0): 0.1}
    verdicts = {finding.claim: finding.verdict for finding in collapse_findings(made_up(open_question))}
    assert verdicts["Recall@1 on unseen classes rises (triplet, pair 0.1)"] == "not shown"
    (finding,) = (
        finding
        for finding in collapse_findings(made_up(CLEAR))
        if finding.claim.startswith("Recall@1 on unseen classes rises (triplet")
    )
    assert finding.measured.startswith("Recall@1 (%) +10.67 ± 1.43 (by seed +10.00, +11.00, +11.00)")


def test_the_tables_of_page_and_command_tell_the_same():
    text, page = collapse_table(made_up(CLEAR)), "\n".join(collapse_markdown(made_up(CLEAR)))
    mean = SeedMean.of([0.60, 0.63, 0.59])
    for shown in (text, page):
        assert "After 2 epochs, mean ± 95 % t interval over 3 seeds" in shown
        assert f"{100 * mean.mean:.2f} ± {100 * mean.interval:.2f}" in shown
        assert "triplet, Anti-Collapse pair 0.1" in shown
    assert page.count("| seen classes |") == page.count("| unseen classes |") == 1
    assert "validation classes" not in page


def test_a_mean_over_seeds_has_a_sign_where_its_interval_leaves_zero_out():
    by_seed = ([1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [1.0, -1.0, 0.5], [5.0])
    assert [sign_of_mean(SeedMean.of(values)) for values in by_seed] == [1, -1, 0, 0]


def test_the_page_of_a_sweep(tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    write_collapse(folder, made_up(CLEAR), **HEAD)
    page = page_with_findings("anti_collapse", [folder], tmp_path / "page.md")
    assert "| ProxyAnchor, without |" in page
    assert "| abstract | Recall@1 on unseen classes rises (triplet, pair 0.1) |" in page
    assert "](digits/collapse.png)" in page
    assert "Not yet measured" not in page
    # The other paper's page knows nothing of it.
    assert "collapse" not in findings("negative_margin", [], tmp_path)


def test_a_page_without_results_says_what_is_missing(tmp_path):
    assert "- `fewshot-ext analyze collapse --data DATA --output OUTPUT`" in findings("anti_collapse", [], tmp_path)
