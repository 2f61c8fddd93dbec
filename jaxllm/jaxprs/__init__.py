"""Programs as data: a jaxpr is read, run with observers or edits, or differentiated forward; no model is known."""
