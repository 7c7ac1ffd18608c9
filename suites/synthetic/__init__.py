"""The preset `shapes`: models of real sizes with synthetic weights, which play scripts of routing."""
