"""The checklist of a trustworthy report: 32 lines, each a test of a run folder.

The lines follow the ACM's artifact badges, the NeurIPS checklist and MLPerf's inference rules, in our words.
"""
