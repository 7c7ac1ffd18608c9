"""Reports on how far the paper's claim holds, built from records. Imports `suites.record` and nothing else of ours."""
