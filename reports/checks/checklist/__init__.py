"""What a report must hold before anyone should believe it: 32 lines, each a test over a run folder.

The lines follow the ACM's artifact badges, the NeurIPS checklist and MLPerf's inference rules, in our words.
"""
