"""What a run is asked: a dataclass whose fields become flags, the seven methods, settings by
name, and what contradicts what."""
