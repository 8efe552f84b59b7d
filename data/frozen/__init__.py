"""What is done with the frozen base besides computing it: stored as integers, packed, mended,
measured, recognized, and not computed twice."""
