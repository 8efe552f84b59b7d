"""Where the model computes: one device, several, several processes, or one that is smaller than
the model; and what memory that takes."""
