"""Comparison with the papers: published numbers, numbers beside ours, and a ledger of claims.

`published.yaml` has what was printed, `matches.yaml` which run of a study a row stands for, and
`claims.yaml` what the papers say in words, each as a test over results. No torch.
"""
