"""The six steps from parameters to a report, as functions: what `stages/` runs; DVC is not needed."""
