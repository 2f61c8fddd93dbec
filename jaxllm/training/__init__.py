"""Training as pure functions: precision, loss, loss scale, optimizer, layout over devices, and the step."""
