"""Studies: paired comparisons of variants over seeds, sweeps, and the report that people read."""
