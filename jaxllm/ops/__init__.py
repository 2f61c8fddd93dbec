"""Pure functions on arrays: the mathematics of the models, without parameters, Flax or configuration of runs."""
