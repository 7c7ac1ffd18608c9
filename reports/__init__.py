"""From records to a page that says how far the paper's claim holds. Reads suites.record and nothing else of ours."""
