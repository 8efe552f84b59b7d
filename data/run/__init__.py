"""What happens in a run and what it leaves: optimizer, log, pictures, checkpoint, state, sweep,
report."""
