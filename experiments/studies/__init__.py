"""Studies: each asks a question of the method, and writes lines, tables and figures to results/."""
